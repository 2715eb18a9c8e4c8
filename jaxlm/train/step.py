"""One optimizer update and one evaluation batch, as pure functions.

Shapes: K micro-batches, B rows of a micro-batch (over all devices), T positions, L layers.
A batch is a dict of int32 arrays `tokens`, `targets`, `segments`, `positions` [K, B, T] and `rows` [K, B], each row's
index in the global batch; an evaluation batch has the first four, as [B, T]. Segment 0 is padding.

Losses and gradients are computed by each device on its own rows (`jax.shard_map`), with the communication between them
written out in `sharding.Layout`; the optimizer then runs on arrays that are laid out by it, and the compiler follows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from jaxlm.config import Config
from jaxlm.model import Transformer
from jaxlm.model.dropout import row_keys
from jaxlm.model.transformer import Fetch
from jaxlm.ops.compiler import Options
from jaxlm.ops.reductions import CPU_CHUNK, logits_chunk_bytes
from jaxlm.ops.scheduling import sum_over_rows
from jaxlm.parallel.sharding import ROWS, Layout
from jaxlm.train.loss import Sums, loss_sums
from jaxlm.train.optim import Schedule, build_optimizer
from jaxlm.train.precision import LossScale, compute_dtype, initial_loss_scale, next_loss_scale

Batch = dict[str, jax.Array]
Params = Any  # nested dict of float32 arrays
TrainStep = Callable[["TrainState", Batch], tuple["TrainState", dict[str, jax.Array]]]


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


def make_gradients(graphdef: Any, config: Config, layout: Layout) -> Callable[..., tuple[jax.Array, Params]]:
    """(params, batch, step, factor) -> the cross entropy times `factor`, and the gradients of what is minimised.

    Both are over all rows and micro-batches.

    On each device: gradients of its rows, micro-batch by micro-batch in a `lax.scan`, summed in accumulator_dtype;
    then one sum over the devices. A gradient that is not finite leaves a sum that is not finite.
    """
    model, training = config.model, config.training
    dtype, accumulator = compute_dtype(training), jnp.dtype(training.accumulator_dtype)
    chunk_bytes = logits_chunk_bytes(training, layout.platform)
    uses_dropout = model.dropout > 0 or model.attention_dropout > 0

    def on_device(params: Params, batch: Batch, step: jax.Array, factor: jax.Array) -> tuple[jax.Array, Params]:
        step_key = jax.random.fold_in(jax.random.key(training.seed), step)

        @jax.jit  # traced once, though its shapes are asked for, too
        def of_micro_batch(micro_batch: Batch) -> tuple[jax.Array, Params]:
            held, micro_batch = jax.lax.optimization_barrier((params, micro_batch))  # no gathering ahead of the loop

            def scaled_loss(params: Params) -> Sums:
                params, fetch = layout.gather(params, dtype)
                packed, z_loss = config.data.pack_sequences, training.z_loss

                def loss_of(params: Params, rows: Batch) -> Sums:
                    keys = row_keys(step_key, rows["rows"], model.n_layers) if uses_dropout else None
                    return batch_loss(graphdef, params, rows, keys, packed, factor, fetch, z_loss, chunk_bytes)

                return sum_over_rows(loss_of, params, micro_batch, layout.platform, layout.mesh.size)

            (_, loss), gradients = jax.value_and_grad(scaled_loss, has_aux=True)(held)
            return loss, layout.reduce_micro_batch(gradients)

        def add(total: Any, micro_batch: Batch) -> tuple[Any, None]:
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, of_micro_batch(micro_batch)), None

        first = jax.tree.map(lambda x: x[0], batch)
        if batch["rows"].shape[0] == 1:
            loss, gradients = of_micro_batch(first)
        else:
            loss, shapes = jax.eval_shape(of_micro_batch, first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, accumulator), shapes)
            (loss, gradients), _ = jax.lax.scan(add, (jnp.zeros((), loss.dtype), zeros), batch)
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
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


def make_train_step(graphdef: Any, config: Config, schedule: Schedule, layout: Layout) -> TrainStep:
    """The update: (state, batch) -> (state, metrics).

    Metrics are float32 scalars: `loss` (cross entropy, nats a target; z_loss left out), `grad_norm` (before clipping),
    `learning_rate`, `skipped`, `loss_scale`, `scale_exhausted` (overflows at the lowest loss scale).
    The loss of every micro-batch is divided by the targets of all of them, so that K micro-batches equal one batch K
    times as large. An update whose loss or gradient is not finite changes nothing but the counters.
    """
    optimizer = build_optimizer(config.training, layout.shapes)
    gradients_of = make_gradients(graphdef, config, layout)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        scale = state.loss_scale.scale
        n_targets = (batch["segments"] > 0).sum().astype(jnp.float32)
        loss, gradients = gradients_of(state.params, batch, state.step, scale / n_targets)
        loss, gradients = jax.tree.map(lambda x: x / scale, (loss, gradients))
        norm = optax.tree.norm(gradients)
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)

        shards = layout.to_shards(state.params)
        old = layout.on_device(state.opt_state)
        updates, opt_state = optimizer.update(gradients, old, shards)
        learning_rate = schedule(state.step)
        moved = jax.tree.map(lambda p, u: p - learning_rate * u, shards, updates)
        moved, opt_state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), (moved, opt_state), (shards, old))
        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + jnp.where(ok, 0, 1),
            loss_scale=next_loss_scale(state.loss_scale, ok, config.training),
            params=layout.to_held(moved),
            opt_state=opt_state,
        )
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "skipped": state.skipped.astype(jnp.float32),
            "loss_scale": scale,
            "scale_exhausted": state.loss_scale.exhausted.astype(jnp.float32),
        }
        return state, metrics

    return train_step


def compile_train_step(
    step: TrainStep, abstract_state: TrainState, abstract_batch: Any, options: Options | None = None
) -> Any:
    """The update, compiled for placed abstract arguments; the state that is passed in is donated."""
    out = (jax.tree.map(lambda x: x.sharding, abstract_state), None)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
    return jitted.lower(abstract_state, abstract_batch).compile(compiler_options=options)


def make_eval_step(
    graphdef: Any, config: Config, layout: Layout
) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
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
