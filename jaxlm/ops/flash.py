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
import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxlm.ops.masks import MASKED, keep_elements

MAX_HEAD_SIZE = 256
_LOG2_E = math.log2(math.e)  # the kernels' exponentials and logarithms are of base 2


class Tile(NamedTuple):
    """Block sizes of a kernel, and how Triton compiles it."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    forward: Tile
    keys_and_values: Tile  # the backward kernel of their gradients
    queries: Tile  # the backward kernel of the queries' gradients

    @property
    def longest(self) -> int:
        """Positions that rows are padded to a multiple of."""
        return max(max(tile.queries, tile.keys) for tile in self)


# By the padded head size. The backward ones of 64 were the fastest on an H200 (benchmarks/gpu/tiles.py). The rest is
# chosen from what Triton compiles for 8.0 and 9.0 (benchmarks/gpu/sass.py): hardly any registers spilled, and at most
# the 99 KiB of shared memory of the smallest GPUs.
TILES = {
    16: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    32: Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    64: Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
}


class Constants(NamedTuple):
    """What is compiled into the kernels."""

    scale: float  # of the scores
    rate: float  # of dropout
    tiles: Tiles


Pair = tuple[jax.Array, jax.Array]  # of queries and of keys
Partition = tuple[tuple[int, int, int], "Inputs[pl.BlockSpec]"]  # a kernel's grid, and the parts that a program gets
Shapes = dict[str, jax.Array | jax.ShapeDtypeStruct]  # of outputs, by the names of inputs that are partitioned alike
T = TypeVar("T")  # jax.Array; pl.BlockSpec, the part of the array that a program gets; jax.Ref, that part in a kernel


class Inputs(NamedTuple, Generic[T]):
    """What the kernels read. Fields are None where a kernel or the case doesn't need them."""

    q: T  # [B, T, H, K]
    g: T  # the output's gradient, [B, T, H, K]
    k: T  # [B, T, G, K]
    v: T
    lse: T  # log-sum-exp of the scores, base 2, float32 [B, H, T]
    delta: T  # sum over K of output * gradient, float32 [B, H, T]
    segments: T | None  # int32 [B, T]
    limits: T | None  # int32 [B, blocks], of `_limits`
    key: T | None  # of dropout, uint32 [B, 2]


def padded_head_size(head_size: int) -> int:
    """Channels that a kernel works with: Triton's blocks are powers of two, its products no smaller than 16."""
    return max(16, pl.next_power_of_2(head_size))


def flash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, key: jax.Array | None, rate: float
) -> jax.Array:
    """`attention_kernels.causal_attention`, [B, T, H, K], of any floating-point dtype and of K up to MAX_HEAD_SIZE."""
    _, t, _, size = q.shape
    width = padded_head_size(size)
    constants = Constants(size**-0.5, 0.0 if key is None else rate, TILES[width])
    padding = (0, -t % constants.tiles.longest)
    q, k, v = (jnp.pad(x, ((0, 0), padding, (0, 0), (0, width - size))) for x in (q, k, v))
    segments = None if segments is None else jnp.pad(segments, ((0, 0), padding))
    x = Inputs(q, None, k, v, None, None, segments, None, key if constants.rate else None)
    return _flash(x, constants)[:, :t, :, :size]


def _limits(segments_BT: jax.Array | None, tile: Tile, of_keys: bool = False) -> jax.Array | None:
    """int32 [B, T / M]: for each block of queries the first block of keys that any of them sees.

    `of_keys`: [B, T / N], for each block of keys the block of queries after the last that sees any of them.
    """
    if segments_BT is None:
        return None
    t = segments_BT.shape[1]
    positions_1T = jnp.arange(t, dtype=jnp.int32)[None]
    changes = segments_BT[:, 1:] != segments_BT[:, :-1]
    if of_keys:
        ends_BT = jnp.pad(changes, ((0, 0), (0, 1)))
        last_BT = jax.lax.cummin(jnp.where(ends_BT, positions_1T, t - 1), axis=1, reverse=True)  # of the segment
        return last_BT[:, tile.keys - 1 :: tile.keys] // tile.queries + 1
    starts_BT = jnp.pad(changes, ((0, 0), (1, 0)))
    first_BT = jax.lax.cummax(jnp.where(starts_BT, positions_1T, 0), axis=1)
    return first_BT[:, :: tile.queries] // tile.keys


def _dot(x: jax.Array, y: jax.Array, *, trans_b: bool = False) -> jax.Array:
    """Product of two blocks, summed in float32."""
    from jax.experimental.pallas import triton  # only where a kernel is compiled: it is deprecated

    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return triton.dot(x, y, trans_b=trans_b, precision=precision)


def _scores(x: jax.Array, y: jax.Array, positions: Pair, segments: Pair | None, constants: Constants) -> jax.Array:
    """Scores, base 2, of two blocks, queries and keys in either order, masked where a query does not see a key."""
    visible = positions[1] <= positions[0]
    if segments is not None:
        visible = visible & (segments[0] == segments[1])
    return jnp.where(visible, _dot(x, y, trans_b=True) * (constants.scale * _LOG2_E), MASKED)


def _kept(key: jax.Ref | None, head: jax.Array, positions: Pair, rate: float) -> jax.Array:
    """The dropout mask of a block of scores."""
    assert key is not None
    coordinates = tuple(jnp.asarray(x, jnp.uint32) for x in (head, *positions))
    return keep_elements(key[0], key[1], coordinates, rate)


def _load(ref: jax.Ref | None, block: slice | pl.Slice) -> jax.Array | None:
    return None if ref is None else ref[block]


def _pair(queries: jax.Array | None, keys: jax.Array | None, keys_first: bool = False) -> Any:
    """Vectors [M] and [N] with a second axis, so that they broadcast to scores [M, N] or [N, M]; None if not given."""
    if queries is None or keys is None:
        return None
    return (queries[None, :], keys[:, None]) if keys_first else (queries[:, None], keys[None, :])


def _forward_kernel(x: Inputs[jax.Ref], out_ref: jax.Ref, lse_ref: jax.Ref, *, constants: Constants) -> None:
    """Writes the output and the log-sum-exp of one block of queries and one head."""
    m, n, _, _ = constants.tiles.forward
    i, head = pl.program_id(0), pl.program_id(2)
    q_positions, q_MK = i * m + jnp.arange(m), x.q[...]
    q_segments = _load(x.segments, pl.ds(i * m, m))

    def add_keys(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        max_M, total_M, acc_MK = carry
        block = pl.ds(j * n, n)
        positions, k_NK = _pair(q_positions, j * n + jnp.arange(n)), x.k[block, :]
        segments = _pair(q_segments, _load(x.segments, block))
        s_MN = _scores(q_MK, k_NK, positions, segments, constants)
        new_M = jnp.maximum(max_M, s_MN.max(axis=1))
        p_MN, shrink_M = jnp.exp2(s_MN - new_M[:, None]), jnp.exp2(max_M - new_M)
        total_M = total_M * shrink_M + p_MN.sum(axis=1)
        if constants.rate:
            p_MN = jnp.where(_kept(x.key, head, positions, constants.rate), p_MN, 0.0)
        v_NK = x.v[block, :]
        return new_M, total_M, acc_MK * shrink_M[:, None] + _dot(p_MN.astype(v_NK.dtype), v_NK)

    first = 0 if x.limits is None else x.limits[...]
    zeros_M = jnp.zeros((m,), jnp.float32)
    carry = (zeros_M + MASKED, zeros_M, jnp.zeros(q_MK.shape, jnp.float32))
    max_M, total_M, acc_MK = jax.lax.fori_loop(first, jax.lax.div((i + 1) * m + (n - 1), n), add_keys, carry)
    out_ref[...] = (acc_MK / (total_M * (1 - constants.rate))[:, None]).astype(out_ref.dtype)
    lse_ref[...] = max_M + jnp.log2(total_M)


def _keys_kernel(x: Inputs[jax.Ref], dk_ref: jax.Ref, dv_ref: jax.Ref, *, constants: Constants) -> None:
    """Writes the gradients of one block of keys and values, summed over the R query heads that share it."""
    m, n, _, _ = constants.tiles.keys_and_values
    j, group = pl.program_id(0), pl.program_id(2)
    k_positions, k_NK, v_NK = j * n + jnp.arange(n), x.k[...], x.v[...]
    k_segments = _load(x.segments, pl.ds(j * n, n))
    length, shared, _ = x.q.shape

    def add_queries(i: jax.Array, carry: tuple[jax.Array, ...], r: jax.Array) -> tuple[jax.Array, ...]:
        dk_NK, dv_NK = carry
        block = pl.ds(i * m, m)
        positions = _pair(i * m + jnp.arange(m), k_positions, keys_first=True)
        q_MK, g_MK = x.q[block, r, :], x.g[block, r, :]
        segments = _pair(_load(x.segments, block), k_segments, keys_first=True)
        p_NM = jnp.exp2(_scores(k_NK, q_MK, positions, segments, constants) - x.lse[r, block][None, :])
        dp_NM = _dot(v_NK, g_MK, trans_b=True)
        dropped_NM = p_NM
        if constants.rate:
            kept = _kept(x.key, group * shared + r, positions, constants.rate)
            dropped_NM, dp_NM = (jnp.where(kept, y * (1 / (1 - constants.rate)), 0.0) for y in (p_NM, dp_NM))
        ds_NM = p_NM * (dp_NM - x.delta[r, block][None, :])
        return dk_NK + _dot(ds_NM.astype(q_MK.dtype), q_MK), dv_NK + _dot(dropped_NM.astype(g_MK.dtype), g_MK)

    first, end = jax.lax.div(j * n, m), length // m if x.limits is None else x.limits[...]

    def add_head(r: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return jax.lax.fori_loop(first, end, functools.partial(add_queries, r=r), carry)

    zeros_NK = jnp.zeros(k_NK.shape, jnp.float32)
    dk_NK, dv_NK = jax.lax.fori_loop(0, shared, add_head, (zeros_NK, zeros_NK))
    dk_ref[...] = (dk_NK * constants.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_NK.astype(dv_ref.dtype)


def _queries_kernel(x: Inputs[jax.Ref], dq_ref: jax.Ref, *, constants: Constants) -> None:
    """Writes the gradient of one block of queries of one head."""
    m, n, _, _ = constants.tiles.queries
    i, head = pl.program_id(0), pl.program_id(2)
    q_positions, q_MK, g_MK = i * m + jnp.arange(m), x.q[...], x.g[...]
    lse_M, delta_M = x.lse[...], x.delta[...]
    q_segments = _load(x.segments, pl.ds(i * m, m))

    def add_keys(j: jax.Array, dq_MK: jax.Array) -> jax.Array:
        block = pl.ds(j * n, n)
        positions, k_NK = _pair(q_positions, j * n + jnp.arange(n)), x.k[block, :]
        segments = _pair(q_segments, _load(x.segments, block))
        p_MN = jnp.exp2(_scores(q_MK, k_NK, positions, segments, constants) - lse_M[:, None])
        dp_MN = _dot(g_MK, x.v[block, :], trans_b=True)
        if constants.rate:
            kept = _kept(x.key, head, positions, constants.rate)
            dp_MN = jnp.where(kept, dp_MN * (1 / (1 - constants.rate)), 0.0)
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        return dq_MK + _dot(ds_MN.astype(k_NK.dtype), k_NK)

    first, end = 0 if x.limits is None else x.limits[...], jax.lax.div((i + 1) * m + (n - 1), n)
    dq_MK = jax.lax.fori_loop(first, end, add_keys, jnp.zeros(q_MK.shape, jnp.float32))
    dq_ref[...] = (dq_MK * constants.scale).astype(dq_ref.dtype)


def _specs(queries: pl.BlockSpec, keys: pl.BlockSpec, rows: pl.BlockSpec, length: int) -> Inputs[pl.BlockSpec]:
    """The specs of all inputs from those of [B, T, H, K], [B, T, G, K] and [B, H, T]. The grid is (block, B, head)."""
    segments = pl.BlockSpec((None, length), lambda block, b, head: (b, 0))
    limits = pl.BlockSpec((None, None), lambda block, b, head: (b, block))
    key = pl.BlockSpec((None, 2), lambda block, b, head: (b, 0))
    return Inputs(queries, queries, keys, keys, rows, rows, segments, limits, key)


def _by_queries(x: Inputs[jax.Array], tile: Tile) -> Partition:
    """For programs that each get one block of queries of one head, and all keys that this head sees."""
    b, t, h, width = x.q.shape
    shared = h // x.k.shape[2]
    queries = pl.BlockSpec((None, tile.queries, None, width), lambda i, b, h: (b, i, h, 0))
    keys = pl.BlockSpec((None, t, None, width), lambda i, b, h: (b, 0, h // shared, 0))
    rows = pl.BlockSpec((None, None, tile.queries), lambda i, b, h: (b, h, i))
    return (t // tile.queries, b, h), _specs(queries, keys, rows, t)


def _by_keys(x: Inputs[jax.Array], tile: Tile) -> Partition:
    """For programs that each get one block of keys of one head, and all queries of the heads that share it."""
    b, t, h, width = x.q.shape
    groups = x.k.shape[2]
    queries = pl.BlockSpec((None, t, h // groups, width), lambda j, b, g: (b, 0, g, 0))
    keys = pl.BlockSpec((None, tile.keys, None, width), lambda j, b, g: (b, j, g, 0))
    rows = pl.BlockSpec((None, h // groups, t), lambda j, b, g: (b, g, 0))
    return (t // tile.keys, b, groups), _specs(queries, keys, rows, t)


def _launch(
    kernel: Callable[..., None], constants: Constants, tile: Tile, x: Inputs, partition: Partition, outputs: Shapes
) -> list[jax.Array]:
    """Calls a kernel; on CPU it is interpreted."""
    from jax.experimental.pallas import triton

    grid, specs = partition

    def call(x: Inputs, interpret: bool) -> list[jax.Array]:
        return pl.pallas_call(
            functools.partial(kernel, constants=constants),
            name=kernel.__name__.strip("_"),
            grid=grid,
            in_specs=[Inputs(*(None if array is None else spec for array, spec in zip(x, specs, strict=True)))],
            out_specs=[getattr(specs, name) for name in outputs],
            out_shape=[jax.ShapeDtypeStruct(y.shape, y.dtype) for y in outputs.values()],
            compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            interpret=interpret,
        )(x)

    interpreted, compiled = (functools.partial(call, interpret=interpret) for interpret in (True, False))
    return jax.lax.platform_dependent(x, cpu=interpreted, default=compiled)


def forward(x: Inputs[jax.Array], constants: Constants) -> tuple[jax.Array, tuple[Inputs, jax.Array, jax.Array]]:
    """The output [B, T, H, K], and what the backward pass needs: x, the output and the log-sum-exp [B, H, T]."""
    tile, (b, t, h, _) = constants.tiles.forward, x.q.shape
    limited = x._replace(limits=_limits(x.segments, tile))
    outputs: Shapes = {"q": x.q, "lse": jax.ShapeDtypeStruct((b, h, t), jnp.float32)}
    out, lse = _launch(_forward_kernel, constants, tile, limited, _by_queries(x, tile), outputs)
    return out, (x, out, lse)


def gradients(x: Inputs[jax.Array], constants: Constants) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v."""
    tile = constants.tiles.queries
    x = x._replace(limits=_limits(x.segments, tile))
    (dq,) = _launch(_queries_kernel, constants, tile, x, _by_queries(x, tile), {"q": x.q})
    tile = constants.tiles.keys_and_values
    x = x._replace(limits=_limits(x.segments, tile, of_keys=True))
    dk, dv = _launch(_keys_kernel, constants, tile, x, _by_keys(x, tile), {"k": x.k, "v": x.v})
    return dq, dk, dv


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _flash(x: Inputs, constants: Constants) -> jax.Array:
    return forward(x, constants)[0]


def _backward(constants: Constants, saved: tuple[Inputs, jax.Array, jax.Array], g: jax.Array) -> tuple[Inputs]:
    x, out, lse = saved
    delta = jnp.einsum("bthk,bthk->bht", g, out, preferred_element_type=jnp.float32)
    dq, dk, dv = gradients(x._replace(g=g, lse=lse, delta=delta), constants)
    return (Inputs(dq, None, dk, dv, None, None, None, None, None),)


_flash.defvjp(forward, _backward)
