"""Signs of trouble in a run's numbers: updates that were skipped, losses that jump."""

import math
import statistics
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the report, which runs without JAX, uses LossSpikes
    import jax

SPIKE_WINDOW = 50  # logged losses
SPIKE_FACTOR = 6.0  # median absolute deviations above the median
SPIKE_LEAST = 0.5  # nats a token above the median


class SkippedUpdates:
    """The updates that were skipped as not finite; `total` of them before the first one noted."""

    def __init__(self, total: int) -> None:
        self.in_a_row = 0  # skipped, up to the last update read
        self._total = total
        self._noted: list[tuple[int, jax.Array]] = []

    def note(self, step: int, total: "jax.Array") -> None:
        """After update `step`, `total` (int32 scalar, not waited for) updates were skipped since the run began."""
        self._noted.append((step, total))

    def read(self) -> list[int]:
        """The steps skipped since the last call; waits for the last one noted."""
        skipped = []
        for step, total in self._noted:
            before, self._total = self._total, int(total)
            if self._total > before:
                skipped.append(step)
            self.in_a_row = self.in_a_row + 1 if self._total > before else 0
        self._noted.clear()
        return skipped


class LossSpikes:
    """Flags a logged loss that stands far above the ones before it."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def look(self, loss: float) -> str | None:
        """A description of the spike if `loss` is one, else None; a loss that is not finite is none."""
        if not math.isfinite(loss):
            return None
        before = list(self._recent)
        self._recent.append(loss)
        if len(before) >= SPIKE_WINDOW // 5:
            median = statistics.median(before)
            deviation = statistics.median(abs(value - median) for value in before)
            if loss > median + max(SPIKE_FACTOR * deviation, SPIKE_LEAST):
                return f"loss spike: {loss:.4f}, where the last {len(before)} logged had a median of {median:.4f}"
        return None
