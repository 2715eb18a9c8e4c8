"""Text in and out: prompts from a command line and its files; tokens to text, one at a time. Imports nothing heavy."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxlm.data.chat import check_messages
from jaxlm.data.documents import encoding_fault
from jaxlm.errors import UserError, one_line

REPLACEMENT = "\ufffd"  # stands for bytes that are not (yet) a character
JSON_KEY, MESSAGES = "text", "messages"  # one of them is in a line of a .jsonl file


class TextStream:
    """The text of a continuation as its tokens come: never half a character, never part of a stop string.

    Args:
      decode: the tokenizer's.
      stops: the first of these texts to be complete ends the continuation, and is left out of it.
      prompt: the ids before it, as a decoder may write a token in another way where a text begins.

    Attributes:
      tokens: all tokens so far, without the prompt.
      text: all text returned so far.
      stopped: whether a stop string is complete.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        self._decode, self._stops = decode, stops
        self.tokens: list[int] = []
        self._new: list[int] = []  # the last tokens: not returned yet,
        self._before = list(prompt)  # and before them some that have been, as `_shown`, which are decoded again in
        self._shown = decode(self._before)  # front of what follows, as some decoders drop the space of a first token
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self.text, self.stopped = "", False

    def extend(self, tokens: Sequence[int], is_last: bool) -> str:
        """The text that is certain now that `tokens` are there; those after a complete stop string are not taken."""
        start = len(self.text)
        for token in tokens:
            self._push(token)
            if self.stopped:
                break
        if is_last and not self.stopped:
            self._release(self._decode(self._before + self._new)[len(self._shown) :])
            self.text, self._held = self.text + self._held, ""
        return self.text[start:]

    def _push(self, token: int) -> None:
        self.tokens.append(token)
        self._new.append(token)
        whole = self._decode(self._before + self._new)
        if not whole.endswith(REPLACEMENT):  # perhaps a character whose other bytes are still to come
            new = whole[len(self._shown) :]
            shown = self._decode(self._new)
            if shown:
                self._before, self._shown = self._new, shown
            else:  # special tokens alone are no text to put in front of a space
                self._before, self._shown = self._before + self._new, whole
            self._new = []
            self._release(new)

    def _release(self, new: str) -> None:
        """Adds to `text` what belongs to no stop string; holds back an end that may become one."""
        text = self._held + new
        found = [at for at in map(text.find, self._stops) if at >= 0]
        starts = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        end = min(found, default=len(text) - max(starts, default=0))
        self.stopped, self._held = bool(found), "" if found else text[end:]
        self.text += text[:end]


def read_prompts(prompts: Sequence[str], file: str | None) -> list[Any]:
    """The prompts given as texts, then those in `file` ("-": standard input); "" alone where neither is given.

    A file holds one prompt a line, blank lines left out; in a .jsonl file a line is an object with a key "text", or
    with "messages" that are to be answered.

    Raises:
      UserError: the file is missing, unreadable, not UTF-8, not such JSON, or holds no prompt; one text is not Unicode.
    """
    for prompt in prompts:
        if fault := encoding_fault(prompt, f"--prompt ({prompt!a})"):
            raise fault
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


def _from_json(where: str, line: str) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: bad JSON: {one_line(error)}") from error
    if isinstance(row, dict) and MESSAGES in row and JSON_KEY not in row:
        try:
            return check_messages(row[MESSAGES])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    text = row.get(JSON_KEY) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where}: must be an object such as {{"{JSON_KEY}": "a prompt"}}')
    if fault := encoding_fault(text, where):
        raise fault
    return text
