"""SIGKILL, a few times: the long form is benchmarks/soak.py, run by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


SOAK = "import soak; soak.UPDATES = 12; soak.main()"


def test_killed_runs_end_bit_equal(tmp_path):
    """Twice, when a save has begun."""
    command = [sys.executable, "-c", SOAK, "--kills=2", "--seed=8", "--json", str(tmp_path / "result.json")]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "TMPDIR": str(tmp_path)}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'benchmarks'}"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kills"] == 2 and result["bit_equal"] == result["rounds"] >= 1
