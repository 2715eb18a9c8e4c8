"""What generate.py prints: text alone on standard output, the same however it is shown; lines that are typed."""

import dataclasses
import io
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import documents
from test_generate import TINY, lively

from jaxlm.__main__ import run_named
from jaxlm.checkpoints.items import Progress
from jaxlm.checkpoints.load import LoadedModel
from jaxlm.commands.console import SEPARATOR, converse, show_texts
from jaxlm.config import Config
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.generation.api import generate_text
from jaxlm.generation.options import make_options
from jaxlm.generation.text import read_prompts

PROMPTS = ["the café", "my", "a model"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    tokenizer = Tokenizer.train(documents(60, 1), 300)
    model = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    return LoadedModel(lively(model), tokenizer, Config(model=model), Progress(1, 1, None, 300, "", 1, 1))


@pytest.fixture(scope="module")
def texts(loaded: LoadedModel) -> list[str]:
    return generate_text(loaded.model, loaded.tokenizer, PROMPTS, **OPTIONS)


def show(loaded: LoadedModel, prompts: list[str], stream: bool | None = None, as_json: bool = False) -> None:
    show_texts(loaded, prompts, make_options(**OPTIONS), stream=stream, as_json=as_json)


def test_texts_in_order_with_a_line_between(
    loaded: LoadedModel, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    show(loaded, PROMPTS)
    out, err = capsys.readouterr()
    assert out == f"\n{SEPARATOR}\n".join(texts) + "\n"
    assert err.startswith("generated ") and err.count("\n") == 1 and "tokens/s" in err


def test_streamed_or_not_the_same(
    loaded: LoadedModel, texts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in (True, False):
        show(loaded, PROMPTS[:1], stream)
        assert capsys.readouterr().out == texts[0] + "\n"
    writes = []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "write", writes.append)
    show(loaded, PROMPTS[:1])
    assert "".join(writes) == texts[0] + "\n" and len(writes) > 4, "on a terminal, as they come"


def test_json(loaded: LoadedModel, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    show(loaded, PROMPTS, as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] + row["text"] for row in rows] == texts
    assert all(row["finish_reason"] == "length" and len(row["tokens"]) == 24 and row["logprob"] < 0 for row in rows)


def test_several_texts_do_not_stream(loaded: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"^--stream \(true\) shows one text"):
        show(loaded, PROMPTS, stream=True)


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_lines_are_continued_one_by_one(
    loaded: LoadedModel, texts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as the prompt of its number; an error costs a line, not the program."""
    typed(monkeypatch, *PROMPTS[:2], "café " * 24)
    converse(loaded, make_options(**OPTIONS))
    out, err = capsys.readouterr()
    assert out == texts[0] + "\n" + texts[1] + "\n"
    assert "error: prompt (" in err and "exceeds model.max_seq_len (24)" in err


def test_control_c_ends_the_text_and_then_the_line(
    loaded: LoadedModel, texts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    lines: Iterator[Any] = iter([PROMPTS[0], None, PROMPTS[1]])

    def read(_: str) -> str:
        line = next(lines, EOFError)
        if line is EOFError:
            raise EOFError
        if line is None:
            signal.raise_signal(signal.SIGINT)  # at the prompt
        return line

    written = sys.stdout.write

    def write(text: str) -> int:
        if text and text in texts[0].removeprefix(PROMPTS[0]):
            signal.raise_signal(signal.SIGINT)  # as its first piece is shown
        return written(text)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys.stdout, "write", write)
    converse(loaded, make_options(**OPTIONS))
    first, second, rest = capsys.readouterr().out.split("\n")
    assert texts[0].startswith(first) and PROMPTS[0] < first < texts[0]
    assert second == texts[1] and rest == ""
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("option", [{"num_samples": 2}, {"num_beams": 2, "temperature": 0}])
def test_one_text_a_line(loaded: LoadedModel, option: dict[str, int]) -> None:
    with pytest.raises(UserError, match=rf"^--{next(iter(option))} \(2\) does not fit --interactive"):
        converse(loaded, make_options(**option))


# ---- Prompts


def test_prompts_of_texts_files_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("\ufeffone\n\n  two  \r\n", encoding="utf-8")
    objects.write_text('{"text": "a\\nb", "id": 1}\n{"text": ""}\n', encoding="utf-8")
    assert read_prompts([], None) == [""]
    assert read_prompts(["x"], None) == ["x"]
    assert read_prompts(["x"], str(lines)) == ["x", "one", "  two  "]
    assert read_prompts([], str(objects)) == ["a\nb", ""]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("né\n".encode())))
    assert read_prompts([], "-") == ["né"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"no such file or directory; name a file with one prompt a line"),
        ("empty.txt", b"\n \n", r"holds no prompt; write one a line"),
        ("latin.txt", b"one\ncaf\xe9\n", r"line 2 is not UTF-8 \(byte 0xe9\); convert it"),
        ("bad.jsonl", b'{"text": "x"}\n{"text": \n', r"line 2: bad JSON: "),
        ("key.jsonl", b'{"prompt": "x"}\n', r'line 1: must be an object such as \{"text": "a prompt"\}'),
        ("list.jsonl", b"[1]\n", r"line 1: must be an object"),
        ("half.jsonl", b'{"text": "\\ud83d"}\n', r"line 1: .* is half a surrogate pair, not text"),
    ],
)
def test_bad_prompts_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"^--prompts_file \({file}\): {message}"):
        read_prompts([], str(file))


def test_a_prompt_that_is_a_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="holds no model"):
        run_named(["generate", "--model", str(tmp_path), "--prompt", str(tmp_path / "a.txt"), "--prompt", "import"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("a.txt): is taken as text, though a file; --prompts_file reads files")
