"""Histograms of every parameter and of its gradient, counted on the devices.

Shapes: L layers, N bins.
"""

import jax
import jax.numpy as jnp

from jaxlm.monitor.gradients import in_layer, mean_gradients, stacked
from jaxlm.monitor.probe import Probe
from jaxlm.monitor.sinks import Histogram
from jaxlm.parallel.mesh import replicated
from jaxlm.train.accumulate import Batch
from jaxlm.train.numbers import Numbers
from jaxlm.train.step import TrainState, make_gradients

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


class HistogramWriter(Probe):
    """Histograms of parameters and gradients, every training.histogram_steps updates.

    Their names are such as "gradients/block_03/mlp/up/kernel". The gradients are those of the update, before clipping.
    """

    what = "histograms"

    def prepare(self) -> None:
        self._layout = self.assembly.layout
        assembly = self.assembly
        self._gradients = make_gradients(assembly.graphdef, assembly.config, assembly.layout, assembly.own_loss)
        self._count = jax.jit(self._count_leaves, out_shardings=replicated(self.assembly.mesh))

    def measure(self, step: int, state: TrainState, batch: Batch, numbers: Numbers) -> None:
        for name, counts in jax.device_get(self._count(state, batch, numbers)).items():
            for layer in range(len(counts["counts"])):
                scalars = {key: float(values[layer]) for key, values in counts.items() if key != "counts"}
                histogram = Histogram(counts["counts"][layer], **scalars)
                if histogram.low <= histogram.high:
                    self.tracker.write_histogram(in_layer(name, layer), histogram, step)

    def _count_leaves(self, state: TrainState, batch: Batch, numbers: Numbers) -> dict[str, Counts]:
        """{name: `count_values`, each array with an axis [L] in front; L = 1 for what is not stacked}."""
        gradients = mean_gradients(self._gradients, state, batch, numbers)
        trees = {"parameters": self._layout.to_whole(state.params), "gradients": self._layout.to_whole(gradients)}
        return {name: jax.vmap(count_values)(x) for name, x in stacked(trees).items()}
