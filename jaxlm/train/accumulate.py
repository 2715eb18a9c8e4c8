"""Gradient accumulation: K micro-batches summed into one update by `optax.MultiSteps`."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxlm.ops.scheduling import scan_micro_batches
from jaxlm.parallel.split import Params

Batch: TypeAlias = dict[str, jax.Array]
LossAndGradients: TypeAlias = tuple[Any, Params]  # the loss may be a tree of sums


def accumulate(
    gradients_of: Callable[[Batch], LossAndGradients], batch: Batch, dtype: DTypeLike, platform: str
) -> LossAndGradients:
    """The sums of a loss and its gradients over the K micro-batches of `batch`.

    `optax.MultiSteps` is driven by a scan over the micro-batches. It wraps the identity, not the optimizer, so that the
    caller can reduce the sum over the devices once, and its state lives no longer than the update, so that a gradient
    that is not finite spoils this update alone. It hands out the sum with one more update, of zeros, behind the scan:
    within it, every update would write an array as large, of zeros but for the last.

    Args:
      gradients_of: a micro-batch ([B, ...] arrays) -> the loss, float32 scalars, and float32 gradients.
      batch: [K, B, ...] arrays.
      dtype: what gradients are summed in; the sum comes back as float32.
      platform: JAX's name of the backend.
    """
    first = jax.tree.map(lambda x: x[0], batch)
    k = len(batch["rows"])
    if k == 1:
        return gradients_of(first)
    steps = optax.MultiSteps(optax.identity(), every_k_schedule=k + 1, use_grad_mean=False, accumulator_dtype=dtype)
    loss, zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients_of, first))

    def add(carry: tuple[Any, optax.MultiStepsState], micro_batch: Batch) -> tuple[tuple, None]:
        total, state = carry
        loss, gradients = gradients_of(micro_batch)
        _, state = steps.update(gradients, state)
        return (jax.tree.map(jnp.add, total, loss), state), None

    loss, state = scan_micro_batches(add, (loss, steps.init(zeros)), batch, platform)
    return loss, steps.update(zeros, state)[0]
