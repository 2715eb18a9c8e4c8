"""Beam search: the likeliest texts that a search of fixed width finds.

Shapes: W beams (in slots of the cache), V vocabulary, C candidates.

The rules, and so the texts, are those of `transformers` with its defaults: a candidate that ends counts if it is among
the W best of 2 W; a text's score is the sum of its log-probabilities / its length to the power of `length_penalty`,
<eos> included in both; the search is over once W texts have ended and the best beam, at its present length, would
score less than the worst of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.generation.clock import Clock
from jaxlm.generation.decode import Prompts, cache_bucket, empty_caches, seen_tokens, write_slot
from jaxlm.generation.options import GenerationOptions
from jaxlm.generation.sampling import process
from jaxlm.model.transformer import Transformer

_NEVER = -1e9  # score of beams that are not there yet


@dataclasses.dataclass(frozen=True)
class Beam:
    """A text of a search: its new ids without <eos>, their summed log-probability (with <eos>'s), and its score."""

    tokens: list[int]
    logprob: float
    score: float
    reason: str


_write_slot = jax.jit(write_slot, donate_argnums=0)


@functools.partial(jax.jit, static_argnames=("graphdef", "options", "eos_id"), donate_argnames="caches")
def _advance(
    graphdef: Any,
    params: Any,
    caches: Any,
    beams: dict[str, jax.Array],
    position: jax.Array,
    count: jax.Array,
    *,
    options: GenerationOptions,
    eos_id: int,
) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    """Feeds each beam its last token.

    Args:
      beams: `parent` int32 [W], the slot that the beam has grown from; `token` int32 [W]; `score` float32 [W], its
        log-probability; `seen` bool [W, V], the tokens in it, if there is a repetition penalty.
      position: int32 index of those tokens. count: int32, how many of them are new.

    Returns:
      The caches, and the 2 W best candidates: log-probabilities float32 [C] and beam * V + token int32 [C].
    """
    model: Transformer = nnx.merge(graphdef, params)
    caches = jax.tree.map(lambda x: x[beams["parent"]], caches)
    width = len(beams["token"])
    positions_W, counts_W = jnp.full(width, position), jnp.full(width, count)
    logits_WV, caches = model.decode(beams["token"][:, None], positions_W, caches)
    logprobs_WV = process(jax.nn.log_softmax(logits_WV, axis=-1), counts_W, beams.get("seen"), eos_id, options)
    totals_WV = logprobs_WV + beams["score"][:, None]
    return caches, jax.lax.top_k(totals_WV.reshape(-1), 2 * width)


class _Search:
    """The beams of one prompt, and the texts that have ended."""

    def __init__(self, prompt: list[int], eos_id: int, options: GenerationOptions) -> None:
        self.prompt, self._eos_id, self._options = prompt, eos_id, options
        self.new: list[list[int]] = [[] for _ in range(options.num_beams)]
        self.parents = list(range(options.num_beams))
        self.scores = [0.0] + [_NEVER] * (options.num_beams - 1)  # all beams are one at first
        self.ended: list[Beam] = []

    @property
    def count(self) -> int:
        return len(self.new[0])

    def grow(self, scores_C: np.ndarray, candidates_C: np.ndarray, vocab_size: int) -> bool:
        """Takes the best candidates in; whether the search goes on."""
        width, count = len(self.new), self.count + 1
        grown = []
        for rank, (score, candidate) in enumerate(zip(scores_C.tolist(), candidates_C.tolist(), strict=True)):
            parent, token = divmod(candidate, vocab_size)
            is_end = token == self._eos_id
            if not is_end and count < self._options.max_new_tokens:
                grown.append((score, parent, [*self.new[parent], token]))
            elif rank < width:
                reason, tokens = ("eos", self.new[parent]) if is_end else ("length", [*self.new[parent], token])
                self.ended.append(Beam(tokens, score, score / count**self._options.length_penalty, reason))
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[:width]
        if len(grown) < width:
            return False  # all are as long as they may be
        self.scores, self.parents, self.new = (list(each) for each in zip(*grown[:width], strict=True))
        best = self.scores[0] / count**self._options.length_penalty
        return len(self.ended) < width or best > self.ended[-1].score


def beam_search(
    graphdef: Any, params: Any, prompt: list[int], eos_id: int, options: GenerationOptions, clock: Clock
) -> list[Beam]:
    """The `options.num_samples` best texts after `prompt`, best first. A full window goes on as `Decoder` has it."""
    config = nnx.merge(graphdef, params).config
    cache_length = cache_bucket(len(prompt), len(prompt) + options.max_new_tokens, config.max_seq_len)
    prompts = Prompts(graphdef, params, cache_length, clock)
    caches = empty_caches(prompts.run(prompts.view(prompt))[1], options.num_beams, cache_length)
    search, position, going = _Search(prompt, eos_id, options), cache_length, True
    while going:
        if position == cache_length or not search.count:  # no room, or nothing there yet
            for slot, new in enumerate(search.new):
                view = prompts.view([*prompt, *new])
                caches = clock.call(clock.prompt, _write_slot, caches, np.int32(slot), prompts.run(view)[1])
            position, search.parents = len(view) - 1, list(range(options.num_beams))  # the last token is fed below
        beams = _arrays(search, config.vocab_size, options)
        arguments = (graphdef, params, caches, beams, np.int32(position), np.int32(search.count))
        caches, best = clock.call(clock.new, _advance, *arguments, options=options.compiled(), eos_id=eos_id)
        clock.new.tokens += options.num_beams
        scores_C, candidates_C = jax.device_get(best)
        going = search.grow(scores_C, candidates_C, config.vocab_size)
        position += 1
    return search.ended[: options.num_samples]


def _arrays(search: _Search, vocab_size: int, options: GenerationOptions) -> dict[str, np.ndarray]:
    """What `_advance` takes of the beams."""
    contexts = [[*search.prompt, *new] for new in search.new]
    arrays = {
        "parent": np.array(search.parents, np.int32),
        "token": np.array([context[-1] for context in contexts], np.int32),
        "score": np.array(search.scores, np.float32),
    }
    if options.repetition_penalty != 1:
        arrays["seen"] = np.stack([seen_tokens(context, vocab_size) for context in contexts])
    return arrays
