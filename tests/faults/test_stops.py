"""A stop signal at any moment of a run, and a hang: how the process ends, and that the same command goes on."""

import json
import os
import re
import signal
import socket
import sys
import textwrap

import pytest
from conftest import make_config

import jaxlm.checkpoints.save
import jaxlm.run.begin
import jaxlm.run.feed
import jaxlm.run.text
import jaxlm.train.assemble
import jaxlm.trainer
from jaxlm import Trainer
from jaxlm.checkpoints.folder import checkpoint_steps
from jaxlm.checkpoints.save import Checkpoints
from jaxlm.commands.exits import run_and_exit
from jaxlm.config import to_dict
from jaxlm.train.assemble import Assembly

STEPS = {"training.max_steps": 9, "training.save_steps": 2, "training.eval_steps": 3}

# What is under way when SIGTERM comes: who does it, and how the process ends.
MOMENTS = {
    "looking for devices": (jaxlm.run.begin, "start_backend", 75),
    "tokenizing": (jaxlm.run.text, "prepare_all", 75),
    "packing": (jaxlm.run.text, "plan_cached", 75),
    "building the model": (jaxlm.train.assemble, "first_state", 75),
    "compiling": (Assembly, "lower_step", 75),
    "logging": (Trainer, "_log_metrics", 75),
    "evaluating": (jaxlm.run.feed, "evaluate_batches", 75),
    "saving a checkpoint": (Checkpoints, "save", 75),
    "sealing a checkpoint": (jaxlm.checkpoints.save, "seal", 75),
    "saving the best model": (Trainer, "_save_best_model", 75),
    "saving the final model": (Trainer, "_save_final_model", 0),
}


def exit_code(config):
    """Of `scripts/train.py` with this configuration."""
    with pytest.raises(SystemExit) as ended:
        run_and_exit(lambda: Trainer(config).train())
    return ended.value.code or 0


def stop_at(moment, config, patch):
    """The exit code of the command that gets SIGTERM at this moment, the first time that it comes."""
    owner, name, _ = MOMENTS[moment]
    original, calls = getattr(owner, name), []

    def interrupted(*arguments, **options):
        calls.append(name)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    patch.setattr(owner, name, interrupted)
    patch.setattr(os, "_exit", sys.exit)  # which a stop before the first update ends with
    if moment in ("building the model", "compiling"):  # else that of an earlier run is taken
        patch.setattr(jaxlm.train.assemble, "_assembled", Assembly)
    code = exit_code(config)
    assert calls, moment
    return code


def test_sigterm_at_any_moment(tmp_path, corpus, capsys):
    """One run, stopped at each of them in turn: the same command goes on each time, and so it comes to its end."""
    config = make_config(tmp_path, corpus, **STEPS)
    for moment, (_, _, code) in MOMENTS.items():
        with pytest.MonkeyPatch.context() as patch:
            assert stop_at(moment, config, patch) == code, moment
        said = capsys.readouterr().err
        lines = r"^stopped: SIGTERM.*the same command (goes on|starts again)$"
        assert code == 0 or re.search(lines, said, re.MULTILINE), (moment, said)
        assert not checkpoint_steps(tmp_path / "run") or "resuming from" in said or moment == "logging", said
    assert Trainer(config).finished and max(checkpoint_steps(tmp_path / "run")) == STEPS["training.max_steps"]


HANG = """
    import sys, threading
    from jaxlm import Trainer
    from jaxlm.commands.exits import run_and_exit
    from jaxlm.parallel import processes as distributed
    from jaxlm.config import load_config, replace_fields

    class Hanging(Trainer):
        def _log_metrics(self, loss):
            super()._log_metrics(loss)
            if self.current_step == 3 and sys.argv[4:] in ([], ["1"]):
                threading.Event().wait()

    def run():
        if len(sys.argv) > 3:
            distributed.start(f"127.0.0.1:{sys.argv[3]}", 2, int(sys.argv[4]))
        config = replace_fields(load_config(sys.argv[1]), {"training.watchdog_seconds": int(sys.argv[2])})
        trainer = Hanging(config)
        if sys.argv[4:] == ["1"]:
            trainer._watchdog.limit = 100  # the one that waits shall speak first
        trainer.train()

    run_and_exit(run)
"""


def start(server, tmp_path, config, *arguments):
    """The process, and the file that has its stderr."""
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    said = tmp_path / f"said.{len(list(tmp_path.glob('said.*')))}"
    said.touch()
    command = ["-c", textwrap.dedent(HANG), str(tmp_path / "config.json"), *arguments]
    return server.start(command, tmp_path, tmp_path / "stdout", said, 1), said


def test_a_hang_ends_the_run_with_all_stacks(tmp_path, corpus, server):
    process, file = start(server, tmp_path, make_config(tmp_path, corpus, **STEPS), "3")
    assert process.wait(120) == 1
    said = file.read_text()
    assert "failed: the update after step 0: " in said and "no sign of life for 3 s (training.watchdog_seconds)" in said
    assert "in _log_metrics" in said, "the stack shows where it hung"
    assert set(checkpoint_steps(tmp_path / "run")) == {2}


@pytest.mark.slow
def test_a_process_that_hangs_is_named(tmp_path, corpus, server):
    """One of two stops computing while its heartbeat goes on: both end, and the other one says which it was."""
    config = make_config(tmp_path, corpus, **STEPS | {"training.max_steps": 1000, "training.eval_steps": 1000})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes, files = zip(*[start(server, tmp_path, config, "5", port, str(i)) for i in range(2)], strict=True)
    assert 0 not in [process.wait(200) for process in processes]
    said = [file.read_text() for file in files]
    assert re.search(r"no sign of life for 5 s .*; behind the others is process 1 at: the update after ", said[0]), said
