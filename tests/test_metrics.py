"""What is measured arrives, once, in every place that it should: history, metrics.jsonl, TensorBoard, W&B, stderr."""

import contextlib
import io
import json
import math
import os
import re
import sqlite3
import struct
import subprocess
import sys
import threading
import types
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_config
from forked import Server
from jax.flatten_util import ravel_pytree
from tensorboardX.proto.event_pb2 import Event

from jaxlm import Trainer, load
from jaxlm.config import Config, TrainingConfig, from_dict, replace_fields, to_dict, validate
from jaxlm.config.batches import Batches
from jaxlm.data.loader import train_batches
from jaxlm.errors import UserError
from jaxlm.monitor import notebook
from jaxlm.monitor.gradients import NoiseScale
from jaxlm.monitor.histograms import count_values
from jaxlm.monitor.metrics import (
    MetricsTracker,
    Throughput,
    flops_per_token,
    memory_gib,
    model_flops_per_token,
    model_flops_utilization,
)
from jaxlm.monitor.progress import Progress
from jaxlm.monitor.sinks import Histogram, JsonLines, TensorBoard, check_own_sinks, hyperparameters, make_sinks
from jaxlm.monitor.watchdog import Watchdog
from jaxlm.train.numbers import at_rate
from jaxlm.train.step import make_loss


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_events(folder: Path) -> Iterator[Event]:
    """The events of all files in `folder`: records of length, checksum, content, checksum."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    scalars: dict[str, dict[int, float]] = {}
    for event in read_events(folder):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars


class Recorder:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def write(self, row: dict[str, float], step: int) -> None:
        self.rows.append((step, dict(row)))

    def close(self) -> None:
        self.closed = True


class Everything(Recorder):
    """A sink that also takes texts and histograms."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[tuple[str, str, int]] = []
        self.histograms: dict[tuple[str, int], Histogram] = {}

    def write_text(self, name: str, text: str, step: int) -> None:
        self.texts.append((name, text, step))

    def write_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        self.histograms[name, step] = histogram


HISTOGRAM = Histogram(np.array([1, 0, 3]), low=-1.0, high=2.0, total=3.5, squares=7.25)


# ---- The tracker


WITHOUT_TORCH = """
import sys
from pathlib import Path
from jaxlm.config import Config
from jaxlm.monitor.sinks import TensorBoard

assert "tensorboardX" not in sys.modules, "imported by a module of jaxlm, with all that it imports"
sys.path.insert(0, ".")
TensorBoard(Path("logs"), 0, Config()).close()
try:
    import torch
except AttributeError:  # as it should be: the one that stands here
    print("done")
"""


def test_tensorboard_leaves_torch_alone(tmp_path: Path, server: Server) -> None:
    """tensorboardX imports it where it is installed: half of the time that a start takes, and half of its memory."""
    (tmp_path / "torch.py").write_text("raise AttributeError")
    out, errors = tmp_path / "out", tmp_path / "errors"
    code = server.start(["-c", WITHOUT_TORCH], tmp_path, out, errors, devices=1).wait()
    assert (code, out.read_text()) == (0, "done\n"), errors.read_text()


def test_row_of_a_step_is_written_once_with_all_that_came_for_it() -> None:
    sink = Recorder()
    tracker = MetricsTracker([sink])
    tracker.update({"train/loss": 2}, 1)
    tracker.update({"custom/a": 1.5, "train/loss": 3}, 1)
    assert sink.rows == []
    tracker.flush(1)
    tracker.flush(1)
    assert sink.rows == [(1, {"train/loss": 3.0, "custom/a": 1.5})]
    assert tracker.get_latest("train/loss") == 3.0


def test_flush_writes_in_order_and_leaves_later_steps() -> None:
    sink = Recorder()
    tracker = MetricsTracker([sink])
    for step in (3, 1, 2, 9):
        tracker.update({"x": step}, step)
    tracker.flush(3)
    assert [step for step, _ in sink.rows] == [1, 2, 3]
    tracker.close()
    assert [step for step, _ in sink.rows] == [1, 2, 3, 9]
    assert sink.closed


def test_latest_and_average_count_what_is_not_yet_written() -> None:
    tracker = MetricsTracker()
    assert tracker.get_latest("x") is None
    assert tracker.get_average("x") is None
    for step, value in enumerate([1.0, 2.0, 6.0], 1):
        tracker.update({"x": value}, step)
        if step < 3:
            tracker.flush(step)
    assert tracker.get_latest("x") == 6.0
    assert tracker.get_average("x") == 3.0
    assert tracker.get_average("x", window=2) == 4.0
    assert tracker.get_average("x", window=99) == 3.0


def test_a_metric_called_step_is_refused() -> None:
    tracker = MetricsTracker([sink := Recorder()])
    with pytest.raises(ValueError, match="custom/step"):
        tracker.update({"step": 7.0}, 1)
    tracker.flush(1)
    assert not sink.rows


def test_values_are_what_float_takes() -> None:
    import jax.numpy as jnp

    tracker = MetricsTracker()
    tracker.update({"a": jnp.float32(0.5), "b": True, "c": "2"}, 1)
    assert [tracker.get_latest(name) for name in "abc"] == [0.5, 1.0, 2.0]
    with pytest.raises(ValueError, match="could not convert"):
        tracker.update({"a": "much"}, 1)


def test_history_survives_save_and_load(tmp_path: Path) -> None:
    tracker = MetricsTracker()
    for step, value in ((1, 0.1), (5, math.nan)):
        tracker.update({"x": value}, step)
    tracker.flush(5)
    tracker.save(tmp_path / "history.json")
    assert json.loads((tmp_path / "history.json").read_text()) == {"x": [[1, 0.1], [5, None]]}
    other = MetricsTracker()
    other.update({"old": 1}, 1)
    other.flush(1)
    other.load(tmp_path / "history.json")
    assert set(other.history) == {"x"}
    assert list(other.history["x"]) == [1, 5] and other.history["x"][1] == 0.1
    assert math.isnan(other.history["x"][5])


def test_texts_and_histograms_go_to_the_sinks_that_take_them() -> None:
    rows, everything = Recorder(), Everything()
    tracker = MetricsTracker([rows, everything])
    tracker.write_text("sample", "text", 3)
    tracker.write_histogram("parameters/x", HISTOGRAM, 4)
    assert everything.texts == [("sample", "text", 3)]
    assert everything.histograms == {("parameters/x", 4): HISTOGRAM}


def test_what_a_sink_raises_costs_its_rows_and_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Recorder):
        error: Exception | None = ConnectionError("the tracker is\naway")

        def write(self, row: dict[str, float], step: int) -> None:
            if self.error is not None:
                raise self.error
            super().write(row, step)

    broken, whole = Broken(), Recorder()
    tracker = MetricsTracker([broken, whole])
    for step, error in enumerate([broken.error, broken.error, None, KeyError("a bug")], 1):
        broken.error = error
        tracker.update({"x": 1}, step)
        tracker.flush(step)
    assert (len(broken.rows), len(whole.rows)) == (1, 4)
    assert capsys.readouterr().err.splitlines() == [
        "Broken.write at step 1: not written: ConnectionError (the tracker is away); the run goes on without it",
        "Broken.write at step 4: not written: KeyError ('a bug'); the run goes on without it",
    ]


def test_memory() -> None:
    class Device:
        def __init__(self, stats: dict[str, int] | None) -> None:
            self.memory_stats = lambda: stats

    full = [Device({"peak_bytes_in_use": 3 * 2**30}), Device({"peak_bytes_in_use": 2**30}), Device(None)]
    assert memory_gib(full)["train/memory_gib"] == 3.0
    alone = memory_gib([Device(None), Device({})])
    assert set(alone) == {"train/host_memory_gib"}
    assert 0.01 < alone["train/host_memory_gib"] < 100


# ---- The sinks


def test_json_lines_are_appended_and_say_null_for_what_json_cannot(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):  # as a resumed run
        sink = JsonLines(tmp_path)
        sink.write({"train/loss": math.nan, "eval/perplexity": math.inf, "x": 0.1, "step": 7.0}, step)
        assert path.read_text().count("\n") == step, "a row has to be there at once, not when the file is closed"
        sink.close()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert strict == [{"step": s, "train/loss": None, "eval/perplexity": None, "x": 0.1} for s in (1, 2)]


def test_tensorboard_events(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path, 0, Config())
    sink.write({"train/loss": 2.5, "bad": math.nan}, 1)
    sink.write({"train/loss": 1.5}, 2)
    sink.write_text("sample", "def f():\n    return 1", 2)
    sink.write_histogram("parameters/x", HISTOGRAM, 2)
    sink.close()
    assert read_scalars(tmp_path) == {"train/loss": {1: 2.5, 2: 1.5}}
    (text,) = [v for event in read_events(tmp_path) for v in event.summary.value if v.tag.startswith("sample")]
    assert text.tensor.string_val == [b"    def f():\n        return 1"]
    (histo,) = [v.histo for event in read_events(tmp_path) for v in event.summary.value if v.HasField("histo")]
    assert (histo.min, histo.max, histo.num, histo.sum, histo.sum_squares) == (-1.0, 2.0, 4, 3.5, 7.25)
    assert (list(histo.bucket_limit), list(histo.bucket)) == ([0.0, 1.0, 2.0], [1, 0, 3])


def test_tensorboard_has_the_run_among_the_hyperparameters(tmp_path: Path) -> None:
    config = Config(training=TrainingConfig(learning_rate=0.5, max_steps=None))
    TensorBoard(tmp_path, 0, config).close()
    tags = [value for event in read_events(tmp_path) for value in event.summary.value]
    assert [value.tag for value in tags] == ["_hparams_/session_start_info", "_hparams_/session_end_info"]
    assert b"training.learning_rate" in tags[0].metadata.plugin_data.content
    shown = hyperparameters(config)
    assert (shown["training.learning_rate"], shown["training.max_steps"]) == (0.5, "none")
    assert shown["data.train_files"] == "none" and "training.checkpoint_dir" not in shown


def test_samples_are_appended(tmp_path: Path) -> None:
    for step in (1, 2):
        sink = JsonLines(tmp_path)
        sink.write({"train/loss": 1.0}, step)
        sink.write_text("sample", "a\nb", step)
        sink.close()
    assert read_rows(tmp_path / "samples.jsonl") == [{"step": s, "name": "sample", "text": "a\nb"} for s in (1, 2)]


@pytest.mark.parametrize("start_step", [0, 7])
def test_what_an_earlier_run_wrote_beyond_the_start_is_hidden(tmp_path: Path, start_step: int) -> None:
    TensorBoard(tmp_path, start_step, Config()).close()
    (session,) = [event for event in read_events(tmp_path) if event.HasField("session_log")]
    assert session.session_log.status == session.session_log.START
    assert session.step == start_step + 1, "TensorBoard drops the events of earlier files from this step on"


def test_model_flops_utilization() -> None:
    Device = namedtuple("Device", "device_kind")
    parameters = 124_000_000
    flops = flops_per_token(parameters, n_layers=12, max_length=1024, d_model=768)
    assert flops == 6 * 124e6 + 12 * 12 * 1024 * 768
    config = replace_fields(
        Config(), {"model.n_layers": 12, "model.d_model": 768, "model.max_seq_len": 1024, "data.max_length": 1024}
    )
    with_table = replace_fields(config, {"model.value_embedding": True, "model.vocab_size": 1000})
    assert model_flops_per_token(with_table, parameters + 768_000) == flops, "what is only looked up takes none"
    assert model_flops_per_token(config, parameters, frozen=100_000_000) == flops - 2 * 100e6
    frozen_table = replace_fields(with_table, {"training.freeze": ("value_embedding",)})
    assert model_flops_per_token(frozen_table, parameters + 768_000, frozen=768_000) == flops, "nor is there a gradient"
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12,
        "Tesla T4": 65e12,
    }.items():
        assert model_flops_utilization(peak / flops, flops, [Device(name)]) == pytest.approx(1)
        assert model_flops_utilization(peak / flops, flops, [Device(name)] * 4) == pytest.approx(0.25)
    others = ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    for unknown in ("cpu", "NVIDIA L40", "NVIDIA RTX A4000", "NVIDIA A10G", *others):
        assert math.isnan(model_flops_utilization(1.0, flops, [Device(unknown)])), unknown


# ---- A user's own metrics, through a whole run


class CustomTrainer(Trainer):
    """As the guide has it."""

    def _log_metrics(self, loss: float):
        super()._log_metrics(loss)
        self.metrics_tracker.update({"custom/metric1": self.current_step / 8}, self.current_step)

    def _log_eval_metrics(self, metrics: dict[str, float]):
        super()._log_eval_metrics(metrics)
        self.metrics_tracker.update({"custom/tokens": metrics["tokens"]}, self.current_step)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[CustomTrainer, Path, str]:
    """A trainer after its run, the run's folder, and its stderr."""
    folder = tmp_path_factory.mktemp("custom")
    overrides = {"training.report_to": ["tensorboard"], "training.max_steps": 5, "training.logging_steps": 2}
    overrides |= {"training.sample_tokens": 4, "training.sample_prompt": "the"}
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        trainer = CustomTrainer(make_config(folder, corpus, **overrides))
        trainer.train()
    return trainer, folder / "run", stderr.getvalue()


def test_rows_of_a_run(run: tuple[CustomTrainer, Path, str]) -> None:
    rows = read_rows(run[1] / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4, 5], "the first, every second and the last step"
    expected = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "epoch"}
    for row in rows:
        assert {f"train/{name}" for name in expected} <= set(row)
        assert ("eval/loss" in row) == (row["step"] in (4, 5))
        assert row["train/mfu"] is None, "the peak of this device is not known"
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    last = rows[-1]
    assert last["eval/perplexity"] == pytest.approx(math.exp(last["eval/loss"]))
    trainer = run[0]
    texts = [row["text"] for row in read_rows(Path(trainer.config.data.validation_files[0]))]
    kept = [text for text in texts if len(trainer.tokenizer.encode(text)) + 2 >= trainer.config.data.min_length]
    nats = last["eval/loss"] * last["custom/tokens"]
    assert last["eval/bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in kept))


def test_custom_metrics_stand_in_the_row_of_their_step_everywhere(run: tuple[CustomTrainer, Path, str]) -> None:
    trainer, folder, stderr = run
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["custom/metric1"] for row in rows] == [0.125, 0.25, 0.5, 0.625]
    assert ["custom/tokens" in row for row in rows] == [False, False, True, True]
    scalars = read_scalars(folder / "logs")
    assert scalars["custom/metric1"] == {1: 0.125, 2: 0.25, 4: 0.5, 5: 0.625}
    for name in ("train/loss", "eval/loss", "custom/tokens"):
        logged = {row["step"]: row[name] for row in rows if name in row}
        assert scalars[name] == pytest.approx(logged)
        assert trainer.metrics_tracker.history[name] == logged
    (line,) = [line for line in stderr.splitlines() if line.startswith("step 2/5 ")]
    assert "custom/metric1 0.25" in line
    assert f"loss {rows[1]['train/loss']:.4f}" in line


def test_what_a_run_leaves_beside_its_rows(run: tuple[CustomTrainer, Path, str]) -> None:
    trainer, folder, _ = run
    (start,) = read_rows(folder / "starts.jsonl")
    assert (start["step"], start["total_steps"], start["parameters"]) == (0, 5, trainer.assembly.parameters)
    assert start["train"]["documents"] == 120 and 0.5 < start["train"]["fill"] <= 1
    assert start["versions"]["jax"] == jax.__version__
    samples = read_rows(folder / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [4, 5]
    assert all(sample["text"].startswith("the") for sample in samples)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "Finished: step 5 of 5" in html and "custom/metric1" in html
    before = trainer.folder / "report.html"
    assert before.stat().st_size < 200_000


# ---- Histograms


def test_counts_of_values() -> None:
    values = np.random.default_rng(0).normal(size=(7, 500)).astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    found = jax.jit(count_values)(values)
    finite = values[np.isfinite(values)]
    edges = np.linspace(finite.min(), finite.max(), len(found["counts"]) + 1)
    np.testing.assert_allclose(found["counts"], np.histogram(finite, edges)[0], atol=2)  # a value on an edge
    assert found["counts"].sum() == finite.size
    assert float(found["low"]) == finite.min() and float(found["high"]) == finite.max()
    np.testing.assert_allclose(found["total"], finite.sum(), rtol=1e-3)
    np.testing.assert_allclose(found["squares"], (finite**2).sum(), rtol=1e-5)
    same = count_values(jnp.full(5, 3.0))
    assert same["counts"][0] == 5 and np.all(np.diff(Histogram(same["counts"], 3.0, 3.0, 15.0, 45.0).edges) > 0)
    nothing = count_values(jnp.full(5, jnp.nan))
    assert nothing["counts"].sum() == 0 and nothing["low"] > nothing["high"]


class Normed(Trainer):
    """Keeps the norm of the parameters after every update, and that of the update."""

    def _log_metrics(self, loss: float):
        super()._log_metrics(loss)
        before, self.params = self.params, jax.device_get(self.whole(self.state.params))
        self.norms[self.current_step] = float(optax.tree.norm(self.params))
        self.moved[self.current_step] = float(optax.tree.norm(jax.tree.map(np.subtract, self.params, before)))

    def train(self):
        self.norms: dict[int, float] = {}
        self.moved: dict[int, float] = {}
        self.whole = jax.jit(self.assembly.layout.to_whole)
        self.params = jax.device_get(self.whole(self.state.params))
        super().train()


@pytest.fixture(scope="module")
def histograms(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Normed, Everything]:
    """A run in 4 shards, padded ones too, with histograms at steps 2 and 3."""
    overrides = {
        "model.dropout": 0.1,
        "training.zero_stage": 3,
        "training.gradient_accumulation_steps": 2,
        "training.max_steps": 3,
        "training.histogram_steps": 2,
        "training.layer_norm_steps": 2,
        "training.noise_scale_steps": 2,
    }
    sink = Everything()
    trainer = Normed(make_config(tmp_path_factory.mktemp("histograms"), corpus, **overrides), sinks=[sink])
    trainer.train()
    return trainer, sink


@pytest.mark.slow
def test_histograms_of_a_run(histograms: tuple[Normed, Everything]) -> None:
    """They hold every parameter once, as before the update, and the gradients of that very update."""
    trainer, sink = histograms
    assert {step for _, step in sink.histograms} == {2, 3}, "every second one, and the last"
    assert ("gradients/block_01/attention/qkv/kernel", 2) in sink.histograms
    gradient_norms = {step: row["train/grad_norm"] for step, row in sink.rows}
    for step in (2, 3):
        for kind, norm in (("parameters", trainer.norms[step - 1]), ("gradients", gradient_norms[step])):
            found = [h for (name, at), h in sink.histograms.items() if name.startswith(kind) and at == step]
            assert sum(int(h.counts.sum()) for h in found) == trainer.assembly.parameters, "padding is no parameter"
            assert math.sqrt(sum(h.squares for h in found)) == pytest.approx(norm, rel=1e-5)


@pytest.mark.slow
def test_norms_of_layers_of_a_run(histograms: tuple[Normed, Everything]) -> None:
    """Those of all parts make the norm of the whole: of gradients, of the update that was made, of parameters."""
    trainer, sink = histograms
    rows = {step: row for step, row in sink.rows if "gradients/final_norm" in row}
    assert rows.keys() == {2, 3}
    for step, row in rows.items():
        assert "updates/block_01/attention" in row and "parameters/token_embedding" in row
        of = {
            "gradients": row["train/grad_norm"],
            "updates": trainer.moved[step],
            "parameters": trainer.norms[step - 1],
        }
        for kind, norm in of.items():
            parts = [value for name, value in row.items() if name.startswith(f"{kind}/")]
            assert len(parts) == 3 + 2 * 4  # two embeddings and the last norm; of each block four
            assert math.hypot(*parts) == pytest.approx(norm, rel=1e-5)
        assert math.isfinite(row["noise/trace"]) and row["noise/trace"] > 0


def test_noise_scale_needs_two_rows() -> None:
    one = TrainingConfig(batch_size=1, gradient_accumulation_steps=1, noise_scale_steps=5)
    with pytest.raises(UserError, match=r"^training.noise_scale_steps \(5\) compares rows of an update"):
        validate(Config(training=one))


def test_noise_scale_is_what_gradients_of_rows_say(tmp_path: Path, corpus: Path) -> None:
    """From the gradient of each row, made one by one; and means of random rows are as noisy as it says."""
    config = make_config(tmp_path, corpus, **{"training.batch_size": 4, "training.gradient_accumulation_steps": 8})
    trainer = Trainer(config)
    batch = next(iter(train_batches(trainer.text.rows, 0, Batches(4, 8), 0)))
    batch["segments"][1, 2, 9:] = 0  # rows of unlike length count by their targets
    state, numbers = trainer.state, at_rate(trainer._numbers, 0.1)
    loss_of = make_loss(trainer.assembly.graphdef, trainer.assembly.config, trainer.assembly.layout)
    gradient = jax.jit(jax.grad(lambda params, row: loss_of(params, row)[0]))
    rows = [{name: x[k, b : b + 1] for name, x in batch.items()} for k in range(8) for b in range(4)]
    targets = np.array([np.count_nonzero(row["segments"]) for row in rows])
    sums = np.stack([ravel_pytree(gradient(state.params, row))[0] for row in rows]).astype(np.float64)

    def directly(rows_a_part: int) -> tuple[float, float]:
        """tr S and |g|^2 from the variance of the gradients of parts."""
        n, parts = (x.reshape(-1, rows_a_part, *x.shape[1:]).sum(1) for x in (targets, sums))
        mean = parts.sum(0) / n.sum()
        trace = (n * np.square(parts / n[:, None] - mean).sum(1)).sum() / (len(n) - 1)
        return trace, mean @ mean - trace / n.sum()

    probe = NoiseScale(trainer.assembly, 1, 9, MetricsTracker(), Throughput(), Watchdog(0))
    probe.measure(1, state, jax.device_put(batch), numbers)
    expected = directly(rows_a_part=4)  # one on each of 4 devices
    found = [probe.tracker.history[f"noise/{name}"][1] for name in ("trace", "squared_gradient")]
    assert found == pytest.approx(expected, rel=1e-3)
    assert probe.tokens == pytest.approx(expected[0] / expected[1], rel=1e-3)
    trace, squared = directly(rows_a_part=1)
    assert found[0] == pytest.approx(trace, rel=0.2)
    chosen = np.random.default_rng(0).integers(0, len(rows), (2000, 4))
    squares = [np.square(sums[c].sum(0) / targets[c].sum()).sum() for c in chosen]
    assert np.mean(squares) == pytest.approx(squared + trace * (1 / targets.sum() + 1 / (4 * targets.mean())), rel=0.1)


# ---- Sinks of the user's own


class Mine(Recorder):
    """Named in report_to as "test_metrics:Mine", and made from the run's folder and configuration."""

    made: list["Mine"] = []  # noqa: RUF012

    def __init__(self, folder: Path | None = None, config: Config | None = None) -> None:
        super().__init__()
        self.folder, self.config, self.lock = folder, config, threading.Lock()  # which can't be copied
        self.made.append(self)


def test_own_sinks_get_the_rows(tmp_path: Path) -> None:
    own = Mine()
    config = Config(training=TrainingConfig(report_to=("jsonl", f"{__name__}:Mine", own)))
    tracker = MetricsTracker(make_sinks(validate(config), tmp_path, 0))
    assert [type(sink).__name__ for sink in tracker.sinks] == ["JsonLines", "Mine", "Mine"]
    assert tracker.sinks[-1] is own
    assert (Mine.made[-1].folder, Mine.made[-1].config) == (tmp_path, config)
    tracker.update({"x": 1}, 1)
    tracker.close()
    assert own.rows == Mine.made[-1].rows == [(1, {"x": 1.0})]
    assert own.closed


class Refusing(Mine):
    """Has no place for the configuration, or is told not to be made at all."""

    def __init__(self, folder: Path) -> None:
        raise ConnectionError(f"no tracker for {folder.name}")


class Away(Refusing):
    def __init__(self, folder: Path, config: Config) -> None:
        assert config is not None
        super().__init__(folder)


class Rows(dict[int, Any]):
    """Of a class in C, which has no signature."""

    def write(self, row: dict[str, float], step: int) -> None:
        self[step] = row

    def close(self) -> None:
        pass


def test_own_sinks_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name, problem in (
        ("Refusing", r"is made as Refusing\(folder, config\): too many positional arguments"),
        ("Rows", r"raised TypeError \(dict expected at most 1 argument, got 2\) when it was made"),
        ("Away", r"raised ConnectionError \(no tracker for run\) when it was made"),
    ):
        config = validate(Config(training=TrainingConfig(report_to=(f"{__name__}:{name}",))))
        with pytest.raises(UserError, match=rf"^training\.report_to \({__name__}:{name}\): {problem}"):
            make_sinks(config, tmp_path / "run", 0)
        if name == "Refusing":
            with pytest.raises(UserError, match=problem):
                check_own_sinks(config)  # as a dry run does


def test_an_own_sink_is_a_name_in_json() -> None:
    config = Config(training=TrainingConfig(report_to=("tensorboard", Mine())))
    values = json.loads(json.dumps(to_dict(config)))
    assert values["training"]["report_to"] == ["tensorboard", f"{__name__}:Mine"]
    validate(from_dict(values, "x"))  # as `load` does


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("wandbb", r"is not one of tensorboard, wandb, trackio, jsonl, module:Class, .*\(did you mean wandb\?\)"),
        (5, r"\(5\) is not one of"),
        (Mine, r"is not one of .* an object with write\(row, step\) and close\(\)"),
        ("no_such_module:X", r"No module named 'no_such_module'; put the module into this folder"),
        ("json:loads", r"\(json:loads\): is not a class with write\(row, step\) and close\(\)"),
        ("json:None", r"\(json:None\): is not a class"),
    ],
)
def test_entries_that_are_no_sink(entry: object, message: str) -> None:
    with pytest.raises(UserError, match=r"^training\.report_to .*" + message):
        validate(Config(training=TrainingConfig(report_to=(entry,))))


def test_an_own_sink_through_a_run(histograms: tuple[Normed, Everything]) -> None:
    trainer, sink = histograms
    assert [step for step, _ in sink.rows] == [1, 2, 3] and sink.closed
    assert load(trainer.folder / "final_model").progress.step == 3


# ---- Weights & Biases

TRACKING_PROGRAM = """
import sys
from pathlib import Path
from jaxlm.config import Config, TrainingConfig, validate
from jaxlm.errors import UserError
from jaxlm.monitor.metrics import MetricsTracker
from jaxlm.monitor.sinks import Histogram, make_sinks
import numpy as np
if sys.argv[2] == "missing":
    sys.modules[sys.argv[3]] = None  # what its import finds where it is not installed
try:
    config = validate(Config(training=TrainingConfig(report_to=("jsonl", sys.argv[3]))))
    tracker = MetricsTracker(make_sinks(config, Path(sys.argv[1]), 0))
    for step in (1, 2):
        tracker.update({"train/loss": 2.5 / step}, step)
        tracker.update({"custom/metric1": 7}, step)
        tracker.write_text("sample", "if a < b:\\n    pass", step)
        tracker.write_histogram("parameters/x", Histogram(np.array([1, 3]), 0.0, 1.0, 2.0, 2.0), step)
        tracker.flush(step)
    tracker.close()
except UserError as error:
    print(error)
"""


def run_tracking(folder: Path, name: str, how: str = "installed", **environment: str) -> str:
    pytest.importorskip(name)
    known = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TRACKIO_"))}
    environment = known | {"HOME": str(folder), "NETRC": str(folder / "netrc")} | environment
    arguments = [sys.executable, "-c", TRACKING_PROGRAM, str(folder), how, name]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: a log as LevelDB has it, blocks of 32 KiB with pieces of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:  # too little of the block is left for a piece
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole, or the last piece
            yield Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path) -> None:
    for _ in range(2):  # the second one goes on in the same run
        assert run_tracking(tmp_path, "wandb", WANDB_MODE="offline") == ""
    name = (tmp_path / "wandb_run_id").read_text()
    paths = list((tmp_path / "wandb").glob("offline-run-*"))
    assert paths
    for path in paths:
        assert path.name.endswith(name)
        records = list(wandb_records(path / f"run-{name}.wandb"))
        config = {item.key: json.loads(item.value_json) for r in records for item in r.run.config.update}
        assert config["training"]["weight_decay"] == 0.01
        rows = [{"/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item} for r in records]
        first, second = (row for row in rows if row)
        assert (first["train/loss"], second["train/loss"], second["_step"]) == (2.5, 1.25, 2)
        assert first["custom/metric1"] == 7
        assert first["sample/_type"] == "html-file"
        assert first["parameters/x/values"] == [1, 3]
        text = next((path / "files" / "media" / "html").glob("sample_*.html"))
        assert "<pre>if a &lt; b:\n    pass</pre>" in text.read_text()
    assert [row["custom/metric1"] for row in read_rows(tmp_path / "metrics.jsonl")] == [7] * 4


def test_wandb_without_login_is_one_line(tmp_path: Path) -> None:
    said = run_tracking(tmp_path, "wandb")
    assert said.startswith("training.report_to (wandb): No API key configured")
    assert said.endswith("or set WANDB_MODE=offline\n")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_missing_package_is_one_line(tmp_path: Path, name: str) -> None:
    said = run_tracking(tmp_path, name, "missing")
    assert said == f'training.report_to ({name}): the package is not installed; pip install -e ".[{name}]"\n'


def test_trackio_offline(tmp_path: Path) -> None:
    """Rows, texts and histograms of both starts are in its database; what it prints is not on stdout."""
    for _ in range(2):  # the second one goes on in the same run
        assert run_tracking(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "own"), HF_HUB_OFFLINE="1") == ""
    (path,) = (tmp_path / "own").glob("*.db")
    with contextlib.closing(sqlite3.connect(path)) as database:
        logged = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _, _ in logged} == {f"{tmp_path.name}-{(tmp_path / 'trackio_run_id').read_text()}"}
    rows = [(step, json.loads(metrics)) for _, step, metrics in logged]
    assert [(s, row["train/loss"]) for s, row in rows if "train/loss" in row] == [(1, 2.5), (2, 1.25)] * 2
    assert [row["sample"]["_value"] for _, row in rows if "sample" in row] == ["    if a < b:\n        pass"] * 4
    assert [row["parameters/x"]["values"] for _, row in rows if "parameters/x" in row] == [[1, 3]] * 4


def test_in_a_notebook_a_run_is_a_bar_and_a_curve(monkeypatch):
    """What IPython would show: drawn again in place, with the losses that there were, and nothing on stderr."""
    drawn = []
    display = types.SimpleNamespace(HTML=str, display=lambda html, display_id: drawn.append(html) or shown)
    shown = types.SimpleNamespace(update=drawn.append)
    for name, module in {
        "IPython": types.SimpleNamespace(get_ipython=lambda: display),
        "IPython.display": display,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(notebook, "SECONDS_BETWEEN", 0)
    assert not notebook.in_notebook()
    display.kernel = None
    progress = Progress(10, 20)
    for step in range(11, 21):
        loss = math.nan if step == 15 else 20.0 - step
        progress.write({"train/loss": loss} | ({"eval/loss": 1.5} if step in (14, 18) else {}), step)
        progress.advance(step)
    progress.close()
    assert "10/20" in drawn[0] and "polyline" not in drawn[0]
    train, evaluated = re.findall(r'points="(.*?)"', drawn[-1])
    assert len(train.split()) == 9 and len(evaluated.split()) == 2
    assert train.split()[-1] == f"{notebook.WIDTH}.0,{notebook.HEIGHT}.0"  # the lowest loss, at the last step
    assert 'value="1.0000"' in drawn[-1] and "20/20 loss 0.0000" in drawn[-1]
