"""Optimizers and learning-rate schedules; adding one is one entry in OPTIMIZERS or SCHEDULES."""

import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from jaxlm.config import TrainingConfig, nearest
from jaxlm.errors import UserError

Schedule = Callable[[jax.Array], jax.Array]  # optimizer updates done so far -> learning rate, float32

Transformation: TypeAlias = optax.GradientTransformation


def _adam(c: TrainingConfig) -> Transformation:
    return optax.scale_by_adam(c.beta1, c.beta2, c.eps)


def _momentum(c: TrainingConfig) -> Transformation:
    return optax.trace(c.beta1) if c.beta1 else optax.identity()


def _muon(c: TrainingConfig, decay: Transformation) -> Transformation:
    """Muon (Jordan et al. 2024) for the blocks' matrices, each on its own; Adam for all else.

    Scaled to the size of Adam's steps (Liu et al. 2025, arXiv:2502.16982), so that one learning rate suits both.
    """

    def axes(updates: Any) -> Any:  # of a kernel [I, O], or [I, n, O] of n matrices
        return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(0, x.ndim - 1), updates)

    def label(path: Any, _: Any) -> str:
        return "muon" if path[0].key == "blocks" and path[-1].key == "kernel" else "adam"

    matrices = optax.chain(
        optax.contrib.scale_by_muon(beta=c.muon_momentum, weight_dimension_numbers=axes),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u: MUON_RMS * max(u.shape) ** 0.5 * u, updates)),
    )
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)  # noqa: E731
    return optax.chain(optax.partition({"muon": matrices, "adam": _adam(c)}, labels), decay)


def _adafactor(c: TrainingConfig, decay: Transformation) -> Transformation:
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) with steps relative to the parameter's size, no momentum."""
    return optax.chain(optax.adafactor(), optax.scale(-1.0), decay)


def _optax_factory(name: str) -> Callable[..., Transformation]:
    """The function of optax or optax.contrib that "optax.NAME" names, if options give all that it needs."""
    known = {
        short: function
        for module in (optax.contrib, optax)
        for short, function in vars(module).items()
        if isinstance(function, types.FunctionType | functools.partial) and not short.startswith(("_", "scale_by_"))
        if "learning_rate" in inspect.signature(function).parameters
    }
    short = name.removeprefix("optax.").removeprefix("contrib.")
    if short in OPTIMIZERS:
        raise UserError(f"training.optimizer ({name}): use {short}, which is built in")
    if short not in known:
        hint = nearest(short, set(known) - set(OPTIMIZERS))
        raise UserError(f"training.optimizer ({name}) is not an optimizer of optax{hint}")
    parameters = inspect.signature(known[short]).parameters
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    missing = [n for n in needed if n != "learning_rate"]
    if missing:
        raise UserError(f"training.optimizer ({name}) needs {', '.join(missing)}, which no option gives; use another")
    if {"key", "seed"} & set(parameters):
        raise UserError(f"training.optimizer ({name}) draws random numbers of its own; use another")
    return known[short]


def _optax_rule(c: TrainingConfig, learning_rate: float) -> tuple[Transformation, bool]:
    """(the optimizer that "optax.NAME" names; whether it does weight decay itself)."""
    factory = _optax_factory(c.optimizer)
    takes = inspect.signature(factory).parameters
    values: dict[str, Any] = {"b1": c.beta1, "b2": c.beta2, "eps": c.eps}
    mask = next((name for name in ("mask", "weight_decay_mask") if name in takes), "")
    decays = mask != "" and "weight_decay" in takes
    if decays:
        values |= {"weight_decay": c.weight_decay, mask: lambda params: decay_mask(params, c.decay_embeddings)}
    elif "weight_decay" in takes:
        values["weight_decay"] = 0.0
    return factory(learning_rate, **{name: value for name, value in values.items() if name in takes}), decays


def _from_optax(c: TrainingConfig, decay: Transformation) -> Transformation:
    rule, decays = _optax_rule(c, 1.0)
    return optax.chain(rule, optax.scale(-1.0), optax.identity() if decays else decay)


def check_optimizer(config: TrainingConfig) -> None:
    """Tries an optimizer of optax on a few numbers.

    Raises:
      UserError: it does not exist, needs more than gradients and parameters, or does not fit here: its steps have to be
        in proportion to the learning rate, which is applied outside of it, and each parameter's its own affair, as
        layers are stacked.
    """
    if config.optimizer in OPTIMIZERS:
        return
    leaves = {"a": np.linspace(-1, 2, 12, dtype=np.float32).reshape(3, 4), "b": np.linspace(1, 4, 5, dtype=np.float32)}

    def moved(names: str, inside: float, outside: float) -> Any:
        rule, _ = _optax_rule(config, inside)
        params = start = {name: {"kernel": jnp.asarray(leaves[name])} for name in names}
        state, steps = rule.init(params), jax.tree.map(jnp.zeros_like, params)
        for i in range(5):
            gradients = jax.tree.map(lambda x, i=i: jnp.sign(x) + 0.1 * jnp.cos(7 * i + x), start)
            updates, state = rule.update(gradients, state, params)
            params, steps = (jax.tree.map(lambda x, u: x + outside * u, tree, updates) for tree in (params, steps))
        shared = [x for x in jax.tree.leaves(state) if x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.floating)]
        return steps | ({"shared": shared} if shared else {})

    try:
        both, apart = jax.device_get(
            jax.jit(lambda: (moved("ab", 0.5, 1.0), moved("a", 1.0, 0.5) | moved("b", 1.0, 0.5)))()
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"training.optimizer ({config.optimizer}) needs more than gradients and parameters; use another"
        ) from error
    alike = [np.allclose(x, y, 1e-3, 0) for x, y in zip(jax.tree.leaves(both), jax.tree.leaves(apart), strict=True)]
    if "shared" in both or not all(alike):
        raise UserError(
            f"training.optimizer ({config.optimizer}) takes steps that are not in proportion to "
            "training.learning_rate, or that depend on all parameters at once; use another"
        )


# Each gives a step of length 1 and puts `decay` (weight decay, an L2 term if it comes before the update rule) in its
# place; gradient clipping comes before it, the learning rate after it.
OPTIMIZERS: dict[str, Callable[[TrainingConfig, Transformation], Transformation]] = {
    "adamw": lambda c, decay: optax.chain(_adam(c), decay),
    "adam": lambda c, decay: optax.chain(decay, _adam(c)),
    "sgd": lambda c, decay: optax.chain(decay, _momentum(c)),
    "lion": lambda c, decay: optax.chain(optax.scale_by_lion(c.beta1, c.beta2), decay),
    "lamb": lambda c, decay: optax.chain(_adam(c), decay, scale_by_trust_ratio()),
    "muon": _muon,
    "adafactor": _adafactor,
}
BY_LAYER = ("muon", "adafactor")  # and optax's own: they take an array for one parameter
MUON_RMS = 0.2  # root mean square of Adam's usual step

# Each is the decay after warm-up: fraction of the way done, in [0, 1] -> factor, 1 at the start, 0 at the end.
SCHEDULES: dict[str, Callable[[TrainingConfig], Callable[[jax.Array], jax.Array]]] = {
    "cosine": lambda c: lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
    "linear": lambda c: lambda x: 1 - x,
    "polynomial": lambda c: lambda x: (1 - x) ** c.lr_power,
    "constant": lambda c: lambda x: jnp.ones_like(x),
    "wsd": lambda c: lambda x: jnp.minimum((1 - x) / c.decay_fraction, 1),
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


def by_layer(rule: Transformation, shapes: Any) -> Transformation:
    """`rule` as if each layer's parameters were apart, and without padding.

    Args:
      shapes: each parameter's own shape; None: that of the arrays.
    """

    def layers_and_rest(tree: Any) -> dict[str, Any]:
        if shapes is not None:
            tree = jax.tree.map(lambda x, of: x[tuple(slice(n) for n in of.shape)], tree, shapes)
        return {"layers": {"blocks": tree["blocks"]}, "rest": {k: v for k, v in tree.items() if k != "blocks"}}

    def init(params: Any) -> dict[str, Any]:
        parts = layers_and_rest(params)
        return {"layers": jax.vmap(rule.init)(parts["layers"]), "rest": rule.init(parts["rest"])}

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        of, at = layers_and_rest(updates), layers_and_rest(params)
        layers, layers_state = jax.vmap(rule.update)(of["layers"], state["layers"], at["layers"])
        rest, rest_state = rule.update(of["rest"], state["rest"], at["rest"])

        def pad(u: jax.Array, p: jax.Array) -> jax.Array:
            return jnp.pad(u, [(0, whole - own) for whole, own in zip(p.shape, u.shape, strict=True)])

        return jax.tree.map(pad, layers | rest, params), {"layers": layers_state, "rest": rest_state}

    return optax.GradientTransformation(init, update)


def build_optimizer(config: TrainingConfig, shapes: Any = None) -> optax.GradientTransformation:
    """Clipping, update rule and weight decay; its updates are still to be multiplied by minus the learning rate.

    The learning rate stays outside, so that it is a function of the run's step even when an update was skipped.

    Args:
      shapes: the parameters' own shapes (`Layout.shapes`), where ZeRO pads them; None: those of the arrays.
    """
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda params: decay_mask(params, config.decay_embeddings)
    )
    rule = OPTIMIZERS.get(config.optimizer, _from_optax)(config, decay)
    if config.optimizer in BY_LAYER or config.optimizer not in OPTIMIZERS:
        rule = by_layer(rule, shapes)
    if config.max_grad_norm is None:
        return rule
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), rule)
