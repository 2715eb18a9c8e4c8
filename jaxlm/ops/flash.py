"""Causal attention fused into Pallas kernels, for what cuDNN's has not: packed documents and dropout.

Shapes: B rows, T positions, H query heads, G heads of keys and values, R = H / G query heads that share one, K channels
of a head, M queries of a block, N keys of a block.

FlashAttention-2 (Dao 2023, arXiv:2307.08691): one program a block of queries walks over the keys before it, and keeps
the log-sum-exp alone; the backward pass makes the weights again, in one kernel for the gradients of keys and values and
one for those of the queries, so that nothing is summed in an order that may change. Of packed rows, blocks of keys
that lie before the documents of the queries are never touched. Dropout masks are those of `dropout.keep`, made again
where they are needed.

The kernels compile through Triton on NVIDIA GPUs from compute capability 8.0 on; on CPU they are interpreted, for
tests, slowly.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxlm.model.dropout import keep

MAX_HEAD_SIZE = 256
_MASKED = -1e30  # finite, so that a row of masked scores gives no NaN
_LOG2_E = math.log2(math.e)  # the kernels' exponentials and logarithms are of base 2

warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")  # jax 0.11; pyproject.toml excludes later


class Tile(NamedTuple):
    """Queries and keys of a block, and how Triton compiles it."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    forward: Tile
    keys_and_values: Tile  # the backward kernel of their gradients
    queries: Tile  # and that of the queries'

    @property
    def longest(self) -> int:
        """Positions that rows are padded to a multiple of."""
        return max(max(tile.queries, tile.keys) for tile in self)


# By the padded head size. The backward ones of 64 were the fastest on an H200 (benchmarks/gpu/tiles.py). The rest is
# chosen from what Triton makes of it for 8.0 and 9.0, as benchmarks/gpu/sass.py shows: hardly any registers spilled, at
# most the 99 KiB of shared memory of the smallest GPUs.
TILES = {
    16: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    32: Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    64: Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
}


class _Case(NamedTuple):
    """What is compiled into the kernels."""

    scale: float  # of the scores
    rate: float  # of dropout
    tiles: Tiles


def padded_head_size(head_size: int) -> int:
    """Channels that a kernel works with: Triton's blocks are powers of two, its products no smaller than 16."""
    return max(16, pl.next_power_of_2(head_size))


def flash_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array | None,
    key_B2: jax.Array | None,
    rate: float,
) -> jax.Array:
    """Softmax attention, each position to itself and what came before it in its segment; [B, T, H, K].

    Args:
      q_BTHK: bfloat16, float16 or float32, as keys and values; K is at most MAX_HEAD_SIZE.
      segments_BT: int32; the positions of a segment lie together. None: one segment.
      key_B2: uint32 dropout key of each row; None: no dropout.
      rate: dropout rate of the attention weights.
    """
    _, t, _, k = q_BTHK.shape
    width = padded_head_size(k)
    tiles = TILES[width]
    to = (0, -t % tiles.longest)
    q, k_, v = (jnp.pad(x, ((0, 0), to, (0, 0), (0, width - k))) for x in (q_BTHK, k_BTGK, v_BTGK))
    segments = None if segments_BT is None else jnp.pad(segments_BT, ((0, 0), to))
    case = _Case(k**-0.5, 0.0 if key_B2 is None else rate, tiles)
    return _flash(q, k_, v, segments, key_B2 if case.rate else None, case)[:, :t, :, :k]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, key: Any, case: _Case) -> jax.Array:
    return _forward(q, k, v, segments, key, case)[0]


def _flash_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, key: Any, case: _Case
) -> tuple[jax.Array, Any]:
    out, lse_BHT = _forward(q, k, v, segments, key, case)
    return out, (q, k, v, segments, key, out, lse_BHT)


def _flash_backward(case: _Case, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    q, k, v, segments, key, out, lse_BHT = saved
    delta_BHT = jnp.einsum("bthk,bthk->bht", g, out, preferred_element_type=jnp.float32)
    return *_gradients(q, k, v, g, lse_BHT, delta_BHT, segments, key, case), None, None


_flash.defvjp(_flash_forward, _flash_backward)


# -------------------------------------------------------------------------------------------- which blocks see which


def _first_keys(segments_BT: jax.Array, tile: Tile) -> jax.Array:
    """int32 [B, T / M]: for each block of queries the first block of keys that any of them sees."""
    positions_1T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[None]
    begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
    start_BT = jax.lax.cummax(jnp.where(begins_BT, positions_1T, 0), axis=1)  # of the position's segment
    return start_BT[:, :: tile.queries] // tile.keys


def _end_queries(segments_BT: jax.Array, tile: Tile) -> jax.Array:
    """int32 [B, T / N]: for each block of keys the block of queries behind the last that sees any of them."""
    t = segments_BT.shape[1]
    positions_1T = jnp.arange(t, dtype=jnp.int32)[None]
    ends_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (0, 1)))
    last_BT = jax.lax.cummin(jnp.where(ends_BT, positions_1T, t - 1), axis=1, reverse=True)  # of the segment
    return last_BT[:, tile.keys - 1 :: tile.keys] // tile.queries + 1


# -------------------------------------------------------------------------------------------- inside the kernels


def _dot(x: jax.Array, y: jax.Array, *, trans_b: bool = False) -> jax.Array:
    """Product of two blocks, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return triton.dot(x, y, trans_b=trans_b, precision=precision)


def _scores(x: jax.Array, y: jax.Array, at: tuple[Any, Any], segments: tuple[Any, Any], case: _Case) -> jax.Array:
    """Scores of base 2 of two blocks, queries and keys in either order, masked where a query does not see a key.

    Args:
      at, segments: of the queries and of the keys, as they broadcast to the scores; segments may be None.
    """
    visible = at[1] <= at[0]
    if segments[0] is not None:
        visible = visible & (segments[0] == segments[1])
    return jnp.where(visible, _dot(x, y, trans_b=True) * (case.scale * _LOG2_E), _MASKED)


def _kept(key_ref: Any, head: Any, q_at: jax.Array, k_at: jax.Array, rate: float) -> jax.Array:
    """The dropout mask of a block; `q_at` and `k_at` broadcast to its shape."""
    coordinates = tuple(jnp.asarray(x, jnp.uint32) for x in (head, q_at, k_at))
    return keep(key_ref[0], key_ref[1], coordinates, rate)


def _some(ref: Any, at: Any) -> Any:
    return None if ref is None else ref[at]


def _row(x: Any) -> Any:
    return None if x is None else x[None, :]


def _column(x: Any) -> Any:
    return None if x is None else x[:, None]


def _forward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    segments_ref: Any,
    first_ref: Any,
    key_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    case: _Case,
) -> None:
    """Writes the output and log2 of the sum of exponentials of one block of queries and one head."""
    m, n, _, _ = case.tiles.forward
    i, head = pl.program_id(0), pl.program_id(2)
    q_at, q_MK = i * m + jnp.arange(m), q_ref[...]
    q_segments = _some(segments_ref, pl.ds(i * m, m))

    def keys(j: Any, carry: Any) -> Any:
        max_M, total_M, acc_MK = carry
        block = pl.ds(j * n, n)
        at = _column(q_at), _row(j * n + jnp.arange(n))
        s_MN = _scores(q_MK, k_ref[block, :], at, (_column(q_segments), _row(_some(segments_ref, block))), case)
        new_M = jnp.maximum(max_M, s_MN.max(axis=1))
        p_MN, shrink_M = jnp.exp2(s_MN - new_M[:, None]), jnp.exp2(max_M - new_M)
        total_M = total_M * shrink_M + p_MN.sum(axis=1)
        if case.rate:
            p_MN = jnp.where(_kept(key_ref, head, *at, case.rate), p_MN, 0.0)
        v_NK = v_ref[block, :]
        return new_M, total_M, acc_MK * shrink_M[:, None] + _dot(p_MN.astype(v_NK.dtype), v_NK)

    first = 0 if first_ref is None else first_ref[...]
    zeros_M = jnp.zeros((m,), jnp.float32)
    carry = (zeros_M + _MASKED, zeros_M, jnp.zeros(q_MK.shape, jnp.float32))
    max_M, total_M, acc_MK = jax.lax.fori_loop(first, jax.lax.div((i + 1) * m + (n - 1), n), keys, carry)
    out_ref[...] = (acc_MK / (total_M * (1 - case.rate))[:, None]).astype(out_ref.dtype)
    lse_ref[...] = max_M + jnp.log2(total_M)


def _keys_kernel(
    q_ref: Any,
    g_ref: Any,
    k_ref: Any,
    v_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    segments_ref: Any,
    end_ref: Any,
    key_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    case: _Case,
) -> None:
    """Writes the gradients of one block of keys and values, summed over the R heads that share it."""
    m, n, _, _ = case.tiles.keys_and_values
    j, group = pl.program_id(0), pl.program_id(2)
    k_at, k_NK, v_NK = j * n + jnp.arange(n), k_ref[...], v_ref[...]
    k_segments = _some(segments_ref, pl.ds(j * n, n))
    length, shared, _ = q_ref.shape

    def queries(i: Any, carry: Any, r: Any) -> Any:
        dk_NK, dv_NK = carry
        block = pl.ds(i * m, m)
        at, q_MK, g_MK = (_row(i * m + jnp.arange(m)), _column(k_at)), q_ref[block, r, :], g_ref[block, r, :]
        s_NM = _scores(k_NK, q_MK, at, (_row(_some(segments_ref, block)), _column(k_segments)), case)
        p_NM = jnp.exp2(s_NM - lse_ref[r, block][None, :])
        dp_NM = _dot(v_NK, g_MK, trans_b=True)
        dropped_NM = p_NM
        if case.rate:
            kept = _kept(key_ref, group * shared + r, *at, case.rate)
            dropped_NM, dp_NM = (jnp.where(kept, x * (1 / (1 - case.rate)), 0.0) for x in (p_NM, dp_NM))
        ds_NM = p_NM * (dp_NM - delta_ref[r, block][None, :])
        return dk_NK + _dot(ds_NM.astype(q_MK.dtype), q_MK), dv_NK + _dot(dropped_NM.astype(g_MK.dtype), g_MK)

    first, end = jax.lax.div(j * n, m), length // m if end_ref is None else end_ref[...]

    def heads(r: Any, carry: Any) -> Any:
        return jax.lax.fori_loop(first, end, functools.partial(queries, r=r), carry)

    zeros_NK = jnp.zeros(k_NK.shape, jnp.float32)
    dk_NK, dv_NK = jax.lax.fori_loop(0, shared, heads, (zeros_NK, zeros_NK))
    dk_ref[...] = (dk_NK * case.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_NK.astype(dv_ref.dtype)


def _queries_kernel(
    q_ref: Any,
    g_ref: Any,
    k_ref: Any,
    v_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    segments_ref: Any,
    first_ref: Any,
    key_ref: Any,
    dq_ref: Any,
    *,
    case: _Case,
) -> None:
    """Writes the gradient of one block of queries of one head."""
    m, n, _, _ = case.tiles.queries
    i, head = pl.program_id(0), pl.program_id(2)
    q_at, q_MK, g_MK = i * m + jnp.arange(m), q_ref[...], g_ref[...]
    lse_M, delta_M = lse_ref[...], delta_ref[...]
    q_segments = _some(segments_ref, pl.ds(i * m, m))

    def keys(j: Any, dq_MK: Any) -> Any:
        block = pl.ds(j * n, n)
        at, k_NK = (_column(q_at), _row(j * n + jnp.arange(n))), k_ref[block, :]
        s_MN = _scores(q_MK, k_NK, at, (_column(q_segments), _row(_some(segments_ref, block))), case)
        p_MN = jnp.exp2(s_MN - lse_M[:, None])
        dp_MN = _dot(g_MK, v_ref[block, :], trans_b=True)
        if case.rate:
            kept = _kept(key_ref, head, *at, case.rate)
            dp_MN = jnp.where(kept, dp_MN * (1 / (1 - case.rate)), 0.0)
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        return dq_MK + _dot(ds_MN.astype(k_NK.dtype), k_NK)

    first, end = 0 if first_ref is None else first_ref[...], jax.lax.div((i + 1) * m + (n - 1), n)
    dq_MK = jax.lax.fori_loop(first, end, keys, jnp.zeros(q_MK.shape, jnp.float32))
    dq_ref[...] = (dq_MK * case.scale).astype(dq_ref.dtype)


# -------------------------------------------------------------------------------------------- around the kernels

_Pair = tuple[Any, pl.BlockSpec]  # an array, or the shape of one, and the part of it that a program gets


class _Parts(NamedTuple):
    """What a program of a kernel gets of [B, T, H, K], of [B, T, G, K] and of [B, H, T]."""

    queries: pl.BlockSpec
    keys: pl.BlockSpec
    rows: pl.BlockSpec


def _by_queries(q: jax.Array, k: jax.Array, tile: Tile) -> tuple[tuple[int, ...], _Parts]:
    """The grid, (block of queries, row, head), and the parts: that block, and all keys of the row and head."""
    b, t, h, width = q.shape
    shared = h // k.shape[2]
    queries = pl.BlockSpec((None, tile.queries, None, width), lambda i, b, h: (b, i, h, 0))
    keys = pl.BlockSpec((None, t, None, width), lambda i, b, h: (b, 0, h // shared, 0))
    return (t // tile.queries, b, h), _Parts(
        queries, keys, pl.BlockSpec((None, None, tile.queries), lambda i, b, h: (b, h, i))
    )


def _by_keys(q: jax.Array, k: jax.Array, tile: Tile) -> tuple[tuple[int, ...], _Parts]:
    """The grid, (block of keys, row, head of keys), and the parts: that block, all queries that see the head."""
    b, t, h, width = q.shape
    groups = k.shape[2]
    queries = pl.BlockSpec((None, t, h // groups, width), lambda j, b, g: (b, 0, g, 0))
    keys = pl.BlockSpec((None, tile.keys, None, width), lambda j, b, g: (b, j, g, 0))
    return (t // tile.keys, b, groups), _Parts(
        queries, keys, pl.BlockSpec((None, h // groups, t), lambda j, b, g: (b, g, 0))
    )


def _masks(segments: Any, limits: Any, key: Any) -> list[_Pair]:
    """What masks are made from; each may be None."""
    segments_spec = pl.BlockSpec(
        (None, None) if segments is None else (None, segments.shape[1]), lambda i, b, h: (b, 0)
    )
    limits_spec = pl.BlockSpec((None, None), lambda i, b, h: (b, i))
    return [(segments, segments_spec), (limits, limits_spec), (key, pl.BlockSpec((None, 2), lambda i, b, h: (b, 0)))]


def _run(
    kernel: Callable[..., None], case: _Case, tile: Tile, grid: tuple[int, ...], given: list[_Pair], made: list[_Pair]
) -> Any:
    """Calls a kernel, interpreted where the program is compiled for CPU; returns a list as `made` is one."""
    arrays, specs = zip(*[(x, None if x is None else spec) for x, spec in given], strict=True)
    shapes, out_specs = (list(column) for column in zip(*made, strict=True))

    def call(*arrays: Any, interpret: bool) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, case=case),
            name=kernel.__name__.strip("_"),
            grid=grid,
            in_specs=list(specs),
            out_specs=out_specs,
            out_shape=shapes,
            compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            interpret=interpret,
        )(*arrays)

    compiled, interpreted = (functools.partial(call, interpret=interpret) for interpret in (False, True))
    return jax.lax.platform_dependent(*arrays, cpu=interpreted, default=compiled)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, key: Any, case: _Case
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, K] and log-sum-exp (base 2) [B, H, T], float32."""
    tile = case.tiles.forward
    grid, parts = _by_queries(q, k, tile)
    first = None if segments is None else _first_keys(segments, tile)
    given = [(q, parts.queries), (k, parts.keys), (v, parts.keys), *_masks(segments, first, key)]
    b, t, h, _ = q.shape
    made = [(_like(q), parts.queries), (jax.ShapeDtypeStruct((b, h, t), jnp.float32), parts.rows)]
    out, lse = _run(_forward_kernel, case, tile, grid, given, made)
    return out, lse


def _gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    segments: Any,
    key: Any,
    case: _Case,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of q, k and v."""

    def given(parts: _Parts, limits: Any) -> list[_Pair]:
        arrays = zip(((q, g), (k, v), (lse, delta)), parts, strict=True)
        return [*((x, part) for pair, part in arrays for x in pair), *_masks(segments, limits, key)]

    tile = case.tiles.queries
    grid, parts = _by_queries(q, k, tile)
    first = None if segments is None else _first_keys(segments, tile)
    (dq,) = _run(_queries_kernel, case, tile, grid, given(parts, first), [(_like(q), parts.queries)])

    tile = case.tiles.keys_and_values
    grid, parts = _by_keys(q, k, tile)
    end = None if segments is None else _end_queries(segments, tile)
    made = [(_like(k), parts.keys), (_like(v), parts.keys)]
    dk, dv = _run(_keys_kernel, case, tile, grid, given(parts, end), made)
    return dq, dk, dv
