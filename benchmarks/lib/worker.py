"""A measured process's side. Standard library alone.

A contender of cpu.py trains on and on, and stops after each turn until it is asked for the next one. It is asked by a
line "run N" on stdin, and answers with a line of JSON on stdout. A part of data.py or growth.py answers once, a part of
gpu/suite.py as often as it has a result.
"""

import contextlib
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP = 3  # laps before a worker says that it is ready, compilation among them
UNTIMED = 1  # laps at the start of each turn, after the others have had the caches


class Turns:
    """Times laps (a lap is a fixed number of updates), and waits where a turn is over.

    Call `lap` after every lap, when all that it started is done. The first answer, after WARM_UP laps, holds `about`
    and `first_lap`, the Unix time at which the first lap was done; where `updated` was called after the first update,
    `first_update`, too. Later ones hold `seconds` of each timed lap, the last `loss`, `cpu_seconds` of the turn and
    `peak_bytes`: what `peak` says, by itself the most memory that the process has had resident so far.
    """

    def __init__(self, about: dict[str, Any] | None = None, peak: Callable[[], int] | None = None) -> None:
        """Takes stdout for the answers; what libraries print goes to stderr from here on."""
        self.peak = peak_bytes if peak is None else peak
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.about = {} if about is None else about
        self._ready, self._untimed, self._wanted = False, WARM_UP, 0
        self._seconds: list[float] = []
        self._begin = 0.0

    def updated(self) -> None:
        """An update is done, loss and all."""
        self.about.setdefault("first_update", time.time())

    def lap(self, loss: float) -> None:
        """A lap is done, and the last update's loss was `loss`. Ends the process when nobody asks any more."""
        now = time.perf_counter()
        self.about.setdefault("first_lap", time.time())
        if self._untimed:
            self._untimed -= 1
        else:
            self._seconds.append(now - self._begin)
        if not self._untimed and len(self._seconds) == self._wanted:
            self._answer(loss)
            self._wait()
        self._begin = time.perf_counter()

    def _answer(self, loss: float) -> None:
        if self._ready:
            used = time.process_time() - self._cpu_before
            turn = {"seconds": self._seconds, "loss": loss, "cpu_seconds": used, "peak_bytes": self.peak()}
        else:
            self._ready, turn = True, self.about
        self._answers.write(json.dumps(turn) + "\n")

    def _wait(self) -> None:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        self._wanted, self._untimed, self._seconds = int(line.removeprefix("run ")), UNTIMED, []
        self._cpu_before = time.process_time()


def train_forever(update: Callable[[int], Any], turns: Turns, updates_a_lap: int) -> None:
    """Calls `update(number)`, which returns the loss (anything `float()` takes), until nobody asks any more."""
    for number in itertools.count():
        loss = update(number)
        if number == 0:
            float(loss)
            turns.updated()
        if (number + 1) % updates_a_lap == 0:
            turns.lap(float(loss))


def answer_part(parts: dict[str, Callable[[dict[str, Any]], Any]]) -> None:
    """Does what `lib.workers.in_a_process` asked for on the command line; what is printed meanwhile goes to stderr."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        json.dump(parts[sys.argv[2]](json.loads(sys.argv[3])), answers)


def answers() -> Callable[[dict[str, Any]], None]:
    """A function that writes an answer for `lib.workers.stream`; what is printed goes to stderr from here on."""
    file = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lambda answer: print(json.dumps(answer), file=file)


def status_bytes(name: str) -> int:
    """A figure of Linux's /proc/self/status, such as RssAnon."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def peak_bytes() -> int:
    """The most memory this process has had resident since it began, or since `forget_peak`."""
    if Path("/proc/self/status").is_file():  # getrusage's figure would go on from the process that started this one
        return status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Lets the kernel count the most resident memory anew from here (Linux; elsewhere the peak includes what was)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
