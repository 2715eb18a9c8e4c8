"""What ends a run before its last update."""

import math
import sys
import time

from jaxlm.config import TrainingConfig
from jaxlm.config.validate import seconds_of
from jaxlm.errors import ProgramStopped, Stopped
from jaxlm.monitor.signals import StopRequest
from jaxlm.parallel.processes import text_from_any_process


class Ending:
    """Whether this process wants the run to stop after this update, to be gone on with later, and why.

    Reasons are a signal, training.max_time and `stop`; the first one counts.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self.signals = StopRequest()
        self.reason: str | None = None
        self._limit, self._deadline = training.max_time, math.inf
        if self._limit is not None:
            self._deadline = time.monotonic() + seconds_of("training.max_time", self._limit)

    def stop(self, reason: str) -> None:
        self.reason = self.reason or reason

    def asked(self) -> bool:
        """Looked at after each update; waits for nothing."""
        if self.signals.signal is not None:
            self.stop(self.signals.signal.name)
        if time.monotonic() >= self._deadline:
            self.stop(f"training.max_time ({self._limit})")
        return self.reason is not None

    def stopped(self, step: int, going_on: str) -> Stopped:
        """What says that the run has stopped after update `step`; all processes call it together."""
        kind = Stopped if hasattr(sys, "ps1") else ProgramStopped
        return kind(f"{text_from_any_process(self.reason)} at step {step}; {going_on}")


def stops_early(training: TrainingConfig, evaluations_since_best: int) -> bool:
    """Whether early stopping has ended a run after so many evaluations without a lower loss."""
    patience = training.early_stopping_patience
    return patience is not None and evaluations_since_best >= patience
