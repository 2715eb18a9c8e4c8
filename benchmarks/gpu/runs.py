"""Runs of scripts/train.py for losses.py and resume.py: started, killed, waited for, and read afterwards."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lib.machine import ROOT, without_paths
from lib.workers import WorkerFailed

PATIENCE = 300  # seconds for one run; suite.py ends the part before that
SMALL = {  # configs/small.py, cut in tokens; nothing is saved or evaluated that is not asked for
    "training.batch_size": 8,
    "training.logging_steps": 1,
    "training.eval_steps": 10**6,
    "training.save_steps": 10**6,
    "training.sample_tokens": 0,
    "training.report_to": "[]",
    "data.max_length": 256,
}
TINY = {  # besides, to be quick on a CPU
    "model.vocab_size": 300,
    "model.d_model": 32,
    "model.n_heads": 2,
    "model.n_layers": 2,
    "model.d_ff": 64,
    "training.batch_size": 2,
    "data.max_length": 64,
    "data.min_length": 2,
}


class Run:
    """A run of the small model in `folder`.

    Args:
      spec: suite.py's, with `cut`, `text` and `platform`.
      overrides: {"section.field": value}, as on the command line.
      caches: folder of the text's and the compiler's caches.
      environment: added to this process's.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        folder: Path,
        caches: Path,
        overrides: dict[str, Any],
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        options = SMALL | (TINY if spec["cut"] else {}) | overrides
        options |= {"training.checkpoint_dir": folder, "data.cache_dir": caches}
        if spec["text"] is not None:
            options["data.train_files"] = json.dumps(spec["text"])
        self.command = [sys.executable, str(ROOT / "scripts/train.py"), "--config", str(ROOT / "configs/small.py")]
        self.command += [f"--{name}={_written(value)}" for name, value in options.items()]
        # Several run at a time, so none takes the device's memory for itself in advance.
        self.environment = {"JAX_PLATFORMS": spec["platform"], "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.environment |= environment or {}

    def start(self) -> "Run":
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | self.environment
            )
        return self

    def wait(self) -> None:
        """Until it has ended.

        Raises:
          WorkerFailed: not with exit code 0; the message is its last line.
        """
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.end()
            raise WorkerFailed(f"still running after {PATIENCE} s") from None
        if code:
            raise WorkerFailed(self._last_line() or f"exit code {code}")

    def kill_after(self, checkpoint: str) -> None:
        """Kills it (SIGKILL, to which no program can react) when `checkpoint` is there.

        Raises:
          WorkerFailed: it ended before.
        """
        end = time.monotonic() + PATIENCE
        while not (self.folder / checkpoint).is_dir():
            if self.process.poll() is not None or time.monotonic() > end:
                self.end()
                raise WorkerFailed(f"no {checkpoint} before the run ended: {self._last_line()}")
            time.sleep(0.001)
        self.end()
        if (self.folder / "final_model").is_dir():
            raise WorkerFailed(f"the run had ended when it was to be killed after {checkpoint}")

    def end(self) -> None:
        """Kills it, if it still runs."""
        self.process.kill()
        self.process.wait()

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").replace("\r", "\n").strip()
        return without_paths(lines.rpartition("\n")[2])

    def rows(self) -> dict[int, dict[str, float]]:
        """{step: its row of metrics.jsonl}; the later one of a step wins."""
        rows = {}
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # what a kill left of a line
                row = json.loads(line)
                rows[row["step"]] = row
        return rows

    def losses(self) -> dict[int, float]:
        return {step: row["train/loss"] for step, row in self.rows().items()}


def _written(value: Any) -> str:
    """As the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
