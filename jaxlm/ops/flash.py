"""Causal attention in Pallas kernels for GPUs, with packed documents and dropout, which cuDNN's kernel doesn't support.

Shapes: B rows, T positions, H query heads, G heads of keys and values, R = H / G query heads that share one, K channels
of a head, M queries of a block, N keys of a block.

FlashAttention-2 (Dao 2023, arXiv:2307.08691): each program takes one block of queries, loops over the blocks of keys up
to it, and stores only the log-sum-exp of the scores. The backward pass recomputes the weights, in one kernel for the
gradients of keys and values and one for those of the queries, so that sums are always in the same order. In packed
rows, blocks of keys before the documents of the queries are skipped. Dropout masks are recomputed, too.

The kernels compile through Triton for NVIDIA GPUs from compute capability 8.0 on; on CPU they are interpreted, slowly,
for tests. JAX 0.11 raises a DeprecationWarning when it lowers them (pyproject.toml excludes later versions).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from jaxlm.ops.flash_kernels import TILES, Constants, Inputs, Tile, forward_kernel, keys_kernel, queries_kernel
from jaxlm.ops.launch import Outputs, launch

MAX_HEAD_SIZE = 256
Attend = Callable[[Inputs, jax.Array | int], jax.Array]
Partition = tuple[tuple[int, int, int], Inputs]  # a kernel's grid, and the parts that a program gets


def padded_head_size(head_size: int) -> int:
    """Channels that a kernel works with: Triton's blocks are powers of two, its products no smaller than 16."""
    return max(16, pl.next_power_of_2(head_size))


def kernel_key(key_B2: jax.Array, first_head: jax.Array | int = 0) -> jax.Array:
    """uint32 [B, 3]: dropout keys, with the number that the first head of the arrays has among all heads."""
    return jnp.pad(key_B2, ((0, 0), (0, 1))).at[:, 2].set(jnp.asarray(first_head, jnp.uint32))


def flash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, key: jax.Array | None, rate: float
) -> jax.Array:
    """`attention_kernels.causal_attention`, [B, T, H, K], of any floating-point dtype and of K up to MAX_HEAD_SIZE."""
    return on_each_device(Inputs(q, k, v, segments=segments, key=key), functools.partial(_attend, rate=rate))


def flash_attention_of_product(
    qkv: jax.Array, bias: jax.Array | None, segments: jax.Array | None, key: jax.Array | None, rate: float
) -> jax.Array:
    """`flash_attention` of the parts of qkv + bias; qkv [B, T, 3, H, K], bias [3, H, K]."""
    return on_each_device(Inputs(qkv, bias=bias, segments=segments, key=key), functools.partial(_attend, rate=rate))


def on_each_device(x: Inputs, attend: Attend) -> jax.Array:
    """`attend(x, first head)` on all devices that the compiler divides heads over (tensor parallelism)."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1)
    if not axes:
        return attend(x, 0)

    def here(x: Inputs) -> jax.Array:
        heads = x.q.shape[-2]
        return attend(x, jax.lax.axis_index(axes) * heads)

    specs = Inputs(*(None if y is None else PartitionSpec(*[None] * (y.ndim - 2), axes, None) for y in x[:4]))
    specs = specs._replace(**{name: PartitionSpec() for name in ("segments", "key") if getattr(x, name) is not None})
    out = PartitionSpec(None, None, axes, None)
    return jax.shard_map(here, in_specs=(specs,), out_specs=out, axis_names=set(axes), check_vma=False)(x)


def pad(x: Inputs, block: int, width: int) -> Inputs:
    """With zeros behind: positions up to a multiple of `block`, channels up to `width`."""
    missing, more = -x.q.shape[1] % block, width - x.q.shape[-1]

    def padded(y: jax.Array | None, positions: int, channels: int) -> jax.Array | None:
        if y is None:
            return None
        widths = [(0, 0)] * (y.ndim - 1) + [(0, channels)]
        widths[1] = (0, positions) if positions else widths[1]
        return jnp.pad(y, widths)

    arrays = {name: padded(getattr(x, name), missing, more) for name in ("q", "k", "v")}
    segments = None if x.segments is None else jnp.pad(x.segments, ((0, 0), (0, missing)))
    return x._replace(**arrays, bias=padded(x.bias, 0, more), segments=segments)


def _attend(x: Inputs, first_head: jax.Array | int, rate: float) -> jax.Array:
    t, size = x.q.shape[1], x.q.shape[-1]
    width = padded_head_size(size)
    constants = Constants(size**-0.5, 0.0 if x.key is None else rate, TILES[width])
    key = kernel_key(x.key, first_head) if constants.rate else None
    return _flash(pad(x._replace(key=key), constants.tiles.longest, width), constants)[:, :t, :, :size]


def bounds(segments_BT: jax.Array, of_keys: bool = False) -> jax.Array:
    """int32 [B, T]: the first position that each one sees; `of_keys`: the last one that sees it, or a later one."""
    t = segments_BT.shape[1]
    positions_1T = jnp.arange(t, dtype=jnp.int32)[None]
    changes = segments_BT[:, 1:] != segments_BT[:, :-1]
    if of_keys:
        ends_BT = jnp.pad(changes, ((0, 0), (0, 1)))
        return jax.lax.cummin(jnp.where(ends_BT, positions_1T, t - 1), axis=1, reverse=True)
    starts_BT = jnp.pad(changes, ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(starts_BT, positions_1T, 0), axis=1)


def limits(bounds_BT: jax.Array, queries: int, keys: int, of_keys: bool = False) -> jax.Array:
    """int32 [B, T / M]: for each block of queries the first block of keys that any of them sees.

    `of_keys`: [B, T / N], for each block of keys the block of queries after the last that sees any of them.
    """
    if of_keys:
        return bounds_BT[:, keys - 1 :: keys] // queries + 1
    return bounds_BT[:, ::queries] // keys


def _limits(segments_BT: jax.Array | None, tile: Tile, of_keys: bool = False) -> jax.Array | None:
    if segments_BT is None:
        return None
    return limits(bounds(segments_BT, of_keys), tile.queries, tile.keys, of_keys)


def _specs(x: Inputs, q: pl.BlockSpec, keys: pl.BlockSpec, g: pl.BlockSpec, rows: pl.BlockSpec) -> Inputs:
    """The specs of all inputs from those of q, of k and v, of g and the output, and of [B, H, T]."""
    length, width = x.q.shape[1], x.q.shape[-1]
    assert x.key is None or x.key.shape[1] == 3, "kernel_key makes it; a kernel would read beyond a shorter one"
    if x.k is None:
        q = pl.BlockSpec((None, length, 3, None, width), lambda block, b, head: (b, 0, 0, head, 0))
    bias = pl.BlockSpec((3, None, width), lambda block, b, head: (0, head, 0))
    segments = pl.BlockSpec((None, length), lambda block, b, head: (b, 0))
    key = pl.BlockSpec((None, 3), lambda block, b, head: (b, 0))
    limit = pl.BlockSpec((None, None), lambda block, b, head: (b, block))
    return Inputs(q, keys, keys, bias, segments, key, limit, g, g, rows, rows)


def _by_queries(x: Inputs, tile: Tile) -> Partition:
    """For programs that each get one block of queries of one head, and all keys that this head sees."""
    b, t, *_, h, width = x.q.shape
    shared = 1 if x.k is None else h // x.k.shape[2]
    q = pl.BlockSpec((None, t, None, width), lambda i, b, h: (b, 0, h, 0))
    keys = pl.BlockSpec((None, t, None, width), lambda i, b, h: (b, 0, h // shared, 0))
    g = pl.BlockSpec((None, tile.queries, None, width), lambda i, b, h: (b, i, h, 0))
    rows = pl.BlockSpec((None, None, tile.queries), lambda i, b, h: (b, h, i))
    return (t // tile.queries, b, h), _specs(x, q, keys, g, rows)


def _by_keys(x: Inputs, tile: Tile) -> Partition:
    """For programs that each get one block of keys of one head, and all queries of the heads that share it."""
    b, t, *_, h, width = x.q.shape
    groups = h if x.k is None else x.k.shape[2]
    queries = pl.BlockSpec((None, t, h // groups, width), lambda j, b, g: (b, 0, g, 0))
    keys = pl.BlockSpec((None, t, None, width), lambda j, b, g: (b, 0, g, 0))
    rows = pl.BlockSpec((None, h // groups, t), lambda j, b, g: (b, g, 0))
    return (t // tile.keys, b, groups), _specs(x, queries, keys, queries, rows)


def _launch(
    kernel: Callable[..., None],
    constants: Constants,
    tile: Tile,
    x: Inputs,
    partition: Partition,
    outputs: Outputs,
    into: jax.Array | None = None,
) -> list[jax.Array]:
    """Calls a kernel. The first output is `into` but for what is written."""
    grid, specs = partition
    of_inputs = Inputs(*(None if array is None else spec for array, spec in zip(x, specs, strict=True)))
    more, of_more = ((), ()) if into is None else ((into,), (outputs[0][0],))
    return launch(
        kernel,
        (x, *more),
        (of_inputs, *of_more),
        outputs,
        grid=grid,
        warps=tile.warps,
        stages=tile.stages,
        in_place=into is not None,
        constants=constants,
    )


def forward(x: Inputs, constants: Constants) -> tuple[jax.Array, Inputs]:
    """The output [B, T, H, K], and what the backward pass needs."""
    tile, (b, t, *_, h, width) = constants.tiles.forward, x.q.shape
    grid, specs = _by_queries(x, tile)
    outputs: Outputs = [(specs.g, (b, t, h, width), x.q.dtype), (specs.lse, (b, h, t), jnp.float32)]
    limited = x._replace(limits=_limits(x.segments, tile))
    out, lse = _launch(forward_kernel, constants, tile, limited, (grid, specs), outputs)
    return out, x._replace(out=out, lse=lse)


def query_gradients(x: Inputs, constants: Constants) -> list[jax.Array]:
    """Of x with `g`: the gradient of q (of a product with that part alone written), delta, and sums for the bias."""
    tile, (b, t, *_, h, width) = constants.tiles.queries, x.q.shape
    grid, specs = _by_queries(x, tile)
    own = specs.g
    if x.k is None:
        own = pl.BlockSpec((None, tile.queries, None, None, width), lambda i, b, h: (b, i, 0, h, 0))
    outputs: Outputs = [(own, x.q.shape, x.q.dtype), (specs.lse, (b, h, t), jnp.float32), *_sums(x, grid)]
    x = x._replace(limits=_limits(x.segments, tile))
    return _launch(queries_kernel, constants, tile, x, (grid, specs), outputs)


def key_gradients(x: Inputs, constants: Constants, into: jax.Array | None = None) -> list[jax.Array]:
    """Of x with `g` and `delta`: the gradients of k and v; of a product `into` with them, and sums for the bias."""
    tile, width = constants.tiles.keys_and_values, x.q.shape[-1]
    grid, specs = _by_keys(x, tile)
    if x.k is None:
        parts = pl.BlockSpec((None, tile.keys, 3, None, width), lambda j, b, h: (b, j, 0, h, 0))
        outputs: Outputs = [(parts, x.q.shape, x.q.dtype), *_sums(x, grid)]
    else:
        own = pl.BlockSpec((None, tile.keys, None, width), lambda j, b, g: (b, j, g, 0))
        outputs = [(own, x.k.shape, x.k.dtype)] * 2
    x = x._replace(limits=_limits(x.segments, tile, of_keys=True), out=None)
    return _launch(keys_kernel, constants, tile, x, (grid, specs), outputs, into)


def _sums(x: Inputs, grid: tuple[int, int, int]) -> Outputs:
    """The output for what each program sums up if there are biases, float32 [blocks, B, H, K]."""
    width = x.q.shape[-1]
    spec = pl.BlockSpec((None, None, None, width), lambda block, b, head: (block, b, head, 0))
    return [] if x.bias is None else [(spec, (*grid, width), jnp.float32)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _flash(x: Inputs, constants: Constants) -> jax.Array:
    return forward(x, constants)[0]


def _backward(constants: Constants, x: Inputs, g: jax.Array) -> tuple[Inputs]:
    x = x._replace(g=g)
    dq, delta, *sum_q = query_gradients(x, constants)
    x = x._replace(delta=delta)
    if x.k is not None:
        return (Inputs(dq, *key_gradients(x, constants)),)
    dqkv, *sum_v = key_gradients(x, constants, into=dq)
    if x.bias is None:
        return (Inputs(dqkv),)
    of_queries, of_values = (y.sum((0, 1)) for y in (*sum_q, *sum_v))
    bias = jnp.stack([of_queries, jnp.zeros_like(of_queries), of_values])
    return (Inputs(dqkv, bias=bias.astype(x.bias.dtype)),)


_flash.defvjp(forward, _backward)
