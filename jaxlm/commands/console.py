"""How texts are shown on a terminal or in a pipe: text on standard output, all else on standard error."""

import contextlib
import dataclasses
import json
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

from jaxlm.checkpoints.load import LoadedModel
from jaxlm.commands.parser import convert
from jaxlm.errors import UserError
from jaxlm.generation.api import GeneratedText, Piece, Prompt, TextGenerator
from jaxlm.generation.decode import CHUNK, STREAM_CHUNK, Clock
from jaxlm.generation.options import GenerationOptions, make_options

SEPARATOR = "-" * 40  # a line between texts
INTERACTIVE_CACHE = 1024  # positions; one cache for all lines, so that everything is compiled before the first one


def show_texts(
    loaded: LoadedModel, prompts: Sequence[Prompt], options: GenerationOptions, *, stream: bool | None, as_json: bool
) -> None:
    """Prints a text for each prompt and sample, in order; then, on standard error, how fast they came.

    Args:
      stream: show one text as its tokens are decoded; None: if standard output is a terminal.
      as_json: print an object a line instead of the text.
    """
    single = len(prompts) * options.num_samples == 1 and options.num_beams == 1 and not as_json
    if stream and not single:
        raise UserError("--stream (true) shows one text; leave it out for several texts, for beams and for --json")
    streaming = single and (sys.stdout.isatty() if stream is None else stream)
    generator = TextGenerator(loaded.model, loaded.tokenizer, options, chunk=STREAM_CHUNK if streaming else CHUNK)
    if streaming:
        _show_pieces(prompts[0], generator.stream(prompts))
    else:
        for index, text in enumerate(generator.generate(prompts)):
            if index and not as_json:
                print(SEPARATOR)
            print(_as_json(text) if as_json else text.prompt + text.text, flush=True)
    _show_speed(generator)


def _show_pieces(prompt: Prompt, pieces: Iterator[Piece], interrupt: "_Interrupt | None" = None) -> str:
    """Prints a text as it comes, behind its prompt if that is text; returns it without the prompt."""
    text = ""
    print(prompt if isinstance(prompt, str) else "", end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
        text += piece.text
        if interrupt and interrupt.requested:
            break
    print(flush=True)
    return text


def _as_json(text: GeneratedText) -> str:
    values = dataclasses.asdict(text)
    if not math.isfinite(text.logprob):  # of a model that has diverged; JSON has no NaN
        values["logprob"] = None
    return json.dumps(values, ensure_ascii=False)


def _show_speed(generator: TextGenerator) -> None:
    if generator.clock.new.tokens:
        print(generator.clock.summary(), file=sys.stderr)


class _Interrupt:
    """Handles Ctrl-C: it ends the line that is typed, or requests the end of the text that is written."""

    typing = requested = False

    def on_signal(self, _: int, __: FrameType | None) -> None:
        self.requested = True
        if self.typing:
            raise KeyboardInterrupt

    def read_line(self, question: str) -> str:
        """A line. Raises KeyboardInterrupt or EOFError."""
        self.typing = True
        try:
            return input(question)
        finally:
            self.typing, self.requested = False, False


class Chat:
    """A conversation, and the commands that its lines may be."""

    HELP = "/reset begins anew, /system TEXT sets what it is to be, /temp X the temperature, /exit ends, /help is this"

    def __init__(self, system: str | None = None) -> None:
        self.system, self.turns = system, list[dict[str, str]]()

    def asked(self, line: str) -> list[dict[str, str]]:
        """The messages so far, with what was typed as the last."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.turns, {"role": "user", "content": line}]

    def answered(self, line: str, answer: str) -> None:
        """Takes a turn of both into the history."""
        self.turns += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]

    def command(self, line: str, generator: TextGenerator) -> str:
        """Does what `line`, which begins with a slash, says; returns a line about it. EOFError: it ends the chat."""
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/exit":
            raise EOFError
        if name in ("/reset", "/system"):
            self.turns = []
            self.system = value or None if name == "/system" else self.system
            return "a new conversation" + f", system: {self.system}" * (self.system is not None)
        if name == "/temp":
            temperature = convert("/temp", value, float)
            given = dataclasses.asdict(generator.options) | {"temperature": temperature}
            generator.options = make_options(**given)
            return f"temperature {temperature:g}"
        return self.HELP if name == "/help" else f"{name}: unknown command; {self.HELP}"


def converse(loaded: LoadedModel, options: GenerationOptions, chat: Chat | None = None) -> None:
    """Continues each line that is typed, as it comes, until the end of the input; lines know nothing of each other.

    With a chat, it answers them instead, and each knows those before it.

    Raises:
      UserError: options that ask for more than one text a line.
    """
    options.check_single_text("does not fit --interactive, which writes one text; leave one out")
    shortest = min(loaded.config.model.max_seq_len, INTERACTIVE_CACHE)
    generator = TextGenerator(loaded.model, loaded.tokenizer, options, chunk=STREAM_CHUNK, shortest_cache=shortest)
    print("compiling ...", file=sys.stderr)
    next(generator.stream([""]), None)
    generator.clock = Clock(compiling=generator.clock.compiling)
    question, number = "", 0
    if sys.stdin.isatty():  # else the lines come from a file
        with contextlib.suppress(ImportError):  # not every system has it
            import readline  # noqa: F401 - gives `input` a history and line editing
        what = "a line to continue" if chat is None else "say something, or /help"
        print(f"{what}; Ctrl-C stops a text, Ctrl-D ends", file=sys.stderr)
        question = "> "
    interrupt = _Interrupt()
    previous = signal.signal(signal.SIGINT, interrupt.on_signal)
    try:
        while True:
            try:
                line = interrupt.read_line(question)
                if chat is not None and line.startswith("/"):
                    print(chat.command(line, generator), file=sys.stderr)
                    continue
                prompt: Prompt = line if chat is None else chat.asked(line)
                text = _show_pieces(prompt, generator.stream([prompt], first=number), interrupt)
                if chat is not None:
                    chat.answered(line, text)
            except KeyboardInterrupt:
                print(file=sys.stderr)
                continue
            except EOFError:
                break
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            number += 1
    finally:
        signal.signal(signal.SIGINT, previous)
    _show_speed(generator)
