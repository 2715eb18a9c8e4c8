"""A text that is trained on while it is tokenized: its rows come shard by shard, each of which is packed by itself.

A process of its own tokenizes, `python -m jaxlm.data.streaming`, which ends with the one that started it. The stream of
rows depends on the text and the seed alone, not on the shards that are there: one that is not, is waited for.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxlm.config import Config, DataConfig
from jaxlm.config.fields import from_dict, to_dict
from jaxlm.data import shards as shards_of
from jaxlm.data import tokenizing
from jaxlm.data.atomic import atomic_write
from jaxlm.data.loader import Batch, Order, Rows
from jaxlm.data.packing import plan, plan_cached
from jaxlm.data.shards import Shards
from jaxlm.data.sources import open_source
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizing import NOTES, Report, make_shards, notes
from jaxlm.data.tokens import Streamed, TokenDocuments
from jaxlm.errors import RunFailed, UserError

OPEN = 16  # shards, at a time
LARGEST_WINDOW = 8  # shards that change places in the first epoch
ROW_BITS = 32  # of an index, below the shard's number
LOOKS, SAYS = 0.2, 10  # seconds between looks for a shard, and between lines while it is waited for
PROGRESS = 60  # seconds between lines of the process that tokenizes


def documents_of(shards: Shards, number: int) -> TokenDocuments:
    """Those of a shard that is whole."""
    return TokenDocuments(shards.folder, shards.name(number), shards.dtype)


def packed(shards: Shards, number: int, data: DataConfig) -> Rows | None:
    """The rows of a shard that is whole; None: no document of it is long enough for one."""
    documents = documents_of(shards, number)
    if np.diff(documents.offsets).max(initial=0) < max(data.min_length, 2):
        return None
    if len(documents.tokens) != shards.counts(number).tokens:
        raise RunFailed(f"cached tokens ({shards.path(number, 'tokens')}) are damaged; delete their folder")
    return Rows(documents, plan_cached(documents, data, lambda line: None))


class StreamedRows:
    """The packed rows of a text that is being tokenized, by index: the shard's number, and the row's in that."""

    def __init__(self, text: Streamed, data: DataConfig, report: Report) -> None:
        """Returns when the first rows are there. Raises UserError if they can't be made."""
        self._folder, self._data, self._report = text.folder, data, report
        self._while_waiting: Callable[[], None] = lambda: None
        self.shards = Shards(text.folder, "train", text.tokenizer.dtype)
        self._opened, self._opening = lru_cache(OPEN)(self._open), threading.Lock()
        self._rows_in_all: int | None = None
        self._ended, self._documents_before = threading.Event(), [0]  # whether nobody waits any more; by shard
        self._work = None if self.total is not None else Work(text, data, report)
        begun = f"streaming: trains on the shards that are there, while others are tokenized ({text.folder})"
        for line in ready_lines(text.folder) if self._work is None else [begun]:
            report(line)
        try:
            self._first = next(rows for rows in map(self._shard_with_rows, count()) if rows is not None)
        except RunFailed as error:
            raise UserError(str(error)) from error

    @property
    def total(self) -> int | None:
        """How many shards there are; None: that is not known yet."""
        path = self._folder / NOTES
        return json.loads(path.read_text())["shards"] if path.exists() else None

    def begin(self, report: Report, while_waiting: Callable[[], None]) -> None:
        """From now on, `report` gets the lines, and `while_waiting` is called from time to time while this waits."""
        self._report, self._while_waiting = report, while_waiting
        self._ended.clear()
        if self._work is not None:
            self._work.lines.report = report

    def end(self) -> None:
        """Threads that wait for a shard, to read ahead, do so no more."""
        self._ended.set()

    @property
    def parts(self) -> dict[str, Rows]:
        """The rows of the first shard that has some, as what tells about all."""
        return {"": self._first}

    def shard(self, number: int) -> Rows | None:
        """The rows of a shard, once it is whole; None: it has none, or the text ends before it.

        Raises:
          RunFailed: it can't be made.
        """
        if not self._is_there(number):
            return None
        with self._opening:  # findings/numpy-load-in-threads-beside-jax.sh
            return self._opened(number)

    def _shard_with_rows(self, number: int) -> Rows | None:
        """As `shard`; UserError if no shard up to the last one has rows."""
        if not self._is_there(number):
            everything = [np.diff(documents_of(self.shards, i).offsets) for i in range(number)]
            ends = np.cumsum(np.concatenate([[0], *everything]))
            plan(ends, self._data.max_length, self._data.min_length, self._data.packing_strategy, True)  # says why
        return self.shard(number)

    def _is_there(self, number: int) -> bool:
        """Waits for a shard, or for the end of the text; whether it is there."""
        start = said = time.monotonic()
        while not self.shards.is_whole(number):
            if (shards := self.total) is not None and number >= shards:
                return False
            fault = "it was removed" if self._work is None else self._work.fault()
            if fault is not None and not self.shards.is_whole(number):
                raise RunFailed(f"shard {number} of the text can't be made: {fault}")
            if time.monotonic() > said + SAYS:
                said = time.monotonic()
                self._report(f"waits for shard {number} of the text, which is being tokenized: {said - start:.0f} s")
            self._while_waiting()
            if self._ended.wait(LOOKS):
                raise RunFailed(f"shard {number} of the text is waited for no more: the run has ended")
        return True

    def _open(self, number: int) -> Rows | None:
        try:
            return packed(self.shards, number, self._data)
        except (UserError, OSError) as error:
            raise RunFailed(f"shard {number} of the text can't be read: {error}") from error

    def __getitem__(self, index: int) -> Batch:
        _, rows, row = self.find(index)
        return rows[row]

    def find(self, index: int) -> tuple[str, Rows, int]:
        """The name of row `index`'s shard, its rows, and which of them it is."""
        number, row = divmod(index, 2**ROW_BITS)
        rows = self.shard(number)
        assert rows is not None
        return f"shard {number}", rows, row

    def documents(self, index: int) -> np.ndarray:
        """As `Rows.documents`; waits for the shards before it."""
        _, rows, row = self.find(index)
        before, number = self._documents_before, index >> ROW_BITS
        while len(before) <= number and self._is_there(len(before) - 1):
            before.append(before[-1] + self.shards.counts(len(before) - 1).documents)
        return rows.documents(row) + before[number]

    def order(self, seed: int, anneal_row: int | None = None) -> Order:
        return StreamedOrder(self, seed)

    def epochs(self, place: int) -> float | None:
        """How many passes over all rows come before `place` of the stream; None: that is not known yet."""
        if self._rows_in_all is None and (total := self.total) is not None:
            with self._opening:
                found = (packed(self.shards, number, self._data) for number in range(total))
                self._rows_in_all = sum(len(rows) for rows in found if rows is not None)
        return None if self._rows_in_all is None else place / self._rows_in_all


class StreamedOrder:
    """The row at each place of the stream: each epoch is a permutation of the shards, and of the rows within each.

    In the first epoch shards change places within windows of 1, 2, 4 and from there on LARGEST_WINDOW, so that training
    begins with the first shard, and later ones have the time that it takes to make them.
    """

    def __init__(self, rows: StreamedRows, seed: int) -> None:
        self._rows, self._seed, self._lock = rows, seed, threading.Lock()
        self._ends, self._shards = [0], list[tuple[int, int]]()  # places; epoch and number of the shard that ends there
        self._coming, self._window, self._epoch = list[int](), range(0), 0
        self._order_within = lru_cache(OPEN)(self._shuffled)

    def __getitem__(self, place: int) -> int:
        if self._ends[-1] <= place:  # a known place is not waited for while another thread waits for a shard
            with self._lock:
                while self._ends[-1] <= place:
                    self._find_next()
        at = bisect_right(self._ends, place) - 1
        (epoch, number), first, end = self._shards[at], *self._ends[at : at + 2]
        return (number << ROW_BITS) + self._order_within(number)[epoch * (end - first) + place - first]

    def _find_next(self) -> None:
        """Finds out where the next shard ends, if it is there."""
        if not self._coming:
            self._coming = self._next_window()
        rows = self._rows.shard(self._coming[0])  # may raise: nothing is changed before it
        number = self._coming.pop(0)
        if rows is not None:
            self._shards.append((self._epoch, number))
            self._ends.append(self._ends[-1] + len(rows))

    def _next_window(self) -> list[int]:
        """Shards in their order. The last windows of the first epoch may have some beyond the end of the text."""
        shards = self._rows.total
        if shards is not None and self._window.stop >= shards:
            self._epoch, self._window = self._epoch + 1, range(shards)
        else:
            size = min(max(1, 2 * len(self._window)), LARGEST_WINDOW)
            self._window = range(self._window.stop, self._window.stop + size)
        random = np.random.default_rng([self._seed, self._epoch, self._window.start])
        return random.permutation(self._window).tolist()

    def _shuffled(self, number: int) -> Order:
        rows = self._rows.shard(number)
        assert rows is not None
        return rows.order(int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0]))


class _Lines:
    """Where the lines of a process go."""

    def __init__(self, report: Report) -> None:
        self.report = report


class Work:
    """The process that tokenizes a text. It ends with this one, or with this object."""

    def __init__(self, text: Streamed, data: DataConfig, report: Report) -> None:
        job = {
            "folder": str(text.folder),
            "config": to_dict(Config(data=data)),
            "tokenizer": text.tokenizer.to_json(),
            "said": text.tokenizer.said,
            "fingerprint": text.fingerprint,
            "shard_characters": shards_of.SHARD_CHARACTERS,
        }
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - _end closes it
        command, pipe = [sys.executable, "-P", "-m", "jaxlm.data.streaming"], subprocess.PIPE
        channels: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "stderr": self._errors, "text": True}
        # It looks for modules where this process does, and not in the current folder, as `python -m` would.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folder or os.getcwd() for folder in sys.path)}
        self._process = subprocess.Popen(command, env=environment, **channels)
        weakref.finalize(self, _end, self._process, self._errors)
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already: `fault` says why
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        self.lines = _Lines(report)
        threading.Thread(target=_pass_on, args=(self._process.stdout, self.lines), daemon=True).start()

    def fault(self) -> str | None:
        """Why a shard that is not there won't be; None: it is at work."""
        if (code := self._process.poll()) is None:
            return None
        if code == 0:
            return "it was removed"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return said[-1] if said else f"the process that tokenizes ended with {self._process.returncode}"


def ready_lines(folder: Path) -> list[str]:
    """What is reported of a text whose shards are all there."""
    about = json.loads((folder / NOTES).read_text())
    return [f"tokenized text: whole, shards: {about['shards']} ({folder})", *about["lines"]]


def _pass_on(stream: IO[str], lines: _Lines) -> None:
    with stream:
        for line in stream:
            lines.report(line.rstrip("\n"))


def _end(process: "subprocess.Popen[str]", errors: IO[bytes]) -> None:
    """Ends the process, between two shards or within one."""
    assert process.stdin is not None
    for closes in (process.stdin.close, process.wait, errors.close):
        with contextlib.suppress(BrokenPipeError):
            closes()


def main() -> None:
    """Does the job that the first line of stdin describes; lines of the report go to stdout."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # a run that is stopped may need it until it is saved
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    shards_of.SHARD_CHARACTERS, tokenizing.SECONDS = job["shard_characters"], PROGRESS
    data, folder = from_dict(job["config"], "the job").data, Path(job["folder"])
    tokenizer = Tokenizer.from_json(job["tokenizer"], said=job["said"])
    try:
        source = open_source(data, tokenizer=tokenizer)
        if source.fingerprint != job["fingerprint"]:
            raise UserError(f"{source.name}: the text changed while it was read; start again when it is complete")
        source = replace(source, parts={"train": source.parts["train"]})
        made = make_shards(folder, source, tokenizer, data, _say)
        about = notes(made, source, tokenizer, data)
        shards, number = made.parts["train"]
        for shard in range(number):
            packed(shards, shard, data)  # so that nobody waits for it later
        atomic_write(folder / NOTES, json.dumps(about | {"shards": number}))
    except (UserError, RunFailed, OSError) as error:
        sys.exit(str(error))
    for line in ready_lines(folder):
        _say(line)


def _say(line: str) -> None:
    print(line, flush=True)


def _end_with_stdin() -> None:
    """Whoever started this is gone, or wants it no more: shards are whole or absent, at any moment."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
