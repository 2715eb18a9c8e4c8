"""Histograms of every parameter and of its gradient, counted on the devices.

Shapes: L layers, N bins.
"""

import jax
import jax.numpy as jnp

from jaxlm.monitor.metrics import MetricsTracker, Throughput
from jaxlm.monitor.sinks import Histogram
from jaxlm.monitor.watchdog import Watchdog
from jaxlm.parallel.mesh import replicated
from jaxlm.parallel.split import STACKED, path_name
from jaxlm.train.accumulate import Batch
from jaxlm.train.assemble import Assembly
from jaxlm.train.numbers import Numbers
from jaxlm.train.step import TrainState, make_gradients, step_key

BINS = 64
Counts = dict[str, jax.Array]  # see `count_values`


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


class HistogramWriter:
    """Writes histograms of parameters and gradients every training.histogram_steps updates, and at the last one.

    Their names are such as "gradients/block_03/mlp/up/kernel". The gradients are those of the update, before clipping.
    """

    def __init__(
        self,
        assembly: Assembly,
        every: int | None,
        total_steps: int,
        tracker: MetricsTracker,
        throughput: Throughput,
        watchdog: Watchdog,
    ) -> None:
        self.every, self.total_steps = every, total_steps
        self.tracker, self.throughput, self.watchdog = tracker, throughput, watchdog
        self._layout = assembly.layout
        self._gradients = make_gradients(assembly.graphdef, assembly.config, assembly.layout)
        self._count = jax.jit(self._count_leaves, out_shardings=replicated(assembly.mesh))

    def before_update(self, step: int, state: TrainState, batch: Batch, numbers: Numbers) -> None:
        """Computes and writes the histograms of update `step`, if they are due; `state` is that before it."""
        if self.every is None or (step % self.every and step != self.total_steps):
            return
        jax.block_until_ready(state.step)
        with self.throughput.paused(), self.watchdog.during("computing histograms"):
            for name, counts in jax.device_get(self._count(state, batch, numbers)).items():
                for layer in range(len(counts["counts"])):
                    scalars = {key: float(values[layer]) for key, values in counts.items() if key != "counts"}
                    histogram = Histogram(counts["counts"][layer], **scalars)
                    if histogram.low <= histogram.high:
                        layer_name = name.replace(f"/{STACKED}/", f"/block_{layer:02d}/", 1)
                        self.tracker.write_histogram(layer_name, histogram, step)

    def _count_leaves(self, state: TrainState, batch: Batch, numbers: Numbers) -> dict[str, Counts]:
        """{name: `count_values`, each array with an axis [L] in front; L = 1 for what is not stacked}."""
        scale = state.loss_scale.scale
        n_targets = (batch["segments"] > 0).sum().astype(jnp.float32)
        _, gradients = self._gradients(state.params, batch, step_key(state, numbers), scale / n_targets)
        gradients = jax.tree.map(lambda x: x / scale, gradients)
        trees = {"parameters": self._layout.to_whole(state.params), "gradients": self._layout.to_whole(gradients)}
        named = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(trees)}
        stacked = {name: x if name.split("/")[1] == STACKED else x[None] for name, x in named.items()}
        return {name: jax.vmap(count_values)(x) for name, x in stacked.items()}
