"""What a run measures: collected by step, and sent to every sink once."""

import json
import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxlm.config import Config
from jaxlm.errors import one_line
from jaxlm.monitor.sinks import Histogram, HistogramSink, Row, Sink, TextSink, finite
from jaxlm.parallel.gpus import peak_flops


def flops_per_token(parameters: int, n_layers: int, max_length: int, d_model: int) -> float:
    """Training FLOPs a token, 6 N + 12 L T D: forward and backward, causality and recomputation not counted.

    N is all parameters (a tied embedding once). Where heads share keys and values the second term is the same: each
    query head has its own products. Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    return 6 * parameters + 12 * n_layers * max_length * d_model


def model_flops_utilization(
    tokens_per_second: float, config: Config, parameters: int, devices: Sequence[jax.Device]
) -> float:
    """tokens/s * FLOPs a token / (devices * peak), NaN where the device's peak is not known."""
    model = config.model
    flops = flops_per_token(parameters, model.n_layers, config.data.max_length, model.d_model)
    return tokens_per_second * flops / (len(devices) * peak_flops(devices[0].device_kind))


class Throughput:
    """Tokens a second since the last `restart`. What is not training (evaluating, saving) ends with a restart."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.tokens, self._started = 0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the block's time out."""
        begun = time.perf_counter()
        yield
        self._started += time.perf_counter() - begun

    def tokens_per_second(self) -> float:
        return self.tokens / (time.perf_counter() - self._started)


def memory_gib(devices: Sequence[Any]) -> Row:
    """Peak memory since the process began, in GiB: of the fullest of `devices`, where they tell, and of this process.

    Args:
      devices: `jax.Device`s of this process.
    """
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [held["peak_bytes_in_use"] for held in stats if "peak_bytes_in_use" in held]
    on_device = {"train/memory_gib": max(peaks) / 2**30} if peaks else {}
    return on_device | {"train/host_memory_gib": _peak_of_process() / 2**30}


def _peak_of_process() -> int:
    """Bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose getrusage counts what the process that started this one held, too
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
        self._each(lambda sink: sink.write_text(name, text, step) if isinstance(sink, TextSink) else None)

    def write_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Writes `histogram` at once, to the sinks that show histograms."""
        self._each(
            lambda sink: sink.write_histogram(name, histogram, step) if isinstance(sink, HistogramSink) else None
        )

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
        history = {name: [[step, finite(value)] for step, value in values] for name, values in self.history.items()}
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
                    reason = error.strerror or one_line(error)
                    print(f"{type(sink).__name__}: not written: {reason}", file=sys.stderr, flush=True)
                self._failing.add(i)
