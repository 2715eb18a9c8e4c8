"""Token arrays while they are made, a shard at a time: a start that was killed goes on behind the last whole one.

    <folder>/<split>.tokens, .learned   as in tokens.py, growing
    <folder>/<split>.documents          int64 [documents, 2]: where in the tokens each ends, and its bytes to learn
    <folder>/<split>.shards             `Counts` as a line of JSON for each shard, once all of it is on the disk

A shard is SHARD_CHARACTERS of documents in a row, or the last of them: the text alone decides, not the machine. What
stands in the files behind the last whole line is cut off.
"""

import json
import os
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxlm.data.atomic import sync
from jaxlm.data.documents import Document
from jaxlm.data.encoding import Encoded
from jaxlm.errors import UserError

SHARD_CHARACTERS = 2**25  # some seconds of work for two cores, and no rush of writes for a hundred


@dataclass
class Counts:
    """What has become of the documents of a part so far."""

    read: int = 0  # documents, also those that were left out
    characters: int = 0  # of those
    documents: int = 0  # written
    tokens: int = 0
    learned: int = 0  # of the tokens, where not all are
    left_out: dict[str, Any] = field(default_factory=dict)  # LeftOut.counts
    markers: Counter[str] = field(default_factory=Counter)  # special tokens in the texts


class Shards:
    """Writes the arrays of one part. A context, in which they are open.

    `counts` are those of the last whole shard at first; UserError if there is less in the files than they say.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype) -> None:
        self._folder, self._split, self.counts = folder, split, Counts()
        self._sizes = {"tokens": dtype.itemsize, "learned": 1}  # bytes a token
        self._opened, self._files = ExitStack(), dict[str, IO[bytes]]()  # by kind

    def __enter__(self) -> "Shards":
        with ExitStack() as opened:
            self._go_on(opened)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _go_on(self, opened: ExitStack) -> None:
        """Opens the files, with what is whole in them."""
        self._opened = opened
        self._log, whole = opened.enter_context(self._path("shards").open("a+b")), 0
        self._log.seek(0)
        for line in self._log:
            if not line.endswith(b"\n"):
                break
            self.counts, whole = Counts(**json.loads(line)), whole + len(line)
        self.counts.markers = Counter(self.counts.markers)
        self._log.truncate(whole)
        for kind in ("tokens", "documents", "learned"):
            if kind != "learned" or self._path(kind).exists():
                self._open(kind)

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._split}.{kind}"

    def _open(self, kind: str) -> IO[bytes]:
        """A file, cut off behind what is whole."""
        counts = self.counts
        size = 16 * counts.documents if kind == "documents" else self._sizes[kind] * counts.tokens
        file = self._files[kind] = self._opened.enter_context(self._path(kind).open("ab"))
        if file.tell() < size:
            raise UserError(f"tokens of an earlier start ({file.name}) are damaged, and are now removed; start again")
        file.truncate(size)
        return file

    def add(self, found: Encoded, document_bytes: int) -> None:
        """Writes a document's tokens, which have `document_bytes` of text to learn."""
        self._files["tokens"].write(found.ids.data)
        if found.learned is not None:
            (self._files.get("learned") or self._open("learned")).write(found.learned.data)
            self.counts.learned += int(np.count_nonzero(found.learned))
        self.counts.documents += 1
        self.counts.tokens += len(found.ids)
        self._files["documents"].write(np.array([self.counts.tokens, document_bytes], np.int64).data)

    def passed(self, document: Document) -> bool:
        """Counts a document that has been read, and added or left out; whether a shard ends with it."""
        before = self.counts.characters // SHARD_CHARACTERS
        self.counts.read += 1
        self.counts.characters += len(document.text)
        return self.counts.characters // SHARD_CHARACTERS > before

    def keep(self) -> None:
        """Ends a shard: all that was added stays, whatever happens from here on."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._log.write(json.dumps(vars(self.counts)).encode() + b"\n")
        self._log.flush()
        os.fsync(self._log.fileno())
        sync(self._folder)

    def finish(self) -> None:
        """Ends the last shard, and writes offsets and bytes as tokens.py describes them."""
        self.keep()
        ends, document_bytes = np.fromfile(self._path("documents"), np.int64).reshape(-1, 2).T
        np.save(self._path("offsets.npy"), np.append(0, ends))
        np.save(self._path("bytes.npy"), document_bytes)

    def clear(self) -> None:
        """Removes what is needed only to go on."""
        self._path("shards").unlink(missing_ok=True)
        self._path("documents").unlink(missing_ok=True)
