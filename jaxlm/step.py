"""One optimizer update and one evaluation batch, as pure functions.

Shapes: K micro-batches, B rows of a micro-batch (over all devices), T positions, L layers.
A batch is a dict of int32 arrays `tokens`, `targets`, `segments`, `positions` [K, B, T] and `rows` [K, B], each row's
index in the global batch; an evaluation batch has the first four, as [B, T]. Segment 0 is padding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxlm.config import Config
from jaxlm.loss import cross_entropy_sum
from jaxlm.model import Transformer
from jaxlm.model.dropout import row_keys
from jaxlm.optim import Schedule, build_optimizer

Batch = dict[str, jax.Array]
Params = Any  # nested dict of float32 arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes. There is no random state: keys are derived from the seed and `step`."""

    step: jax.Array  # int32, optimizer updates done (skipped ones count)
    skipped: jax.Array  # int32, updates skipped because the loss or the gradient was not finite
    params: Params
    opt_state: optax.OptState


def init_state(model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    params = nnx.to_pure_dict(nnx.state(model))
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731  (two buffers: a donated one can't be passed twice)
    return TrainState(step=zero(), skipped=zero(), params=params, opt_state=optimizer.init(params))


def loss_sum(graphdef: Any, params: Params, batch: Batch, keys: jax.Array | None, packed: bool) -> jax.Array:
    """Sum of the cross entropy in nats over the targets of `batch` ([B, T] arrays)."""
    model = nnx.merge(graphdef, params)
    segments = batch["segments"] if packed else None  # padding stands at the end: causality hides it
    hidden = model(batch["tokens"], segments, batch["positions"], keys)
    weights = (batch["segments"] > 0).astype(jnp.float32)
    return cross_entropy_sum(hidden, model.output_matrix(), batch["targets"], weights)


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _on_last(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, computed only when the extra argument `emit` is true (MultiSteps would run it on every micro-batch)."""

    def update(grads: Any, state: Any, params: Any = None, *, emit: jax.Array) -> tuple[Any, Any]:
        idle = lambda: (jax.tree.map(jnp.zeros_like, grads), state)  # noqa: E731
        return jax.lax.cond(emit, lambda: inner.update(grads, state, params), idle)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _accumulate(
    optimizer: optax.GradientTransformation, grads_of: Callable[[Batch], Any], state: TrainState, batch: Batch
) -> tuple[jax.Array, Any, Any, Any]:
    """Summed loss, gradients' norm and finiteness, updates and optimizer state after all micro-batches of `batch`.

    `optax.MultiSteps` in a `lax.scan`. Only it and the proposed update are carried (parameters in the carry would be
    gathered every micro-batch once they are sharded); its state lives within one update, so that a checkpoint holds
    the inner optimizer's state alone, whatever the number of micro-batches.
    """
    k = batch["rows"].shape[0]
    multi = optax.MultiSteps(_on_last(_norm_first(optimizer)), every_k_schedule=k, use_grad_mean=False)
    start = multi.init(state.params)
    start = start._replace(inner_opt_state=(start.inner_opt_state[0], state.opt_state))

    def body(carry: Any, item: Any) -> tuple[Any, jax.Array]:
        multi_state, ok, _ = carry
        index, micro_batch = item
        loss, grads = grads_of(micro_batch)
        finite = _all_finite(grads)
        grads = jax.tree.map(lambda g: jnp.where(finite, g, 0.0), grads)  # one inf would never leave the accumulator
        updates, multi_state = multi.update(grads, multi_state, state.params, emit=index == k - 1)
        return (multi_state, ok & finite, updates), loss

    first = (start, jnp.array(True), jax.tree.map(jnp.zeros_like, state.params))
    (multi_state, ok, updates), losses = jax.lax.scan(body, first, (jnp.arange(k), batch))
    norm, opt_state = multi_state.inner_opt_state
    return losses.sum(), norm, ok, (updates, opt_state)


def _norm_first(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` with a state (global norm of the last gradients, the optimizer's own state)."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, inner = optimizer.update(grads, state[1], params)
        return updates, (optax.tree.norm(grads), inner)

    return optax.GradientTransformation(lambda params: (jnp.zeros(()), optimizer.init(params)), update)


def make_train_step(
    graphdef: Any, config: Config, schedule: Schedule
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The update: (state, batch) -> (state, metrics).

    Metrics are float32 scalars: `loss` (nats a target), `grad_norm` (before clipping), `learning_rate`, `skipped`.
    The loss of every micro-batch is divided by the targets of all of them, so that K micro-batches equal one batch K
    times as large. An update whose loss or gradient is not finite changes nothing but `step` and `skipped`.
    """
    optimizer = build_optimizer(config.training)
    uses_dropout = config.model.dropout > 0 or config.model.attention_dropout > 0

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        step_key = jax.random.fold_in(jax.random.key(config.training.seed), state.step)
        n_targets = (batch["segments"] > 0).sum().astype(jnp.float32)

        def grads_of(micro_batch: Batch) -> tuple[jax.Array, Params]:
            keys = row_keys(step_key, micro_batch["rows"], config.model.n_layers) if uses_dropout else None
            mean = lambda p: loss_sum(graphdef, p, micro_batch, keys, config.data.pack_sequences) / n_targets  # noqa: E731
            return jax.value_and_grad(mean)(state.params)

        if batch["rows"].shape[0] == 1:
            loss, grads = grads_of(jax.tree.map(lambda x: x[0], batch))
            updates, (norm, opt_state) = _norm_first(optimizer).update(grads, (None, state.opt_state), state.params)
            ok = _all_finite(grads)
        else:
            loss, norm, ok, (updates, opt_state) = _accumulate(optimizer, grads_of, state, batch)
        ok = ok & jnp.isfinite(loss)
        learning_rate = schedule(state.step)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        skipped = state.skipped + jnp.where(ok, 0, 1)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "skipped": skipped.astype(jnp.float32),
        }
        return TrainState(step=state.step + 1, skipped=skipped, params=params, opt_state=opt_state), metrics

    return train_step


def make_eval_step(graphdef: Any, config: Config) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """(params, [B, T] batch) -> (nats of all targets, float32; number of targets, int32), without dropout."""

    def eval_step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        nats = loss_sum(graphdef, params, batch, None, config.data.pack_sequences)
        return nats, (batch["segments"] > 0).sum()

    return eval_step
