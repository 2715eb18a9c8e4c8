"""Text in and out: prompts from a command line and its files; tokens to text, one at a time. Imports nothing heavy."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxlm.errors import UserError, one_line

REPLACEMENT = "\ufffd"  # stands for bytes that are not (yet) a character
JSON_KEY = "text"  # of a line of a .jsonl file


class TextStream:
    """The text of a continuation as its tokens come: never half a character, never part of a stop string.

    Args:
      decode: the tokenizer's.
      stops: the first of these texts to be complete ends the continuation, and is left out of it.

    Attributes:
      tokens: all tokens so far.
      text: all text returned so far.
      stopped: whether a stop string is complete.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, stops
        self.tokens: list[int] = []
        self._begin = self._end = 0  # tokens[begin:end] have been returned, as `_shown`; they are decoded again in
        self._shown = ""  # front of what follows, as some decoders drop the space before a first token
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self.text, self.stopped = "", False

    def extend(self, tokens: Sequence[int], is_last: bool) -> str:
        """The text that is certain now that `tokens` are there; those after a complete stop string are not taken."""
        pieces = []
        for token in tokens:
            pieces.append(self.push(token))
            if self.stopped:
                return "".join(pieces)
        return "".join(pieces) + (self.finish() if is_last else "")

    def push(self, token: int) -> str:
        """The text that is certain now that `token` is there."""
        self.tokens.append(token)
        whole = self._decode(self.tokens[self._begin :])
        if whole.endswith(REPLACEMENT):  # perhaps a character whose other bytes are still to come
            return ""
        new = whole[len(self._shown) :]
        self._begin, self._end = self._end, len(self.tokens)
        self._shown = self._decode(self.tokens[self._begin :])
        return self._release(self._held + new)

    def finish(self) -> str:
        """The rest, when no token follows."""
        if self.stopped:
            return ""
        rest = self._release(self._held + self._decode(self.tokens[self._begin :])[len(self._shown) :])
        held, self._held = self._held, ""
        self.text += held
        return rest + held

    def _release(self, text: str) -> str:
        """The part of `text` that belongs to no stop string; holds back an end that may become one."""
        found = [at for at in map(text.find, self._stops) if at >= 0]
        self.stopped = bool(found)
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        end = min(found, default=len(text) - kept)
        self._held = "" if found else text[end:]
        self.text += text[:end]
        return text[:end]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, less than the whole of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


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
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = content.decode().removeprefix("\ufeff").splitlines()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"{where}: {reason}; name a file with one prompt a line, a .jsonl file, or - for standard input"
        ) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}: line {line} is not UTF-8 (byte {content[error.start]:#x}); convert it") from error
    found = [
        _from_json(f"{where}: line {number}", line) if file.endswith(".jsonl") else line
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise UserError(f"{where}: holds no prompt; write one a line")
    return [*prompts, *found]


def _check_unicode(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not valid Unicode; mend it") from error


def _from_json(where: str, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: bad JSON: {one_line(error)}") from error
    text = row.get(JSON_KEY) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where}: must be an object such as {{"{JSON_KEY}": "a prompt"}}')
    _check_unicode(where, text)
    return text
