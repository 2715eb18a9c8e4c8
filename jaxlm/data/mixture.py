"""Several sources as one: which of them each row of the stream is of, exact in number and known for every place.

grain permutes the rows of each source, as it does those of a single text. Its own `mix` (0.2.18) cuts weights to whole
numbers, 0.7 and 0.3 to 233 and 100, lets one source of six be three rows off, and has one set of weights.
"""

import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.config.mixture import mixture_options
from jaxlm.data.loader import Batch, Rows
from jaxlm.data.tokens import Prepared, TokenDocuments


def texts(data: DataConfig) -> dict[str, DataConfig]:
    """Each source of data.sources as a text of its own; without any, the text itself, under ""."""
    files = mixture_options(data).files
    return {name: replace(data, train_files=named) for name, named in files.items()} or {"": data}


def held_out(data: DataConfig, prepared: Mapping[str, Prepared]) -> dict[str, TokenDocuments]:
    """What is evaluated, by source; under "" data.validation_files, which are the same for all."""
    found = {name: each.validation for name, each in prepared.items() if each.validation is not None}
    return {"": next(iter(found.values()))} if data.validation_files else found


class Turns:
    """Which source has which turn, in an order that repeats after sum(weights) turns.

    Of the sources that are behind their shares, it is the one whose next turn has to come first. After any number of
    turns each has had less than one more or less than its share. Source: Baruah, Cohen, Plaxton, Varvel 1996,
    Proportionate progress (pfairness; with one processor the earliest deadline is enough).

    Args:
      weights: of each source, whole numbers, not all 0.
    """

    def __init__(self, weights: list[int]) -> None:
        self.weights, self.period = np.array(weights), sum(weights)
        self.sources, self.numbers = np.zeros((2, self.period), np.int64)  # of a turn; how many its source had before
        counts = np.zeros(len(weights), np.int64)
        for turn in range(self.period):
            behind = np.flatnonzero(self.period * counts < self.weights * (turn + 1))
            source = behind[np.argmin((counts[behind] + 1) / self.weights[behind])]
            self.sources[turn], self.numbers[turn] = source, counts[source]
            counts[source] += 1

    def __getitem__(self, turn: int) -> tuple[int, int]:
        """The source whose turn it is, and how many it had before."""
        periods, turn = divmod(turn, self.period)
        source = int(self.sources[turn])
        return source, periods * int(self.weights[source]) + int(self.numbers[turn])

    def counts(self, turns: int) -> np.ndarray:
        """int64 [sources]: how many each has of the first `turns`."""
        periods, rest = divmod(turns, self.period)
        return periods * self.weights + np.bincount(self.sources[:rest], minlength=len(self.weights))


class Mixture:
    """The rows of several sources, numbered one source after the other: `len(rows)`, `rows[i]`.

    Args:
      parts: the rows of each source.
      weights: `MixtureOptions.weights`.
    """

    def __init__(self, parts: Mapping[str, Rows], weights: list[list[int]]) -> None:
        self.parts, self.turns = parts, [Turns(each) for each in weights]
        self.firsts = np.cumsum([0, *map(len, parts.values())]).tolist()

    def __len__(self) -> int:
        return self.firsts[-1]

    def __getitem__(self, index: int) -> Batch:
        _, rows, row = self.find(index)
        return rows[row]

    def find(self, index: int) -> tuple[str, Rows, int]:
        """The source of row `index`, its rows, and which of them it is."""
        source = bisect_right(self.firsts, index) - 1
        name, rows = [*self.parts.items()][source]
        return name, rows, index - self.firsts[source]

    def documents(self, index: int) -> np.ndarray:
        """As `Rows.documents`, numbered on from one source to the next."""
        name, rows, row = self.find(index)
        before = [len(part.document_offsets) - 1 for part in self.parts.values()][: [*self.parts].index(name)]
        return rows.documents(row) + sum(before)

    def epochs(self, place: int) -> float:
        """As `Rows.epochs`, over all sources' rows together."""
        return place / len(self)

    def order(self, seed: int, anneal_row: int | None = None) -> "MixedOrder":
        return MixedOrder(self, seed, sys.maxsize if anneal_row is None else anneal_row)

    def counts(self, place: int, anneal_row: int | None) -> list[int]:
        """The rows of each source before `place` of the stream; second weights hold from `anneal_row` on."""
        first = place if anneal_row is None else min(place, anneal_row)
        return (self.turns[0].counts(first) + self.turns[-1].counts(place - first)).tolist()

    def metrics(self, place: int, anneal_row: int | None) -> dict[str, float]:
        """Of the rows before `place`: `data/SOURCE/epoch`, how often the source was read, and `data/SOURCE/tokens`,
        the targets in as many of its rows: exact at the end of an epoch, within one by its mean row.
        """
        found = dict[str, float]()
        for (name, rows), count in zip(self.parts.items(), self.counts(place, anneal_row), strict=True):
            epochs = count / len(rows)
            found |= {f"data/{name}/epoch": epochs, f"data/{name}/tokens": round(epochs * rows.plan.pairs)}
        return found

    def describe(self, place: int, anneal_row: int | None, anneal_from: int | None) -> Iterator[str]:
        """A line about each source in a run that ends at `place`."""
        counts = self.counts(place, anneal_row)
        for source, (name, rows) in enumerate(self.parts.items()):
            share, later = (f"{turns.weights[source] / turns.period:.4g}" for turns in (self.turns[0], self.turns[-1]))
            then = f", {later} from update {anneal_from:,} on" if anneal_from is not None else ""
            size = f"{len(rows):,} rows, {counts[source] / len(rows):.2f} epochs"
            yield f"mixture: {name} {share} of the rows{then}; {size}"


class MixedOrder:
    """The row at each place of a mixture's stream: sources take turns, and the rows of each have their own order.

    From the place `anneal_row` on, the turns are those of the second weights, and each source goes on in its order.
    """

    def __init__(self, mixture: Mixture, seed: int, anneal_row: int) -> None:
        self.mixture, self.anneal_row = mixture, anneal_row
        self.orders = [part.order(seed) for part in mixture.parts.values()]
        self.taken = mixture.turns[0].counts(anneal_row).tolist()  # before annealing, by source

    def __getitem__(self, place: int) -> int:
        if place < self.anneal_row:
            source, number = self.mixture.turns[0][place]
        else:
            source, number = self.mixture.turns[-1][place - self.anneal_row]
            number += self.taken[source]
        return self.mixture.firsts[source] + self.orders[source][number]
