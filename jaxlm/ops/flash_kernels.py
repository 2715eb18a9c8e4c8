"""The kernels of flash.py: what one program of each computes.

Shapes: T positions, R query heads that share a head of keys and values, K channels of a head, M queries of a block, N
keys of a block.

Queries, keys and values have arrays of their own, or are read where they stand in the product [T, 3, K] that they come
from. Its biases are added on the way: the queries' to a block as it is read; the values' to the output, as the weights
add up to 1; the keys' nowhere, since q * bias, added to all scores of a query, changes none of its weights.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxlm.ops.masks import MASKED, keep_elements

LOG2_E = math.log2(math.e)  # the kernels' exponentials and logarithms are of base 2


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
# Of hopper_kernels.py, for all head sizes: 64 rows for each of two of the three warpgroups of four warps, and as many
# columns as registers hold (MOSAIC_GPU_DUMP_PTXAS=1 jaxlm plan --model.attention mosaic).
HOPPER_TILES = Tiles(Tile(128, 128, 12, 2), Tile(64, 128, 12, 2), Tile(128, 64, 12, 2))


class Constants(NamedTuple):
    """What is compiled into the kernels."""

    scale: float  # of the scores
    rate: float  # of dropout
    tiles: Tiles


Pair = tuple[jax.Array, jax.Array]  # of queries and of keys


class Inputs(NamedTuple):
    """What the kernels read. Fields are None where a kernel or the case doesn't need them.

    Of arrays, of the parts of them that a program gets (`pl.BlockSpec`), or, in a kernel, of references to those.
    """

    q: Any  # [B, T, H, K]; of a product [B, T, 3, H, K], with the keys and values
    k: Any = None  # [B, T, G, K]
    v: Any = None
    bias: Any = None  # of the product, [3, H, K]
    segments: Any = None  # int32 [B, T]
    key: Any = None  # of dropout, uint32 [B, 3], of `flash.kernel_key`
    limits: Any = None  # int32 [B, blocks], of `flash._limits`
    g: Any = None  # the output's gradient, [B, T, H, K]
    out: Any = None  # the output, [B, T, H, K]
    lse: Any = None  # log-sum-exp of the scores, base 2, float32 [B, H, T]
    delta: Any = None  # sum over K of output * gradient, float32 [B, H, T]
    bounds: Any = None  # for hopper_kernels.py: int32 [B, T], of `flash.bounds`
    biased: Any = None  # for hopper_kernels.py: the queries of a product with their bias, [B, T, H, K]


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
    return jnp.where(visible, _dot(x, y, trans_b=True) * (constants.scale * LOG2_E), MASKED)


def _kept(key: jax.Ref | None, head: jax.Array, positions: Pair, rate: float) -> jax.Array:
    """The dropout mask of a block of scores."""
    assert key is not None
    coordinates = jnp.asarray(head, jnp.uint32) + key[2], *(jnp.asarray(x, jnp.uint32) for x in positions)
    return keep_elements(key[0], key[1], coordinates, rate)


def _load(ref: jax.Ref | None, block: slice | pl.Slice) -> jax.Array | None:
    return None if ref is None else ref[block]


def _queries(x: Inputs, block: slice | pl.Slice, r: jax.Array | None = None) -> jax.Array:
    """A block of queries, [M, K]; of the r-th of the heads that share one."""
    if x.k is not None:
        block_MK: jax.Array = x.q[block, :] if r is None else x.q[block, r, :]
        return block_MK
    return x.q[block, 0, :] if x.bias is None else x.q[block, 0, :] + x.bias[0, :][None, :]


def _keys(x: Inputs, block: slice | pl.Slice) -> jax.Array:
    return x.q[block, 1, :] if x.k is None else x.k[block, :]


def _values(x: Inputs, block: slice | pl.Slice) -> jax.Array:
    """A block of values, [N, K], without their bias."""
    return x.q[block, 2, :] if x.v is None else x.v[block, :]


def _pair(queries: jax.Array | None, keys: jax.Array | None, keys_first: bool = False) -> Any:
    """Vectors [M] and [N] with a second axis, so that they broadcast to scores [M, N] or [N, M]; None if not given."""
    if queries is None or keys is None:
        return None
    return (queries[None, :], keys[:, None]) if keys_first else (queries[:, None], keys[None, :])


def forward_kernel(x: Inputs, out_ref: jax.Ref, lse_ref: jax.Ref, *, constants: Constants) -> None:
    """Writes the output and the log-sum-exp of one block of queries and one head."""
    m, n, _, _ = constants.tiles.forward
    i, head = pl.program_id(0), pl.program_id(2)
    own = pl.ds(i * m, m)
    q_positions, q_MK, q_segments = i * m + jnp.arange(m), _queries(x, own), _load(x.segments, own)
    weighs_bias = x.bias is not None and constants.rate > 0  # weights that are dropped don't add up to 1

    def add_keys(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        max_M, total_M, kept_M, acc_MK = carry
        block = pl.ds(j * n, n)
        positions = _pair(q_positions, j * n + jnp.arange(n))
        segments = _pair(q_segments, _load(x.segments, block))
        s_MN = _scores(q_MK, _keys(x, block), positions, segments, constants)
        new_M = jnp.maximum(max_M, s_MN.max(axis=1))
        p_MN, shrink_M = jnp.exp2(s_MN - new_M[:, None]), jnp.exp2(max_M - new_M)
        total_M = total_M * shrink_M + p_MN.sum(axis=1)
        if constants.rate:
            p_MN = jnp.where(_kept(x.key, head, positions, constants.rate), p_MN, 0.0)
        if weighs_bias:
            kept_M = kept_M * shrink_M + p_MN.sum(axis=1)
        v_NK = _values(x, block)
        return new_M, total_M, kept_M, acc_MK * shrink_M[:, None] + _dot(p_MN.astype(v_NK.dtype), v_NK)

    first, end = 0 if x.limits is None else x.limits[...], jax.lax.div((i + 1) * m + (n - 1), n)
    zeros_M = jnp.zeros((m,), jnp.float32)
    carry = (zeros_M + MASKED, zeros_M, zeros_M, jnp.zeros(q_MK.shape, jnp.float32))
    max_M, total_M, kept_M, acc_MK = jax.lax.fori_loop(first, end, add_keys, carry)
    if x.bias is not None:
        acc_MK = acc_MK + (kept_M if weighs_bias else total_M)[:, None] * x.bias[2, :].astype(jnp.float32)[None, :]
    out_ref[...] = (acc_MK / (total_M * (1 - constants.rate))[:, None]).astype(out_ref.dtype)
    lse_ref[...] = max_M + jnp.log2(total_M)


def queries_kernel(x: Inputs, dq_ref: jax.Ref, delta_ref: jax.Ref, *sum_refs: jax.Ref, constants: Constants) -> None:
    """Writes the gradient of one block of queries of one head, its sum if there are biases, and delta."""
    m, n, _, _ = constants.tiles.queries
    i, head = pl.program_id(0), pl.program_id(2)
    own = pl.ds(i * m, m)
    q_positions, q_MK, g_MK, lse_M = i * m + jnp.arange(m), _queries(x, own), x.g[...], x.lse[...]
    wide_MK, q_segments = g_MK.astype(jnp.float32), _load(x.segments, own)
    delta_M = (wide_MK * x.out[...].astype(jnp.float32)).sum(axis=1)
    of_bias_M = None if x.bias is None else (wide_MK * x.bias[2, :].astype(jnp.float32)[None, :]).sum(axis=1)

    def add_keys(j: jax.Array, dq_MK: jax.Array) -> jax.Array:
        block = pl.ds(j * n, n)
        positions, k_NK = _pair(q_positions, j * n + jnp.arange(n)), _keys(x, block)
        segments = _pair(q_segments, _load(x.segments, block))
        p_MN = jnp.exp2(_scores(q_MK, k_NK, positions, segments, constants) - lse_M[:, None])
        dp_MN = _dot(g_MK, _values(x, block), trans_b=True)
        if of_bias_M is not None:
            dp_MN = dp_MN + of_bias_M[:, None]
        if constants.rate:
            kept = _kept(x.key, head, positions, constants.rate)
            dp_MN = jnp.where(kept, dp_MN * (1 / (1 - constants.rate)), 0.0)
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        return dq_MK + _dot(ds_MN.astype(k_NK.dtype), k_NK)

    first, end = 0 if x.limits is None else x.limits[...], jax.lax.div((i + 1) * m + (n - 1), n)
    dq_MK = jax.lax.fori_loop(first, end, add_keys, jnp.zeros(q_MK.shape, jnp.float32)) * constants.scale
    dq_ref[...] = dq_MK.astype(dq_ref.dtype)
    delta_ref[...] = delta_M
    for sum_ref in sum_refs:
        sum_ref[...] = dq_MK.sum(axis=0)


def keys_kernel(x: Inputs, *refs: jax.Ref, constants: Constants) -> None:
    """Writes the gradients of one block of keys and values, summed over the R query heads that share it.

    Args:
      refs: dk and dv; or, of a product, its gradient with the queries' part in it, the same to be written, and the sum
        of dv if there are biases.
    """
    m, n, _, _ = constants.tiles.keys_and_values
    j, group = pl.program_id(0), pl.program_id(2)
    own = pl.ds(j * n, n)
    k_positions, k_NK, v_NK, k_segments = j * n + jnp.arange(n), _keys(x, own), _values(x, own), _load(x.segments, own)
    if x.bias is not None:
        v_NK = v_NK + x.bias[2, :][None, :]
    length, shared, _ = x.g.shape

    def add_queries(i: jax.Array, carry: tuple[jax.Array, ...], r: jax.Array) -> tuple[jax.Array, ...]:
        dk_NK, dv_NK = carry
        block = pl.ds(i * m, m)
        positions = _pair(i * m + jnp.arange(m), k_positions, keys_first=True)
        q_MK, g_MK = _queries(x, block, r), x.g[block, r, :]
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
    dk_NK = dk_NK * constants.scale
    if x.k is not None:
        refs[0][...], refs[1][...] = (y.astype(k_NK.dtype) for y in (dk_NK, dv_NK))
        return
    refs[1][:, 1, :], refs[1][:, 2, :] = (y.astype(k_NK.dtype) for y in (dk_NK, dv_NK))
    for sum_ref in refs[2:]:
        sum_ref[...] = dv_NK.sum(axis=0)
