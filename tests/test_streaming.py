"""Training on the first shards of a text while later ones are tokenized: the same rows, whatever is there already."""

import gc
import json
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import documents, make_config

from jaxlm import Trainer, load
from jaxlm.config import Config, DataConfig
from jaxlm.data import shards, streaming
from jaxlm.data.streaming import ROW_BITS, StreamedOrder, StreamedRows, Work
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizing import NOTES
from jaxlm.data.tokens import Streamed, prepare
from jaxlm.errors import RunFailed, Stopped, UserError

SHARD = 250  # characters: some thirty shards
SEED = 3


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", SHARD)
    monkeypatch.setattr(streaming, "LOOKS", 0.01)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> DataConfig:
    folder = tmp_path_factory.mktemp("streaming")
    Tokenizer.train(documents(50, 2), 300).save(folder / "tokenizer")
    return DataConfig(
        train_files=(str(corpus / "train.jsonl"),),
        validation_files=(str(corpus / "validation.jsonl"),),
        tokenizer_path=str(folder / "tokenizer"),
        max_length=32,
        cache_dir=str(folder / "cache"),
        streaming=True,
    )


def streamed(data: DataConfig) -> Streamed:
    train = prepare(data, 300, None, print).train
    assert isinstance(train, Streamed)
    return train


def rows_of(data: DataConfig) -> StreamedRows:
    """With all shards there."""
    rows = StreamedRows(streamed(data), data, print)
    while rows.total is None:
        time.sleep(0.01)
    return rows


def test_shards_are_those_of_the_texts_that_are_not_held_out(data: DataConfig) -> None:
    """Which texts are held out depends on min_length: shards made for another one may hold some of them."""
    split = replace(data, validation_files=(), validation_fraction=0.2)
    folders = {n: streamed(replace(split, min_length=n)).folder for n in (2, 20)}
    assert folders[2] != folders[20]
    whole = [streamed(replace(data, min_length=n)).folder for n in (2, 20)]
    assert whole[0] == whole[1]


class Idle(Work):
    """In place of the process that tokenizes: a test makes the shards."""

    def __init__(self, *_: Any) -> None:
        self.lines = streaming._Lines(print)

    def fault(self) -> str | None:
        return None


def stream(rows: StreamedRows, count: int, first: int = 0) -> list[int]:
    order = rows.order(SEED)
    return [order[place] for place in range(first, first + count)]


@pytest.mark.slow
def test_rows_are_the_same_whatever_is_there(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard comes only when one is waited for, so each place is known as soon as it can be."""
    whole = rows_of(data)
    assert whole.total is not None and whole.total > 16
    total = sum(len(whole.shard(i) or ()) for i in range(whole.total))
    expected = stream(whole, 3 * total)
    monkeypatch.setattr(streaming, "Work", Idle)
    text = replace(streamed(data), folder=tmp_path / "shards")
    text.folder.mkdir()
    there = 0

    def arrives() -> None:
        nonlocal there
        for path in whole.shards.folder.glob(f"train-{there:05}.*" if there < (whole.total or 0) else NOTES):
            shutil.copy(path, text.folder)
        there += 1

    arrives()
    rows = StreamedRows(text, data, print)
    rows.begin(print, arrives)
    order = rows.order(SEED)
    assert order[0] >> ROW_BITS == 0 and there == 1
    assert [order[place] for place in range(3 * total)] == expected and there == whole.total + 1
    assert stream(rows, 3 * total) == expected
    assert stream(rows, 100, total - 50) == expected[total - 50 : total + 50]
    for index in (expected[0], expected[total - 1]):
        assert all((rows[index][name] == array).all() for name, array in whole[index].items())


def test_each_epoch_has_each_row_once_shard_by_shard(data: DataConfig) -> None:
    rows = rows_of(data)
    sizes = [len(rows.shard(i) or ()) for i in range(rows.total or 0)]
    everything = {(number << ROW_BITS) + row for number, size in enumerate(sizes) for row in range(size)}
    total, places = sum(sizes), stream(rows, 3 * sum(sizes))
    epochs = [places[first : first + total] for first in range(0, 3 * total, total)]
    orders = []
    for epoch in epochs:
        assert set(epoch) == everything
        numbers = [index >> ROW_BITS for index in epoch]
        orders.append([numbers[0], *(after for before, after in pairwise(numbers) if after != before)])
        assert sorted(orders[-1]) == [number for number, size in enumerate(sizes) if size]
    windows = [orders[0][low:high] for low, high in ((0, 1), (1, 3), (3, 7), (7, 15), (15, None))]
    assert [min(window) for window in windows] == [0, 1, 3, 7, 15]
    assert orders[0] != sorted(orders[0]) and orders[1] != orders[2]
    assert any(number >= 15 for number in orders[1][:15])
    assert rows.epochs(total // 2) == (total // 2) / total
    assert stream(rows, total) != [rows.order(SEED + 1)[place] for place in range(total)]


def test_rows_hold_each_document_of_the_text(data: DataConfig) -> None:
    """Those of a run without streaming, numbered in the order of the text."""
    rows, plain = rows_of(data), prepare(replace(data, streaming=False), 300, None, print).train
    seen = dict[int, list[int]]()
    for number in range(rows.total or 0):
        part = rows.shard(number)
        for row in range(len(part or ())):
            index = (number << ROW_BITS) + row
            batch, names = rows[index], rows.documents(index)
            for piece, document in enumerate(names.tolist(), 1):
                places = batch["segments"] == piece
                seen.setdefault(document, []).extend(batch["targets"][places].tolist())
    assert plain is not None and not isinstance(plain, Streamed)
    long = [i for i, length in enumerate(np.diff(plain.offsets)) if length >= data.min_length]
    assert sorted(seen) == long
    for document in long:
        assert seen[document] == plain.tokens[plain.offsets[document] + 1 : plain.offsets[document + 1]].tolist()


def run(tmp_path: Path, corpus: Path, data: DataConfig, **more: Any) -> Trainer:
    config = make_config(tmp_path, corpus, **{"training.max_steps": 20, "training.eval_steps": 10, **more})
    trainer = Trainer(Config(config.model, config.training, data))
    trainer.train()
    return trainer


def same(one: Trainer, two: Trainer) -> bool:
    return bool(jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), one.state.params, two.state.params)))


def test_a_run_has_the_same_bits_while_shards_are_made_later_and_resumed(
    data: DataConfig, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """For more than an epoch."""
    data = replace(data, cache_dir=str(tmp_path / "cache"))
    first = run(tmp_path / "first", corpus, data)
    said = capfd.readouterr().err
    assert "streaming: trains on the shards that are there" in said and "tokenized text: whole, shards: " in said
    rows, taken = first.text.rows, 20 * first.resolved.global_batch
    later = run(tmp_path / "later", corpus, data)
    assert "streaming: trains" not in capfd.readouterr().err
    assert same(first, later)
    run(tmp_path / "resumed", corpus, data, **{"training.stop_at_step": 7})
    shutil.rmtree(Path(str(data.cache_dir)) / "tokens")
    resumed = run(tmp_path / "resumed", corpus, data)
    assert same(first, resumed) and resumed.text.rows is not rows
    metrics = [json.loads(line) for line in (later.folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["train/epoch"] == rows.epochs(taken) and metrics[-1]["train/epoch"] > 1
    other = run(tmp_path / "other", corpus, replace(data, streaming=False))
    assert not same(first, other)


def test_what_is_true_of_the_first_shard_is_not_said_of_all(
    data: DataConfig, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its documents are short here; positions that they don't reach are trained by later ones."""
    texts = ["the small cat reads a warm row of my model."] * 40 + [
        "the small cat reads a warm row of a naïve model. " * 8
    ] * 10
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    changed = replace(data, train_files=(str(tmp_path / "text.jsonl"),), cache_dir=str(tmp_path / "cache"))
    made = run(tmp_path, corpus, changed, **{"training.max_steps": 1, "training.eval_steps": 1})
    assert isinstance(made.text.rows, StreamedRows) and made.text.rows.parts[""].plan.longest < data.max_length
    assert "never trained" not in capfd.readouterr().err
    assert load(made.folder / "final_model").progress.longest_piece == data.max_length
    (start,) = [json.loads(line) for line in (made.folder / "starts.jsonl").read_text().splitlines()]
    assert start["train"]["measured_on"] == "first shard" and "measured_on" not in start["validation"]


def test_a_run_that_waits_is_stopped_at_once(
    data: DataConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saves what it has, leaves no thread that waits, and goes on to the same bits."""
    whole, here = rows_of(data), replace(data, cache_dir=str(tmp_path / "cache"))
    there = streamed(here).folder
    for path in (path for i in range(6) for path in whole.shards.folder.glob(f"train-{i:05}.*")):
        shutil.copy(path, there)
    before = threading.active_count()
    seldom = {"training.save_steps": 1000, "training.max_steps": 20}
    config = make_config(tmp_path, corpus, **{**seldom, "training.eval_steps": 10})
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "Work", Idle)
        trainer = Trainer(Config(config.model, config.training, here))
        patch.setattr(Idle, "fault", lambda self: trainer.stop("enough") if trainer.current_step else None)
        with pytest.raises(Stopped, match=r"enough at step \d+; it is saved") as stopped:
            trainer.train()
    step = int(str(stopped.value).split("at step ")[1].split(";")[0])
    assert 0 < step < 20 and (tmp_path / "run" / f"checkpoint_{step}").is_dir()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if "grain" in thread.name.lower()]
    resumed = run(tmp_path, corpus, here, **seldom)
    assert same(resumed, run(tmp_path / "straight", corpus, data))


def test_signals_to_all_of_a_job_leave_the_work_alone(data: DataConfig, tmp_path: Path) -> None:
    here = replace(data, cache_dir=str(tmp_path))
    rows = StreamedRows(streamed(here), here, print)
    assert rows._work is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        rows._work._process.send_signal(number)
    while rows.total is None:
        assert not rows._work._process.poll()
        time.sleep(0.01)


def test_shards_that_were_removed_are_missed(data: DataConfig, tmp_path: Path) -> None:
    """Also where all had been made, and in the names of documents, which are numbered on from shard to shard."""
    here = replace(data, cache_dir=str(tmp_path))
    rows = rows_of(here)
    plan_of = next(rows.shards.folder.glob("train-00009.plan*"))
    plan_of.write_bytes(b"damaged")
    with pytest.raises(RunFailed, match=r"shard 9 of the text can't be read: cached plan .* is damaged"):
        rows.shard(9)
    shutil.rmtree(rows.shards.folder)
    assert rows._work is not None
    rows._work._process.wait(60)
    with pytest.raises(RunFailed, match="shard 4 of the text can't be made: it was removed"):
        rows.shard(4)


def test_a_run_is_not_gone_on_with_shards_of_another_size(
    data: DataConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, corpus, data, **{"training.stop_at_step": 2})
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", SHARD + 1)
    with pytest.raises(UserError, match="the text is not the one that"):
        run(tmp_path, corpus, data)


@pytest.fixture
def bad(data: DataConfig, corpus: Path, tmp_path: Path) -> DataConfig:
    """A text whose last row is bad."""
    text = (corpus / "train.jsonl").read_text() + '{"text": 3}\n'
    (tmp_path / "bad.jsonl").write_text(text)
    return replace(data, train_files=(str(tmp_path / "bad.jsonl"),), cache_dir=str(tmp_path / "cache"))


@pytest.mark.slow
def test_a_shard_that_cannot_be_made_ends_the_run_where_it_is_needed(
    data: DataConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved stays, and the same command goes on when the fault is mended."""
    whole, here = rows_of(data), replace(data, cache_dir=str(tmp_path / "cache"))
    there = streamed(here).folder
    for number in range(6):
        for path in whole.shards.folder.glob(f"train-{number:05}.*"):
            shutil.copy(path, there)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "Work", Idle)
        patch.setattr(Idle, "fault", lambda self: "no room is left")
        with pytest.raises(RunFailed, match=r"^shard [67] of the text can't be made: no room is left"):
            run(tmp_path, corpus, here, **{"training.save_steps": 2})
    saved = sorted(int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint_*"))
    assert saved
    ended = run(tmp_path, corpus, here, **{"training.save_steps": 2})
    assert same(ended, run(tmp_path / "straight", corpus, data))


def test_a_text_without_rows_is_refused_at_the_start(bad: DataConfig, data: DataConfig, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a b"}\n' * 500)
    few = replace(data, train_files=(str(short),), min_length=31, cache_dir=str(tmp_path / "cache"))
    text = streamed(few)
    with pytest.raises(UserError, match=r"^data.min_length \(31\): no document has that many tokens"):
        StreamedRows(text, few, print)
    Path(bad.train_files[0]).write_text('{"text": 3}\n')
    text = streamed(bad)
    with pytest.raises(UserError, match=r"shard 0 of the text can't be made: .*line 1 holds int, not text"):
        StreamedRows(text, bad, print)


def test_what_was_tokenized_when_a_text_is_dropped_ends_with_it(data: DataConfig, tmp_path: Path) -> None:
    """The process ends with its object, as it does with the process that started it: both close its stdin."""
    here = replace(data, cache_dir=str(tmp_path))
    rows = StreamedRows(streamed(here), here, print)
    assert rows._work is not None
    process = rows._work._process
    del rows
    gc.collect()
    assert process.returncode is not None
    assert rows_of(here).total == rows_of(data).total


def test_waiting_is_said_and_is_no_hang(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, said, alive = rows_of(data), list[str](), list[int]()
    monkeypatch.setattr(streaming, "Work", Idle)
    monkeypatch.setattr(streaming, "SAYS", 0)
    text = replace(streamed(data), folder=tmp_path)
    for path in whole.shards.folder.glob("train-00000.*"):
        shutil.copy(path, tmp_path)
    rows = StreamedRows(text, data, said.append)
    assert len(said) == 1

    def looks() -> None:
        assert ThreadPoolExecutor(1).submit(order.__getitem__, 0).result(10) == known, "other threads need not wait"
        alive.append(len(said))
        if len(alive) == 3:
            shutil.copytree(whole.shards.folder, tmp_path, dirs_exist_ok=True)

    rows.begin(said.append, looks)
    order = StreamedOrder(rows, SEED)
    known = order[0]
    assert order[len(rows.parts[""])] >> ROW_BITS in (1, 2)
    waits = [line for line in said[1:] if re.fullmatch(r"waits for shard [12] of the text, .* tokenized: 0 s", line)]
    assert len(alive) == 3 and waits == said[1:] and len(waits) == 3
