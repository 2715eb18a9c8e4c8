"""How the values of every parameter, and of its gradient, are spread: computed on the devices, only when asked for.

Shapes: L layers, N bins.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import Config
from jaxlm.monitor.metrics import MetricsTracker, Throughput
from jaxlm.monitor.sinks import Histogram
from jaxlm.monitor.watchdog import Watchdog
from jaxlm.parallel.layout import Layout
from jaxlm.parallel.mesh import replicated
from jaxlm.parallel.split import STACKED, path_name
from jaxlm.train.accumulate import Batch
from jaxlm.train.assemble import Assembly
from jaxlm.train.step import TrainState, make_gradients

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
        trees = {"parameters": layout.to_whole(state.params), "gradients": layout.to_whole(gradients)}
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


class HistogramWriter:
    """Writes histograms of parameters and gradients every training.histogram_steps updates, and at the last one."""

    def __init__(
        self,
        assembly: Assembly,
        total_steps: int,
        tracker: MetricsTracker,
        throughput: Throughput,
        watchdog: Watchdog,
    ) -> None:
        self.every, self.total_steps = assembly.config.training.histogram_steps, total_steps
        self.tracker, self.throughput, self.watchdog = tracker, throughput, watchdog
        histograms = make_histograms(assembly.graphdef, assembly.config, assembly.layout)
        self._histograms = jax.jit(histograms, out_shardings=replicated(assembly.mesh))

    def before_update(self, step: int, state: TrainState, batch: Batch) -> None:
        """Computes and writes the histograms of update `step`, if they are due; `state` is that before it."""
        if self.every is None or (step % self.every and step != self.total_steps):
            return
        jax.block_until_ready(state.step)
        with self.throughput.paused(), self.watchdog.during("computing histograms"):
            for name, histogram in named_histograms(self._histograms(state, batch)):
                self.tracker.write_histogram(name, histogram, step)
