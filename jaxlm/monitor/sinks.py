"""The places that metrics go to: metrics.jsonl, TensorBoard, Weights & Biases, Trackio, and sinks of the user's own."""

import contextlib
import dataclasses
import html
import inspect
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from jaxlm.config import Config, to_dict
from jaxlm.config.fields import field_values
from jaxlm.config.schema import FIELDS
from jaxlm.config.validate import own_sink
from jaxlm.data.atomic import atomic_write
from jaxlm.errors import UserError, one_line

Row = dict[str, float]  # the metrics of a step by name
# Fields that a resumed run may change although they change the training.
SIZES = ("training.batch_size", "training.gradient_accumulation_steps", "training.num_epochs", "training.max_steps")
OPTIONAL_METHODS = ("write_text", "write_histogram")  # (name, str or `Histogram`, step)


class Sink(Protocol):
    """Takes rows; texts and histograms too, if it has the OPTIONAL_METHODS."""

    def write(self, row: Row, step: int) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Histogram:
    """The finite values of an array, counted in equal bins from the least to the greatest."""

    counts: np.ndarray  # int [bins]
    low: float
    high: float
    total: float  # sum of the values
    squares: float  # sum of their squares

    @property
    def edges(self) -> np.ndarray:
        """float64 [bins + 1], each greater than the one before, even where all values are equal."""
        return self.low + np.linspace(0.0, max(self.high - self.low, 1e-9), len(self.counts) + 1)


def finite(value: float) -> float | None:
    """`value` for JSON, which has no NaN and no infinity."""
    return value if math.isfinite(value) else None


class JsonLines:
    """metrics.jsonl, an object a row (null for NaN and infinities), and samples.jsonl, an object a text; appended."""

    def __init__(self, folder: Path) -> None:
        self.rows, self.texts = open_lines(folder / "metrics.jsonl"), open_lines(folder / "samples.jsonl")

    def write(self, row: Row, step: int) -> None:
        values = {name: finite(value) for name, value in row.items() if name != "step"}
        self.rows.write(json.dumps({"step": step} | values) + "\n")

    def write_text(self, name: str, text: str, step: int) -> None:
        self.texts.write(json.dumps({"step": step, "name": name, "text": text}) + "\n")

    def close(self) -> None:
        self.rows.close()
        self.texts.close()


def open_lines(path: Path) -> TextIO:
    """A file of JSON lines to append to, without the part of a line that a process killed while it wrote left there."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8", buffering=1)


class TensorBoard:
    """Event files; TensorBoard hides what an earlier run wrote there beyond `start_step`.

    Written by parts of tensorboardX rather than its SummaryWriter, whose thread dies of a full disk and takes the run
    with it.
    """

    def __init__(self, folder: Path, start_step: int, config: Config) -> None:
        with _hidden("torch"):  # tensorboardX would import it, if it is installed, to annotate a type
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2

        self._summary, self._events = summary, event_pb2
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))
        self._add(start_step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        # The HPARAMS page. Without the first part, which names its columns, it begins with those in which runs differ.
        _, session_start, self._session_end = summary.hparams(hyperparameters(config), {})
        self._add(0, summary=session_start)
        self._file.flush()

    def _add(self, step: int, **content: Any) -> None:
        self._file.write_event(self._events.Event(wall_time=time.time(), step=step, **content))

    def write(self, row: Row, step: int) -> None:
        for name, value in row.items():
            if math.isfinite(value):  # TensorBoard cannot draw others
                self._add(step, summary=self._summary.scalar(name, value))
        self._file.flush()

    def write_text(self, name: str, text: str, step: int) -> None:
        self._add(step, summary=self._summary.text(name, _markdown(text)))

    def write_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        content = self._summary.histogram_raw(
            name,
            min=histogram.low,
            max=histogram.high,
            num=int(histogram.counts.sum()),
            sum=histogram.total,
            sum_squares=histogram.squares,
            bucket_limits=histogram.edges[1:].tolist(),
            bucket_counts=histogram.counts.tolist(),
        )
        self._add(step, summary=content)

    def close(self) -> None:
        self._add(0, summary=self._session_end)
        self._file.close()


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Meanwhile a module that nobody has imported yet cannot be."""
    absent = name not in sys.modules
    if absent:
        sys.modules[name] = None  # type: ignore[assignment]  # as Python's documentation says
    try:
        yield
    finally:
        if absent:
            del sys.modules[name]


def _markdown(text: str) -> str:
    """Markdown that shows `text` as it is, indentation kept."""
    return "\n".join("    " + line for line in text.splitlines())


def hyperparameters(config: Config) -> dict[str, bool | float | str]:
    """{"section.field": value} of the fields that change the training; lists as text, None as "none"."""
    return {
        name: value if isinstance(value, bool | int | float | str) else ", ".join(value or ["none"])
        for name, value in field_values(config).items()
        if not FIELDS[name].metadata["resumable"] or name in SIZES
    }


class WeightsAndBiases:
    """A wandb run; a resumed jaxlm run goes on in the same one. WANDB_MODE=offline works without a network."""

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        self.library: Any = wandb
        try:
            self.run: Any = wandb.init(dir=str(folder), id=_kept_id(folder / "wandb_run_id"), **_run_options(config))
        except wandb.errors.Error as error:
            message = f"{str(error).rstrip('.')}; log in, or set WANDB_MODE=offline"
            raise UserError(f"training.report_to (wandb): {message}") from error

    def write(self, row: Row, step: int) -> None:
        self.run.log(row, step=step)

    def write_text(self, name: str, text: str, step: int) -> None:
        self.run.log({name: self.library.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step=step)

    def write_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        shown = self.library.Histogram(np_histogram=(histogram.counts, histogram.edges))
        self.run.log({name: shown}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            self.library.finish()  # unlike `run.finish()`, Trackio's is not repeated when the process ends


class Trackio(WeightsAndBiases):
    """A run of Trackio, whose interface is wandb's, on this machine (TRACKIO_DIR: where); `trackio show` opens it."""

    def __init__(self, folder: Path, config: Config) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            import trackio

            self.library = trackio
            name = f"{folder.resolve().name}-{_kept_id(folder / 'trackio_run_id')}"
            options = _run_options(config) | {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
            self.run = trackio.init(name=name, **options)

    def write_text(self, name: str, text: str, step: int) -> None:
        self.run.log({name: self.library.Markdown(_markdown(text))}, step=step)


def _run_options(config: Config) -> dict[str, Any]:
    return {"project": config.training.wandb_project, "config": to_dict(config), "resume": "allow"}


def _kept_id(path: Path) -> str:
    """The id of this run in a tracker, made at its first start."""
    if not path.exists():
        atomic_write(path, uuid.uuid4().hex[:8])
    return path.read_text().strip()


def check_own_sinks(config: Config) -> None:
    """Raises UserError if a class in report_to is not one that is made from a folder and a configuration."""
    for entry in config.training.report_to:
        if isinstance(entry, str) and ":" in entry:
            try:
                with contextlib.suppress(ValueError):  # it has no signature, as classes in C may have none
                    inspect.signature(own_sink(entry)).bind(Path(), config)
            except TypeError as error:
                made = f"is made as {entry.partition(':')[2]}(folder, config)"
                raise UserError(f"training.report_to ({entry}): {made}: {one_line(error)}") from error


def _made(entry: str, folder: Path, config: Config) -> Sink:
    """A sink of the user's own."""
    kind = own_sink(entry)
    try:
        return kind(folder, config)
    except Exception as error:
        what = f"raised {type(error).__name__} ({one_line(error)}) when it was made"
        raise UserError(f"training.report_to ({entry}): {what}") from error


def make_sinks(config: Config, folder: Path, start_step: int) -> list[Sink]:
    """metrics.jsonl and samples.jsonl, and one sink for each entry of report_to.

    Raises:
      UserError: one cannot be made.
    """
    check_own_sinks(config)
    sinks: list[Sink] = [JsonLines(folder)]
    trackers = {"wandb": WeightsAndBiases, "trackio": Trackio}
    with contextlib.ExitStack() as opened:
        for entry in config.training.report_to:
            opened.callback(sinks[-1].close)  # where the next one can't be made
            if not isinstance(entry, str):
                sinks.append(entry)
            elif entry == "tensorboard":
                sinks.append(TensorBoard(folder / "logs", start_step, config))
            elif entry != "jsonl":  # which is always written
                sinks.append(trackers[entry](folder, config) if entry in trackers else _made(entry, folder, config))
        opened.pop_all()
    return sinks
