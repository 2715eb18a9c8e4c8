"""Cross entropy straight from hidden states, without the [tokens, vocabulary] logits.

Shapes: B rows, T positions, C positions of a chunk, D model width, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

CHUNK_BYTES = 32 * 2**20  # float32 logits alive at a time; 8 to 128 MiB ran equally fast on CPU


def _chunks(hidden_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> Any:
    """The per-token arrays as [T/C, B, C, ...], C such that its logits fit CHUNK_BYTES; T is padded with weight 0."""
    b, t = targets_BT.shape
    fit = max(1, CHUNK_BYTES // (4 * b * w_VD.shape[0]))
    n = -(-t // fit)
    c = -(-t // n)

    def split(x_BT: jax.Array) -> jax.Array:
        padded = jnp.pad(x_BT, ((0, 0), (0, n * c - t)) + ((0, 0),) * (x_BT.ndim - 2))
        return jnp.moveaxis(padded.reshape(b, n, c, *x_BT.shape[2:]), 1, 0)

    return split(hidden_BTD), split(targets_BT), split(weights_BT)


def _chunk_terms(hidden_BCD: jax.Array, w_VD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, ...]:
    """Per-token loss [B, C], exp(logits - max), its sum [B, C, 1] and the targets' one-hot mask, in float32."""
    logits_BCV = jnp.einsum("bcd,vd->bcv", hidden_BCD, w_VD, preferred_element_type=jnp.float32)
    is_target_BCV = targets_BC[..., None] == jnp.arange(w_VD.shape[0], dtype=targets_BC.dtype)[None, None]
    shifted_BCV = logits_BCV - logits_BCV.max(-1, keepdims=True)
    exp_BCV = jnp.exp(shifted_BCV)
    total_BC1 = exp_BCV.sum(-1, keepdims=True)
    target_BC = jnp.where(is_target_BCV, shifted_BCV, 0.0).sum(-1)
    return jnp.log(total_BC1[..., 0]) - target_BC, exp_BCV, total_BC1, is_target_BCV


@jax.custom_vjp
def cross_entropy_sum(
    hidden_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """Sum over tokens of weight * cross entropy in nats, float32 scalar.

    The gradient is computed together with the loss, one chunk of positions at a time, so that the logits are made
    once and never held whole (as in Liger's fused linear cross entropy, arXiv:2410.10989).

    Args:
      hidden_BTD: hidden states in the compute dtype.
      w_VD: float32 output matrix; multiplied in the compute dtype.
      targets_BT: int32 token ids.
      weights_BT: float32, 0 for padding.
    """
    w = w_VD.astype(hidden_BTD.dtype)

    def body(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        hidden, targets, weights = chunk
        return total + (_chunk_terms(hidden, w, targets)[0] * weights).sum(), None

    chunks = _chunks(hidden_BTD, w_VD, targets_BT, weights_BT)
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), chunks)[0]


def _forward(hidden_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> tuple[Any, Any]:
    w = w_VD.astype(hidden_BTD.dtype)

    def body(carry: Any, chunk: Any) -> tuple[Any, jax.Array]:
        total, dw_DV = carry
        hidden, targets, weights = chunk
        loss_BC, exp_BCV, sum_BC1, is_target_BCV = _chunk_terms(hidden, w, targets)
        scale_BC1 = weights[..., None] / sum_BC1
        dlogits = exp_BCV * scale_BC1 - jnp.where(is_target_BCV, weights[..., None], 0.0)
        dlogits = dlogits.astype(hidden.dtype)
        dhidden = jnp.einsum("bcv,vd->bcd", dlogits, w, preferred_element_type=jnp.float32).astype(hidden.dtype)
        # As [D, V]: transposing the hidden states is cheap, transposing the logits' gradient is not.
        dw_DV = dw_DV + jnp.einsum("bcd,bcv->dv", hidden, dlogits, preferred_element_type=jnp.float32)
        return (total + (loss_BC * weights).sum(), dw_DV), dhidden

    chunks = _chunks(hidden_BTD, w_VD, targets_BT, weights_BT)
    carry = (jnp.zeros((), jnp.float32), jnp.zeros(w_VD.shape[::-1], jnp.float32))
    (total, dw_DV), dhidden = jax.lax.scan(body, carry, chunks)
    b, t, d = hidden_BTD.shape
    dw_DV = jax.lax.optimization_barrier(dw_DV)  # XLA on CPU cannot run a 16-bit product whose result is transposed
    return total, (jnp.moveaxis(dhidden, 0, 1).reshape(b, -1, d)[:, :t], dw_DV.T)


def _backward(saved: Any, g: jax.Array) -> tuple[Any, ...]:
    dhidden_BTD, dw_VD = saved
    return dhidden_BTD * g.astype(dhidden_BTD.dtype), dw_VD * g, None, None


cross_entropy_sum.defvjp(_forward, _backward)
