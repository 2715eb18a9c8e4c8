"""From logits to the next token: penalties, filters and sampling, row by row.

Shapes: B rows, V vocabulary, N groups of G tokens.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.generation.options import GenerationOptions, Ids

GROUP = 128  # tokens whose weights are summed together, in `choose`


@jax.jit
def random_key(seed: int, prompt: int, sample: int) -> jax.Array:
    """uint32 [2]: the random key of a text; it depends on the seed and on the prompt's and the sample's number only."""
    return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), sample))


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Makes tokens that are in the prompt or the text less likely, for a `penalty` above 1.

    Keskar et al. 2019, arXiv:1909.05858 (CTRL), section 4.1; negative logits are multiplied instead of divided.
    """
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def adjust_logits(
    logits_BV: jax.Array, count_B: jax.Array, seen_BV: jax.Array | None, ids: Ids, options: GenerationOptions
) -> jax.Array:
    """Repetition penalty, no id that stands for no token, and none that ends the text in rows with fewer than
    `min_new_tokens` new tokens; for beams and samples.
    """
    if seen_BV is not None:
        logits_BV = penalize(logits_BV, seen_BV, options.repetition_penalty)
    if options.min_new_tokens:
        is_early_B, ends_V = count_B < options.min_new_tokens, is_among(jnp.arange(logits_BV.shape[1]), ids.ends)
        logits_BV = jnp.where(is_early_B[:, None] & ends_V[None], -jnp.inf, logits_BV)
    return logits_BV.at[:, np.array(ids.missing, np.int32)].set(-jnp.inf) if ids.missing else logits_BV


def is_among(tokens: jax.Array, few: tuple[int, ...]) -> jax.Array:
    """Bool, of the shape of int32 `tokens`: which of them are one of `few`."""
    return functools.reduce(operator.or_, (tokens == token for token in few))


def filter_logits(logits_BV: jax.Array, top_k: int, top_p: float, min_p: float = 0.0) -> jax.Array:
    """-inf for all but the `top_k` likeliest (0: all), the smallest set of probability at least `top_p` among those,
    and those at least `min_p` times as likely as the likeliest.

    Nucleus sampling: Holtzman et al. 2019, arXiv:1904.09751. Min-p: Nguyen et al. 2024, arXiv:2407.01082.
    """
    if 0 < top_k < logits_BV.shape[-1]:
        logits_BV = _keep_likeliest(logits_BV, jnp.ones_like(logits_BV), top_k)
    if top_p < 1:
        logits_BV = _keep_likeliest(logits_BV, jax.nn.softmax(logits_BV, axis=-1), top_p)
    if min_p:
        least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(min_p)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def _keep_likeliest(logits_BV: jax.Array, weights_BV: jax.Array, bound: float) -> jax.Array:
    """-inf for all logits but the largest ones, as few (with ties) as have weights of `bound` or more in sum.

    Bisection over all floats, ordered by their bits: 32 sums instead of a sort, which takes 5 times as long.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    ordered_BV = jnp.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)

    def halve(_: int, limits: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B1, high_B1 = limits
        middle_B1 = (low_B1 >> 1) + (high_B1 >> 1) + (low_B1 & high_B1 & 1)
        above_B1 = jnp.sum(jnp.where(ordered_BV > middle_B1, weights_BV, 0.0), axis=-1, keepdims=True)
        return jnp.where(above_B1 < bound, low_B1, middle_B1 + 1), jnp.where(above_B1 < bound, middle_B1, high_B1)

    limits = (ordered_BV.min(-1, keepdims=True), ordered_BV.max(-1, keepdims=True))
    _, least_B1 = jax.lax.fori_loop(0, 32, halve, limits)
    least_B1 = jax.lax.bitcast_convert_type(jnp.where(least_B1 < 0, least_B1 ^ 0x7FFFFFFF, least_B1), jnp.float32)
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def choose(weights_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """int32 [B]: an index of each row, with probability weight / sum of the row's weights (>= 0, one of them > 0).

    Args:
      uniform_B: float32 in [0, 1); it alone decides, as one random number a row is much faster than one a token.
    """
    padding = -weights_BV.shape[1] % GROUP
    groups_BNG = jnp.pad(weights_BV, ((0, 0), (0, padding))).reshape(len(weights_BV), -1, GROUP)
    sums_BN = groups_BNG.sum(-1)
    group_B, rest_B = _find(sums_BN, uniform_B * sums_BN.sum(-1))
    inside_B, _ = _find(groups_BNG[jnp.arange(len(group_B)), group_B], rest_B)
    return (group_B * GROUP + inside_B).astype(jnp.int32)


def _find(weights_BN: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first index at which the running sum of the weights exceeds the target, and the target less the sum before.

    An index of zero weight is never found: rounding could lead to a token that is filtered out.
    """
    sums_BN = jnp.cumsum(weights_BN, axis=-1)
    hit_BN = (sums_BN > target_B[:, None]) & (weights_BN > 0)
    index_B = jnp.where(hit_BN.any(-1), hit_BN.argmax(-1), weights_BN.argmax(-1))  # rounding can also miss them all
    rows = jnp.arange(len(index_B))
    return index_B, target_B - (sums_BN[rows, index_B] - weights_BN[rows, index_B])


COLDEST = 1e-30  # below, float32 can't divide logits by a temperature, and all but the likeliest are out anyway


def next_token(logits_BV: jax.Array, key_B2: jax.Array, count_B: jax.Array, options: GenerationOptions) -> jax.Array:
    """int32 [B]: each row's next token, sampled with its own key and its own number of new tokens so far."""
    if options.temperature < COLDEST:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filter_logits(logits_BV / options.temperature, options.top_k, options.top_p, options.min_p)

    def uniform(key_2: jax.Array, count: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key_2), count))

    return choose(jax.nn.softmax(logits_BV, axis=-1), jax.vmap(uniform)(key_B2, count_B))
