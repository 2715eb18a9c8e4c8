"""Reductions over the last axis: the norms' and the softmax's of the loss.

Shapes: B rows, T positions, D channels, C positions of a chunk, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm.config import TrainingConfig

# Logits alive at a time. A CPU finds those of few tokens in its caches, but with each chunk it reads and writes the
# gradient of the output matrix: of 128 to 2,048 tokens 512 and 1,024 were the fastest, at vocabularies of 4,096 and
# 32,768. A GPU needs some thousand tokens at a time to be busy; its figure is not measured yet.
CPU_TOKENS, CPU_CHUNK, GPU_CHUNK = 512, 64 * 2**20, 512 * 2**20


def logits_chunk_bytes(training: TrainingConfig, vocabulary: int, platform: str) -> int:
    """Bytes of logits that a device holds at a time; `platform` is JAX's name of its backend, such as "cpu"."""
    if training.loss_chunk_mib is not None:
        return training.loss_chunk_mib * 2**20
    return min(CPU_CHUNK, 4 * CPU_TOKENS * vocabulary) if platform == "cpu" else GPU_CHUNK


def logits_dtype(training: TrainingConfig, platform: str) -> jnp.dtype:
    """The dtype in which the logits of a training step are in memory; `platform` as above.

    A GPU takes as long for a pass over them as it takes to move them. With use_amp they are float16 there, even where
    all else is bfloat16: bfloat16's rounding of logits of 32 moves the loss by 5e-4, float16's by 1e-5.
    """
    return jnp.dtype("float32" if platform == "cpu" or not training.use_amp else "float16")


def per_token(f: Callable[[jax.Array], jax.Array], x_BTD: jax.Array) -> jax.Array:
    """`f`, which maps [tokens, D] to the same shape, of all tokens.

    On CPU XLA sums a [1, T, D] array 15 times as slowly as a [T, D] one.
    """
    return f(x_BTD.reshape(-1, x_BTD.shape[-1])).reshape(x_BTD.shape)


def is_target(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    """bool [B, C, V]: the one-hot targets."""
    return targets_BC[..., None] == jnp.arange(logits_BCV.shape[-1], dtype=targets_BC.dtype)[None, None]


def softmax_statistics(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest logit and the sum of exp(logits - largest), [B, C, 1]; the target's logit less the largest, [B, C].

    A GPU takes as long for a pass over the logits as it takes to read them, so there all is done in one pass.
    """
    return jax.lax.platform_dependent(logits_BCV, targets_BC, cpu=_in_three_passes, default=_in_one_pass)


def _in_three_passes(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    max_BC1 = logits_BCV.max(-1, keepdims=True)
    shifted_BCV = logits_BCV - max_BC1
    target_BC = jnp.where(is_target(logits_BCV, targets_BC), shifted_BCV, 0.0).sum(-1)
    return max_BC1, jnp.exp(shifted_BCV).sum(-1, keepdims=True), target_BC


def _in_one_pass(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """An online softmax: (largest so far, sum of exponentials relative to it)."""

    def join(x: tuple[jax.Array, jax.Array], y: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        largest = jnp.maximum(x[0], y[0])
        return largest, x[1] * jnp.exp(x[0] - largest) + y[1] * jnp.exp(y[0] - largest)

    start = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0)
    max_BC, total_BC = jax.lax.reduce((logits_BCV, jnp.ones_like(logits_BCV)), start, join, (2,))
    target_BC1 = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)
    return max_BC[..., None], total_BC[..., None], target_BC1[..., 0] - max_BC
