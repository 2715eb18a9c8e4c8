"""An exponential moving average of the parameters, kept as a part of the optimizer's state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxlm.parallel.split import Params


class Averaged(NamedTuple):
    """The optimizer's state of a run with `ema_decay`."""

    rule: optax.OptState  # that of the update rule
    average: Params  # as the layout shards parameters


def next_average(average: Params, moved: Params, decay: ArrayLike, step: jax.Array) -> Params:
    """The average after an update that led to `moved`.

    The first ones weigh less, min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage, or the
    first parameters would stay in it for long.

    Args:
      step: int32, updates before this one.
    """
    done = step.astype(jnp.float32)
    share = 1 - jnp.minimum(decay, (1 + done) / (10 + done))
    return jax.tree.map(lambda a, p: a + share * (p - a), average, moved)
