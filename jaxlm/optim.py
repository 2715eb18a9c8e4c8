"""Optimizers and learning-rate schedules; adding one is one entry in OPTIMIZERS or SCHEDULES."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import TrainingConfig

Schedule = Callable[[jax.Array], jax.Array]  # optimizer updates done so far -> learning rate, float32

# Each gives the direction of a step of length 1; the learning rate and weight decay come after it.
OPTIMIZERS: dict[str, Callable[[TrainingConfig], optax.GradientTransformation]] = {
    "adamw": lambda c: optax.scale_by_adam(c.beta1, c.beta2, c.eps),
    "adam": lambda c: optax.scale_by_adam(c.beta1, c.beta2, c.eps),
    "sgd": lambda c: optax.trace(c.beta1) if c.beta1 else optax.identity(),
    "lion": lambda c: optax.scale_by_lion(c.beta1, c.beta2),
}
COUPLED_DECAY = {"adam", "sgd"}  # weight decay as an L2 term of the gradient, before the update rule

# Each is the decay after warm-up: fraction of the way done, in [0, 1] -> factor, 1 at the start, 0 at the end.
SCHEDULES: dict[str, Callable[[TrainingConfig], Callable[[jax.Array], jax.Array]]] = {
    "cosine": lambda c: lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
    "linear": lambda c: lambda x: 1 - x,
    "polynomial": lambda c: lambda x: (1 - x) ** c.lr_power,
    "constant": lambda c: lambda x: jnp.ones_like(x),
}


def effective_warmup(config: TrainingConfig, total_steps: int) -> int:
    """warmup_steps, but at most a tenth of the run."""
    return min(config.warmup_steps, total_steps // 10)


def build_schedule(config: TrainingConfig, total_steps: int) -> Schedule:
    """Linear warm-up to learning_rate, then the decay to min_lr_ratio * learning_rate at `total_steps`.

    Update number s (from 0) uses `schedule(s)`: the first already moves, the last one uses the end value.
    """
    warmup = effective_warmup(config, total_steps)
    decay = SCHEDULES[config.lr_scheduler](config)
    peak, floor = config.learning_rate, config.min_lr_ratio

    def schedule(step: jax.Array) -> jax.Array:
        step = step.astype(jnp.float32)
        done = jnp.clip((step - warmup) / max(total_steps - 1 - warmup, 1), 0.0, 1.0)
        rising = (step + 1) / (warmup + 1)
        return peak * jnp.where(step < warmup, rising, floor + (1 - floor) * decay(done))

    return schedule


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
    rule = OPTIMIZERS[config.optimizer](config)
    parts = [decay, rule] if config.optimizer in COUPLED_DECAY else [rule, decay]
    if config.max_grad_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.max_grad_norm))
    return optax.chain(*parts)
