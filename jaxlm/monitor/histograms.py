"""How the values of every parameter, and of its gradient, are spread: computed on the devices, only when asked for.

Shapes: L layers, N bins.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import Config
from jaxlm.monitor.sinks import Histogram
from jaxlm.parallel.sharding import STACKED, Layout, path_name
from jaxlm.train.step import Batch, TrainState, make_gradients

BINS = 64


def make_histograms(graphdef: Any, config: Config, layout: Layout) -> Callable[[TrainState, Batch], Any]:
    """(state, batch) -> {"parameters" and "gradients": {name of a parameter: `count_values` of it}}.

    Args of the function:
      state: before an update; `batch`: that of the update. Gradients are those of the update, before clipping.
    """
    gradients_of = make_gradients(graphdef, config, layout)

    def histograms(state: TrainState, batch: Batch) -> Any:
        scale = state.loss_scale.scale
        n_targets = (batch["segments"] > 0).sum().astype(jnp.float32)
        _, gradients = gradients_of(state.params, batch, state.step, scale / n_targets)
        gradients = jax.tree.map(lambda x: x / scale, gradients)
        trees = {"parameters": layout.cropped(state.params), "gradients": layout.cropped(gradients)}
        return {name: _of_leaves(tree) for name, tree in trees.items()}

    return histograms


def _of_leaves(tree: Any) -> dict[str, dict[str, jax.Array]]:
    named = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    return {
        name: (jax.vmap(count_values) if name.startswith(STACKED) else count_values)(x) for name, x in named.items()
    }


def count_values(x: jax.Array) -> dict[str, jax.Array]:
    """Of the finite values of `x`: `counts` int32 [N] in equal bins from `low` to `high`, their `total` and `squares`.

    All others are float32 scalars; without any finite value, low is above high.
    """
    x = x.astype(jnp.float32).ravel()
    finite = jnp.isfinite(x)
    low, high = jnp.min(x, where=finite, initial=jnp.inf), jnp.max(x, where=finite, initial=-jnp.inf)
    place = jnp.floor((x - low) * (BINS / jnp.maximum(high - low, jnp.finfo(jnp.float32).tiny)))
    index = jnp.where(finite, jnp.clip(place, 0, BINS - 1), BINS).astype(jnp.int32)
    counts = jnp.zeros(BINS, jnp.int32).at[index].add(1, mode="drop")  # float32 would stop at 2**24
    kept = jnp.where(finite, x, 0)
    return {"counts": counts, "low": low, "high": high, "total": kept.sum(), "squares": (kept * kept).sum()}


def named_histograms(found: Any) -> Iterator[tuple[str, Histogram]]:
    """What the function of `make_histograms` returned, as names such as "gradients/block_03/mlp/up/kernel"."""
    for kind, leaves in jax.device_get(found).items():
        for name, values in leaves.items():
            if not name.startswith(STACKED):
                yield from _named(f"{kind}/{name}", values)
                continue
            for layer in range(len(values["counts"])):
                one = {key: value[layer] for key, value in values.items()}
                yield from _named(f"{kind}/block_{layer:02d}/{name.removeprefix(f'{STACKED}/')}", one)


def _named(name: str, values: dict[str, np.ndarray]) -> Iterator[tuple[str, Histogram]]:
    if values["low"] <= values["high"]:
        rest = {key: float(values[key]) for key in ("low", "high", "total", "squares")}
        yield name, Histogram(counts=values["counts"], **rest)
