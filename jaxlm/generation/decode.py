"""Texts from a model, several at a time: jitted prefill and decode around a key-value cache.

Shapes: B slots, C tokens of a chunk, T positions, V vocabulary, H heads of keys and values, K channels of a head.

Each text has a slot of the cache. `_prefill` runs its prompt alone, `_place` copies the keys and values into a free
slot, and `_decode` continues all slots, each at its own position; when a text ends, the next prompt takes its slot.
So a text depends only on its own prompt and random key; the others change only how fast it comes.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.generation.options import GenerationOptions, Ids
from jaxlm.generation.sampling import adjust_logits, is_among, next_token, random_key
from jaxlm.model.attention import Cache
from jaxlm.model.transformer import Transformer

CHUNK = 32  # tokens decoded between looks at them
STREAM_CHUNK = 4  # the same where somebody watches
CACHE_STEP = 64  # the cache's length is a multiple of this,
SHORTEST = 32  # and a prompt is padded to this times a power of 2: few shapes, so few compilations
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # JAX sends it for programs read from its cache, too

T = TypeVar("T")
Caches = tuple[Cache, ...]  # keys and values [B, H, T, K] of each layer
Prefilled = tuple[jax.Array, Caches]  # float32 [V] logits after a prompt, and its keys and values [1, H, T, K]


@functools.cache  # registers once a process
def _record_compilations() -> list[float]:
    """The seconds of each compilation since the first call; JAX appends to it."""
    seconds: list[float] = []

    def record(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(record)
    return seconds


@dataclasses.dataclass
class Throughput:
    """Tokens, and the seconds of those that were `timed`: a call that compiles counts for neither."""

    tokens: int = 0
    timed: int = 0
    seconds: float = 0.0
    compiled: bool = False  # the last call

    def add(self, tokens: int) -> None:
        """Counts tokens of the last call."""
        self.tokens += tokens
        self.timed += 0 if self.compiled else tokens

    def __str__(self) -> str:
        rate = f" ({self.timed / self.seconds:,.0f} tokens/s)" if self.timed else ""
        return f"{self.tokens:,} token{'s' * (self.tokens != 1)}{rate}"


@dataclasses.dataclass
class Clock:
    """Tokens and seconds of all texts made so far.

    Attributes:
      compiling: seconds of the calls that compiled; `prompt` and `new` leave them out.
      slides: how often a text had filled the model's window, and continued from the second half of it.
    """

    prompt: Throughput = dataclasses.field(default_factory=Throughput)
    new: Throughput = dataclasses.field(default_factory=Throughput)
    compiling: float = 0.0
    slides: int = 0

    def call(self, measured: Throughput, function: Callable[..., T], *arguments: object) -> T:
        """The finished result of `function(...)`; adds its seconds to `measured`, or to `compiling` if it compiled."""
        compilations = _record_compilations()
        before, begin = len(compilations), time.perf_counter()
        out = jax.block_until_ready(function(*arguments))
        seconds, measured.compiled = time.perf_counter() - begin, len(compilations) > before
        self.compiling += seconds * measured.compiled
        measured.seconds += seconds * (not measured.compiled)
        return out

    def summary(self) -> str:
        """One line: what was made, how fast, and what compiling took."""
        parts = [f"generated {self.new}", f"prompts {self.prompt}"]
        if self.compiling:
            parts.append(f"compiling took {self.compiling:.1f} s")
        if self.slides:
            parts.append(f"a full window (model.max_seq_len) went on from its second half {self.slides:,} times")
        return "; ".join(parts)


@dataclasses.dataclass
class Request:
    """One text to make.

    Attributes:
      index: its place in the order of prompts and samples.
      context: the prompt, at least one token, and all new tokens, <eos> included.
      logprobs: natural log-probability of each new token by the model, before penalties and filters.
      cached: how many of the context's last tokens the slot's cache holds; 0: it has no slot yet.
    """

    index: int
    context: list[int]
    logprobs: list[float] = dataclasses.field(default_factory=list)
    cached: int = 0


@jax.jit
def _prefill(model: Transformer, prompt_1T: jax.Array, length: jax.Array) -> Prefilled:
    """Runs a padded prompt of `length` tokens."""
    hidden_1TD, caches = model.prefill(prompt_1T)
    last_11D = jax.lax.dynamic_slice_in_dim(hidden_1TD, length - 1, 1, axis=1)
    return model.logits(last_11D)[0, 0], caches


@functools.partial(jax.jit, donate_argnums=0)
def write_slot(caches: Caches, slot: jax.Array, prompt: Caches) -> Caches:
    """`caches` with those of a prompt, [1, H, T, K], at the beginning of a slot."""
    write = functools.partial(jax.lax.dynamic_update_slice, start_indices=(slot, 0, 0, 0))
    return jax.tree.map(lambda old, x_1HTK: write(old, x_1HTK.astype(old.dtype)), caches, prompt)


@functools.partial(jax.jit, donate_argnums=0)
def _place(state: dict[str, Any], slot: jax.Array, row: dict[str, Any], prompt: Caches) -> dict[str, Any]:
    """`state` with a prompt in `slot`: `row` in the arrays of that name, and its keys and values."""
    placed = {name: state[name].at[slot].set(value) for name, value in row.items()}
    return placed | {"caches": write_slot(state["caches"], slot, prompt)}


@functools.partial(jax.jit, static_argnames=("ids", "options", "chunk"), donate_argnames="state")
def _decode(
    model: Transformer, state: dict[str, Any], room_B: jax.Array, ids: Ids, options: GenerationOptions, chunk: int
) -> tuple[dict[str, Any], tuple[jax.Array, jax.Array]]:
    """Up to `chunk` tokens more in every slot, and not more than `room_B` (int32).

    Returns:
      The state; and the tokens int32 [chunk, B], -1 where a slot got none, with their log-probabilities.
    """
    window = state["caches"][0][0].shape[2]
    slots = jnp.arange(len(state["length"]))

    def is_unfinished(carry: Any) -> jax.Array:
        i, active_B, _, _ = carry
        return (i < chunk) & jnp.any(active_B)

    def decode_token(carry: Any) -> Any:
        i, active_B, state, (tokens_CB, logprobs_CB) = carry
        logits_BV, length_B, count_B = state["logits"], state["length"], state["count"]
        adjusted_BV = adjust_logits(logits_BV, count_B, state.get("seen"), ids, options)
        token_B = next_token(adjusted_BV, state["key"], count_B, options)
        logprob_B = logits_BV[slots, token_B] - jax.nn.logsumexp(logits_BV, axis=-1)
        out = (tokens_CB.at[i].set(jnp.where(active_B, token_B, -1)), logprobs_CB.at[i].set(logprob_B))
        state = dict(state, count=count_B + active_B)
        if "seen" in state:
            state["seen"] = state["seen"].at[slots, token_B].set(True)
        active_B = active_B & ~is_among(token_B, ids.ends) & (i + 1 < room_B) & (length_B < window)
        position_B = jnp.minimum(length_B, window - 1)
        state["logits"], state["caches"] = model.decode(token_B[:, None], position_B, state["caches"])
        return i + 1, active_B, dict(state, length=length_B + active_B), out

    shape = (chunk, len(slots))
    empty = (jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, _, state, out = jax.lax.while_loop(is_unfinished, decode_token, (jnp.int32(0), room_B > 0, state, empty))
    return state, out


def _padded_length(length: int, window: int) -> int:
    """The length that a prompt is padded to."""
    return min(max(SHORTEST, 1 << (length - 1).bit_length()), window)


def empty_caches(prompt: Caches, slots: int, length: int) -> Caches:
    """Zeros [slots, H, length, K] for each of a prompt's keys and values [1, H, T, K], on the same devices.

    On CPU they are float32 whatever the model computes in: to write into a 16-bit array, XLA converts all of it.
    """
    (_, heads, _, channels), keys = prompt[0][0].shape, prompt[0][0]
    device: Any = next(iter(keys.devices()))
    dtype = jnp.float32 if device.platform == "cpu" else keys.dtype
    shape = (slots, heads, length, channels)
    return jax.tree.map(lambda x: jnp.zeros(shape, dtype, device=x.sharding), prompt)


def seen_tokens(context: Sequence[int], vocab_size: int) -> np.ndarray:
    """bool [V]: which tokens are in a text."""
    return np.bincount(context, minlength=vocab_size) > 0


class PromptRunner:
    """Runs prompts for the slots of a cache; of equal ones in a row, only the first.

    Args:
      longest_prompt, longest_text: tokens at most of a prompt, and of a prompt with its new tokens.

    Attributes:
      cache_length: positions of a cache that fits the texts, the model's window at most.
    """

    def __init__(self, model: Transformer, clock: Clock, longest_prompt: int, longest_text: int) -> None:
        self._model, self._clock, self._window = model, clock, model.config.max_seq_len
        length = max(-(-longest_text // CACHE_STEP) * CACHE_STEP, _padded_length(longest_prompt, self._window))
        self.cache_length = min(length, self._window)
        self._last: tuple[list[int], Any] = ([], None)

    def visible(self, context: list[int]) -> list[int]:
        """What the model sees of a text: all of it, or the last half a window where it is longer than the window."""
        if len(context) <= self._window:
            return list(context)  # a copy, as a text grows
        self._clock.slides += 1
        return context[-(self._window // 2) :]

    def run(self, tokens: list[int]) -> Prefilled:
        """Logits after `tokens`, and their keys and values."""
        if tokens != self._last[0]:
            padding = _padded_length(len(tokens), self.cache_length) - len(tokens)
            prompt_1T = np.array([tokens + [0] * padding], np.int32)
            prefilled = self._clock.call(self._clock.prompt, _prefill, self._model, prompt_1T, np.int32(len(tokens)))
            self._last = (tokens, prefilled)
            self._clock.prompt.add(len(tokens))
        return self._last[1]


@dataclasses.dataclass
class Decoder:
    """Makes texts, `options.batch_size` at a time.

    Attributes:
      ids: which tokens end a text, and which are none.
      clock: tokens and seconds of all texts made.
      chunk: tokens decoded between looks at them.
      shortest_cache: positions that the cache has at least; one length for all prompts saves compilations.
    """

    model: Transformer
    ids: Ids
    options: GenerationOptions
    clock: Clock
    chunk: int = CHUNK
    shortest_cache: int = 1

    def run(self, prompts: Sequence[Sequence[int]], first: int = 0) -> Iterator[tuple[Request, list[int], str | None]]:
        """`options.num_samples` texts of each prompt as they come, until all have ended; one run at a time.

        Args:
          first: number of the first prompt, for the random keys.

        Yields:
          A request; its next tokens, without <eos>; and why it ended, "eos" or "length", or None.
        """
        samples = [prompt for prompt in prompts for _ in range(self.options.num_samples)]
        waiting = (Request(index, list(prompt)) for index, prompt in enumerate(samples))
        longest = max(len(prompt) for prompt in prompts)
        longest_text = max(longest + self.options.max_new_tokens, self.shortest_cache)
        self._prompts = PromptRunner(self.model, self.clock, longest, longest_text)
        self._first = first
        self._slots: list[Request | None] = [None] * min(self.options.batch_size, len(samples))
        self._state: dict[str, Any] = {}  # a row a slot; made with the first prompt, which has the arrays' types
        while True:
            for slot, request in enumerate(self._slots):
                if request is None:
                    self._slots[slot] = request = next(waiting, None)
                if request is not None and not 0 < request.cached <= self._prompts.cache_length:
                    self._prefill_slot(slot, request)
            if not any(self._slots):
                return
            yield from self._decode_chunk()

    def stop(self, request: Request) -> None:
        """Ends a request: its slot is free."""
        self._slots = [None if other is request else other for other in self._slots]

    def _prefill_slot(self, slot: int, request: Request) -> None:
        tokens, options = self._prompts.visible(request.context), self.options
        logits_V, caches = self._prompts.run(tokens)
        row: dict[str, Any] = {"length": np.int32(len(tokens)), "count": np.int32(len(request.logprobs))}
        prompt, sample = divmod(request.index, options.num_samples)
        row["key"] = jax.device_get(random_key(options.seed, self._first + prompt, sample))
        row["logits"] = logits_V
        if options.repetition_penalty != 1:
            row["seen"] = seen_tokens(request.context, self.model.config.vocab_size)
        if not self._state:
            slots = len(self._slots)
            self._state = {
                name: jnp.zeros((slots, *value.shape), value.dtype, device=logits_V.sharding)
                for name, value in row.items()
            }
            self._state["caches"] = empty_caches(caches, slots, self._prompts.cache_length)
        self._state = self.clock.call(self.clock.prompt, _place, self._state, np.int32(slot), row, caches)
        request.cached = len(tokens)

    def _decode_chunk(self) -> Iterator[tuple[Request, list[int], str | None]]:
        limit = self.options.max_new_tokens
        room_B = np.array([limit - len(slot.logprobs) if slot else 0 for slot in self._slots], np.int32)
        arguments = (self.model, self._state, room_B, self.ids, self.options.compiled(), self.chunk)
        self._state, out = self.clock.call(self.clock.new, _decode, *arguments)
        tokens_CB, logprobs_CB = jax.device_get(out)
        for slot, request in [(slot, request) for slot, request in enumerate(self._slots) if request]:
            new = tokens_CB[tokens_CB[:, slot] >= 0, slot].tolist()
            self.clock.new.add(len(new))
            request.context += new
            request.logprobs += logprobs_CB[: len(new), slot].tolist()
            request.cached += len(new)
            ended = new[-1] in self.ids.ends
            reason = "eos" if ended else "length" if len(request.logprobs) >= limit else None
            if reason is not None:
                self._slots[slot] = None
            yield request, new[: len(new) - ended], reason
