"""The part of a text that is held out for validation. Each pass reads the text again: it is not kept in memory."""

import hashlib
import math
import re
from array import array
from collections.abc import Iterator
from functools import cached_property
from itertools import zip_longest

import numpy as np

from jaxlm.data.documents import Document, Documents
from jaxlm.errors import UserError


class HeldOut:
    """Splits documents into training and held-out text, the same way in every run and for every seed.

    Of n documents, round(n * fraction) are held out: those whose text has the smallest SHA-256. If n * fraction is less
    than one, the end of the text is held out instead: `fraction` of its characters, from a line end or other white
    space near that point if there is one.
    """

    def __init__(self, documents: Documents, fraction: float, where: str) -> None:
        """`documents` are not empty; `where` begins the message of the UserError for text too short to be split."""
        self._documents, self._fraction, self._where = documents, fraction, where

    def train(self) -> Iterator[Document]:
        return (Document(text[:cut], place) for text, place, cut in self._with_cuts() if cut)

    def validation(self) -> Iterator[Document]:
        return (Document(text[cut:], place) for text, place, cut in self._with_cuts() if cut < len(text))

    def _with_cuts(self) -> Iterator[tuple[str, str, int]]:
        cuts, cut_document, reach = self._cuts
        for i, (document, cut) in enumerate(zip_longest(self._documents(), cuts.tolist())):
            if document is None or cut is None or cut > len(document.text):
                raise UserError(f"{self._where}: the text changed while it was read; start again when it is complete")
            yield *document, _break_near(document.text, cut, reach) if i == cut_document else cut

    @cached_property
    def _cuts(self) -> tuple[np.ndarray, int, int]:
        """int64 [documents]: how many characters of each are training text, the rest is held out; and the number of the
        document, -1 for none, in which that is a point near which to cut, not more than so many characters away.
        """
        hashes, sizes = array("Q"), array("q")
        for text, _ in self._documents():
            hashes.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
            sizes.append(len(text))
        lengths = np.array(sizes, np.int64)
        total = int(lengths.sum())
        if len(lengths) * self._fraction >= 1:
            held_out = math.floor(len(lengths) * self._fraction + 0.5)
            cut_document, cuts = -1, lengths.copy()
            cuts[np.argsort(np.array(hashes, np.uint64), kind="stable")[:held_out]] = 0
        else:
            held_out, ends = max(1, math.floor(total * self._fraction + 0.5)), np.cumsum(lengths)
            cut_document = int(np.searchsorted(ends, total - held_out, side="right"))
            cuts = np.clip(total - held_out - (ends - lengths), 0, lengths)
        if not 0 < int(cuts.sum()) < total:
            given = f"{len(lengths)} documents with {total} characters are too little"
            fraction = f"to hold out data.validation_fraction ({self._fraction}) of them"
            raise UserError(f"{self._where}: {given} {fraction}; give more text")
        return cuts, cut_document, held_out // 2


def _break_near(text: str, point: int, reach: int) -> int:
    """The place nearest to `point` just after a line end, else after other white space, else `point` itself."""
    low, high = max(point - min(reach, 1000), 0), min(point + min(reach, 1000), len(text))
    for pattern in (r"\n", r"\s"):
        places = [low + match.end() for match in re.finditer(pattern, text[low:high])]
        if inside := [place for place in places if 0 < place < len(text)]:
            return min(inside, key=lambda place: abs(place - point))
    return point
