"""Rows of an embedding table, with a gradient that is the same every time.

Shapes: B rows, T positions, V rows of the table, D model width; N = B * T ids, in C blocks of S; R runs of equal ids in
a block, at most S.

On a GPU the gradient of `table[ids]` either adds in any order, or, if operations have to repeat bit for bit, goes
through a sort of all its N * D numbers, which takes a third of GPT-2's update. Here the N ids alone are sorted: equal
ones come to lie in runs, and the rows of a run are added up by a product with a matrix of zeros and ones, block by
block.
"""

import functools

import jax
import jax.numpy as jnp

BLOCK = 128  # ids


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table_VD: jax.Array, ids_BT: jax.Array, size: int) -> jax.Array:
    return table_VD[ids_BT]


def _lookup_backward(size: int, ids_BT: jax.Array, g_BTD: jax.Array) -> tuple[jax.Array, None]:
    """The sum over the positions of each id; [V, D] for V = `size`."""
    rows_ND, ids_N = g_BTD.reshape(-1, g_BTD.shape[-1]), ids_BT.reshape(-1)

    def one_by_one(rows_ND: jax.Array, ids_N: jax.Array) -> jax.Array:
        return jnp.zeros((size, rows_ND.shape[1]), rows_ND.dtype).at[ids_N].add(rows_ND)

    in_runs = functools.partial(sum_in_runs, size=size)
    return jax.lax.platform_dependent(rows_ND, ids_N, cpu=one_by_one, default=in_runs), None


_lookup.defvjp(lambda table, ids, size: (_lookup(table, ids, size), ids), _lookup_backward)


def lookup(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """`table_VD[ids_BT]`, float32 [B, T, D]."""
    return _lookup(table_VD, ids_BT, table_VD.shape[0])


def sum_in_runs(rows_ND: jax.Array, ids_N: jax.Array, size: int) -> jax.Array:
    """[size, D]: row i is the sum of the rows whose id is i, always added in the same order.

    Args:
      rows_ND: float32.
      ids_N: int32, from 0 to size - 1.
    """
    n, d = rows_ND.shape
    ids_N = jnp.pad(ids_N, (0, -n % BLOCK), constant_values=size)  # a last run, that is dropped
    order_N = jnp.argsort(ids_N, stable=True)
    ids_CS = ids_N[order_N].reshape(-1, BLOCK)
    rows_CSD = rows_ND.at[order_N].get(mode="clip").reshape(-1, BLOCK, d)

    begins_CS = jnp.pad(ids_CS[:, 1:] != ids_CS[:, :-1], ((0, 0), (1, 0)))
    run_CS = jnp.cumsum(begins_CS, axis=1, dtype=jnp.int32)
    number_R = jnp.arange(BLOCK, dtype=jnp.int32)
    in_run_CRS = run_CS[:, None, :] == number_R[None, :, None]
    id_CR = jnp.where(in_run_CRS, ids_CS[:, None, :], -1).max(2)  # of the run; -1 behind the last one
    exact = jax.lax.Precision.HIGHEST
    sum_CRD = jnp.einsum("crs,csd->crd", in_run_CRS.astype(rows_ND.dtype), rows_CSD, precision=exact)

    # The ids are sorted: blocks before this one that end with the id it begins with are parts of one run.
    last_C, blocks = run_CS[:, -1], jnp.arange(len(ids_CS))
    goes_on_CC = (blocks[None, :] < blocks[:, None]) & (ids_CS[None, :, -1] == ids_CS[:, None, 0])
    ends_CD = jnp.take_along_axis(sum_CRD, last_C[:, None, None], axis=1)[:, 0]
    sum_CRD = sum_CRD.at[:, 0].add(jnp.matmul(goes_on_CC.astype(rows_ND.dtype), ends_CD, precision=exact))
    goes_on_C = jnp.pad(ids_CS[1:, 0] == ids_CS[:-1, -1], (0, 1))
    whole_CR = (id_CR >= 0) & ~(goes_on_C[:, None] & (number_R[None] == last_C[:, None]))
    nowhere_CR = size + 1 + jnp.arange(id_CR.size, dtype=jnp.int32).reshape(id_CR.shape)
    at_CR = jnp.where(whole_CR, id_CR, nowhere_CR)
    return (
        jnp.zeros((size, d), rows_ND.dtype)
        .at[at_CR.reshape(-1)]
        .set(sum_CRD.reshape(-1, d), mode="drop", unique_indices=True)
    )
