"""Optimizers; adding one is one entry in OPTIMIZERS."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import ArrayLike

from jaxlm.config import TrainingConfig
from jaxlm.model.adapters import ADAPTER
from jaxlm.parallel.split import STACKED, Params, Path, path_name

Transformation: TypeAlias = optax.GradientTransformation


def _adam(c: TrainingConfig) -> Transformation:
    return optax.scale_by_adam(c.beta1, c.beta2, c.eps)


def _momentum(c: TrainingConfig) -> Transformation:
    is_input = isinstance(c.beta1, jax.Array)  # of the program, which zero never is
    return optax.trace(c.beta1) if is_input or c.beta1 else optax.identity()


def _muon(c: TrainingConfig, decay: Transformation, by_neuron: bool = False) -> Transformation:
    """Muon (Jordan et al. 2024) for the blocks' matrices, each on its own; Adam for all else.

    Scaled to the size of Adam's steps (Liu et al. 2025, arXiv:2502.16982), so that one learning rate suits both.

    Args:
      by_neuron: as NorMuon does it (Li et al. 2025, arXiv:2510.05491): each output's weights take steps of equal size.
    """

    def axes(updates: Params) -> Params:  # of a kernel [I, O], or [I, n, O] of n matrices
        return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(0, x.ndim - 1), updates)

    def label(path: Path, _: jax.Array) -> str:
        return "muon" if path[0].key == STACKED and path[-1].key == "kernel" else "adam"

    def shaped(updates: Params, _: Params) -> Params:
        return jax.tree.map(lambda u: MUON_RMS * max(u.shape) ** 0.5 * u, updates)

    orthogonal = optax.contrib.scale_by_muon(
        ns_coeffs=NEWTON_SCHULZ[c.muon_coefficients], beta=c.muon_momentum, weight_dimension_numbers=axes
    )
    matrices = optax.chain(orthogonal, scale_by_neuron(c.beta2) if by_neuron else optax.stateless(shaped))
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)  # noqa: E731
    return optax.chain(optax.partition({"muon": matrices, "adam": _adam(c)}, labels), decay)


def _adafactor(c: TrainingConfig, decay: Transformation) -> Transformation:
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) with steps relative to the parameter's size, no momentum."""
    return optax.chain(optax.adafactor(), optax.scale(-1.0), decay)


def _from_optax(c: TrainingConfig, decay: Transformation) -> Transformation:
    """The optimizer of optax that "optax.NAME" names, with what options give of its arguments."""
    name = c.optimizer.removeprefix("optax.")
    factory = getattr(optax, name, None) or getattr(optax.contrib, name)
    takes = inspect.signature(factory).parameters
    values: dict[str, Any] = {"b1": c.beta1, "b2": c.beta2, "eps": c.eps, "weight_decay": 0.0}
    mask = next((name for name in ("mask", "weight_decay_mask") if name in takes), "")
    if mask and "weight_decay" in takes and not c.cautious_decay:  # it does weight decay itself
        values |= {"weight_decay": c.weight_decay, mask: partial(decay_mask, decay_embeddings=c.decay_embeddings)}
        decay = optax.identity()
    rule = factory(1.0, **{name: value for name, value in values.items() if name in takes})
    return optax.chain(rule, optax.scale(-1.0), decay)


# Each makes steps for a learning rate of 1, with `decay` in its place: after the update rule it is decoupled weight
# decay, before it an L2 term. Gradient clipping comes before them, the learning rate after them.
OPTIMIZERS: dict[str, Callable[[TrainingConfig, Transformation], Transformation]] = {
    "adamw": lambda c, decay: optax.chain(_adam(c), decay),
    "adam": lambda c, decay: optax.chain(decay, _adam(c)),
    "sgd": lambda c, decay: optax.chain(decay, _momentum(c)),
    "lion": lambda c, decay: optax.chain(optax.scale_by_lion(c.beta1, c.beta2), decay),
    "lamb": lambda c, decay: optax.chain(_adam(c), decay, scale_by_trust_ratio()),
    "muon": _muon,
    "normuon": partial(_muon, by_neuron=True),
    "adafactor": _adafactor,
}
BY_LAYER = ("muon", "normuon", "adafactor")  # and those from optax: they take each array for a single parameter
MUON_RMS = 0.2  # root mean square of Adam's usual step
# Factors of x, x^3 and x^5 in each iteration that brings singular values to 1.
NEWTON_SCHULZ: dict[str, Any] = {
    "jordan": (3.4445, -4.7750, 2.0315),  # five times; values end anywhere from 0.7 to 1.2
    "polar_express": (  # Amsel et al. 2025, arXiv:2505.16932, of polynomials for values from 0.001 on
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}


def scale_by_trust_ratio() -> optax.GradientTransformation:
    """LAMB's |parameter| / |update| (You et al. 2020, arXiv:1904.00962) of each layer's each parameter.

    As optax's transformation of this name, but a leaf of the stacked blocks is one parameter a layer.
    """

    def scaled(path: Path, update: jax.Array, param: jax.Array) -> jax.Array:
        axes = tuple(range(1 if path[0].key == STACKED else 0, param.ndim))
        norm = lambda x: jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True))  # noqa: E731
        both = (norm(param) > 0) & (norm(update) > 0)
        return update * jnp.where(both, norm(param) / jnp.where(both, norm(update), 1.0), 1.0)

    def apply(updates: Params, state: optax.EmptyState, params: Params) -> tuple[Params, optax.EmptyState]:
        return jax.tree_util.tree_map_with_path(scaled, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), apply)


def scale_by_neuron(beta2: ArrayLike) -> Transformation:
    """NorMuon's scaling: by the root of each output's mean square, averaged over updates; then to MUON_RMS in all.

    Of matrices [I, O], or [I, n, O], which are n; the state is [1, O] or [1, n, O]. The averages start at zero and are
    not corrected for that: the size of the whole is set in the end.
    """

    def init(params: Params) -> Params:
        return jax.tree.map(lambda p: jnp.zeros((1, *p.shape[1:]), p.dtype), params)

    def update(updates: Params, state: Params, _: Params) -> tuple[Params, Params]:
        mean = lambda u: jnp.mean(u * u, axis=0, keepdims=True)  # noqa: E731
        state = jax.tree.map(lambda v, u: beta2 * v + (1 - beta2) * mean(u), state, updates)
        scaled = jax.tree.map(lambda u, v: u / (jnp.sqrt(v) + 1e-8), updates, state)
        size = lambda u: jnp.sqrt(jnp.mean(u * u, axis=(0, -1), keepdims=True))  # noqa: E731
        return jax.tree.map(lambda u: MUON_RMS * u / jnp.maximum(size(u), 1e-8), scaled), state

    return optax.GradientTransformation(init, update)


def cautious(decay: Transformation) -> Transformation:
    """`decay` only where it goes the way that the update goes (Chen et al. 2025, arXiv:2510.12402)."""

    def update(updates: Params, state: Any, params: Params) -> tuple[Params, Any]:
        decayed, state = decay.update(updates, state, params)
        choose = lambda u, d, p: jnp.where(u * p > 0, d, u)  # noqa: E731
        return jax.tree.map(choose, updates, decayed, params), state

    return optax.GradientTransformation(decay.init, update)


def scale_embeddings(factor: ArrayLike) -> Transformation:
    """Multiplies the embeddings' updates."""

    def scaled(path: Path, update: jax.Array) -> jax.Array:
        return update * factor if is_embedding(path) else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


def is_embedding(path: Path) -> bool:
    name: str = path[-1].key
    return name.endswith("embedding")


def decay_mask(params: Params, decay_embeddings: bool) -> Params:
    """True for the leaves that weight decay applies to: matrices, and embeddings if asked; no biases, no norms."""

    def decays(path: Path, _: jax.Array) -> bool:
        matrix = path[-1].key == "kernel" or f"/{ADAPTER}/" in path_name(path)
        return matrix or (decay_embeddings and is_embedding(path))

    return jax.tree_util.tree_map_with_path(decays, params)


def by_layer(rule: Transformation, shapes: Params | None) -> Transformation:
    """`rule` as if the parameters of each layer were arrays of their own, and without padding.

    Args:
      shapes: each parameter's own shape; None: that of the arrays.
    """

    def layers_and_rest(tree: Params) -> tuple[Params, Params]:
        if shapes is not None:
            tree = jax.tree.map(lambda x, own: x[tuple(slice(n) for n in own.shape)], tree, shapes)
        layers = {name: leaf for name, leaf in tree.items() if name == STACKED}  # either may be empty: not trained
        return layers, {name: leaf for name, leaf in tree.items() if name != STACKED}

    def init(params: Params) -> dict[str, Any]:
        layers, rest = layers_and_rest(params)
        return {"layers": jax.vmap(rule.init)(layers) if layers else (), "rest": rule.init(rest) if rest else ()}

    def update(updates: Params, state: dict[str, Any], params: Params) -> tuple[Params, dict[str, Any]]:
        (layers, rest), (layer_params, rest_params) = layers_and_rest(updates), layers_and_rest(params)
        layers_state, rest_state = state["layers"], state["rest"]
        if layers:
            layers, layers_state = jax.vmap(rule.update)(layers, layers_state, layer_params)
        if rest:
            rest, rest_state = rule.update(rest, rest_state, rest_params)

        def pad(u: jax.Array, p: jax.Array) -> jax.Array:
            return jnp.pad(u, [(0, padded - own) for padded, own in zip(p.shape, u.shape, strict=True)])

        return jax.tree.map(pad, layers | rest, params), {"layers": layers_state, "rest": rest_state}

    return optax.GradientTransformation(init, update)


def build_optimizer(config: TrainingConfig, shapes: Params | None = None) -> optax.GradientTransformation:
    """Clipping, update rule and weight decay; its updates are still to be multiplied by minus the learning rate.

    The learning rate stays outside, so that it is a function of the run's step even when an update was skipped.

    Args:
      shapes: the parameters' own shapes (`Layout.shapes`), where ZeRO pads them; None: those of the arrays.
    """
    mask = partial(decay_mask, decay_embeddings=config.decay_embeddings)
    decay = optax.add_decayed_weights(config.weight_decay, mask=mask)
    decay = cautious(decay) if config.cautious_decay else decay
    rule = OPTIMIZERS.get(config.optimizer, _from_optax)(config, decay)
    if config.optimizer in BY_LAYER or config.optimizer not in OPTIMIZERS:
        rule = by_layer(rule, shapes)
    clip = [] if config.max_grad_norm is None else [optax.clip_by_global_norm(config.max_grad_norm)]
    ratio = config.embedding_lr_ratio
    return optax.chain(*clip, rule, *([] if ratio is None else [scale_embeddings(ratio)]))
