"""From logits to the next token: penalties, filters and the draw, row by row.

Shapes: B rows, V vocabulary.
"""

import jax
import jax.numpy as jnp

from jaxlm.generation.options import GenerationOptions


def row_key(seed: jax.Array, prompt: jax.Array, sample: jax.Array) -> jax.Array:
    """uint32 [2]: the random key of a text, a function of the seed, the prompt's number and the sample's alone."""
    return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), sample))


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Makes tokens that are in the prompt or the text less likely, for a `penalty` above 1.

    Keskar et al. 2019, arXiv:1909.05858 (CTRL), section 4.1; negative logits are multiplied instead of divided.
    """
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def forbid_end(logits_BV: jax.Array, count_B: jax.Array, eos_id: int, min_new_tokens: int) -> jax.Array:
    """-inf for <eos> in rows that have fewer than `min_new_tokens` new tokens."""
    is_eos_V = jnp.arange(logits_BV.shape[1]) == eos_id
    return jnp.where((count_B < min_new_tokens)[:, None] & is_eos_V[None], -jnp.inf, logits_BV)


def process(
    logits_BV: jax.Array, count_B: jax.Array, seen_BV: jax.Array | None, eos_id: int, options: GenerationOptions
) -> jax.Array:
    """What beams and samples have in common: the repetition penalty, and no <eos> before `min_new_tokens`."""
    if seen_BV is not None:
        logits_BV = penalize(logits_BV, seen_BV, options.repetition_penalty)
    if options.min_new_tokens:
        logits_BV = forbid_end(logits_BV, count_B, eos_id, options.min_new_tokens)
    return logits_BV


def filter_logits(logits_BV: jax.Array, top_k: int, top_p: float, min_p: float = 0.0) -> jax.Array:
    """-inf for all but the `top_k` likeliest (0: all), the smallest set of probability at least `top_p` among those,
    and those at least `min_p` times as likely as the likeliest.

    Nucleus sampling: Holtzman et al. 2019, arXiv:1904.09751. Min-p: Nguyen et al. 2024, arXiv:2407.01082.
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
    if min_p:
        least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(min_p)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def draw(logits_BV: jax.Array, key_B2: jax.Array, count_B: jax.Array, options: GenerationOptions) -> jax.Array:
    """int32 [B]: each row's next token, drawn with its own key and its own number of tokens before."""
    if options.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filter_logits(logits_BV / options.temperature, options.top_k, options.top_p, options.min_p)

    def draw_row(key_2: jax.Array, count: jax.Array, logits_V: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.wrap_key_data(key_2), count), logits_V)

    return jax.vmap(draw_row)(key_B2, count_B, logits_BV).astype(jnp.int32)
