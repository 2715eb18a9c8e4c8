"""The prompts that a command line names: texts, files, standard input."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxlm.errors import UserError, one_line

JSON_KEY = "text"  # of a line of a .jsonl file


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """The prompts given as texts, then those in `file` ("-": standard input); "" alone where neither is given.

    A file holds one prompt a line, blank lines left out; in a .jsonl file a line is an object with a key "text".

    Raises:
      UserError: the file is missing, unreadable, not UTF-8, not such JSON, or holds no prompt; one text is not Unicode.
    """
    for prompt in prompts:  # bytes of the command line that are not UTF-8 come as halves of surrogate pairs
        _check_unicode(f"--prompt ({prompt!a})", prompt)
    if file is None:
        return list(prompts) or [""]
    where = f"--prompts_file ({file})"
    lines = _text(where, _read(where, file)).splitlines()
    read = [
        _from_json(f"{where}: line {number}", line) if file.endswith(".jsonl") else line
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not read:
        raise UserError(f"{where}: holds no prompt; write one a line")
    return [*prompts, *read]


def _check_unicode(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not valid Unicode; mend it") from error


def _read(where: str, file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read()
    path = Path(file)
    if os.path.isdir(path) or not os.path.exists(path):
        reason = "is a folder" if os.path.isdir(path) else "no such file"
        raise UserError(
            f"{where}: {reason}; name a file with one prompt a line, a .jsonl file, or - for standard input"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from error


def _text(where: str, content: bytes) -> str:
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}: line {line} is not UTF-8 (byte {content[error.start]:#x}); convert it") from error


def _from_json(place: str, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: bad JSON: {one_line(error)}") from error
    text = row.get(JSON_KEY) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{place}: must be an object such as {{"{JSON_KEY}": "a prompt"}}')
    _check_unicode(place, text)
    return text
