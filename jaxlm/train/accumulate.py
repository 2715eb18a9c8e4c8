"""Gradient accumulation: K micro-batches summed into one update by `optax.MultiSteps`."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxlm.parallel.split import Params

Batch: TypeAlias = dict[str, jax.Array]
LossAndGradients: TypeAlias = tuple[Any, Params]  # the loss may be a tree of sums


def accumulate(gradients_of: Callable[[Batch], LossAndGradients], batch: Batch, dtype: DTypeLike) -> LossAndGradients:
    """The sums of a loss and its gradients over the K micro-batches of `batch`.

    `optax.MultiSteps` is driven by a scan over the micro-batches: its K-th update is the sum of all K gradients. It
    wraps the identity, not the optimizer, so that the caller can reduce the sum over the devices once, and its state
    lives no longer than the update, so that a gradient that is not finite spoils this update alone.

    Args:
      gradients_of: a micro-batch ([B, ...] arrays) -> the loss, float32 scalars, and float32 gradients.
      batch: [K, B, ...] arrays.
      dtype: what gradients are summed in; the sum comes back as float32.
    """
    first = jax.tree.map(lambda x: x[0], batch)
    k = len(batch["rows"])
    if k == 1:
        return gradients_of(first)
    steps = optax.MultiSteps(optax.identity(), every_k_schedule=k, use_grad_mean=False, accumulator_dtype=dtype)
    loss, gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients_of, first))

    def add(carry: tuple[Any, Params, optax.MultiStepsState], micro_batch: Batch) -> tuple[tuple, None]:
        total, _, state = carry
        loss, gradients = gradients_of(micro_batch)
        total_gradients, state = steps.update(gradients, state)
        return (jax.tree.map(jnp.add, total, loss), total_gradients, state), None

    (loss, gradients, _), _ = jax.lax.scan(add, (loss, gradients, steps.init(gradients)), batch)
    return loss, gradients
