"""Cross entropy straight from hidden states, without the [tokens, vocabulary] logits.

Shapes: B rows, T positions, C tokens of a chunk, D model width, V vocabulary.
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
    """What the loss of some tokens is computed from: [B, T, ...], or [chunks, C, ...]."""

    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array


def _in_chunks(tokens: _Tokens, vocabulary: int, chunk_bytes: int, dtype: DTypeLike = jnp.float32) -> _Tokens:
    """Chunks whose logits, kept as `dtype`, fit `chunk_bytes`.

    All of one size: the largest that divides the tokens, or, where that is less than half of what fits, one that
    doesn't, with weights of 0 behind the last token.
    """
    count = tokens.targets.size
    fit = min(count, max(1, chunk_bytes // (jnp.dtype(dtype).itemsize * vocabulary)))
    fewest = -(-count // fit)
    n = next((n for n in range(fewest, 2 * fewest) if count % n == 0), fewest)
    c = -(-count // n)

    def split(x: jax.Array, axes: int) -> jax.Array:
        flat = x.reshape(count, *x.shape[2:])
        return jnp.pad(flat, ((0, n * c - count), *((0, 0),) * axes)).reshape(n, c, *x.shape[2:])

    return _Tokens(split(tokens.hidden, 1), split(tokens.targets, 0), split(tokens.weights, 0))


class _Options(NamedTuple):
    """Of `loss_sums`."""

    softcap: float | None
    z_loss: float
    chunk_bytes: int
    kept_as: DTypeLike
    own_kernel: bool


class _Losses(NamedTuple):
    """Of the tokens of a chunk, float32."""

    cross_entropy_C: jax.Array
    log_total_C: jax.Array  # log of the sum over the vocabulary of exp(logits)


class _Softmax(NamedTuple):
    """What the loss of a chunk and its gradient are computed from, float32."""

    losses: _Losses
    exp_CV: jax.Array  # exp(logits - max)
    total_C1: jax.Array  # its sum
    is_target_CV: jax.Array
    slope_CV: jax.Array | None  # d logits / d raw logits, where they are capped


def _of_targets(hidden_CD: jax.Array, w_VD: jax.Array, targets_C: jax.Array) -> jax.Array:
    """The targets' logits, float32 [C]."""
    return einsum("cd,cd->c", hidden_CD, w_VD[targets_C], jnp.float32)


def _logits(hidden_CD: jax.Array, w_VD: jax.Array, targets_C: jax.Array, kept_as: DTypeLike) -> jax.Array:
    """float32 logits that are kept in memory as `kept_as`, but for the targets'."""
    logits_CV = einsum("cd,vd->cv", hidden_CD, w_VD, kept_as)
    if logits_CV.dtype == jnp.float32:
        return logits_CV
    of_target_C1 = _of_targets(hidden_CD, w_VD, targets_C)[:, None]
    return jnp.where(is_target(logits_CV, targets_C), of_target_C1, logits_CV.astype(jnp.float32))


def _softmax(
    hidden_CD: jax.Array,
    w_VD: jax.Array,
    targets_C: jax.Array,
    softcap: float | None,
    kept_as: DTypeLike = jnp.float32,
) -> _Softmax:
    logits_CV = _logits(hidden_CD, w_VD, targets_C, kept_as)
    slope_CV = None
    if softcap is not None:
        tanh_CV = jnp.tanh(logits_CV / softcap)
        logits_CV, slope_CV = softcap * tanh_CV, 1 - tanh_CV * tanh_CV
    max_C1, total_C1, target_C = softmax_statistics(logits_CV, targets_C)
    exp_CV = jnp.exp(logits_CV - max_C1)
    log_C, is_target_CV = jnp.log(total_C1[:, 0]), is_target(logits_CV, targets_C)
    losses = _Losses(log_C - target_C, log_C + max_C1[:, 0])
    return _Softmax(losses, exp_CV, total_C1, is_target_CV, slope_CV)


def _gradient(chunk: _Tokens, w_VD: jax.Array, options: _Options) -> tuple[jax.Array, _Losses]:
    """The gradient of a chunk's logits, [C, V] in the dtype of w, and its losses."""
    softcap, z_loss, _, kept_as, own_kernel = options
    if own_kernel:
        logits_CV = einsum("cd,vd->cv", chunk.hidden, w_VD, kept_as)
        inputs = TokenInputs(chunk.targets, _of_targets(chunk.hidden, w_VD, chunk.targets), chunk.weights)
        gradient_CV, *losses = softmax_gradient(logits_CV, inputs, softcap, z_loss, w_VD.dtype)
        return gradient_CV, _Losses(*losses)
    softmax = _softmax(chunk.hidden, w_VD, chunk.targets, softcap, kept_as)
    scale_C1 = chunk.weights[:, None] / softmax.total_C1
    if z_loss:
        scale_C1 = scale_C1 * (1 + 2 * z_loss * softmax.losses.log_total_C[:, None])
    gradient_CV = softmax.exp_CV * scale_C1 - jnp.where(softmax.is_target_CV, chunk.weights[:, None], 0.0)
    if softmax.slope_CV is not None:
        gradient_CV = gradient_CV * softmax.slope_CV
    return gradient_CV.astype(w_VD.dtype), softmax.losses


def _zeros() -> Sums:
    return (jnp.zeros((), jnp.float32),) * 2


def _add(sums: Sums, losses: _Losses, weights_C: jax.Array, z_loss: float) -> Sums:
    objective_C = losses.cross_entropy_C
    if z_loss:
        objective_C = objective_C + z_loss * losses.log_total_C**2
    return sums[0] + (objective_C * weights_C).sum(), sums[1] + (losses.cross_entropy_C * weights_C).sum()


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
    tokens at a time, so that the logits are computed once and never held whole (as in Liger's fused linear cross
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
    return _sums(_Tokens(hidden_BTD, targets_BT, weights_BT), w_VD, options)


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

    chunks = _in_chunks(tokens, len(w), options.chunk_bytes, options.kept_as)

    def add_chunk(i: jax.Array, carry: tuple[Sums, jax.Array, jax.Array]) -> tuple[Sums, jax.Array, jax.Array]:
        """The gradient of a chunk's hidden states is written where they are."""
        sums, dw_DV, hidden = carry
        chunk = _Tokens(hidden[i], chunks.targets[i], chunks.weights[i])
        dlogits, losses = _gradient(chunk, w, options)
        dhidden_CD = einsum("cv,vd->cd", dlogits, w, jnp.float32).astype(w.dtype)
        # As [D, V]: transposing the hidden states is cheap, transposing the logits' gradient is not.
        dw_DV = dw_DV + einsum("cd,cv->dv", chunk.hidden, dlogits, jnp.float32)
        return _add(sums, losses, chunk.weights, options.z_loss), dw_DV, hidden.at[i].set(dhidden_CD)

    start = _zeros(), jnp.zeros(w_VD.shape[::-1], jnp.float32), chunks.hidden
    sums, dw_DV, dhidden = jax.lax.fori_loop(0, len(chunks.hidden), add_chunk, start)
    b, t, d = tokens.hidden.shape
    return sums, (dhidden.reshape(-1, d)[: b * t].reshape(b, t, d), transpose_product(dw_DV))


def _backward(options: _Options, gradients: Gradients, g: Sums) -> tuple[_Tokens, jax.Array]:
    dhidden_BTD, dw_VD = gradients
    return _Tokens._make((dhidden_BTD * g[0].astype(dhidden_BTD.dtype), None, None)), dw_VD * g[0]


_sums.defvjp(_forward, _backward)
