"""A disk that is full for a while, writes that fail, clocks that jump: saves fail, the run and earlier saves do not."""

import gc
import itertools
import json
import resource
import shutil
import time
from collections import namedtuple
from types import CoroutineType

import jax
import pytest
from conftest import make_config

from jaxlm import Trainer
from jaxlm.checkpoints.folder import checkpoint_steps
from jaxlm.checkpoints.items import read_progress
from jaxlm.checkpoints.manifest import damage
from jaxlm.config import Config
from jaxlm.errors import RunFailed, UserError
from jaxlm.monitor.metrics import MetricsTracker
from jaxlm.monitor.sinks import JsonLines, TensorBoard

STEPS = {"training.max_steps": 8, "training.save_steps": 2, "training.eval_steps": 3}
Usage = namedtuple("Usage", "total used free")


class Filling(Trainer):
    """The disk is full from update `full[0]` on, and no longer from `full[1]` on."""

    full = (0, 0)
    patch = None

    def _log_metrics(self, loss):
        super()._log_metrics(loss)
        if self.current_step == self.full[0]:
            self.patch.setattr(shutil, "disk_usage", lambda folder: Usage(1, 1, 0))
        if self.current_step == self.full[1]:
            self.patch.undo()


def test_a_full_disk_costs_saves_and_nothing_else(tmp_path, corpus, patch, capsys):
    config = make_config(tmp_path, corpus, **STEPS, **{"training.save_total_limit": 1})
    trainer = Filling(config)
    trainer.full, trainer.patch = (3, 7), patch
    trainer.train()
    said = capsys.readouterr().err
    assert (
        said.count("was NOT saved: No space left on device, ") == 4
    )  # the best models of 3 and 6, checkpoints 4 and 6
    assert "checkpoint_6 was NOT saved" in said and "best_model was NOT saved" in said
    assert set(checkpoint_steps(tmp_path / "run")) == {8} and Trainer(config).finished


def test_a_disk_that_stays_full_ends_with_the_last_good_checkpoint(tmp_path, corpus, patch):
    config = make_config(tmp_path, corpus, **STEPS, **{"training.save_total_limit": 1})
    trainer = Filling(config)
    trainer.full, trainer.patch = (3, 99), patch
    with pytest.raises(RunFailed, match="final_model was not saved: No space left on device, .* same command again"):
        trainer.train()
    patch.undo()
    assert set(checkpoint_steps(tmp_path / "run")) == {2}
    again = Trainer(config)
    assert again.current_step == 2
    again.train()
    assert Trainer(config).finished


def test_a_write_that_fails_leaves_no_part_of_a_save(tmp_path, corpus, capsys):
    """The operating system refuses every file over 3 kB while steps 4 to 6 are being saved."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limited(Trainer):
        def save_checkpoint(self):
            small = self.current_step < 7
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000 if small else unlimited[0], unlimited[1]))
            super().save_checkpoint()
            self.checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    options = {"training.max_steps": 8, "training.save_steps": 2, "training.eval_steps": 8}
    config = make_config(tmp_path, corpus, **options)
    try:
        Limited(config).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "checkpoint_4 was NOT saved: " in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").glob("checkpoint_*")} == {"checkpoint_8"}
    assert damage(tmp_path / "run" / "checkpoint_8") is None
    assert not [x for x in gc.get_objects() if type(x) is CoroutineType], "writes that Python complains about later"


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, capsys):
    class Full(JsonLines):
        def write(self, row, step):
            raise OSError(28, "No space left on device")

    log = TensorBoard(tmp_path / "logs", 0, Config())
    tracker = MetricsTracker([Full(tmp_path), log])
    for step in range(3):
        tracker.update({"train/loss": 1.0}, step)
        tracker.flush(step)
    tracker.close()
    line = "Full.write at step 0: not written: No space left on device; the run goes on without it"
    assert capsys.readouterr().err == line + "\n"
    assert tracker.get_latest("train/loss") == 1.0


def test_a_row_cut_short_by_a_crash_goes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "train/lo')
    log = JsonLines(tmp_path)
    log.write({"train/loss": 3.0}, 2)
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_clocks_may_jump(tmp_path, corpus, patch):
    """Wall-clock time runs backwards, an hour a look, and its names are all alike: nothing depends on it."""
    backwards = itertools.count(time.time(), -3600)
    patch.setattr(time, "time", lambda: next(backwards))
    patch.setattr(time, "strftime", lambda *_: "20000101_000000")
    config = make_config(tmp_path, corpus, **{"training.max_steps": 1})
    Trainer(config).train()
    for _ in range(2):
        Trainer(config, fresh=True).train()
    assert Trainer(config).finished
    assert len(list(tmp_path.glob("run.20000101_000000*"))) == 2


def test_a_folder_has_one_run(tmp_path, corpus):
    """Another process that trains in the folder is refused until this one ends."""
    import subprocess
    import sys
    import textwrap

    hold = """
        import sys
        from filelock import FileLock
        with FileLock(sys.argv[1]):
            print("held", flush=True)
            sys.stdin.read()
    """
    config = make_config(tmp_path, corpus, **{"training.max_steps": 1})
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(hold), str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        for fresh in (False, True):
            with pytest.raises(UserError, match=r"checkpoint_dir \(.*run\): another run is using it"):
                Trainer(config, fresh=fresh)
        other.kill()
    Trainer(config).train()


def test_a_declined_save_of_another_model_leaves_the_old_one(tmp_path, corpus, patch):
    """The leader can't put the new model in its place: the old one is still there, and whole."""
    trainer = Trainer(make_config(tmp_path, corpus, **{"training.max_steps": 1}))
    trainer.train()
    before = jax.tree.map(lambda x: x, read_progress(tmp_path / "run" / "best_model"))

    def fail(folder, final):
        raise OSError(5, "Input/output error")

    patch.setattr("jaxlm.checkpoints.save.seal", fail)
    with pytest.raises(OSError, match="Input/output error"):
        trainer.save_model(tmp_path / "run" / "best_model")
    assert damage(tmp_path / "run" / "best_model") is None
    assert read_progress(tmp_path / "run" / "best_model") == before
