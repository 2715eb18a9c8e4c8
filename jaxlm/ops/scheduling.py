"""What XLA does not schedule well by itself: work that can run in parallel, and results to compute again."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

# One operation doesn't keep all cores of a CPU busy: the rows are split into up to CPU_PARTS equal parts, of at least
# CPU_PART_TOKENS tokens each, which run at the same time.
CPU_PARTS, CPU_PART_TOKENS = 4, 1024

Params = Any  # a tree of arrays
Batch = dict[str, jax.Array]
Sums = TypeVar("Sums")
Carry = TypeVar("Carry")


def scan_micro_batches(
    add: Callable[[Carry, Batch], tuple[Carry, None]], carry: Carry, batch: Batch, platform: str
) -> Carry:
    """What `add` makes of `carry` with each of the micro-batches of `batch` ([K, ...] arrays) in turn.

    XLA on CPU reads a micro-batch within the loops that it is for, such as those of attention's softmax. Where it reads
    from changes with each; from three on that keeps LLVM from using vectors in these loops, which takes ten times as
    long. So there each comes to the first place in its turn.
    """
    if platform != "cpu":
        return jax.lax.scan(add, carry, batch)[0]

    def add_first(carry_and_batch: tuple[Carry, Batch], _: None) -> tuple[tuple[Carry, Batch], None]:
        carry, batch = carry_and_batch
        carry, _ = add(carry, jax.tree.map(lambda x: x[0], batch))
        return (carry, jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), batch)), None

    return jax.lax.scan(add_first, (carry, batch), length=len(batch["rows"]))[0][0]


def sum_over_rows(
    sums_of: Callable[[Params, Batch], Sums], params: Params, batch: Batch, platform: str, devices: int
) -> Sums:
    """`sums_of(params, batch)`, sums over the rows of `batch` (arrays [B, T]); split into parts if on a single CPU.

    The parts don't wait for each other, and each fits the caches better. The gradients of a part are complete before
    they are added: XLA would otherwise merge the addition with the stacking of the layers' gradients, which is slow.

    Args:
      platform: JAX's name of the backend, such as "cpu".
      devices: number of devices that the program runs on; several CPU devices are busy already.
    """
    b, t = batch["tokens"].shape
    possible = [n for n in range(2, CPU_PARTS + 1) if b % n == 0 and b // n * t >= CPU_PART_TOKENS]
    if platform != "cpu" or devices > 1 or not possible:
        return sums_of(params, batch)
    parts = zip(*(jnp.split(x, possible[-1]) for x in batch.values()), strict=True)
    separate_params = lambda: jax.tree.map(jax.lax.optimization_barrier, params)  # noqa: E731
    sums_of = jax.jit(sums_of)  # traced once for all parts
    sums = [sums_of(separate_params(), dict(zip(batch, part, strict=True))) for part in parts]
    return jax.tree.map(lambda *terms: sum(terms), *sums)


def recomputed(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`f` with a backward pass that keeps the arguments alone and computes everything else again."""
    g = jax.custom_vjp(f)

    def backward(arguments: tuple[Any, ...], gradient: jax.Array) -> tuple[Any, ...]:
        # Behind a barrier, or XLA finds f's results and keeps them.
        arguments, gradient = jax.lax.optimization_barrier((arguments, gradient))
        return jax.vjp(f, *arguments)[1](gradient)

    g.defvjp(lambda *arguments: (g(*arguments), arguments), backward)
    return g
