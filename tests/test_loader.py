"""Rows are the text, and the batch of a step depends on (data, seed, step) and on nothing else."""

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxlm.config.batches import Batches
from jaxlm.data.loader import Rows, documents_of_step, eval_batches, total_steps, train_batches
from jaxlm.data.packing import plan
from jaxlm.data.tokens import TokenDocuments

T = 12
ARRAYS = ("tokens", "targets", "segments", "positions")


def make_rows(folder: Path, tokens: list[int], strategy: str = "greedy", pack: bool = True) -> Rows:
    """Documents whose text is numbered through, so that every token is another one."""
    offsets = np.append(0, np.cumsum(tokens)).astype(np.int64)
    ids = np.arange(3, offsets[-1] + 3, dtype=np.uint16)
    ids[offsets[:-1]], ids[offsets[1:] - 1] = 1, 2
    ids.tofile(folder / "train.tokens")
    np.save(folder / "train.offsets.npy", offsets)
    return Rows(TokenDocuments(folder, "train", ids.dtype), plan(offsets, T, 0, strategy, pack))


@pytest.fixture
def rows(tmp_path) -> Rows:
    return make_rows(tmp_path, [5, 8, 3, 30, 2, 13, 4] * 3)


def take(batches: Iterator[dict], n: int) -> list[dict]:
    found = list(itertools.islice(batches, n))
    batches.close()  # type: ignore[attr-defined]
    return found


def stream(rows: Rows, seed: int, global_batch: int, steps: int, accumulation: int = 1, start: int = 0) -> np.ndarray:
    """[steps * G, T]: the tokens of the first batches, row after row."""
    batches = take(train_batches(rows, seed, Batches(global_batch // accumulation, accumulation), start), steps)
    return np.concatenate([batch["tokens"].reshape(global_batch, T) for batch in batches])


def test_a_batch_that_changes_goes_on_at_the_next_row(rows) -> None:
    """3 updates of 2 rows, then 2 of 4: the rows of 7 updates of 2, over the end of an epoch."""
    whole = stream(rows, 3, 2, 7)
    later = take(train_batches(rows, 3, Batches(2, 2, offset=3 * 2 - 3 * 4), 3), 2)
    np.testing.assert_array_equal(np.concatenate([batch["tokens"].reshape(4, T) for batch in later]), whole[6:])
    late = documents_of_step(rows, 3, Batches(4, offset=-6), 4)
    assert late == documents_of_step(rows, 3, Batches(4, offset=10), 0)


def test_a_schedule_takes_the_rows_one_after_the_other(rows) -> None:
    """Updates of 2, 2, 6, 6, 4, ... rows in micro-batches of 2, from whichever update on: none twice, none left out."""
    batches = Batches(2, schedule=((2, 3), (4, 2)))
    sizes = [2, 2, 6, 6, 4, 4, 4]
    whole = stream(rows, 3, 2, sum(sizes) // 2)
    taken = take(train_batches(rows, 3, batches, 0), len(sizes))
    assert [batch["rows"].shape for batch in taken] == [(size // 2, 2) for size in sizes]
    assert [batch["rows"].ravel().tolist() for batch in taken] == [list(range(size)) for size in sizes]
    np.testing.assert_array_equal(np.concatenate([batch["tokens"].reshape(-1, T) for batch in taken]), whole)
    for start in range(1, len(sizes)):
        (again,) = take(train_batches(rows, 3, batches, start), 1)
        np.testing.assert_array_equal(again["tokens"], taken[start]["tokens"])
        assert batches.position(start) == sum(sizes[:start])
    assert documents_of_step(rows, 3, batches, 3) == documents_of_step(rows, 3, Batches(6, offset=10), 0)


@pytest.mark.parametrize("offset", [0, -3, 5])
def test_updates_for_rows_are_those_that_reach_them(offset: int) -> None:
    batches = Batches(2, 2, ((3, 2), (5, 1), (9, 4)), offset)
    for rows in range(1, 120):
        found = batches.updates_for(rows, 1000)
        assert batches.position(found) >= rows and (found == 0 or batches.position(found - 1) < rows)
    assert batches.updates_for(10**9, 1000) == 1001
    assert batches.counts(range(0, 6)) == [2, 4] and batches.counts(range(4, 20)) == [4, 2, 8]
    assert batches.counts(range(3, 3)) == []


def test_row_by_hand(tmp_path) -> None:
    rows = make_rows(tmp_path, [4, 6, 30])
    assert len(rows) == 4
    assert {name: array.tolist() for name, array in rows[0].items()} == {
        "tokens": [1, 4, 5, 1, 8, 9, 10, 11, 0, 0, 0, 0],
        "targets": [4, 5, 2, 8, 9, 10, 11, 2, 0, 0, 0, 0],
        "segments": [1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0, 0],
        "positions": [0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 0, 0],
    }
    assert rows[2]["tokens"].tolist() == list(range(25, 37))  # the long document goes on, in a row of its own
    assert rows[2]["positions"].tolist() == list(range(12))
    assert all(array.dtype == np.int32 and array.shape == (T,) for array in rows[0].values())


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("strategy", ["greedy", "first_fit", "best_fit", "concat"])
def test_every_target_once(tmp_path, strategy: str, pack: bool) -> None:
    rows = make_rows(tmp_path, [5, 8, 3, 30, 2, 13], strategy, pack)
    tokens, targets, segments, positions = (np.stack([rows[i][name] for i in range(len(rows))]) for name in ARRAYS)
    text = rows.tokens
    assert sorted(targets[segments > 0]) == sorted(text[text != 1]), "a target is lost or doubled"
    assert sorted(tokens[segments > 0]) == sorted(text[text != 2])
    for array in (tokens, targets, positions):
        assert not array[segments == 0].any()
    inside = segments[:, 1:] == segments[:, :-1]
    inside &= segments[:, 1:] > 0
    assert (positions[:, 1:][inside] == positions[:, :-1][inside] + 1).all()
    assert (tokens[:, 1:][inside] == targets[:, :-1][inside]).all()
    begins = ~inside & (segments[:, 1:] > 0)
    assert not positions[:, 1:][begins].any()
    assert not positions[:, 0].any()


def test_batches_have_their_shape(rows: Rows) -> None:
    (batch,) = take(train_batches(rows, 0, Batches(2, 3), 0), 1)
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(ARRAYS, (3, 2, T)) | {"rows": (3, 2)}
    assert all(array.dtype == np.int32 and array.flags.c_contiguous for array in batch.values())
    assert batch["rows"].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_epochs_are_permutations_end_to_end(rows: Rows) -> None:
    n = len(rows)
    assert n % 5, "a batch should straddle two epochs"
    tokens = stream(rows, 7, 5, 3 * n)[: 3 * n]
    every = sorted(rows[i]["tokens"].tolist() for i in range(n))
    epochs = tokens.reshape(3, n, T).tolist()
    assert all(sorted(epoch) == every for epoch in epochs)
    assert every != epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("start", [1, 4, 13])
def test_batch_depends_on_the_step_alone(rows: Rows, start: int) -> None:
    whole = take(train_batches(rows, 3, Batches(2, 2), 0), 18)
    later = take(train_batches(rows, 3, Batches(2, 2), start), 18 - start)
    for expected, batch in zip(whole[start:], later, strict=True):
        for name in expected:
            np.testing.assert_array_equal(batch[name], expected[name])


def test_far_step_is_reached_at_once(rows: Rows) -> None:
    begin = time.perf_counter()
    far = 10**9
    expected = [stream(rows, 3, 4, 1, start=far + i) for i in range(3)]
    np.testing.assert_array_equal(stream(rows, 3, 4, 3, start=far), np.concatenate(expected))
    assert time.perf_counter() - begin < 5


def test_grouping_changes_no_row(rows: Rows) -> None:
    expected = stream(rows, 3, 4, 9)
    np.testing.assert_array_equal(stream(rows, 3, 4, 9, accumulation=2), expected)
    np.testing.assert_array_equal(stream(rows, 3, 12, 3, accumulation=6), expected)


def test_seeds_give_other_orders(rows: Rows) -> None:
    n = len(rows)
    first, second = stream(rows, 0, n, 2), stream(rows, 1, n, 2)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first[n:], second[:n]), "epoch 1 of a seed is epoch 0 of the next"


# Two epochs of 10 rows in the order of seed 42 (grain 0.2.18).
GOLDEN_ORDER = [5, 9, 2, 4, 3, 0, 6, 1, 7, 8, 4, 7, 1, 6, 9, 0, 8, 3, 2, 5]


def test_order_is_the_one_that_runs_in_progress_rely_on(tmp_path) -> None:
    rows = make_rows(tmp_path, [T + 1] * 10)
    row_of = {rows[i]["tokens"][1]: i for i in range(10)}
    order = [row_of[row[1]] for row in stream(rows, 42, 5, 4)]
    assert order == GOLDEN_ORDER, "grain shuffles differently: a resumed run would see some rows twice and others never"


def test_one_row_is_enough(tmp_path) -> None:
    rows = make_rows(tmp_path, [5])
    assert stream(rows, 0, 3, 2)[:, 0].tolist() == [1] * 6


def test_process_ends_with_batches_left(tmp_path) -> None:
    make_rows(tmp_path, [5, 8, 3, 30])
    program = (
        "import sys, numpy as np; from pathlib import Path; from jaxlm.data.tokens import TokenDocuments\n"
        "from jaxlm.config.batches import Batches\n"
        "from jaxlm.data.loader import Rows, documents_of_step, train_batches; from jaxlm.data.packing import plan\n"
        "documents = TokenDocuments(Path(sys.argv[1]), 'train', np.dtype('uint16'))\n"
        "batches = train_batches(Rows(documents, plan(documents.offsets, 12, 0, 'greedy', True)), 0, Batches(2), 0)\n"
        "next(batches)"
    )
    arguments = [sys.executable, "-W", "error", "-c", program, str(tmp_path)]
    done = subprocess.run(
        arguments, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_evaluation_sees_every_row_in_order(rows: Rows, batch: int) -> None:
    batches = list(eval_batches(rows, batch))
    assert all(array.shape == (batch, T) and array.dtype == np.int32 for each in batches for array in each.values())
    for name in ARRAYS:
        joined = np.concatenate([each[name] for each in batches])
        np.testing.assert_array_equal(joined[: len(rows)], [rows[i][name] for i in range(len(rows))])
        assert not joined[len(rows) :].any()
    assert len(batches) == -(-len(rows) // batch)


@pytest.mark.parametrize(
    ("epochs", "rows", "global_batch", "max_steps", "steps"),
    [
        (1, 10, 5, None, 2),
        (1, 11, 5, None, 3),
        (3, 10, 4, None, 8),
        (0.01, 10, 5, None, 1),
        (2.5, 10, 5, None, 5),
        (2.2, 25, 5, None, 11),
        (3, 10, 4, 7, 7),
    ],
)
def test_steps_of_a_run(epochs: float, rows: int, global_batch: int, max_steps: int | None, steps: int) -> None:
    assert total_steps(epochs, rows, Batches(global_batch), max_steps) == steps
