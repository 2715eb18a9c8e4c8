"""Normalisation over the last axis, with a backward pass that keeps little and reads little.

Shapes: N vectors (any number of axes), D channels. Statistics and sums are float32.

`normalise` is plain JAX. `normalise_sum` adds up what is normalised, too, on GPUs by this package's kernels.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxlm.ops.matmul import add_bias
from jaxlm.ops.norm_kernels import Factors, Terms, normalise_by_kernels
from jaxlm.ops.reductions import per_token

Saved = tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise(
    x_ND: jax.Array, scale_D: jax.Array | None, bias_D: jax.Array | None, epsilon: float, centred: bool
) -> jax.Array:
    """LayerNorm if `centred` (Ba et al. 2016, arXiv:1607.06450), else RMSNorm (arXiv:1910.07467), in the dtype of x.

    The backward pass keeps `x_ND` and two numbers a vector; XLA left alone keeps float32 copies.
    """
    return _forward(x_ND, scale_D, bias_D, epsilon, centred)[0]


def _forward(
    x_ND: jax.Array, scale_D: jax.Array | None, bias_D: jax.Array | None, epsilon: float, centred: bool
) -> tuple[jax.Array, Saved]:
    wide_ND = x_ND.astype(jnp.float32)
    mean_N1 = wide_ND.mean(-1, keepdims=True) if centred else None
    centred_ND = wide_ND if mean_N1 is None else wide_ND - mean_N1  # squares less the mean's cancel where it is large
    inverse_N1 = jax.lax.rsqrt((centred_ND * centred_ND).mean(-1, keepdims=True) + epsilon)
    y_ND = _scaled(_unit(wide_ND, mean_N1, inverse_N1), scale_D)
    if bias_D is not None:
        y_ND = y_ND + _row(bias_D, x_ND)
    return y_ND.astype(x_ND.dtype), (x_ND, scale_D, bias_D, mean_N1, inverse_N1)


def _row(x_D: jax.Array, like_ND: jax.Array) -> jax.Array:
    return x_D.reshape((1,) * (like_ND.ndim - 1) + x_D.shape)


def _scaled(x_ND: jax.Array, scale_D: jax.Array | None) -> jax.Array:
    return x_ND if scale_D is None else x_ND * _row(scale_D, x_ND)


def _unit(wide_ND: jax.Array, mean_N1: jax.Array | None, inverse_N1: jax.Array) -> jax.Array:
    return (wide_ND if mean_N1 is None else wide_ND - mean_N1) * inverse_N1


def _backward(
    epsilon: float, centred: bool, saved: Saved, g_ND: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    x_ND, scale_D, bias_D, mean_N1, inverse_N1 = saved
    x_ND, g_ND = jax.lax.optimization_barrier((x_ND, g_ND))  # or XLA finds float32 results of before and keeps them
    unit_ND = _unit(x_ND.astype(jnp.float32), mean_N1, inverse_N1)
    wide_ND = g_ND.astype(jnp.float32)
    slope_ND = _scaled(wide_ND, scale_D)
    dx_ND = slope_ND - unit_ND * (slope_ND * unit_ND).mean(-1, keepdims=True)
    if centred:
        dx_ND = dx_ND - slope_ND.mean(-1, keepdims=True)
    vectors = tuple(range(x_ND.ndim - 1))
    dscale_D = None if scale_D is None else (wide_ND * unit_ND).sum(vectors)
    dbias_D = None if bias_D is None else wide_ND.sum(vectors)
    return (dx_ND * inverse_N1).astype(x_ND.dtype), dscale_D, dbias_D


normalise.defvjp(_forward, _backward)


def added(terms: Terms) -> jax.Array:
    """The sum of the terms, [B, T, D]."""
    if terms.update is None:
        return terms.x
    return terms.x + (terms.update if terms.bias is None else add_bias(terms.update, terms.bias))


def normalise_sum(
    terms: Terms, factors: Factors, epsilon: float, centred: bool, *, by_kernels: bool, goes_on: bool = True
) -> tuple[jax.Array, jax.Array]:
    """The sum of the terms, [B, T, D], and `normalise` of it.

    Args:
      by_kernels: whether by norm_kernels.py, which needs a GPU.
      goes_on: whether the sum is used for something else, too; if not, its gradient isn't looked at.
    """
    if by_kernels:
        return normalise_by_kernels(terms, factors, epsilon, centred, goes_on)
    x_BTD = added(terms)
    return x_BTD, per_token(lambda x_ND: normalise(x_ND, *factors, epsilon, centred), x_BTD)
