"""How this package's kernels are started: Pallas compiles them through Triton for GPUs, and interprets them on CPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl

Outputs = list[tuple[pl.BlockSpec, tuple[int, ...], Any]]  # the part that a program writes, shape and dtype of each


def launch(
    kernel: Callable[..., None],
    arguments: tuple[Any, ...],
    specs: tuple[Any, ...],
    outputs: Outputs,
    *,
    grid: tuple[int, ...],
    warps: int,
    stages: int = 1,
    in_place: bool = False,
    **constants: Any,
) -> list[jax.Array]:
    """The outputs of a kernel, which is called with references to `arguments` and to them, and with the constants.

    Args:
      arguments: arrays or trees of arrays.
      specs: which part of each array a program gets.
      in_place: whether the last argument, an array, becomes the first output.
    """
    from jax.experimental.pallas import triton  # only where a kernel is used: it is deprecated

    def call(arguments: tuple[Any, ...], interpret: bool) -> list[jax.Array]:
        return pl.pallas_call(
            functools.partial(kernel, **constants),
            name=kernel.__name__,
            grid=grid,
            in_specs=specs,
            out_specs=[spec for spec, _, _ in outputs],
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
            input_output_aliases={len(jax.tree.leaves(arguments)) - 1: 0} if in_place else {},
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=interpret,
        )(*arguments)

    interpreted, compiled = (functools.partial(call, interpret=interpret) for interpret in (True, False))
    return jax.lax.platform_dependent(arguments, cpu=interpreted, default=compiled)


def powers_of_two(n: int, largest: int) -> list[tuple[int, int]]:
    """(start, size) of pieces of `n` numbers: the arrays of a Triton kernel have sizes that are powers of two."""
    pieces, start = [], 0
    while start < n:
        size = min(largest, 1 << (n - start).bit_length() - 1)
        pieces.append((start, size))
        start += size
    return pieces
