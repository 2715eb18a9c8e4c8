"""Several real processes on loopback, each with its own devices: what they train, save, resume and how they end.

Where one process goes on, that is the test's own.
"""

import json
import socket
import time
from pathlib import Path

import pytest
from conftest import make_config, slow, trainer_on

from jaxlm.config import replace_fields, to_dict

ROOT = Path(__file__).parents[1]
STEPS = {"training.gradient_accumulation_steps": 2, "training.max_steps": 9, "training.save_steps": 3}
STEPS["model.n_layers"] = 1
HEARTBEAT_SECONDS = 10  # instead of 30
SCRIPT = f"""
import os, pathlib, runpy, signal, sys
from jaxlm import Trainer
from jaxlm.parallel import processes

processes.HEARTBEAT_SECONDS = {HEARTBEAT_SECONDS}
log_metrics = Trainer._log_metrics

def and_signal(trainer, loss):
    log_metrics(trainer, loss)
    if trainer.current_step == int(os.environ.get("SIGNAL_AT", 0)):
        pathlib.Path("signalled").touch()
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))

Trainer._log_metrics = and_signal
sys.argv[0] = {str(ROOT / "scripts/train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DROPOUT = {"model.dropout": 0.1, "model.attention_dropout": 0.1, "training.eval_steps": 3}


class Job:
    """Two of scripts/train.py, with `devices` each, started together; process 1 gets a signal after an update."""

    def __init__(self, server, folder, config, devices, each=lambda i: [], signal_at=(0, "SIGTERM"), **overrides):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["-c", SCRIPT, "--config", str(folder / "config.json")]
        command += [f"--{name}={value}" for name, value in overrides.items()]
        command += [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
        self.logs = [folder / f"{port}.{i}.log" for i in range(2)]
        signals = [{}, {"SIGNAL_AT": str(signal_at[0]), "SIGNAL": signal_at[1]}]
        self.processes = [
            server.start([*command, *each(i), f"--process_id={i}"], folder, log, log, devices, **signals[i])
            for i, log in enumerate(self.logs)
        ]

    def output(self, i):
        return self.logs[i].read_text(errors="replace")

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


@pytest.mark.parametrize("hangs", [False, slow(True)])
def test_any_number_of_processes_trains_the_same_however_it_ends(tmp_path, corpus, server, capsys, hangs):
    """The losses of one process, to rounding: of 2 processes x 2 devices, then 1 x 1, with another stage.

    A signal to one of two stops both at one step; when one `hangs`, the other ends; the job goes on each time.
    """
    expected = make_config(tmp_path / "alone", corpus, **STEPS | DROPOUT | {"training.gradient_accumulation_steps": 8})
    trainer_on(1, expected).train()  # the same rows: with the program of the last stage below
    config = make_config(tmp_path, corpus, **STEPS, **DROPOUT, **{"training.save_total_limit": None})
    options = {"training.zero_stage": 3, "training.sample_tokens": 4}
    run = tmp_path / "run"

    job = Job(server, tmp_path, config, 2, signal_at=(2, "SIGTERM"), **options)
    assert job.codes() == [75, 75], job.output(0)
    stopped_at = newest(run)
    assert 2 <= stopped_at < 6 and f"stopped: SIGTERM at step {stopped_at};" in job.output(0)
    assert f"stopped: SIGTERM at step {stopped_at};" in job.output(1)
    assert "step 1/9" in job.output(0) and "step 1/9" not in job.output(1), "only the leader prints"

    if hangs:
        job = Job(server, tmp_path, config, 2, signal_at=(8, "SIGSTOP"), **options)
        assert job.processes[0].wait(300) not in (0, 75)
        assert time.time() - (tmp_path / "signalled").stat().st_mtime < 2 * HEARTBEAT_SECONDS
        job.processes[1].kill()
        job.processes[1].wait()
        assert f"at step {stopped_at}" in job.output(0)  # where it began
        assert stopped_at < newest(run) < 9
    reached = newest(run)

    trainer = trainer_on(1, replace_fields(config, {"training.zero_stage": 0}))
    assert f"resuming from {run / f'checkpoint_{reached}'} at step {reached}" in capsys.readouterr().err
    trainer.train()
    assert (run / "checkpoint_9").is_dir()
    mine, theirs = losses(run), losses(Path(expected.training.checkpoint_dir))
    assert mine.keys() == theirs.keys()
    for step, values in theirs.items():
        assert mine[step] == pytest.approx(values, rel=1e-5), step


def newest(run):
    return max(int(path.name.partition("_")[2]) for path in run.glob("checkpoint_*") if path.name[11:].isdigit())


def test_processes_that_were_started_differently_are_refused(tmp_path, corpus, server):
    job = Job(server, tmp_path, make_config(tmp_path, corpus, **STEPS), 1, each=lambda i: [f"--training.seed={i}"])
    assert job.codes() == [2, 2]
    assert "error: the configuration or the text: differs between process 0 and process(es) [1]" in job.output(0)
