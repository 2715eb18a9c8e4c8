"""The number formats of a run: float32 master parameters, computation in the configured type, float16's loss scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlm.config import TrainingConfig

MAX_LOSS_SCALE = 2.0**31


def compute_dtype(config: TrainingConfig) -> np.dtype:
    """float32 without use_amp, else amp_dtype. Softmax, loss and norm statistics are float32 in either case."""
    return jnp.dtype(config.amp_dtype) if config.use_amp else jnp.dtype("float32")


def scales_loss(config: TrainingConfig) -> bool:
    """Whether gradients could underflow: float16 has 5 bits of exponent, the others have 8."""
    return compute_dtype(config) == jnp.float16


def scales_loss_dynamically(config: TrainingConfig) -> bool:
    """Whether the scale follows the gradients."""
    return scales_loss(config) and not config.loss_scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """The factor on the loss that keeps float16 gradients in range (Micikevicius et al. 2018, arXiv:1710.03740).

    Scalars on the device; 1 and at rest where the compute type needs none.
    """

    scale: jax.Array  # float32
    good_steps: jax.Array  # int32, updates since the last overflow or growth
    tolerance: jax.Array  # int32, overflows to go before the scale is halved
    exhausted: jax.Array  # int32, overflows that came when the scale was as low as it may get


def initial_loss_scale(config: TrainingConfig) -> float:
    """The factor of the first update."""
    return (config.loss_scale or 2.0**config.initial_loss_scale_power) if scales_loss(config) else 1.0


def first_loss_scale(config: TrainingConfig, scale: ArrayLike) -> LossScale:
    """The state before the first update, from its `initial_loss_scale`."""
    count = lambda value=0: jnp.full((), value, jnp.int32)  # noqa: E731  (each its own buffer, to be donated)
    return LossScale(
        scale=jnp.full((), scale, jnp.float32),
        good_steps=count(),
        tolerance=count(config.loss_scale_hysteresis),
        exhausted=count(),
    )


def next_loss_scale(now: LossScale, finite: jax.Array, config: TrainingConfig) -> LossScale:
    """The scale after an update whose gradients were finite or not, by DeepSpeed's rule.

    Halved (not below min_loss_scale) by the last of loss_scale_hysteresis overflows; doubled, with the hysteresis
    renewed, after loss_scale_window updates without one. A fixed scale stays.
    """
    if not scales_loss_dynamically(config):
        return now
    grows = finite & (now.good_steps + 1 >= config.loss_scale_window)
    shrinks = ~finite & (now.tolerance <= 1)
    at_floor = ~(now.scale > config.min_loss_scale)  # or not a number
    scale = jnp.where(grows, jnp.minimum(now.scale * 2, MAX_LOSS_SCALE), now.scale)
    return LossScale(
        scale=jnp.where(shrinks, jnp.maximum(scale / 2, config.min_loss_scale), scale),
        good_steps=jnp.where(finite & ~grows, now.good_steps + 1, 0),
        tolerance=jnp.where(
            grows,
            config.loss_scale_hysteresis,
            jnp.where(finite, now.tolerance, jnp.maximum(now.tolerance - 1, 1)),
        ),
        exhausted=now.exhausted + jnp.where(shrinks & at_floor, 1, 0),
    )
