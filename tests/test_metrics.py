"""What is measured arrives, once, in every place that it should: history, metrics.jsonl, TensorBoard, W&B, stderr."""

import contextlib
import io
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_config
from tensorboardX.proto.event_pb2 import Event

from jaxlm import Trainer
from jaxlm.metrics import (
    JsonLines,
    MetricsTracker,
    TensorBoard,
    flops_per_token,
    model_flops_utilization,
)

pytestmark = pytest.mark.xdist_group("metrics")  # one process, so that the run is done once


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


# ---- The tracker


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
    assert other.history["x"][0] == (1, 0.1)
    assert math.isnan(other.history["x"][1][1])


# ---- The sinks


def test_json_lines_are_appended_and_say_null_for_what_json_cannot(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):  # as a resumed run
        sink = JsonLines(path)
        sink.write({"train/loss": math.nan, "eval/perplexity": math.inf, "x": 0.1}, step)
        assert path.read_text().count("\n") == step, "a row has to be there at once, not when the file is closed"
        sink.close()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert strict == [{"step": s, "train/loss": None, "eval/perplexity": None, "x": 0.1} for s in (1, 2)]


def test_tensorboard_events(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path, 0)
    sink.write({"train/loss": 2.5, "bad": math.nan}, 1)
    sink.write({"train/loss": 1.5}, 2)
    sink.write_text("sample", "def f():\n    return 1", 2)
    sink.close()
    assert read_scalars(tmp_path) == {"train/loss": {1: 2.5, 2: 1.5}}
    (text,) = [v for event in read_events(tmp_path) for v in event.summary.value if v.tag.startswith("sample")]
    assert text.tensor.string_val == [b"    def f():\n        return 1"]


@pytest.mark.parametrize("start_step", [0, 7])
def test_what_an_earlier_run_wrote_beyond_the_start_is_hidden(tmp_path: Path, start_step: int) -> None:
    TensorBoard(tmp_path, start_step).close()
    (session,) = [event for event in read_events(tmp_path) if event.HasField("session_log")]
    assert session.session_log.status == session.session_log.START
    assert session.step == start_step + 1, "TensorBoard drops the events of earlier files from this step on"


def test_model_flops_utilization() -> None:
    flops = flops_per_token(124_000_000, n_layers=12, max_length=1024, d_model=768)
    assert flops == 6 * 124e6 + 12 * 12 * 1024 * 768
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12,
        "Tesla T4": 65e12,
    }.items():
        assert model_flops_utilization(peak / flops, flops, name, 1) == pytest.approx(1)
        assert model_flops_utilization(peak / flops, flops, name, 4) == pytest.approx(0.25)
    for unknown in ("cpu", "NVIDIA L40", "NVIDIA RTX A4000", "NVIDIA A10G"):
        assert math.isnan(model_flops_utilization(1.0, flops, unknown, 1)), unknown


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
        assert trainer.metrics_tracker.history[name] == list(logged.items())
    (line,) = [line for line in stderr.splitlines() if line.startswith("step 2/5 ")]
    assert "custom/metric1 0.25" in line
    assert f"loss {rows[1]['train/loss']:.4f}" in line


# ---- Weights & Biases

WANDB_PROGRAM = """
import sys
from pathlib import Path
from jaxlm.config import Config, TrainingConfig
from jaxlm.errors import UserError
from jaxlm.metrics import MetricsTracker, check_report_to, make_sinks
if sys.argv[2] == "missing":
    sys.modules["wandb"] = None  # what `import wandb` finds where it is not installed
try:
    check_report_to(("tensorboard", "wandb"))
    tracker = MetricsTracker(make_sinks(Config(training=TrainingConfig(report_to=("wandb",))), Path(sys.argv[1]), 0))
    for step in (1, 2):
        tracker.update({"train/loss": 2.5 / step}, step)
        tracker.update({"custom/metric1": 7}, step)
        tracker.flush(step)
    tracker.close()
except UserError as error:
    print(error)
"""


def run_wandb(folder: Path, how: str, **environment: str) -> str:
    pytest.importorskip("wandb")
    known = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = known | {"HOME": str(folder), "NETRC": str(folder / "netrc")} | environment
    arguments = [sys.executable, "-c", WANDB_PROGRAM, str(folder), how]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wandb_offline(tmp_path: Path) -> None:
    for _ in range(2):  # the second one goes on in the same run
        assert run_wandb(tmp_path, "installed", WANDB_MODE="offline") == ""
    name = (tmp_path / "wandb_run_id").read_text()
    for path in (tmp_path / "wandb").glob("offline-run-*"):
        assert path.name.endswith(name)
        content = (path / f"run-{name}.wandb").read_bytes()
        for written in (b"train/loss", b"custom/metric1", b"1.25", b"weight_decay"):
            assert written in content, written
    assert [row["custom/metric1"] for row in read_rows(tmp_path / "metrics.jsonl")] == [7] * 4


def test_wandb_without_login_is_one_line(tmp_path: Path) -> None:
    said = run_wandb(tmp_path, "installed")
    assert said.startswith("training.report_to (wandb): No API key configured")
    assert said.endswith("or set WANDB_MODE=offline\n")


def test_wandb_missing_is_one_line(tmp_path: Path) -> None:
    said = run_wandb(tmp_path, "missing")
    assert said == 'training.report_to (wandb): the package is not installed; pip install -e ".[wandb]"\n'
