"""Generated texts on a terminal or in a pipe: text on standard output, all else on standard error."""

import contextlib
import dataclasses
import json
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

import jax

from jaxlm.checkpoints.load import LoadedModel, load
from jaxlm.config import DataConfig
from jaxlm.data.tokens import cache_root
from jaxlm.errors import UserError
from jaxlm.generation.api import Generation, Piece, Writer
from jaxlm.generation.decode import CHUNK, STREAM_CHUNK
from jaxlm.generation.options import GenerationOptions
from jaxlm.parallel.devices import find_devices

BETWEEN = "-" * 40  # a line between texts
INTERACTIVE_CACHE = 1024  # positions; one cache for all lines, so that everything is compiled before the first one


def open_model(folder: str) -> LoadedModel:
    """The model in a folder, where compiled programs are kept from one command to the next. Raises UserError."""
    find_devices()
    loaded = load(folder)
    jax.config.update("jax_compilation_cache_dir", str(cache_root(DataConfig()) / "compiled"))
    return loaded


def show_texts(
    loaded: LoadedModel, prompts: Sequence[str], options: GenerationOptions, *, stream: bool | None, as_json: bool
) -> None:
    """Prints a text for each prompt and sample, in order; then, on standard error, how fast they came.

    Args:
      stream: as its tokens are decoded, for one text; None: if standard output is a terminal.
      as_json: an object a line, instead of the text.
    """
    single = len(prompts) * options.num_samples == 1 and options.num_beams == 1 and not as_json
    if stream and not single:
        raise UserError(
            "--stream (true) shows one text as it comes; leave it out for several, for beams and for --json"
        )
    streaming = single and (sys.stdout.isatty() if stream is None else stream)
    writer = Writer(loaded.model, loaded.tokenizer, options, chunk=STREAM_CHUNK if streaming else CHUNK)
    pieces = writer.stream(prompts)
    if streaming:
        _show_as_it_comes(prompts[0], pieces)
    else:
        for number, done in enumerate(_in_order(pieces)):
            if number and not as_json:
                print(BETWEEN)
            print(_as_json(done) if as_json else done.prompt + done.text, flush=True)
    _report(writer)


def _show_as_it_comes(prompt: str, pieces: Iterator[Piece]) -> None:
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
    print(flush=True)


def _in_order(pieces: Iterator[Piece]) -> Iterator[Generation]:
    """The finished texts by number; those that come early wait."""
    waiting: dict[int, Generation] = {}
    following = 0
    for piece in pieces:
        if piece.done is not None:
            waiting[piece.number] = piece.done
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _as_json(done: Generation) -> str:
    values = dataclasses.asdict(done)
    if not math.isfinite(done.logprob):  # of a model that has diverged; JSON has no NaN
        values["logprob"] = None
    return json.dumps(values, ensure_ascii=False)


def _report(writer: Writer) -> None:
    if writer.clock.new.tokens:
        print(writer.clock.summary(), file=sys.stderr)


class _Interrupt:
    """Ctrl-C, while entered: it ends the line that is typed, or the text that is written."""

    def __init__(self) -> None:
        self.typing, self.asked = False, False

    def __enter__(self) -> "_Interrupt":
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, _: int, __: FrameType | None) -> None:
        self.asked = True
        if self.typing:
            raise KeyboardInterrupt

    def read(self, question: str) -> str:
        """A line. Raises KeyboardInterrupt or EOFError."""
        self.typing = True
        try:
            return input(question)
        finally:
            self.typing, self.asked = False, False


def converse(loaded: LoadedModel, options: GenerationOptions) -> None:
    """Continues each line that is typed, as it comes, until the end of the input; lines know nothing of each other.

    Raises:
      UserError: options that ask for more than one text a line.
    """
    for name, value in (("num_samples", options.num_samples), ("num_beams", options.num_beams)):
        if value != 1:
            raise UserError(f"--{name} ({value}) does not fit --interactive, which writes one text; leave one out")
    shortest = min(loaded.config.model.max_seq_len, INTERACTIVE_CACHE)
    writer = Writer(loaded.model, loaded.tokenizer, options, chunk=STREAM_CHUNK, shortest_cache=shortest)
    question = _prepare(writer)
    number = 0
    with _Interrupt() as interrupt:
        while True:
            try:
                line = interrupt.read(question)
            except KeyboardInterrupt:
                print(file=sys.stderr)
                continue
            except EOFError:
                break
            try:
                _continue_line(writer, line, number, interrupt)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            number += 1
    _report(writer)


def _prepare(writer: Writer) -> str:
    """Compiles; what to ask with: nothing where the lines come from a file."""
    print("compiling ...", file=sys.stderr)
    next(writer.stream([""]), None)
    writer.clock.forget_tokens()
    if not sys.stdin.isatty():
        return ""
    with contextlib.suppress(ImportError):  # not every system has it
        import readline  # noqa: F401 - gives `input` a history and line editing
    print("a line to continue; Ctrl-C stops a text, Ctrl-D ends", file=sys.stderr)
    return "> "


def _continue_line(writer: Writer, line: str, number: int, interrupt: _Interrupt) -> None:
    pieces = writer.stream([line], first=number)
    print(line, end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
        if interrupt.asked:
            break
    print(flush=True)
