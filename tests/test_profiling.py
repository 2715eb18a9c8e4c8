"""training.profile_steps: a trace of just the updates that were asked for."""

import gzip
import json

import pytest
from conftest import make_config

from jaxlm import Trainer
from jaxlm.config import replace_fields, validate
from jaxlm.errors import UserError
from jaxlm.monitor.profiling import Profiler


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


def test_a_run_that_goes_on_in_the_midst_traces_the_rest(tmp_path, monkeypatch):
    traced, at = [], 0
    monkeypatch.setattr("jax.profiler.start_trace", lambda *_, **__: traced.append(f"from {at}"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: traced.append(f"to {at}"))
    (tmp_path / "plugins" / "profile" / "now").mkdir(parents=True)
    profiler = Profiler("2:4", tmp_path, 9)
    for at in range(3, 7):
        profiler.update(at, ())
        profiler.stop_after(at, ())
    assert traced == ["from 3", "to 4"]


@pytest.mark.parametrize("steps", ["3", "0:2", "3:2", "a:b", "-1:2", "1:2:3"])
def test_other_values_are_refused(tmp_path, corpus, steps):
    with pytest.raises(UserError, match=r"training\.profile_steps .* must be A:B"):
        validate(make_config(tmp_path, corpus, **{"training.profile_steps": steps}))


def test_a_run_that_ends_before_is_refused(tmp_path, corpus):
    config = replace_fields(make_config(tmp_path, corpus), {"training.profile_steps": "5:6"})
    with pytest.raises(UserError, match="begins after the run's last update, 4"):
        Trainer(config)


def test_that_a_run_has_passed_them_is_said(tmp_path, corpus, capsys):
    config = make_config(tmp_path, corpus, **{"training.stop_at_step": 2})
    Trainer(config).train()
    Trainer(replace_fields(config, {"training.profile_steps": "1:2", "training.stop_at_step": 3})).train()
    assert "training.profile_steps (1:2): no profile, as update 2 has been made" in capsys.readouterr().err
    assert not (tmp_path / "run" / "logs").exists()
