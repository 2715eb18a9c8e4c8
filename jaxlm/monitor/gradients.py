"""What gradients say of a run: how noisy they are, and how large, with the updates, in each part of the model.

Shapes: K micro-batches, B rows of a micro-batch (over all devices), T positions, D devices that rows are split over,
M parts of a global batch.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.monitor.probe import Probe
from jaxlm.parallel.mesh import replicated, row_shards
from jaxlm.parallel.split import STACKED, Params, path_name
from jaxlm.train.accumulate import Batch
from jaxlm.train.loss import learned
from jaxlm.train.numbers import Numbers
from jaxlm.train.step import TrainState, make_gradients, make_train_step, step_key

Gradients = Callable[..., tuple[Any, Params]]  # of `make_gradients`


def targets_of(batch: Batch) -> jax.Array:
    """Number of targets of each of the K micro-batches, float32 [K]."""
    return learned(batch).sum((1, 2)).astype(jnp.float32)


def mean_gradients(gradients_of: Gradients, state: TrainState, batch: Batch, numbers: Numbers) -> Params:
    """Of the loss a target, as reduced by the layout; without the loss scale."""
    scale = state.loss_scale.scale
    factor = scale / targets_of(batch).sum()
    _, gradients = gradients_of(state.params, batch, step_key(state, numbers), factor)
    return jax.tree.map(lambda x: x / scale, gradients)


def stacked(tree: object) -> dict[str, jax.Array]:
    """{"KIND/path": array with a layer axis in front} of {"KIND": parameters}; the axis is 1 for what has no layers."""
    named = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    return {name: x if name.split("/")[1] == STACKED else x[None] for name, x in named.items()}


def in_layer(name: str, layer: int) -> str:
    """The name of an array of `stacked` in one layer, such as "gradients/block_03/mlp/up/kernel"."""
    return name.replace(f"/{STACKED}/", f"/block_{layer:02d}/", 1)


class NoiseScale(Probe):
    """The gradient noise scale (McCandlish et al. 2018, arXiv:1812.06162), every training.noise_scale_steps updates.

    With g the true gradient and S / n the covariance of the mean gradient of n tokens' rows, it is tr S / |g|^2, in
    tokens: the batch below which twice the batch is nearly worth twice the updates, and above which it is not. Its two
    parts are estimated without bias from the M gradients of a batch's parts; one batch says little of |g|^2, so what is
    told is the ratio of their sums since this process began.

    It writes `noise/trace` and `noise/squared_gradient` into the row of the update.
    """

    what = "the gradient noise scale"

    def prepare(self) -> None:
        config, layout = self.assembly.config, self.assembly.layout
        self._estimate = jax.jit(self._parts, out_shardings=replicated(self.assembly.mesh))
        self._gradients = make_gradients(self.assembly.graphdef, config, layout, self.assembly.own_loss)
        self.trace = self.squared = 0.0
        self.measured = 0

    def _parts(self, state: TrainState, batch: Batch, numbers: Numbers) -> tuple[jax.Array, jax.Array]:
        """(tr S, |g|^2) of parts of one row a device; their gradients are those of the update, with its dropout."""
        d = row_shards(self.assembly.mesh)
        parts = jax.tree.map(lambda x: _of_devices(x, d), batch)  # [M, 1, D, ...]
        counts = jax.vmap(targets_of)(parts)[:, 0]

        def add(carry: tuple[jax.Array, Params], part: tuple[Batch, jax.Array]) -> tuple[tuple, None]:
            squares, total = carry
            rows, count = part
            gradients = mean_gradients(self._gradients, state, rows, numbers)
            of_part = jnp.where(count > 0, count * optax.tree.norm(gradients, squared=True), 0.0)
            add_part = lambda sum_, g: sum_ + jnp.where(count > 0, count * g, 0.0)  # noqa: E731
            return (squares + of_part, jax.tree.map(add_part, total, gradients)), None

        shapes = jax.eval_shape(self._gradients, state.params, batch, step_key(state, numbers), 1.0)[1]
        start = jnp.zeros(()), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (squares, total), _ = jax.lax.scan(add, start, (parts, counts))
        tokens, m = counts.sum(), (counts > 0).sum()
        of_parts, of_all = squares / tokens, optax.tree.norm(total, squared=True) / tokens**2
        trace = (of_parts - of_all) * tokens / (m - 1)
        return trace, of_all - trace / tokens

    def measure(self, step: int, state: TrainState, batch: Batch, numbers: Numbers) -> None:
        trace, squared = map(float, jax.device_get(self._estimate(state, batch, numbers)))
        self.tracker.update({"noise/trace": trace, "noise/squared_gradient": squared}, step)
        if math.isfinite(trace) and math.isfinite(squared):
            self.trace, self.squared, self.measured = self.trace + trace, self.squared + squared, self.measured + 1

    @property
    def tokens(self) -> float | None:
        """The noise scale in tokens, of all measurements since this process began; None: not known yet."""
        return self.trace / self.squared if self.measured and self.squared > 0 else None


def _of_devices(x: jax.Array, d: int) -> jax.Array:
    """[K, B, ...] as [K * B / D, 1, D, ...]: each part has one row of every device, so that none moves."""
    k, b = x.shape[:2]
    by_device = x.reshape(k, d, b // d, *x.shape[2:])
    return jnp.moveaxis(by_device, 2, 1).reshape(k * (b // d), 1, d, *x.shape[2:])


class LayerNorms(Probe):
    """Norms of gradients, updates and parameters of each part of the model, every training.layer_norm_steps updates.

    Their names in the row are such as `gradients/block_03/attention`; gradients are those before clipping, an update is
    what is added to the parameters, learning rate and all.
    """

    what = "the norms of layers"

    def prepare(self) -> None:
        config, layout = self.assembly.config, self.assembly.layout
        self._step = make_train_step(self.assembly.graphdef, config, layout, self.assembly.own_loss)
        self._gradients = make_gradients(self.assembly.graphdef, config, layout, self.assembly.own_loss)
        self._norms = jax.jit(self._squares, out_shardings=replicated(self.assembly.mesh))

    def _squares(self, state: TrainState, batch: Batch, numbers: Numbers) -> dict[str, jax.Array]:
        """{"KIND/path": sum of squares in each layer, float32 [L]}."""
        whole = self.assembly.layout.to_whole
        moved, _ = self._step(state, batch, numbers)
        trees = {
            "gradients": whole(mean_gradients(self._gradients, state, batch, numbers)),
            "updates": whole(jax.tree.map(jnp.subtract, moved.params, state.params)),
            "parameters": whole(state.params),
        }
        wide = {name: x.astype(jnp.float32) for name, x in stacked(trees).items()}  # frozen matrices have 16 bits
        return {name: jnp.sum(x * x, tuple(range(1, x.ndim))) for name, x in wide.items()}

    def measure(self, step: int, state: TrainState, batch: Batch, numbers: Numbers) -> None:
        groups: dict[str, float] = {}
        for name, squares in jax.device_get(self._norms(state, batch, numbers)).items():
            for layer, square in enumerate(squares):
                parts = in_layer(name, layer).split("/")
                group = "/".join(parts[:3] if parts[1].startswith("block_") else parts[:2])
                groups[group] = groups.get(group, 0.0) + float(square)
        self.tracker.update({group: math.sqrt(square) for group, square in groups.items()}, step)
