"""Bytes of activations: what JAX keeps of a micro-batch's forward pass for its backward pass."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp

from jaxlm.ops.attention_kernels import choose_attention
from jaxlm.ops.flash import TILES, padded_head_size
from jaxlm.parallel.mesh import EVAL_BATCH, EVERYWHERE, abstract_mesh
from jaxlm.parallel.split import Params
from jaxlm.train.accumulate import Batch
from jaxlm.train.assemble import Resolved, assemble
from jaxlm.train.precision import compute_dtype
from jaxlm.train.step import make_loss


def activation_bytes(resolved: Resolved) -> int:
    """Bytes that a device keeps for the backward pass of one micro-batch, remat and scanned layers as configured.

    A GPU's compiler may fuse some of it away.
    """
    config, block = resolved.config, block_bytes(resolved)
    one_layer = _row_bytes(resolved, 1) * config.training.batch_size
    return one_layer + (config.model.n_layers - 1) * block


def block_bytes(resolved: Resolved) -> int:
    """The share of each layer, of which all are alike."""
    return (_row_bytes(resolved, 2) - _row_bytes(resolved, 1)) * resolved.config.training.batch_size


def _row_bytes(resolved: Resolved, layers: int) -> int:
    """What a row takes in a model of so many layers.

    The update's loss is differentiated in the abstract, with one row a device and with two: what grows is activations,
    the rest are parameters. Below stage 3 neither the stage nor how many devices there are matters.
    """
    training = resolved.config.training
    if training.zero_stage != 3:
        alone = dataclasses.replace(resolved, mesh=abstract_mesh((1, 1, training.tensor_parallel)))
        resolved = alone.with_fields({"training.zero_stage": 0})
    resolved = resolved.with_fields({"model.n_layers": layers})
    one_row, two_rows = (_kept(with_rows(resolved, rows)) for rows in (1, 2))
    return two_rows - one_row - _listed_twice(resolved)


def _listed_twice(resolved: Resolved) -> int:
    """Bytes a row of the attention kernel's output, which JAX lists as [T, H, K] and as [T, D].

    That is one array, unless the kernel pads it, or all of it is made again.
    """
    config = resolved.config
    head_size, length = config.model.d_model // config.model.n_heads, config.data.max_length
    if choose_attention(config, resolved.capability) == "blockwise" or config.model.gradient_checkpointing:
        return 0
    if padded_head_size(head_size) != head_size or length % TILES[head_size].longest:
        return 0
    elements = config.model.n_layers * length * config.model.d_model // config.training.tensor_parallel
    return elements * compute_dtype(config.training).itemsize


def with_rows(resolved: Resolved, rows: int) -> Resolved:
    """The same run with updates of one micro-batch of so many rows a device."""
    return resolved.with_fields({"training.batch_size": rows, "training.gradient_accumulation_steps": 1})


@lru_cache(maxsize=64)
def _kept(resolved: Resolved) -> int:
    """Bytes of all arrays that a device keeps between the two passes, integers left out."""
    config = resolved.config
    attention = choose_attention(config, resolved.capability)
    # cuDNN's kernel can't be traced without cuDNN; it keeps the same: its inputs, its output, the log-sum-exp.
    assembly = assemble(resolved, attention="pallas" if attention == "cudnn" else attention)
    layout, loss_of = assembly.layout, make_loss(assembly.graphdef, config, assembly.layout)
    kept: list[jax.Array] = []

    def on_device(params: Params, batch: Batch) -> jax.Array:
        loss, backward = jax.vjp(lambda held: loss_of(held, batch, jax.random.key(0))[0], params)
        kept.extend(x for x in jax.tree.leaves(backward) if not jnp.issubdtype(x.dtype, jnp.integer))
        return loss

    sharded = layout.on_each_device(on_device, (layout.held_specs(), EVAL_BATCH), EVERYWHERE)
    batch = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in assembly.abstract_batch.items()}
    jax.eval_shape(sharded, assembly.abstract_state.params, batch)
    # Tensor parallelism splits what lies within a sub-layer, whose last axis is not that of the residual stream.
    within = lambda x: x.shape[-1:] not in ((config.model.d_model,), (1,))  # noqa: E731
    tensor = config.training.tensor_parallel
    return sum(x.size * x.dtype.itemsize // (tensor if within(x) else 1) for x in kept)
