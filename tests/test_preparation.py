"""A preparation that is ended anywhere goes on, and ends with the same bytes; its disk, its progress."""

import errno
import json
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import documents

from jaxlm.config import DataConfig
from jaxlm.data import shards, tokenizing
from jaxlm.data.documents import Document
from jaxlm.data.shards import Shards
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokens import prepare
from jaxlm.errors import UserError

ROOT = Path(__file__).parents[1]
DOCUMENTS = 200
SHARD = 1000  # characters: some ten shards
KINDS = ("text", "conversations")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Documents with markers, some of them bad and some empty."""
    return written("text", tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module", params=KINDS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Those documents; and questions with answers to learn, some too long."""
    return written(request.param, tmp_path_factory.mktemp(request.param))


def written(kind: str, folder: Path) -> DataConfig:
    rng = random.Random(1)
    texts = [text + "<|end|>" * (rng.random() < 0.2) for text in documents(DOCUMENTS, 2)]
    if kind == "text":
        rows = [json.dumps({"text": rng.choice([*[text] * 8, "", 3])}) for text in texts]
        more: dict[str, Any] = {"on_bad_document": "skip"}
    else:
        roles = ("user", "assistant")
        rows = [json.dumps({"messages": [{"role": r, "content": text} for r in roles]}) for text in texts]
        more = {"too_long": "drop", "max_length": 100, "chat_template": "plain"}
    (folder / "train.jsonl").write_text("\n".join(rows))
    Tokenizer.train(texts, 300).save(folder / "tokenizer")
    files = {"train_files": (str(folder / "train.jsonl"),), "tokenizer_path": str(folder / "tokenizer")}
    return DataConfig(**files, cache_dir=str(folder / "whole"), validation_fraction=0.2, **more)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", SHARD)


def prepared(data: DataConfig, lines: list[str] | None = None) -> dict[str, bytes]:
    """The files that `prepare` makes."""
    made = prepare(data, 300, None, [].append if lines is None else lines.append)
    assert made.train is not None
    folder = made.train.folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def part(data: DataConfig) -> Path:
    """The folder that a preparation was writing."""
    (folder,) = Path(str(data.cache_dir)).glob("tokens/.*.part")
    return folder


def interrupt(data: DataConfig, split: str, at: int) -> None:
    """Ends a preparation while it is at that document of `split`."""
    passed = Shards.passed

    def ends(self: Shards, document: Document) -> bool:
        if (self._split, self.counts.read) == (split, at):
            raise KeyboardInterrupt
        return passed(self, document)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "passed", ends)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, 300, None, print)


PLACES = [
    [("train", 0)],
    [("train", 60), ("train", 61), ("train", 110)],
    [("validation", 0), ("validation", 25)],
    [("train", 100), ("validation", 20)],
]


@pytest.mark.parametrize("places", PLACES)
def test_an_ended_preparation_goes_on_to_the_same_bytes(
    each: DataConfig, tmp_path: Path, places: list[tuple[str, int]]
) -> None:
    expected = prepared(each)
    assert {"train.tokens", "train.offsets.npy", "train.bytes.npy", "validation.tokens", "notes.json"} <= set(expected)
    assert not [name for name in expected if name.endswith((".shards", ".documents"))]
    here = replace(each, cache_dir=str(tmp_path))
    for split, at in places:
        interrupt(here, split, at)
    lines: list[str] = []
    assert prepared(here, lines) == expected
    assert any("goes on behind them" in line for line in lines) == (places != PLACES[0])


def test_whole_shards_are_not_tokenized_again(
    each: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, seen = replace(each, cache_dir=str(tmp_path)), list[str]()
    interrupt(here, "train", 100)
    counts = json.loads((part(here) / "train.shards").read_text().splitlines()[-1])
    assert 50 < counts["read"] <= 100 and counts["characters"] >= 3 * SHARD
    monkeypatch.setattr(Shards, "passed", lambda self, document: seen.append(document.place))
    prepare(here, 300, None, print)
    first_pass = len(seen)
    prepare(replace(here, cache_dir=str(tmp_path / "anew")), 300, None, print)
    assert first_pass == len(seen) - first_pass - counts["read"]


def test_a_torn_shard_is_cut_off(data: DataConfig, tmp_path: Path) -> None:
    here = replace(data, cache_dir=str(tmp_path))
    interrupt(here, "train", 100)
    for path in part(here).iterdir():
        with path.open("ab") as file:
            file.write(b'{"read": 1000, "tok')
    assert prepared(here) == prepared(data)


def test_fewer_tokens_than_the_shards_had_are_noticed(data: DataConfig, tmp_path: Path) -> None:
    here = replace(data, cache_dir=str(tmp_path))
    interrupt(here, "train", 100)
    (part(here) / "train.documents").write_bytes(b"")
    with pytest.raises(UserError, match=r"tokens of an earlier start \(.*train.documents\) are damaged, .*start again"):
        prepare(here, 300, None, print)
    assert prepared(here) == prepared(data)


def test_another_text_or_setting_begins_anew(data: DataConfig, tmp_path: Path) -> None:
    """What was left of the first text stays for a start with that."""
    shutil.copy(data.train_files[0], tmp_path / "text.jsonl")
    here = replace(data, cache_dir=str(tmp_path / "cache"), train_files=(str(tmp_path / "text.jsonl"),))
    interrupt(here, "train", 100)
    left = part(here)
    lines: list[str] = []
    prepare(replace(here, min_length=5), 300, None, lines.append)
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": "one more", "messages": [{"role": "assistant", "content": "more"}]}))
    prepare(here, 300, None, lines.append)
    assert not [line for line in lines if "goes on" in line]
    assert left.exists()


def test_a_text_that_cannot_be_used_leaves_nothing(data: DataConfig, tmp_path: Path) -> None:
    here = replace(data, cache_dir=str(tmp_path), on_bad_document="error", too_long="error", max_length=20)
    with pytest.raises(UserError, match="mend it, or set|tokens, and a row sees"):
        prepare(here, 300, None, print)
    assert list((tmp_path / "tokens").iterdir()) == []


CHILD = """
import sys, time
from jaxlm.config import DataConfig
from jaxlm.data import shards
from jaxlm.data.tokens import prepare
shards.SHARD_CHARACTERS = 1000
keep = shards.Shards.keep
def slowly(self):
    keep(self)
    print("kept", flush=True)
    time.sleep(0.05)
shards.Shards.keep = slowly
prepare(DataConfig(**eval(sys.argv[1])), 300, None, lambda line: None)
"""


def test_killed_three_times(data: DataConfig, tmp_path: Path) -> None:
    here = replace(data, cache_dir=str(tmp_path))
    for _ in range(3):
        command = [sys.executable, "-c", CHILD, repr(vars(here))]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert [child.stdout.readline() for _ in range(2)] == ["kept\n"] * 2
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert len((part(here) / "train.shards").read_text().splitlines()) >= 6
    assert prepared(here) == prepared(data)


def test_too_small_a_disk_is_said_before_and_a_full_one_keeps_what_is_whole(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = replace(data, cache_dir=str(tmp_path))
    interrupt(here, "train", 100)
    left = (part(here) / "train.shards").read_bytes()
    usage = namedtuple("usage", ["free"])
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, "TOKEN_CHARACTERS", 1 / 10**6)
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**7))
        message = r"^data.cache_dir \(.*\) cannot be written to: the tokens take about .* GB more, and 0.01 GB are free"
        with pytest.raises(UserError, match=message):
            prepare(here, 300, None, print)

    def full(self: Shards) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "keep", full)
        with pytest.raises(
            UserError, match=r"^data.cache_dir \(.*\) cannot be written to: No space left on device; name"
        ):
            prepare(here, 300, None, print)
    assert (part(here) / "train.shards").read_bytes() == left
    assert prepared(here) == prepared(data)


def test_progress_is_said(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "SECONDS", 0)
    lines: list[str] = []
    prepared(replace(data, cache_dir=str(tmp_path)), lines)
    said = [line for line in lines if line.startswith("tokenizing train: ")]
    pattern = (
        r"tokenizing train: [\d,]+ documents, 0 of 0 million characters, [\d.]+ million a second, about [\d:]+ left"
    )
    assert len(said) > 10 and all(re.fullmatch(pattern, line) for line in said)
