"""Texts from a model, several at a time: jitted prefill and decode around a key-value cache.

Shapes: B slots, C tokens of a chunk, T positions, V vocabulary, H heads of keys and values, K channels of a head.

A text lives in a slot. `_prefill` runs its prompt alone, `_place` puts the outcome into a free slot, and `_decode` goes
on with all slots, each at its own position; a slot whose text has ended takes the next prompt. So a text is a function
of its own prompt and random key, and what else is made beside it changes only how fast it comes.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.generation.clock import Clock
from jaxlm.generation.options import GenerationOptions
from jaxlm.generation.sampling import draw, process, row_key
from jaxlm.model.transformer import Transformer

CHUNK = 32  # tokens decoded between looks at them
STREAM_CHUNK = 4  # the same where somebody watches
CACHE_STEP = 64  # the cache's length is a multiple of this,
SHORTEST = 32  # and a prompt is padded to this times a power of 2: few shapes, so few compilations


@dataclasses.dataclass(frozen=True)
class Job:
    """One text to make: its prompt's ids, not empty, and the two numbers that its random key depends on."""

    tokens: tuple[int, ...]
    prompt: int = 0
    sample: int = 0


@dataclasses.dataclass(frozen=True)
class News:
    """What a job has come to: new ids, and why it ended ("eos" or "length"); None: it goes on.

    `logprobs` are the natural log-probabilities that the model gives each id, before penalties and filters.
    <eos> itself is no text, and is left out.
    """

    job: Job
    tokens: list[int]
    logprobs: list[float]
    reason: str | None


class _Text:
    """A job in its slot."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.context = list(job.tokens)  # all of it: the prompt and what is new
        self.held = 0  # how many of its last tokens the slot holds; 0: it has yet to be placed

    @property
    def count(self) -> int:
        return len(self.context) - len(self.job.tokens)


@functools.partial(jax.jit, static_argnames="graphdef")
def _prefill(graphdef: Any, params: Any, prompt_1T: jax.Array, length: jax.Array) -> tuple[jax.Array, Any]:
    """float32 [V] logits after `length` tokens of a padded prompt, and each layer's keys and values [1, H, T, K]."""
    model: Transformer = nnx.merge(graphdef, params)
    hidden_1TD, caches = model.prefill(prompt_1T)
    last_11D = jax.lax.dynamic_slice_in_dim(hidden_1TD, length - 1, 1, axis=1)
    return model.logits(last_11D)[0, 0], caches


def write_slot(caches: Any, slot: jax.Array, new: Any) -> Any:
    """`caches` with a prompt's, [1, H, T, K] in each layer, at the beginning of a slot."""

    def write(old: jax.Array, x_1HTK: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(old, x_1HTK.astype(old.dtype), (slot, 0, 0, 0))

    return jax.tree.map(write, caches, new)


@functools.partial(jax.jit, donate_argnames="state")
def _place(state: dict[str, Any], slot: jax.Array, prefilled: tuple[jax.Array, Any], row: dict[str, Any]) -> Any:
    """`state` with a prompt in `slot`; `row` holds its numbers."""
    logits_V, caches = prefilled
    row = dict(row, key=row_key(*row.pop("key_of")), logits=logits_V)
    placed = {name: state[name].at[slot].set(value) for name, value in row.items()}
    return state | placed | {"caches": write_slot(state["caches"], slot, caches)}


@functools.partial(jax.jit, static_argnames=("graphdef", "options", "eos_id", "chunk"), donate_argnames="state")
def _decode(
    graphdef: Any,
    params: Any,
    state: dict[str, Any],
    active_B: jax.Array,
    *,
    options: GenerationOptions,
    eos_id: int,
    chunk: int,
) -> tuple[dict[str, Any], tuple[jax.Array, jax.Array]]:
    """Up to `chunk` tokens more in every active slot.

    Returns:
      The state; and the tokens int32 [chunk, B], -1 where a slot was not active, with their log-probabilities.
    """
    model: Transformer = nnx.merge(graphdef, params)
    window = state["caches"][0][0].shape[2]
    slots = jnp.arange(len(state["length"]))

    def go_on(carry: Any) -> jax.Array:
        i, active_B, _, _ = carry
        return (i < chunk) & jnp.any(active_B)

    def body(carry: Any) -> Any:
        i, active_B, state, (tokens_CB, logprobs_CB) = carry
        logits_BV, length_B = state["logits"], state["length"]
        token_B = _next(state, eos_id, options)
        chosen_B = logits_BV[slots, token_B] - jax.nn.logsumexp(logits_BV, axis=-1)
        out = (tokens_CB.at[i].set(jnp.where(active_B, token_B, -1)), logprobs_CB.at[i].set(chosen_B))
        state = dict(state, count=state["count"] + active_B)
        if "seen" in state:
            state["seen"] = state["seen"].at[slots, token_B].set(True)
        active_B = active_B & (token_B != eos_id) & (state["count"] < state["limit"]) & (length_B < window)
        state["logits"], state["caches"] = model.decode(
            token_B[:, None], jnp.minimum(length_B, window - 1), state["caches"]
        )
        return i + 1, active_B, dict(state, length=length_B + active_B), out

    shape = (chunk, len(slots))
    empty = (jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, _, state, out = jax.lax.while_loop(go_on, body, (jnp.int32(0), active_B, state, empty))
    return state, out


def _next(state: dict[str, Any], eos_id: int, options: GenerationOptions) -> jax.Array:
    """int32 [B]: the next token of each slot."""
    logits_BV = process(state["logits"], state["count"], state.get("seen"), eos_id, options)
    return draw(logits_BV, state["key"], state["count"], options)


def prompt_bucket(length: int, window: int) -> int:
    """The padded length of a prompt."""
    padded = SHORTEST
    while padded < length:
        padded *= 2
    return min(padded, window)


def cache_bucket(prompt: int, total: int, window: int) -> int:
    """The length of a cache for texts of `total` tokens with their prompts, which are of up to `prompt` tokens."""
    return min(max(-(-total // CACHE_STEP) * CACHE_STEP, prompt_bucket(prompt, window)), window)


def empty_caches(prompt: Any, slots: int, length: int) -> Any:
    """Each layer's keys and values [slots, H, length, K], zeros, on the devices of `prompt`'s, [1, H, T, K].

    On CPU they are float32 whatever the model computes in: writing into a 16-bit array, XLA converts all of it.
    """

    def zeros(x_1HTK: jax.Array) -> jax.Array:
        _, heads, _, channels = x_1HTK.shape
        devices: Any = x_1HTK.devices()
        on_cpu = all(device.platform == "cpu" for device in devices)
        dtype = jnp.float32 if on_cpu else x_1HTK.dtype
        return jnp.zeros((slots, heads, length, channels), dtype, device=x_1HTK.sharding)

    return jax.tree.map(zeros, prompt)


def seen_tokens(context: Sequence[int], vocab_size: int) -> np.ndarray:
    """bool [V]: which tokens are in a text."""
    return np.bincount(context, minlength=vocab_size) > 0


class Prompts:
    """Runs prompts, for slots of a cache of `cache_length`; one that comes again in a row is run once."""

    def __init__(self, graphdef: Any, params: Any, cache_length: int, clock: Clock) -> None:
        self._model, self._cache_length, self._clock = (graphdef, params), cache_length, clock
        self._window = nnx.merge(graphdef, params).config.max_seq_len
        self._last: tuple[Sequence[int], Any] = ((), None)

    def view(self, context: list[int]) -> list[int]:
        """What the model sees of a text: all of it, or half a window of its end."""
        if len(context) <= self._window:
            return list(context)  # a copy, as a text grows
        self._clock.slides += 1
        return context[-(self._window // 2) :]

    def run(self, view: list[int]) -> tuple[jax.Array, Any]:
        """float32 [V] logits after `view`, and each layer's keys and values [1, H, T, K]."""
        if view != self._last[0]:
            padded = prompt_bucket(len(view), self._cache_length)
            prompt_1T = np.array([view + [0] * (padded - len(view))], np.int32)
            part = self._clock.prompt
            self._last = (view, self._clock.call(part, _prefill, *self._model, prompt_1T, np.int32(len(view))))
            part.tokens += len(view)
        return self._last[1]


class Decoder:
    """Makes the texts of jobs, `options.batch_size` at a time.

    Args:
      graphdef, params: the model, split.
      eos_id: the token that ends a text.
      chunk: tokens decoded between looks at them.
      shortest_cache: positions that the cache has at least; one length for all prompts saves compilations.
    """

    def __init__(
        self,
        graphdef: Any,
        params: Any,
        eos_id: int,
        options: GenerationOptions,
        clock: Clock,
        chunk: int = CHUNK,
        shortest_cache: int = 1,
    ) -> None:
        self._model, self._eos_id, self._options, self._clock = (graphdef, params), eos_id, options, clock
        self._static: Any = {"options": options.compiled(), "eos_id": eos_id, "chunk": chunk}
        self._config, self._shortest_cache = nnx.merge(graphdef, params).config, shortest_cache

    def run(self, jobs: Sequence[Job]) -> Iterator[News]:
        """News of the jobs (at least one) as they come, until all have ended or were stopped."""
        longest = max(len(job.tokens) for job in jobs)
        total = max(longest + self._options.max_new_tokens, self._shortest_cache)
        self._cache_length = cache_bucket(longest, total, self._config.max_seq_len)
        self._prompts = Prompts(*self._model, self._cache_length, self._clock)
        self._texts: list[_Text | None] = [None] * min(self._options.batch_size, len(jobs))
        self._state: dict[str, Any] = {}  # until the first prompt has shown what its arrays are like
        waiting = collections.deque(jobs)
        while True:
            for slot, text in enumerate(self._texts):
                if text is None and waiting:
                    self._texts[slot] = text = _Text(waiting.popleft())
                if text is not None and not 0 < text.held <= self._cache_length:
                    self._place(slot, text)
            if not any(self._texts):
                return
            yield from self._step()

    def stop(self, job: Job) -> None:
        """Ends a job: its slot is free, and there is no more news of it."""
        self._texts = [None if text is not None and text.job is job else text for text in self._texts]

    def _place(self, slot: int, text: _Text) -> None:
        """Puts what the model sees of a text into a slot."""
        view = self._prompts.view(text.context)
        prefilled = self._prompts.run(view)
        if not self._state:
            self._state = self._empty_state(*prefilled)
        numbers = {"length": len(view), "count": text.count, "limit": self._options.max_new_tokens}
        row: dict[str, Any] = {name: np.int32(number) for name, number in numbers.items()}
        row["key_of"] = tuple(map(np.int32, (self._options.seed, text.job.prompt, text.job.sample)))
        if "seen" in self._state:
            row["seen"] = seen_tokens(text.context, self._config.vocab_size)
        self._state = self._clock.call(self._clock.prompt, _place, self._state, np.int32(slot), prefilled, row)
        text.held = len(view)

    def _empty_state(self, logits_V: jax.Array, prompt: Any) -> dict[str, Any]:
        def row(dtype: Any, *shape: int) -> jax.Array:
            return jnp.zeros((len(self._texts), *shape), dtype, device=logits_V.sharding)

        state: dict[str, Any] = {name: row(jnp.int32) for name in ("length", "count", "limit")}
        state |= {"key": row(jnp.uint32, 2), "logits": row(jnp.float32, *logits_V.shape)}
        if self._options.repetition_penalty != 1:
            state["seen"] = row(bool, *logits_V.shape)
        return state | {"caches": empty_caches(prompt, len(self._texts), self._cache_length)}

    def _step(self) -> Iterator[News]:
        """Decodes a chunk, and says what came of it."""
        active_B = np.array([text is not None for text in self._texts])
        arguments = (*self._model, self._state, active_B)
        self._state, out = self._clock.call(self._clock.new, _decode, *arguments, **self._static)
        tokens_CB, logprobs_CB = jax.device_get(out)
        for slot, text in enumerate(self._texts):
            if text is None:
                continue
            new = tokens_CB[tokens_CB[:, slot] >= 0, slot].tolist()
            self._clock.new.tokens += len(new)
            text.context += new
            text.held += len(new)
            ended = new[-1] == self._eos_id
            reason = "eos" if ended else "length" if text.count >= self._options.max_new_tokens else None
            if reason is not None:
                self._texts[slot] = None
            end = len(new) - ended
            yield News(text.job, new[:end], logprobs_CB[:end, slot].tolist(), reason)
