"""Which parameters a run trains: all, all but frozen ones, or adapters alone.

What is trained is a part of the tree of parameters, what is frozen the rest; both are nested dicts without the other's
leaves.
"""

from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxlm.config import TrainingConfig
from jaxlm.errors import UserError
from jaxlm.model import Transformer
from jaxlm.model.adapters import ADAPTER, add_adapters, merged_kernel
from jaxlm.parallel.split import Params, Path

Trains = Callable[[str], bool]  # by a parameter's path, such as "blocks/mlp/up/kernel"


def trains(training: TrainingConfig) -> Trains | None:
    """Whether a parameter is trained; None: all are."""
    if training.lora_rank is not None:
        return is_adapter
    if training.freeze:
        return lambda name: not any(_matches(name, pattern) for pattern in training.freeze)
    return None


def is_adapter(name: str) -> bool:
    """Whether a parameter's path is of an adapter."""
    return ADAPTER in name.split("/")


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) or fnmatch(name, f"{pattern}/*")


def check_trains(training: TrainingConfig, names: list[str]) -> None:
    """Raises UserError where an option names no parameter of `names`, or leaves none to be trained."""
    for pattern in training.freeze:
        if not any(_matches(name, pattern) for name in names):
            listed = ", ".join(sorted(names))
            raise UserError(f"training.freeze ({pattern}) matches none of the parameters: {listed}")
    layers = {"/".join(name.split("/")[1:3]) for name in names if is_adapter(name) or name.endswith("kernel")}
    for pattern in training.lora_targets if training.lora_rank else ():
        if not any(fnmatch(layer, pattern) for layer in layers):
            raise UserError(
                f"training.lora_targets ({pattern}) matches none of the layers: {', '.join(sorted(layers))}"
            )
    which = trains(training)
    if which is not None and not any(map(which, names)):
        raise UserError(f"training.freeze ({','.join(training.freeze)}) leaves no parameter to train; leave some out")


def part(tree: Params, which: Callable[[str], bool], above: str = "") -> Params:
    """The leaves of a nested dict whose paths `which` takes, in their places."""
    kept: Params = {}
    for name, value in tree.items():
        path = f"{above}{name}"
        if isinstance(value, dict):
            if inside := part(value, which, f"{path}/"):
                kept[name] = inside
        elif which(path):
            kept[name] = value
    return kept


def divided(params: Params, training: TrainingConfig) -> tuple[Params, Params]:
    """What is trained of `params`, and what is frozen."""
    which = trains(training)
    return (params, {}) if which is None else (part(params, which), part(params, lambda name: not which(name)))


def joined(one: Params, other: Params) -> Params:
    """A tree with the leaves of both, in the order of their names; the reverse of `divided`."""
    if not other:
        return one
    names = sorted({*one, *other})
    both = {name: (one.get(name), other.get(name)) for name in names}
    return {
        name: joined(a, b) if isinstance(a, dict) and isinstance(b, dict) else b if a is None else a
        for name, (a, b) in both.items()
    }


def narrow(frozen: Params, dtype: DTypeLike) -> Params:
    """Frozen parameters as they are held: matrices in the type that they are computed in, all else as it is."""

    def held(path: Path, x: jax.Array) -> jax.Array:
        return x.astype(dtype) if path[-1].key == "kernel" or path[-1].key.endswith("embedding") else x

    return jax.tree_util.tree_map_with_path(held, frozen)


def with_adapters(model: Transformer, training: TrainingConfig, key: jax.Array) -> Transformer:
    """The model, with the adapters that the options ask for."""
    if training.lora_rank is not None:
        rank = training.lora_rank
        options = training.lora_targets, rank, alpha(training) / rank, training.lora_dropout
        add_adapters(model.blocks, *options, nnx.Rngs(key))
    return model


def alpha(training: TrainingConfig) -> float:
    """What adapters add is multiplied by this, divided by their rank."""
    return 2.0 * (training.lora_rank or 0) if training.lora_alpha is None else training.lora_alpha


def merged(params: Params, training: TrainingConfig) -> Params:
    """Whole parameters with the adapters added to the kernels that they belong to; as they are without adapters."""
    if training.lora_rank is None:
        return params
    scale = alpha(training) / training.lora_rank

    def merge(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        own = {name: merge(value) for name, value in tree.items() if name != ADAPTER}
        if ADAPTER in tree:
            own["kernel"] = merged_kernel(own["kernel"], tree[ADAPTER], scale)
        return own

    result: Params = merge(params)
    return result
