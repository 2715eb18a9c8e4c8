"""Rows of an embedding table, with a gradient that is summed in the same order every time.

Shapes: B rows, T positions, V rows of the table, D model width; N = B * T ids, sorted, in C blocks of S; R runs of
equal ids in a block, at most S.

On a GPU the gradient of `table[ids]` either adds in any order or, where operations have to be deterministic, sorts all
N * D numbers, which takes a third of GPT-2's update. Here only the N ids are sorted. Equal ids then form runs, and the
rows of each run are summed by a product with a matrix of zeros and ones, block by block.
"""

from functools import partial

import jax
import jax.numpy as jnp

BLOCK = 128  # ids


def take_rows(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """`table_VD[ids_BT]`, float32 [B, T, D]."""

    def backward(ids_BT: jax.Array, g_BTD: jax.Array) -> tuple[jax.Array, None]:
        rows_ND, ids_N = g_BTD.reshape(-1, g_BTD.shape[-1]), ids_BT.reshape(-1)
        one_by_one = lambda rows, ids: jnp.zeros(table_VD.shape, rows.dtype).at[ids].add(rows)  # noqa: E731
        sorted_runs = partial(_sum_sorted_runs, size=len(table_VD))
        return jax.lax.platform_dependent(rows_ND, ids_N, cpu=one_by_one, default=sorted_runs), None

    take = jax.custom_vjp(lambda table, ids: table[ids])
    take.defvjp(lambda table, ids: (table[ids], ids), backward)
    return take(table_VD, ids_BT)


def _sum_sorted_runs(rows_ND: jax.Array, ids_N: jax.Array, size: int) -> jax.Array:
    """[size, D]: row i is the sum of the float32 rows whose id is i; ids are int32 from 0 to size - 1."""
    n, d = rows_ND.shape
    ids_N = jnp.pad(ids_N, (0, -n % BLOCK), constant_values=size)  # a last run, which is dropped
    order_N = jnp.argsort(ids_N, stable=True)
    ids_CS = ids_N[order_N].reshape(-1, BLOCK)
    rows_CSD = rows_ND.at[order_N].get(mode="clip").reshape(-1, BLOCK, d)

    starts_CS = jnp.pad(ids_CS[:, 1:] != ids_CS[:, :-1], ((0, 0), (1, 0)))
    run_CS = jnp.cumsum(starts_CS, axis=1, dtype=jnp.int32)
    number_R = jnp.arange(BLOCK, dtype=jnp.int32)
    in_run_CRS = run_CS[:, None, :] == number_R[None, :, None]
    id_CR = jnp.where(in_run_CRS, ids_CS[:, None, :], -1).max(2)  # of each run; -1 where a block has fewer runs
    exact = jax.lax.Precision.HIGHEST
    sum_CRD = jnp.einsum("crs,csd->crd", in_run_CRS.astype(rows_ND.dtype), rows_CSD, precision=exact)

    # A run may span blocks. Add to the first run of a block what earlier blocks, ending with its id, have of it.
    last_C, blocks = run_CS[:, -1], jnp.arange(len(ids_CS))
    continues_CC = (blocks[None, :] < blocks[:, None]) & (ids_CS[None, :, -1] == ids_CS[:, None, 0])
    ends_CD = jnp.take_along_axis(sum_CRD, last_C[:, None, None], axis=1)[:, 0]
    sum_CRD = sum_CRD.at[:, 0].add(jnp.matmul(continues_CC.astype(rows_ND.dtype), ends_CD, precision=exact))
    # Write each run once, from the block where it ends; the others get indices beyond the table and are dropped.
    continues_C = jnp.pad(ids_CS[1:, 0] == ids_CS[:-1, -1], (0, 1))
    complete_CR = (id_CR >= 0) & ~(continues_C[:, None] & (number_R[None] == last_C[:, None]))
    beyond_CR = size + 1 + jnp.arange(id_CR.size, dtype=jnp.int32).reshape(id_CR.shape)
    index_N = jnp.where(complete_CR, id_CR, beyond_CR).reshape(-1)
    table_VD = jnp.zeros((size, d), rows_ND.dtype)
    return table_VD.at[index_N].set(sum_CRD.reshape(-1, d), mode="drop", unique_indices=True)
