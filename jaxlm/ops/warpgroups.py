"""How a program of Hopper's GPUs is divided, in Pallas' Mosaic dialect: two warpgroups compute, the third copies.

Shapes: 64 rows of a warpgroup's tile, K channels.

The third copies the blocks that both of the others read into `STAGES` buffers in turn: a block is `ready` when its
copies have arrived, and its buffer `free` when both have read it.

What is interpreted differs in one thing: JAX's interpreter multiplies from shared memory alone, so that a `spare`
buffer takes what a GPU multiplies from registers.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

Ref = Any  # jax.Ref's type knows neither transposed references nor those to barriers and accumulators
GROUPS, ROWS = 2, 64  # warpgroups that compute; rows of a product of Hopper's tensor cores
STAGES = 2


class Scratch(NamedTuple):
    """A program's shared memory and barriers; the first axis of each is of warpgroups or of stages."""

    own: tuple[Ref, ...]  # [2, 64, K] or [2, 64]: what a warpgroup reads, and then writes
    arrived: Ref
    blocks: tuple[Ref, ...]  # [STAGES, columns, K] or [STAGES, columns]
    ready: Ref
    free: Ref
    spare: Ref | None = None  # [2, 64, columns]


def divide(
    compute: Callable[[jax.Array], None],
    copies: Callable[[jax.Array], list[Ref]],
    first: jax.Array | int,
    end: jax.Array | int,
    scratch: Scratch,
) -> None:
    """Two warpgroups `compute`, while the third copies what `copies` names for each step from `first` to `end`."""
    group = lax.axis_index("group")

    def feed(step: jax.Array, _: None) -> None:
        slot = lax.rem(step - first, STAGES)

        @pl.when(step - first >= STAGES)
        def wait() -> None:
            mosaic.barrier_wait(scratch.free.at[slot])

        @pl.when(step < end)
        def copy() -> None:
            for source, buffer in zip(copies(step), scratch.blocks, strict=True):
                mosaic.copy_gmem_to_smem(source, buffer.at[slot], scratch.ready.at[slot])

    @pl.when(group < GROUPS)
    def work() -> None:
        mosaic.set_max_registers(240, action="increase")
        compute(group)

    @pl.when(group == GROUPS)
    def copy_blocks() -> None:
        mosaic.set_max_registers(24, action="decrease")
        lax.fori_loop(first, end + STAGES, feed, None)


def over(first: jax.Array | int, end: jax.Array | int, add: Callable[..., Any], carry: Any, scratch: Scratch) -> Any:
    """`add(step, blocks, carry)` for each step, with what has been copied for it."""

    def step(i: jax.Array, carry: Any) -> Any:
        slot = lax.rem(i - first, STAGES)
        mosaic.barrier_wait(scratch.ready.at[slot])
        carry = add(i, [buffer.at[slot] for buffer in scratch.blocks], carry)
        mosaic.barrier_arrive(scratch.free.at[slot])
        return carry

    return lax.fori_loop(first, end, step, carry)


def fetch(sources: Iterable[Ref], group: jax.Array, scratch: Scratch) -> list[Ref]:
    """A warpgroup's own buffers, the first of them filled."""
    own = [buffer.at[group] for buffer in scratch.own]
    for source, buffer in zip(sources, own, strict=False):
        mosaic.copy_gmem_to_smem(source, buffer, scratch.arrived.at[group])
    mosaic.barrier_wait(scratch.arrived.at[group])
    return own


def write(values: Iterable[jax.Array], buffers: Sequence[Ref], targets: Sequence[Ref]) -> None:
    """Copies buffers in shared memory to their targets, the first of them with these values."""
    for value, buffer in zip(values, buffers, strict=False):
        buffer[...] = value.astype(buffer.dtype)
    mosaic.commit_smem()
    for buffer, target in zip(buffers, targets, strict=True):
        mosaic.copy_smem_to_gmem(buffer, target)
    mosaic.wait_smem_to_gmem(0)


def product(x: jax.Array | Ref, y: Ref) -> jax.Array:
    """x @ y, [64, columns] float32."""

    def multiply(total: Ref) -> jax.Array:
        mosaic.wgmma(total, x, y)
        return total[...]

    return pl.run_scoped(multiply, sums(x.shape[0], y.shape[1]))


def sums(rows: int, columns: int) -> Any:
    """The type of a reference to registers that products are added up in."""
    return mosaic.ACC((rows, columns), jnp.float32)


def rounded(weights: jax.Array, dtype: Any, spare: Ref | None, group: jax.Array) -> jax.Array | Ref:
    """Weights as the left factor of a product with an array of this dtype."""
    factor = weights.astype(dtype)
    if spare is None:
        return factor
    spare.at[group][...] = factor
    mosaic.commit_smem()
    return spare.at[group]
