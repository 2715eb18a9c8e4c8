"""One optimizer update and one evaluation batch, as pure functions.

Shapes: K micro-batches, B rows of a micro-batch (over all devices), T positions.
A batch is a dict of int32 arrays `tokens`, `targets`, `segments`, `positions` [K, B, T] and `rows` [K, B], each row's
index in the global batch; an evaluation batch has the first four, as [B, T]. Segment 0 is padding. Data of which some
tokens are not learned add `loss_mask`, bool [K, B, T] or [B, T].

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
from jax.typing import ArrayLike

from jaxlm.config import Config
from jaxlm.model.dropout import row_keys
from jaxlm.ops.own_kernels import LOSS
from jaxlm.ops.reductions import logits_chunk_bytes, logits_dtype
from jaxlm.ops.scheduling import sum_over_rows
from jaxlm.parallel.layout import Layout
from jaxlm.parallel.mesh import EVAL_BATCH, EVERYWHERE, ROWS, TRAIN_BATCH
from jaxlm.parallel.split import Params
from jaxlm.train.accumulate import Batch, accumulate
from jaxlm.train.average import Averaged, next_average
from jaxlm.train.loss import learned, loss_sums
from jaxlm.train.numbers import Numbers, with_inputs
from jaxlm.train.optim import build_optimizer
from jaxlm.train.own_loss import Found, OwnLoss, own_sums
from jaxlm.train.precision import LossScale, compute_dtype, first_loss_scale, next_loss_scale
from jaxlm.train.trainable import divided, joined, narrow

Metrics = dict[str, jax.Array]
TrainStep = Callable[["TrainState", Batch, Numbers], tuple["TrainState", Metrics]]
EvalStep = Callable[..., Any]  # (params, [B, T] batch) -> (nats, targets), and the extras of an own loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes. There is no random state: keys are derived from the seed and `step`."""

    step: jax.Array  # int32, optimizer updates done (skipped ones count)
    skipped: jax.Array  # int32, updates skipped because the loss or the gradient was not finite
    loss_scale: LossScale
    params: Params  # as the layout holds them; float32, but for matrices that are not trained
    opt_state: optax.OptState  # of the trained parameters as the layout shards them


def first_state(params: Params, config: Config, layout: Layout, numbers: Numbers) -> TrainState:
    """The state before the first update of a model with these parameters, as the layout holds them."""
    training = with_inputs(config.training, numbers)
    optimizer = build_optimizer(training, layout.trained_shapes)
    trained, frozen = divided(params, config.training)
    shards = layout.to_shards(trained)
    opt_state = optimizer.init(shards)
    if training.ema_decay is not None:
        opt_state = Averaged(opt_state, jax.tree.map(jnp.copy, shards))
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731  (two buffers: a donated one can't be passed twice)
    return TrainState(
        step=zero(),
        skipped=zero(),
        loss_scale=first_loss_scale(training, numbers["initial_loss_scale"]),
        params=joined(trained, narrow(frozen, compute_dtype(config.training))),
        opt_state=opt_state,
    )


def make_loss(
    graphdef: nnx.GraphDef, config: Config, layout: Layout, own: OwnLoss | None = None
) -> Callable[..., tuple[jax.Array, Found]]:
    """(held parameters, [B, T] batch, key, factor) -> what is minimised, and the cross entropy in nats (or `own` loss).

    To be called on each device: sums over the targets of its own rows, times `factor`, which goes in with the targets'
    weights, so that float16 gradients are scaled from the start. `key` has the seed and the step in it; None: no
    dropout.
    """
    model, training = config.model, config.training
    dtype, kept_as = compute_dtype(training), logits_dtype(training, layout.platform)
    chunk_bytes = logits_chunk_bytes(training, model.vocab_size, layout.platform)
    uses_dropout = model.dropout > 0 or model.attention_dropout > 0 or training.lora_dropout > 0

    def loss(held: Params, batch: Batch, key: jax.Array | None = None, factor: ArrayLike = 1.0) -> Any:
        params, fetch = layout.gather(held, dtype)

        def of_rows(params: Params, rows: Batch) -> tuple[jax.Array, Found]:
            keys = None if key is None or not uses_dropout else row_keys(key, rows["rows"], model.n_layers)
            network = nnx.merge(graphdef, params)
            network.fetch = fetch
            if own is not None:
                return own_sums(own, network, rows, keys, factor)
            segments = rows["segments"] if config.data.pack_sequences else None  # causality hides padding at the end
            hidden = network(rows["tokens"], segments, rows["positions"], keys)
            weights = jnp.where(learned(rows), jnp.asarray(factor, jnp.float32), 0.0)
            options = model.logit_softcap, training.z_loss, chunk_bytes, kept_as, LOSS in network.own_kernels
            objective, nats = loss_sums(hidden, network.output_matrix(), rows["targets"], weights, *options)
            return objective, (nats, {})

        return sum_over_rows(of_rows, params, batch, layout.platform, layout.mesh.size)

    return loss


def step_key(state: TrainState, numbers: Numbers) -> jax.Array:
    """The key of the next update's dropout: of the seed and the step."""
    return jax.random.fold_in(jax.random.wrap_key_data(numbers["key"]), state.step)


def make_gradients(
    graphdef: nnx.GraphDef, config: Config, layout: Layout, own: OwnLoss | None = None
) -> Callable[..., tuple[Found, Params]]:
    """(params, batch, key, factor) -> the cross entropy times `factor`, and the gradients of what is minimised.

    Gradients are of the parameters that are trained. Both are sums over all rows and micro-batches: of those of each
    device's own rows, micro-batch by micro-batch, in accumulator_dtype; then one sum over the devices. A gradient that
    is not finite leaves a sum that is not finite. `key` has the seed and the step in it.
    """
    training, loss_of = config.training, make_loss(graphdef, config, layout, own)

    def on_device(params: Params, batch: Batch, key: jax.Array, factor: jax.Array) -> tuple[Found, Params]:
        @jax.jit  # traced once, though its shapes are asked for, too
        def of_micro_batch(micro_batch: Batch) -> tuple[Found, Params]:
            held, micro_batch = jax.lax.optimization_barrier((params, micro_batch))  # no gathering ahead of the loop
            of_both = lambda trained, frozen: loss_of(joined(trained, frozen), micro_batch, key, factor)  # noqa: E731
            (_, found), gradients = jax.value_and_grad(of_both, has_aux=True)(*divided(held, training))
            return found, layout.reduce_micro_batch(gradients)

        found, gradients = accumulate(of_micro_batch, batch, training.accumulator_dtype, layout.platform)
        return layout.sum_over(ROWS, found), layout.reduce_update(gradients)

    inputs = layout.held_specs(), TRAIN_BATCH, EVERYWHERE, EVERYWHERE
    return layout.on_each_device(on_device, inputs, (EVERYWHERE, layout.gradient_specs()))


def make_train_step(graphdef: nnx.GraphDef, config: Config, layout: Layout, own: OwnLoss | None = None) -> TrainStep:
    """The update: (state, batch, numbers) -> (state, metrics).

    Metrics are float32 scalars: `loss` (cross entropy, nats a target; z_loss left out), `grad_norm` (before clipping),
    `skipped`, `loss_scale`, `scale_exhausted` (overflows at the lowest loss scale); of an own loss also `train/NAME`.
    The loss of every micro-batch is divided by the targets of all of them, so that K micro-batches equal one batch K
    times as large. An update whose loss or gradient is not finite, or that has no target, changes nothing but the
    counters.
    """
    gradients_of = make_gradients(graphdef, config, layout, own)

    def train_step(state: TrainState, batch: Batch, numbers: Numbers) -> tuple[TrainState, Metrics]:
        training = with_inputs(config.training, numbers)
        optimizer = build_optimizer(training, layout.trained_shapes)
        trained, frozen = divided(state.params, config.training)
        scale = state.loss_scale.scale
        n_targets = learned(batch).sum().astype(jnp.float32)
        (loss, extras), gradients = gradients_of(state.params, batch, step_key(state, numbers), scale / n_targets)
        loss, gradients = jax.tree.map(lambda x: x / scale, (loss, gradients))
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        applied = finite
        if "loss_mask" in batch:  # where nothing is learned there is no loss, and nothing to apply
            applied, loss = finite & (n_targets > 0), jnp.where(n_targets > 0, loss, jnp.nan)

        shards = layout.to_shards(trained)
        old_state = layout.on_device(state.opt_state)
        rule_state = old_state.rule if isinstance(old_state, Averaged) else old_state
        updates, new_state = optimizer.update(gradients, rule_state, shards)
        moved = jax.tree.map(lambda p, u: p - numbers["learning_rate"] * u, shards, updates)
        if training.ema_decay is not None:
            new_state = Averaged(new_state, next_average(old_state.average, moved, training.ema_decay, state.step))
        choose = lambda new, old: jnp.where(applied, new, old)  # noqa: E731
        moved, new_state = jax.tree.map(choose, (moved, new_state), (shards, old_state))
        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + jnp.where(applied, 0, 1),
            loss_scale=next_loss_scale(state.loss_scale, finite, training),
            params=joined(layout.to_held(moved), frozen),
            opt_state=new_state,
        )
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "skipped": state.skipped.astype(jnp.float32),
            "loss_scale": scale,
            "scale_exhausted": state.loss_scale.exhausted.astype(jnp.float32),
        }
        return state, metrics | {f"train/{name}": total / count for name, (total, count) in extras.items()}

    return train_step


def make_eval_step(graphdef: nnx.GraphDef, config: Config, layout: Layout, own: OwnLoss | None = None) -> EvalStep:
    """(params, [B, T] batch) -> (nats of all targets, float32; number of targets, int32), without dropout.

    Of an own loss its sum instead of the nats, and a third value, its other metrics.
    """
    loss_of = make_loss(graphdef, config, layout, own)

    def on_device(params: Params, batch: Batch) -> tuple[Any, ...]:
        _, (loss, extras) = loss_of(params, batch)
        return layout.sum_over(ROWS, (loss, learned(batch).sum()) + (() if own is None else (extras,)))

    return layout.on_each_device(on_device, (layout.held_specs(), EVAL_BATCH), EVERYWHERE)
