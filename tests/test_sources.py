"""Text from the standard library, from files and from a Hub (a small one of ours), and all that is wrong with them."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from jaxlm.config import DataConfig
from jaxlm.data import tokens
from jaxlm.data.documents import Document, split_at
from jaxlm.data.held_out import HeldOut
from jaxlm.data.shards import Shard
from jaxlm.data.sources import Source, open_source
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokens import cache_root, prepare
from jaxlm.errors import UserError

LINES = [f"document {i}: {'some words to tokenize ' * (i % 7 + 1)}" for i in range(40)]


def files(*paths: Path | str, **more) -> DataConfig:
    return DataConfig(train_files=tuple(map(str, paths)), **more)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def whole(data: DataConfig) -> Source:
    """The source of `data`, of which nothing is held out."""
    return open_source(DataConfig(**{**vars(data), "validation_fraction": 0}))


def texts(documents: Iterable[Document]) -> list[str]:
    return [document.text for document in documents]


def texts_of(data: DataConfig) -> list[str]:
    return texts(whole(data).parts["train"]())


def held_out(documents: Iterable[str], fraction: float, where: str = "x") -> HeldOut:
    """The split of documents whose places are their numbers."""
    numbered = [Document(text, str(i)) for i, text in enumerate(documents)]
    return HeldOut(lambda: iter(numbered), fraction, where)


def table(texts: list[str | None]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(
        pyarrow.table({"text": texts, "number": list(range(len(texts)))}),
        buffer,
        use_dictionary=False,
        compression="none",
    )
    return buffer.getvalue()


# ---- Held-out text


def test_held_out_documents_follow_their_hash() -> None:
    split = held_out(LINES, 0.1)
    by_hash = sorted(LINES, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert set(texts(split.of("validation"))) == set(by_hash[:4])
    assert [text for text in LINES if text in set(by_hash[4:])] == texts(split.of("train")) == texts(split.of("train"))
    backwards = held_out(LINES[::-1], 0.1)
    assert sorted(texts(backwards.of("validation"))) == sorted(texts(split.of("validation"))), (
        "the order of the documents changed the split"
    )


@pytest.mark.parametrize(("n", "fraction", "number"), [(10, 0.25, 3), (30, 0.05, 2), (29, 0.05, 1), (20, 0.05, 1)])
def test_number_of_held_out_documents(n: int, fraction: float, number: int) -> None:
    split = held_out(LINES[:n], fraction)
    assert (len(list(split.of("validation"))), len(list(split.of("train")))) == (number, n - number)


def test_duplicates_stay_together() -> None:
    by_hash = sorted(LINES, key=lambda text: hashlib.sha256(text.encode()).digest())
    twice = [by_hash[0], *by_hash[5:], by_hash[0]]
    assert texts(held_out(twice, 2 / len(twice)).of("validation")) == [by_hash[0]] * 2


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.7])
def test_few_documents_hold_out_the_end_of_the_text(fraction: float) -> None:
    text = "".join(f"line {i} of a single document\n" for i in range(200))
    split = held_out([text], fraction)
    (train,), (validation,) = texts(split.of("train")), texts(split.of("validation"))
    assert train + validation == text
    assert train.endswith("\n")
    assert abs(len(validation) - fraction * len(text)) < 20


def test_cut_falls_into_the_right_one_of_few_documents() -> None:
    split = held_out(["a" * 500, "", "b " * 100, "c" * 20], 0.1)
    assert list(split.of("train")) == [Document("a" * 500, "0"), Document("b " * 74, "2")]
    validation = [Document("b " * 26, "2", part="validation"), Document("c" * 20, "3", part="validation")]
    assert list(split.of("validation")) == validation
    assert list(split.both()) == [Document("a" * 500, "0"), Document("b " * 74, "2"), *validation]


def test_short_documents_are_not_held_out() -> None:
    """The next ones by their hash are, however many are passed over; never all of the long ones.

    Of a text of short documents, only as many are tokenized as it takes to know that.
    """
    by_hash = sorted(LINES, key=lambda text: hashlib.sha256(text.encode()).digest())
    asked = list[set[str]]()

    def passed_over(short: set[str]) -> tuple[bool, list[str]]:
        split = held_out(LINES, 0.1)
        asked.clear()

        def lengths(found: Iterator[Document]) -> Iterator[int]:
            chosen = texts(found)
            asked.append(set(chosen))
            return (1 if text in short else 10 for text in chosen)

        changed = split.pass_over_short(10, lengths)
        assert sorted(texts(split.of("train")) + texts(split.of("validation"))) == sorted(LINES)
        return changed, sorted(texts(split.of("validation")), key=by_hash.index)

    assert passed_over(set()) == passed_over(set(by_hash)) == (False, by_hash[:4])
    assert passed_over(set(by_hash[1:3])) == (True, [by_hash[0], *by_hash[3:6]])
    assert passed_over(set(by_hash[:4] + by_hash[8:12] + by_hash[16:])) == (True, by_hash[4:8])
    assert asked == [set(by_hash[:16])]
    assert passed_over(set(by_hash[:13])) == (True, by_hash[13:17])
    assert asked == [set(by_hash[:16]), set(by_hash[16:])]
    assert passed_over(set(by_hash[:37])) == (True, [by_hash[37]])
    assert passed_over(set(by_hash[4:])) == (True, by_hash[:2])


def test_text_without_white_space_is_cut_all_the_same() -> None:
    split = held_out(["x" * 100], 0.05)
    assert (texts(split.of("train")), texts(split.of("validation"))) == (["x" * 95], ["x" * 5])


@pytest.mark.parametrize("documents", [[], [""], ["a"], [""] * 50, ["a"] + [""] * 50])
def test_too_little_text_to_split(documents: list[str]) -> None:
    with pytest.raises(UserError, match=r"^data\.train_files: \d+ documents .* data\.validation_fraction \(0\.05\)"):
        list(held_out(documents, 0.05, "data.train_files").of("train"))


@pytest.mark.parametrize("later", [LINES[:-1], [*LINES, "more"], [LINES[0][:5], *LINES[1:]], []])
@pytest.mark.parametrize("fraction", [0.001, 0.1])
def test_text_that_changes_while_it_is_read(later: list[str], fraction: float) -> None:
    passes = iter([LINES, later, later])

    def documents() -> Iterator[Document]:
        yield from (Document(text, "") for text in next(passes))

    split = HeldOut(documents, fraction, "data.train_files")
    with pytest.raises(UserError, match=r"^data\.train_files: the text changed while it was read"):
        list(split.of("train"))


# ---- The standard library


def test_standard_library() -> None:
    data = DataConfig(dataset_name="python-stdlib")
    source, again = open_source(data), open_source(data)
    assert source.name.startswith("python-stdlib 3.")
    assert source.fingerprint == again.fingerprint
    train, validation = texts(source.parts["train"]()), texts(source.parts["validation"]())
    assert 0.04 < len(validation) / len(train) < 0.06
    assert not set(train) & set(validation)
    library = Path(sysconfig.get_path("stdlib"))
    everything = set(train) | set(validation)
    assert (library / "dataclasses.py").read_bytes().decode() in everything
    assert (library / "json" / "decoder.py").read_bytes().decode() in everything
    for left_out in [*library.glob("idlelib/run.py"), *library.glob("test/test_json/*.py")]:
        assert left_out.read_bytes().decode() not in everything - {""}


# ---- Own files


def test_formats_give_the_same_documents(tmp_path) -> None:
    given = ["plain", 'with "quotes", commas\r\nand lines\n', "é 漢 🙂", "x" * 200_000, "<bos> \0"]
    write_jsonl(tmp_path / "a.jsonl", given)
    quoted = ['"' + text.replace('"', '""') + '"' for text in given]
    (tmp_path / "a.csv").write_bytes(("id,text\r\n" + "".join(f"{i},{q}\r\n" for i, q in enumerate(quoted))).encode())
    parquet.write_table(pyarrow.table({"id": range(len(given)), "text": given}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert texts_of(files(tmp_path / name)) == given, name
    rows = [{"text": text} for text in given]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.tsv").write_bytes(("id\ttext\r\n" + "".join(f"{i}\t{q}\r\n" for i, q in enumerate(quoted))).encode())
    for name in ("a.json", "b.json", "a.tsv"):
        assert texts_of(files(tmp_path / name)) == given, name
    (tmp_path / "a.TXT").write_bytes(given[1].encode())
    assert texts_of(files(tmp_path / "a.TXT")) == [given[1]]


def test_byte_order_marks_are_no_text(tmp_path) -> None:
    mark = "\ufeff".encode()
    for name, content in {"a.txt": b"words", "a.jsonl": b'{"text": "words"}\n', "a.csv": b"text\nwords\n"}.items():
        (tmp_path / name).write_bytes(mark + content)
        assert texts_of(files(tmp_path / name)) == ["words"], name


def test_other_column(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("text,body\n1,one\n2,two\n")
    assert texts_of(files(tmp_path / "a.csv", text_column="body")) == ["one", "two"]


def test_patterns_are_sorted_and_names_do_not_matter(tmp_path) -> None:
    for name in "bac":
        (tmp_path / f"{name}.txt").write_text(name * 9)
    assert texts_of(files(tmp_path / "*.txt")) == ["a" * 9, "b" * 9, "c" * 9]
    before = open_source(files(tmp_path / "*.txt")).fingerprint
    (tmp_path / "c.txt").rename(tmp_path / "d.txt")
    assert open_source(files(tmp_path / "*.txt")).fingerprint == before
    (tmp_path / "d.txt").write_text("other")
    assert open_source(files(tmp_path / "*.txt")).fingerprint != before


def test_own_validation_files(tmp_path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", LINES)
    validation = write_jsonl(tmp_path / "held.jsonl", ["held out"])
    source = open_source(files(train, validation_files=(str(validation),)))
    assert (texts(source.parts["train"]()), texts(source.parts["validation"]())) == (LINES, ["held out"])


ZST = pyarrow.Codec("zstd").compress(b'{"text": "words"}\n', asbytes=True)


def test_compressed_files(tmp_path) -> None:
    line = b'{"text": "words"}\n'
    for name, content in {
        "a.jsonl.gz": gzip.compress(line) * 2,  # both parts of such files count
        "b.ndjson.BZ2": bz2.compress(line * 2),
        "c.json.xz": lzma.compress(line * 2),
        "d.jsonl.zst": ZST * 2,
    }.items():
        (tmp_path / name).write_bytes(content)
        assert texts_of(files(tmp_path / name)) == ["words"] * 2, name
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress(b"text\nwords\n"))
    (tmp_path / "enwik8.gz").write_bytes(gzip.compress(line))
    assert texts_of(files(tmp_path / "e*")) == ["words", line.decode()]


def test_folder_is_read_with_its_subfolders(tmp_path) -> None:
    for name in ("b/x.md", "b/a.py", "a.txt", ".git/c.txt", "image.png", "b/.hidden.txt", "c.tsv", "Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text\n{name}\n")
    source = whole(files(tmp_path))
    assert texts(source.parts["train"]()) == ["text\na.txt\n", "text\nb/a.py\n", "text\nb/x.md\n", "c.tsv"]
    assert source.name == f"4 files ({tmp_path / 'a.txt'} ...), 2 of other kinds left out"


def test_struct_with_the_same_dotted_name(tmp_path) -> None:
    parquet.write_table(pyarrow.table({"a": [{"b": "no"}], "a.b": ["words"]}), tmp_path / "a.parquet")
    assert texts_of(files(tmp_path / "a.parquet", text_column="a.b")) == ["words"]


def test_file_named_twice_is_read_once(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    source = whole(files(tmp_path / "a.txt", tmp_path / "*.txt"))
    assert texts(source.parts["train"]()) == ["a"]
    assert source.name == f"{tmp_path / 'a.txt'}, 2 named twice, read once"


def test_validation_file_that_is_trained_on_is_refused(tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "copy.txt").write_text("b")
    for held_out, message in (("b", r"b\.txt\): is in data.train_files, too; leave"), ("copy", r"too, as .*/b\.txt;")):
        data = files(tmp_path / "[ab].txt", validation_files=(str(tmp_path / f"{held_out}.txt"),))
        with pytest.raises(UserError, match=rf"^data\.validation_files \(.*{message}"):
            open_source(data)
        assert texts(open_source(data, evaluating=True).parts["validation"]()) == ["b"], (
            "to evaluate on it is no mistake"
        )


def test_the_first_documents(tmp_path) -> None:
    """Of training and of validation text each; what is left out does not count, and what is behind is not looked at."""
    write_jsonl(tmp_path / "a.jsonl", ["one", "", "two", "three"])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("bad\n")
    write_jsonl(tmp_path / "b.jsonl", ["four", "five", "six"])
    given = {"validation_files": (str(tmp_path / "b.jsonl"),), "max_documents": 2}
    source = open_source(files(tmp_path / "a.jsonl", **given))
    assert {part: texts(read()) for part, read in source.parts.items()} == {
        "train": ["one", "two"],
        "validation": ["four", "five"],
    }
    assert source.left_out["training text"].empty == 1 and source.name.endswith(", 2 documents at most")
    split = open_source(files(tmp_path / "b.jsonl", validation_fraction=0.5, max_documents=2))
    assert sorted(text for read in split.parts.values() for text in texts(read())) == ["five", "four"]
    assert texts_of(files(tmp_path / "b.jsonl", max_documents=9)) == ["four", "five", "six"]
    with pytest.raises(UserError, match="line 5: bad JSON"):
        texts_of(files(tmp_path / "a.jsonl", max_documents=4))


def test_separator_splits_documents(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one --- one\r\n ---\r\n\r\n---\n<|endoftext|>two<|endoftext|>\nthree")
    line, marker = (files(tmp_path / "a.txt", document_separator=x) for x in ("---", "<|endoftext|>"))
    assert texts_of(line) == ["one --- one\r\n", "<|endoftext|>two<|endoftext|>\nthree"]
    source = whole(marker)
    assert [text.strip() for text in texts(source.parts["train"]())] == [
        "one --- one\r\n ---\r\n\r\n---",
        "two",
        "three",
    ]
    assert [document.place.rpartition(": ")[2][-6:] for document in source.parts["train"]()] == [
        f"part {i}" for i in (1, 2, 3)
    ]
    unused = whole(files(tmp_path / "a.txt", document_separator="***"))
    assert len(texts(unused.parts["train"]())) == 1
    assert unused.left_out["training text"].lines("text") == [
        "text: data.document_separator (***) is not in it: nothing was split"
    ]


def test_that_nothing_was_split_is_said_where_it_is_so(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("\n---\n".join(LINES))
    for separator, count in (("---", 0), ("***", 1)):
        said: list[str] = []
        data = files(tmp_path / "a.txt", document_separator=separator, cache_dir=str(tmp_path / "cache"))
        prepare(data, 300, None, said.append)
        assert len([line for line in said if "nothing was split" in line]) == count, said


MARKS = ["-", "* *", "<s>", "[]", " ", "\t", "\n", "\r\n", "\r", "a", "é"]


@given(
    separator=st.sampled_from(["", "-", "* *", "<s>", "[]"]),
    text=st.lists(st.sampled_from(MARKS), max_size=12).map("".join),
)
def test_separators_are_those_of_a_pattern(separator: str, text: str) -> None:
    anywhere = f"|{re.escape(separator)}" if separator in ("<s>", "[]") else ""
    pattern = re.compile(rf"^[ \t]*{re.escape(separator)}[ \t]*(?:\r?\n|\Z){anywhere}", re.MULTILINE)
    found = split_at(separator, io.StringIO(text))
    assert [part for part in found if part.strip()] == [part for part in pattern.split(text) if part.strip()]


@pytest.mark.parametrize("piece", [1, 7, 30, 2**24])
def test_long_texts_are_read_in_pieces(tmp_path, monkeypatch, piece: int) -> None:
    """What is in them does not depend on their size; a byte that is not UTF-8 costs its document alone."""
    monkeypatch.setattr("jaxlm.data.files.PIECE", piece)
    text = "\ufeffone\r\n---\ntwo é\n\n---\n \n---\nthree\n  ---  \nfour --- \r\nfour".encode()
    contents = {"a.txt": text, "bad.txt": text.replace(b"three", b"\n\xff"), "cut.gz": gzip.compress(text)[:-9]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    source = whole(files(tmp_path / "a.txt", document_separator="---"))
    assert texts(source.parts["train"]()) == ["one\r\n", "two é\n\n", "three\n", "four --- \r\nfour"]
    assert texts_of(files(tmp_path / "a.txt")) == [text.decode().removeprefix("\ufeff")]
    bad = whole(files(tmp_path / "bad.txt", document_separator="---", on_bad_document="skip"))
    assert texts(bad.parts["train"]()) == ["one\r\n", "two é\n\n", "four --- \r\nfour"]
    (said,) = bad.left_out["training text"].lines("text")
    assert "part 3 is not UTF-8 (byte 0xff at character 1 of its line 2)" in said
    assert not source.left_out["training text"].lines("text")
    with pytest.raises(UserError, match="is damaged"):
        texts_of(files(tmp_path / "cut.gz"))


WRONG = {
    "none.txt": (None, r"none\.txt\) does not exist"),
    "*.nothing": (None, r"\*\.nothing\) matches no file"),
    "a" * 300 + ".txt": (None, r"aaa\.txt\) does not exist, or is out of reach"),
    "": (None, r"is a folder without texts; name \.jsonl, .*\.md"),
    "a.doc": (b"x", r"a\.doc\) has an unknown extension \(\.doc\); name \.jsonl, .*\.md"),
    "a.parquet.gz": (b"x", r"has an unknown extension \(\.gz\); .* or \.parquet$"),
    "blank.jsonl": (b"\n\n", r"blank\.jsonl\) holds no text"),
    "nothing.jsonl": (b'{"text": ""}\n' * 3, r"nothing\.jsonl\) holds no text"),
    "key.csv": (b"body,n\n1,2\n", r"^data\.text_column \(text\): not in line 1 of .*key\.csv\).*: body, n"),
    "latin_header.csv": (b"text,\xe9\nb,c\n", r"header\.csv\): line 1 is not UTF-8 \(byte 0xe9 at character 5\)"),
    "wide.csv": ("text\nabc\n".encode("utf-16"), r"wide\.csv\): line 1 is not UTF-8"),
    "quote_header.csv": (b'text,"a\nb', r"quote_header\.csv\): line 1: bad CSV: unexpected end of data"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_file_is_named(tmp_path, name: str) -> None:
    content, message = WRONG[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts_of(files(path))
    assert str(caught.value).startswith("data.")
    assert "\n" not in str(caught.value)


def test_wrong_parquet_column(tmp_path) -> None:
    parquet.write_table(pyarrow.table({"body": ["a"], "text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"^data\.text_column \(bod\): not in .* \(did you mean body\?\); there is: body, text"
    ):
        texts_of(files(tmp_path / "a.parquet", text_column="bod"))
    with pytest.raises(UserError, match=r"row 1 holds int, not text"):
        texts_of(files(tmp_path / "a.parquet"))


GOOD = '{"text": "good words"}\n'
# A file with one good document or none, what is said of the bad one, and what is left without it.
BAD: dict[str, tuple[bytes, str, list[str]]] = {
    "empty.txt": (b"", r"empty\.txt\) is empty", []),
    "latin.txt": (
        "abc\ndé\n".encode("latin-1"),
        r"latin\.txt\) is not UTF-8 \(byte 0xe9 at character 2 of its line 2\)",
        [],
    ),
    "cut.txt": ("漢".encode()[:-1], r"cut\.txt\) is not UTF-8 \(byte 0xe6", []),
    "latin.jsonl": (
        GOOD.encode() + b'{"text": "\xe9"}\n',
        r"latin\.jsonl\): line 2 is not UTF-8 \(byte 0xe9 at character 11\)",
        ["good words"],
    ),
    "half_character.jsonl": (GOOD.encode() + b'{"text": "\xc3', r"line 2 is not UTF-8 \(byte 0xc3", ["good words"]),
    "cut.jsonl": (
        b"\n" + GOOD.encode() + b'{"text": ',
        r"cut\.jsonl\): line 3: bad JSON at character 10",
        ["good words"],
    ),
    "list.jsonl": (b'["a"]\n' + GOOD.encode(), r"list\.jsonl\): line 1 is not a JSON object", ["good words"]),
    "deep.jsonl": (b"[" * 100_000 + b"\n" + GOOD.encode(), r"line 1: JSON out of bounds: .*recursion", ["good words"]),
    "digits.jsonl": (b"1" * 5000 + b"\n" + GOOD.encode(), r"line 1: JSON out of bounds: .*4300", ["good words"]),
    "key.jsonl": (
        b'{"texts": "a", "n": 1}\n' + GOOD.encode(),
        r"^data\.text_column \(text\): .*line 1 \(did you mean texts\?\).*: texts, n",
        ["good words"],
    ),
    "number.jsonl": (
        GOOD.encode() + b'{"text": 3}\n',
        r"^data\.text_column \(text\): .*line 2 holds int, not text",
        ["good words"],
    ),
    "half.jsonl": (
        b'{"text": "\\ud800"}\n' + GOOD.encode(),
        r"half\.jsonl\): line 1: '\\ud800' is half a surrogate pair",
        ["good words"],
    ),
    "list.json": (b'[{"text": "good words"}, 3]', r"list\.json\): item 2 is not a JSON object", ["good words"]),
    "cut.json": (b'[{"text":\n"a"', r"cut\.json\): bad JSON at character 14", []),
    "a.txt.gz": (gzip.compress(b"words" * 99)[:-9], r"a\.txt\.gz\) is damaged: Compressed file ended", []),
    "b.txt.gz": (gzip.compress(b"words")[:10] + b"\xff" * 20, r"b\.txt\.gz\) is damaged: ", []),
    "a.txt.bz2": (b"words", r"a\.txt\.bz2\) is damaged: Invalid data", []),
    "a.jsonl.xz": (b"words" * 9, r"a\.jsonl\.xz\) is damaged: Input format", []),
    "a.txt.zst": (ZST[:-4], r"a\.txt\.zst\) is damaged: Truncated", []),
    "latin.csv": (b"text\nabc\n\xe9\nd\n", r"latin\.csv\): line 3 is not UTF-8 \(byte 0xe9", ["abc", "d"]),
    "short.csv": (b"n,text\n1\n2,b\n", r"short\.csv\): line 2 holds NoneType, not text", ["b"]),
    "wide.csv": (b'text\n"a\nb",\nc\n', r"wide\.csv\): line 2 has more fields than the header", ["c"]),
    "quote.csv": (b'text\nb\n"a\nc\n', r"quote\.csv\): line 3 and all after it: bad CSV: unexpected end", ["b"]),
    "mark.csv": (b'text\n"a"b\nc\n', r"mark\.csv\): line 2: bad CSV: ',' expected after '\"'", ["c"]),
    "bad.parquet": (b"PAR1 not really", r"bad\.parquet\) is not a readable Parquet file", []),
    "null.parquet": (table(["a", None]), r"\(text\): .*null\.parquet\): row 2 holds NoneType, not text", ["a"]),
    "cut.parquet": (table(["a", "b"])[:-20], r"cut\.parquet\) is not a readable Parquet file", []),
    "damaged.parquet": (
        table(["a" * 1500, *map(str, range(3000))]).replace(b"1999", b"19\xff9"),
        r"damaged\.parquet\): row 2001 is not UTF-8 \(byte 0xff",
        ["a" * 1500, *(str(i) for i in range(3000) if i != 1999)],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_document_stops_or_is_skipped(tmp_path, name: str) -> None:
    content, message, rest = BAD[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "other.txt").write_text("other words")
    both = files(tmp_path / name, tmp_path / "other.txt")
    with pytest.raises(UserError, match=message) as caught:
        texts_of(both)
    assert str(caught.value).startswith("data.")
    assert str(caught.value).endswith("; mend it, or set data.on_bad_document skip to leave out bad documents")
    assert "\n" not in str(caught.value)

    skipping = whole(DataConfig(**{**vars(both), "on_bad_document": "skip"}))
    for _ in range(2):  # what was left out is counted anew in each pass
        assert texts(skipping.parts["train"]()) == [*rest, "other words"]
        (line,) = skipping.left_out["training text"].lines("training text")
        assert re.match(r"training text: 1 bad document\(s\) left out: .", line)
        assert re.search(message.removeprefix("^"), line)


def test_of_many_bad_documents_the_first_are_named(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD + '{"text": 1}\n{"text": ""}\n' * 1200 + GOOD)
    source = whole(files(tmp_path / "a.jsonl", on_bad_document="skip"))
    assert texts(source.parts["train"]()) == ["good words"] * 2
    empty, bad = source.left_out["training text"].lines("training text")
    assert empty == "training text: 1,200 empty documents left out"
    assert re.search(r"^training text: 1,200 bad .* line 2 holds int.* line 4 .* line 6 .*; and 1,197 more$", bad)


def test_nothing_but_bad_documents(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n' * 4)
    message = r"a\.jsonl\) holds no text; 4 bad document\(s\) left out: .*line 1 holds int"
    with pytest.raises(UserError, match=message):
        texts_of(files(tmp_path / "a.jsonl", on_bad_document="skip"))


def test_places_are_lines_and_rows(tmp_path) -> None:
    for name, content, places in (
        ("a.jsonl", b'{"text": "a"}\r\n\r\n{"text": "b"}', ["line 1", "line 3"]),
        ("a.csv", b'text\r\n"a\r\na"\r\n\r\nb', ["line 2", "line 5"]),
        ("a.parquet", table(["a", "b"]), ["row 1", "row 2"]),
    ):
        (tmp_path / name).write_bytes(content)
        found = [document.place for document in whole(files(tmp_path / name)).parts["train"]()]
        assert found == [f"data.train_files ({tmp_path / name}): {place}" for place in places]


def test_old_line_ends(tmp_path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\ra\rb\r")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\r{"text": "b"}\r')
    assert texts_of(files(tmp_path / "a.csv")) == texts_of(files(tmp_path / "a.jsonl")) == ["a", "b"]


# ---- Tokens on disk


@pytest.fixture
def data(tmp_path) -> DataConfig:
    return files(write_jsonl(tmp_path / "a.jsonl", LINES), cache_dir=str(tmp_path / "cache"))


def test_prepared_tokens_are_the_text(data: DataConfig) -> None:
    lines: list[str] = []
    prepared = prepare(data, 300, None, lines.append)
    source = open_source(data)
    for documents, wanted in (
        (prepared.train, texts(source.parts["train"]())),
        (prepared.validation, texts(source.parts["validation"]())),
    ):
        assert len(documents) == len(wanted)
        assert documents.tokens.dtype == "uint16"
        assert documents.offsets.dtype == documents.document_bytes.dtype == "int64"
        for i, text in enumerate(wanted):
            ids = documents.tokens[documents.offsets[i] : documents.offsets[i + 1]]
            assert (ids[0], ids[-1]) == (1, 2)
            assert prepared.tokenizer.decode(ids) == text
            assert documents.document_bytes[i] == len(text.encode())
        assert documents.kept_bytes(0) == sum(len(text.encode()) for text in wanted)
        sizes = [len(prepared.tokenizer.encode(text)) + 2 for text in wanted]
        kept = [len(text.encode()) for text, size in zip(wanted, sizes, strict=True) if size >= 40]
        assert documents.kept_bytes(40) == sum(kept)
    assert prepared.source_fingerprint == source.fingerprint
    assert any("trained 300 tokens" in line for line in lines)


def test_second_start_uses_the_cache(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(data, 300, None, print)
    lines: list[str] = []
    monkeypatch.setattr(Tokenizer, "train", None)
    monkeypatch.setattr(tokens, "make_shards", None)
    again = prepare(data, 300, None, lines.append)
    assert [line for line in lines if line.startswith("tokenized text: cached")]
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    resumed = prepare(data, 300, first.tokenizer, lines.append)
    assert resumed.train.folder == first.train.folder, "a resumed run tokenizes again"


@pytest.mark.parametrize(
    "change",
    [
        {"validation_fraction": 0.2},
        {"text_column": "body"},
        {"vocab_size": 290},
        {"on_bad_document": "skip"},
        {"document_separator": "<>"},
        {"min_length": 30},
        {"max_documents": 10},
    ],
)
def test_settings_that_matter_make_new_tokens(data: DataConfig, tmp_path, change: dict) -> None:
    rows = [json.dumps({"text": text, "body": text.upper()}) for text in LINES]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    first = prepare(data, 300, None, print)
    vocab_size = change.pop("vocab_size", 300)
    other = prepare(DataConfig(**{**vars(data), **change}), vocab_size, None, print)
    assert other.train.folder != first.train.folder


def test_settings_of_packing_make_no_new_tokens(data: DataConfig) -> None:
    first = prepare(data, 300, None, print)
    other = DataConfig(**{**vars(data), "max_length": 64, "packing_strategy": "concat"})
    assert prepare(other, 300, None, print).train.folder == first.train.folder


def test_held_out_documents_have_the_least_length(data: DataConfig) -> None:
    """What decides the rows beside the text is in the fingerprint, also when it comes from the cache."""
    first = prepare(data, 300, None, print)
    least = DataConfig(**{**vars(data), "min_length": int(np.diff(first.validation.offsets).max()) + 1})
    for _ in range(2):
        again = prepare(least, 300, first.tokenizer, print)
        assert (np.diff(again.validation.offsets) >= least.min_length).all()
        assert len(again.validation) == len(first.validation)
        assert again.source_fingerprint == first.source_fingerprint + "+long"


@pytest.mark.parametrize("foreign", [False, True])
def test_markers_in_the_text_are_said(tmp_path, foreign: bool) -> None:
    """To a tokenizer trained here they are characters, to others their own are tokens, as in transformers 5.24."""
    given = ["<|im_start|>user <bos> words<|im_end|>", "more words<|im_end|>"]
    text = write_jsonl(tmp_path / "a.jsonl", given)
    tokenizer = Tokenizer.train(LINES, 300)
    if foreign:
        tokenizer._backend.add_special_tokens(["<|im_end|>"])
        tokenizer = Tokenizer.from_json(tokenizer.to_json())
    data = files(text, validation_fraction=0, cache_dir=str(tmp_path))
    lines: list[str] = []
    prepared = prepare(data, 300, tokenizer, lines.append)
    ids = prepared.train.tokens.tolist()
    if foreign:
        assert (ids.count(1), ids.count(300), ids.count(2)) == (3, 2, 2)
        assert re.match(r"3 markers .*: <\|im_end\|> \(2\), <bos> \(1\); each read as that token", lines[-2])
        assert re.match(r"1 markers .*: <\|im_start\|> \(1\); read as characters, not as tokens", lines[-1])
        assert prepared.source_fingerprint.endswith("+special")
    else:
        assert (ids.count(1), ids.count(2)) == (2, 2)
        assert re.match(r"4 markers .*: <\|im_end\|> \(2\), .*as characters.*data.document_separator", lines[-1])
        assert "+" not in prepared.source_fingerprint


def test_two_at_once_both_succeed(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two runs that start on the same new text, one is at its shard, and the other waits and uses that."""
    keep, calls, begun = Shard.keep, [], threading.Event()

    def slow(self):
        calls.append(self)
        begun.set()
        time.sleep(0.5)
        keep(self)

    monkeypatch.setattr(Shard, "keep", slow)
    lines: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(prepare, data, 300, None, print)
        assert begun.wait(30)
        second = prepare(data, 300, None, lines.append)
        assert second.train.tokens.tolist() == first.result().train.tokens.tolist()
    assert len(calls) == 2  # of train, and of validation
    assert "tokenizing: waits for another process, which is at shard 0 of train" in lines
    assert [path.name for path in (cache_root(data) / "tokens").iterdir()] == [second.train.folder.name]


def test_damaged_cache_is_named(data: DataConfig) -> None:
    folder = prepare(data, 300, None, print).train.folder
    for split in ("train", "validation"):
        path = folder / f"{split}.tokens"
        whole = path.read_bytes()
        path.write_bytes(whole[:-2])
        with pytest.raises(UserError, match=rf"{folder.name}\) are damaged \(.* lengths\); delete that folder"):
            prepare(data, 300, None, print)
        path.write_bytes(whole)
    (folder / "train.offsets.npy").write_bytes(b"")
    with pytest.raises(UserError, match=rf"{folder.name}\) are damaged \(.*\); delete that folder"):
        prepare(data, 300, None, print)


WORDS_ONLY = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"<bos>": 0, "<eos>": 1, "some": 2, "words": 3}, "unk_token": "<unk>"},
}


def test_document_that_cannot_be_tokenized(tmp_path) -> None:
    (tmp_path / "words.json").write_text(json.dumps(WORDS_ONLY))
    text = write_jsonl(tmp_path / "a.jsonl", ["some words", "other", "", "words", "more"] * 3)
    known = write_jsonl(tmp_path / "b.jsonl", ["words"])
    here = {
        "validation_files": (str(known),),
        "cache_dir": str(tmp_path),
        "tokenizer_path": str(tmp_path / "words.json"),
    }
    message = (
        r"^data\.train_files \(.*a\.jsonl\): line 2 cannot be tokenized: .*UNK.*; mend it, or set data\.on_bad_doc"
    )
    with pytest.raises(UserError, match=message):
        prepare(files(text, **here), 300, None, print)
    for _ in range(2):  # read, and cached
        lines: list[str] = []
        prepared = prepare(files(text, **here, on_bad_document="skip"), 300, None, lines.append)
        assert prepared.train.tokens.tolist() == [0, 2, 3, 1, 0, 3, 1] * 3
        assert prepared.train.document_bytes.tolist() == [10, 5] * 3
        empty, bad = lines[-2:]
        assert empty == "training text: 3 empty documents left out"
        assert re.match(
            r"tokenizing train: 6 bad document\(s\) left out: .* line 2 .* line 5 .* line 7 .*; and 3 more$", bad
        )
    other = here | {"validation_files": (str(write_jsonl(tmp_path / "c.jsonl", ["other"])),)}
    with pytest.raises(UserError, match=r"^no document of the validation text can be tokenized: .*line 1 cannot"):
        prepare(files(text, **other, on_bad_document="skip"), 300, None, print)


def test_text_of_which_the_tokenizer_knows_nothing(tmp_path) -> None:
    model = {"type": "BPE", "vocab": {"<bos>": 0, "<eos>": 1, "a": 2}, "merges": []}
    (tmp_path / "a.json").write_text(json.dumps(WORDS_ONLY | {"model": model}))
    tokenizer = Tokenizer.load(tmp_path / "a.json")
    assert [ids.tolist() for ids in tokenizer.encode_documents(["a", " \n"])] == [[0, 2, 1], [0, 1]]
    with pytest.raises(UserError, match=r"^cannot be tokenized: the tokenizer has no token"):
        tokenizer.encode_documents(["a", "漢"])


def test_own_tokenizer(data: DataConfig, tmp_path) -> None:
    Tokenizer.train(["own"], 270).save(tmp_path / "own")
    own = DataConfig(**{**vars(data), "tokenizer_path": str(tmp_path / "own" / "tokenizer.json")})
    assert prepare(own, 300, None, print).tokenizer.fingerprint == Tokenizer.load(tmp_path / "own").fingerprint


def test_cache_folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_root(DataConfig()) == tmp_path / "x" / "jaxlm"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(DataConfig()) == tmp_path / ".cache" / "jaxlm"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^data\.cache_dir \(.*file/sub\) cannot be written to"):
        cache_root(DataConfig(cache_dir=str(tmp_path / "file" / "sub")))


# ---- The Hub


@pytest.mark.parametrize(
    ("name", "message"),
    [("wikitxt", r"namespace/name \(did you mean wikitext\?\)"), ("a/b/c", "namespace/name"), ("", "namespace/name")],
)
def test_name_that_no_hub_takes(name: str, message: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^data\.dataset_name \({name}\) .*{message}.*--data\.train_files"):
        open_source(DataConfig(dataset_name=name))


def test_local_folder_is_no_hub_name(tmp_path) -> None:
    with pytest.raises(UserError, match=r"is a local path; use data\.train_files"):
        open_source(DataConfig(dataset_name=str(tmp_path)))


COMMIT = "0123456789abcdef0123456789abcdef01234567"
README = """---
configs:
- config_name: plain
  data_files:
  - {split: train, path: train.parquet}
  - {split: validation, path: validation.parquet}
- config_name: bare
  data_files:
  - {split: train, path: train.parquet}
---
"""
HUB_FILES = {"README.md": README.encode(), "train.parquet": table(LINES), "validation.parquet": table(["v1", "v2"])}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as `datasets` asks for, with the one data set test/tiny."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content_Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def entry(self, name: str) -> dict:
        digest = hashlib.sha1(HUB_FILES[name]).hexdigest()
        return {"type": "file", "path": name, "size": len(HUB_FILES[name]), "oid": digest}

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if "test/tiny" not in path:
            self.answer(401, b"{}", X_Error_Code="RepoNotFound")
        elif re.fullmatch("/api/datasets/test/tiny(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in HUB_FILES]
            about = {"id": "test/tiny", "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
            self.answer(200, json.dumps(about).encode())
        elif re.fullmatch("/api/datasets/test/tiny/tree/[^/]+/?", path):
            self.answer(200, json.dumps([self.entry(name) for name in HUB_FILES]).encode())
        elif "/resolve/" in path and (name := path.rpartition("/")[2]) in HUB_FILES:
            self.answer(200, HUB_FILES[name], ETag=f'"{self.entry(name)["oid"]}"', X_Repo_Commit=COMMIT)
        else:
            self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        paths = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self.answer(200, json.dumps([self.entry(name) for name in paths if name in HUB_FILES]).encode())


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


PROGRAM = """
import json, sys
from jaxlm.config import DataConfig
from jaxlm.data.sources import open_source
from jaxlm.errors import UserError
for options in json.loads(sys.argv[1]):
    try:
        evaluating = options.pop("evaluating", False)
        data = DataConfig(**{"dataset_name": "test/tiny", "dataset_config": "plain", **options})
        source = open_source(data, evaluating)
        parts = [[document.text for document in part()] for part in source.parts.values()]
        print(json.dumps([source.name, source.fingerprint, *parts]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def on_hub(endpoint: str, home: Path, *options: dict) -> tuple[list, str]:
    """What `open_source` makes of each of `options` in a process that knows the Hub at `endpoint`; and its stderr."""
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": root}
    arguments = [sys.executable, "-W", "error", "-c", PROGRAM, json.dumps(options)]
    done = subprocess.run(arguments, env=environment, cwd=home, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_hub(hub: str, hub_home: Path) -> None:
    cases: list[tuple[dict, str]] = [
        ({"dataset_config": "nope"}, r"^data\.dataset_config \(nope\) of test/tiny: .*\['plain', 'bare'\]"),
        ({"dataset_config": None}, r"^data\.dataset_config \(None\) of test/tiny: .*\['plain', 'bare'\]"),
        ({"dataset_split": "tain"}, r"^data\.dataset_split \(tain\): .*\['train', 'validation'\]"),
        ({"validation_split": "dev"}, r"^data\.validation_split \(dev\): .* none: hold out data\.validation_fraction"),
        ({"text_column": "txt"}, r"^data\.text_column \(txt\): .*did you mean text\?.*: text, number"),
        ({"text_column": "number"}, r"^data\.text_column \(number\): .*test/tiny\) train: row 1 holds int, not text"),
        ({"dataset_name": "test/none"}, r"^data\.dataset_name \(test/none\) is not on the Hub.*--data\.train_files"),
    ]
    good: list[dict] = [{}, {"validation_split": None}, {"dataset_config": "bare", "validation_split": None}]
    evaluated: list[dict] = [{"evaluating": True}, {"evaluating": True, "dataset_config": "bare"}]
    answers, _ = on_hub(hub, hub_home, *good, *evaluated, *(options for options, _ in cases))
    whole, held_out, bare, split, no_split = answers[:5]
    assert (split[0], *split[2:]) == ("test/tiny plain validation", ["v1", "v2"])
    assert (no_split[0], *no_split[2:]) == ("test/tiny bare train", LINES)
    assert whole[0] == "test/tiny plain"
    assert whole[2:] == [LINES, ["v1", "v2"]]
    assert sorted(held_out[2] + held_out[3]) == sorted(LINES)
    assert held_out[2:] == bare[2:]
    assert len(held_out[3]) == 2
    assert len({whole[1], held_out[1], bare[1]}) == 3
    for (options, message), answer in zip(cases, answers[5:], strict=True):
        assert isinstance(answer, str), options
        assert re.search(message, answer)
        assert "\n" not in answer

    # What is downloaded can be used without the Hub, and is the same text.
    (offline, *_), _ = on_hub("http://127.0.0.1:9", hub_home, {})
    assert offline[1:] == whole[1:]
    assert "the Hub is out of reach" in offline[0]


def test_unreachable_hub_is_one_line_soon(tmp_path) -> None:
    start = time.perf_counter()
    (answer,), stderr = on_hub("http://127.0.0.1:9", tmp_path, {"dataset_name": "wikitext"})
    assert time.perf_counter() - start < 30
    assert re.match(r"data\.dataset_name \(wikitext\): the Hugging Face Hub is out of reach \(.*refused\)", answer)
    assert "--data.train_files" in answer
    assert "--data.dataset_name python-stdlib" in answer
    assert stderr == ""
