"""Matrix products, summed in float32. The two factors always have the same dtype.

Shapes: B rows, T positions; I and O, the input and output axes of a linear layer (O may be two axes).

XLA for CPUs has slow paths that are avoided here: it multiplies bfloat16 that the CPU has no instructions for 1.5 times
as slowly as float32, writes 16-bit results 1.6 times as slowly as float32 ones, and merges a transposition into a
product, for which it has no 16-bit implementation and a slow one in float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.ops.platform import cpu_has_bfloat16


def einsum(spec: str, x: jax.Array, y: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """`jnp.einsum` with the result in `dtype`, by default that of `x`."""
    default = partial(jnp.einsum, spec, preferred_element_type=dtype)
    return jax.lax.platform_dependent(x, y, cpu=partial(_einsum_on_cpu, spec, dtype=dtype), default=default)


def _einsum_on_cpu(spec: str, x: jax.Array, y: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    if "bh" in spec:  # rows and heads are flattened, by which XLA leaves transpositions before the product alone
        flat_x, flat_y = (z.reshape(-1, *z.shape[2:]) for z in (x, y))
        z = _einsum_on_cpu(spec.replace("bh", "b"), flat_x, flat_y, dtype)
        return z.reshape(*x.shape[:2], *z.shape[1:])
    dtype = x.dtype if dtype is None else dtype
    if x.dtype == jnp.bfloat16 and not (cpu_has_bfloat16() and _batch_leads(spec)):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)  # exact
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(dtype)


def _batch_leads(spec: str) -> bool:
    """Whether the axes that both factors and the result have are the first of both factors.

    Of others XLA has no product of bfloat16 in float32: it compiles, and running it fails (jaxlib 0.10.2, AMX).
    """
    factors, result = spec.split("->")
    one, other = factors.split(",")
    shared = {*one} & {*other} & {*result}
    return shared == {*one[: len(shared)]} == {*other[: len(shared)]}


def transpose_product(x: jax.Array) -> jax.Array:
    """The result of a product, with its last axis moved to the front after the product is complete."""
    return jnp.moveaxis(jax.lax.optimization_barrier(x), -1, 0)


@jax.custom_vjp
def matmul(x_BTI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """x @ w, [B, T, O]; the gradients have the same dtype."""
    o = "no"[1 - w_IO.ndim :]
    return einsum(f"bti,i{o}->bt{o}", x_BTI, w_IO)


def gradient_of_factor(g_BTO: jax.Array, w_IO: jax.Array) -> jax.Array:
    """The gradient of x, [B, T, I], in x @ w, from that of the product; on GPUs."""
    o = "no"[1 - w_IO.ndim :]
    return jnp.einsum(f"bt{o},i{o}->bti", g_BTO, w_IO)


def gradient_of_matrix(x_BTI: jax.Array, g_BTO: jax.Array) -> jax.Array:
    """The gradient of w, [I, O], in x @ w, from that of the product; on GPUs."""
    o = "no"[2 - g_BTO.ndim :]
    return jnp.einsum(f"bti,bt{o}->i{o}", x_BTI, g_BTO)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], g_BTO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTI, w_IO = saved
    o = "no"[1 - w_IO.ndim :]

    def narrow_first(x: jax.Array, g: jax.Array) -> jax.Array:
        """XLA transposes the first factor, which should be the smaller one."""
        if x[0, 0].size <= g[0, 0].size:
            return _einsum_on_cpu(f"bti,bt{o}->i{o}", x, g)
        return transpose_product(_einsum_on_cpu(f"bt{o},bti->{o}i", g, x))

    def on_cpu(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _einsum_on_cpu(f"bt{o},i{o}->bti", g, w), narrow_first(x, g)

    def on_gpu(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both at once: XLA would leave the weights' gradients to the end, and keep what they are made of till then."""
        return jax.lax.optimization_barrier((gradient_of_factor(g, w), gradient_of_matrix(x, g)))

    return jax.lax.platform_dependent(x_BTI, w_IO, g_BTO, cpu=on_cpu, default=on_gpu)


matmul.defvjp(lambda x, w: (matmul(x, w), (x, w)), _matmul_backward)


def as_stored(x: jax.Array) -> jax.Array:
    """x, rounded to its dtype wherever it is used: XLA would keep it in float32 for some uses, and write it twice."""
    limits = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, limits.nexp, limits.nmant)


@jax.custom_vjp
def add_bias(x_BTO: jax.Array, bias_O: jax.Array) -> jax.Array:
    """x + bias. The gradient of the bias is a sum that the kernel which makes that of x can do beside it."""
    return x_BTO + bias_O[None, None]


def _add_bias_backward(_: None, g_BTO: jax.Array) -> tuple[jax.Array, jax.Array]:
    # On a CPU rounding would be a pass of its own.
    g_BTO = jax.lax.platform_dependent(g_BTO, cpu=lambda g: g, default=as_stored)
    return g_BTO, g_BTO.sum((0, 1), dtype=jnp.float32).astype(g_BTO.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), _add_bias_backward)
