"""A run as a whole: resuming bit for bit, saving, stopping, the run's folder."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from conftest import make_config, slow, trainer_on

from jaxlm import Trainer, load
from jaxlm.checkpoints.folder import checkpoint_steps, move_later_aside
from jaxlm.checkpoints.items import read_progress
from jaxlm.checkpoints.manifest import damage
from jaxlm.config import Config, replace_fields, to_dict, validate, with_derived
from jaxlm.errors import RunFailed, Stopped, UserError
from jaxlm.run.evaluate import evaluate_model, text_to_evaluate
from jaxlm.train.evaluate import evaluate_batches

# Dropout and accumulation on; 4 devices x 2 rows x 2 micro-batches = 16 rows a step.
HARD = {
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "training.gradient_accumulation_steps": 2,
    "training.max_steps": 9,
    "training.logging_steps": 1,
    "training.save_steps": 2,
    "training.eval_steps": 3,
    "training.save_total_limit": None,
}


def read_texts(path):
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


def rows_of(folder):
    """metrics.jsonl by step, the later row of a step winning, without what depends on the machine."""
    measured = ("train/tokens_per_second", "train/memory_gib", "train/host_memory_gib")
    rows = {}
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["step"]] = {name: value for name, value in row.items() if name not in measured}
    return rows


def arrays(path):
    """All arrays of a checkpoint, restored with plain Orbax."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return {item: checkpointer.restore((Path(path) / item).resolve()) for item in ("params", "optimizer")}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, corpus):
    """The run that is never stopped: 9 steps, which cross the end of an epoch in the middle of a batch."""
    folder = tmp_path_factory.mktemp("reference")
    trainer = Trainer(make_config(folder, corpus, **HARD))
    assert len(trainer.text.rows) < 8 * trainer.resolved.global_batch
    assert len(trainer.text.rows) % trainer.resolved.global_batch
    trainer.train()
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, corpus):
    """The folder of the same run, stopped after updates 1, 2 and 5."""
    folder = tmp_path_factory.mktemp("stopped")
    for stop in (1, 2, 5):
        Trainer(make_config(folder, corpus, **HARD, **{"training.stop_at_step": stop})).train()
    return folder / "run"


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it, in the place of this test's runs."""
    return shutil.copytree(stopped, tmp_path / "run")


def test_resume_is_bit_exact(tmp_path, corpus, reference, run):
    """Stopped after updates 1, 2, 5 and 8: parameters, optimizer and every logged number equal those of one go."""
    Trainer(make_config(tmp_path, corpus, **HARD, **{"training.stop_at_step": 8})).train()
    assert not (run / "final_model").exists()
    again = Trainer(make_config(tmp_path, corpus, **HARD))
    assert again.current_step == 8
    again.train()
    whole = Path(make_config(reference, corpus, **HARD).training.checkpoint_dir)
    assert_same(arrays(run / "checkpoint_9"), arrays(whole / "checkpoint_9"))
    assert rows_of(run) == rows_of(whole)
    starts = [json.loads(line)["step"] for line in (run / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, 1, 2, 5, 8]
    report = (run / "report.html").read_text(encoding="utf-8")
    assert all(f"resumed from step {stop}" in report for stop in starts[1:])


@pytest.mark.slow
def test_modern_blocks_resume_bit_exactly(tmp_path, corpus):
    """All that newer models do otherwise than GPT-2, with muon over shards and another schedule; then text from it."""
    options = HARD | {
        "model.norm": "rmsnorm",
        "model.norm_scale": False,
        "model.activation": "relu2",
        "model.zero_init_outputs": True,
        "model.use_bias": False,
        "model.n_kv_heads": 1,
        "model.positions": "rotary",
        "model.qk_norm": True,
        "model.logit_softcap": 10.0,
        "model.value_embedding": True,
        "model.tie_embeddings": False,
        "training.optimizer": "normuon",
        "training.muon_coefficients": "polar_express",
        "training.embedding_lr_ratio": 2.0,
        "training.cautious_decay": True,
        "training.ema_decay": 0.9,
        "training.lr_scheduler": "wsd",
        "training.decay_fraction": 0.5,
        "training.z_loss": 1e-3,
        "training.zero_stage": 2,
        "training.max_steps": 4,
        "training.eval_steps": 2,
    }
    Trainer(make_config(tmp_path / "whole", corpus, **options)).train()
    Trainer(make_config(tmp_path, corpus, **options, **{"training.stop_at_step": 2})).train()
    Trainer(make_config(tmp_path, corpus, **options)).train()
    mine, whole = tmp_path / "run", tmp_path / "whole" / "run"
    assert_same(arrays(mine / "checkpoint_4"), arrays(whole / "checkpoint_4"))
    assert rows_of(mine) == rows_of(whole)
    last = rows_of(mine)[4]
    for name, metric in (("final_model", "eval/loss"), ("average_model", "eval/average_loss")):
        found = load(mine / name)
        result = evaluate_model(found, found.config.data, 3, lambda line: None)
        assert result["loss"] == pytest.approx(last[metric], rel=1e-5)
    assert abs(last["eval/average_loss"] - last["eval/loss"]) > 1e-3


def test_resume_notices_a_lost_optimizer_state(tmp_path, corpus, reference, run):
    """The fault that the test above is for: going on with a fresh optimizer."""
    again = Trainer(make_config(tmp_path, corpus, **HARD))
    fresh = again.assembly.init(again.assembly.numbers(again.config.training))
    again.state = dataclasses.replace(again.state, opt_state=fresh.opt_state)
    again.train()
    whole = Path(make_config(reference, corpus, **HARD).training.checkpoint_dir)
    with pytest.raises(AssertionError):
        assert_same(arrays(run / "checkpoint_9"), arrays(whole / "checkpoint_9"))


@pytest.mark.parametrize(
    ("devices", "options", "k"),
    [
        (4, {"training.zero_stage": 3, "training.zero_group_size": 2}, 2),
        slow(2, {"training.tensor_parallel": 2, "training.offload_optimizer": True}, 8),
    ],
)
def test_another_layout_goes_on_to_rounding(tmp_path, corpus, reference, run, devices, options, k):
    """A run of 4 devices goes on with other devices, stages and batch sizes: the same rows an update, equal losses."""
    again = trainer_on(devices, make_config(tmp_path, corpus, **HARD, **options))
    assert again.current_step == 5
    assert (again.config.training.gradient_accumulation_steps, again.resolved.global_batch) == (k, 16)
    again.train()
    whole = rows_of(make_config(reference, corpus, **HARD).training.checkpoint_dir)
    mine = rows_of(run)
    for step, row in whole.items():
        assert mine[step]["train/loss"] == pytest.approx(row["train/loss"], rel=1e-5)
    assert mine[9]["eval/loss"] == pytest.approx(whole[9]["eval/loss"], rel=1e-5)


@pytest.mark.usefixtures("run")
def test_devices_that_do_not_divide_the_batch_are_refused(tmp_path, corpus):
    with pytest.raises(UserError, match=r"training.batch_size \(2\) on 3 devices makes micro-batches of 6 rows"):
        trainer_on(3, make_config(tmp_path, corpus, **HARD))


@pytest.mark.slow
def test_padded_shards_resume_and_load(tmp_path, corpus):
    """3 devices divide none of the axes: what they save goes on with 2 devices, or none sharded, and loads."""
    options = {"model.d_model": 28, "model.d_ff": 50, "model.n_layers": 1, "training.max_steps": 6}
    trainer_on(1, make_config(tmp_path / "one", corpus, **options | {"training.batch_size": 6})).train()
    for devices, stage, stop, batch in ((3, 3, 2, 2), (2, 3, 4, 3), (1, 0, 6, 6)):
        changed = {"training.zero_stage": stage, "training.stop_at_step": stop, "training.batch_size": batch}
        trainer_on(devices, make_config(tmp_path, corpus, **options | changed)).train()
        model = load(tmp_path / "run" / f"checkpoint_{stop}").model
        assert model.token_embedding[...].shape == (300, 28) and model.blocks.mlp.up.bias[...].shape == (1, 50)
    expected = rows_of(tmp_path / "one" / "run")
    for step, row in rows_of(tmp_path / "run").items():
        assert row["train/loss"] == pytest.approx(expected[step]["train/loss"], rel=1e-5)


def test_float16_ends_at_the_lowest_loss_scale(tmp_path, corpus):
    """Its scale is in the checkpoint and in the log; a run that overflows whatever the scale ends with a clear line."""
    half = {"training.use_amp": True, "training.amp_dtype": "float16", "training.loss_scale_hysteresis": 1}
    Trainer(make_config(tmp_path, corpus, **half, **{"training.initial_loss_scale_power": 8})).train()
    rows = rows_of(tmp_path / "run")
    assert [row["train/loss_scale"] for row in rows.values()] == [256.0] * 4 and rows[4]["train/loss"] < 5.0
    assert arrays(tmp_path / "run" / "checkpoint_4")["optimizer"]["loss_scale"]["scale"] == 256
    wild = {"training.initial_loss_scale_power": 2, "training.learning_rate": 1e30, "training.max_steps": 9}
    with pytest.raises(RunFailed, match=r"step \d: float16 overflows at the lowest loss scale \(1\)"):
        Trainer(make_config(tmp_path / "wild", corpus, **half, **wild)).train()


def test_run_folder(reference, corpus):
    folder = Path(make_config(reference, corpus, **HARD).training.checkpoint_dir)
    names = {path.name for path in folder.iterdir()}
    steps = {f"checkpoint_{step}" for step in (2, 4, 6, 8, 9)}
    written = {"config.json", "metrics.jsonl", "samples.jsonl", "starts.jsonl", "report.html", "tokenizer", ".lock"}
    assert names == written | {"best_model", "final_model", *steps}
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["vocab_size"] == 300
    rows = rows_of(folder)
    assert list(rows) == list(range(1, 10))
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "train/mfu", "train/epoch"} <= set(rows[1])
    assert rows[1]["train/mfu"] is None  # a CPU's peak is not known
    assert {"eval/loss", "eval/perplexity", "eval/bits_per_byte"} <= set(rows[9])
    best = min((row["eval/loss"], step) for step, row in rows.items() if "eval/loss" in row)
    progress = read_progress(folder / "best_model")
    assert (progress.best_loss, progress.step) == best
    assert read_progress(folder / "final_model").step == 9


def test_load_gives_the_evaluated_model(reference, corpus):
    """best_model, final_model and a checkpoint load, and evaluate to what was logged."""
    config = make_config(reference, corpus, **HARD)
    folder = Path(config.training.checkpoint_dir)
    logged = rows_of(folder)[9]
    for name in ("final_model", "checkpoint_9"):
        loaded = load(folder / name)
        result = evaluate_model(loaded, loaded.config.data, 3, lambda line: None)
        assert result["loss"] == pytest.approx(logged["eval/loss"], rel=1e-5)
        assert result["bits_per_byte"] == pytest.approx(logged["eval/bits_per_byte"], rel=1e-5)
    assert to_dict(loaded.config)["model"] == to_dict(with_derived(config))["model"]
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("naïve  text\r\n")) == "naïve  text\r\n"


def test_evaluation_of_other_text(reference, corpus, tmp_path):
    """All of the text that is named; what the model was trained on is said."""
    run = Path(make_config(reference, corpus, **HARD).training.checkpoint_dir)
    loaded = load(run / "final_model")
    train, held_out = (str(corpus / f"{name}.jsonl") for name in ("train", "validation"))
    same_as_train = shutil.copy(train, tmp_path / "other.jsonl")

    def evaluate(**given):
        lines = []
        data = text_to_evaluate(loaded.config, {f"data.{name}": value for name, value in given.items()})
        return evaluate_model(loaded, data, 3, lines.append), [line for line in lines if line.startswith("warning")]

    own, doubts = evaluate()
    assert own["loss"] == pytest.approx(rows_of(run)[9]["eval/loss"], rel=1e-5)
    kept = [text for text in read_texts(held_out) if len(loaded.tokenizer.encode(text)) + 2 >= 10]
    assert own["documents"] == len(kept) < len(read_texts(held_out))
    assert own["bytes"] == sum(len(text.encode()) for text in kept)
    assert (own["text"], doubts) == (held_out, [])
    assert evaluate(train_files=(held_out,)) == evaluate(validation_files=(held_out,)) == (own, [])
    trained, doubts = evaluate(train_files=(str(same_as_train),))
    assert trained["documents"] > 3 * own["documents"]
    assert (trained["text"], doubts) == (str(same_as_train), ["warning: the model was trained on this text"])
    _, doubts = evaluate(validation_files=(held_out, str(same_as_train)))
    assert doubts == [f"warning: the model was trained on 1 of these 2 files, such as {same_as_train}"]
    part, doubts = evaluate(train_files=(train,), validation_fraction=0.2)
    assert part["documents"] == 24
    assert (part["text"], len(doubts)) == (f"{train}, 0.2 of it held out", 1)


def test_which_text_is_evaluated(tmp_path, corpus):
    def evaluated(run, **given):
        config = replace_fields(Config(), {f"data.{name}": value for name, value in run.items()})
        data = text_to_evaluate(config, {f"data.{name}": value for name, value in given.items()})
        validate(dataclasses.replace(config, data=data))
        changed = {name: value for name, value in vars(data).items() if value != getattr(config.data, name)}
        return {name: value for name, value in changed.items() if name not in ("dataset_config", "train_files")}

    hub = {"dataset_name": "a/b", "validation_split": "dev", "dataset_split": "most"}
    library = {"dataset_name": "python-stdlib"}
    files = {"train_files": ("t",), "validation_files": ("v",)}
    assert evaluated(hub) == evaluated(files) == evaluated(library) == {}
    assert evaluated(hub, dataset_name="a/b") == evaluated(files | {"max_documents": 9}) == {}
    assert evaluated(hub | {"max_documents": 9}, validation_split="test")["max_documents"] is None
    new = {"dataset_name": "c/d", "dataset_split": "train", "validation_split": "validation"}
    assert evaluated(hub, dataset_name="c/d") == new
    assert evaluated(files, dataset_name="c/d") == {"dataset_name": "c/d", "validation_files": ()}
    part = new | {"validation_split": None, "validation_fraction": 0.2}
    assert evaluated(hub, dataset_name="c/d", validation_fraction=0.2) == part
    whole = {"validation_split": None, "validation_fraction": 0}
    assert evaluated(hub, dataset_split="rest") == whole | {"dataset_split": "rest"}
    assert evaluated(hub, validation_split="test") == {"validation_split": "test"}
    assert evaluated(files, **library) == library | {"validation_files": (), "validation_fraction": 0}
    with pytest.raises(UserError, match=r"^data.train_files \(a\) and data.validation_files \(b\): name one"):
        evaluated(hub, train_files=("a",), validation_files=("b",))
    with pytest.raises(UserError, match=r"^data.validation_fraction \(0\): this run held out no text"):
        evaluated({"train_files": ("t",), "validation_fraction": 0})
    with pytest.raises(UserError, match=r"^data.tokenizer_path \(t\): a model is evaluated with its own tokenizer"):
        evaluated(hub, tokenizer_path="t")
    assert evaluated(hub | {"tokenizer_path": "t"}, tokenizer_path="t") == {}


def test_run_without_held_out_text(tmp_path, corpus, capsys):
    """It trains on all of the text, in shorter rows than the model has positions, and evaluates nothing."""
    options = {"data.validation_files": (), "data.validation_fraction": 0, "data.max_length": 16, "model.n_layers": 1}
    options |= {"training.max_steps": None, "training.num_epochs": 0.01, "training.ema_decay": 0.5}
    trainer = Trainer(make_config(tmp_path, corpus, **options))
    trainer.train()
    assert trainer.text.rows.plan.documents == 120
    with pytest.raises(UserError, match=r"^data.validation_fraction \(0\): no text is held out"):
        trainer.evaluate()
    assert not (tmp_path / "run" / "best_model").exists()
    assert load(tmp_path / "run" / "average_model").progress.step == trainer.total_steps
    loaded, lines = load(tmp_path / "run" / "final_model"), []
    given = {"data.train_files": (str(corpus / "train.jsonl"),), "data.max_length": 32}
    evaluate_model(loaded, text_to_evaluate(loaded.config, given), 3, lines.append)
    untrained = "model.max_seq_len (32): positions 16 to 31 are never trained, as the longest piece of a document"
    assert [line for line in lines if line.startswith(f"warning: {untrained}")]
    said = capsys.readouterr().err
    assert "no report" not in said
    assert f"\n{untrained}" in said
    more = "the run goes over more of the text than that; the last update has 8 rows"
    assert f"\ntraining.num_epochs (0.01): {more}" in said


def test_without_an_average_none_is_saved(tmp_path, corpus):
    trainer = Trainer(make_config(tmp_path, corpus))
    with pytest.raises(UserError, match=r"^training.ema_decay \(none\): the run keeps no average"):
        trainer.save_model(tmp_path / "average", average=True)


def test_a_loss_that_is_no_number_has_no_perplexity():
    found = evaluate_batches(lambda *_: (np.float32(np.nan), np.int32(3)), {}, {"": [{}]}, 9)
    assert math.isnan(found["loss"]) and math.isnan(found["perplexity"])


def test_bits_per_byte_by_hand(reference, corpus):
    """All nats / ln 2 / bytes of the validation text, computed from the raw file and the full logits."""
    folder = Path(make_config(reference, corpus, **HARD).training.checkpoint_dir)
    loaded = load(folder / "final_model")
    texts = [
        json.loads(line)["text"] for line in (corpus / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    longest = loaded.config.data.max_length
    logits = jax.jit(lambda tokens: loaded.model.logits(loaded.model(tokens)))
    nats, n_bytes = 0.0, 0
    for text in texts:
        ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(text), loaded.tokenizer.eos_id]
        if len(ids) < loaded.config.data.min_length:
            continue
        n_bytes += len(text.encode())
        for start in range(0, len(ids) - 1, longest):
            inputs, targets = ids[start : min(start + longest, len(ids) - 1)], ids[start + 1 : start + 1 + longest]
            padded = np.array([inputs + [0] * (longest - len(inputs))], np.int32)  # one shape, compiled once
            logprobs = jax.nn.log_softmax(logits(padded)[0])
            nats -= float(logprobs[np.arange(len(targets)), np.array(targets)].sum())
    expected = rows_of(folder)[9]["eval/bits_per_byte"]
    assert nats / np.log(2) / n_bytes == pytest.approx(expected, rel=1e-4)


def test_finished_run_says_so_and_does_nothing(reference, corpus, capfd):
    config = make_config(reference, corpus, **HARD)

    def files() -> dict[str, int]:  # but for the lock, which some file systems date anew when it is taken
        paths = Path(config.training.checkpoint_dir).rglob("*")
        return {str(path): path.stat().st_mtime_ns for path in paths if path.name != ".lock"}

    before = files()
    Trainer(config).train()
    assert "this run is finished" in capfd.readouterr().err
    assert files() == before


def test_save_total_limit_and_longer_run(tmp_path, corpus):
    short = {**HARD, "training.save_steps": 1, "training.save_total_limit": 2, "training.max_steps": 4}
    short["training.eval_steps"] = 9
    Trainer(make_config(tmp_path, corpus, **short)).train()
    folder = tmp_path / "run"
    assert set(checkpoint_steps(folder)) == {3, 4}
    Trainer(make_config(tmp_path, corpus, **short | {"training.max_steps": 6})).train()  # max_steps may grow
    assert set(checkpoint_steps(folder)) == {5, 6}
    assert read_progress(folder / "final_model").step == 6


def test_resume_at_an_earlier_checkpoint(tmp_path, corpus, reference, monkeypatch):
    """The later checkpoints are moved aside, later models copied; saving goes on, and the end is the same."""
    whole = make_config(reference, corpus, **HARD).training.checkpoint_dir
    folder = shutil.copytree(whole, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", mock.Mock(side_effect=OSError("no room")))
        with pytest.raises(OSError, match="no room"):
            move_later_aside(folder, 4)
    assert set(checkpoint_steps(folder)) == {2, 4, 6, 8, 9}
    for aside in folder.glob("aside_*"):
        aside.rmdir()
    models = {path.name: read_progress(path).step for path in folder.glob("*_model")}
    assert models["best_model"] > 4 and models["final_model"] == 9
    earlier = str(folder / "checkpoint_4")
    Trainer(make_config(tmp_path, corpus, **HARD, **{"training.resume_from_checkpoint": earlier})).train()
    assert set(checkpoint_steps(folder)) == {2, 4, 6, 8, 9}
    (aside,) = folder.glob("aside_*")
    checkpoints = {"checkpoint_6", "checkpoint_8", "checkpoint_9"}
    assert {path.name for path in aside.iterdir()} == checkpoints | {name for name in models if models[name] > 4}
    assert damage(aside / "best_model") is None and read_progress(aside / "best_model").step == models["best_model"]
    assert_same(arrays(folder / "checkpoint_9"), arrays(aside / "checkpoint_9"))


def test_fresh_moves_the_old_run_aside(tmp_path, corpus):
    config = make_config(tmp_path, corpus, **{"training.max_steps": 2})
    Trainer(config).train()
    trainer = Trainer(config, fresh=True)
    assert trainer.current_step == 0 and not trainer.finished
    (aside,) = tmp_path.glob("run.*")
    assert (aside / "final_model").is_dir()


def test_other_configuration_is_refused_with_the_difference(tmp_path, corpus):
    config = make_config(tmp_path, corpus, **{"training.max_steps": 2})
    Trainer(config).train()
    with pytest.raises(UserError, match=r"training.learning_rate was 0\.\d+, is 0\.5.*--fresh"):
        Trainer(make_config(tmp_path, corpus, **{"training.max_steps": 2, "training.learning_rate": 0.5}))
    with pytest.raises(UserError, match="model.vocab_size was 300, is 400"):
        Trainer(make_config(tmp_path, corpus, **{"training.max_steps": 2, "model.vocab_size": 400}))
    changed = tmp_path / "changed.jsonl"
    shutil.copy(corpus / "train.jsonl", changed)
    with changed.open("a") as file:
        file.write('{"text": "one more document, so the text is another one"}\n')
    original = config.data.train_files
    with pytest.raises(UserError, match="data.train_files was"):
        Trainer(make_config(tmp_path, corpus, **{"training.max_steps": 2, "data.train_files": (str(changed),)}))
    assert original == config.data.train_files


def test_signal_saves_and_raises_stopped(tmp_path, corpus, reference):
    """SIGINT in the middle: the update is finished and saved; the same configuration goes on to the same end."""
    config = make_config(tmp_path, corpus, **HARD)
    trainer = Trainer(config)
    log = trainer._log_metrics

    def interrupt(loss):
        log(loss)
        if trainer.current_step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    trainer._log_metrics = interrupt
    with pytest.raises(Stopped, match="SIGINT at step 3"):
        trainer.train()
    assert max(checkpoint_steps(tmp_path / "run")) == 3
    Trainer(config).train()
    run = Path(make_config(reference, corpus, **HARD).training.checkpoint_dir)
    assert_same(arrays(tmp_path / "run" / "checkpoint_9"), arrays(run / "checkpoint_9"))


@pytest.mark.slow
def test_signals_as_the_shell_sees_them(tmp_path, corpus):
    """SIGTERM: exit code 75, and the same command goes on; a second signal leaves at once with 128 + n."""
    endless = {f"training.{name}": 100_000 for name in ("max_steps", "eval_steps", "save_steps")}
    config = make_config(tmp_path, corpus, **endless)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(config)))
    root = Path(__file__).parents[1]
    command = [sys.executable, "scripts/train.py", "--config", str(file)]

    def start():
        process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("step ") and "loss" in line:
                break
        process.reader = threading.Thread(target=lambda: lines.extend(process.stderr))
        process.reader.start()
        return process, lines

    process, lines = start()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    process.reader.join()
    process.stderr.close()
    assert lines[-1].startswith("stopped: SIGTERM at step")
    process, lines = start()
    assert any("resuming from" in line for line in lines)
    process.send_signal(signal.SIGSTOP)  # both signals wait until it goes on, then arrive one after the other
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    process.reader.join()
    process.stderr.close()


def test_golden_losses(tmp_path, corpus):
    """The numbers of a fixed tiny run. If they change, training changed: say so in the commit, and why."""
    changes = {"training.max_steps": 4, "training.logging_steps": 1, "training.use_amp": False}
    Trainer(make_config(tmp_path, corpus, **HARD | changes)).train()
    losses = [row["train/loss"] for row in rows_of(tmp_path / "run").values()]
    golden = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())
    assert losses == pytest.approx(golden, rel=1e-4), f"losses are now {losses}"
