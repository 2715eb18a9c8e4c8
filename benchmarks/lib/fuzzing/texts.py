"""Damaged text files of every format, and that no document of them is lost or changed."""

import csv
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from jaxlm.config import DataConfig
from jaxlm.data.documents import Document, LeftOut
from jaxlm.data.loader import Rows
from jaxlm.data.packing import plan_cached
from jaxlm.data.sources import open_source
from jaxlm.data.tokens import prepare
from jaxlm.errors import UserError
from lib.fuzzing.damage import Defect, as_json, damaged_bytes, junk


def some_text(rng: random.Random) -> str:
    words = (
        "the",
        "cat",
        "naïve",
        "漢字",
        "🙂",
        "a,b",
        '"quoted"',
        "<bos>",
        "\t",
        "x" * 60,
        "1234",
        "\u2028",
        "e\u0301",
    )
    text = rng.choice((" ", "\n", " ", "\r\n")).join(rng.choice(words) for _ in range(rng.choice((0, 1, 5, 30))))
    return text + rng.choice(("", "", "", "\n", " ", "\0", "\ufeff", "y" * 20_000 if rng.random() < 0.1 else ""))


def table(rng: random.Random, documents: list[Any], column: str) -> bytes:
    plain = [value.encode(errors="replace").decode() if isinstance(value, str) else None for value in documents]
    kind = rng.choice((pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())))
    array: Any = pyarrow.array(plain, pyarrow.string()).cast(kind)
    if rng.random() < 0.15:
        array = rng.choice((
            pyarrow.array([len(text or "") for text in plain]),
            pyarrow.array([(text or "").encode("utf-16") for text in plain], pyarrow.binary()),
            pyarrow.array([[text] for text in plain], pyarrow.list_(pyarrow.string())),
            pyarrow.array([{"text": text} for text in plain], pyarrow.struct([("text", pyarrow.string())])),
            pyarrow.nulls(len(plain)),
        ))  # fmt: skip
    if rng.random() < 0.1:
        raw = [b"\xff\xfe" if rng.random() < 0.3 else (text or "").encode() for text in plain]
        array = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
    buffer = io.BytesIO()
    columns = {"id": list(range(len(documents))), column: array}
    parquet.write_table(pyarrow.table(columns), buffer, compression=rng.choice(("snappy", "none", "zstd")))
    return buffer.getvalue()


def jsonl_line(rng: random.Random, row: dict[str, Any]) -> bytes:
    if rng.random() < 0.03:
        return rng.choice((b"[]", b"1", b"null", b'"text"', b"{}", as_json(rng, row)))
    return json.dumps(row, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def text_file(rng: random.Random, suffix: str, column: str) -> bytes:
    documents: list[Any] = [some_text(rng) for _ in range(rng.choice((0, 1, 3, 25)))]
    if documents and rng.random() < 0.15:
        documents[rng.randrange(len(documents))] = junk(rng)
    match suffix:
        case ".txt":
            content = "\n\n".join(map(str, documents)).encode(errors="surrogatepass")
        case ".jsonl":
            lines = [jsonl_line(rng, {"id": i, column: text}) for i, text in enumerate(documents)]
            content = rng.choice((b"\n", b"\n", b"\r\n", b"\r", b"\n\n")).join(lines)
        case ".csv":
            file = io.StringIO()
            writer = csv.writer(file, lineterminator=rng.choice(("\n", "\r\n", "\r")))
            writer.writerow(["id", column])
            writer.writerows([i, text, *["x"] * (rng.random() < 0.02)] for i, text in enumerate(documents))
            content = file.getvalue().encode(errors="surrogatepass")
        case _:
            content = table(rng, documents, column)
    return damaged_bytes(rng, content) if rng.random() < 0.5 else content


def text(rng: random.Random, folder: Path) -> None:
    names = []
    for number in range(rng.choice((1, 1, 2))):
        suffix = rng.choice((".txt", ".jsonl", ".csv", ".parquet"))
        names.append(folder / f"{number}{suffix}")
        names[-1].write_bytes(text_file(rng, suffix, rng.choice(("text",) * 20 + ("body", "", "é"))))
    paths = tuple(map(str, names))
    data = DataConfig(
        train_files=paths,
        validation_fraction=0 if rng.random() < 0.7 else rng.choice((0.05, 0.5, 1e-9, 0.999)),
        on_bad_document=rng.choice(("stop", "skip")),
        max_length=rng.choice((2, 16, 64)),
        min_length=rng.choice((0, 2, 10)),
        packing_strategy=rng.choice(("greedy", "concat", "first_fit", "best_fit")),
        pack_sequences=rng.random() < 0.8,
        cache_dir=str(folder / "cache"),
    )
    (folder / "data.json").write_text(json.dumps(vars(data)))
    said: list[str] = []
    try:
        prepared = prepare(data, 300, None, said.append)
    except UserError as error:
        if data.on_bad_document == "skip" and re.search("skip to leave out|cannot be read", str(error)):
            raise Defect(f"bad documents are not skipped: {error}") from error
        raise
    if any("\n" in line for line in said):
        raise Defect(f"more than one line is reported: {said}")
    source = open_source(data)
    if source.split is not None:
        encode = prepared.tokenizer.encode_documents
        source.split.pass_over_short(data.min_length, lambda found: (len(encode([text])[0]) for text, *_ in found))
    documents = list(source.parts["train"]())
    check_nothing_is_lost(data, documents, source.left_out)
    check_tokens(prepared, documents)
    if not data.validation_fraction:  # else the held-out part alone may be too short
        plan = plan_cached(prepared.train, data, said.append)
        rows = Rows(prepared.train, plan)
        pairs = sum(int((rows[i]["segments"] > 0).sum()) for i in range(len(rows)))
        if pairs != plan.pairs:
            raise Defect(f"{plan.pairs} pairs were planned, {pairs} are in the rows")


def check_nothing_is_lost(data: DataConfig, documents: list[Document], left_out: dict[str, LeftOut]) -> None:
    """Every line of a JSON Lines file is a document, or was said to be left out."""
    if not data.validation_fraction and all(name.endswith(".jsonl") for name in data.train_files):
        blank = (0, 0)
        lines = 0
        for name in data.train_files:
            whole = Path(name).read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r", b"\n")
            lines += sum(not line.decode(errors="surrogateescape").isspace() for line in whole.split(b"\n") if line)
            lines += not Path(name).stat().st_size
        counts = left_out.get("training text")
        out = (counts.empty, counts.bad) if counts else blank
        if len(documents) + sum(out) != lines:
            raise Defect(f"{lines} lines became {len(documents)} documents, with {out} empty and bad ones left out")


def check_tokens(prepared: Any, documents: list[Document]) -> None:
    """What was tokenized is the text."""
    if len(prepared.train) != len(documents):
        raise Defect(f"{len(documents)} documents became {len(prepared.train)}")
    offsets = prepared.train.offsets
    for document, begin, end in zip(documents, offsets, offsets[1:], strict=False):
        if prepared.tokenizer.decode(prepared.train.tokens[begin:end]) != document.text:
            raise Defect(f"{document.place} was tokenized to another text")
