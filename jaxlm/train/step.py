"""One optimizer update and one evaluation batch, as pure functions.

Shapes: K micro-batches, B rows of a micro-batch (over all devices), T positions.
A batch is a dict of int32 arrays `tokens`, `targets`, `segments`, `positions` [K, B, T] and `rows` [K, B], each row's
index in the global batch; an evaluation batch has the first four, as [B, T]. Segment 0 is padding.

Losses and gradients are computed by each device on its own rows (`jax.shard_map`), with the communication between them
written out in `parallel.Layout`; the optimizer then runs on arrays that are laid out by it, and the compiler follows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxlm.config import Config
from jaxlm.model import Transformer
from jaxlm.model.dropout import row_keys
from jaxlm.model.transformer import Fetch
from jaxlm.ops.reductions import CPU_CHUNK, logits_chunk_bytes
from jaxlm.ops.scheduling import sum_over_rows
from jaxlm.parallel.layout import Layout
from jaxlm.parallel.mesh import ROWS
from jaxlm.parallel.split import Params
from jaxlm.train.accumulate import Batch, accumulate
from jaxlm.train.loss import Sums, loss_sums
from jaxlm.train.optim import build_optimizer
from jaxlm.train.precision import LossScale, compute_dtype, initial_loss_scale, next_loss_scale

Numbers = dict[str, ArrayLike]  # what may differ between runs of one compiled program: `learning_rate`, float32
Metrics = dict[str, jax.Array]
TrainStep = Callable[["TrainState", Batch, Numbers], tuple["TrainState", Metrics]]
EvalStep = Callable[..., tuple[jax.Array, jax.Array]]  # (params, [B, T] batch) -> (nats, targets)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes. There is no random state: keys are derived from the seed and `step`."""

    step: jax.Array  # int32, optimizer updates done (skipped ones count)
    skipped: jax.Array  # int32, updates skipped because the loss or the gradient was not finite
    loss_scale: LossScale
    params: Params  # as the layout holds them
    opt_state: optax.OptState  # of the parameters as the layout shards them


def init_state(
    model: Transformer, optimizer: optax.GradientTransformation, config: Config, layout: Layout
) -> TrainState:
    """The state before the first update of a new model."""
    return state_from(layout.from_whole(nnx.to_pure_dict(nnx.state(model))), optimizer, config, layout)


def state_from(params: Params, optimizer: optax.GradientTransformation, config: Config, layout: Layout) -> TrainState:
    """The state before the first update of a model with these parameters, as the layout holds them."""
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731  (two buffers: a donated one can't be passed twice)
    return TrainState(
        step=zero(),
        skipped=zero(),
        loss_scale=initial_loss_scale(config.training),
        params=params,
        opt_state=optimizer.init(layout.to_shards(params)),
    )


def batch_loss(
    graphdef: Any,
    params: Params,
    batch: Batch,
    keys: jax.Array | None,
    packed: bool,
    factor: Any = 1.0,
    fetch: Fetch | None = None,
    z_loss: float = 0.0,
    chunk_bytes: int = CPU_CHUNK,
) -> Sums:
    """What is minimised, and the cross entropy in nats: sums over the targets of `batch` ([B, T]), times `factor`.

    The factor goes in with the targets' weights, so that float16 gradients are scaled from the start.
    """
    model = nnx.merge(graphdef, params)
    segments = batch["segments"] if packed else None  # padding stands at the end: causality hides it
    hidden = model(batch["tokens"], segments, batch["positions"], keys, fetch)
    weights = jnp.where(batch["segments"] > 0, jnp.asarray(factor, jnp.float32), 0.0)
    w, softcap = model.output_matrix(), model.config.logit_softcap
    return loss_sums(hidden, w, batch["targets"], weights, softcap, z_loss, chunk_bytes)


def uses_dropout(config: Config) -> bool:
    """Whether training draws random numbers."""
    return config.model.dropout > 0 or config.model.attention_dropout > 0


def make_gradients(graphdef: nnx.GraphDef, config: Config, layout: Layout) -> Callable[..., tuple[jax.Array, Params]]:
    """(params, batch, step, factor) -> the cross entropy times `factor`, and the gradients of what is minimised.

    Both are sums over all rows and micro-batches. Each device computes the gradients of its own rows, micro-batch by
    micro-batch, summed in accumulator_dtype; then one sum over the devices. A gradient that is not finite leaves a sum
    that is not finite.
    """
    training = config.training
    dtype = compute_dtype(training)
    chunk_bytes = logits_chunk_bytes(training, layout.platform)

    def on_device(params: Params, batch: Batch, step: jax.Array, factor: jax.Array) -> tuple[jax.Array, Params]:
        step_key = jax.random.fold_in(jax.random.key(training.seed), step)

        @jax.jit  # traced once, though its shapes are asked for, too
        def of_micro_batch(micro_batch: Batch) -> tuple[jax.Array, Params]:
            held, micro_batch = jax.lax.optimization_barrier((params, micro_batch))  # no gathering ahead of the loop

            def scaled_loss(params: Params) -> Sums:
                params, fetch = layout.gather(params, dtype)
                packed, z_loss = config.data.pack_sequences, training.z_loss

                def loss_of(params: Params, rows: Batch) -> Sums:
                    keys = row_keys(step_key, rows["rows"], config.model.n_layers) if uses_dropout(config) else None
                    return batch_loss(graphdef, params, rows, keys, packed, factor, fetch, z_loss, chunk_bytes)

                return sum_over_rows(loss_of, params, micro_batch, layout.platform, layout.mesh.size)

            (_, loss), gradients = jax.value_and_grad(scaled_loss, has_aux=True)(held)
            return loss, layout.reduce_micro_batch(gradients)

        loss, gradients = accumulate(of_micro_batch, batch, training.accumulator_dtype)
        return layout.sum_over(ROWS, loss), layout.reduce_update(gradients)

    everywhere = PartitionSpec()
    return jax.shard_map(
        on_device,
        mesh=layout.mesh,
        in_specs=(layout.held_specs(), PartitionSpec(None, ROWS), everywhere, everywhere),
        out_specs=(everywhere, layout.gradient_specs()),
        axis_names=set(ROWS),
        check_vma=False,
    )


def make_train_step(graphdef: nnx.GraphDef, config: Config, layout: Layout) -> TrainStep:
    """The update: (state, batch, numbers) -> (state, metrics).

    Metrics are float32 scalars: `loss` (cross entropy, nats a target; z_loss left out), `grad_norm` (before clipping),
    `skipped`, `loss_scale`, `scale_exhausted` (overflows at the lowest loss scale).
    The loss of every micro-batch is divided by the targets of all of them, so that K micro-batches equal one batch K
    times as large. An update whose loss or gradient is not finite changes nothing but the counters.
    """
    optimizer = build_optimizer(config.training, layout.shapes)
    gradients_of = make_gradients(graphdef, config, layout)

    def train_step(state: TrainState, batch: Batch, numbers: Numbers) -> tuple[TrainState, Metrics]:
        scale = state.loss_scale.scale
        n_targets = (batch["segments"] > 0).sum().astype(jnp.float32)
        loss, gradients = gradients_of(state.params, batch, state.step, scale / n_targets)
        loss, gradients = jax.tree.map(lambda x: x / scale, (loss, gradients))
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        shards = layout.to_shards(state.params)
        old_state = layout.on_device(state.opt_state)
        updates, new_state = optimizer.update(gradients, old_state, shards)
        moved = jax.tree.map(lambda p, u: p - numbers["learning_rate"] * u, shards, updates)
        choose = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        moved, new_state = jax.tree.map(choose, (moved, new_state), (shards, old_state))
        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            loss_scale=next_loss_scale(state.loss_scale, finite, config.training),
            params=layout.to_held(moved),
            opt_state=new_state,
        )
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "skipped": state.skipped.astype(jnp.float32),
            "loss_scale": scale,
            "scale_exhausted": state.loss_scale.exhausted.astype(jnp.float32),
        }
        return state, metrics

    return train_step


def make_eval_step(graphdef: nnx.GraphDef, config: Config, layout: Layout) -> EvalStep:
    """(params, [B, T] batch) -> (nats of all targets, float32; number of targets, int32), without dropout."""

    def on_device(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        params, fetch = layout.gather(params, compute_dtype(config.training))
        packed, chunk_bytes = config.data.pack_sequences, logits_chunk_bytes(config.training, layout.platform)

        def loss_of(params: Params, rows: Batch) -> Sums:
            return batch_loss(graphdef, params, rows, None, packed, fetch=fetch, chunk_bytes=chunk_bytes)

        _, nats = sum_over_rows(loss_of, params, batch, layout.platform, layout.mesh.size)
        return layout.sum_over(ROWS, (nats, (batch["segments"] > 0).sum()))

    return jax.shard_map(
        on_device,
        mesh=layout.mesh,
        in_specs=(layout.held_specs(), PartitionSpec(ROWS)),
        out_specs=PartitionSpec(),
        axis_names=set(ROWS),
        check_vma=False,
    )
