"""A document of text with its place; documents put together of pieces, or split; and the count of what is left out."""

import io
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jaxlm.config import DataConfig
from jaxlm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from jaxlm.data.chat import ChatTemplate

SHOWN = 3  # bad documents that are named, of those left out


class Document(NamedTuple):
    """A text, and its place: the file and the line or row in it.

    A reader may hand out a long text in pieces of whole lines, as documents of which all but the last have `more`.
    """

    text: str
    place: str
    learned: tuple[tuple[int, int], ...] | None = None  # [start, end) of its characters; none: all, and where it ends
    complete: bool = False  # whether its own text says where it begins and ends: nothing is put around it
    ids: "np.ndarray | None" = None  # of its tokens, as they stand; `text` is what they decode to
    part: str = "train"  # or "validation": of the text
    more: bool = False  # whether the next one goes on with its text


Documents = Callable[[], Iterator[Document]]  # each call starts a new pass over the text
Found = Iterator[Document | UserError]  # an error stands for a bad document, and says its place and what is wrong


class RowFormat(Protocol):
    """How the documents of rows are made.

    Attributes:
      kind: the value of data.format that asks for it.
      template: what makes text of messages; None: the rows hold none.
      fingerprint: of what the documents of equal rows may differ in, beside the template.
    """

    kind: str
    template: "ChatTemplate | None"
    fingerprint: str

    def columns(self, names: Collection[str], where: str) -> list[str]:
        """Those of a table's columns `names` that are needed; UserError if one is missing `where`."""
        ...

    def document(self, row: Mapping[str, Any], place: str) -> Document | UserError:
        """The document of a row, or what is wrong with it."""
        ...


class LeftOut:
    """Counts the documents that the latest pass over a text left out: empty ones, and bad ones where
    data.on_bad_document is skip.
    """

    def __init__(self, data: DataConfig) -> None:
        self._skip, self._separator = data.on_bad_document == "skip", data.document_separator
        self._most = data.max_documents
        self.empty, self.bad, self.first = 0, 0, list[str]()  # first: descriptions of the first bad ones
        self.parts = 0  # that documents were split into
        self._passed_over: dict[str, list[str]] = {}  # {reason: places of the first}
        self._reasons = Counter[str]()

    def good(self, read: Callable[[], Found], where: str, part: str = "train") -> Iterator[Document]:
        """A new pass over `read`, which becomes `part`, without what is left out, up to data.max_documents.

        Raises:
          UserError: nothing is left; `where` begins it.
        """
        self.empty, self.bad, self.first, self.parts = 0, 0, [], 0
        taken = 0
        for document in self._whole(read()):
            if isinstance(document, UserError):
                self.add(document)
            elif fault := encoding_fault(document.text, document.place):
                self.add(fault)
            elif document.text:
                taken += 1
                yield document if part == document.part else document._replace(part=part)
                if taken == self._most:
                    break
            else:
                self.empty += 1
        if not taken:
            raise UserError("; ".join([f"{where} holds no text", *self._bad_ones()]))

    def _whole(self, found: Found) -> Found:
        """The documents, of pieces that belong together one, but split at the separator."""
        for first in found:
            if isinstance(first, UserError):
                yield first
                continue
            pieces = _pieces(first, found)
            try:
                if self._separator is not None:
                    yield from self._split(first, pieces, self._separator)
                else:
                    yield first._replace(text="".join(pieces), more=False) if first.more else first
            except UserError as fault:
                yield fault

    def _split(self, document: Document, pieces: Iterator[str], separator: str) -> Iterator[Document]:
        texts = split_at(separator, (line for piece in pieces for line in io.StringIO(piece)))
        first, second = next(texts), next(texts, None)
        if second is None:
            yield document._replace(text=first, more=False)
            return
        number = 0
        for text in chain([first, second], texts):
            if text.strip():
                number += 1
                self.parts += 1
                yield Document(text, f"{document.place}, part {number}")

    def add(self, fault: UserError) -> None:
        """Counts a bad document; raises UserError unless it is skipped."""
        if not self._skip:
            raise UserError(f"{fault}; mend it, or set data.on_bad_document skip to leave out bad documents") from fault
        self.bad += 1
        if self.bad <= SHOWN:
            self.first.append(str(fault))

    def pass_over(self, document: Document, reason: str) -> None:
        """Counts a document that is left out though it is not bad."""
        self._reasons[reason] += 1
        if self._reasons[reason] <= SHOWN:
            self._passed_over.setdefault(reason, []).append(document.place)

    def counts(self) -> dict[str, Any]:
        """What was counted, as JSON can hold it; for `include`."""
        return {name: value for name, value in vars(self).items() if name not in ("_skip", "_separator", "_most")}

    def include(self, counts: Mapping[str, Any]) -> None:
        """Counts what another has counted of documents behind these."""
        for name in ("empty", "bad", "parts", "first"):
            setattr(self, name, getattr(self, name) + counts[name])
        self._reasons.update(counts["_reasons"])
        for reason, places in counts["_passed_over"].items():
            self._passed_over.setdefault(reason, []).extend(places)

    def lines(self, part: str) -> list[str]:
        """The lines of the report about what was left out of `part`."""
        empty = [f"{self.empty:,} empty document{'s' * (self.empty != 1)} left out"] if self.empty else []
        unused = self._separator is not None and not self.parts
        separator = [f"data.document_separator ({self._separator}) is not in it: nothing was split"] if unused else []
        passed_over = [
            f"{self._reasons[reason]:,} document(s) left out, {reason}: {_first(places, self._reasons[reason])}"
            for reason, places in self._passed_over.items()
        ]
        return [f"{part}: {line}" for line in empty + self._bad_ones() + passed_over + separator]

    def _bad_ones(self) -> list[str]:
        return [f"{self.bad:,} bad document(s) left out: {_first(self.first, self.bad)}"] if self.bad else []


def _pieces(first: Document, rest: Found) -> Iterator[str]:
    """The text of `first`, and of those in `rest` that go on with it; raises the UserError that may stand for one."""
    document: Document | UserError = first
    while not isinstance(document, UserError):
        yield document.text
        if not document.more:
            return
        document = next(rest)
    raise document


def split_at(separator: str, lines: Iterable[str]) -> Iterator[str]:
    """The texts between the lines that are `separator`, apart from blanks and tabs around it; an empty one is a line
    without anything. In angle or square brackets it separates within lines, too.

    Args:
      separator: without a line end.
      lines: of a text, each but the last with its line end; what they hold together is never in memory as a whole.
    """
    alone = re.compile(rf"[ \t]*{re.escape(separator)}[ \t]*(?:\r?\n)?")
    anywhere = separator[:1] + separator[-1:] in ("<>", "[]")
    text = list[str]()
    for line in lines:
        if separator not in line:
            text.append(line)
        elif alone.fullmatch(line):
            yield "".join(text)
            text = []
        elif anywhere:
            first, *between, last = line.split(separator)
            yield "".join([*text, first])
            yield from between
            text = [last]
        else:
            text.append(line)
    yield "".join(text)


def _first(named: list[str], count: int) -> str:
    """The first of `count` things, those that are named."""
    more = [f"and {count - SHOWN:,} more"] if count > SHOWN else []
    return "; ".join(named[:SHOWN] + more)


def encoding_fault(text: str, place: str) -> UserError | None:
    """The error for a text that cannot be written as UTF-8; None if it can."""
    if text.isascii():  # which Python knows without reading it
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how errors="surrogateescape" represents a byte that is not UTF-8
            *above, line = text[: error.start].split("\n")
            at = f"character {len(line) + 1}" + f" of its line {len(above) + 1}" * bool(above)
            return UserError(f"{place} is not UTF-8 (byte {code - 0xDC00:#x} at {at})")
        return UserError(f"{place}: {text[error.start]!r} is half a surrogate pair, not text")
    return None
