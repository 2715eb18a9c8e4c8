"""What is measured of some updates on request, by a program of its own that runs just before the update."""

import jax

from jaxlm.monitor.metrics import MetricsTracker, Throughput
from jaxlm.monitor.watchdog import Watchdog
from jaxlm.train.accumulate import Batch
from jaxlm.train.assemble import Assembly
from jaxlm.train.numbers import Numbers
from jaxlm.train.step import TrainState


class Probe:
    """Measures every `every` updates and at the last one; None: never. A subclass says what, in `measure`.

    Its time is left out of the throughput.
    """

    what: str  # it measures, for the watchdog's line

    def __init__(
        self,
        assembly: Assembly,
        every: int | None,
        total_steps: int,
        tracker: MetricsTracker,
        throughput: Throughput,
        watchdog: Watchdog,
    ) -> None:
        self.assembly, self.every, self.total_steps = assembly, every, total_steps
        self.tracker, self.throughput, self.watchdog = tracker, throughput, watchdog
        self.prepare()

    def prepare(self) -> None:
        """Makes the functions that `measure` calls; nothing is compiled before the first call."""

    def measure(self, step: int, state: TrainState, batch: Batch, numbers: Numbers) -> None:
        """Measures update `step`, from 1, and writes what it found; `state` is that before it."""
        raise NotImplementedError

    def before_update(self, step: int, state: TrainState, batch: Batch, numbers: Numbers) -> None:
        """`measure`, if it is due."""
        if self.every is None or (step % self.every and step != self.total_steps):
            return
        jax.block_until_ready(state.step)
        with self.throughput.paused(), self.watchdog.during(f"computing {self.what}"):
            self.measure(step, state, batch, numbers)
