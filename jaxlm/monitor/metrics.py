"""The metrics of a run: collected by step, and written to every sink once."""

import json
import math
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, SupportsFloat

from jaxlm.config import Config
from jaxlm.data.atomic import atomic_write
from jaxlm.errors import one_line
from jaxlm.monitor.sinks import OPTIONAL_METHODS, Histogram, Row, Sink, finite
from jaxlm.parallel.gpus import peak_flops
from jaxlm.train.trainable import trains

if TYPE_CHECKING:
    import jax


def flops_per_token(parameters: int, n_layers: int, max_length: int, d_model: int) -> float:
    """Training FLOPs a token, 6 N + 12 L T D: forward and backward, causality and recomputation not counted.

    N is all parameters (a tied embedding once), D the width of all heads. Source: Chowdhery et al. 2022 (PaLM),
    appendix B.
    """
    return 6 * parameters + 12 * n_layers * max_length * d_model


def model_flops_per_token(config: Config, parameters: int, frozen: int = 0) -> float:
    """`flops_per_token` of a run; of all `parameters`, a value embedding is only looked up, and frozen ones have no
    gradients, which are 2 of the 6 N.
    """
    model = config.model
    looked_up = model.vocab_size * model.kv_heads * model.head_size if model.value_embedding else 0
    width = model.n_heads * model.head_size
    all_trained = flops_per_token(parameters - looked_up, model.n_layers, config.data.max_length, width)
    trained = trains(config.training)
    frozen_table = looked_up if trained is not None and not trained("value_embedding") else 0
    return all_trained - 2 * (frozen - frozen_table)


def model_flops_utilization(tokens_per_second: float, flops: float, devices: Sequence["jax.Device"]) -> float:
    """tokens/s * `flops` a token / (devices * peak), NaN where the device's peak is not known."""
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


def memory_gib(devices: Sequence["jax.Device"]) -> Row:
    """Peak memory since the process began, in GiB: of the process, and of the fullest of its `devices` if they tell."""
    statistics = [device.memory_stats() or {} for device in devices]
    peaks = [each["peak_bytes_in_use"] for each in statistics if "peak_bytes_in_use" in each]
    on_device = {"train/memory_gib": max(peaks) / 2**30} if peaks else {}
    # On Linux, getrusage also counts the memory of the process that started this one.
    status = Path("/proc/self/status").read_text() if sys.platform == "linux" else ""
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    peak = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; on macOS, bytes
    return on_device | {"train/host_memory_gib": peak / (2**30 if sys.platform == "darwin" else 2**20)}


class MetricsTracker:
    """Collects metrics by step and writes each step's row once, to every sink.

    `update` may be called several times for a step (a subclass of Trainer adds its own values), until `flush`.
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self.sinks = list(sinks)
        self._failing: set[tuple[int, str]] = set()  # indices of sinks, and which of their methods
        self.history: dict[str, dict[int, float]] = {}  # {name: {step: value}}, written or not
        self._pending: dict[int, Row] = {}

    def update(self, metrics: Mapping[str, SupportsFloat | str], step: int) -> None:
        """Adds values (anything `float()` takes) to the row of `step`; a name given twice keeps the later value.

        Raises:
          ValueError: one is called "step", which each row has of its own.
        """
        if "step" in metrics:
            raise ValueError('a metric can\'t be called "step", as each row has one; call it "custom/step"')
        row = {name: float(value) for name, value in metrics.items()}
        self._pending.setdefault(step, {}).update(row)
        for name, value in row.items():
            self.history.setdefault(name, {})[step] = value

    def row(self, step: int) -> Row:
        """What has been added to the row of `step`, until it is written."""
        return dict(self._pending.get(step, {}))

    def postpone(self, step: int) -> None:
        """Moves what was added to the row of `step` to that of the next one."""
        if step in self._pending:
            self.update(self._pending.pop(step), step + 1)

    def flush(self, step: int) -> None:
        """Writes the rows of all steps up to `step`; without any, does nothing."""
        for complete in sorted(s for s in self._pending if s <= step):
            self._call_sinks("write", self._pending.pop(complete), complete)

    def write_text(self, name: str, text: str, step: int) -> None:
        """Writes `text` at once, to the sinks that show texts."""
        self._call_sinks("write_text", name, text, step)

    def write_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Writes `histogram` at once, to the sinks that show histograms."""
        self._call_sinks("write_histogram", name, histogram, step)

    def get_latest(self, name: str) -> float | None:
        """The last value of `name`, flushed or not; None if there is none."""
        return self.get_average(name, window=1)

    def get_average(self, name: str, window: int | None = None) -> float | None:
        """The mean of the last `window` values of `name` (None: of all), flushed or not; None if there are none."""
        values = list(self.history.get(name, {}).values())
        values = values if window is None else values[-window:]
        return sum(values) / len(values) if values else None

    def save(self, path: str | Path) -> None:
        """Writes the history as JSON, whole or not at all; NaN and infinities as null."""
        history = {name: [[step, finite(x)] for step, x in values.items()] for name, values in self.history.items()}
        atomic_write(Path(path), json.dumps(history))

    def load(self, path: str | Path) -> None:
        """Replaces the history by one that `save` wrote; null becomes NaN."""
        history = json.loads(Path(path).read_text(encoding="utf-8"))
        self.history = {
            name: {step: math.nan if value is None else value for step, value in values}
            for name, values in history.items()
        }

    def close(self) -> None:
        """Writes the rows that are left and closes the sinks."""
        self.flush(max(self._pending, default=0))
        self._call_sinks("close")

    def _call_sinks(self, method: str, *arguments: object) -> None:
        """Calls `method` of every sink.

        What one raises (a full disk, a tracker that is away, a bug) is told once, until it works again, and costs rows,
        not the run.
        """
        for i, sink in enumerate(self.sinks):
            if method in OPTIONAL_METHODS and not hasattr(sink, method):
                continue
            try:
                getattr(sink, method)(*arguments)
                self._failing.discard((i, method))
            except Exception as error:
                if (i, method) not in self._failing:
                    reason = getattr(error, "strerror", None) or f"{type(error).__name__} ({one_line(error)})"
                    step = f" at step {arguments[-1]}" if arguments else ""
                    what = f"{type(sink).__name__}.{method}{step}: not written: {reason}"
                    print(what + "; the run goes on without it" * (method != "close"), file=sys.stderr, flush=True)
                self._failing.add((i, method))
