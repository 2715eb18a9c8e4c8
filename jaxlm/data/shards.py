"""The tokens of a text while they are made, in shards: each is whole or absent, and no two processes make the same one.

    <folder>/<split>-<number>.*       as in tokens.py, of the documents of a shard
    <folder>/<split>-<number>.json    its `Counts`, written last: the shard is whole

A shard is documents in a row, as few as have SHARD_CHARACTERS, or the last of them: the text alone decides, not the
machine. What a killed start has left of a shard that is not whole is written over.
"""

import json
import os
import re
import shutil
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout

from jaxlm.config import DataConfig
from jaxlm.data.atomic import atomic_write, sync
from jaxlm.data.documents import Document, LeftOut
from jaxlm.data.encoding import Encoded
from jaxlm.errors import UserError

SHARD_CHARACTERS = 2**25  # some seconds of work for two cores, and no rush of writes for a hundred


@dataclass
class Counts:
    """What has become of the documents of a shard, or of some."""

    read: int = 0  # documents, also those that were left out
    characters: int = 0  # of those
    documents: int = 0  # written
    tokens: int = 0
    learned: int = 0  # of the tokens, where not all are
    left_out: dict[str, Any] = field(default_factory=dict)  # LeftOut.counts
    markers: Counter[str] = field(default_factory=Counter)  # special tokens in the texts

    def ends(self, document: Document) -> bool:
        """Counts a document that was read; whether the shard ends with it."""
        self.read += 1
        self.characters += len(document.text)
        return self.characters >= SHARD_CHARACTERS


class Shard:
    """Writes a shard. A context, in which its files are open."""

    def __init__(self, folder: Path, name: str, data: DataConfig) -> None:
        self._folder, self._name, self.counts, self.left_out = folder, name, Counts(), LeftOut(data)
        self._ends, self._bytes = array("q", [0]), array("q")
        self._opened, self._files = ExitStack(), dict[str, IO[bytes]]()  # by kind

    def __enter__(self) -> "Shard":
        for file in self._folder.glob(f"{self._name}.*"):  # of a start that was killed
            file.unlink()
        self._open("tokens")
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _open(self, kind: str) -> IO[bytes]:
        self._files[kind] = file = self._opened.enter_context((self._folder / f"{self._name}.{kind}").open("wb", 2**20))
        return file

    def add(self, found: Encoded, document_bytes: int) -> None:
        """Writes a document's tokens, which have `document_bytes` of text to learn."""
        self._files["tokens"].write(found.ids.data)
        if found.learned is not None:
            (self._files.get("learned") or self._open("learned")).write(found.learned.data)
            self.counts.learned += int(np.count_nonzero(found.learned))
        self.counts.documents += 1
        self.counts.tokens += len(found.ids)
        self._ends.append(self.counts.tokens)
        self._bytes.append(document_bytes)

    def keep(self) -> None:
        """Makes it whole: it stays, whatever happens from here on."""
        self.counts.left_out = self.left_out.counts()
        for kind, values in (("offsets.npy", self._ends), ("bytes.npy", self._bytes)):
            np.save(self._open(kind), np.array(values, np.int64))
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sync(self._folder)
        atomic_write(self._folder / f"{self._name}.json", json.dumps(vars(self.counts)))


class Shards:
    """The shards of a part of a text, in a folder that several processes may write into."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype

    def name(self, number: int) -> str:
        return f"{self.split}-{number:05}"

    def path(self, number: int, kind: str) -> Path:
        return self.folder / f"{self.name(number)}.{kind}"

    def is_whole(self, number: int) -> bool:
        return self.path(number, "json").exists()

    def counts(self, number: int) -> Counts:
        """Of a shard that is whole."""
        counts = Counts(**json.loads(self.path(number, "json").read_text()))
        counts.markers = Counter(counts.markers)
        return counts

    def whole_at_first(self) -> tuple[int, Counts]:
        """How many shards are whole before the first that is not, and what has been read for them."""
        total, number = Counts(), 0
        while self.is_whole(number):
            counts, number = self.counts(number), number + 1
            total.read, total.characters = total.read + counts.read, total.characters + counts.characters
        return number, total

    @contextmanager
    def claimed(self, number: int, blocking: bool = False) -> Iterator[bool]:
        """Whether this process is the one to make a shard, which no other does as long as the context lasts.

        `blocking`: it waits for another process that is making it.

        Raises:
          FileNotFoundError: the folder is there no more.
        """
        here = os.stat(self.folder / ".").st_ino
        lock = FileLock(self.folder / f".{self.name(number)}.lock")
        if self.is_whole(number):
            yield False
            return
        try:
            lock.acquire(blocking=blocking)
        except Timeout:
            yield False
            return
        try:
            if os.stat(self.folder / ".").st_ino == here:
                yield not self.is_whole(number)
                return
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)  # filelock lets one that waits for a deleted file begin again
            lock.release()
        with suppress(OSError):  # another process has renamed it meanwhile, and filelock has made it again
            self.folder.rmdir()
        raise FileNotFoundError(self.folder)

    def join(self, number: int) -> None:
        """Puts the first `number` shards, all of which are whole, end to end: the files that tokens.py describes.

        The tokens of a shard are removed once they are there, so that the disk need not hold them twice.

        Raises:
          UserError: a shard has other tokens than it had.
        """
        parts = [self.counts(i) for i in range(number)]
        for kind, item in (("tokens", self.dtype.itemsize), ("learned", 1)):
            if kind == "tokens" or any(part.learned for part in parts):
                self._append(kind, [part.tokens * item for part in parts])
        sizes = [np.load(self.path(i, "bytes.npy")) for i in range(number)]
        before = np.cumsum([0, *(part.tokens for part in parts)])
        ends = [np.load(self.path(i, "offsets.npy"))[1:] + before[i] for i in range(number)]
        np.save(self.folder / f"{self.split}.offsets.npy", np.concatenate([[0], *ends]))
        np.save(self.folder / f"{self.split}.bytes.npy", np.concatenate(sizes))

    def _append(self, kind: str, sizes: list[int]) -> None:
        """Moves the files of a kind, in bytes of `sizes`, into one; those that are there no more are in it already.

        Raises:
          UserError: they are not, or one has another size.
        """
        whole = self.folder / f"{self.split}.{kind}"
        whole.touch()
        with whole.open("r+b") as target:
            there = whole.stat().st_size
            for number, size in enumerate(sizes):
                path, at = self.path(number, kind), sum(sizes[:number])
                added = not path.exists() and (there >= at + size or not size)
                if added:
                    continue
                if not path.exists() or path.stat().st_size != size:
                    damaged = f"tokens of an earlier start ({path}) are damaged, and are now removed"
                    raise UserError(f"{damaged}; start again")
                target.truncate(at)
                target.seek(at)
                with path.open("rb") as source:
                    shutil.copyfileobj(source, target, 2**20)
                target.flush()
                os.fsync(target.fileno())
                path.unlink()


def clear(folder: Path) -> None:
    """Removes what is of shards alone, where all of them are joined."""
    for path in folder.iterdir():
        if re.fullmatch(r"\.?(train|validation)-\d{5,}\..*", path.name):
            path.unlink(missing_ok=True)


class Pass:
    """A pass over the documents of a part, in which this process makes the shards that nobody else makes.

    Each document is asked about once, first by `is_done`, then by `takes` unless it is; `ended` is to be called later
    with those that it takes, in the same order.

    Attributes:
      done: what the shards at the beginning hold that were whole before.
      number: of shards, when all documents have been asked about.
    """

    def __init__(self, shards: Shards, data: DataConfig, opened: ExitStack) -> None:
        """`opened` closes what is not `ended`."""
        self.number, self.done = shards.whole_at_first()
        self._shards, self._data, self._opened = shards, data, opened
        self._left, self._counts, self._own = self.done.read, Counts(), False
        self._claimed = deque[tuple[Shard, ExitStack]]()

    def is_done(self) -> bool:
        """Whether the next document is of a shard that was whole."""
        self._left -= 1
        return self._left >= 0

    def takes(self, document: Document) -> bool:
        """Whether the next document is of a shard that this process makes."""
        if not self._counts.read:
            self._own = self._claim()
            self.number += 1
        if self._counts.ends(document):
            self._counts = Counts()
        return self._own

    def _claim(self) -> bool:
        """Whether the shard that the next document begins is this process's."""
        with ExitStack() as stack:
            if own := stack.enter_context(self._shards.claimed(self.number)):
                shard = stack.enter_context(Shard(self._shards.folder, self._shards.name(self.number), self._data))
                self._claimed.append((shard, self._opened.enter_context(stack.pop_all())))
        return own

    @property
    def shard(self) -> Shard:
        """That of the first document that has not `ended`."""
        return self._claimed[0][0]

    def ended(self, document: Document) -> None:
        """Keeps the shard if it ends with `document`."""
        if self.shard.counts.ends(document):
            self._keep()

    def close(self) -> None:
        """Keeps the last shard, which ends with the text."""
        if self._claimed:
            self._keep()

    def _keep(self) -> None:
        shard, held = self._claimed.popleft()
        shard.keep()
        held.close()
