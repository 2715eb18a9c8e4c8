"""Ends a process that makes no progress: it would wait forever for a device, disk or other process that hangs."""

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

TICK = 1.0  # seconds between checks
LEAST_LIMIT = 60.0  # seconds for an update, where no limit is set
LIMIT_IN_UPDATES = 20  # times the median time of the last updates
OTHER_LIMIT = 1800.0  # seconds for work whose usual time is unknown: compiling, evaluating, saving, the first updates


class Watchdog:
    """A thread that ends the process with exit code 1 when the training loop has shown no sign of life for too long.

    Args:
      limit: seconds for an update; 0: no watchdog; None: LIMIT_IN_UPDATES times the median time of the last updates,
        and `least` at least. All other work has OTHER_LIMIT, if that is more.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit, self.least, self.board = limit, LEAST_LIMIT, StatusBoard()
        self._doing, self._updating = "starting", False
        self._update_times: deque[float] = deque(maxlen=50)  # seconds
        self._last_update = time.monotonic()
        self._silent, self._signs = 0.0, 0  # seconds since the last sign of life; how many there were
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.limit != 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def updated(self, step: int) -> None:
        """Notes that update `step` is done on the device."""
        now = time.monotonic()
        if self._updating:
            self._update_times.append(now - self._last_update)
        self._doing, self._updating, self._last_update = f"the update after step {step}", True, now
        self.alive()

    def forget_usual(self) -> None:
        """The next updates take another time than those before."""
        self._update_times.clear()

    def alive(self) -> None:
        """Notes a sign of life within longer work."""
        self._silent = 0.0
        self._signs += 1

    @contextlib.contextmanager
    def during(self, work: str) -> Iterator[None]:
        """A context for work other than updates."""
        before = self._doing, self._updating
        self._doing, self._updating = work, False
        self.alive()
        try:
            yield
        finally:
            (self._doing, self._updating), self._last_update = before, time.monotonic()
            self.alive()

    def allowed(self) -> float:
        """Seconds without a sign of life allowed now."""
        times = [*self._update_times]  # another thread may forget them meanwhile
        if not self._updating or (self.limit is None and len(times) < 5):
            return max(self.limit or 0, OTHER_LIMIT)
        if self.limit is not None:
            return self.limit
        return max(self.least, LIMIT_IN_UPDATES * statistics.median(times))

    def _watch(self) -> None:
        while not self._ended.wait(TICK):
            self._silent += TICK  # however long it took: a suspended process or a sleeping laptop is not a hang
            self.board.post(self._signs, self._doing)
            if self._silent > self.allowed():
                self._end()

    def _end(self) -> None:
        """Prints every thread's stack and ends the process at once: nothing in it can be trusted to clean up."""
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        print(
            f"failed: {self._doing}: no sign of life for {self.allowed():.0f} s (training.watchdog_seconds)"
            f"{self.board.lagging()}; all threads' stacks are above; the same command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
