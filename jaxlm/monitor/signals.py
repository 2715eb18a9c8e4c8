"""An orderly end after SIGINT, SIGTERM or SIGUSR1 (SLURM's warning)."""

import contextlib
import os
import signal
import threading
from types import FrameType

from jaxlm.errors import Stopped

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE = (
    5.0  # seconds that the main thread has to stop at once; it may be in a library that compiles, trains or downloads
)

BEFORE_FIRST_UPDATE = "{}: stopped before the first update; the same command starts again"


class StopRequest:
    """A context in which a stop signal is only noted, in `signal`; a second one ends the process with 128 + its number.

    With `at_once`, the first one raises `Stopped` in the main thread: for the time when nothing needs saving. As Python
    delivers signals to that thread alone, and between its own instructions, another one ends the process if it is late.
    Entered in another thread it does nothing.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._previous, self._ended = {}, threading.Event()
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
            if self.at_once:
                reader, writer = os.pipe()
                os.set_blocking(writer, False)
                signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
                threading.Thread(target=self._end_if_late, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous and self.at_once:
            os.close(signal.set_wakeup_fd(-1))

    def _end_if_late(self, reader: int) -> None:
        """Reads each signal's number as it arrives; those that are handled otherwise by now are not ours."""
        while received := os.read(reader, 1):
            if signal.getsignal(received[0]) == self._note and not self._ended.wait(GRACE):
                _print(BEFORE_FIRST_UPDATE.format(f"stopped: {signal.Signals(received[0]).name}"))
                os._exit(os.EX_TEMPFAIL)
        os.close(reader)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            _print(f"{signal.Signals(number).name} again: ended at once; what was saved last stays")
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        if self.at_once:
            raise Stopped(BEFORE_FIRST_UPDATE.format(self.signal.name))
        _print(f"{self.signal.name}: stopping and saving after this update; once more ends it at once, unsaved")


def _print(text: str) -> None:
    """Prints a line on stderr, without Python's buffers: the signal may have come while they were in use."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
