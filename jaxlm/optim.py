"""Optimizers and learning-rate schedules; adding one is one entry in OPTIMIZERS or SCHEDULES."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import TrainingConfig

Schedule = Callable[[jax.Array], jax.Array]  # optimizer updates done so far -> learning rate, float32

Transformation: TypeAlias = optax.GradientTransformation


def _adam(c: TrainingConfig) -> Transformation:
    return optax.scale_by_adam(c.beta1, c.beta2, c.eps)


def _momentum(c: TrainingConfig) -> Transformation:
    return optax.trace(c.beta1) if c.beta1 else optax.identity()


# Each gives a step of length 1 and puts `decay` (weight decay, an L2 term if it comes before the update rule) in its
# place; gradient clipping comes before it, the learning rate after it.
OPTIMIZERS: dict[str, Callable[[TrainingConfig, Transformation], Transformation]] = {
    "adamw": lambda c, decay: optax.chain(_adam(c), decay),
    "adam": lambda c, decay: optax.chain(decay, _adam(c)),
    "sgd": lambda c, decay: optax.chain(decay, _momentum(c)),
    "lion": lambda c, decay: optax.chain(optax.scale_by_lion(c.beta1, c.beta2), decay),
    "lamb": lambda c, decay: optax.chain(_adam(c), decay, scale_by_trust_ratio()),
}

# Each is the decay after warm-up: fraction of the way done, in [0, 1] -> factor, 1 at the start, 0 at the end.
SCHEDULES: dict[str, Callable[[TrainingConfig], Callable[[jax.Array], jax.Array]]] = {
    "cosine": lambda c: lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
    "linear": lambda c: lambda x: 1 - x,
    "polynomial": lambda c: lambda x: (1 - x) ** c.lr_power,
    "constant": lambda c: lambda x: jnp.ones_like(x),
}


def schedule_end(config: TrainingConfig, total_steps: int) -> int:
    """The update at which the learning rate reaches its last value."""
    return config.schedule_steps if config.schedule_steps is not None else total_steps


def effective_warmup(config: TrainingConfig, total_steps: int) -> int:
    """warmup_steps, but at most a tenth of the run and of the schedule."""
    return min(config.warmup_steps, min(total_steps, schedule_end(config, total_steps)) // 10)


def build_schedule(config: TrainingConfig, total_steps: int) -> Schedule:
    """Warm-up to learning_rate, then the decay to min_lr_ratio * learning_rate at the schedule's end.

    Update number s (from 0) uses `schedule(s)`: the first already moves, the last one uses the end value. The end is
    at `schedule_steps`, or at `total_steps`.
    """
    end = schedule_end(config, total_steps)
    warmup = effective_warmup(config, total_steps)
    decay = SCHEDULES[config.lr_scheduler](config)
    peak, floor, start = config.learning_rate, config.min_lr_ratio, config.warmup_min_ratio

    def schedule(step: jax.Array) -> jax.Array:
        step = step.astype(jnp.float32)
        done = jnp.clip((step - warmup) / max(end - 1 - warmup, 1), 0.0, 1.0)
        linear, log = (step + 1) / (warmup + 1), jnp.log(step + 2) / math.log(warmup + 2)
        rising = log if config.warmup_shape == "log" else linear
        return peak * jnp.where(step < warmup, start + (1 - start) * rising, floor + (1 - floor) * decay(done))

    return schedule


def scale_by_trust_ratio() -> optax.GradientTransformation:
    """LAMB's |parameter| / |update| (You et al. 2020, arXiv:1904.00962) of each layer's each parameter.

    As optax's transformation of this name, but a leaf of the stacked blocks is one parameter a layer.
    """

    def scaled(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        axes = tuple(range(1 if path[0].key == "blocks" else 0, param.ndim))
        norm = lambda x: jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True))  # noqa: E731
        both = (norm(param) > 0) & (norm(update) > 0)
        return update * jnp.where(both, norm(param) / jnp.where(both, norm(update), 1.0), 1.0)

    def apply(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return jax.tree_util.tree_map_with_path(scaled, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), apply)


def decay_mask(params: Any, decay_embeddings: bool) -> Any:
    """True for the leaves that weight decay applies to: matrices, and embeddings if asked; no biases, no norms."""

    def decays(path: Any, leaf: Any) -> bool:
        name = path[-1].key
        return name == "kernel" or (decay_embeddings and name.endswith("embedding"))

    return jax.tree_util.tree_map_with_path(decays, params)


def build_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Clipping, update rule and weight decay; its updates are still to be multiplied by minus the learning rate.

    The learning rate stays outside, so that it is a function of the run's step even when an update was skipped.
    """
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda params: decay_mask(params, config.decay_embeddings)
    )
    rule = OPTIMIZERS[config.optimizer](config, decay)
    if config.max_grad_norm is None:
        return rule
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), rule)
