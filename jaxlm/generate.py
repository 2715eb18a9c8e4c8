"""Text from a model: key-value cache, jitted prefill and decode.

Shapes: B samples, T positions, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.errors import UserError
from jaxlm.model.transformer import Transformer
from jaxlm.tokenizer import Tokenizer

CHUNK = 32  # tokens decoded between looks at whether every sample has ended
PROMPT_STEP = 64  # prompts are padded to a multiple of this, so that few shapes are compiled


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, num_samples: int, seed: int
) -> None:
    """Raises UserError for a value out of bounds."""
    for name, value, low in (
        ("max_new_tokens", max_new_tokens, 1),
        ("num_samples", num_samples, 1),
        ("top_k", top_k, 0),
    ):
        if value < low:
            raise UserError(f"--{name} ({value}) must be at least {low}")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature ({temperature}) must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"--top_p ({top_p}) must be greater than 0 and at most 1")
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed ({seed}) must be from 0 to {2**31 - 1}")


def filter_logits(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """-inf for all but the `top_k` likeliest (0: all) and the smallest set of probability at least `top_p`.

    Nucleus sampling: Holtzman et al. 2019, arXiv:1904.09751.
    """
    vocab_size = logits_BV.shape[-1]
    if 0 < top_k < vocab_size:
        kth_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1)[:, ::-1]
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BV, axis=-1)
        least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def _sample(logits_BV: jax.Array, key: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filter_logits(logits_BV / temperature, top_k, top_p)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("graphdef", "cache_length", "temperature", "top_k", "top_p"))
def _prefill(
    graphdef: Any, params: Any, prompt_BT: jax.Array, length: jax.Array, key: jax.Array, **static: Any
) -> tuple[jax.Array, Any]:
    """The first new token [B] after `length` tokens of the padded prompt, and the cache."""
    model: Transformer = nnx.merge(graphdef, params)
    hidden_BTD, cache = model.prefill(prompt_BT, static.pop("cache_length"))
    last_B1D = jax.lax.dynamic_slice_in_dim(hidden_BTD, length - 1, 1, axis=1)
    return _sample(model.logits(last_B1D)[:, 0], key, **static), cache


@functools.partial(
    jax.jit, static_argnames=("graphdef", "steps", "temperature", "top_k", "top_p"), donate_argnames="cache"
)
def _decode(
    graphdef: Any,
    params: Any,
    token_B: jax.Array,
    position: jax.Array,
    cache: Any,
    key: jax.Array,
    steps: int,
    **static: Any,
) -> tuple[jax.Array, Any]:
    """`steps` more tokens [steps, B] after `token_B`, which stands at `position`; and the cache."""
    model: Transformer = nnx.merge(graphdef, params)

    def body(carry: Any, offset: jax.Array) -> tuple[Any, jax.Array]:
        token_B, cache = carry
        logits_BV, cache = model.decode(token_B[:, None], position + offset, cache)
        token_B = _sample(logits_BV, jax.random.fold_in(key, position + offset), **static)
        return (token_B, cache), token_B

    (_, cache), tokens = jax.lax.scan(body, (token_B, cache), jnp.arange(steps))
    return tokens, cache


def generate_tokens(
    graphdef: Any,
    params: Any,
    prompt: list[int],
    eos_id: int,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    num_samples: int,
    seed: int,
) -> list[list[int]]:
    """New token ids of each sample, up to `max_new_tokens` or <eos> (left out).

    When the model's max_seq_len is full, it goes on from the second half of what there is.
    """
    config = nnx.merge(graphdef, params).config
    window = config.max_seq_len
    static = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    context_BT = np.tile(np.array(prompt, np.int32), (num_samples, 1))
    prompt_length, key = context_BT.shape[1], jax.random.key(seed)
    while context_BT.shape[1] - prompt_length < max_new_tokens and not _all_ended(
        context_BT[:, prompt_length:], eos_id
    ):
        seen_BT = context_BT[:, -(window // 2) :] if context_BT.shape[1] >= window else context_BT
        length = seen_BT.shape[1]
        padded = min(-(-length // PROMPT_STEP) * PROMPT_STEP, window)
        new = max_new_tokens - (context_BT.shape[1] - prompt_length)
        cache_length = min(-(-(padded + new) // PROMPT_STEP) * PROMPT_STEP, window)
        key, prefill_key, decode_key = jax.random.split(key, 3)
        prompt_BT = np.pad(seen_BT, ((0, 0), (0, padded - length)))
        token_B, cache = _prefill(graphdef, params, prompt_BT, length, prefill_key, cache_length=cache_length, **static)
        context_BT = np.concatenate([context_BT, np.asarray(token_B)[:, None]], axis=1)
        steps = min(new - 1, cache_length - length)
        while steps > 0 and not _all_ended(context_BT[:, prompt_length:], eos_id):
            tokens, cache = _decode(
                graphdef, params, token_B, length, cache, decode_key, steps=min(CHUNK, cache_length - length), **static
            )
            tokens = np.asarray(tokens)[:steps]
            context_BT = np.concatenate([context_BT, tokens.T], axis=1)
            token_B, length, steps = jnp.asarray(tokens[-1]), length + len(tokens), steps - len(tokens)
    return [_until(row.tolist(), eos_id) for row in context_BT[:, prompt_length:]]


def _all_ended(new_BT: np.ndarray, eos_id: int) -> bool:
    return bool((new_BT == eos_id).any(axis=1).all()) if new_BT.size else False


def _until(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def generate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
) -> list[str]:
    """`num_samples` continuations of `prompt`, each with the prompt in front.

    Args:
      temperature: 0 takes the likeliest token (greedy).
      top_k: sample among the k likeliest tokens; 0: all.
      top_p: sample among the likeliest tokens of this joint probability.
      seed: equal seeds give equal samples.

    Raises:
      UserError: a value is out of bounds.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, num_samples, seed)
    graphdef, state = nnx.split(model)
    samples = generate_tokens(
        graphdef,
        nnx.to_pure_dict(state),
        [tokenizer.bos_id, *tokenizer.encode(prompt)],
        tokenizer.eos_id,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_samples=num_samples,
        seed=seed,
    )
    return [prompt + tokenizer.decode(ids) for ids in samples]
