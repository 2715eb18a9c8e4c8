"""A preparation that is ended anywhere, or shared by processes, ends with the same bytes; its disk, its progress."""

import errno
import json
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter, namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import documents

from jaxlm.config import DataConfig
from jaxlm.data import shards, tokenizing
from jaxlm.data.documents import Document
from jaxlm.data.shards import Pass, Shard, Shards
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
    """Ends a preparation while it is at that document of those that it tokenizes of `split`."""
    ended, seen = Pass.ended, Counter[str]()

    def ends(self: Pass, document: Document) -> None:
        if (document.part, seen[document.part]) == (split, at):
            raise KeyboardInterrupt
        seen[document.part] += 1
        ended(self, document)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pass, "ended", ends)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, 300, None, print)


PLACES = [
    [("train", 0)],
    [("train", 60), ("train", 30), ("train", 30)],
    [("validation", 0), ("validation", 25)],
    [("train", 100), ("validation", 5)],
]


def whole(data: DataConfig, split: str = "*") -> list[str]:
    """The shards that a preparation has left."""
    return sorted(path.name for path in part(data).glob(f"{split}-0*.json"))


@pytest.mark.parametrize("places", PLACES)
def test_an_ended_preparation_goes_on_to_the_same_bytes(
    each: DataConfig, tmp_path: Path, places: list[tuple[str, int]]
) -> None:
    expected = prepared(each)
    assert {"train.tokens", "train.offsets.npy", "train.bytes.npy", "validation.tokens", "notes.json"} <= set(expected)
    assert not [name for name in expected if "-0" in name or name.startswith(".")]
    here = replace(each, cache_dir=str(tmp_path))
    for split, at in places:
        interrupt(here, split, at)
    lines: list[str] = []
    assert prepared(here, lines) == expected
    assert any("goes on with the others" in line for line in lines) == (places != PLACES[0])


def test_whole_shards_are_not_tokenized_again(
    each: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, seen = replace(each, cache_dir=str(tmp_path)), list[str]()
    interrupt(here, "train", 100)
    counts = [json.loads((part(here) / name).read_text()) for name in whole(here)]
    read = sum(each["read"] for each in counts)
    assert (
        50 < sum(each["read"] for each in counts[: len(whole(here, "train"))]) <= 100
        and all(each["characters"] >= SHARD for each in counts)
        and len(counts) > 2
    )
    ended = Pass.ended

    def sees(self: Pass, document: Document) -> None:
        seen.append(document.place)
        ended(self, document)

    monkeypatch.setattr(Pass, "ended", sees)
    prepare(here, 300, None, print)
    first_pass = len(seen)
    prepare(replace(here, cache_dir=str(tmp_path / "anew")), 300, None, print)
    assert first_pass == len(seen) - first_pass - read


def test_a_torn_shard_is_written_anew(data: DataConfig, tmp_path: Path) -> None:
    here = replace(data, cache_dir=str(tmp_path))
    interrupt(here, "train", 100)
    torn = f"train-{len(whole(here, 'train')):05}"
    assert (part(here) / f"{torn}.tokens").exists()
    for name in (f"{torn}.tokens", f"{torn}.learned", "train-00003.lock"):
        (part(here) / name).write_bytes(b"1" * 10**5)
    assert prepared(here) == prepared(data)


def test_a_start_that_was_killed_while_it_joined_goes_on(each: DataConfig, tmp_path: Path) -> None:
    """At each of the shards, after it was added and before it was removed, or the other way round."""
    expected, here = prepared(each), replace(each, cache_dir=str(tmp_path))
    unlink = Path.unlink

    def killed(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".tokens" and left and left.pop():
            raise KeyboardInterrupt
        unlink(self, missing_ok)
        if self.suffix == ".tokens" and left and left.pop():
            raise KeyboardInterrupt

    left = [True, False, True, False, False, False, True]  # from the end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        while left:
            with pytest.raises(KeyboardInterrupt):
                prepare(here, 300, None, print)
    assert (part(here) / "train.tokens").stat().st_size and not (part(here) / "train-00000.tokens").exists()
    assert prepared(here) == expected


def test_fewer_tokens_than_the_shards_had_are_noticed(data: DataConfig, tmp_path: Path) -> None:
    here = replace(data, cache_dir=str(tmp_path))
    interrupt(here, "train", 100)
    (part(here) / "train-00001.tokens").write_bytes(b"")
    with pytest.raises(UserError, match=r"tokens of an earlier start \(.*-00001.tokens\) are damaged, .*start again"):
        prepare(here, 300, None, print)
    assert prepared(here) == prepared(data)


def test_a_shard_that_is_gone_before_the_join_is_noticed(data: DataConfig, tmp_path: Path) -> None:
    """Its place is not filled with zeros."""
    here = replace(data, cache_dir=str(tmp_path))
    interrupt(here, "train", 100)
    (part(here) / "train-00001.tokens").unlink()
    with pytest.raises(UserError, match=r"tokens of an earlier start \(.*-00001.tokens\) are damaged, .*start again"):
        prepare(here, 300, None, print)
    assert prepared(here) == prepared(data)


def test_only_what_is_of_shards_is_cleared(tmp_path: Path) -> None:
    """Another process may be at a plan, whose name has a number of five digits, too."""
    kept = ["train.tokens", "train.plan-1-greedy-16384-10.npz", ".train.plan-1-greedy-16384-10.npz.part"]
    for name in [*kept, "train-00003.json", "validation-123456.offsets.npy", ".train-00003.lock"]:
        (tmp_path / name).touch()
    shards.clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_folder_that_was_renamed_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has joined all just before this one claims a shard."""
    (tmp_path / "part").mkdir()
    acquire = shards.FileLock.acquire

    def late(self: Any, *arguments: Any, **options: Any) -> Any:
        (tmp_path / "part").rename(tmp_path / "whole")
        return acquire(self, *arguments, **options)

    monkeypatch.setattr(shards.FileLock, "acquire", late)
    with pytest.raises(FileNotFoundError), Shards(tmp_path / "part", "train", np.dtype(np.uint16)).claimed(0):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


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
from jaxlm.data import encoding, shards
from jaxlm.data.tokens import prepare
encoding.BATCH_CHARACTERS, shards.SHARD_CHARACTERS = 100, 1000
keep = shards.Shard.keep
def slowly(self):
    time.sleep(0.05)
    keep(self)
    print("kept", flush=True)
shards.Shard.keep = slowly
print("ready", flush=True)
sys.stdin.readline()
prepare(DataConfig(**eval(sys.argv[1])), 300, None, lambda line: None)
"""


def children(data: DataConfig, count: int) -> list["subprocess.Popen[str]"]:
    """Processes that prepare `data`, slowly; all are ready before one begins."""
    command, pipe = [sys.executable, "-c", CHILD, repr(vars(data))], subprocess.PIPE
    started = [subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for _ in range(count)]
    for child in started:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in started:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    return started


def test_killed_three_times(data: DataConfig, tmp_path: Path) -> None:
    here = replace(data, cache_dir=str(tmp_path))
    for _ in range(3):
        (child,) = children(here, 1)
        assert child.stdout is not None
        assert [child.stdout.readline() for _ in range(2)] == ["kept\n"] * 2
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert len(whole(here)) >= 6
    assert prepared(here) == prepared(data)


def test_processes_share_the_work(data: DataConfig, tmp_path: Path) -> None:
    """Each of three makes some of the shards, one of them is killed, and all end with the same."""
    here = replace(data, cache_dir=str(tmp_path))
    started = children(here, 3)
    assert started[0].stdout is not None and started[0].stdout.readline() == "kept\n"
    started[0].send_signal(signal.SIGKILL)
    said = [child.communicate(timeout=60)[0].count("kept") for child in started]
    assert [child.returncode for child in started] == [-signal.SIGKILL, 0, 0]
    shards_there = -(-sum(len(text) for text in documents(DOCUMENTS, 2)) // SHARD)
    assert min(said[1:]) >= 1 and sum(said) <= shards_there
    assert prepared(here) == prepared(data)


def test_a_fault_that_another_process_found_is_told(data: DataConfig, tmp_path: Path) -> None:
    """Its tokens are gone; this process says so, instead of beginning anew."""
    here = replace(data, cache_dir=str(tmp_path))
    keep = Shard.keep

    def gone(self: Shard) -> None:
        keep(self)
        shutil.rmtree(self._folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shard, "keep", gone)
        with pytest.raises(UserError, match=r"^the tokens in .* were removed by another process, .*see what it says"):
            prepare(here, 300, None, print)
    assert prepared(here) == prepared(data)


def test_too_small_a_disk_is_said_before_and_a_full_one_keeps_what_is_whole(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = replace(data, cache_dir=str(tmp_path))
    interrupt(here, "train", 100)
    left = whole(here)
    usage = namedtuple("usage", ["free"])
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, "TOKEN_CHARACTERS", 1 / 10**6)
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**7))
        message = r"^data.cache_dir \(.*\) cannot be written to: the tokens take about .* GB more, and 0.01 GB are free"
        with pytest.raises(UserError, match=message):
            prepare(here, 300, None, print)

    def full(self: Shard) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Shard, "keep", full)
        with pytest.raises(
            UserError, match=r"^data.cache_dir \(.*\) cannot be written to: No space left on device; name"
        ):
            prepare(here, 300, None, print)
    assert whole(here) == left
    assert prepared(here) == prepared(data)


def test_progress_is_said(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "SECONDS", 0)
    lines: list[str] = []
    prepared(replace(data, cache_dir=str(tmp_path)), lines)
    said = [line for line in lines if line.startswith("tokenizing: ")]
    pattern = r"tokenizing: [\d,]+ documents, 0 of 0 million characters, [\d.]+ million a second, about [\d:]+ left"
    assert len(said) > 10 and all(re.fullmatch(pattern, line) for line in said)
