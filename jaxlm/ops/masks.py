"""Masked scores, and dropout masks as a pure function of a row's key and of coordinates in the row.

The bits come from a counter-based hash (the 32-bit finaliser of MurmurHash3 over a Weyl sequence) rather than from
`jax.random.bits`: each element can be computed where it is used, also within a kernel. Attention makes the bits of one
block at a time, the same in the forward and the backward pass and however rows are grouped.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # a score that has no weight; finite, so that a row of them gives no NaN
_WEYL = 0x9E3779B9  # 2**32 / golden ratio


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def mix_coordinates(
    key0: jax.Array, key1: jax.Array, coordinates: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """The two words of a key, uint32, for all but the last of an element's coordinates."""
    for coordinate in coordinates:  # few elements: a full mix for each coordinate
        key0 = _mix(key0 ^ (coordinate * jnp.uint32(_WEYL)))
        key1 = _mix(key1 + key0)
    return key0, key1


def keep_bits(key0: jax.Array, key1: jax.Array, last: jax.Array, rate: float) -> jax.Array:
    """`keep_elements` of the key of `mix_coordinates` and the last coordinate."""
    bits = _mix((key0 ^ (last * jnp.uint32(_WEYL))) + key1)
    return bits >= jnp.uint32(round(rate * 2**32))


def keep_elements(key0: jax.Array, key1: jax.Array, coordinates: tuple[jax.Array, ...], rate: float) -> jax.Array:
    """Boolean mask, True with probability 1 - rate, of the shape that all arguments broadcast to.

    Args:
      key0, key1: uint32, the two words of a row's key.
      coordinates: uint32, in the row; the last one varies fastest.
      rate: probability of False.
    """
    return keep_bits(*mix_coordinates(key0, key1, coordinates[:-1]), coordinates[-1], rate)


def keep_mask(key_B2: jax.Array, coordinates: tuple[jax.Array, ...], rate: float) -> jax.Array:
    """`keep_elements` for each row of a batch: [B, ...], where `coordinates` broadcast to [...]."""
    ndim = coordinates[0].ndim
    key0, key1 = (key_B2[:, i].reshape((-1,) + (1,) * ndim) for i in range(2))
    return keep_elements(key0, key1, tuple(c[None] for c in coordinates), rate)
