"""Text from a model: what users call."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxlm.data.chat import check_messages
from jaxlm.data.chat_tokens import template_of
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.generation.beams import beam_search
from jaxlm.generation.decode import CHUNK, STREAM_CHUNK, Clock, Decoder
from jaxlm.generation.options import GenerationOptions, Ids, make_options
from jaxlm.generation.text import TextStream
from jaxlm.model.transformer import Transformer

# A text to continue; or what is to be answered: the messages of a conversation, {"role": ..., "content": ...} each.
Prompt = str | Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class GeneratedText:
    """A finished text.

    Attributes:
      prompt: the text that it continues; "" where it answers a conversation.
      text: the continuation, without the prompt, <eos> and the stop string.
      tokens: its new ids, without <eos>, but with those of a stop string that ended it.
      finish_reason: "eos", "stop" or "length".
      logprob: natural logarithm of the probability that the model gives `tokens`; of beams, <eos> included, and after
        the repetition penalty.
    """

    prompt: str
    text: str
    tokens: list[int]
    finish_reason: str
    logprob: float


@dataclasses.dataclass(frozen=True)
class Piece:
    """The next part of a text, `index` in the order of prompts and samples; `finished` comes with its last one."""

    index: int
    text: str
    finished: GeneratedText | None = None


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], window: int, name: str = "prompt"
) -> list[list[int]]:
    """The prompts' ids: of a text <bos> first, of a conversation those of the chat template.

    Raises:
      UserError: one is no valid Unicode, no conversation, or longer than a `window` of tokens; its message begins with
        `name`. There is no chat template.
    """
    encoded = [_encode_prompt(tokenizer, prompt, name) for prompt in prompts]
    for number, ids in enumerate(encoded, 1):
        if (size := len(ids)) > window:
            which = f"{name} {number}" if len(encoded) > 1 else name
            raise UserError(f"{which} ({size:,} tokens with <bos>) exceeds model.max_seq_len ({window:,}); shorten it")
    return encoded


def _encode_prompt(tokenizer: Tokenizer, prompt: Prompt, name: str) -> list[int]:
    if isinstance(prompt, str):
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    template = template_of(tokenizer)
    try:
        text = template.render(check_messages(list(prompt)), prompt=True).text
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return tokenizer.encode(text)


def _shown(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else ""


def _several(prompt: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts in what may be a single one."""
    several: Any = [prompt] if _is_single(prompt) else prompt
    return list(several)


def _is_single(prompt: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping))


@dataclasses.dataclass
class TextGenerator:
    """Makes texts with a model; `chunk`, `shortest_cache` and `clock` as in `Decoder`."""

    model: Transformer
    tokenizer: Tokenizer
    options: GenerationOptions
    chunk: int = CHUNK
    shortest_cache: int = 1
    clock: Clock = dataclasses.field(default_factory=Clock)

    def stream(self, prompts: Sequence[Prompt], first: int = 0) -> Iterator[Piece]:
        """The texts of all prompts, piece by piece; those of different texts alternate.

        Args:
          first: number of the first prompt, for the random keys.

        Raises:
          UserError: a prompt does not fit into the model's window, or is no valid Unicode.
        """
        encoded = encode_prompts(self.tokenizer, prompts, self.model.config.max_seq_len)
        if not prompts:
            return iter(())
        return self._beams(prompts, encoded) if self.options.num_beams > 1 else self._samples(prompts, encoded, first)

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[GeneratedText]:
        """The finished texts in the order of prompts and samples, as soon as that allows. Raises as `stream`."""
        early: dict[int, GeneratedText] = {}
        index = 0
        for piece in self.stream(prompts):
            if piece.finished is not None:
                early[piece.index] = piece.finished
            while index in early:
                yield early.pop(index)
                index += 1

    def _samples(self, prompts: Sequence[Prompt], encoded: list[list[int]], first: int) -> Iterator[Piece]:
        options, decode = self.options, self.tokenizer.decode
        decoder = Decoder(self.model, self._ids, options, self.clock, self.chunk, self.shortest_cache)
        streams = [TextStream(decode, options.stop, ids) for ids in encoded for _ in range(options.num_samples)]
        for request, tokens, reason in decoder.run(encoded, first):
            index, stream = request.index, streams[request.index]
            piece, finished = stream.extend(tokens, is_last=reason is not None), None
            if stream.stopped:
                decoder.stop(request)
                reason = "stop"
            if reason is not None:
                logprob = sum(request.logprobs[: len(stream.tokens)])
                prompt = prompts[index // options.num_samples]
                finished = GeneratedText(_shown(prompt), stream.text, stream.tokens, reason, logprob)
            if piece or finished:
                yield Piece(index, piece, finished)

    def _beams(self, prompts: Sequence[Prompt], encoded: list[list[int]]) -> Iterator[Piece]:
        options, decode = self.options, self.tokenizer.decode
        searches = (beam_search(self.model, ids, self._ids, options, self.clock) for ids in encoded)
        for index, beam in enumerate(itertools.chain.from_iterable(searches)):
            number = index // options.num_samples
            text = TextStream(decode, (), encoded[number]).extend(beam.tokens, is_last=True)
            finished = GeneratedText(_shown(prompts[number]), text, beam.tokens, beam.finish_reason, beam.logprob)
            yield Piece(index, text, finished)

    @property
    def _ids(self) -> Ids:
        return Ids(self.tokenizer.end_ids, self.tokenizer.missing(self.model.config.vocab_size))


def generate_tokens(
    model: Transformer, prompt: Sequence[int] | Sequence[Sequence[int]], eos_id: int, **options: Any
) -> list[list[int]]:
    """New ids, <eos> left out: all samples of the first prompt, then those of the next.

    Args:
      prompt: ids, at least one; or several such prompts. Of one longer than the model's window, the last half a
        window is seen.
      options: as in `generate_text`, but for `stop`.
    """
    checked, clock, ids = make_options(**options), Clock(), Ids((eos_id,))
    if checked.stop:
        raise UserError(f"--stop ({checked.stop[0]}) needs text; use generate_text")
    several: Any = prompt if isinstance(prompt[0], Sequence) else [prompt]
    prompts = [list(each) for each in several]
    if checked.num_beams > 1:
        return [beam.tokens for each in prompts for beam in beam_search(model, each, ids, checked, clock)]
    made: list[list[int]] = [[] for _ in range(len(prompts) * checked.num_samples)]
    for request, tokens, _ in Decoder(model, ids, checked, clock).run(prompts):
        made[request.index] += tokens
    return made


def generate_text(
    model: Transformer, tokenizer: Tokenizer, prompt: Prompt | Sequence[Prompt], **options: Any
) -> list[str]:
    """Continuations, each with its prompt in front: all samples of the first prompt, then those of the next.

    Of a conversation, [{"role": "user", "content": "..."}, ...], the answer alone.

    Args:
      prompt: one, or several, which are worked on together. Each text is what its prompt alone would give: greedy text
        depends on nothing else, sampled text also on `seed`, and on the number of its prompt and sample.
      options: fields of `GenerationOptions`, such as max_new_tokens=50, temperature=0.

    Raises:
      UserError: an option is unknown or out of bounds, or a prompt is longer than the model's window; there is no chat
        template.
    """
    prompts = _several(prompt)
    generator = TextGenerator(model, tokenizer, make_options(**options))
    return [finished.prompt + finished.text for finished in generator.generate(prompts)]


def generate_one_or_many(
    model: Transformer, tokenizer: Tokenizer, prompt: Prompt | Sequence[Prompt], **options: Any
) -> str | list[str]:
    """`generate_text`, but a str where one prompt gets one text."""
    texts = generate_text(model, tokenizer, prompt, **options)
    return texts[0] if _is_single(prompt) and len(texts) == 1 else texts


def stream_text(model: Transformer, tokenizer: Tokenizer, prompt: Prompt, **options: Any) -> Iterator[str]:
    """The continuation of one prompt, without it, in pieces as they are decoded; joined, they are `generate_text`'s.

    Raises:
      UserError: as `generate_text`; or `num_samples` or `num_beams` is not 1.
    """
    checked = make_options(**options)
    checked.check_single_text("gives no text to stream; set it to 1, or use generate_text")
    generator = TextGenerator(model, tokenizer, checked, chunk=STREAM_CHUNK)
    return (piece.text for piece in generator.stream([prompt]) if piece.text)
