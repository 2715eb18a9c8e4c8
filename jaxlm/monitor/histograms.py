"""Histograms of every parameter and of its gradient, counted on the devices.

Shapes: L layers, N bins.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

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


Counts = dict[str, jax.Array]  # see `count_values`


def make_histograms(graphdef: Any, config: Config, layout: Layout) -> Callable[[TrainState, Batch], dict[str, Counts]]:
    """(state, batch) -> {"parameters/NAME" and "gradients/NAME" of every parameter: its `count_values`}.

    The state is the one before an update, and the batch that of the update. The gradients are those of the update,
    before clipping. Those with a layer axis have counts [L] as well.
    """
    gradients_of = make_gradients(graphdef, config, layout)

    def histograms(state: TrainState, batch: Batch) -> dict[str, Counts]:
        scale = state.loss_scale.scale
        n_targets = (batch["segments"] > 0).sum().astype(jnp.float32)
        _, gradients = gradients_of(state.params, batch, state.step, scale / n_targets)
        gradients = jax.tree.map(lambda x: x / scale, gradients)
        trees = {"parameters": layout.to_whole(state.params), "gradients": layout.to_whole(gradients)}
        named = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(trees)}
        return {name: jax.vmap(count_values)(x) if _is_stacked(name) else count_values(x) for name, x in named.items()}

    return histograms


def count_values(x: jax.Array) -> Counts:
    """Of the finite values of `x`: `counts` int32 [N] in equal bins from `low` to `high`, their `total` and `squares`.

    All but `counts` are float32 scalars; without any finite value, `low` is above `high`.
    """
    x = x.astype(jnp.float32).ravel()
    finite = jnp.isfinite(x)
    low, high = jnp.min(x, where=finite, initial=jnp.inf), jnp.max(x, where=finite, initial=-jnp.inf)
    place = jnp.floor((x - low) * (BINS / jnp.maximum(high - low, jnp.finfo(jnp.float32).tiny)))
    index = jnp.where(finite, jnp.clip(place, 0, BINS - 1), BINS).astype(jnp.int32)
    counts = jnp.zeros(BINS, jnp.int32).at[index].add(1, mode="drop")  # float32 would stop at 2**24
    kept = jnp.where(finite, x, 0)
    return {"counts": counts, "low": low, "high": high, "total": kept.sum(), "squares": (kept * kept).sum()}


def named_histograms(counts: dict[str, Counts]) -> Iterator[tuple[str, Histogram]]:
    """The result of `make_histograms`' function, by names such as "gradients/block_03/mlp/up/kernel"."""
    for name, values in jax.device_get(counts).items():
        layers = {name: values}
        if _is_stacked(name):
            names = [name.replace(f"/{STACKED}/", f"/block_{i:02d}/", 1) for i in range(len(values["counts"]))]
            layers = {names[i]: {key: value[i] for key, value in values.items()} for i in range(len(names))}
        for layer, each in layers.items():
            if each["low"] <= each["high"]:
                yield layer, Histogram(**{key: value if value.ndim else value.item() for key, value in each.items()})


def _is_stacked(name: str) -> bool:
    """Whether a parameter has a leading layer axis; `name` begins with "parameters/" or "gradients/"."""
    return name.split("/")[1] == STACKED


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
