"""training.profile_steps: a trace of just the updates that were asked for."""

import gzip
import json

import pytest
from conftest import make_config

from jaxlm import Trainer
from jaxlm.config import replace_fields, validate
from jaxlm.errors import UserError


@pytest.mark.slow
def test_the_trace_holds_the_updates_asked_for(tmp_path, corpus, capsys):
    config = make_config(tmp_path, corpus, **{"training.profile_steps": "2:3", "training.eval_steps": 100})
    Trainer(config).train()
    (trace,) = (tmp_path / "run" / "logs" / "plugins" / "profile").glob("*/*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    updates = [event["args"]["step_num"] for event in events if event.get("name") == "update" and "args" in event]
    assert updates == ["2", "3"]
    assert "profile of updates 2 to 3" in capsys.readouterr().err
    assert (trace.parent / "perfetto_trace.json.gz").exists()


@pytest.mark.parametrize("steps", ["3", "0:2", "3:2", "a:b", "-1:2", "1:2:3"])
def test_other_values_are_refused(tmp_path, corpus, steps):
    with pytest.raises(UserError, match=r"training\.profile_steps .* must be A:B"):
        validate(make_config(tmp_path, corpus, **{"training.profile_steps": steps}))


def test_a_run_that_ends_before_is_refused(tmp_path, corpus):
    config = replace_fields(make_config(tmp_path, corpus), {"training.profile_steps": "5:6"})
    with pytest.raises(UserError, match="begins after the run's last update, 4"):
        Trainer(config)
