"""What a user decides between two starts of a run: changes in the middle, `jaxlm resume`, dry runs, refused starts."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import make_config
from flax import nnx
from test_trainer import arrays, assert_same

from jaxlm import Trainer, load
from jaxlm.__main__ import run as command
from jaxlm.checkpoints.folder import find_checkpoint
from jaxlm.checkpoints.items import read_config, read_progress
from jaxlm.commands.dry_run import DryRun
from jaxlm.config import load_config, replace_fields
from jaxlm.errors import Stopped, UserError
from jaxlm.report.runs import read_run
from jaxlm.run.setup import resolve

BATCH = "training.gradient_accumulation_steps"
CHANGED = {"training.learning_rate": 0.003, BATCH: 2}


@pytest.fixture(scope="module")
def begun(tmp_path_factory, corpus):
    """A run that was stopped after 2 of its 4 updates, evaluated before the first."""
    folder = tmp_path_factory.mktemp("begun")
    options = {"training.stop_at_step": 2, "training.eval_on_start": True, "model.n_layers": 1, "model.d_model": 16}
    Trainer(make_config(folder, corpus, **options)).train()
    return folder / "run"


@pytest.fixture
def run(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


def resume(run, *options):
    command("resume", [str(run), *options])


def starts(run):
    return [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]


def test_a_changed_batch_neither_repeats_nor_skips_a_row(run, capfd):
    """Each decision is refused, allowed, written down, kept without being asked for again, and marked in the report."""
    given = [f"--{name}={value}" for name, value in CHANGED.items()]
    with pytest.raises(
        UserError, match=r"learning_rate was 0\.01, is 0\.003\. .*--allow_change training\.learning_rate, "
    ):
        resume(run, *given)
    resume(
        run, *given, "--allow_change", ",".join(CHANGED), "--training.stop_at_step", "3", "--training.save_steps", "9"
    )
    said = capfd.readouterr().err
    assert "changed at step 2: rows_an_update was 8, is 16" in said
    assert "the schedule is laid out anew: update 3 has the learning rate 0.0009" in said
    assert starts(run)[-1]["changed"] == {"training.learning_rate": [0.01, 0.003], "rows_an_update": [8, 16]}
    shutil.rmtree(run / "checkpoint_3")  # as if the run had been killed before it saved
    resume(run, "--training.save_steps", "1")
    assert starts(run)[-1]["changed"] == starts(run)[-2]["changed"]
    assert [read_progress(run / f"checkpoint_{step}").position for step in (2, 3, 4)] == [16, 32, 48]
    assert [read_config(run / f"checkpoint_{step}").training.learning_rate for step in (2, 3)] == [0.01, 0.003]
    assert load_config(str(run / "config.json")).training.learning_rate == 0.003
    seen = read_run(run)
    assert [event.step for event in seen.events if "learning_rate: 0.01 became 0.003" in event.text] == [2, 2]
    assert seen._rows_taken(4) == 48
    epoch = seen.at("train/epoch", 4)
    assert epoch == pytest.approx(48 / starts(run)[-1]["train"]["rows"])


def test_a_batch_schedule_is_the_change_by_hand(run, tmp_path, corpus, capfd):
    """Twice the micro-batches from update 3 on: in one go, stopped in between or decided by the user, the same bits."""
    scheduled = {"training.batch_schedule": ("3:2", "9:4"), "model.n_layers": 1, "model.d_model": 16}
    whole = Trainer(make_config(tmp_path / "whole", corpus, **scheduled))
    said = capfd.readouterr().err
    assert "batch from update 3 on: 2 x 8 rows, 512 tokens\n" in said
    assert "batch from update 9 on: 4 x 8 rows, 1,024 tokens, after the run's end\n" in said
    result = whole.train()
    said = capfd.readouterr().err
    assert "step for 1 micro-batch" in said and "step for 2 micro-batches" in said and "for 4 micro" not in said
    measured = scheduled | {"training.noise_scale_steps": 1, "training.layer_norm_steps": 2}
    for stop in (3, 4):
        Trainer(make_config(tmp_path / "stopped", corpus, **measured, **{"training.stop_at_step": stop})).train()
    resume(run, f"--{BATCH}=2", "--allow_change", BATCH)
    for other in (tmp_path / "stopped" / "run", run):
        assert_same(arrays(other / "checkpoint_4"), arrays(result.folder / "checkpoint_4"))
        assert read_progress(other / "checkpoint_4").position == 48 and read_run(other)._rows_taken(4) == 48
    assert seen_row(run, 4)["train/epoch"] == seen_row(result.folder, 4)["train/epoch"]
    assert "3:2,9:4" in (result.folder / "report.html").read_text()
    with pytest.raises(UserError, match=r'"9:4"\], is \[\]\. .*--allow_change training.batch_schedule'):
        resume(result.folder, "--training.batch_schedule", "[]", "--training.max_steps", "5")


def test_a_longer_run_says_how_its_schedule_goes_on(run, capfd):
    resume(run, "--training.max_steps", "6", "--training.stop_at_step", "3")
    said = capfd.readouterr().err
    assert "the schedule is laid out anew for 6 updates instead of 4: update 3 has the learning rate" in said
    assert seen_row(run, 0)["eval/loss"] == pytest.approx(np.log(300), rel=0.05)


def seen_row(run, step):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["step"] == step)


def test_latest_starts_where_nothing_is_and_a_refusal_leaves_nothing(tmp_path, corpus, begun, capfd):
    options = {"training.resume_from_checkpoint": "latest", "training.checkpoint_dir": str(tmp_path / "a" / "run")}
    config = replace_fields(read_config(begun / "checkpoint_2"), options)
    refused = replace_fields(config, {"data.validation_files": (str(tmp_path / "none.txt"),)})
    with pytest.raises(UserError, match="none"):
        Trainer(refused)
    assert not list(tmp_path.iterdir())
    trainer = Trainer(config)
    assert trainer.current_step == 0 and "no checkpoint in" in capfd.readouterr().err
    trainer._lock.put_back()
    assert not list(tmp_path.iterdir())
    shutil.copytree(begun, tmp_path / "a" / "run")
    with pytest.raises(UserError, match="none"):
        Trainer(refused, fresh=True)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["run"]  # it was moved back
    assert (tmp_path / "a" / "run" / "checkpoint_2").is_dir()


def test_a_run_goes_on_in_its_own_folder(run):
    with pytest.raises(UserError, match=r"--training\.checkpoint_dir \(other\): a run goes on in its folder"):
        resume(run, "--training.checkpoint_dir", "other")


def test_home_is_found_and_what_is_closed_is_one_line(run, tmp_path, monkeypatch):
    """A ~ behind "=" reaches the program; a colleague's folder may be closed to all others."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkpoint("~/run/checkpoint_2") == run / "checkpoint_2"
    program = (
        "import sys; from pathlib import Path; from jaxlm.errors import UserError\n"
        "from jaxlm.checkpoints.folder import find_checkpoint; from jaxlm.checkpoints.manifest import model_in\n"
        "from jaxlm.report.runs import read_run; from jaxlm.run.sweep import read\n"
        "from jaxlm.__main__ import run as command\n"
        "closed = Path(sys.argv[1])\n"
        "assert model_in(closed) == closed and read(closed, {}) is None\n"
        "for what in (read_run, lambda x: find_checkpoint(str(x)), lambda x: command('resume', [str(x)])):\n"
        "    try: what(closed)\n"
        "    except UserError as error: print(error)"
    )
    run.chmod(0)
    as_others = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if as_others and shutil.which("setpriv") is None:
        pytest.skip("nothing is closed to this user")
    done = subprocess.run(
        [*as_others, sys.executable, "-c", program, str(run)], capture_output=True, text=True, check=False
    )
    run.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert [line.startswith(f"{run}: no") for line in done.stdout.splitlines()] == [True, False, True]
    assert f"training.resume_from_checkpoint ({run}): is not a checkpoint folder" in done.stdout


def test_a_dry_run_makes_an_update_and_writes_nothing(run, capfd):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    resume(run, "--dry_run")
    assert "dry run: update 3 works, loss 5." in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before
    assert Trainer(load_config(str(run / "config.json"))).current_step == 2  # the lock is free again


def test_the_command_and_resume_go_on_by_turns(tmp_path, corpus):
    """The vocabulary that was asked for is not the one that so little text gives."""
    sizes = {"model.n_layers": 1, "model.d_model": 16, "model.vocab_size": 5000}
    config = make_config(tmp_path, corpus, **sizes)
    Trainer(replace_fields(config, {"training.stop_at_step": 1})).train()
    resume(tmp_path / "run", "--training.stop_at_step", "2")
    trainer = Trainer(config)
    assert trainer.current_step == 2 and trainer.config.model.vocab_size < 5000


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("max_steps", r"checkpoint_2 is of step 2, and this run would end at 1; raise training\.num_epochs or"),
        (
            "stop_at_step",
            r"training\.stop_at_step \(1\) is behind \S+checkpoint_2, from which the run goes on; raise it",
        ),
    ],
)
def test_an_end_that_lies_behind_is_refused(run, option, message):
    with pytest.raises(UserError, match=message):
        resume(run, f"--training.{option}", "1")


def test_a_dry_run_without_an_update_says_so(run, capfd):
    resume(run, "--training.stop_at_step", "2", "--dry_run")
    assert "dry run: the run is at step 2, and no update is left before it stops" in capfd.readouterr().err


def test_what_is_stopped_while_it_compiles_leaves_nothing(tmp_path, corpus, begun, monkeypatch):
    def stopped(*_):
        raise Stopped("SIGINT")

    monkeypatch.setattr("jaxlm.trainer.compile_steps", stopped)
    config = replace_fields(read_config(begun / "checkpoint_2"), {"training.checkpoint_dir": str(tmp_path / "run")})
    for kind in (Trainer, DryRun):
        with pytest.raises(Stopped):
            kind(resolve(config, jax.devices()[:1])).train()
        assert not list(tmp_path.iterdir())


def test_a_runs_folder_stands_for_its_best_model(run, capfd):
    loaded, half = load(run), load(run / "checkpoint_2", dtype="bfloat16")
    assert capfd.readouterr().err == f"{run}: its best_model, of step 0\n"
    assert loaded.folder == run / "best_model"
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(half.model))} == {"bfloat16"}
    assert half.generate("the old", max_new_tokens=3, temperature=0).startswith("the old")
    for name in ("best_model", "final_model"):
        shutil.rmtree(run / name, ignore_errors=True)
    assert load(run).folder == run / "checkpoint_2"


def test_a_folder_of_transformers_is_loaded_evaluated_and_started_from(run, tmp_path, corpus, capfd):
    """Without --config its architecture and its length rule; it has no held-out text of its own."""
    there, other, cache = tmp_path / "there", tmp_path / "other", f"--data.cache_dir={corpus / 'cache'}"
    command("export", ["--model", str(run), "--to", str(there)])
    assert f"{run}: its best_model" in capfd.readouterr().err
    mine, loaded = load(run), load(there)
    assert loaded.progress is None and loaded.config.data.max_length == 32
    jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(each.model)) for each in (mine, loaded)))
    with pytest.raises(UserError, match="has no held-out text"):
        command("evaluate", ["--model", str(there)])
    with pytest.raises(UserError, match=r"is for transformers already"):
        command("export", ["--model", str(there), "--to", str(other)])
    text = f"--data.train_files={corpus / 'train.jsonl'}", "--training.sample_tokens=0", cache
    command("train", [f"--training.init_from={there}", f"--training.checkpoint_dir={other}", *text, "--dry_run"])
    said = capfd.readouterr().err
    assert " of 32 tokens, greedy" in said
    assert "dry run: update 1 works" in said and not other.exists()
