"""Position encodings: sinusoids, added to the embedding, and rotary embeddings with the scaling of their frequencies.

Shapes: B rows, T positions, D model width, H heads, K channels of a head, R of them that turn.
"""

import math

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig

YARN_FAST, YARN_SLOW = 32, 1  # turns in the original length: more, and a frequency is kept; fewer, it is fully scaled


def sinusoids(positions_BT: jax.Array, d_model: int) -> jax.Array:
    """Sinusoidal position embedding (Vaswani et al. 2017, section 3.5), float32 [B, T, D]."""
    half = d_model // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(table, ((0, 0), (0, 0), (0, d_model - 2 * half)))


def _index_of(turns: float, length: int, config: ModelConfig) -> float:
    """The (fractional) index of the frequency that makes `turns` full turns in `length` positions."""
    half = config.rotary_size // 2
    return half * math.log(length / (turns * 2 * math.pi)) / math.log(config.rope_theta)


def _kept_share(frequencies: jax.Array, config: ModelConfig) -> jax.Array:
    """The share of each frequency that rope_scaling keeps, from 0 (the frequency is divided by the factor) to 1."""
    length = config.rope_original_length
    if config.rope_scaling == "linear" or length is None:  # `validate` requires it of the others
        return jnp.zeros_like(frequencies)
    if config.rope_scaling == "llama3":
        turns = length * frequencies / (2 * math.pi)
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        return jnp.clip((turns - low) / (high - low), 0, 1)
    half = len(frequencies)
    first = max(math.floor(_index_of(YARN_FAST, length, config)), 0)
    last = min(math.ceil(_index_of(YARN_SLOW, length, config)), 2 * half - 1)
    steps = jnp.arange(half, dtype=jnp.float32) - first
    return 1 - jnp.clip(steps / max(last - first, 1e-3), 0, 1)


def rotary_frequencies(config: ModelConfig) -> tuple[jax.Array, float]:
    """(radians a position, float32 [R / 2]; factor on the rotated vectors, which is 1 except for yarn).

    `config.rope_scaling`: linear (Chen et al. 2023, arXiv:2306.15595) divides all frequencies by the factor; llama3
    (Dubey et al. 2024, arXiv:2407.21783) and yarn (Peng et al. 2023, arXiv:2309.00071) keep high frequencies, divide
    low ones and interpolate in between.
    """
    half = config.rotary_size // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling is None:
        return frequencies, 1.0
    kept, factor = _kept_share(frequencies, config), config.rope_scaling_factor
    scale = 0.1 * math.log(factor) + 1 if config.rope_scaling == "yarn" else 1.0
    return frequencies * (kept + (1 - kept) / factor), scale


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in its split-halves form, computed in float32.

    The first `config.rotary_size` channels of a head turn, the others stay.
    """
    frequencies, scale = rotary_frequencies(config)
    angles_BT1R = (positions_BT[..., None].astype(jnp.float32) * frequencies[None, None])[:, :, None]
    cos, sin = jnp.cos(angles_BT1R), jnp.sin(angles_BT1R)
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    turning, rest = jnp.split(x_BTHK, [config.rotary_size], axis=-1)
    x1, x2 = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTHK.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
