"""The softmax of the loss and its gradient in one Pallas kernel for GPUs, which reads the logits once.

Shapes: N tokens, V vocabulary. One program takes the logits of a token, keeps them in registers and writes their
gradient where they were. XLA makes two passes of it, as the gradient needs the sum over the whole vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxlm.ops.launch import launch, powers_of_two

LARGEST_VOCABULARY = 64 * 1024  # of 16-bit logits, so that those of a token take half of a multiprocessor's registers
_PIECE, _MOST_PIECES, _WARPS = 8192, 11, 16


def takes_vocabulary(size: int) -> bool:
    """Whether all logits of a token stay in registers: rows that begin at whole words of memory, and in few pieces."""
    return size <= LARGEST_VOCABULARY and size % 16 == 0 and len(powers_of_two(size, _PIECE)) <= _MOST_PIECES


class TokenInputs(NamedTuple):
    """What the kernel reads of each token beside its logits, [...]."""

    target: Any  # int32
    of_target: Any  # the target's logit, float32
    weight: Any  # float32


def loss_kernel(
    tokens: TokenInputs,
    logits_ref: jax.Ref,
    gradient_ref: jax.Ref,
    cross_entropy_ref: jax.Ref,
    log_total_ref: jax.Ref,
    *,
    softcap: float | None,
    z_loss: float,
    dtype: jnp.dtype,
) -> None:
    """Writes the cross entropy of a token, the log of its softmax's denominator, and its logits' gradient."""
    target, of_target, weight = (ref[...] for ref in tokens)
    vocabulary = logits_ref.shape[0]
    pieces = powers_of_two(vocabulary, _PIECE)
    kept = [logits_ref[pl.ds(start, size)] for start, size in pieces]

    def capped(x: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """Logits as the model has them, and their derivative by the raw ones."""
        if softcap is None:
            return x, 1.0
        tanh = jnp.tanh(x / softcap)
        return softcap * tanh, 1 - tanh * tanh

    def wide(i: int, zero: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """A piece in float32, with the target's logit; and where that is."""
        x = kept[i]
        if zero is not None:  # one that the compiler can't foresee, or it keeps the first time's results: too many
            x = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, zero.dtype) ^ zero, x.dtype)
        start, size = pieces[i]
        is_target = start + jnp.arange(size, dtype=jnp.int32) == target
        return jnp.where(is_target, of_target, x.astype(jnp.float32)), is_target

    largest, total = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0)
    for i in range(len(pieces)):
        x = capped(wide(i)[0])[0]
        before, largest = largest, jnp.maximum(largest, x.max())
        total = total * jnp.exp(before - largest) + jnp.exp(x - largest).sum()
    log_total = jnp.log(total) + largest
    zero = (total < 0).astype(jnp.uint16 if logits_ref.dtype.itemsize == 2 else jnp.uint32)
    scale = weight / total
    if z_loss:
        scale = scale * (1 + 2 * z_loss * log_total)
    for i, (start, size) in enumerate(pieces):
        x, is_target = wide(i, zero)
        logits, slope = capped(x)
        gradient = (jnp.exp(logits - largest) * scale - jnp.where(is_target, weight, 0.0)) * slope
        written = jax.lax.bitcast_convert_type(gradient.astype(dtype), gradient_ref.dtype)
        gradient_ref[pl.ds(start, size)] = written
    cross_entropy_ref[...] = log_total - capped(of_target)[0]
    log_total_ref[...] = log_total


def softmax_gradient(
    logits: jax.Array, tokens: TokenInputs, softcap: float | None, z_loss: float, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logits' gradient, [..., V] in `dtype`; cross entropy and log of the softmax's denominator, float32 [...].

    Args:
      logits: [..., V], of a dtype as wide as `dtype`; their memory becomes the gradient's.
      softcap, z_loss: of `train.loss.loss_sums`.
    """
    *shape, v = logits.shape
    inputs = TokenInputs(*(x.reshape(-1) for x in tokens))
    n = inputs.target.size
    row, number = pl.BlockSpec((None, v), lambda i: (i, 0)), pl.BlockSpec((None,), lambda i: (i,))
    gradient, *losses = launch(
        loss_kernel,
        (inputs, logits.reshape(n, v)),
        (TokenInputs(number, number, number), row),
        [(row, (n, v), logits.dtype), (number, (n,), jnp.float32), (number, (n,), jnp.float32)],
        grid=(n,),
        warps=_WARPS,
        in_place=True,
        softcap=softcap,
        z_loss=z_loss,
        dtype=dtype,
    )
    gradient = jax.lax.bitcast_convert_type(gradient, dtype)
    return gradient.reshape(*shape, v), losses[0].reshape(shape), losses[1].reshape(shape)
