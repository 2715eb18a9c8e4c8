"""Which part of which document goes into which row: computed once for the whole data set, cached, then only indexed.

A document of n tokens gives n - 1 pairs (input: token i, target: token i + 1), so <eos> is never an input, <bos> never
a target, and no target is lost where a document is cut. A piece is a run of pairs of one document; a row holds pieces
with max_length pairs at most, and a piece sees nothing outside itself.
"""

import os
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from jaxlm.data.tokens import TokenDocuments
from jaxlm.errors import UserError

FORMAT = 1  # raise it when a strategy gives other rows


@dataclass(frozen=True)
class Plan:
    """The pieces of every row, and counts.

    Row r holds pieces row_offsets[r] to row_offsets[r + 1]; piece p has the inputs
    tokens[piece_start[p] : piece_start[p] + piece_length[p]], its targets are one further.
    """

    row_offsets: np.ndarray  # int64 [rows + 1]
    piece_start: np.ndarray  # int64 [pieces]
    piece_length: np.ndarray  # int32 [pieces], in pairs
    max_length: int  # capacity of a row, in pairs
    documents: int  # all there were
    dropped_documents: int  # of fewer than min_length tokens
    dropped_tokens: int  # in those
    cut_documents: int  # in more than one piece
    pairs: int  # in all rows

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def efficiency(self) -> float:
        """The share of the rows' places that hold a pair; the rest is padding."""
        return self.pairs / (len(self) * self.max_length)


def plan(doc_offsets: np.ndarray, max_length: int, min_length: int, strategy: str, pack: bool) -> Plan:
    """Puts documents into rows of `max_length` pairs.

    Args:
      doc_offsets: int64 [documents + 1]; document i has the tokens doc_offsets[i] to doc_offsets[i + 1].
      min_length: documents of fewer tokens are left out.
      strategy: "greedy": in order, a row is closed when the next piece does not fit; "first_fit": in order, each piece
        into the first row with room; "best_fit": longest first, each into the fullest row with room; "concat": laid end
        to end, cut wherever a row is full. The first three cut only documents longer than a row.
      pack: false puts every piece into a row of its own, whatever the strategy.

    Raises:
      UserError: no document is left.
    """
    tokens = np.diff(doc_offsets)
    kept = tokens >= max(min_length, 2)  # a single token makes no pair
    starts, pairs = doc_offsets[:-1][kept], tokens[kept] - 1
    if not len(pairs):
        raise UserError(
            f"data.min_length ({min_length}): none of the {len(tokens)} documents has that many tokens "
            f"(the longest has {tokens.max(initial=0)}); lower it"
        )
    if pack and strategy == "concat":
        piece_start, piece_length, row_offsets, pieces_of = _concat(starts, pairs, max_length)
    else:
        piece_start, piece_length, pieces_of = _pieces(starts, pairs, max_length)
        if pack:
            order, row_offsets = STRATEGIES[strategy](piece_length, max_length)
            if order is not None:
                piece_start, piece_length = piece_start[order], piece_length[order]
        else:
            row_offsets = np.arange(len(piece_start) + 1)
    return Plan(
        row_offsets,
        piece_start,
        piece_length,
        max_length,
        documents=len(tokens),
        dropped_documents=len(tokens) - len(pairs),
        dropped_tokens=int(tokens[~kept].sum()),
        cut_documents=int((pieces_of > 1).sum()),
        pairs=int(pairs.sum()),
    )


def plan_cached(
    documents: TokenDocuments,
    max_length: int,
    min_length: int,
    strategy: str,
    pack: bool,
    report: Callable[[str], None],
) -> Plan:
    """`plan` for `documents`, kept beside them; says whether it was found, and what the rows are like.

    Raises:
      UserError: no document is left, or the folder cannot be read or written.
    """
    kind = strategy if pack else "unpacked"
    path = documents.folder / f"{documents.split}.plan-{FORMAT}-{kind}-{max_length}-{min_length}.npz"
    start = time.perf_counter()
    found = path.is_file()
    if found:
        result = _load(path)
    else:
        result = plan(documents.offsets, max_length, min_length, strategy, pack)
        _save(result, path)
    report(
        f"{documents.split} rows: {len(result):,} of {max_length} tokens, {kind}, {result.efficiency:.1%} full; "
        f"{result.documents:,} documents, {result.cut_documents:,} cut, {result.dropped_documents:,} dropped "
        f"({'cached' if found else f'{time.perf_counter() - start:.1f} s'})"
    )
    return result


def _save(result: Plan, path: Path) -> None:
    """Writes the file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            np.savez(file, **{field.name: getattr(result, field.name) for field in fields(result)})
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(
            f"data.cache_dir ({path.parent}) cannot be written to: {error.strerror}; name another"
        ) from error


def _load(path: Path) -> Plan:
    try:
        with path.open("rb") as file, np.load(file) as stored:  # numpy leaves a file open that it cannot read
            values = {field.name: stored[field.name] for field in fields(Plan)}
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"cached plan ({path}) is damaged ({error}); delete it") from error
    plain: dict[str, Any] = {name: value if value.ndim else int(value) for name, value in values.items()}
    return Plan(**plain)


# ---- Documents to pieces ---------------------------------------------------------------------------------------------


def _pieces(starts: np.ndarray, pairs: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every document in pieces of max_length and a rest: start and length [pieces], pieces of each document."""
    pieces_of = -(-pairs // max_length)
    first = np.cumsum(pieces_of) - pieces_of
    within = (np.arange(pieces_of.sum()) - np.repeat(first, pieces_of)) * max_length
    length = np.minimum(np.repeat(pairs, pieces_of) - within, max_length).astype(np.int32)
    return np.repeat(starts, pieces_of) + within, length, pieces_of


def _concat(starts: np.ndarray, pairs: np.ndarray, max_length: int) -> tuple[np.ndarray, ...]:
    """All pairs end to end, cut where a document or a row ends; as `_pieces`, with the rows' offsets third."""
    ends = np.cumsum(pairs)
    begins = ends - pairs
    rows = np.arange(0, ends[-1], max_length)
    at = np.searchsorted(begins, rows)  # the first document that begins at or after each row's begin
    inside = begins[np.minimum(at, len(begins) - 1)] != rows  # the row begins within a document, which is cut there
    begins_document = np.ones(len(begins) + int(inside.sum()), np.bool_)
    begins_document[at[inside] + np.arange(inside.sum())] = False
    cuts = np.empty(len(begins_document), np.int64)  # both, merged
    cuts[begins_document], cuts[~begins_document] = begins, rows[inside]
    document = np.cumsum(begins_document) - 1
    length = np.diff(cuts, append=ends[-1]).astype(np.int32)
    row_offsets = np.append(at + np.cumsum(inside) - inside, len(cuts))
    return starts[document] + cuts - begins[document], length, row_offsets, np.bincount(document)


# ---- Pieces to rows: each strategy gives the order of the pieces (none: as they are) and the rows' offsets -----------

Packed = tuple[np.ndarray | None, np.ndarray]


def _greedy(length: np.ndarray, max_length: int, block: int = 2**20) -> Packed:
    """Next fit. Where a row that begins at piece i would end is found for a whole block of i at once."""
    ends = np.cumsum(length, dtype=np.int64)
    offsets, row = array("q"), 0
    for low in range(0, len(length), block):
        high = min(low + block, len(length))
        room_ends = ends[low:high] - length[low:high] + max_length
        following = np.searchsorted(ends, room_ends, side="right").tolist()
        while row < high:
            offsets.append(row)
            row = following[row - low]
    return None, np.array([*offsets, len(length)], np.int64)


def _first_fit(length: np.ndarray, max_length: int) -> Packed:
    # All rows but one are more than half full, or a later one would have gone into an earlier.
    most_rows = min(len(length), 2 * int(length.sum(dtype=np.int64)) // max_length + 1)
    return _sorted(_compiled()["first_fit"](length, max_length, most_rows))


def _best_fit(length: np.ndarray, max_length: int) -> Packed:
    longest_first, begins = _sorted(max_length - length)
    return _sorted(_compiled()["best_fit"](longest_first, begins, max_length))


def _sorted(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stable order of `key` [pieces], from 0 up, and where each value begins in it.

    Of the row of each piece it makes a plan: pieces of one row stay in the order of the text. `np.argsort` would not
    take a time in proportion.
    """
    begins = np.append(0, np.cumsum(np.bincount(key)))
    return _compiled()["counting_sort"](key, begins), begins


STRATEGIES: dict[str, Callable[[np.ndarray, int], Packed]] = {
    "greedy": _greedy,
    "first_fit": _first_fit,
    "best_fit": _best_fit,
}


@cache
def _compiled() -> dict[str, Any]:
    """The loops that NumPy has nothing for, in machine code. Compiled at first use, and only then imported."""
    import numba

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True)(function)
        except RuntimeError:  # no folder that numba could keep its result in: compile in every process
            return numba.njit(function)

    loops: dict[str, Callable[..., Any]] = {
        "first_fit": _first_fit_rows,
        "best_fit": _best_fit_rows,
        "counting_sort": _counting_sort,
    }
    return {name: compiled(loop) for name, loop in loops.items()}


def _first_fit_rows(length, max_length, most_rows):  # type: ignore[no-untyped-def]
    """int32 [pieces]: the row of each, by a tree whose nodes hold the most room of any row below them."""
    leaves = 1
    while leaves < most_rows:
        leaves *= 2
    room = np.full(2 * leaves, max_length, np.int32)
    row = np.empty(len(length), np.int32)
    for piece in range(len(length)):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length[piece]:
                node += 1
        row[piece] = node - leaves
        room[node] -= length[piece]
        while node > 1:
            node //= 2
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
    return row


def _best_fit_rows(longest_first, begins, max_length):  # type: ignore[no-untyped-def]
    """int32 [pieces]: the row of each; of equally full rows the one that was last added to.

    `newest[r]` is the newest row with room r, `older[row]` the next older one with as much; a tree of flags over r
    finds the smallest room that is enough.
    """
    leaves = 1
    while leaves <= max_length:
        leaves *= 2
    some = np.zeros(2 * leaves, np.bool_)
    newest = np.full(max_length + 1, -1, np.int32)
    older = np.full(len(longest_first), -1, np.int32)
    row = np.empty(len(longest_first), np.int32)
    rows = spare = 0
    for at, piece in enumerate(longest_first):
        while at == begins[spare + 1]:
            spare += 1
        length = max_length - spare  # `length[piece]` would be anywhere in memory
        node = leaves + length
        while node > 1 and not some[node]:  # up, to the right, until there is something
            while node > 1 and node % 2 == 1:
                node //= 2
            if node > 1:
                node += 1
        if node > 1:
            while node < leaves:
                node = 2 * node if some[2 * node] else 2 * node + 1
            room = node - leaves
            chosen = newest[room]
            newest[room] = older[chosen]
            if newest[room] < 0:
                some[node] = False
                while node > 1:
                    node //= 2
                    some[node] = some[2 * node] or some[2 * node + 1]
        else:
            room, chosen = max_length, rows
            rows += 1
        row[piece] = chosen
        room -= length
        older[chosen] = newest[room]
        newest[room] = chosen
        node = leaves + room
        while node > 0 and not some[node]:
            some[node] = True
            node //= 2
    return row


def _counting_sort(key, begins):  # type: ignore[no-untyped-def]
    """int64 [pieces]: the stable order of `key`, whose value v begins at `begins[v]` in it."""
    free = begins.copy()
    order = np.empty(len(key), np.int64)
    for piece in range(len(key)):
        order[free[key[piece]]] = piece
        free[key[piece]] += 1
    return order
