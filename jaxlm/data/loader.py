"""Rows of tokens by index, and the batch of any step: a pure function of (data, seed, step), served by grain.

B rows of a micro-batch, K micro-batches, G rows of a global batch, T tokens of a row.
"""

import math
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

from jaxlm.config.batches import Batches
from jaxlm.config.validate import LARGEST_INT
from jaxlm.data.packing import Plan
from jaxlm.data.tokens import TokenDocuments
from jaxlm.errors import UserError

Batch = dict[str, np.ndarray]
THREADS, BATCHES_AHEAD = 2, 4  # threads that build batches ahead of the training loop, and how many


class Order(Protocol):
    """The row at each place of the stream, which has no end."""

    def __getitem__(self, place: int, /) -> int: ...


class AnyRows(Protocol):
    """Packed rows by index, of a text (`Rows`, `streaming.StreamedRows`) or of several (`mixture.Mixture`)."""

    @property
    def parts(self) -> "Mapping[str, Rows]":
        """Those of each source; of a single text, under ""."""

    def __getitem__(self, index: int, /) -> Batch: ...

    def order(self, seed: int, anneal_row: int | None = None) -> Order: ...

    def documents(self, index: int) -> np.ndarray: ...

    def epochs(self, place: int) -> float | None:
        """How many passes over all rows come before `place` of the stream; None: that is not known yet."""


class Rows:
    """The packed rows of a text, by index: `len(rows)`, `rows[i]`.

    `masked`: with a `loss_mask` where all is learned, too, as in other texts of the run not all is.
    """

    def __init__(self, documents: TokenDocuments, plan: Plan, masked: bool = False) -> None:
        self.tokens, self.document_offsets, self.plan = np.asarray(documents.tokens), documents.offsets, plan
        self.learned = None if documents.learned is None else np.asarray(documents.learned)
        if masked and self.learned is None:
            self.learned = np.broadcast_to(np.True_, self.tokens.shape)

    @property
    def parts(self) -> "dict[str, Rows]":
        return {"": self}

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Batch:
        """int32 [T] each: `tokens`; `targets`; `segments`, 1, 2, ... for its pieces; `positions`, from 0 in each piece.

        In padding all are 0; `segments` is 0 there only. `loss_mask`, bool [T], where not all is learned: the targets
        that are.
        """
        low, high = self.plan.row_offsets[index : index + 2]
        start, length = self.plan.piece_start[low:high], self.plan.piece_length[low:high]
        pairs = int(length.sum())
        segments_T, positions_T, tokens_T, targets_T = np.zeros((4, self.plan.max_length), np.int32)
        segments_T[:pairs] = np.repeat(np.arange(1, len(length) + 1), length)
        positions_T[:pairs] = np.arange(pairs) - np.repeat(np.cumsum(length) - length, length)
        source_T = positions_T[:pairs] + np.repeat(start, length)
        tokens_T[:pairs] = self.tokens[source_T]
        targets_T[:pairs] = self.tokens[source_T + 1]
        row = {"tokens": tokens_T, "targets": targets_T, "segments": segments_T, "positions": positions_T}
        if self.learned is not None:
            row["loss_mask"] = np.zeros(self.plan.max_length, bool)
            row["loss_mask"][:pairs] = self.learned[source_T + 1]
        return row

    def order(self, seed: int, anneal_row: int | None = None) -> Order:
        """Epochs laid end to end, each another permutation of the rows; `anneal_row` is for mixtures."""
        import grain

        # grain takes seed + epoch for each epoch: unrelated first seeds, or epoch 1 of seed 0 were epoch 0 of seed 1.
        first_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        return grain.MapDataset.range(len(self)).shuffle(seed=first_seed).repeat()

    def epochs(self, place: int) -> float:
        """How many passes over the rows come before `place` of the stream."""
        return place / len(self)

    def find(self, index: int) -> "tuple[str, Rows, int]":
        """The source of row `index`, which has no name, its rows, and which of them it is."""
        return "", self, index

    def documents(self, index: int) -> np.ndarray:
        """int64 [pieces]: the document of each piece in row `index`, numbered from 0 in the order of the text."""
        low, high = self.plan.row_offsets[index : index + 2]
        return np.searchsorted(self.document_offsets, self.plan.piece_start[low:high], side="right") - 1


def documents_of_step(
    rows: AnyRows, seed: int, batches: Batches, step: int, anneal_row: int | None = None
) -> list[int]:
    """The documents that update `step` (from 0) learns from, numbered as by `rows.documents`."""
    order = rows.order(seed, anneal_row)
    found = [rows.documents(order[place]) for place in range(batches.position(step), batches.position(step + 1))]
    return np.unique(np.concatenate(found)).tolist()


def train_batches(
    rows: AnyRows,
    seed: int,
    batches: Batches,
    start_step: int,
    own: slice = slice(None),
    anneal_row: int | None = None,
) -> Generator[Batch]:
    """The batches of updates start_step, start_step + 1, ... without end.

    The stream is the rows in their `order`; batch s is its rows from `batches.position(s)` on. `close()` of the
    iterator ends its threads.

    Args:
      seed: of the permutations.
      batches: B and K of each update.
      start_step: updates already done.
      own: which of the B rows of each micro-batch this process feeds.
      anneal_row: place of the stream from which on a mixture has its second weights.

    Yields:
      [K, B, T]: the arrays of `Rows`, B now as many as `own` selects; and
      int32 [K, B]: `rows`, each row's number in the global batch, which does not depend on K or `own`.
    """
    import grain

    order = rows.order(seed, anneal_row)

    def batch_of(step: int) -> Batch:
        first, shape_KB = batches.position(step), (batches.micro_batches(step), batches.rows)
        numbers_KB = np.arange(math.prod(shape_KB), dtype=np.int32).reshape(shape_KB)[:, own]
        batch = _stacked([rows[order[first + number]] for number in numbers_KB.ravel().tolist()])
        arrays = {name: array.reshape(numbers_KB.shape + array.shape[1:]) for name, array in batch.items()}
        return arrays | {"rows": np.ascontiguousarray(numbers_KB)}

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(batch_of)
    iterator = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=BATCHES_AHEAD)))
    try:
        yield from iterator
    finally:
        iterator.close()


def eval_batches(rows: Rows, batch: int, own: slice = slice(None)) -> Iterator[Batch]:
    """Every row once, in order: the arrays of `Rows` as [B, T], the last batch filled up with rows of padding.

    Args:
      batch: rows of a batch, of all processes.
      own: which of them this process feeds.
    """
    padding = {name: np.zeros_like(array) for name, array in rows[0].items()}
    for low in range(0, len(rows), batch):
        numbers = range(low, low + batch)[own]
        yield _stacked([rows[i] if i < len(rows) else padding for i in numbers])


def total_steps(num_epochs: float, rows: int, batches: Batches, max_steps: int | None) -> int:
    """Updates of a run: max_steps, else those for num_epochs passes, rounded up, and at least 1.

    Raises:
      UserError: they are more than an int32 can count.
    """
    if max_steps is not None:
        return max_steps
    # The decimal number that was written: in binary, 2.2 epochs of 25 rows are a little more than 55 rows.
    steps = max(1, batches.updates_for(Fraction(str(num_epochs)) * rows, LARGEST_INT))
    if steps > LARGEST_INT:
        raise UserError(f"training.num_epochs ({num_epochs}) is more than {LARGEST_INT} updates; lower it")
    return steps


def _stacked(rows: Sequence[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
