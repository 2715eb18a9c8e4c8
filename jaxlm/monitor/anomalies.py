"""Whether the numbers of a run are well: updates that were skipped, losses that jump."""

import math
import statistics
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the report, which runs without JAX, asks this room what a spike is
    import jax

SPIKE_WINDOW = 50  # logged losses
SPIKE_FACTOR = 6.0  # times the usual distance from the median
SPIKE_LEAST = 0.5  # nats a token


class SkippedUpdates:
    """Which updates were skipped because their loss or gradient was not finite; reads the device only when asked.

    Args:
      total: skipped updates up to the first one noted.
    """

    def __init__(self, total: int) -> None:
        self.in_a_row = 0  # up to the last update read
        self._total = total
        self._noted: list[tuple[int, jax.Array]] = []

    def note(self, step: int, total: "jax.Array") -> None:
        """After update `step`, `total` (float32 scalar) were skipped in all."""
        self._noted.append((step, total))

    def read(self) -> list[int]:
        """The steps skipped since the last call; waits for the last one noted."""
        noted, self._noted = self._noted, []
        if not noted:
            return []
        if int(noted[-1][1]) == self._total:
            self.in_a_row = 0
            return []
        skipped = []
        for step, value in noted:
            before, self._total = self._total, int(value)
            if self._total > before:
                skipped.append(step)
            self.in_a_row = self.in_a_row + 1 if self._total > before else 0
        return skipped


class LossSpikes:
    """Flags a logged loss that stands far above the ones before it."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def look(self, loss: float) -> str | None:
        """What is unusual about `loss`, if anything; a loss that is not finite is not a spike."""
        if not math.isfinite(loss):
            return None
        before = list(self._recent)
        self._recent.append(loss)
        if len(before) < SPIKE_WINDOW // 5:
            return None
        median = statistics.median(before)
        usual = statistics.median(abs(value - median) for value in before)
        if loss <= median + max(SPIKE_FACTOR * usual, SPIKE_LEAST):
            return None
        return f"loss spike: {loss:.4f}, where the last {len(before)} logged had a median of {median:.4f}"
