"""Dropout masks as a pure function of (key of the row, coordinates in the row).

Shapes: B rows of the batch, T positions, D channels; `...` any coordinates.

The bits come from a counter-based hash (the 32-bit finaliser of MurmurHash3 over a Weyl sequence) rather than from
`jax.random.bits`: every element is computed where it is used, inside whatever loop needs it, so that attention can
make the bits of one block at a time, the same in the forward and the backward pass and however rows are grouped.
"""

import jax
import jax.numpy as jnp

SITES = ("attention", "attention_output", "mlp_output")  # per layer; the embedding is a layer of its own
_WEYL = 0x9E3779B9  # 2**32 / golden ratio


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


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def keep(first: jax.Array, second: jax.Array, coordinates: tuple[jax.Array, ...], rate: float) -> jax.Array:
    """Boolean mask, True with probability 1 - rate, of the shape that all arguments broadcast to.

    Args:
      first, second: uint32, a row's key.
      coordinates: uint32, in the row; the last one varies fastest.
      rate: probability of False.
    """
    for coordinate in coordinates[:-1]:  # few elements: a full mix for each coordinate
        first = _mix(first ^ (coordinate * jnp.uint32(_WEYL)))
        second = _mix(second + first)
    bits = _mix((first ^ (coordinates[-1] * jnp.uint32(_WEYL))) + second)
    return bits >= jnp.uint32(round(rate * 2**32))


def keep_mask(key_B2: jax.Array, coordinates: tuple[jax.Array, ...], rate: float) -> jax.Array:
    """`keep` for each row of a batch: [B, ...], where `coordinates` broadcast to [...]."""
    ndim = coordinates[0].ndim
    first, second = (key_B2[:, i].reshape((-1,) + (1,) * ndim) for i in range(2))
    return keep(first, second, tuple(c[None] for c in coordinates), rate)


def dropout(x_BTD: jax.Array, key_B2: jax.Array | None, rate: float) -> jax.Array:
    """Zeroes elements with probability `rate` and scales the rest by 1 / (1 - rate); no key: returns `x_BTD`."""
    if key_B2 is None or rate == 0.0:
        return x_BTD
    _, t, d = x_BTD.shape
    positions = jnp.arange(t, dtype=jnp.uint32)[:, None]
    channels = jnp.arange(d, dtype=jnp.uint32)[None]
    keep_BTD = keep_mask(key_B2, (positions, channels), rate)
    return jnp.where(keep_BTD, x_BTD * jnp.asarray(1 / (1 - rate), x_BTD.dtype), jnp.zeros((), x_BTD.dtype))
