"""Text from a model: what users call."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from flax import nnx

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.generation.beam import beam_search
from jaxlm.generation.clock import Clock
from jaxlm.generation.decode import CHUNK, STREAM_CHUNK, Decoder, Job, News
from jaxlm.generation.options import GenerationOptions, make_options
from jaxlm.generation.text import TextStream
from jaxlm.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Generation:
    """A finished text.

    Attributes:
      prompt: what it goes on from.
      text: the continuation, without the prompt, <eos> and the stop string.
      tokens: its new ids, without <eos>; where a stop string ended it, those that made the string are there.
      finish_reason: "eos", "stop" or "length".
      logprob: natural logarithm of the probability that the model gives `tokens` (beams: with <eos>, and what the
        repetition penalty makes of it).
    """

    prompt: str
    text: str
    tokens: list[int]
    finish_reason: str
    logprob: float


@dataclasses.dataclass(frozen=True)
class Piece:
    """More of the text that is `number`th in the order of prompts and samples; `done` once it is finished."""

    number: int
    text: str
    done: Generation | None = None


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], window: int, name: str = "prompt") -> list[list[int]]:
    """The prompts' ids, <bos> first.

    Raises:
      UserError: one is no valid Unicode, or longer than a `window` of tokens; its message begins with `name`.
    """
    encoded = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    for number, ids in enumerate(encoded, 1):
        if len(ids) > window:
            which = f"{name} {number}" if len(encoded) > 1 else name
            raise UserError(
                f"{which} ({len(ids):,} tokens with <bos>) exceeds model.max_seq_len ({window:,}); shorten it"
            )
    return encoded


class _Text:
    """A text that is being made."""

    def __init__(self, stream: TextStream) -> None:
        self.stream, self.tokens, self.logprob = stream, list[int](), 0.0

    def take(self, news: News) -> tuple[str, str | None]:
        """The text that is new, and why it ends, if it does."""
        pieces = []
        for token, logprob in zip(news.tokens, news.logprobs, strict=True):
            self.tokens.append(token)
            self.logprob += logprob
            pieces.append(self.stream.push(token))
            if self.stream.stopped:
                break
        else:
            if news.reason is not None:
                pieces.append(self.stream.finish())
        return "".join(pieces), "stop" if self.stream.stopped else news.reason


class Writer:
    """A model that texts are to be made with.

    Args:
      chunk: tokens decoded between looks at them.
      shortest_cache: what the key-value cache holds at least; one length for all prompts saves compilations.

    Attributes:
      clock: tokens and seconds of all that was made.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        options: GenerationOptions,
        *,
        chunk: int = CHUNK,
        shortest_cache: int = 1,
    ) -> None:
        self._graphdef, state = nnx.split(model)
        self._params, self._config = nnx.to_pure_dict(state), model.config
        self._tokenizer, self._options, self._chunk = tokenizer, options, chunk
        self._shortest_cache = shortest_cache
        self.clock = Clock()

    def stream(self, prompts: Sequence[str], first: int = 0) -> Iterator[Piece]:
        """The texts of all prompts, piece by piece; those of different texts alternate.

        Args:
          first: number of the first prompt, for the random keys.

        Raises:
          UserError: a prompt does not fit into the model's window, or is no valid Unicode.
        """
        encoded = encode_prompts(self._tokenizer, prompts, self._config.max_seq_len)
        if not prompts:
            return iter(())
        return self._beams(prompts, encoded) if self._options.num_beams > 1 else self._samples(prompts, encoded, first)

    def _samples(self, prompts: Sequence[str], encoded: list[list[int]], first: int) -> Iterator[Piece]:
        options = self._options
        jobs = [Job(tuple(ids), first + i, j) for i, ids in enumerate(encoded) for j in range(options.num_samples)]
        decoder = Decoder(
            self._graphdef, self._params, self._tokenizer.eos_id, options, self.clock, self._chunk, self._shortest_cache
        )
        texts = {job: _Text(TextStream(self._tokenizer.decode, options.stop)) for job in jobs}
        for news in decoder.run(jobs):
            text, job = texts[news.job], news.job
            piece, reason = text.take(news)
            if reason == "stop":
                decoder.stop(job)
            prompt = prompts[job.prompt - first]
            done = None if reason is None else Generation(prompt, text.stream.text, text.tokens, reason, text.logprob)
            if piece or done:
                yield Piece((job.prompt - first) * options.num_samples + job.sample, piece, done)

    def _beams(self, prompts: Sequence[str], encoded: list[list[int]]) -> Iterator[Piece]:
        number = 0
        for prompt, ids in zip(prompts, encoded, strict=True):
            found = beam_search(self._graphdef, self._params, ids, self._tokenizer.eos_id, self._options, self.clock)
            for beam in found:
                text = self._tokenizer.decode(beam.tokens)
                yield Piece(number, text, Generation(prompt, text, beam.tokens, beam.reason, beam.logprob))
                number += 1


def generate_tokens(graphdef: Any, params: Any, prompt: Sequence[Any], eos_id: int, **options: Any) -> list[list[int]]:
    """New ids, <eos> left out: all samples of the first prompt, then those of the next.

    Args:
      graphdef, params: a split `Transformer`.
      prompt: ids, at least one; or several such prompts. Of one longer than the model's window, the last half a
        window is seen.
      options: as in `generate_text`, but for `stop`.
    """
    checked, clock = make_options(**options), Clock()
    if checked.stop:
        raise UserError(f"--stop ({checked.stop[0]}) needs text; use generate_text")
    prompts: list[list[int]] = [list(ids) for ids in (prompt if isinstance(prompt[0], Sequence) else [prompt])]
    if checked.num_beams > 1:
        searches = (beam_search(graphdef, params, ids, eos_id, checked, clock) for ids in prompts)
        return [beam.tokens for beams in searches for beam in beams]
    jobs = [Job(tuple(ids), i, j) for i, ids in enumerate(prompts) for j in range(checked.num_samples)]
    made: dict[Job, list[int]] = {job: [] for job in jobs}
    for news in Decoder(graphdef, params, eos_id, checked, clock).run(jobs):
        made[news.job] += news.tokens
    return list(made.values())


def generate(writer: Writer, prompts: Sequence[str]) -> list[Generation]:
    """All texts, in the order of prompts and samples. Raises UserError, as `Writer.stream`."""
    done = {piece.number: piece.done for piece in writer.stream(prompts) if piece.done is not None}
    return [done[number] for number in sorted(done)]


def generate_text(model: Transformer, tokenizer: Tokenizer, prompt: str | Sequence[str], **options: Any) -> list[str]:
    """Continuations, each with its prompt in front: all samples of the first prompt, then those of the next.

    Args:
      prompt: one, or several, which are worked on together; each text is what the prompt alone would give, if it had
        its place among them (sampling depends on `seed`, on the places of prompt and sample, and on nothing else).
      options: fields of `GenerationOptions`, such as max_new_tokens=50, temperature=0.

    Raises:
      UserError: an option is unknown or out of bounds, or a prompt is longer than the model's window.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    writer = Writer(model, tokenizer, make_options(**options))
    return [done.prompt + done.text for done in generate(writer, prompts)]


def stream_text(model: Transformer, tokenizer: Tokenizer, prompt: str, **options: Any) -> Iterator[str]:
    """The continuation of one prompt, without it, in pieces as they are decoded; joined, they are `generate_text`'s.

    Raises:
      UserError: as `generate_text`; or `num_samples` or `num_beams` is not 1.
    """
    checked = make_options(**options)
    for name, value in (("num_samples", checked.num_samples), ("num_beams", checked.num_beams)):
        if value != 1:
            raise UserError(f"--{name} ({value}) gives no text to stream; set it to 1, or use generate_text")
    writer = Writer(model, tokenizer, checked, chunk=STREAM_CHUNK)
    return (piece.text for piece in writer.stream([prompt]) if piece.text)


def answer(model: Transformer, tokenizer: Tokenizer, prompt: str | Sequence[str], **options: Any) -> str | list[str]:
    """`generate_text`, but a str where one prompt has one text."""
    texts = generate_text(model, tokenizer, prompt, **options)
    return texts[0] if isinstance(prompt, str) and len(texts) == 1 else texts
