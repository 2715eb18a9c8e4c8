"""Norms as Pallas kernels for GPUs: a residual is added and normalised in one pass, and so are their gradients made.

Shapes: N vectors, D channels, P programs. XLA makes two passes of the first and three of the second, as a norm needs
sums over a vector before it can go on with it, and the gradients of its parameters need sums over all vectors.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxlm.ops.launch import Outputs, launch, powers_of_two
from jaxlm.ops.matmul import gradient_of_factor, gradient_of_matrix, matmul

LARGEST_WIDTH = 8192  # channels; of more a program would run out of registers
_PER_THREAD = 8  # elements of each array, where 16 warps suffice
# Vectors that a program works on, one after the other. Each loads the parameters, and writes sums of gradients.
FORWARD, BACKWARD = 32, 64

Pieces = list[tuple[int, int]]  # start and size


class Terms(NamedTuple):
    """What is added up and then normalised, [N, D] and [D]."""

    x: Any
    update: Any = None
    bias: Any = None  # of the update


class Factors(NamedTuple):
    """A norm's parameters, float32 [D]."""

    scale: Any = None
    bias: Any = None


class Saved(NamedTuple):
    """What the backward pass needs."""

    total: Any  # the sum of the terms, [N, D]
    mean: Any  # float32 [N]; None: RMSNorm
    inverse: Any  # of the standard deviation, float32 [N]


Kept = tuple[Saved, Terms, Factors]  # for the backward pass; of the terms the bias, and which of the others there are


class Gradients(NamedTuple):
    """What comes in, [N, D]."""

    y: Any
    total: Any = None  # of the sum, where it is used beside the norm


def _warps(d: int) -> int:
    return min(16, max(1, pl.next_power_of_2(d) // (32 * _PER_THREAD)))


def _row(ref: Any, pieces: Pieces) -> list[jax.Array] | None:
    return None if ref is None else [ref[pl.ds(*piece)].astype(jnp.float32) for piece in pieces]


def _vector(ref: Any, i: jax.Array, pieces: Pieces) -> list[jax.Array]:
    return [ref[i, pl.ds(*piece)].astype(jnp.float32) for piece in pieces]


def _each(f: Callable[..., jax.Array], *vectors: list[jax.Array]) -> list[jax.Array]:
    return [f(*parts) for parts in zip(*vectors, strict=True)]


def _scaled(unit: list[jax.Array], scale: list[jax.Array] | None, bias: list[jax.Array] | None) -> list[jax.Array]:
    y = unit if scale is None else _each(operator.mul, unit, scale)
    return y if bias is None else _each(operator.add, y, bias)


def _vectors_of_program(n: int, each: int) -> tuple[jax.Array, jax.Array]:
    first = pl.program_id(0) * each
    return first, jnp.minimum(first + each, n)


def norm_forward_kernel(terms: Terms, factors: Factors, *refs: jax.Ref, epsilon: float, centred: bool) -> None:
    """Writes the norms of sums, 1 / their standard deviations, their means if `centred`; the sums, of several terms."""
    y_ref, inverse_ref, *others = refs
    n, d = terms.x.shape
    pieces = powers_of_two(d, LARGEST_WIDTH)
    of_update, scale, bias = (_row(ref, pieces) for ref in (terms.bias, *factors))

    def normalise_vector(i: jax.Array, _: None) -> None:
        total = _vector(terms.x, i, pieces)
        if terms.update is not None:
            total = _each(operator.add, total, _vector(terms.update, i, pieces))
        if of_update is not None:
            total = _each(operator.add, total, of_update)
        stored = [x.astype(y_ref.dtype) for x in total]
        total = [x.astype(jnp.float32) for x in stored]
        if centred:
            mean = sum(x.sum() for x in total) / d
            total = [x - mean for x in total]
            others[0][i] = mean
        inverse = jax.lax.rsqrt(sum((x * x).sum() for x in total) / d + epsilon)
        inverse_ref[i] = inverse
        y = _scaled([x * inverse for x in total], scale, bias)
        for piece, part, kept in zip(pieces, y, stored, strict=True):
            y_ref[i, pl.ds(*piece)] = part.astype(y_ref.dtype)
            if terms.update is not None:
                others[-1][i, pl.ds(*piece)] = kept

    jax.lax.fori_loop(*_vectors_of_program(n, FORWARD), normalise_vector, None)


def norm_backward_kernel(
    saved: Saved,
    gradients: Gradients,
    factors: Factors,
    dx_ref: jax.Ref,
    *refs: jax.Ref,
    which: tuple[bool, ...],
    again: bool,
) -> None:
    """Writes the gradients of the sums of the terms of some vectors, the norms `again`, and sums over the vectors.

    Args:
      which: of the sums, [D]: of the gradient of the norm's scale, of its bias, of the sum of the terms.
    """
    n, d = saved.total.shape
    pieces = powers_of_two(d, LARGEST_WIDTH)
    scale, bias = (_row(ref, pieces) for ref in factors)

    def add_vector(i: jax.Array, sums: list[list[jax.Array]]) -> list[list[jax.Array]]:
        inverse, mean = saved.inverse[i], 0.0 if saved.mean is None else saved.mean[i]
        unit = [(x - mean) * inverse for x in _vector(saved.total, i, pieces)]
        g = _vector(gradients.y, i, pieces)
        slope = g if scale is None else _each(operator.mul, g, scale)
        along = sum(x.sum() for x in _each(operator.mul, slope, unit)) / d
        level = 0.0 if saved.mean is None else sum(x.sum() for x in slope) / d
        dx = [(x - y * along - level) * inverse for x, y in zip(slope, unit, strict=True)]
        if gradients.total is not None:
            dx = _each(operator.add, dx, _vector(gradients.total, i, pieces))
        stored = [x.astype(dx_ref.dtype) for x in dx]
        for piece, part in zip(pieces, stored, strict=True):
            dx_ref[i, pl.ds(*piece)] = part
        if again:
            for piece, part in zip(pieces, _scaled(unit, scale, bias), strict=True):
                refs[0][i, pl.ds(*piece)] = part.astype(dx_ref.dtype)
        terms = _each(operator.mul, g, unit), g, [x.astype(jnp.float32) for x in stored]
        asked = [x for x, wanted in zip(terms, which, strict=True) if wanted]
        return [_each(operator.add, x, y) for x, y in zip(sums, asked, strict=True)]

    zeros = [[jnp.zeros((size,), jnp.float32) for _, size in pieces]] * sum(which)
    sums = jax.lax.fori_loop(*_vectors_of_program(n, BACKWARD), add_vector, zeros)
    for ref, parts in zip(refs[again:], sums, strict=True):
        for piece, part in zip(pieces, parts, strict=True):
            ref[pl.ds(*piece)] = part


def _whole(x: Any) -> Any:
    """Specs that give every program all of the arrays."""
    return jax.tree.map(lambda y: pl.BlockSpec(y.shape, lambda i: (0,) * y.ndim), x)


def _forward(
    terms: Terms, factors: Factors, epsilon: float, centred: bool, goes_on: bool
) -> tuple[tuple[jax.Array, jax.Array], Kept]:
    x, update, bias = terms
    shape, dtype, d = x.shape, x.dtype, x.shape[-1]
    terms = Terms(x.reshape(-1, d), None if update is None else update.reshape(-1, d), bias)
    n = len(terms.x)
    vectors: Outputs = [(pl.BlockSpec((n, d), lambda i: (0, 0)), (n, d), dtype)]
    numbers: Outputs = [(pl.BlockSpec((n,), lambda i: (0,)), (n,), jnp.float32)]
    y, inverse, *others = launch(
        norm_forward_kernel,
        (terms, factors),
        (_whole(terms), _whole(factors)),
        vectors + numbers * (1 + centred) + vectors * (update is not None),
        grid=(pl.cdiv(n, FORWARD),),
        warps=_warps(d),
        epsilon=epsilon,
        centred=centred,
    )
    saved = Saved(terms.x if update is None else others[-1], others[0] if centred else None, inverse)
    given = Terms((), None if update is None else (), bias)
    return (saved.total.reshape(shape), y.reshape(shape)), (saved, given, factors)


def _gradients(
    kept: Kept, g_BTD: jax.Array | None, gy_BTD: jax.Array, *, again: bool
) -> tuple[Terms, Factors, jax.Array | None]:
    """Of the terms and of the factors, from those of the sum and of the norm; and the norm `again`, [N, D]."""
    saved, given, factors = kept
    n, d = saved.total.shape
    gradients = Gradients(gy_BTD.reshape(n, d), None if g_BTD is None else g_BTD.reshape(n, d))
    programs, which = pl.cdiv(n, BACKWARD), tuple(x is not None for x in (*factors, given.bias))
    vectors: Outputs = [(pl.BlockSpec((n, d), lambda i: (0, 0)), (n, d), saved.total.dtype)]
    sums: Outputs = [(pl.BlockSpec((None, d), lambda i: (i, 0)), (programs, d), jnp.float32)]
    arguments = saved, gradients, factors if again else factors._replace(bias=None)
    dx, *others = launch(
        norm_backward_kernel,
        arguments,
        _whole(arguments),
        vectors * (1 + again) + sums * sum(which),
        grid=(programs,),
        warps=_warps(d),
        which=which,
        again=again,
    )
    y = others.pop(0) if again else None
    dscale, dbias, of_update = (others.pop(0).sum(0) if asked else None for asked in which)
    dx = dx.reshape(gy_BTD.shape)
    terms = Terms(dx, None if given.update is None else dx, None if of_update is None else of_update.astype(dx.dtype))
    return terms, Factors(dscale, dbias), y


def _backward(
    epsilon: float, centred: bool, goes_on: bool, kept: Kept, g: tuple[jax.Array, jax.Array]
) -> tuple[Terms, Factors]:
    return _gradients(kept, g[0] if goes_on else None, g[1], again=False)[:2]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def normalise_by_kernels(
    terms: Terms, factors: Factors, epsilon: float, centred: bool, goes_on: bool
) -> tuple[jax.Array, jax.Array]:
    """`norms.normalise_sum`."""
    return _forward(terms, factors, epsilon, centred, goes_on)[0]


normalise_by_kernels.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def multiply_norm(
    terms: Terms, factors: Factors, w_DO: jax.Array, epsilon: float, centred: bool
) -> tuple[jax.Array, jax.Array]:
    """The sum of the terms, [B, T, D], and the product of its norm and w, [B, T, O].

    The norm isn't kept for the gradient of w: the kernel that makes the norm's gradient writes it once more.
    """
    return _product_forward(terms, factors, w_DO, epsilon, centred)[0]


def _product_forward(terms: Terms, factors: Factors, w_DO: jax.Array, epsilon: float, centred: bool) -> Any:
    (total_BTD, y_BTD), kept = _forward(terms, factors, epsilon, centred, True)
    return (total_BTD, matmul(y_BTD, w_DO)), (kept, w_DO)


def _product_backward(epsilon: float, centred: bool, kept: Any, g: tuple[jax.Array, jax.Array]) -> Any:
    (kept, w_DO), (g_BTD, g_BTO) = kept, g
    terms, factors, y_ND = _gradients(kept, g_BTD, gradient_of_factor(g_BTO, w_DO), again=True)
    assert y_ND is not None
    dw_DO = gradient_of_matrix(y_ND.reshape(g_BTD.shape), g_BTO)
    terms, dw_DO = jax.lax.optimization_barrier((terms, dw_DO))  # or dw is left to the end, and y kept till then
    return terms, factors, dw_DO


multiply_norm.defvjp(_product_forward, _product_backward)
