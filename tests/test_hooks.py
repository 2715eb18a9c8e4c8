"""Hooks, and the ways in which a run ends before its last update; each one goes on to the end of the run in one go."""

import gc
import os
import signal
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from conftest import make_config
from test_trainer import arrays, assert_same, rows_of

from jaxlm import Hook, Result, Trainer, evaluate, load
from jaxlm.checkpoints.folder import checkpoint_steps
from jaxlm.checkpoints.items import read_progress
from jaxlm.config.validate import seconds_of
from jaxlm.errors import Stopped, UserError
from jaxlm.report.runs import read_lines

# So high a learning rate that the losses of the first two evaluations are above that of the untrained model.
OPTIONS = {
    "model.n_layers": 1,
    "model.dropout": 0.1,
    "training.learning_rate": 0.3,
    "training.max_steps": 12,
    "training.eval_on_start": True,
    "training.eval_steps": 2,
    "training.save_steps": 100,
}
PATIENCE = "training.early_stopping_patience"


class Calls(Hook):
    """Notes what it is called with, and adds a metric of its own."""

    def __init__(self):
        self.calls = []

    def note(self, run, name, what):
        self.calls.append((name, run.current_step, what))

    def on_start(self, run):
        self.note(run, "start", run.total_steps)

    def on_update(self, run):
        self.note(run, "update", int(run.state.step))

    def on_log(self, run, row):
        self.note(run, "log", row["train/loss"])
        run.metrics_tracker.update({"own/steps_left": run.total_steps - run.current_step}, run.current_step)

    def on_evaluate(self, run, metrics):
        self.note(run, "evaluate", metrics["loss"])

    def on_save(self, run, path):
        assert (path / "manifest.json").is_file()
        self.note(run, "save", path.name)
        run.save_checkpoint()  # which is there, so that nothing comes of it

    def on_end(self, run, result):
        self.note(run, "end", (result.step, result.finished))


class At(Hook):
    """Does something after an update."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_update(self, run):
        if run.current_step == self.step:
            self.do(run)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    """The folder of a run that nothing ends early, and what its hook was called with."""
    hook, folder = Calls(), tmp_path_factory.mktemp("whole")
    Trainer(make_config(folder, corpus, **OPTIONS | {"training.save_steps": 6}), hooks=[hook]).train()
    return folder / "run", hook.calls


def assert_ends_as(run, whole):
    assert_same(arrays(run / "checkpoint_12"), arrays(whole / "checkpoint_12"))
    one, other = (
        [{k: x for k, x in row.items() if k != "own/steps_left"} for row in rows_of(folder).values()]
        for folder in (run, whole)
    )
    assert one == other


def test_hooks_are_called_as_things_happen(whole):
    run, calls = whole
    rows = rows_of(run)
    names = [(name, step) for name, step, _ in calls]
    assert names[:8] == [
        *[("start", 0), ("evaluate", 0), ("update", 1), ("log", 1), ("update", 2), ("log", 2), ("evaluate", 2)],
        ("update", 3),
    ]
    assert names[-5:] == [("update", 12), ("log", 12), ("evaluate", 12), ("save", 12), ("end", 12)]
    seen = {(name, step): what for name, step, what in calls}
    assert [seen["update", step] for step in range(1, 13)] == list(range(1, 13))
    assert [seen["log", step] for step in range(1, 13)] == [rows[step]["train/loss"] for step in range(1, 13)]
    assert all(seen["evaluate", step] == rows[step]["eval/loss"] for step in (0, 2, 4, 12))
    assert [rows[step]["own/steps_left"] for step in range(1, 13)] == list(range(11, -1, -1))
    assert (seen["save", 6], seen["start", 0], seen["end", 12]) == ("checkpoint_6", 12, (12, True))


def test_a_run_that_its_hook_stops_or_fails_goes_on_to_the_same_end(tmp_path, corpus, whole, capfd):
    """Also what was due at the update of the failure is done: here its evaluation, and the calls of others."""
    config, last = make_config(tmp_path, corpus, **OPTIONS), Calls()
    with pytest.raises(Stopped, match=r"^warm enough at step 3; it is saved, the same command goes on$"):
        Trainer(config, hooks=[At(3, lambda run: run.stop("warm enough")), last]).train()
    assert last.calls[-1] == ("end", 3, (3, False))
    with pytest.raises(ZeroDivisionError):
        Trainer(config, hooks=[At(6, lambda run: 1 / 0), last]).train()
    line = "failed: At.on_update raised ZeroDivisionError (division by zero) at step 6; it is saved, the same command"
    assert f"\n{line} goes on\n" in capfd.readouterr().err
    assert last.calls[-1][1] == 5 and "eval/loss" in rows_of(tmp_path / "run")[6]
    trainer = Trainer(config, hooks=[At(7, lambda run: os.kill(os.getpid(), signal.SIGUSR1))])
    another = Trainer(config)
    with pytest.raises(Stopped, match="^SIGUSR1 at step 7") as stopped:
        trainer.train()
    assert isinstance(stopped.value, SystemExit) and stopped.value.code == 75, "as a program ends that lets it pass"
    for each, problem in (trainer, "this Trainer has trained"), (another, "another Trainer has trained in .*run"):
        with pytest.raises(UserError, match=f"^{problem} already; make a new one with the same arguments"):
            each.train()
    with pytest.raises(SystemExit, match="3"):
        Trainer(config, hooks=[At(9, lambda run: sys.exit(3))]).train()
    assert "stopped: At.on_update raised SystemExit (3) at step 9; it is saved" in capfd.readouterr().err
    trainer = Trainer(config)
    assert trainer.train() == trainer.train() == Trainer(config).train(), "of a finished run"
    assert set(checkpoint_steps(tmp_path / "run")) == {7, 9, 12}
    assert [start["step"] for start in read_lines(tmp_path / "run" / "starts.jsonl")] == [0, 3, 6, 7, 9]
    assert_ends_as(tmp_path / "run", whole[0])


def test_a_time_limit_saves_and_the_run_goes_on(tmp_path, corpus, whole):
    for step, limit in ((1, 1e-9), (2, "0.001s")):
        with pytest.raises(Stopped, match=rf"^training.max_time \({limit}\) at step {step}; it is saved"):
            Trainer(make_config(tmp_path, corpus, **OPTIONS, **{"training.max_time": limit})).train()
    result = Trainer(make_config(tmp_path, corpus, **OPTIONS, **{"training.max_time": "1h"})).train()
    assert_ends_as(tmp_path / "run", whole[0])
    assert result.rows()[-1]["eval/loss"] == result.last["eval/loss"] == rows_of(whole[0])[12]["eval/loss"]
    evaluated = [row for row in rows_of(whole[0]).values() if "eval/loss" in row]
    best = min(evaluated, key=lambda row: row["eval/loss"])
    assert {k: result.best[k] for k in ("step", "eval/loss")} == {k: best[k] for k in ("step", "eval/loss")}
    assert (result.best_model, result.final_model) == (tmp_path / "run/best_model", tmp_path / "run/final_model")
    assert result._repr_html_().startswith("<iframe srcdoc=") and "&lt;h1&gt;run&lt;/h1&gt;" in result._repr_html_()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("1.5m", 90), ("2h", 7200), ("2d", 172800), ("23:30:00", 84600), ("1-12:00:30", 129630), (7.5, 7.5)],
)
def test_times(text, seconds):
    assert seconds_of("x", text) == seconds


def test_early_stopping_finishes_at_the_same_evaluation_when_resumed(tmp_path, corpus, whole, capfd):
    """Stopped between the two evaluations that it counts; a run with a larger patience goes on to the end of all."""
    impatient = OPTIONS | {PATIENCE: 2}
    once, config = (make_config(folder, corpus, **impatient) for folder in (tmp_path / "once", tmp_path))
    result = Trainer(once).train()
    assert (result.step, result.finished) == (4, True) and result.best["step"] == 0
    with pytest.raises(Stopped):
        Trainer(config, hooks=[At(3, lambda run: run.stop("between"))]).train()
    assert Trainer(config).train().step == 4
    assert "finished early, at step 4 of 12: " in capfd.readouterr().err
    assert_same(arrays(tmp_path / "run/checkpoint_4"), arrays(tmp_path / "once/run/checkpoint_4"))
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "once/run")
    again = Trainer(config)
    assert again.finished and again.train().finished
    assert "a larger training.early_stopping_patience goes on" in capfd.readouterr().err
    (tmp_path / "run/final_model/manifest.json").unlink()
    rewritten = Trainer(config)
    assert not rewritten.finished and rewritten.train().final_model is not None
    Trainer(make_config(tmp_path, corpus, **OPTIONS | {PATIENCE: 3})).train()
    assert_ends_as(tmp_path / "run", whole[0])


def test_what_a_hook_saves_knows_the_evaluation_of_that_update(tmp_path, corpus):
    """And a run is let go without a search for cycles: a sweep's next one needs its memory."""
    options = {
        "training.max_steps": 2,
        "training.eval_steps": 1,
        "training.save_steps": 2,
        "training.learning_rate": 1e-3,
    }
    trainer = Trainer(
        make_config(tmp_path, corpus, **OPTIONS | options), hooks=[At(1, lambda run: run.save_checkpoint())]
    )
    trainer.train()
    rows = rows_of(trainer.folder)
    assert read_progress(trainer.folder / "checkpoint_1").best_loss == min(rows[step]["eval/loss"] for step in (0, 1))
    here = weakref.ref(trainer)
    gc.disable()
    del trainer
    gc.enable()
    assert here() is None


def test_what_is_added_at_the_start_comes_in_the_next_row(tmp_path, corpus):
    class Adds(Hook):
        def on_start(self, run):
            run.metrics_tracker.update({"own/start": run.current_step}, run.current_step)

    config = make_config(tmp_path, corpus, **OPTIONS | {"training.max_steps": 2})
    with pytest.raises(Stopped):
        Trainer(config, hooks=[At(1, lambda run: run.stop("enough"))]).train()
    result = Trainer(config, hooks=[Adds()]).train()
    by_step = {row["step"]: row for row in result.rows()}
    assert "train/loss" in by_step[1] and by_step[2]["own/start"] == 1


def test_hooks_that_nothing_would_call_are_refused(tmp_path, corpus):
    class Mistyped(Hook):
        def on_evaluation(self, run, metrics):
            raise AssertionError

    config = make_config(tmp_path, corpus)
    with pytest.raises(UserError, match=r"^hooks \(Mistyped.on_evaluation\): never called \(did you mean on_evaluate"):
        Trainer(config, hooks=[Mistyped()])
    with pytest.raises(UserError, match=r"^hooks \(<class .*\): is no object of a class derived from jaxlm.Hook$"):
        Trainer(config, hooks=[Mistyped])
    assert not (tmp_path / "run").exists()


def test_what_fails_before_and_after_the_updates_is_named_too(tmp_path, corpus, capfd):
    class Failing(Hook):
        def on_start(self, run):
            raise KeyError("no such thing")

    config = make_config(tmp_path, corpus, **OPTIONS)
    with pytest.raises(KeyError):
        Trainer(config, hooks=[Failing()]).train()
    assert "failed: Failing.on_start raised KeyError ('no such thing') at step 0; " in capfd.readouterr().err


def test_what_is_imported_from_the_top(whole, tmp_path, corpus):
    """A configuration by its file, the saved model's loss as it was logged, its parameters layer by layer."""
    run, file = whole[0], str(corpus / "validation.jsonl")
    result = Trainer(run / "config.json").train()  # which is finished
    assert isinstance(result, Result) and (result.step, result.total_steps, result.finished) == (12, 12, True)
    loaded, logged = load(run / "final_model"), rows_of(run)[12]["eval/loss"]
    for found in (evaluate(loaded), evaluate(str(run / "final_model"), Path(file), batch_size=3)):
        assert found["loss"] == pytest.approx(logged, rel=1e-5)
    with pytest.raises(UserError, match=r"^batch_size \(0\) must be at least 1$"):
        evaluate(loaded, batch_size=0)
    stacked, each = loaded.params_by_name(), loaded.params_by_name(unstacked=True)
    assert stacked.keys() - each.keys() == {name for name in stacked if name.startswith("blocks/")}
    np.testing.assert_array_equal(each["blocks/0/mlp/up/kernel"], stacked["blocks/mlp/up/kernel"][0])
    assert sum(x.size for x in each.values()) == sum(x.size for x in stacked.values()) == 19_232
