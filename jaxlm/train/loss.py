"""Cross entropy straight from hidden states, without the [tokens, vocabulary] logits.

Shapes: B rows, T positions, C positions of a chunk, D model width, V vocabulary.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.ops.matmul import einsum, transpose_product
from jaxlm.ops.reductions import CPU_CHUNK, is_target, softmax_statistics
from jaxlm.ops.softmax_kernel import TokenInputs, softmax_gradient

Sums = tuple[jax.Array, jax.Array]  # the objective and the cross entropy, float32 scalars
Gradients = tuple[jax.Array, jax.Array]  # of the hidden states and of the output matrix


def learned(batch: Mapping[str, jax.Array]) -> jax.Array:
    """bool, as `segments`: the targets that count: all but padding, or those in `loss_mask` where the data has one."""
    tokens = batch["segments"] > 0
    return tokens & batch["loss_mask"] if "loss_mask" in batch else tokens


class _Tokens(NamedTuple):
    """What the loss of some tokens is computed from: [B, T, ...], or [T/C, B, C, ...] in chunks."""

    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array


def _in_chunks(tokens: _Tokens, vocabulary: int, chunk_bytes: int, dtype: DTypeLike = jnp.float32) -> _Tokens:
    """Chunks whose logits, kept as `dtype`, fit `chunk_bytes`; T is padded with weight 0 if no good size divides it."""
    b, t = tokens.targets.shape
    fit = max(1, chunk_bytes // (jnp.dtype(dtype).itemsize * b * vocabulary))
    fewest = -(-t // fit)
    n = next((n for n in range(fewest, 2 * fewest) if t % n == 0), fewest)
    c = -(-t // n)

    def split(x_BT: jax.Array) -> jax.Array:
        padded = jnp.pad(x_BT, ((0, 0), (0, n * c - t)) + ((0, 0),) * (x_BT.ndim - 2))
        return jnp.moveaxis(padded.reshape(b, n, c, *x_BT.shape[2:]), 1, 0)

    return _Tokens(*map(split, tokens))


class _Options(NamedTuple):
    """Of `loss_sums`."""

    softcap: float | None
    z_loss: float
    chunk_bytes: int
    kept_as: DTypeLike
    own_kernel: bool


class _Losses(NamedTuple):
    """Of the tokens of a chunk, float32."""

    cross_entropy_BC: jax.Array
    log_total_BC: jax.Array  # log of the sum over the vocabulary of exp(logits)


class _Softmax(NamedTuple):
    """What the loss of a chunk and its gradient are computed from, float32."""

    losses: _Losses
    exp_BCV: jax.Array  # exp(logits - max)
    total_BC1: jax.Array  # its sum
    is_target_BCV: jax.Array
    slope_BCV: jax.Array | None  # d logits / d raw logits, where they are capped


def _of_targets(hidden_BCD: jax.Array, w_VD: jax.Array, targets_BC: jax.Array) -> jax.Array:
    """The targets' logits, float32 [B, C]."""
    return einsum("bcd,bcd->bc", hidden_BCD, w_VD[targets_BC], jnp.float32)


def _logits(hidden_BCD: jax.Array, w_VD: jax.Array, targets_BC: jax.Array, kept_as: DTypeLike) -> jax.Array:
    """float32 logits that are kept in memory as `kept_as`, but for the targets'."""
    logits_BCV = einsum("bcd,vd->bcv", hidden_BCD, w_VD, kept_as)
    if logits_BCV.dtype == jnp.float32:
        return logits_BCV
    of_target_BC1 = _of_targets(hidden_BCD, w_VD, targets_BC)[..., None]
    return jnp.where(is_target(logits_BCV, targets_BC), of_target_BC1, logits_BCV.astype(jnp.float32))


def _softmax(
    hidden_BCD: jax.Array,
    w_VD: jax.Array,
    targets_BC: jax.Array,
    softcap: float | None,
    kept_as: DTypeLike = jnp.float32,
) -> _Softmax:
    logits_BCV = _logits(hidden_BCD, w_VD, targets_BC, kept_as)
    slope_BCV = None
    if softcap is not None:
        tanh_BCV = jnp.tanh(logits_BCV / softcap)
        logits_BCV, slope_BCV = softcap * tanh_BCV, 1 - tanh_BCV * tanh_BCV
    max_BC1, total_BC1, target_BC = softmax_statistics(logits_BCV, targets_BC)
    exp_BCV = jnp.exp(logits_BCV - max_BC1)
    log_BC, is_target_BCV = jnp.log(total_BC1[..., 0]), is_target(logits_BCV, targets_BC)
    losses = _Losses(log_BC - target_BC, log_BC + max_BC1[..., 0])
    return _Softmax(losses, exp_BCV, total_BC1, is_target_BCV, slope_BCV)


def _gradient(chunk: _Tokens, w_VD: jax.Array, options: _Options) -> tuple[jax.Array, _Losses]:
    """The gradient of a chunk's logits, [B, C, V] in the dtype of w, and its losses."""
    softcap, z_loss, _, kept_as, own_kernel = options
    if own_kernel:
        logits_BCV = einsum("bcd,vd->bcv", chunk.hidden, w_VD, kept_as)
        inputs = TokenInputs(chunk.targets, _of_targets(chunk.hidden, w_VD, chunk.targets), chunk.weights)
        gradient_BCV, *losses = softmax_gradient(logits_BCV, inputs, softcap, z_loss, w_VD.dtype)
        return gradient_BCV, _Losses(*losses)
    softmax = _softmax(chunk.hidden, w_VD, chunk.targets, softcap, kept_as)
    scale_BC1 = chunk.weights[..., None] / softmax.total_BC1
    if z_loss:
        scale_BC1 = scale_BC1 * (1 + 2 * z_loss * softmax.losses.log_total_BC[..., None])
    gradient_BCV = softmax.exp_BCV * scale_BC1 - jnp.where(softmax.is_target_BCV, chunk.weights[..., None], 0.0)
    if softmax.slope_BCV is not None:
        gradient_BCV = gradient_BCV * softmax.slope_BCV
    return gradient_BCV.astype(w_VD.dtype), softmax.losses


def _zeros() -> Sums:
    return (jnp.zeros((), jnp.float32),) * 2


def _add(sums: Sums, losses: _Losses, weights_BC: jax.Array, z_loss: float) -> Sums:
    objective_BC = losses.cross_entropy_BC
    if z_loss:
        objective_BC = objective_BC + z_loss * losses.log_total_BC**2
    return sums[0] + (objective_BC * weights_BC).sum(), sums[1] + (losses.cross_entropy_BC * weights_BC).sum()


def loss_sums(
    hidden_BTD: jax.Array,
    w_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk_bytes: int = CPU_CHUNK,
    kept_as: DTypeLike = jnp.float32,
    own_kernel: bool = False,
) -> Sums:
    """Sums over tokens of weight * (cross entropy + z_loss * log(Z)^2) and of weight * cross entropy, float32 scalars.

    The first is to be minimised; the second, in nats, is for reports: no gradient comes from it. Z is the softmax's
    denominator (PaLM, arXiv:2204.02311, section 5). The gradient is computed together with the loss, one chunk of
    positions at a time, so that the logits are computed once and never held whole (as in Liger's fused linear cross
    entropy, arXiv:2410.10989).

    Args:
      hidden_BTD: hidden states in the compute dtype.
      w_VD: float32 output matrix; multiplied in the compute dtype.
      targets_BT: int32 token ids.
      weights_BT: float32, 0 for padding.
      softcap: logits become softcap * tanh(logits / softcap); None: they stay.
      z_loss: weight of log(Z)^2.
      chunk_bytes: of logits at a time.
      kept_as: where there is a gradient, the dtype in which logits are in memory; those of the targets, and everything
        that is made of logits, are float32. In float16 a logit beyond 65504 is infinite, and so is the loss.
      own_kernel: where there is a gradient, whether it is made by `ops.softmax_kernel`.
    """
    options = _Options(softcap, z_loss, chunk_bytes, jnp.dtype(kept_as), own_kernel)
    tokens = _Tokens(hidden_BTD, targets_BT, weights_BT)
    if own_kernel:  # on GPUs, chunks of consecutive tokens of all rows need no copies; on CPU they would be slower
        tokens = _Tokens(*(x.reshape(1, -1, *x.shape[2:]) for x in tokens))
    return _sums(tokens, w_VD, options)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sums(tokens: _Tokens, w_VD: jax.Array, options: _Options) -> Sums:
    w = w_VD.astype(tokens.hidden.dtype)

    def add_chunk(sums: Sums, chunk: _Tokens) -> tuple[Sums, None]:
        losses = _softmax(chunk.hidden, w, chunk.targets, options.softcap).losses
        return _add(sums, losses, chunk.weights, options.z_loss), None

    return jax.lax.scan(add_chunk, _zeros(), _in_chunks(tokens, len(w), options.chunk_bytes))[0]


def _forward(tokens: _Tokens, w_VD: jax.Array, options: _Options) -> tuple[Sums, Gradients]:
    """The sums, and the gradients of the first of them."""
    w = w_VD.astype(tokens.hidden.dtype)

    def add_chunk(carry: tuple[Sums, jax.Array], chunk: _Tokens) -> tuple[tuple[Sums, jax.Array], jax.Array]:
        sums, dw_DV = carry
        dlogits, losses = _gradient(chunk, w, options)
        dhidden = einsum("bcv,vd->bcd", dlogits, w, jnp.float32).astype(w.dtype)
        # As [D, V]: transposing the hidden states is cheap, transposing the logits' gradient is not.
        dw_DV = dw_DV + einsum("bcd,bcv->dv", chunk.hidden, dlogits, jnp.float32)
        return (_add(sums, losses, chunk.weights, options.z_loss), dw_DV), dhidden

    start = _zeros(), jnp.zeros(w_VD.shape[::-1], jnp.float32)
    chunks = _in_chunks(tokens, len(w), options.chunk_bytes, options.kept_as)
    (sums, dw_DV), dhidden = jax.lax.scan(add_chunk, start, chunks)
    b, t, d = tokens.hidden.shape
    return sums, (jnp.moveaxis(dhidden, 0, 1).reshape(b, -1, d)[:, :t], transpose_product(dw_DV))


def _backward(options: _Options, gradients: Gradients, g: Sums) -> tuple[_Tokens, jax.Array]:
    dhidden_BTD, dw_VD = gradients
    return _Tokens._make((dhidden_BTD * g[0].astype(dhidden_BTD.dtype), None, None)), dw_VD * g[0]


_sums.defvjp(_forward, _backward)
