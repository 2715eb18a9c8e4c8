"""SIGKILL, a few times: the long form is benchmarks/soak.py, run by hand."""

import importlib
from pathlib import Path

from jaxlm.config import replace_fields

ROOT = Path(__file__).parents[2]


def test_killed_runs_end_bit_equal(tmp_path, corpus, server, monkeypatch):
    """Twice, when a save has begun."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    soak = importlib.import_module("soak")
    configuration = soak.configuration

    def start(run):
        """As soak.py starts it, but for the import."""
        run.log.write_text("")
        return server.start(["scripts/train.py", "--config", str(run.file)], ROOT, run.log, run.log, 1)

    monkeypatch.setattr(soak.Run, "start", start)
    monkeypatch.setattr(soak, "UPDATES", 6)
    cache = {"data.cache_dir": str(corpus / "cache")}  # of compiled programs, too
    monkeypatch.setattr(soak, "configuration", lambda *what: replace_fields(configuration(*what), cache))
    result = soak.soak(tmp_path, kills=2, seed=8)
    assert result.kills == 2 and result.bit_equal == result.rounds == 1
    assert not any(moment.startswith("nothing") for moment in result.moments), result.moments
