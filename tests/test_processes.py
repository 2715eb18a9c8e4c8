"""Several real processes on loopback, each with its own devices: what they train, save, resume and how they end.

Where one process goes on, that is the test's own.
"""

import json
import signal
import socket
import time
from pathlib import Path

import pytest
from conftest import make_config, trainer_on

from jaxlm import Trainer
from jaxlm.config import replace_fields, to_dict

ROOT = Path(__file__).parents[1]
STEPS = {"training.gradient_accumulation_steps": 2, "training.max_steps": 9, "training.save_steps": 3}
STEPS["model.n_layers"] = 1
HEARTBEAT_SECONDS = 10  # instead of 30
SCRIPT = f"""
import runpy, sys
from jaxlm.parallel import processes
processes.HEARTBEAT_SECONDS = {HEARTBEAT_SECONDS}
sys.argv[0] = {str(ROOT / "scripts/train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DROPOUT = {"model.dropout": 0.1, "model.attention_dropout": 0.1, "training.eval_steps": 3}


class Job:
    """`processes` of scripts/train.py, with `devices` each, started together."""

    def __init__(self, server, folder, config, processes, devices, each=lambda i: [], **overrides):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["-c", SCRIPT, "--config", str(folder / "config.json")]
        command += [f"--{name}={value}" for name, value in overrides.items()]
        command += [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
        self.logs = [folder / f"{port}.{i}.log" for i in range(processes)]
        self.processes = [
            server.start([*command, *each(i), f"--process_id={i}"], folder, log, log, devices)
            for i, log in enumerate(self.logs)
        ]

    def output(self, i):
        return self.logs[i].read_text(errors="replace")

    def wait_for(self, path):
        """Until `path` is there."""
        deadline = time.monotonic() + 300
        while not path.exists():
            assert time.monotonic() < deadline and self.processes[0].poll() is None, self.output(0)
            time.sleep(0.1)

    def codes(self):
        """The exit codes, when all have ended."""
        try:
            return [process.wait(300) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()


def losses(folder):
    """{step: (training loss, validation loss or 0)} of a run's folder."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["train/loss"], row.get("eval/loss", 0.0)) for row in rows}


def test_any_number_of_processes_trains_the_same(tmp_path, corpus, server):
    """2 processes x 2 devices, then 1 x 1, with other stages: the losses of one process, to rounding."""
    expected = make_config(tmp_path / "alone", corpus, **STEPS, **DROPOUT)
    Trainer(expected).train()  # on the 4 devices of this process
    config = make_config(tmp_path, corpus, **STEPS, **DROPOUT)
    run = tmp_path / "run"
    sampled = {"training.stop_at_step": 6, "training.zero_stage": 3, "training.sample_tokens": 4}
    job = Job(server, tmp_path, config, 2, 2, **sampled)
    assert job.codes() == [0, 0], job.output(0)
    assert (run / "checkpoint_6").is_dir()
    assert "step" not in job.output(1), "only the leader prints"
    trainer_on(1, replace_fields(config, {"training.zero_stage": 0})).train()
    assert (run / "checkpoint_9").is_dir()
    mine, theirs = losses(run), losses(Path(expected.training.checkpoint_dir))
    assert mine.keys() == theirs.keys()
    for step, values in theirs.items():
        assert mine[step] == pytest.approx(values, rel=1e-5), step


def test_a_lost_process_ends_the_job_and_the_next_goes_on(tmp_path, corpus, server, capsys):
    """A signal to one stops all at one step; one that is stopped or killed ends the others; fewer go on."""
    endless = {**STEPS, **DROPOUT, "training.zero_stage": 3, "training.logging_steps": 50}
    endless |= {"training.max_steps": 100_000, "training.eval_steps": 100_000}
    config = make_config(tmp_path, corpus, **endless, **{"training.save_total_limit": None})
    run = tmp_path / "run"

    job = Job(server, tmp_path, config, 2, 2)
    job.wait_for(run / "checkpoint_3")
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.codes() == [75, 75], job.output(0)
    assert "stopped: SIGTERM at step" in job.output(0) and "stopped: SIGTERM at step" in job.output(1)
    stopped_at = newest(run)

    job = Job(server, tmp_path, config, 2, 2)
    job.wait_for(run / f"checkpoint_{stopped_at - stopped_at % 3 + 6}")
    job.processes[1].send_signal(signal.SIGSTOP)
    start = time.monotonic()
    assert job.processes[0].wait(300) not in (0, 75)
    assert time.monotonic() - start < 2 * HEARTBEAT_SECONDS
    job.processes[1].kill()
    job.processes[1].wait()
    assert f"at step {stopped_at}" in job.output(0)  # where it began
    hung_at = newest(run)

    fewer = {"training.stop_at_step": hung_at + 3, "training.zero_stage": 0}
    trainer = trainer_on(1, replace_fields(config, fewer))
    assert f"resuming from {run / f'checkpoint_{hung_at}'} at step {hung_at}" in capsys.readouterr().err
    trainer.train()
    assert trainer.current_step == hung_at + 3


def newest(run):
    return max(int(path.name.partition("_")[2]) for path in run.glob("checkpoint_*") if path.name[11:].isdigit())


def test_processes_that_were_started_differently_are_refused(tmp_path, corpus, server):
    job = Job(server, tmp_path, make_config(tmp_path, corpus, **STEPS), 2, 1, each=lambda i: [f"--training.seed={i}"])
    assert job.codes() == [2, 2]
    assert "error: the configuration or the text: differs between process 0 and process(es) [1]" in job.output(0)
