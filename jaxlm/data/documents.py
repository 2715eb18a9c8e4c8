"""A document of text with its place, and the count of documents that a pass over the text leaves out."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from jaxlm.config import DataConfig, nearest
from jaxlm.errors import UserError

SHOWN = 3  # bad documents that are named, of those left out


class Document(NamedTuple):
    """A text, and its place: the file and the line or row in it."""

    text: str
    place: str


Documents = Callable[[], Iterator[Document]]  # each call starts a new pass over the text


class LeftOut:
    """Counts the documents that the latest pass over a text left out: empty ones, and bad ones where
    data.on_bad_document is skip.
    """

    def __init__(self, data: DataConfig) -> None:
        self._skip = data.on_bad_document == "skip"
        self.empty, self.bad, self.first = 0, 0, list[str]()  # first: descriptions of the first bad ones

    def non_empty(self, read: Documents) -> Iterator[Document]:
        """A new pass over the documents of `read`, without the empty ones, which are counted."""
        self.empty, self.bad, self.first = 0, 0, []
        for document in read():
            if document.text:
                yield document
            else:
                self.empty += 1

    def add(self, fault: str) -> None:
        """Counts a bad document, of which `fault` says the place and what is wrong; UserError unless it is skipped."""
        if not self._skip:
            raise UserError(f"{fault}; mend it, or set data.on_bad_document skip to leave out bad documents")
        self.bad += 1
        if self.bad <= SHOWN:
            self.first.append(fault)

    def checked(self, value: object, column: str, place: str) -> Iterator[Document]:
        """The document of a table's cell; nothing if its value is no text, which is counted."""
        if not isinstance(value, str):
            self.add(f"data.text_column ({column}): {place} holds {type(value).__name__}, not text")
        elif fault := encoding_fault(value, place):
            self.add(fault)
        else:
            yield Document(value, place)

    def lines(self, part: str) -> list[str]:
        """The lines of the report about what was left out of `part`."""
        lines = [f"{part}: {self.empty:,} empty document(s) left out"] if self.empty else []
        if self.bad:
            more = f"; and {self.bad - SHOWN:,} more" if self.bad > SHOWN else ""
            lines.append(f"{part}: {self.bad:,} bad document(s) left out: {'; '.join(self.first)}{more}")
        return lines


def missing_column(column: str, columns: Iterable[str], where: str) -> str:
    """The message for a data.text_column that is not one of `columns`."""
    names = list(columns)
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"data.text_column ({column}): not in {where}{nearest(column, names)}; there is: {listed or 'nothing'}"


def encoding_fault(text: str, place: str) -> str | None:
    """The message for a text that cannot be written as UTF-8; None if it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how errors="surrogateescape" represents a byte that is not UTF-8
            return f"{place} is not UTF-8 (byte {code - 0xDC00:#x} at character {error.start + 1})"
        return f"{place}: {text[error.start]!r} is half a surrogate pair, not text"
    return None
