"""The packing plan, which part of which document goes into which row: made once for the whole data set, and cached.

A document of n tokens gives n - 1 pairs (input: token i, target: token i + 1), so <eos> is never an input, <bos> never
a target, and no target is lost where a document is cut. A piece is a run of pairs of one document; a row holds pieces
with max_length pairs at most, and a piece sees nothing outside itself.
"""

from array import array
from dataclasses import dataclass, fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data.tokenizing import Report
from jaxlm.data.tokens import TokenDocuments, made_once
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
    documents: int  # including the dropped ones
    dropped_documents: int  # those of fewer than min_length tokens
    dropped_tokens: int  # in those documents
    cut_documents: int  # those in more than one piece
    pairs: int  # in all rows

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def efficiency(self) -> float:
        """The fraction of the rows' places that hold a pair; the rest is padding."""
        return self.pairs / (len(self) * self.max_length)

    @property
    def longest(self) -> int:
        """Pairs of the longest piece: as many positions are seen."""
        return int(self.piece_length.max())


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
            f"data.min_length ({min_length}): no document has that many tokens (the longest of {len(tokens):,} has "
            f"{tokens.max(initial=0)}, what begins and ends it included); lower it, or name more text"
        )
    if pack and strategy == "concat":
        piece_start, piece_length, pieces_of, row_offsets = _concat(starts, pairs, max_length)
    else:
        piece_start, piece_length, pieces_of = _pieces(starts, pairs, max_length)
        if not pack:
            row_offsets = np.arange(len(piece_start) + 1)
        elif strategy == "greedy":
            row_offsets = _greedy(piece_length, max_length)
        else:
            from jaxlm.data import fitting

            fit = {"first_fit": fitting.first_fit, "best_fit": fitting.best_fit}[strategy]
            order, row_offsets = fitting.counting_sort(fit(piece_length, max_length))
            piece_start, piece_length = piece_start[order], piece_length[order]
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


def plan_cached(documents: TokenDocuments, data: DataConfig, report: Report) -> Plan:
    """`plan` for `documents`, kept beside them; reports its rows, and whether it was found there.

    Raises:
      UserError: no document is left, or the folder cannot be read or written.
    """

    def save(part: Path) -> None:
        with part.open("wb") as file:  # given a path, numpy would add an extension
            made = plan(documents.offsets, data.max_length, data.min_length, data.packing_strategy, data.pack_sequences)
            np.savez(file, **vars(made))

    kind = data.packing_strategy if data.pack_sequences else "unpacked"
    path = documents.folder / f"{documents.split}.plan-{FORMAT}-{kind}-{data.max_length}-{data.min_length}.npz"
    took = made_once(path, save)
    result = _load(path)
    report(
        f"{documents.split} rows: {len(result):,} of {data.max_length} tokens, {kind}, {result.efficiency:.1%} full; "
        f"{result.documents:,} document{'s' * (result.documents != 1)}, {result.cut_documents:,} cut, "
        f"{result.dropped_documents:,} dropped as too short ({took})"
    )
    return result


def _load(path: Path) -> Plan:
    try:
        with path.open("rb") as file, np.load(file) as stored:  # numpy leaves a file open that it cannot read
            values = {field.name: stored[field.name] for field in fields(Plan)}
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"cached plan ({path}) is damaged ({error}); delete it") from error
    return Plan(**{name: value if value.ndim else value.item() for name, value in values.items()})


def _pieces(starts: np.ndarray, pairs: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every document in pieces of max_length and a rest: start and length [pieces], number of pieces [documents]."""
    pieces_of = -(-pairs // max_length)
    first = np.cumsum(pieces_of) - pieces_of
    within = (np.arange(pieces_of.sum()) - np.repeat(first, pieces_of)) * max_length
    length = np.minimum(np.repeat(pairs, pieces_of) - within, max_length).astype(np.int32)
    return np.repeat(starts, pieces_of) + within, length, pieces_of


def _concat(starts: np.ndarray, pairs: np.ndarray, max_length: int) -> tuple[np.ndarray, ...]:
    """All pairs end to end, cut where a document or a row ends; as `_pieces`, and the offsets of the rows."""
    ends = np.cumsum(pairs)
    begins = ends - pairs
    rows = np.arange(0, ends[-1], max_length)
    both = np.sort(np.concatenate([begins, rows]), kind="stable")  # merges two sorted runs, in proportion to their size
    cuts = both[np.diff(both, prepend=-1) > 0]
    document = np.searchsorted(begins, cuts, side="right") - 1
    length = np.diff(cuts, append=ends[-1]).astype(np.int32)
    row_offsets = np.append(np.searchsorted(cuts, rows), len(cuts))
    return starts[document] + cuts - begins[document], length, np.bincount(document), row_offsets


def _greedy(length: np.ndarray, max_length: int) -> np.ndarray:
    """int64 [rows + 1]: the offsets of rows filled in order, each closed when the next piece does not fit."""
    ends = np.cumsum(length, dtype=np.int64)
    end_of_row_from = np.searchsorted(ends, ends - length + max_length, side="right")  # [pieces]
    offsets = array("q", [0])
    while offsets[-1] < len(length):
        offsets.append(end_of_row_from[offsets[-1]])
    return np.array(offsets)
