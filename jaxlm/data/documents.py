"""A document of text with its place, and what a pass over the text leaves out."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jaxlm.config import DataConfig, nearest
from jaxlm.errors import UserError

SHOWN = 3  # bad documents that are named, of those left out


class Document(NamedTuple):
    """A text, and where it is: the file and the line or row of it."""

    text: str
    place: str


class LeftOut:
    """The documents that the latest pass over a text left out: empty ones, and bad ones if they are to be skipped."""

    def __init__(self, data: DataConfig) -> None:
        self._skip = data.on_bad_document == "skip"
        self.begin()

    def begin(self) -> None:
        """A new pass begins."""
        self.empty, self.bad, self.first = 0, 0, list[str]()

    def add(self, what: str) -> None:
        """`what` says where a bad document is, and what is wrong with it. Raises UserError if that is to stop."""
        if not self._skip:
            raise UserError(f"{what}; mend it, or set data.on_bad_document skip to leave out bad documents")
        self.bad += 1
        if self.bad <= SHOWN:
            self.first.append(what)

    def lines(self, part: str) -> list[str]:
        """What was left out of `part`, in words."""
        lines = [f"{part}: {self.empty:,} empty document(s) left out"] if self.empty else []
        if self.bad:
            more = f"; and {self.bad - SHOWN:,} more" if self.bad > SHOWN else ""
            lines.append(f"{part}: {self.bad:,} bad document(s) left out: {'; '.join(self.first)}{more}")
        return lines


Documents = Callable[[], Iterator[Document]]


def not_empty(read: Documents, left_out: LeftOut) -> Iterator[Document]:
    """A pass over what `read` gives, without the empty documents."""
    left_out.begin()
    for document in read():
        if document.text:
            yield document
        else:
            left_out.empty += 1


def no_column(column: str, there: Iterable[str], where: str) -> str:
    """What to say where `column` is missing among the columns that are `there`."""
    names = list(there)
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"data.text_column ({column}): not in {where}{nearest(column, names)}; there is: {listed or 'nothing'}"


def not_text(value: Any, column: str, place: str) -> str | None:
    """What to say of a value that is no text; None: it is."""
    if not isinstance(value, str):
        return f"data.text_column ({column}): {place} holds {type(value).__name__}, not text"
    return bad_utf8(value, place)


def bad_utf8(text: str, place: str) -> str | None:
    """What to say of a text that cannot be written as UTF-8; None: it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # what errors="surrogateescape" makes of such bytes
            return f"{place} is not UTF-8 (byte {code - 0xDC00:#x} at character {error.start + 1})"
        return f"{place}: {text[error.start]!r} is half a surrogate pair, not text"
    return None
