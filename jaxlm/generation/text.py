"""Tokens to text, a token at a time: never half a character, never part of a stop string."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what bytes that are not (yet) a character are shown as


class TextStream:
    """The text of a continuation as its tokens come.

    Args:
      decode: the tokenizer's.
      stops: texts of which the first to be complete ends the text; it is left out.

    Attributes:
      text: all text that was given out so far.
      stopped: whether a stop string is complete.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, stops
        self._ids: list[int] = []
        self._begin = self._end = 0  # ids[begin:end] are shown; they stand in front of what is decoded next,
        self._shown = ""  # as some decoders drop the space before a first token
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that is certain now that `token` is there."""
        self._ids.append(token)
        whole = self._decode(self._ids[self._begin :])
        if whole.endswith(REPLACEMENT):  # perhaps a character whose other bytes are still to come
            return ""
        new = whole[len(self._shown) :]
        self._begin, self._end = self._end, len(self._ids)
        self._shown = self._decode(self._ids[self._begin :])
        return self._give_out(self._held + new)

    def finish(self) -> str:
        """The rest, when no token follows."""
        if self.stopped:
            return ""
        rest = self._give_out(self._held + self._decode(self._ids[self._begin :])[len(self._shown) :])
        if not self.stopped:
            rest += self._held
            self.text, self._held = self.text + self._held, ""
        return rest

    def _give_out(self, text: str) -> str:
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            text = text[: min(found)]
        else:
            kept = max((_overlap(text, stop) for stop in self._stops), default=0)
            text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, less than the whole of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
