"""Every pair of every document is in exactly one row, rows are what their strategy says, and millions are quick."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import DataConfig
from jaxlm.data import packing
from jaxlm.data.packing import Plan, plan, plan_cached
from jaxlm.data.tokens import TokenDocuments
from jaxlm.errors import UserError

STRATEGIES = ("greedy", "first_fit", "best_fit", "concat")
TOKENS = st.lists(st.integers(2, 40), min_size=1, max_size=60)


def offsets(tokens: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])


def rows_of(result: Plan) -> list[list[tuple[int, int]]]:
    """For each row its pieces as (start, length)."""
    pieces = list(zip(result.piece_start.tolist(), result.piece_length.tolist(), strict=True))
    return [pieces[low:high] for low, high in zip(result.row_offsets, result.row_offsets[1:], strict=False)]


def lengths(result: Plan) -> list[list[int]]:
    return [[length for _, length in row] for row in rows_of(result)]


def pieces_of(tokens: list[int], max_length: int) -> list[int]:
    """The lengths of the pieces of all documents, in order."""
    return [min(max_length, n - 1 - start) for n in tokens for start in range(0, n - 1, max_length)]


def place(sizes: list[int], max_length: int, choose) -> list[list[int]]:
    """Puts each of `sizes` into the row that `choose(rooms, size)` names, or a new one: quadratic and plain."""
    rows: list[list[int]] = []
    for size in sizes:
        row = choose([max_length - sum(row) for row in rows], size)
        if row is None:
            rows.append([size])
        else:
            rows[row].append(size)
    return rows


def next_fit(rooms: list[int], size: int) -> int | None:
    return len(rooms) - 1 if rooms and rooms[-1] >= size else None


def first_fit(rooms: list[int], size: int) -> int | None:
    return next((row for row, room in enumerate(rooms) if room >= size), None)


def best_fit(rooms: list[int], size: int) -> int | None:
    return min((row for row, room in enumerate(rooms) if room >= size), key=lambda row: rooms[row], default=None)


@settings(deadline=None, max_examples=200)
@given(TOKENS, st.integers(2, 50), st.integers(0, 30), st.sampled_from(STRATEGIES), st.booleans())
def test_every_pair_is_in_one_row(
    tokens: list[int], max_length: int, min_length: int, strategy: str, pack: bool
) -> None:
    begins = offsets(tokens)
    kept = [(int(begin), n) for begin, n in zip(begins, tokens, strict=False) if n >= min_length]
    if not kept:
        with pytest.raises(UserError, match=r"^data\.min_length"):
            plan(begins, max_length, min_length, strategy, pack)
        return
    result = plan(begins, max_length, min_length, strategy, pack)
    rows = rows_of(result)
    inputs = [start + i for row in rows for start, length in row for i in range(length)]
    assert sorted(inputs) == [begin + i for begin, n in kept for i in range(n - 1)], (
        "a pair is lost, doubled or foreign"
    )
    document = np.searchsorted(begins, result.piece_start, side="right")
    last_target = np.searchsorted(begins, result.piece_start + result.piece_length, side="right")
    assert (document == last_target).all(), "a piece crosses into the next document"
    assert all(0 < sum(length for _, length in row) <= max_length for row in rows)
    assert all(row == sorted(row) for row in rows), "pieces of a row are not in the order of the text"
    assert pack or all(len(row) == 1 for row in rows)
    assert (result.row_offsets.dtype, result.piece_start.dtype, result.piece_length.dtype) == (
        np.int64,
        np.int64,
        np.int32,
    )
    assert result.documents == len(tokens)
    assert result.dropped_documents == len(tokens) - len(kept)
    assert result.dropped_tokens == sum(tokens) - sum(n for _, n in kept)
    assert result.cut_documents == int((np.unique_counts(document).counts > 1).sum())
    assert result.pairs == len(inputs)
    assert result.efficiency == len(inputs) / (len(rows) * max_length)


@settings(deadline=None, max_examples=150)
@given(TOKENS, st.integers(2, 50))
def test_greedy_is_next_fit(tokens: list[int], max_length: int) -> None:
    expected = place(pieces_of(tokens, max_length), max_length, next_fit)
    assert lengths(plan(offsets(tokens), max_length, 0, "greedy", True)) == expected


@settings(deadline=None, max_examples=150)
@given(TOKENS, st.integers(2, 50))
def test_first_fit_is_first_fit(tokens: list[int], max_length: int) -> None:
    expected = place(pieces_of(tokens, max_length), max_length, first_fit)
    assert lengths(plan(offsets(tokens), max_length, 0, "first_fit", True)) == expected


@settings(deadline=None, max_examples=150)
@given(TOKENS, st.integers(2, 50))
def test_best_fit_is_best_fit(tokens: list[int], max_length: int) -> None:
    sizes = sorted(pieces_of(tokens, max_length), reverse=True)
    # Which of two equally full rows is taken changes nothing in how full rows become.
    expected = [sum(row) for row in place(sizes, max_length, best_fit)]
    result = plan(offsets(tokens), max_length, 0, "best_fit", True)
    assert sorted(map(sum, lengths(result))) == sorted(expected)
    again = plan(offsets(tokens), max_length, 0, "best_fit", True)
    assert rows_of(again) == rows_of(result)


@settings(deadline=None, max_examples=100)
@given(TOKENS, st.integers(2, 50))
def test_concat_fills_every_row_but_the_last(tokens: list[int], max_length: int) -> None:
    result = plan(offsets(tokens), max_length, 0, "concat", True)
    assert all(sum(row) == max_length for row in lengths(result)[:-1])
    assert result.piece_start.tolist() == sorted(result.piece_start.tolist())


def test_rows_by_hand() -> None:
    begins = offsets([5, 8, 3, 2, 12])  # 4, 7, 2, 1 and 11 pairs
    assert lengths(plan(begins, 8, 0, "greedy", True)) == [[4], [7], [2, 1], [8], [3]]
    assert lengths(plan(begins, 8, 0, "first_fit", True)) == [[4, 2, 1], [7], [8], [3]]
    assert lengths(plan(begins, 8, 0, "best_fit", True)) == [[8], [7], [4, 1, 3], [2]]
    assert lengths(plan(begins, 8, 0, "concat", True)) == [[4, 4], [3, 2, 1, 2], [8], [1]]
    assert lengths(plan(begins, 8, 0, "concat", False)) == [[4], [7], [2], [1], [8], [3]]
    assert lengths(plan(begins, 8, 8, "greedy", True)) == [[7], [8], [3]]


def test_nothing_left_names_min_length() -> None:
    with pytest.raises(UserError, match=r"^data\.min_length \(9\): no document has .* \(the longest of 2 has 4,"):
        plan(offsets([3, 4]), 8, 9, "greedy", True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_million_documents_take_seconds(strategy: str) -> None:
    tokens = np.minimum(np.random.default_rng(0).lognormal(5, 1, 1_000_000).astype(np.int64) + 2, 5000)
    plan(np.array([0, 3]), 512, 0, strategy, True)  # compiled
    start = time.perf_counter()
    result = plan(np.append(0, np.cumsum(tokens)), 512, 0, strategy, True)
    assert time.perf_counter() - start < 8
    assert result.efficiency > (0.7 if strategy == "greedy" else 0.98)


def test_hostile_lengths_are_not_quadratic() -> None:
    tokens = np.array([300, 214] * 150_000)  # first fit looks for room among many rows that are nearly half full
    for strategy in ("first_fit", "best_fit"):
        start = time.perf_counter()
        result = plan(np.append(0, np.cumsum(tokens)), 512, 0, strategy, True)
        assert time.perf_counter() - start < 8
        assert result.efficiency == 1


@pytest.fixture
def documents(tmp_path) -> TokenDocuments:
    np.save(tmp_path / "train.offsets.npy", offsets([5, 8, 3]))
    return TokenDocuments(tmp_path, "train", np.dtype(np.uint16))


def test_plan_is_kept(documents: TokenDocuments, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    data = DataConfig(max_length=8, min_length=4, packing_strategy="greedy")
    first = plan_cached(documents, data, lines.append)
    assert plan_cached(documents, dataclasses.replace(data, pack_sequences=False), lines.append)
    assert "unpacked" in lines[1]
    monkeypatch.setattr(packing, "plan", None)
    again = plan_cached(documents, data, lines.append)
    assert "cached" not in lines[0]
    assert "(cached)" in lines[2]
    assert rows_of(again) == rows_of(first)
    for name in ("max_length", "documents", "dropped_documents", "dropped_tokens", "cut_documents", "pairs"):
        assert getattr(again, name) == getattr(first, name)
        assert type(getattr(again, name)) is int
    assert not list(documents.folder.glob(".*"))


@pytest.mark.parametrize("size", [0, 50])
def test_damaged_plan_is_named(documents: TokenDocuments, size: int) -> None:
    data = DataConfig(max_length=8, min_length=0)
    plan_cached(documents, data, print)
    (path,) = documents.folder.glob("*.npz")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"cached plan .*\.npz\) is damaged .*delete it"):
        plan_cached(documents, data, print)
