"""Causal attention for Hopper's GPUs (compute capability 9.0), in Pallas kernels of Mosaic's dialect, from JAX 0.11 on.

Shapes: B rows, T positions, H query heads, G heads of keys and values, K channels of a head.

It computes what flash.py does, by the same method, and stands beside it because JAX means to remove the way by which
those kernels compile. Products are those of whole warpgroups, and blocks come by bulk copies (hopper_kernels.py).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as mosaic

from jaxlm.ops.flash import bounds, kernel_key, limits, on_each_device, pad
from jaxlm.ops.flash_kernels import HOPPER_TILES, Inputs
from jaxlm.ops.hopper_kernels import AXES, forward_kernel, keys_kernel, queries_kernel
from jaxlm.ops.warpgroups import GROUPS, ROWS, STAGES, Scratch

BLOCK = GROUPS * ROWS  # queries, or keys, of a program; rows are padded to a multiple of it
INTERPRETER: Any = None  # mosaic.InterpretGPUParams(): the kernels run on CPU, slowly, for tests
SWIZZLED = 64  # channels of 16 bits that a swizzled tile of shared memory has; heads are padded to a multiple of it


class Constants(NamedTuple):
    """What is compiled into the kernels."""

    scale: float  # of the scores
    rate: float  # of dropout


class Sizes(NamedTuple):
    """What a kernel works on, and the shared memory that it takes for that."""

    heads: int  # of queries, or of keys
    own: tuple[int, int]  # how many tiles [64, K] and how many vectors [64] a warpgroup has for itself
    blocks: tuple[int, int]  # the same for the blocks that are copied while others are read
    columns: int  # positions of such a block


def hopper_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, key: jax.Array | None, rate: float
) -> jax.Array:
    """`attention_kernels.causal_attention`, [B, T, H, K], of 16 bits and of K up to 128."""
    x = Inputs(q, k, v, segments=segments, key=key)
    return on_each_device(x, functools.partial(_attend, rate=rate))


def hopper_attention_of_product(
    qkv: jax.Array, bias: jax.Array | None, segments: jax.Array | None, key: jax.Array | None, rate: float
) -> jax.Array:
    """`hopper_attention` of the parts of qkv + bias; qkv [B, T, 3, H, K], bias [3, H, K]."""
    x = Inputs(qkv, bias=bias, segments=segments, key=key)
    return on_each_device(x, functools.partial(_attend, rate=rate))


def _attend(x: Inputs, first_head: jax.Array | int, rate: float) -> jax.Array:
    t, size = x.q.shape[1], x.q.shape[-1]
    rate = 0.0 if x.key is None else rate
    x = x._replace(key=kernel_key(x.key, first_head) if rate else None)
    padded = pad(x, BLOCK, -(-size // SWIZZLED) * SWIZZLED)
    return _flash(padded, Constants(size**-0.5, rate))[:, :t, :, :size]


def _launch(
    kernel: Callable[..., None],
    constants: Constants,
    x: Inputs,
    outputs: list[jax.ShapeDtypeStruct],
    sizes: Sizes,
    into: jax.Ref | None = None,
) -> list[jax.Array]:
    """The outputs of a kernel that runs for each head, block of `BLOCK` positions and row of the batch.

    Args:
      into: an array before them, of which the kernel writes a part.
    """
    (rows, length), width, dtype = x.q.shape[:2], x.q.shape[-1], x.q.dtype
    tiles = mosaic.TilingTransform((8, SWIZZLED)), mosaic.SwizzleTransform(2 * SWIZZLED)

    def buffers(first: int, positions: int, count: tuple[int, int]) -> tuple[Any, ...]:
        tile = mosaic.SMEM((first, positions, width), dtype, transforms=tiles)
        return (tile,) * count[0] + (mosaic.SMEM((first, positions), jnp.float32),) * count[1]

    scratch: Any = Scratch(
        buffers(GROUPS, ROWS, sizes.own),
        mosaic.Barrier(num_arrivals=sizes.own[0], num_barriers=GROUPS),
        buffers(STAGES, sizes.columns, sizes.blocks),
        mosaic.Barrier(num_arrivals=sum(sizes.blocks), num_barriers=STAGES),
        mosaic.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
        mosaic.SMEM((GROUPS, ROWS, sizes.columns), dtype, transforms=tiles) if INTERPRETER else None,
    )
    return mosaic.kernel(
        functools.partial(kernel, **constants._asdict()),
        out_type=outputs,
        kernel_name=kernel.__name__,
        scratch_types=[scratch],
        compiler_params=mosaic.CompilerParams(approx_math=True),
        grid=(sizes.heads, length // BLOCK, rows),
        grid_names=AXES,
        num_threads=GROUPS + 1,
        thread_name="group",
        interpret=INTERPRETER,
    )(x, *(() if into is None else (into,)))


def _seen(x: Inputs, columns: int, of_keys: bool = False) -> Inputs:
    """With what of other positions each one and each block sees, or is seen by; without segments."""
    if x.segments is None:
        return x
    found = bounds(x.segments, of_keys)
    sizes = (columns, BLOCK) if of_keys else (BLOCK, columns)
    return x._replace(segments=None, bounds=found, limits=limits(found, *sizes, of_keys))


def _of_queries(x: Inputs) -> list[jax.ShapeDtypeStruct]:
    """A vector for each query, [B, T, H, K], and a number, float32 [B, H, T]."""
    b, t, *_, h, width = x.q.shape
    return [jax.ShapeDtypeStruct((b, t, h, width), x.q.dtype), jax.ShapeDtypeStruct((b, h, t), jnp.float32)]


def forward(x: Inputs, constants: Constants) -> tuple[jax.Array, Inputs]:
    """The output [B, T, H, K], and what the backward pass needs."""
    sizes = Sizes(x.q.shape[-2], own=(1, 1), blocks=(2, 0), columns=HOPPER_TILES.forward.keys)
    out, lse = _launch(forward_kernel, constants, _seen(x, sizes.columns), _of_queries(x), sizes)
    return out, x._replace(out=out, lse=lse)


def query_gradients(x: Inputs, constants: Constants, into: jax.Ref | None) -> tuple[list[jax.Array], Inputs]:
    """Of x with `g`: the gradient of q, or none if it is written `into` that of a product; x for `key_gradients`."""
    vector, number = _of_queries(x)
    outputs = [*([vector] if into is None else []), number, *([] if x.bias is None else [vector])]
    sizes = Sizes(x.q.shape[-2], own=(3, 1), blocks=(2, 0), columns=HOPPER_TILES.queries.keys)
    found = _launch(queries_kernel, constants, _seen(x, sizes.columns), outputs, sizes, into)
    biased = None if x.bias is None else found.pop()
    return found[:-1], x._replace(out=None, delta=found[-1], biased=biased)


def key_gradients(x: Inputs, constants: Constants, into: jax.Ref | None) -> list[jax.Array]:
    """The gradients of k and v, or none if they are written `into` that of a product."""
    keys = x.q if x.k is None else x.k
    outputs = [] if into is not None else [jax.ShapeDtypeStruct(keys.shape, keys.dtype)] * 2
    sizes = Sizes(keys.shape[-2], own=(2, 0), blocks=(2, 2), columns=HOPPER_TILES.keys_and_values.queries)
    return _launch(keys_kernel, constants, _seen(x, sizes.columns, of_keys=True), outputs, sizes, into)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _flash(x: Inputs, constants: Constants) -> jax.Array:
    return forward(x, constants)[0]


@functools.partial(jax.jit, static_argnums=0)  # outside of one, JAX 0.11 makes no `empty_ref`
def _backward(constants: Constants, x: Inputs, g: jax.Array) -> tuple[Inputs]:
    into = None if x.k is not None else jax.empty_ref(jax.ShapeDtypeStruct(x.q.shape, x.q.dtype))
    dq, x = query_gradients(x._replace(g=g), constants, into)
    dk_and_dv = key_gradients(x, constants, into)
    if into is None:
        return (Inputs(*dq, *dk_and_dv),)
    dqkv = jax.freeze(into)
    if x.bias is None:
        return (Inputs(dqkv),)
    bias = dqkv.astype(jnp.float32).sum((0, 1)).at[1].set(0)  # a bias of the keys changes no weight
    return (Inputs(dqkv, bias=bias.astype(x.bias.dtype)),)


_flash.defvjp(forward, _backward)
