"""The benchmarks, cut down, so that a change of the program can't break them unseen."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALLEST = ["--d_model=32", "--n_heads=2", "--n_layers=1", "--d_ff=64", "--vocab_size=300", "--seq_len=32"]


def run(tmp_path: Path, program: str, *options: str) -> tuple[str, dict[str, Any]]:
    """What `program` prints, and the result file that it writes."""
    command = [sys.executable, str(BENCHMARKS / program), *options, "--out", str(tmp_path / "out")]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = (tmp_path / "out").iterdir()
    return done.stdout, json.loads(written.read_text())


@pytest.mark.xdist_group("processes")
def test_speed_side_by_side(tmp_path: Path, corpus: Path) -> None:
    peers = ["eager"] if find_spec("torch") and find_spec("transformers") else []
    text = ["--text", str(corpus / "train.jsonl"), "--cache_dir", str(corpus / "cache")]
    measured = ["--repeats=2", "--laps=2", "--updates_a_lap=2", "--tokens=64", "--precision=float32", "--dropout=0"]
    options = ["--only", "ours", *peers, "--no-peak", *text, *measured, *SMALLEST]
    shown, report = run(tmp_path, "cpu.py", *options)
    assert [result["contender"] for result in report["results"]] == ["ours", *peers]
    for result in report["results"]:
        assert [len(turn) for turn in result["turns"]] == [2, 2] and 3 < result["loss"] < 8
        rates = [2 * 2 * 64 / sum(turn) for turn in result["turns"]]
        assert result["tokens_per_second"]["min"] == pytest.approx(min(rates))
        assert result["peak_bytes"] > 50 * 2**20
    assert "| 2 x 32 | float32 | 0 | jaxlm |" in shown
