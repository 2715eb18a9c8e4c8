"""What must hold for any documents, options, schedules and resume points, and for damaged files."""

import importlib
import itertools
import json
import math
import typing
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace, UnionType
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from jaxlm.commands.parser import Parser, add_config_options, convert, overrides
from jaxlm.config import Config, TrainingConfig, from_dict, replace_fields, to_dict
from jaxlm.config.batches import Batches
from jaxlm.config.fields import accepts
from jaxlm.config.schema import FIELDS
from jaxlm.data.loader import Rows, documents_of_step, train_batches
from jaxlm.data.packing import plan
from jaxlm.errors import UserError
from jaxlm.train.schedules import SCHEDULES, build_schedule, effective_warmup

ROOT = Path(__file__).parents[1]


def examples(count: int) -> settings:
    return settings(deadline=None, derandomize=True, max_examples=count)


# ---- Packing


def make_rows(tokens: list[int], max_length: int, min_length: int, strategy: str, pack: bool) -> Rows:
    """The rows of documents of so many tokens; every token's id is its place in the text, from 1."""
    offsets = np.append(0, np.cumsum(tokens)).astype(np.int64)
    documents: Any = SimpleNamespace(tokens=np.arange(1, offsets[-1] + 1), offsets=offsets, learned=None)
    return Rows(documents, plan(offsets, max_length, min_length, strategy, pack))


@examples(150)
@given(
    st.lists(st.integers(0, 40), max_size=40),
    st.integers(2, 30),
    st.integers(0, 20),
    st.sampled_from(("greedy", "first_fit", "best_fit", "concat")),
    st.booleans(),
)
def test_packing(tokens: list[int], max_length: int, min_length: int, strategy: str, pack: bool) -> None:
    begins = itertools.accumulate(tokens, initial=1)
    kept = [(begin, n) for begin, n in zip(begins, tokens, strict=False) if n >= max(min_length, 2)]
    expected = Counter((begin + i, begin + i + 1) for begin, n in kept for i in range(n - 1))
    if not kept:
        with np.testing.assert_raises(UserError):
            make_rows(tokens, max_length, min_length, strategy, pack)
        return
    rows = make_rows(tokens, max_length, min_length, strategy, pack)
    found: Counter[tuple[int, int]] = Counter()
    for i in range(len(rows)):
        tokens_T, targets_T, segments_T, positions_T = rows[i].values()
        pairs = int((segments_T > 0).sum())
        assert tokens_T.shape == (max_length,)
        assert 0 < pairs <= max_length
        assert not any(array[pairs:].any() for array in (tokens_T, targets_T, segments_T, positions_T)), "padding is 0"
        found.update(zip(tokens_T[:pairs].tolist(), targets_T[:pairs].tolist(), strict=True))
        pieces = [list(piece) for _, piece in itertools.groupby(range(pairs), key=lambda t: segments_T[t])]
        assert [int(segments_T[piece[0]]) for piece in pieces] == list(range(1, len(pieces) + 1))
        assert pack or len(pieces) == 1
        for piece in pieces:
            assert positions_T[piece].tolist() == list(range(len(piece))), "positions restart with every piece"
            assert (np.diff(tokens_T[piece]) == 1).all(), "a piece is a run of its document"
            assert sum(begin <= tokens_T[piece[0]] < begin + n for begin, n in kept) == 1
            assert any(begin <= tokens_T[piece[0]] and targets_T[piece[-1]] < begin + n for begin, n in kept)
    assert found == expected, "a pair is lost, there twice, or crosses two documents"


# ---- Options


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Any value of a declared type, within its bounds or not."""
    strategies: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        str: st.text(),
        type(None): st.none(),
        tuple[str, ...]: st.lists(st.text()).map(tuple),
        tuple[Any, ...]: st.lists(st.text()).map(tuple),
    }
    kinds = typing.get_args(annotation) if isinstance(annotation, UnionType) else [annotation]
    return st.one_of(*(strategies[kind] for kind in kinds))


NAMED_VALUES = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda dotted: st.tuples(st.just(dotted), values_of(FIELDS[dotted].type))
)
ONE_OF_EACH_TYPE = sorted({str(field.type): dotted for dotted, field in FIELDS.items()}.values())
PARSER = Parser("properties")
add_config_options(PARSER)


def parsed(*arguments: str) -> dict[str, Any]:
    return overrides(PARSER.parse_args(arguments))


@examples(50)
@given(st.lists(NAMED_VALUES).map(dict))
def test_saved_configuration_is_the_same(values: dict[str, Any]) -> None:
    assume(not {"data.train_files", "data.dataset_name"} <= values.keys())  # the two together are refused
    config = replace_fields(Config(), values)
    assert from_dict(json.loads(json.dumps(to_dict(config))), "saved") == config
    for dotted, value in values.items():
        section, _, field = dotted.partition(".")
        assert getattr(getattr(config, section), field) == value


@examples(400)
@given(NAMED_VALUES, st.booleans())
@example(("data.train_files", ("a,b", " c ", "", "[")), True)
@example(("data.text_column", "-x=y"), True)
def test_what_is_typed_is_what_is_meant(named: tuple[str, Any], in_one: bool) -> None:
    dotted, value = named
    if isinstance(value, str):
        assume(value != "--")  # Python before 3.13 takes it for something else; that is an error
        assume(type(None) not in typing.get_args(FIELDS[dotted].type) or value.lower() not in ("none", "null"))
    text = value if isinstance(value, str) else json.dumps(value)
    typed = [f"--{dotted}={text}"] if in_one or text.startswith("-") else [f"--{dotted}", text]
    given = parsed(*typed)
    assert given == {dotted: value}
    assert type(given[dotted]) is type(value)


@examples(100)
@given(st.lists(st.text(st.characters(exclude_characters=",[")).map(str.strip).filter(bool), min_size=1))
def test_lists_may_be_typed_with_commas(names: list[str]) -> None:
    assert parsed(f"--data.train_files={','.join(names)}") == {"data.train_files": tuple(names)}


JUNK = st.one_of(
    st.text(),
    st.integers().map(str),
    st.floats().map(str),
    st.recursive(st.none() | st.floats() | st.text(), st.lists).map(json.dumps),
    st.sampled_from(("none", "True", "1_0", "0x1", "٣", "[[", "[" * 100_000, "9" * 5000, "nan", "", "[NaN]")),
)


@examples(200)
@given(st.sampled_from(ONE_OF_EACH_TYPE), JUNK)
def test_any_text_is_a_value_or_an_error(dotted: str, text: str) -> None:
    try:
        value = convert(dotted, text, FIELDS[dotted].type)
    except UserError as error:
        assert str(error).startswith(f"{dotted} (")  # noqa: PT017
        return
    assert accepts(FIELDS[dotted].type, value)


@examples(200)
@given(
    st.lists(
        st.text()
        | st.sampled_from([f"--{dotted}" for dotted in FIELDS] + ["--", "-", "=", "1", "true"])
        | st.tuples(st.sampled_from(ONE_OF_EACH_TYPE), JUNK | st.just("--")).map("--{0[0]}={0[1]}".format)
    )
)
def test_any_command_line_is_options_or_an_error(arguments: list[str]) -> None:
    assume(not any(argument.startswith("-h") or "--help" in argument for argument in arguments))
    try:
        values = parsed(*arguments)
    except UserError:
        return
    assert all(accepts(FIELDS[dotted].type, value) for dotted, value in values.items())


# ---- Schedules


@examples(100)
@given(
    st.builds(
        TrainingConfig,
        learning_rate=st.floats(1e-8, 1e3),
        lr_scheduler=st.sampled_from(sorted(SCHEDULES)),
        warmup_steps=st.integers(0, 1000),
        warmup_shape=st.sampled_from(("linear", "log")),
        warmup_min_ratio=st.floats(0, 1),
        schedule_steps=st.none() | st.integers(1, 700),
        min_lr_ratio=st.floats(0, 1),
        lr_power=st.floats(1e-3, 20),
    ),
    st.integers(1, 600),
)
def test_schedules(config: TrainingConfig, total_steps: int) -> None:
    warmup = effective_warmup(config, total_steps)
    end = config.schedule_steps or total_steps
    assert warmup == min(config.warmup_steps, total_steps // 10, end // 10)
    schedule = build_schedule(config, total_steps)
    rates = np.array([schedule(step) for step in range(700)]) / config.learning_rate
    tiny = 1e-6
    assert np.isfinite(rates).all()
    assert (rates >= 0).all() and (rates <= 1 + tiny).all()
    assert rates[0] > 0, "the first update does not move"
    rising, falling = rates[: warmup + 1], rates[warmup:]
    if config.warmup_min_ratio < 0.99:
        assert (np.diff(rising) > 0).all(), "warm-up does not rise"
    assert (rising >= config.warmup_min_ratio - tiny).all()
    assert abs(falling[0] - 1) < tiny, "the peak is not reached when warm-up ends"
    assert (np.diff(falling) < tiny).all(), "the decay rises"
    lowest = 1 if config.lr_scheduler == "constant" else config.min_lr_ratio
    assert (falling >= lowest - tiny).all()
    if end - 1 > warmup:
        assert np.allclose(rates[end - 1 :], lowest, atol=tiny), "the end is not the lowest"


# ---- Resume points


class Numbered(Rows):
    """So many rows that hold their number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": np.full(2, index, np.int32)}


def batches(
    rows: Any, seed: int, size: int, accumulation: int, start: int, count: int, own: slice = slice(None)
) -> list:
    stream = train_batches(rows, seed, Batches(size // accumulation, accumulation), start, own)
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


def same(first: list[dict], second: list[dict]) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))


SEEDS = st.integers(0, 2**31 - 1)


@examples(12)
@given(st.integers(1, 30), SEEDS, st.integers(1, 4), st.integers(1, 4), st.integers(0, 8))
def test_a_run_goes_on_where_it_was(rows: int, seed: int, accumulation: int, micro_batch: int, step: int) -> None:
    size = accumulation * micro_batch
    whole = batches(Numbered(rows), seed, size, accumulation, 0, step + 2)
    assert same(batches(Numbered(rows), seed, size, accumulation, step, 2), whole[step:])
    assert same(batches(Numbered(rows), seed, size, 1, step, 2), regrouped(whole[step:], 1)), (
        "micro-batches change rows"
    )


def regrouped(found: list[dict], accumulation: int) -> list[dict]:
    return [{n: a.reshape(accumulation, -1, *a.shape[2:]) for n, a in batch.items()} for batch in found]


@examples(25)
@given(st.integers(1, 20), SEEDS, st.integers(1, 8))
def test_an_epoch_is_every_row_once(rows: int, seed: int, size: int) -> None:
    found = batches(Numbered(rows), seed, size, 1, 0, math.ceil(3 * rows / size))
    stream = np.concatenate([batch["tokens"][0, :, 0] for batch in found])[: 3 * rows].reshape(3, rows)
    assert (np.sort(stream) == np.arange(rows)).all()
    assert all((batch["rows"] == np.arange(size)).all() for batch in found)


@examples(20)
@given(st.integers(1, 20), SEEDS, st.integers(1, 3), st.sampled_from((1, 2, 3)), st.integers(1, 3), st.integers(0, 9))
def test_parts_of_processes_are_the_batch(
    rows: int, seed: int, accumulation: int, processes: int, part: int, step: int
) -> None:
    size = accumulation * processes * part
    whole = batches(Numbered(rows), seed, size, accumulation, step, 2)
    parts = [
        batches(Numbered(rows), seed, size, accumulation, step, 2, slice(i * part, (i + 1) * part))
        for i in range(processes)
    ]
    joined = [{name: np.concatenate([p[s][name] for p in parts], axis=1) for name in whole[s]} for s in range(2)]
    assert same(joined, whole)


@examples(30)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=20), SEEDS, st.integers(1, 6), st.integers(0, 9))
def test_documents_of_a_step_are_those_in_its_batch(tokens: list[int], seed: int, size: int, step: int) -> None:
    rows = make_rows(tokens, 16, 0, "greedy", True)
    (batch,) = batches(rows, seed, size, 1, step, 1)
    ids = batch["tokens"][batch["segments"] > 0] - 1
    expected = np.unique(np.searchsorted(rows.document_offsets, ids, side="right") - 1)
    assert documents_of_step(rows, seed, Batches(size), step) == expected.tolist()


# ---- Damaged files


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("fuzz")


def test_damaged_input_is_loaded_or_refused(fuzz: ModuleType, tmp_path: Path) -> None:
    numbers = [*range(150), *range(154, 754, len(fuzz.KINDS))]  # and then texts, of which there are most kinds
    found = fuzz.run(seed=5, numbers=numbers, out=tmp_path)
    assert not [kind for kind, outcome in found if outcome == "defect"]
    for kind in fuzz.KINDS:
        assert found[kind, "loaded"] and found[kind, "refused"], "the input is not what it should be"


def test_fuzzing_notices_defects(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:

    def faulty(rng: Any, folder: Path) -> None:
        (folder / "file").touch()
        raise KeyError("a bug")

    monkeypatch.setattr(fuzz, "KINDS", {"faulty": faulty})
    assert fuzz.run(seed=0, numbers=range(2), out=tmp_path) == {("faulty", "defect"): 2}
    assert (tmp_path / "0-1" / "file").exists()
    assert "KeyError: 'a bug'" in (tmp_path / "0-1" / "defect.txt").read_text()
