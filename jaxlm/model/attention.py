"""Causal self-attention that never holds a T x T array.

Shapes: B rows, T positions, H heads, G heads of keys and values, K channels of a head, Q queries of a block, S keys of
a block, N = T / Q blocks.

`blockwise` is FlashAttention (Dao et al. 2022, arXiv:2205.14135) in plain JAX: queries go block by block, each block
sees only the keys at or before it, softmax statistics are float32, and the backward pass recomputes the weights from
the saved log-sum-exp. It runs on every backend and honours segments and attention dropout. `cudnn` is NVIDIA's own
flash kernel, for plain causal attention only.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import DataConfig, ModelConfig, TrainingConfig
from jaxlm.errors import UserError
from jaxlm.model.dropout import keep_mask

BLOCK = 128  # queries a block: of 64, 128, 256 and 512, 64 and 128 were the fastest on 2 CPU cores at 512 tokens
UNROLL = 8  # up to this many blocks are unrolled, each against its whole prefix; longer sequences loop over key blocks
_MASKED = -1e30  # finite, so that a row of masked scores gives no NaN


def choose_attention(model: ModelConfig, training: TrainingConfig, data: DataConfig, platform: str) -> str:
    """The kernel that a run uses: cuDNN's where it can do what the run needs, unless the configuration says otherwise.

    Raises:
      UserError: the configuration asks for a kernel that does not run here.
    """
    if model.attention == "cudnn" and platform != "gpu":
        raise UserError("model.attention (cudnn) needs an NVIDIA GPU; use auto or blockwise")
    head_size = model.d_model // model.n_heads
    plain = not data.pack_sequences and not model.attention_dropout and training.use_amp
    fits = platform == "gpu" and plain and head_size % 8 == 0 and head_size <= 128
    if model.attention == "cudnn" and not fits:
        raise UserError(f"model.attention (cudnn) needs a head size that is a multiple of 8 up to 128, not {head_size}")
    return "cudnn" if fits and model.attention != "blockwise" else "blockwise"


def causal_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array | None,
    *,
    implementation: str,
    key_B2: jax.Array | None = None,
    rate: float = 0.0,
) -> jax.Array:
    """Softmax attention, each position to itself and what came before it in its segment.

    Query head h sees head h * G // H of keys and values; G divides H.

    Args:
      segments_BT: int32; positions of different segments don't see each other. None: one segment.
      implementation: "blockwise" or "cudnn" (needs a GPU, 16-bit inputs, no segments, no dropout).
      key_B2: uint32 dropout key of each row; None: no dropout.
      rate: dropout rate of the attention weights.

    Returns:
      [B, T, H, K] in the dtype of `q_BTHK`.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q_BTHK, k_BTGK, v_BTGK, is_causal=True, implementation="cudnn")
    if key_B2 is None:
        rate = 0.0
    groups = q_BTHK.shape[2] // k_BTGK.shape[2]
    k_BTHK, v_BTHK = (jnp.repeat(x, groups, axis=2) if groups > 1 else x for x in (k_BTGK, v_BTGK))
    b, t, _, _ = q_BTHK.shape
    blocks = -(-t // BLOCK)
    size = -(-t // blocks)
    padding = blocks * size - t
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3) for x in (q_BTHK, k_BTHK, v_BTHK)
    )
    if segments_BT is not None:
        segments_BT = jnp.pad(segments_BT, ((0, 0), (0, padding)))
    key = jnp.zeros((b, 2), jnp.uint32) if key_B2 is None else key_B2
    out_BHTK = _flash(q, k, v, segments_BT, key, size, rate)
    return out_BHTK.transpose(0, 2, 1, 3)[:, :t]


def _scores(q_BHQK: jax.Array, k_BHSK: jax.Array, segments: Any, q0: Any, k0: Any) -> jax.Array:
    """Masked, scaled float32 scores [B, H, Q, S] of queries from position q0 on and keys from k0 on."""
    scale = q_BHQK.shape[-1] ** -0.5
    s_BHQS = jnp.einsum("bhqk,bhsk->bhqs", q_BHQK, k_BHSK, preferred_element_type=jnp.float32) * scale
    q_positions = q0 + jnp.arange(q_BHQK.shape[2])[:, None]
    k_positions = k0 + jnp.arange(k_BHSK.shape[2])[None, :]
    visible = (k_positions <= q_positions)[None, None]
    if segments is not None:
        q_segments, k_segments = segments
        visible = visible & (q_segments[:, None, :, None] == k_segments[:, None, None, :])
    return jnp.where(visible, s_BHQS, _MASKED)


def _keep(key_B2: jax.Array, shape: tuple[int, ...], q0: Any, k0: Any, rate: float) -> jax.Array:
    """Dropout mask [B, H, Q, S], a function of the row's key, the head and the two positions alone."""
    _, h, q, s = shape
    heads = jnp.arange(h, dtype=jnp.uint32)[:, None, None]
    queries = (jnp.asarray(q0, jnp.uint32) + jnp.arange(q, dtype=jnp.uint32))[None, :, None]
    keys = (jnp.asarray(k0, jnp.uint32) + jnp.arange(s, dtype=jnp.uint32))[None, None, :]
    return keep_mask(key_B2, (heads, queries, keys), rate)


def _slice(x: jax.Array | None, start: Any, size: int, axis: int) -> Any:
    if x is None:
        return None
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def _over_query_blocks(body: Any, carry: Any, blocks: int) -> tuple[Any, Any]:
    """`lax.scan` of `body(carry, i)` over the blocks, unrolled with static `i` while they are few."""
    if blocks > UNROLL:
        return jax.lax.scan(body, carry, jnp.arange(blocks))
    outs = []
    for i in range(blocks):
        carry, out = body(carry, i)
        outs.append(out)
    return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *outs)


def _over_key_blocks(body: Any, carry: Any, i: Any, size: int) -> Any:
    """Folds `body(carry, k0, n)` over the keys that query block `i` sees: its whole prefix, or block by block."""
    if isinstance(i, int):
        return body(carry, 0, (i + 1) * size)
    return jax.lax.fori_loop(0, i + 1, lambda j, c: body(c, j * size, size), carry)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, key: jax.Array, size: int, rate: float
) -> tuple[jax.Array, jax.Array]:
    """Output [B, H, T, K] and log-sum-exp [B, H, T, 1]."""
    b, h, t, d = q.shape

    def query_block(_: None, i: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
        q0 = i * size
        q_i = _slice(q, q0, size, 2)
        segments_i = _slice(segments, q0, size, 1)

        def key_block(carry: Any, k0: Any, n: int) -> Any:
            m, total, acc = carry
            both = None if segments is None else (segments_i, _slice(segments, k0, n, 1))
            s = _scores(q_i, _slice(k, k0, n, 2), both, q0, k0)
            m_new = jnp.maximum(m, s.max(-1, keepdims=True))
            p = jnp.exp(s - m_new)
            shrink = jnp.exp(m - m_new)
            total = total * shrink + p.sum(-1, keepdims=True)
            if rate:
                p = jnp.where(_keep(key, p.shape, q0, k0, rate), p * (1 / (1 - rate)), 0.0)
            pv = jnp.einsum(
                "bhqs,bhsk->bhqk", p.astype(v.dtype), _slice(v, k0, n, 2), preferred_element_type=jnp.float32
            )
            return m_new, total, acc * shrink + pv

        zero = jnp.zeros((b, h, size, 1), jnp.float32)
        m, total, acc = _over_key_blocks(
            key_block, (zero + _MASKED, zero, jnp.zeros((b, h, size, d), jnp.float32)), i, size
        )
        return None, ((acc / total).astype(q.dtype), m + jnp.log(total))

    _, (out_N, lse_N) = _over_query_blocks(query_block, None, t // size)
    return _join(out_N), _join(lse_N)


def _join(x_NBHQK: jax.Array) -> jax.Array:
    n, b, h, q, k = x_NBHQK.shape
    return x_NBHQK.transpose(1, 2, 0, 3, 4).reshape(b, h, n * q, k)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _flash(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, key: jax.Array, size: int, rate: float
) -> jax.Array:
    return _forward(q, k, v, segments, key, size, rate)[0]


def _flash_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, key: jax.Array, size: int, rate: float
) -> tuple[jax.Array, Any]:
    out, lse = _forward(q, k, v, segments, key, size, rate)
    return out, (q, k, v, segments, key, out, lse)


def _flash_backward(size: int, rate: float, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    q, k, v, segments, key, out, lse = saved
    scale = q.shape[-1] ** -0.5
    delta = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)

    def add(total: jax.Array, part: jax.Array, start: Any) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(total, _slice(total, start, part.shape[2], 2) + part, start, axis=2)

    def query_block(carry: Any, i: Any) -> tuple[Any, jax.Array]:
        q0 = i * size
        q_i, g_i, lse_i, delta_i = (_slice(x, q0, size, 2) for x in (q, g, lse, delta))
        segments_i = _slice(segments, q0, size, 1)

        def key_block(carry: Any, k0: Any, n: int) -> Any:
            dq_i, dk, dv = carry
            k_j, v_j = _slice(k, k0, n, 2), _slice(v, k0, n, 2)
            both = None if segments is None else (segments_i, _slice(segments, k0, n, 1))
            p = jnp.exp(_scores(q_i, k_j, both, q0, k0) - lse_i)
            dp = jnp.einsum("bhqk,bhsk->bhqs", g_i, v_j, preferred_element_type=jnp.float32)
            dropped = p
            if rate:
                keep = _keep(key, p.shape, q0, k0, rate)
                dropped, dp = (jnp.where(keep, x * (1 / (1 - rate)), 0.0) for x in (p, dp))
            ds = (p * (dp - delta_i) * scale).astype(q.dtype)
            dq_i = dq_i + jnp.einsum("bhqs,bhsk->bhqk", ds, k_j, preferred_element_type=jnp.float32)
            dk_j = jnp.einsum("bhqs,bhqk->bhsk", ds, q_i, preferred_element_type=jnp.float32)
            dv_j = jnp.einsum("bhqs,bhqk->bhsk", dropped.astype(g.dtype), g_i, preferred_element_type=jnp.float32)
            return dq_i, add(dk, dk_j, k0), add(dv, dv_j, k0)

        dq_i, dk, dv = _over_key_blocks(key_block, (jnp.zeros(q_i.shape, jnp.float32), *carry), i, size)
        return (dk, dv), dq_i.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq_N = _over_query_blocks(query_block, (zeros, zeros), q.shape[2] // size)
    return _join(dq_N), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_flash.defvjp(_flash_forward, _flash_backward)


def write_cache(cache_BGTK: jax.Array, new_B1GK: jax.Array, position_B: jax.Array) -> jax.Array:
    """The keys or values of a cache with one new position a row, at index `position_B`."""
    rows = jnp.arange(len(position_B))
    return cache_BGTK.at[rows, :, position_B].set(new_B1GK[:, 0].astype(cache_BGTK.dtype))


def cached_attention(q_B1HK: jax.Array, k_BGTK: jax.Array, v_BGTK: jax.Array, length_B: jax.Array) -> jax.Array:
    """One query a row against the first `length_B` entries of its key and value cache; [B, 1, H, K] in its own dtype.

    A cache has its heads before its positions, so that what one head reads lies together: on CPU, with each layer's in
    an array of its own, decoding 16 rows is 5 times as fast as with [L, B, T, G, K].
    """
    b, _, h, k = q_B1HK.shape
    q_BGRK = q_B1HK.reshape(b, k_BGTK.shape[1], -1, k).astype(k_BGTK.dtype)  # R query heads share a head of keys
    s_BGRT = jnp.einsum("bgrk,bgtk->bgrt", q_BGRK, k_BGTK, preferred_element_type=jnp.float32) * k**-0.5
    visible_BT = jnp.arange(k_BGTK.shape[2])[None] < length_B[:, None]
    p_BGRT = jax.nn.softmax(jnp.where(visible_BT[:, None, None], s_BGRT, _MASKED), axis=-1)
    y_BGRK = jnp.einsum("bgrt,bgtk->bgrk", p_BGRT.astype(v_BGTK.dtype), v_BGTK)
    return y_BGRK.reshape(b, 1, h, k).astype(q_B1HK.dtype)
