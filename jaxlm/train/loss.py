"""Cross entropy straight from hidden states, without the [tokens, vocabulary] logits.

Shapes: B rows, T positions, C positions of a chunk, D model width, V vocabulary.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import TrainingConfig
from jaxlm.ops.matmul import product

Sums = tuple[jax.Array, jax.Array]  # the objective and the cross entropy, float32 scalars
# Float32 logits alive at a time. On CPU 8 to 128 MiB ran equally fast. A GPU needs some thousand tokens at a time to be
# busy, and reads and writes the gradient of the output matrix once a chunk; its figure is not measured yet.
CPU_CHUNK, GPU_CHUNK = 32 * 2**20, 512 * 2**20


def bytes_of_chunk(training: TrainingConfig, platform: str) -> int:
    """Bytes of float32 logits that a device holds at a time; `platform` is JAX's name of its backend, such as "cpu"."""
    if training.loss_chunk_mib is not None:
        return training.loss_chunk_mib * 2**20
    return CPU_CHUNK if platform == "cpu" else GPU_CHUNK


def _chunks(
    hidden_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, chunk_bytes: int
) -> Any:
    """The per-token arrays as [T/C, B, C, ...], C such that its logits fit `chunk_bytes`; T is padded with weight 0."""
    b, t = targets_BT.shape
    fit = max(1, chunk_bytes // (4 * b * w_VD.shape[0]))
    n = -(-t // fit)
    c = -(-t // n)

    def split(x_BT: jax.Array) -> jax.Array:
        padded = jnp.pad(x_BT, ((0, 0), (0, n * c - t)) + ((0, 0),) * (x_BT.ndim - 2))
        return jnp.moveaxis(padded.reshape(b, n, c, *x_BT.shape[2:]), 1, 0)

    return split(hidden_BTD), split(targets_BT), split(weights_BT)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """What the loss of one chunk and its gradient are made of, float32."""

    cross_entropy_BC: jax.Array
    log_total_BC: jax.Array  # log of the sum over the vocabulary of exp(logits)
    exp_BCV: jax.Array  # exp(logits - max)
    total_BC1: jax.Array  # its sum
    is_target_BCV: jax.Array
    slope_BCV: jax.Array | None  # d logits / d raw logits, where they are capped


def _statistics(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest logit and the sum of exp(logits - largest), [B, C, 1], and the target's logit less the largest.

    On a GPU, where a pass over the logits takes as long as reading them, in one: the largest so far and the sum for it.
    """

    def in_passes(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, ...]:
        max_BC1 = logits_BCV.max(-1, keepdims=True)
        shifted_BCV = logits_BCV - max_BC1
        target_BC = jnp.where(_is_target(logits_BCV, targets_BC), shifted_BCV, 0.0).sum(-1)
        return max_BC1, jnp.exp(shifted_BCV).sum(-1, keepdims=True), target_BC

    def in_one_pass(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, ...]:
        def join(x: tuple[jax.Array, jax.Array], y: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            largest = jnp.maximum(x[0], y[0])
            return largest, x[1] * jnp.exp(x[0] - largest) + y[1] * jnp.exp(y[0] - largest)

        nothing = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0)
        max_BC, total_BC = jax.lax.reduce((logits_BCV, jnp.ones_like(logits_BCV)), nothing, join, (2,))
        target_BC1 = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)
        return max_BC[..., None], total_BC[..., None], target_BC1[..., 0] - max_BC

    return jax.lax.platform_dependent(logits_BCV, targets_BC, cpu=in_passes, default=in_one_pass)


def _is_target(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    return targets_BC[..., None] == jnp.arange(logits_BCV.shape[-1], dtype=targets_BC.dtype)[None, None]


def _chunk(hidden_BCD: jax.Array, w_VD: jax.Array, targets_BC: jax.Array, softcap: float | None) -> _Chunk:
    logits_BCV = product("bcd,vd->bcv", hidden_BCD, w_VD)
    slope_BCV = None
    if softcap is not None:
        tanh_BCV = jnp.tanh(logits_BCV / softcap)
        logits_BCV, slope_BCV = softcap * tanh_BCV, 1 - tanh_BCV * tanh_BCV
    max_BC1, total_BC1, target_BC = _statistics(logits_BCV, targets_BC)
    exp_BCV = jnp.exp(logits_BCV - max_BC1)
    log_BC, is_target_BCV = jnp.log(total_BC1[..., 0]), _is_target(logits_BCV, targets_BC)
    return _Chunk(log_BC - target_BC, log_BC + max_BC1[..., 0], exp_BCV, total_BC1, is_target_BCV, slope_BCV)


def _add(sums: Sums, chunk: _Chunk, weights_BC: jax.Array, z_loss: float) -> Sums:
    objective_BC = chunk.cross_entropy_BC
    if z_loss:
        objective_BC = objective_BC + z_loss * chunk.log_total_BC**2
    return sums[0] + (objective_BC * weights_BC).sum(), sums[1] + (chunk.cross_entropy_BC * weights_BC).sum()


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def loss_sums(
    hidden_BTD: jax.Array,
    w_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk_bytes: int = CPU_CHUNK,
) -> Sums:
    """Sums over tokens of weight * (cross entropy + z_loss * log(Z)^2) and of weight * cross entropy, float32 scalars.

    The first is to be minimised; the second, in nats, is for reports: no gradient comes from it. Z is the softmax's
    denominator (PaLM, arXiv:2204.02311, section 5). The gradient is computed together with the loss, one chunk of
    positions at a time, so that the logits are made once and never held whole (as in Liger's fused linear cross
    entropy, arXiv:2410.10989).

    Args:
      hidden_BTD: hidden states in the compute dtype.
      w_VD: float32 output matrix; multiplied in the compute dtype.
      targets_BT: int32 token ids.
      weights_BT: float32, 0 for padding.
      softcap: logits become softcap * tanh(logits / softcap); None: they stay.
      z_loss: weight of log(Z)^2.
      chunk_bytes: of float32 logits at a time.
    """
    w = w_VD.astype(hidden_BTD.dtype)

    def body(sums: Sums, chunk: Any) -> tuple[Sums, None]:
        hidden, targets, weights = chunk
        return _add(sums, _chunk(hidden, w, targets, softcap), weights, z_loss), None

    chunks = _chunks(hidden_BTD, w_VD, targets_BT, weights_BT, chunk_bytes)
    return jax.lax.scan(body, (jnp.zeros((), jnp.float32),) * 2, chunks)[0]


def _forward(
    hidden_BTD: jax.Array,
    w_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    softcap: float | None,
    z_loss: float,
    chunk_bytes: int,
) -> tuple[Sums, Any]:
    w = w_VD.astype(hidden_BTD.dtype)

    def body(carry: Any, chunk: Any) -> tuple[Any, jax.Array]:
        sums, dw_DV = carry
        hidden, targets, weights = chunk
        of = _chunk(hidden, w, targets, softcap)
        scale_BC1 = weights[..., None] / of.total_BC1
        if z_loss:
            scale_BC1 = scale_BC1 * (1 + 2 * z_loss * of.log_total_BC[..., None])
        dlogits = of.exp_BCV * scale_BC1 - jnp.where(of.is_target_BCV, weights[..., None], 0.0)
        if of.slope_BCV is not None:
            dlogits = dlogits * of.slope_BCV
        dlogits = dlogits.astype(hidden.dtype)
        dhidden = product("bcv,vd->bcd", dlogits, w).astype(hidden.dtype)
        # As [D, V]: transposing the hidden states is cheap, transposing the logits' gradient is not.
        dw_DV = dw_DV + product("bcd,bcv->dv", hidden, dlogits)
        return (_add(sums, of, weights, z_loss), dw_DV), dhidden

    chunks = _chunks(hidden_BTD, w_VD, targets_BT, weights_BT, chunk_bytes)
    carry = ((jnp.zeros((), jnp.float32),) * 2, jnp.zeros(w_VD.shape[::-1], jnp.float32))
    (sums, dw_DV), dhidden = jax.lax.scan(body, carry, chunks)
    b, t, d = hidden_BTD.shape
    dw_DV = jax.lax.optimization_barrier(dw_DV)  # XLA on CPU cannot run a 16-bit product whose result is transposed
    return sums, (jnp.moveaxis(dhidden, 0, 1).reshape(b, -1, d)[:, :t], dw_DV.T)


def _backward(softcap: float | None, z_loss: float, chunk_bytes: int, saved: Any, g: Sums) -> tuple[Any, ...]:
    dhidden_BTD, dw_VD = saved
    return dhidden_BTD * g[0].astype(dhidden_BTD.dtype), dw_VD * g[0], None, None


loss_sums.defvjp(_forward, _backward)
