"""Dropout, and the keys that its masks come from.

Shapes: B rows of the batch, T positions, D channels, L layers, S sites.
"""

import jax
import jax.numpy as jnp

from jaxlm.ops.masks import keep_mask

SITES = ("attention", "attention_output", "mlp_output")  # per layer; the embedding is a layer of its own


def row_keys(seed_key: jax.Array, rows_B: jax.Array, n_layers: int) -> jax.Array:
    """uint32 [n_layers + 1, len(SITES), B, 2]: fold_in(seed_key, row, layer, site); the last layer is the embedding.

    Args:
      seed_key: key that already has the seed and the step folded in.
      rows_B: int32 [B], each row's index in the global batch.
    """
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(seed_key, rows_B)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))  # -> [n, B]
    keys_LSB = fold(keys_B, jnp.arange((n_layers + 1) * len(SITES), dtype=jnp.uint32))
    return jax.random.key_data(keys_LSB).reshape(n_layers + 1, len(SITES), -1, 2)


def derived_key(key_B2: jax.Array, number: int) -> jax.Array:
    """uint32 [B, 2]: the keys of another place of the same site."""
    fold = jax.vmap(lambda key: jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), number)))
    return fold(key_B2)


def dropout(x_BTD: jax.Array, key_B2: jax.Array | None, rate: float) -> jax.Array:
    """Zeroes elements with probability `rate` and scales the rest by 1 / (1 - rate); no key: returns `x_BTD`."""
    if key_B2 is None or rate == 0.0:
        return x_BTD
    _, t, d = x_BTD.shape
    positions = jnp.arange(t, dtype=jnp.uint32)[:, None]
    channels = jnp.arange(d, dtype=jnp.uint32)[None]
    keep_BTD = keep_mask(key_B2, (positions, channels), rate)
    return jnp.where(keep_BTD, x_BTD * jnp.asarray(1 / (1 - rate), x_BTD.dtype), jnp.zeros((), x_BTD.dtype))
