"""The kernels of hopper.py: what a program of three warpgroups computes, in Pallas' Mosaic dialect.

Shapes: T positions, R query heads that share a head of keys and values, K channels of a head, M queries and N keys of a
tile of scores, 64 rows of a warpgroup's tile.

Two warpgroups compute, each for 64 queries (or keys) of its own; both read the blocks that the third copies
(warpgroups.py). What a query may see is a range, as the positions of a document lie together: from the first one of its
document up to itself. A key is seen from itself up to the last one of its document.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from jaxlm.ops.flash_kernels import LOG2_E, Inputs
from jaxlm.ops.masks import MASKED, keep_bits, mix_coordinates
from jaxlm.ops.warpgroups import GROUPS, ROWS, Ref, Scratch, divide, fetch, over, product, rounded, sums, write

AXES = ("head", "block", "row")  # of the grid
_TILE = mosaic.Layout.WGMMA  # of an array [64, columns] in a warpgroup's registers
_BY_ROW, _BY_COLUMN = _TILE.reduce(1), _TILE.reduce(0)  # of one [64] or [columns] that goes with it


def _program() -> tuple[jax.Array, jax.Array, jax.Array]:
    """The row of the batch, the block and the head."""
    head, block, row = (lax.axis_index(name) for name in AXES)
    return row, block, head


def _part(array: Ref, part: int, row: jax.Array, positions: Any, head: jax.Array) -> Ref:
    """[positions, K] of an array of one part, or of queries (0), keys (1) or values (2) in one of all."""
    of_product = len(array.shape) == 5
    return array.at[row, positions, part, head] if of_product else array.at[row, positions, head]


def _read(x: Inputs, part: int, row: jax.Array, positions: Any, head: jax.Array) -> Ref:
    """`_part` of the queries, keys or values, where they stand; `head`: of queries."""
    if x.k is None:
        return _part(x.q, part, row, positions, head)
    if part:
        head = lax.div(head, jnp.int32(x.q.shape[2] // x.k.shape[2]))
    return _part((x.q, x.k, x.v)[part], part, row, positions, head)


def _bias(x: Inputs, part: int, head: jax.Array, like: Ref) -> jax.Array:
    """Of the queries or values, [64, K] float32, in each row the same."""
    return _by_column(_load(x.bias.at[part, head], _BY_COLUMN).astype(jnp.float32), like)


def _add_bias(buffer: Ref, x: Inputs, part: int, head: jax.Array) -> None:
    if x.bias is not None:
        buffer[...] = (buffer[...].astype(jnp.float32) + _bias(x, part, head, buffer)).astype(buffer.dtype)
        mosaic.commit_smem()


def _by_row(values: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(values, like.shape, [0])


def _by_column(values: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(values, like.shape, [1])


def _filled(value: float, shape: tuple[int, ...], layout: Any) -> jax.Array:
    return mosaic.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _count(shape: tuple[int, ...], axis: int, start: jax.Array, layout: Any) -> jax.Array:
    """int32 `start`, start + 1, ... along an axis."""
    return mosaic.broadcasted_iota(jnp.int32, shape, axis, layout=layout) + start


def _load(ref: Ref, layout: Any) -> jax.Array:
    load: Any = mosaic.load  # JAX 0.10's has another signature
    return load(ref, layout=layout, optimized=False)


class Rows(NamedTuple):
    """The 64 queries, or keys, of a warpgroup."""

    start: jax.Array
    bounds: jax.Array | None  # int32 [64]: the first key that each sees, or the last query that sees each
    are_keys: bool


def _rows(x: Inputs, block: jax.Array, group: jax.Array, row: jax.Array, *, are_keys: bool = False) -> Rows:
    start = (block * GROUPS + group) * ROWS
    bounds = None if x.bounds is None else _load(x.bounds.at[row, pl.ds(start, ROWS)], _BY_ROW)
    return Rows(start, bounds, are_keys)


def _scores(x: Ref, y: Ref, rows: Rows, first: jax.Array, scale: float) -> jax.Array:
    """Scores, base 2, of `rows` x and of the N keys, or queries, y from `first` on; masked where one is not seen."""
    s = product(x, y.transpose((1, 0))) * (scale * LOG2_E)
    own, others = _count(s.shape, 0, rows.start, _TILE), _count(s.shape, 1, first, _TILE)
    visible = others >= own if rows.are_keys else others <= own
    if rows.bounds is not None:
        bounds = _by_row(rows.bounds, s)
        visible = visible & (others <= bounds if rows.are_keys else others >= bounds)
    return jnp.where(visible, s, MASKED)


def _drop(
    values: jax.Array,
    x: Inputs,
    rows: Rows,
    first: jax.Array,
    place: tuple[jax.Array, jax.Array],
    rate: float,
) -> jax.Array:
    """An array of the shape of `_scores`, 0 where dropout takes the weight; `place`: row of the batch, head."""
    row, head = place
    shape = values.shape
    if rows.are_keys:
        queries, spread = _count(shape[1:], 0, first, _BY_COLUMN), _by_column
    else:
        queries, spread = _count(shape[:1], 0, rows.start, _BY_ROW), _by_row
    keys = _count(shape, 0, rows.start, _TILE) if rows.are_keys else _count(shape, 1, first, _TILE)
    numbers = head.astype(jnp.uint32) + x.key[row, 2], queries.astype(jnp.uint32)
    mixed = mix_coordinates(x.key[row, 0], x.key[row, 1], numbers)
    key0, key1 = (spread(y, values) for y in mixed)
    kept = keep_bits(key0, key1, keys.astype(jnp.uint32), rate)
    return jnp.where(kept, values, 0.0)


def _over_keys(
    x: Inputs, place: tuple[jax.Array, jax.Array, jax.Array], compute: Callable[..., None], scratch: Scratch
) -> None:
    """Divides a program that reads the keys and values which two blocks of queries see."""
    row, block, head = place
    n = scratch.blocks[0].shape[1]
    first, end = 0 if x.limits is None else x.limits[row, block], (block + 1) * (GROUPS * ROWS // n)
    copies = lambda j: [_read(x, part, row, pl.ds(j * n, n), head) for part in (1, 2)]  # noqa: E731
    divide(functools.partial(compute, first, end), copies, first, end, scratch)


def forward_kernel(x: Inputs, out: Ref, lse: Ref, scratch: Scratch, *, scale: float, rate: float) -> None:
    """Writes the output and the log-sum-exp of two blocks of queries of one head."""
    (row, block, head), n = _program(), scratch.blocks[0].shape[1]

    def compute(first: jax.Array, end: jax.Array, group: jax.Array) -> None:
        rows = _rows(x, block, group, row)
        own = pl.ds(rows.start, ROWS)
        q_MK, lse_M = fetch([_read(x, 0, row, own, head)], group, scratch)
        _add_bias(q_MK, x, 0, head)

        def add_keys(j: jax.Array, blocks: list[Ref], carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            (max_M, total_M, kept_M, acc_MK), (k_NK, v_NK) = carry, blocks
            s_MN = _scores(q_MK, k_NK, rows, j * n, scale)
            new_M = jnp.maximum(max_M, s_MN.max(axis=1))
            p_MN, shrink_M = jnp.exp2(s_MN - _by_row(new_M, s_MN)), jnp.exp2(max_M - new_M)
            total_M = total_M * shrink_M + p_MN.sum(axis=1)
            if rate:
                p_MN = _drop(p_MN, x, rows, j * n, (row, head), rate)
            if weighs_bias:
                kept_M = kept_M * shrink_M + p_MN.sum(axis=1)
            added_MK = product(rounded(p_MN, v_NK.dtype, scratch.spare, group), v_NK)
            return new_M, total_M, kept_M, acc_MK * _by_row(shrink_M, acc_MK) + added_MK

        weighs_bias = x.bias is not None and rate > 0  # weights that are dropped don't add up to 1
        zeros_M, zeros_MK = _filled(0.0, (ROWS,), _BY_ROW), _filled(0.0, q_MK.shape, _TILE)
        carry = _filled(MASKED, (ROWS,), _BY_ROW), zeros_M, zeros_M, zeros_MK
        max_M, total_M, kept_M, acc_MK = over(first, end, add_keys, carry, scratch)
        if x.bias is not None:
            weight_M = kept_M if weighs_bias else total_M
            acc_MK = acc_MK + _by_row(weight_M, acc_MK) * _bias(x, 2, head, acc_MK)
        acc_MK = acc_MK / _by_row(total_M * (1 - rate), acc_MK)
        written = out.at[row, own, head], lse.at[row, head, own]
        write((acc_MK, max_M + jnp.log(total_M) * LOG2_E), (q_MK, lse_M), written)

    _over_keys(x, (row, block, head), compute, scratch)


def queries_kernel(x: Inputs, dq: Ref, delta: Ref, *refs: Any, scale: float, rate: float) -> None:
    """Writes the gradient of two blocks of queries of one head, delta and, if there are biases, the biased queries."""
    *biased, scratch = refs
    (row, block, head), n = _program(), scratch.blocks[0].shape[1]

    def compute(first: jax.Array, end: jax.Array, group: jax.Array) -> None:
        rows = _rows(x, block, group, row)
        own = pl.ds(rows.start, ROWS)
        sources = _read(x, 0, row, own, head), x.g.at[row, own, head], x.out.at[row, own, head]
        q_MK, g_MK, out_MK, sums_M = fetch(sources, group, scratch)
        wide_MK = g_MK[...].astype(jnp.float32)
        delta_M = (wide_MK * out_MK[...].astype(jnp.float32)).sum(axis=1)
        of_bias_M = None if x.bias is None else (wide_MK * _bias(x, 2, head, g_MK)).sum(axis=1)
        _add_bias(q_MK, x, 0, head)
        if biased:
            write((), (q_MK,), (_part(biased[0], 0, row, own, head),))
        lse_M = _load(x.lse.at[row, head, own], _BY_ROW)

        def add_keys(dq_MK: Ref, j: jax.Array, blocks: list[Ref], _: None) -> None:
            k_NK, v_NK = blocks
            s_MN = _scores(q_MK, k_NK, rows, j * n, scale)
            p_MN, dp_MN = jnp.exp2(s_MN - _by_row(lse_M, s_MN)), product(g_MK, v_NK.transpose((1, 0)))
            if of_bias_M is not None:
                dp_MN = dp_MN + _by_row(of_bias_M, dp_MN)
            if rate:
                dp_MN = _drop(dp_MN * (1 / (1 - rate)), x, rows, j * n, (row, head), rate)
            ds_MN = p_MN * (dp_MN - _by_row(delta_M, s_MN))
            mosaic.wgmma(dq_MK, rounded(ds_MN, k_NK.dtype, scratch.spare, group), k_NK)
            mosaic.wgmma_wait(0)

        def add_all(dq_MK: Ref) -> jax.Array:
            over(first, end, functools.partial(add_keys, dq_MK), None, scratch)
            return dq_MK[...]

        dq_MK = pl.run_scoped(add_all, sums(*q_MK.shape))
        write((dq_MK * scale, delta_M), (q_MK, sums_M), (_part(dq, 0, row, own, head), delta.at[row, head, own]))

    _over_keys(x, (row, block, head), compute, scratch)


def keys_kernel(x: Inputs, *refs: Any, scale: float, rate: float) -> None:
    """Writes the gradients of two blocks of keys and values, summed over the R query heads that share them.

    Args:
      refs: dk and dv, or one of a product.
    """
    *targets, scratch = refs
    (row, block, shared_head), m = _program(), scratch.blocks[0].shape[1]
    _, length, heads, _ = x.g.shape
    shared = 1 if x.k is None else heads // x.k.shape[2]
    start = block * (GROUPS * ROWS // m)
    blocks_a_head = (length // m if x.limits is None else x.limits[row, block]) - start

    def place(step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Query head and block of queries of a step."""
        return shared_head * shared + lax.div(step, blocks_a_head), start + lax.rem(step, blocks_a_head)

    def compute(group: jax.Array) -> None:
        rows = _rows(x, block, group, row, are_keys=True)
        own = pl.ds(rows.start, ROWS)
        k_NK, v_NK = fetch([_read(x, part, row, own, shared_head * shared) for part in (1, 2)], group, scratch)
        _add_bias(v_NK, x, 2, shared_head)

        def add_queries(dk_NK: Ref, dv_NK: Ref, step: jax.Array, blocks: list[Ref], _: None) -> None:
            q_MK, g_MK, lse_M, delta_M = blocks
            head, i = place(step)
            s_NM = _scores(k_NK, q_MK, rows, i * m, scale)
            p_NM = jnp.exp2(s_NM - _by_column(_load(lse_M, _BY_COLUMN), s_NM))
            dp_NM, dropped_NM = product(v_NK, g_MK.transpose((1, 0))), p_NM
            if rate:
                dropped_NM, dp_NM = (_drop(y, x, rows, i * m, (row, head), rate) for y in (p_NM, dp_NM))
                dp_NM = dp_NM * (1 / (1 - rate))
            ds_NM = p_NM * (dp_NM - _by_column(_load(delta_M, _BY_COLUMN), s_NM))
            mosaic.wgmma(dv_NK, rounded(dropped_NM, g_MK.dtype, scratch.spare, group), g_MK)
            mosaic.wgmma(dk_NK, rounded(ds_NM, q_MK.dtype, scratch.spare, group), q_MK)
            mosaic.wgmma_wait(0)

        def add_all(dk_NK: Ref, dv_NK: Ref) -> tuple[jax.Array, jax.Array]:
            over(0, shared * blocks_a_head, functools.partial(add_queries, dk_NK, dv_NK), None, scratch)
            return dk_NK[...], dv_NK[...]

        dk_NK, dv_NK = pl.run_scoped(add_all, sums(*k_NK.shape), sums(*v_NK.shape))
        parts = [_part(targets[i], part, row, own, shared_head) for i, part in ((0, 1), (-1, 2))]
        write((dk_NK * scale, dv_NK * (1 / (1 - rate))), (k_NK, v_NK), parts)

    def copies(step: jax.Array) -> list[Ref]:
        head, i = place(step)
        queries = pl.ds(i * m, m)
        rows = [y.at[row, head, queries] for y in (x.lse, x.delta)]
        q = _read(x, 0, row, queries, head) if x.biased is None else x.biased.at[row, queries, head]
        return [q, x.g.at[row, queries, head], *rows]

    divide(compute, copies, 0, shared * blocks_a_head, scratch)
