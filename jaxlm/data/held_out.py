"""The part of a text that is held out for validation. Each pass reads the text again: it is not kept in memory."""

import hashlib
import math
import re
from array import array
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import zip_longest

import numpy as np

from jaxlm.data.documents import Document, Documents
from jaxlm.errors import UserError

CHARACTERS_A_TOKEN = 32  # a document of so many for each token that it needs is taken to be long enough
LOOKED_AT = 4  # documents first, for each one to hold out


class HeldOut:
    """Splits documents into training and held-out text, the same way in every run and for every seed.

    Of n documents, round(n * fraction) are held out: those whose text has the smallest SHA-256, short ones passed over.
    If n * fraction is less than one, the end of the text is held out instead: `fraction` of its characters, from a line
    end or other white space near that point if there is one; but one document, where they are not to be cut.
    """

    def __init__(self, documents: Documents, fraction: float, where: str, may_cut: bool = True) -> None:
        """`documents` are not empty; `where` begins the message of the UserError for text too short to be split."""
        self._documents, self._fraction, self._where, self._may_cut = documents, fraction, where, may_cut

    def both(self) -> Iterator[Document]:
        """The documents of both parts, in one pass: of one that is cut in two, its beginning and its end."""
        for document, cut in self._with_cuts():
            if cut:
                yield document if cut == len(document.text) else document._replace(text=document.text[:cut])
            if cut < len(document.text):
                yield document._replace(text=document.text[cut:], part="validation")

    def of(self, part: str) -> Iterator[Document]:
        """The documents of "train" or "validation"."""
        return (document for document in self.both() if document.part == part)

    def pass_over_short(self, least: int, lengths: Callable[[Iterator[Document]], Iterator[int]]) -> bool:
        """Holds out documents of `least` tokens or more only, others in place of shorter ones; whether any changed.

        At most half of those that long are held out. Nothing changes if there are none, or one is cut in two.

        Args:
          lengths: the tokens of each document; called for those of fewer than CHARACTERS_A_TOKEN * `least` characters
            among the first in the order of their SHA-256, and for all of those only where most are too short.
        """
        (characters, order), before = self._measured, self._held_out
        doubtful = characters < CHARACTERS_A_TOKEN * least
        if not doubtful[before].any():
            return False
        short, looked_at = np.zeros(len(order), bool), 0
        for number in (min(LOOKED_AT * len(before), len(order)), len(order)):
            asked = np.zeros(len(order), bool)
            asked[order[looked_at:number]] = doubtful[order[looked_at:number]]
            if asked.any():
                chosen = zip(self._documents(), asked.tolist(), strict=False)
                tokens = [*lengths(document for document, ask in chosen if ask)]
                if len(tokens) != asked.sum():
                    raise self._changed()
                short[asked] = np.array(tokens) < least
            looked_at = number
            long = order[:number][~short[order[:number]]]
            if len(long) >= 2 * len(before):  # they are not half of the long ones, whatever the others are
                break
        if len(long):
            self._held_out = long[: min(len(before), max(1, len(long) // 2))]
        return not np.array_equal(before, self._held_out)

    def characters(self, part: str) -> int:
        """About how many "train" or "validation" has; exactly, where no document is cut in two."""
        train = int(self._cuts()[0].sum())
        return train if part == "train" else int(self._measured[0].sum()) - train

    def _changed(self) -> UserError:
        return UserError(f"{self._where}: the text changed while it was read; start again when it is complete")

    def _with_cuts(self) -> Iterator[tuple[Document, int]]:
        cuts, cut_document, reach = self._cuts()
        for i, (document, cut) in enumerate(zip_longest(self._documents(), cuts.tolist())):
            if document is None or cut is None or cut > len(document.text):
                raise self._changed()
            yield document, _break_near(document.text, cut, reach) if i == cut_document else cut

    @cached_property
    def _measured(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [documents] each: their characters; their numbers, in the order of their SHA-256."""
        hashes, sizes = array("Q"), array("q")
        for document in self._documents():
            hashes.append(int.from_bytes(hashlib.sha256(document.text.encode()).digest()[:8], "big"))
            sizes.append(len(document.text))
        return np.array(sizes, np.int64), np.argsort(np.array(hashes, np.uint64), kind="stable")

    @cached_property
    def _held_out(self) -> np.ndarray:
        """int64 [held out]: the numbers of the documents; none if the end of the text is held out."""
        share = len(self._measured[1]) * self._fraction
        return self._measured[1][: math.floor(share + 0.5) if share >= 1 else not self._may_cut]

    def _cuts(self) -> tuple[np.ndarray, int, int]:
        """int64 [documents]: how many characters of each are training text, the rest is held out; and the number of the
        document, -1 for none, in which that is a point near which to cut, not more than so many characters away.
        """
        lengths = self._measured[0]
        total, ends = int(lengths.sum()), np.cumsum(lengths)
        if len(self._held_out):
            held_out, cut_document, cuts = 0, -1, lengths.copy()
            cuts[self._held_out] = 0
        else:
            held_out = max(1, math.floor(total * self._fraction + 0.5))
            cut_document = int(np.searchsorted(ends, total - held_out, side="right"))
            cuts = np.clip(total - held_out - (ends - lengths), 0, lengths)
        if not 0 < int(cuts.sum()) < total:
            given = f"{len(cuts)} documents with {total} characters are too little"
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
