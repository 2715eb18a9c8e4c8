"""Beam search: the likeliest texts that a search of fixed width finds.

Shapes: W beams (in slots of the cache), V vocabulary, C candidates.

The rules, and so the texts, are those of `transformers` with its defaults: a candidate that ends counts if it is among
the W best of 2 W; a text's score is the sum of its log-probabilities / its length to the power of `length_penalty`,
<eos> included in both; the search is over once W texts have ended and the best beam, at its present length, would
score less than the worst of them.
"""

import dataclasses
import functools

import jax
import numpy as np

from jaxlm.generation.decode import Caches, Clock, PromptRunner, empty_caches, seen_tokens, write_slot
from jaxlm.generation.options import GenerationOptions, Ids
from jaxlm.generation.sampling import adjust_logits
from jaxlm.model.transformer import Transformer

_NO_BEAM = -1e9  # score of beams that do not exist yet


@dataclasses.dataclass(frozen=True)
class Beam:
    """A text of a search: its new ids without <eos>, their summed log-probability (with <eos>'s), and its score."""

    tokens: list[int]
    logprob: float
    score: float
    finish_reason: str


@functools.partial(jax.jit, static_argnames=("ids", "options"), donate_argnames="caches")
def _advance(
    model: Transformer, caches: Caches, beams: dict[str, jax.Array], ids: Ids, options: GenerationOptions
) -> tuple[Caches, tuple[jax.Array, jax.Array]]:
    """Feeds each beam its last token.

    Returns:
      The caches, and the 2 W best candidates (E + 1 times W with E tokens that end a text, so that W go on):
      log-probabilities float32 [C] and beam * V + token int32 [C].
    """
    caches = jax.tree.map(lambda x: x[beams["parent"]], caches)
    logits_WV, caches = model.decode(beams["token"][:, None], beams["position"], caches)
    logprobs_WV = jax.nn.log_softmax(logits_WV, axis=-1)
    logprobs_WV = adjust_logits(logprobs_WV, beams["count"], beams.get("seen"), ids, options)
    totals_WV = logprobs_WV + beams["score"][:, None]
    return caches, jax.lax.top_k(totals_WV.reshape(-1), max(2, 1 + len(ids.ends)) * len(totals_WV))


class BeamSearch:
    """The beams of one prompt, and the texts that have ended, best first."""

    def __init__(self, prompt: list[int], ids: Ids, options: GenerationOptions, vocab_size: int) -> None:
        self._prompt_length, self._ids, self._options, self._vocab_size = len(prompt), ids, options, vocab_size
        self.contexts = [list(prompt)] * options.num_beams  # prompt and new tokens of each beam
        self.parents = list(range(options.num_beams))  # the slot that each has grown from
        self.scores = [0.0] + [_NO_BEAM] * (options.num_beams - 1)  # all beams are the same one at first
        self.ended: list[Beam] = []
        self.count = 0  # new tokens of each beam

    def arrays(self, position: int) -> dict[str, np.ndarray]:
        """What `_advance` takes: int32 [W] each beam's parent, last token, its position in the cache, and the number of
        new tokens; float32 [W] its score; with a repetition penalty, bool [W, V] the tokens in it.
        """
        width = len(self.contexts)
        arrays = {
            "parent": np.array(self.parents, np.int32),
            "token": np.array([context[-1] for context in self.contexts], np.int32),
            "position": np.full(width, position, np.int32),
            "count": np.full(width, self.count, np.int32),
            "score": np.array(self.scores, np.float32),
        }
        if self._options.repetition_penalty != 1:
            arrays["seen"] = np.stack([seen_tokens(context, self._vocab_size) for context in self.contexts])
        return arrays

    def grow(self, scores_C: np.ndarray, candidates_C: np.ndarray) -> bool:
        """Takes the best candidates in; whether the search continues."""
        self.count += 1
        width, count, grown = self._options.num_beams, self.count, []
        for rank, (score, candidate) in enumerate(zip(scores_C.tolist(), candidates_C.tolist(), strict=True)):
            parent, token = divmod(candidate, self._vocab_size)
            context, ends = [*self.contexts[parent], token], token in self._ids.ends
            if not ends and count < self._options.max_new_tokens:
                grown.append((score, parent, context))
            elif rank < width:
                tokens = context[self._prompt_length : len(context) - ends]
                length_penalty = count**self._options.length_penalty
                self.ended.append(Beam(tokens, score, score / length_penalty, "eos" if ends else "length"))
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[:width]
        if len(grown) < width:
            return False  # all are as long as they may be
        self.scores, self.parents, self.contexts = (list(each) for each in zip(*grown[:width], strict=True))
        best = self.scores[0] / count**self._options.length_penalty
        return len(self.ended) < width or best > self.ended[-1].score


def beam_search(
    model: Transformer, prompt: list[int], ids: Ids, options: GenerationOptions, clock: Clock
) -> list[Beam]:
    """The `options.num_samples` best texts after `prompt`, best first; a full window continues as in `Decoder`."""
    prompts = PromptRunner(model, clock, len(prompt), len(prompt) + options.max_new_tokens)
    caches = empty_caches(prompts.run(prompts.visible(prompt))[1], options.num_beams, prompts.cache_length)
    search = BeamSearch(prompt, ids, options, model.config.vocab_size)
    position, continues = prompts.cache_length, True
    while continues:
        if position == prompts.cache_length or not search.count:  # no room, or nothing there yet
            for slot, context in enumerate(search.contexts):
                tokens = prompts.visible(context)
                caches = clock.call(clock.prompt, write_slot, caches, np.int32(slot), prompts.run(tokens)[1])
            position, search.parents = len(tokens) - 1, list(range(options.num_beams))  # the last token is fed below
        arguments = (model, caches, search.arrays(position), ids, options.compiled())
        caches, best = clock.call(clock.new, _advance, *arguments)
        clock.new.add(options.num_beams)
        continues = search.grow(*jax.device_get(best))
        position += 1
    return search.ended[: options.num_samples]
