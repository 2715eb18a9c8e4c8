"""What a run measures, and where it goes: metrics.jsonl, TensorBoard, Weights & Biases, the progress line."""

import json
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from jaxlm.config import Config, to_dict
from jaxlm.errors import UserError

Row = dict[str, float]
LONGEST_ROW = 2**20  # bytes of metrics.jsonl

# Dense 16-bit peak of one device in FLOP/s, by words of its name, the more specific names first (makers' datasheets).
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def flops_per_token(parameters: int, n_layers: int, max_length: int, d_model: int) -> float:
    """Training FLOPs a token, 6 N + 12 L T D: forward and backward, causality and recomputation not counted.

    N is all parameters (a tied embedding once). Where heads share keys and values the second term is the same: each
    query head has its own products. Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    return 6 * parameters + 12 * n_layers * max_length * d_model


def model_flops_utilization(tokens_per_second: float, flops_a_token: float, device_kind: str, devices: int) -> float:
    """tokens/s * FLOPs a token / (devices * peak), NaN where the device's peak is not known."""
    peak = next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_kind)), math.nan)
    return tokens_per_second * flops_a_token / (devices * peak)


class Sink(Protocol):
    """Somewhere that rows go."""

    def write(self, row: Row, step: int) -> None: ...

    def close(self) -> None: ...


class MetricsTracker:
    """Collects metrics by step and writes each step's row once, to every sink.

    `update` may be called several times for a step (a subclass of Trainer adds its own values after ours); `flush`
    writes what has come together.
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self.sinks = list(sinks)
        self._failing: set[int] = set()  # indices of sinks
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._pending: dict[int, Row] = {}

    def update(self, metrics: Mapping[str, Any], step: int) -> None:
        """Adds values (anything `float()` takes) to the row of `step`; a name given twice keeps the later value."""
        row = self._pending.setdefault(step, {})
        for name, value in metrics.items():
            row[name] = float(value)

    def flush(self, step: int) -> None:
        """Writes the rows of all steps up to `step`; without any, does nothing."""
        for ready in sorted(s for s in self._pending if s <= step):
            row = self._pending.pop(ready)
            for name, value in row.items():
                self.history.setdefault(name, []).append((ready, value))
            self._each(lambda sink, row=row, step=ready: sink.write(row, step))  # type: ignore[misc]

    def write_text(self, name: str, text: str, step: int) -> None:
        """Writes `text` at once, to the sinks that show texts."""
        self._each(lambda sink: sink.write_text(name, text, step) if isinstance(sink, TensorBoard) else None)

    def get_latest(self, name: str) -> float | None:
        """The last value of `name`, flushed or not; None if there is none."""
        values = self._values(name)
        return values[-1][1] if values else None

    def get_average(self, name: str, window: int | None = None) -> float | None:
        """The mean of the last `window` values of `name` (None: of all); None if there are none."""
        values = [value for _, value in self._values(name)]
        values = values if window is None else values[-window:]
        return math.fsum(values) / len(values) if values else None

    def _values(self, name: str) -> list[tuple[int, float]]:
        pending = [(step, self._pending[step][name]) for step in sorted(self._pending) if name in self._pending[step]]
        return self.history.get(name, []) + pending

    def save(self, path: str | Path) -> None:
        """Writes the history as JSON; NaN and infinities as null."""
        history = {name: [[step, _finite(value)] for step, value in values] for name, values in self.history.items()}
        Path(path).write_text(json.dumps(history), encoding="utf-8")

    def load(self, path: str | Path) -> None:
        """Replaces the history by one that `save` wrote; null becomes NaN."""
        history = json.loads(Path(path).read_text(encoding="utf-8"))
        self.history = {
            name: [(step, math.nan if value is None else value) for step, value in values]
            for name, values in history.items()
        }

    def close(self) -> None:
        """Writes what is left and closes the sinks."""
        self.flush(max(self._pending, default=0))
        self._each(lambda sink: sink.close())

    def _each(self, act: Callable[[Sink], None]) -> None:
        """Does `act` with every sink; a disk that is full costs rows of a log, said once, and not the run."""
        for i, sink in enumerate(self.sinks):
            try:
                act(sink)
                self._failing.discard(i)
            except OSError as error:
                if i not in self._failing:
                    print(f"{type(sink).__name__}: not written: {error.strerror}", file=sys.stderr, flush=True)
                self._failing.add(i)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class JsonLines:
    """metrics.jsonl: one object a row, appended; what JSON can't say (NaN, infinity) is null."""

    def __init__(self, path: Path) -> None:
        _cut_unfinished_line(path)
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, row: Row, step: int) -> None:
        self.file.write(json.dumps({"step": step} | {name: _finite(value) for name, value in row.items()}) + "\n")

    def close(self) -> None:
        self.file.close()


def _cut_unfinished_line(path: Path) -> None:
    """Removes what a process that was killed while it wrote has left at the end of `path`."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - LONGEST_ROW))
        tail = file.read()
        file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)


class TensorBoard:
    """Event files; what an earlier run wrote beyond `start_step` is hidden (`start_step` 0: all of it).

    Written by tensorboardX's parts rather than its SummaryWriter, whose thread dies of a full disk and takes the run
    with it.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        folder.mkdir(parents=True, exist_ok=True)
        self._summary, self._proto = summary, event_pb2
        self._file = EventsWriter(str(folder / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(start_step + 1, session_log=start)

    def _add(self, step: int, **content: Any) -> None:
        self._file.write_event(self._proto.Event(wall_time=time.time(), step=step, **content))

    def write(self, row: Row, step: int) -> None:
        for name, value in row.items():
            if math.isfinite(value):  # TensorBoard can't draw the others
                self._add(step, summary=self._summary.scalar(name, value))
        self._file.flush()

    def write_text(self, name: str, text: str, step: int) -> None:
        """Text as it is, indentation kept."""
        indented = "\n".join("    " + line for line in text.splitlines())
        self._add(step, summary=self._summary.text(name, indented))

    def close(self) -> None:
        self._file.close()


class WeightsAndBiases:
    """A wandb run; a resumed jaxlm run goes on in the same one. WANDB_MODE=offline works without a network."""

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        id_file = folder / "wandb_run_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        try:
            self.run = wandb.init(
                project=config.training.wandb_project,
                dir=str(folder),
                id=id_file.read_text().strip(),
                resume="allow",
                config=to_dict(config),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"training.report_to (wandb): {str(error).rstrip('.')}; log in, or set WANDB_MODE=offline"
            ) from error

    def write(self, row: Row, step: int) -> None:
        self.run.log(row, step=step)

    def close(self) -> None:
        self.run.finish()


PROGRESS_FORMATS = {
    "train/loss": "loss {:.4f}",
    "train/tokens_per_second": "{:,.0f} tokens/s",
    "eval/loss": "eval loss {:.4f}",
}


class Progress:
    """The progress line on stderr: a bar on a terminal, a line a row elsewhere, nothing unless `shown`."""

    def __init__(self, start_step: int, last_step: int, shown: bool = True) -> None:
        from tqdm import tqdm

        self.last_step, self.shown = last_step, shown
        bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(
            total=last_step,
            initial=start_step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not (shown and sys.stderr.isatty()),
            bar_format=bar_format,
        )
        self._rate: tuple[int, float] = (start_step, time.monotonic())

    def advance(self, step: int) -> None:
        """`step` updates are done."""
        self.bar.update(step - self.bar.n)

    def line(self, text: str) -> None:
        """A line above the bar."""
        if self.shown:
            self.bar.write(text, file=sys.stderr)

    def write(self, row: Row, step: int) -> None:
        parts = [shown.format(row[name]) for name, shown in PROGRESS_FORMATS.items() if name in row]
        parts += [f"{name} {value:.4g}" for name, value in row.items() if not name.startswith(("train/", "eval/"))]
        if self.bar.disable:
            now = time.monotonic()
            done, self._rate = (step - self._rate[0], now - self._rate[1]), (step, now)
            left = f"left {self.bar.format_interval((self.last_step - step) * done[1] / done[0])}" if done[0] else ""
            self.line(f"step {step}/{self.last_step}  " + "  ".join([*parts, left]).rstrip())
        else:
            self.bar.set_postfix_str(", ".join(parts))

    def close(self) -> None:
        self.bar.close()


def check_report_to(names: Sequence[str]) -> None:
    """Raises UserError if a package that a name in report_to needs is not installed."""
    if "wandb" in names and find_spec("wandb") is None:
        raise UserError('training.report_to (wandb): the package is not installed; pip install -e ".[wandb]"')


def make_sinks(config: Config, folder: Path, start_step: int) -> list[Sink]:
    """metrics.jsonl, and one sink for each name in report_to."""
    makers: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoard(folder / "logs", start_step),
        "wandb": lambda: WeightsAndBiases(folder, config),
    }
    return [JsonLines(folder / "metrics.jsonl"), *(makers[name]() for name in config.training.report_to)]
