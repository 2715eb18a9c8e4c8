"""Sweeps: which points are tried, that each is the run it would be alone, and that a stopped sweep goes on."""

import json
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import make_config

from jaxlm import Trainer
from jaxlm.__main__ import run as command
from jaxlm.commands.sweep import axis_of, by_program, resolved
from jaxlm.config import load_config, replace_fields, to_dict
from jaxlm.errors import RunFailed, Stopped, UserError
from jaxlm.report.runs import read_run
from jaxlm.run.sweep import Trial, named, points
from jaxlm.train import assemble

RATE, LAYERS, SEED = "training.learning_rate", "model.n_layers", "training.seed"
TINY = {"model.n_layers": 1, "model.d_model": 16, "training.max_skipped_steps": 0}
VARIED = ["--vary", f"{RATE}=1e38,1e-3,1e-2", "--vary", f"{SEED}=1,2"]
BEST = "learning_rate=0.01,seed=1"


# ------------------------------------------------------------ points


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (f"{RATE}=1e-3,0.01", [1e-3, 0.01]),
        (f"{RATE}=1e-4:1e-2:log:5", [1e-4, 0.00031623, 1e-3, 0.0031623, 1e-2]),
        (f"{RATE}=0.001234567:1:lin:3", [0.001234567, 0.50062, 1.0]),
        (f"{LAYERS}=2:8:lin:4", [2, 4, 6, 8]),
        (f"{LAYERS}=1:100:log:3", [1, 10, 100]),
        ("training.max_grad_norm=none, 1", [None, 1.0]),
        ("training.max_grad_norm=0.5:2:log:3", [0.5, 1.0, 2.0]),
        ("model.norm=layernorm,rmsnorm", ["layernorm", "rmsnorm"]),
        ("data.pack_sequences=true,false", [True, False]),
    ],
)
def test_values(text: str, values: list[Any]) -> None:
    axis = axis_of(text, drawn=False)
    assert axis.values == values
    assert [type(value) for value in axis.values] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate", r"must be FIELD=VALUES, such as"),
        (f"{RATE}=", r"must be FIELD=VALUES, such as"),
        ("learning_rate=1,2", r"unknown field \(did you mean training\.learning_rate\?\)"),
        ("training.checkpoint_dir=a,b", "is the sweep's own choice"),
        (f"{RATE}=1e-4:1e-2", "a range is LOW:HIGH:log or LOW:HIGH:lin"),
        (f"{RATE}=0:1:log:3", "for log greater than 0"),
        (f"{RATE}=1:1:lin:3", "LOW has to be less than HIGH"),
        (f"{RATE}=1:inf:lin:3", "both finite"),
        (f"{RATE}=0.1:1:lin:1", "2 values or more"),
        (f"{RATE}=0.1:1:lin", r"write 0\.1:1:lin:8, or draw points with --trials N"),
        (f"{LAYERS}=1:3:lin:5", "gives 2 twice"),
        (f"{LAYERS}=1.5:3:lin:2", r"model\.n_layers \('1\.5'\) must be int"),
        (f"{LAYERS}=2,,3", r"model\.n_layers \(''\) must be int"),
        (f"{RATE}=1,1.0", "gives 1.0 twice"),
    ],
)
def test_values_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f".*{message}"):
        axis_of(text, drawn=False)


def test_points_at_random_are_the_same_each_time() -> None:
    axes = [axis_of(text, drawn=True) for text in (f"{RATE}=1e-4:1:log", f"{LAYERS}=1:3:lin", "model.norm=rmsnorm")]
    found = points(axes, 600, seed=3)
    assert found == points(axes, 600, seed=3) != points(axes, 600, seed=4)
    assert found[:5] == points(axes, 5, seed=3)
    assert len({point[RATE] for point in found}) > 580 and all(1e-4 <= point[RATE] <= 1 for point in found)
    assert 0.43 < sum(point[RATE] < 1e-2 for point in found) / 600 < 0.57
    shares = [sum(point[LAYERS] == layers for point in found) / 600 for layers in (1, 2, 3)]
    assert all(0.26 < share < 0.41 for share in shares) and math.isclose(sum(shares), 1)
    with pytest.raises(UserError, match=r"--trials \(4\): --vary gave only 3 different points"):
        points(axes[1:], 4, seed=3)
    assert points(axes[1:], 3, 0) != points([axis_of(f"{LAYERS}=1,2,3", True), axes[2]], None, 0)


def test_too_many_points_are_refused() -> None:
    axes = [axis_of(f"training.{name}=0.1:0.9:lin:101", drawn=False) for name in ("beta1", "beta2")]
    with pytest.raises(UserError, match="10,201 points; 10,000 at most"):
        points(axes, None, 0)


def test_runs_of_one_program_come_together(tmp_path: Path, corpus: Path) -> None:
    axes = [
        axis_of(text, drawn=False) for text in (f"{RATE}=1,2", f"{LAYERS}=2,1", f"{SEED}=1,2", "training.eps=1e-8,1e-6")
    ]
    trials = named(points(axes, None, 0))
    ordered = by_program(trials, resolved(make_config(tmp_path, corpus), trials))
    assert [trial.values[LAYERS] for trial in ordered] == [2] * 8 + [1] * 8
    assert [*filter(lambda trial: trial.values[LAYERS] == 1, trials)] == ordered[8:]


def test_names_of_folders() -> None:
    texts = ["a/b", "a b", "é" * 300]
    found = [trial.name for trial in named([{RATE: 3e-4, "training.init_from": text} for text in texts])]
    assert found[:2] == ["learning_rate=0.0003,init_from=a_b", "learning_rate=0.0003,init_from=a_b_1"]
    assert all(len(name.encode()) < 255 and "/" not in name for name in found)


# ------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Callable[..., Path]:
    """Runs the command in a folder of the given name, which is returned."""
    home = tmp_path_factory.mktemp("sweeps")
    (home / "tiny.json").write_text(json.dumps(to_dict(make_config(home, corpus, **TINY))))

    def run(name: str, *options: str) -> Path:
        given = options if "--vary" in options else [*VARIED, *options]
        command("sweep", ["--config", str(home / "tiny.json"), f"--training.checkpoint_dir={home / name}", *given])
        return home / name

    return run


@pytest.fixture(scope="module")
def swept(sweep: Callable[..., Path]) -> Path:
    return sweep("whole")


def trials_in(folder: Path) -> list[Trial]:
    return [Trial(**trial) for trial in json.loads((folder / "sweep.json").read_text())["trials"]]


def losses(run: Path) -> list[tuple[int, float]]:
    return read_run(run).points("train/loss")


def test_each_run_is_what_it_would_be_alone(swept: Path, tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    """With a program of its own, and no run before it."""
    best = load_config(str(swept / "best_config.json"))
    assert (best.training.learning_rate, best.training.seed) == (0.01, 1)
    last = replace_fields(best, {"training.checkpoint_dir": str(tmp_path / "x"), SEED: 2})
    patch.setattr(assemble, "_assembled", assemble.Assembly)
    trainer = Trainer(last)
    trainer.train()
    trial = trials_in(swept)[-1]
    assert losses(tmp_path / "x") == losses(swept / trial.name)
    assert trial.loss == trainer.best_loss
    assert trial.bits_per_byte == pytest.approx(trainer.evaluate()["bits_per_byte"])


def test_what_a_sweep_leaves(swept: Path, sweep: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    """And what the same command says then, which trains nothing."""
    trials = trials_in(swept)
    assert [(trial.values[SEED], trial.status) for trial in trials] == [
        *((seed, status) for status in ("failed", "done", "done") for seed in (1, 2))
    ]
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("metrics.jsonl")}
    sweep("whole")
    said = capfd.readouterr()
    assert before == {path: path.stat().st_mtime_ns for path in swept.rglob("metrics.jsonl")} and not said.err
    head, *table, failed, _, best = said.out.splitlines()
    assert head.split() == ["learning_rate", "seed", "loss", "bits", "per", "byte", "seconds", "tokens/s"]
    assert [line.split()[:3] for line in table[:2]] == [["1", "0.01", "1"], ["2", "0.01", "2"]]
    assert float(table[0].split()[3]) == pytest.approx(trials[4].loss, abs=1e-4)
    assert [line.split()[2:3] for line in table[4:6]] == [["failed"]] * 2
    assert re.fullmatch(rf"failed: {RATE} 1e\+38, {SEED} 1: step 2: .*not finite.*", failed)
    assert best.startswith(f"best: {swept / BEST}, ")
    report = (swept / "report.html").read_text(encoding="utf-8")
    assert all(f">{trial.name}<" in report for trial in trials)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--vary", f"{SEED}=1,3"],
            r"was \"1e38,1e-3,1e-2\", is null; --vary training\.seed was \"1,2\", is \"1,3\"\. ",
        ),
        ([*VARIED, "--training.max_steps", "5"], r"training\.max_steps was 4, is 5\. Set it back, name another"),
        ([*VARIED, "--trials", "2"], r"--trials was null, is 2\."),
    ],
)
def test_another_sweep_in_the_same_folder_is_refused(
    options: list[str], message: str, swept: Path, sweep: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=message):
        sweep("whole", *options)


def test_a_run_in_a_sweeps_folder_is_refused(swept: Path) -> None:
    config = replace_fields(load_config(str(swept / "best_config.json")), {"training.checkpoint_dir": str(swept)})
    with pytest.raises(UserError, match="holds a sweep, whose runs have folders of their own; name another"):
        Trainer(config)


@pytest.mark.slow
def test_a_stopped_sweep_goes_on(swept: Path, sweep: Callable[..., Path], patch: pytest.MonkeyPatch) -> None:
    """Its budget ends it after the first run, a signal in the middle of the third; all is as if nothing had been."""
    original, calls = Trainer._log_metrics, list[int]()

    def interrupted(self: Trainer, loss: float) -> None:
        original(self, loss)
        calls.append(self.current_step)
        if self.folder.name == "learning_rate=0.001,seed=1" and self.current_step == 3:
            assert trials_in(self.folder.parent)[2].seconds > 0, "noted as it goes, so that a killed run's time counts"
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(Trainer, "_log_metrics", interrupted)
    folder = sweep("stopped", "--budget", "0.001s")
    assert [trial.status for trial in trials_in(folder)] == ["failed", *["not begun"] * 5]
    with pytest.raises(Stopped, match="SIGTERM at step 3; it is saved"):
        sweep("stopped")
    assert [trial.status for trial in trials_in(folder)][:4] == ["failed", "failed", "not finished", "not begun"]
    sweep("stopped", "--budget", "1h")
    assert calls == [1, 1, *[1, 2, 3, 4] * 4]
    assert [trial.loss for trial in trials_in(folder)] == [trial.loss for trial in trials_in(swept)]
    assert losses(folder / BEST) == losses(swept / BEST)


def test_where_all_fail_the_sweep_does(
    sweep: Callable[..., Path], capfd: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch
) -> None:
    """The first of them for want of memory, after which the next begins."""
    original = Trainer._log_metrics

    def full(self: Trainer, loss: float) -> None:
        if self.folder.name == "learning_rate=1e+38":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte.")
        original(self, loss)

    patch.setattr(Trainer, "_log_metrics", full)
    with pytest.raises(RunFailed, match=r"no run of the sweep in .* came to its end$"):
        sweep("failed", "--vary", f"{RATE}=1e38,2e38")
    out = capfd.readouterr().out
    assert "failed: training.learning_rate 1e+38: the device's memory is full: set model.gradient_checkpointing" in out
    assert "failed: training.learning_rate 2e+38: step 2" in out


def test_the_edge_and_another_text_are_said(sweep: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Judged by bits a byte, where a token may be another."""
    few = ["--training.max_steps", "1", "--data.validation_files", "[]", "--data.validation_split", "none"]
    sweep("edge", "--vary", "data.validation_fraction=0.2,0.3,0.1", *few)
    said = capfd.readouterr().out.splitlines()
    bits = [float(line.split()[3]) for line in said[1:4]]
    assert bits == sorted(bits)
    assert said[4] == "not all were judged on the same text: their figures do not compare"
    best = said[1].split()[1]
    edges = {"0.1": ["smallest"], "0.2": [], "0.3": ["largest"]}[best]
    assert said[5:-1] == [f"the best data.validation_fraction ({best}) is the {word} that was tried" for word in edges]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vary", f"{LAYERS}=1", "--vary", f"{LAYERS}=2"], r"--vary \(model\.n_layers\): is set by another option"),
        (["--vary", f"{LAYERS}=1", f"--{LAYERS}=2"], r"--vary \(model\.n_layers\): is set by another option"),
        (["--vary", "model.n_heads=2,3"], r"model\.n_heads \(3\) must divide model\.d_model"),
        (["--vary", "training.beta1=0.9,1.5"], r"training\.beta1 \(1\.5\) must be less than 1"),
        (["--vary", "data.train_files=nothing.txt"], r"data\.train_files \(nothing\.txt\)"),
        (["--trials", "0"], r"--trials \(0\) must be from 1 to 10,000"),
        (["--budget", "soon"], r"--budget \(soon\) must be a time, such as 90s, 30m"),
        (["--training.stop_at_step", "2"], r"training\.stop_at_step \(2\) has no use in a sweep"),
        (["--data.validation_files", "[]", "--data.validation_fraction", "0"], "a sweep is judged by validation"),
        (["--data.text_column", "nothing"], "nothing"),  # found when the first run starts
    ],
)
def test_a_sweep_that_is_refused_leaves_nothing(
    options: list[str], message: str, sweep: Callable[..., Path], corpus: Path
) -> None:
    with pytest.raises(UserError, match=message):
        sweep("refused", *options)
    assert not list(corpus.parent.glob("sweeps*/refused*"))


def test_a_run_is_no_sweep(swept: Path, sweep: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="holds a run, not a sweep"):
        sweep(f"whole/{BEST}")


def test_what_is_no_number_can_be_varied(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lists, too; a fresh sweep asks no folder of an old one for its architecture."""
    config = replace_fields(make_config(tmp_path, corpus, **TINY), {"training.max_steps": 1})
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    command(
        "sweep",
        ["--config", str(tmp_path / "config.json"), "--vary", "training.report_to=jsonl,tensorboard", "--fresh"],
    )
    assert (tmp_path / "run" / "best_config.json").is_file()
    with pytest.raises(
        UserError, match=r"training\.max_time \(30m\) has no use in a sweep; leave it out, and see --budget"
    ):
        command(
            "sweep", ["--config", str(tmp_path / "config.json"), "--vary", f"{SEED}=1,2", "--training.max_time", "30m"]
        )
