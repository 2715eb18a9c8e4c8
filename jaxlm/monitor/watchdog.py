"""Ends a process that makes no progress: a device, a disk or another process that hangs would hold it forever."""

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator

from jaxlm.parallel.processes import StatusBoard

EXIT_FAILED = 1
TICK = 1.0  # seconds between looks
SHORTEST = 60.0  # seconds; no limit that is derived is under it
TIMES_A_STEP = 20
UNMEASURED = 1800.0  # seconds for what has no measured time: compiling, evaluating, saving, the first updates


class Watchdog:
    """A thread that ends the process with 1 when the training loop has shown no sign of life for too long.

    The limit is `limit` seconds for an update, or, if that is None, TIMES_A_STEP times the median of the last updates;
    all else, such as compiling, has UNMEASURED seconds if that is more.
    Only time in which this thread itself runs is counted: a suspended process or a sleeping laptop is not a hang.

    Args:
      limit: seconds; 0: never.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit, self.board = limit, StatusBoard()
        self._step = 0  # last one seen
        self._phase: str | None = "starting"  # None: updates
        self._times: deque[float] = deque(maxlen=50)
        self._last_update = time.monotonic()
        self._silent, self._signs = 0.0, 0
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.limit != 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def updated(self, step: int) -> None:
        """Update `step` is done on the device."""
        now = time.monotonic()
        if self._phase is None:
            self._times.append(now - self._last_update)
        self._phase, self._last_update, self._step = None, now, step
        self.alive()

    def alive(self) -> None:
        """A part of what is being done is done."""
        self._silent = 0.0
        self._signs += 1

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """While entered, `phase` goes on instead of updates."""
        before, self._phase = self._phase, phase
        self.alive()
        try:
            yield
        finally:
            self._phase, self._last_update = before, time.monotonic()
            self.alive()

    def allowed(self) -> float:
        """Seconds of silence allowed now."""
        if self._phase is not None:
            return max(self.limit or 0, UNMEASURED)
        if self.limit is not None:
            return self.limit
        if len(self._times) < 5:
            return UNMEASURED
        return max(SHORTEST, TIMES_A_STEP * statistics.median(self._times))

    def _doing(self) -> str:
        return self._phase or f"the update after step {self._step}"

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(TICK):
            now = time.monotonic()
            self._silent += min(now - last, 2 * TICK)
            last = now
            self.board.post(self._signs, self._doing())
            if self._silent > self.allowed():
                self._end()

    def _end(self) -> None:
        """Says what every thread was at, and ends the process: nothing in it can be trusted to clean up."""
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self.board.post(self._signs, self._doing())
        print(
            f"failed: {self._doing()}: no sign of life for {self.allowed():.0f} s (training.watchdog_seconds)"
            f"{self.board.lagging()}; all threads' stacks are above; the same command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_FAILED)
