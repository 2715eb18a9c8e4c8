"""Causal self-attention that never holds a T x T array.

Shapes: B rows, T positions, H heads, G heads of keys and values, K channels of a head, Q queries of a block, S keys of
a block, N = T / Q blocks.

`blockwise` is FlashAttention (Dao et al. 2022, arXiv:2205.14135) in plain JAX: queries go block by block, each block
sees only the keys at or before it, softmax statistics are float32, and the backward pass recomputes the weights from
the saved log-sum-exp. It runs on every backend, and can do everything. On GPUs `cudnn` is NVIDIA's own flash kernel,
for plain causal attention, and `pallas` (flash.py) is ours, for packed documents and dropout.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import Config
from jaxlm.errors import UserError
from jaxlm.model.dropout import keep_mask
from jaxlm.ops.flash import MAX_HEAD_SIZE, flash_attention
from jaxlm.ops.matmul import on_cpu, product

FUSED = ("cudnn", "pallas")  # kernels, in the order of preference
FUSED_FROM = 8.0  # compute capability, that of the A100
BLOCK = 128  # queries a block: of 64, 128, 256 and 512, 64 and 128 were the fastest on 2 CPU cores at 512 tokens
UNROLL = 8  # up to this many blocks are unrolled, each against its whole prefix; longer sequences loop over key blocks
_MASKED = -1e30  # finite, so that a row of masked scores gives no NaN


def compute_capability(device: jax.Device) -> float | None:
    """Of an NVIDIA GPU, such as 9.0; None for a CPU."""
    return float(device.compute_capability) if device.platform == "gpu" else None


def obstacle(kernel: str, config: Config, capability: float | None) -> str | None:
    """Why a fused kernel, "cudnn" or "pallas", can't do what the configuration needs; None if it can.

    Args:
      capability: the GPU's, as `compute_capability` gives it.
    """
    model, training = config.model, config.training
    head_size = model.d_model // model.n_heads
    if capability is None:
        return "needs an NVIDIA GPU"
    if capability < FUSED_FROM:
        return f"needs a GPU of compute capability {FUSED_FROM:g} or later, not {capability:g}"
    if not training.use_amp:
        return "has no float32 (training.use_amp false)"
    if kernel == "pallas":
        if head_size > MAX_HEAD_SIZE:
            return f"needs a head size up to {MAX_HEAD_SIZE}, not {head_size}"
        return "can't be split over devices (training.tensor_parallel)" if training.tensor_parallel > 1 else None
    if config.data.pack_sequences:
        return "can't keep packed documents apart (data.pack_sequences)"
    if model.attention_dropout:
        return "has no dropout that a resumed run can repeat (model.attention_dropout)"
    largest = 256 if capability >= 9 else 128
    fits = head_size % 8 == 0 and head_size <= largest
    return None if fits else f"needs a head size that is a multiple of 8 up to {largest}, not {head_size}"


def choose_attention(config: Config, capability: float | None) -> str:
    """The kernel that a run uses: cuDNN's where it can do what the run needs, else ours, else blockwise.

    Raises:
      UserError: the configuration asks for a kernel that can't do it on this device.
    """
    asked = config.model.attention
    if asked == "auto":
        return next((kernel for kernel in FUSED if obstacle(kernel, config, capability) is None), "blockwise")
    why = obstacle(asked, config, capability) if asked in FUSED else None
    if why is not None:
        raise UserError(f"model.attention ({asked}) {why}; use auto or blockwise")
    return asked


def why_not_fused(config: Config, capability: float | None) -> str | None:
    """Why a run on a GPU that might have a fused kernel has none; None if it has one, or on a CPU."""
    if capability is None or config.model.attention != "auto" or choose_attention(config, capability) in FUSED:
        return None
    return f"pallas {obstacle('pallas', config, capability)}"


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
      implementation: "blockwise", "cudnn" (needs a GPU, 16-bit inputs, no segments, no dropout) or "pallas" (needs a
        GPU, or is interpreted; the positions of a segment lie together).
      key_B2: uint32 dropout key of each row; None: no dropout.
      rate: dropout rate of the attention weights.

    Returns:
      [B, T, H, K] in the dtype of `q_BTHK`.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q_BTHK, k_BTGK, v_BTGK, is_causal=True, implementation="cudnn")
    if implementation == "pallas":
        return flash_attention(q_BTHK, k_BTGK, v_BTGK, segments_BT, key_B2, rate)
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


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` of arrays whose first two axes are rows and heads, in float32.

    On CPU the two are one axis meanwhile. By that XLA leaves a transposition before the product alone; one that it
    takes into a product it can't do in 16 bits, and in float32 with one of its slower programs.
    """

    def one_axis(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y, shape = x.reshape(-1, *x.shape[2:]), y.reshape(-1, *y.shape[2:]), x.shape[:2]
        z = on_cpu(spec.replace("bh", "b"), x, y)
        return z.reshape(*shape, *z.shape[1:])

    direct = functools.partial(jnp.einsum, spec, preferred_element_type=jnp.float32)
    return jax.lax.platform_dependent(x, y, cpu=one_axis, default=direct)


def _scores(q_BHQK: jax.Array, k_BHSK: jax.Array, segments: Any, q0: Any, k0: Any) -> jax.Array:
    """Masked, scaled float32 scores [B, H, S, Q] of queries from position q0 on and keys from k0 on."""
    s_BHSQ = _product("bhsk,bhqk->bhsq", k_BHSK, q_BHQK) * q_BHQK.shape[-1] ** -0.5
    k_positions = k0 + jnp.arange(k_BHSK.shape[2])[:, None]
    q_positions = q0 + jnp.arange(q_BHQK.shape[2])[None, :]
    visible = (k_positions <= q_positions)[None, None]
    if segments is not None:
        q_segments, k_segments = segments
        visible = visible & (k_segments[:, None, :, None] == q_segments[:, None, None, :])
    return jnp.where(visible, s_BHSQ, _MASKED)


def _add(total: jax.Array, part: jax.Array, start: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(total, _slice(total, start, part.shape[3], 3) + part, start, axis=3)


def _keep(key_B2: jax.Array, shape: tuple[int, ...], q0: Any, k0: Any, rate: float) -> jax.Array:
    """Dropout mask [B, H, S, Q], a function of the row's key, the head and the two positions alone."""
    _, h, s, q = shape
    heads = jnp.arange(h, dtype=jnp.uint32)[:, None, None]
    keys = (jnp.asarray(k0, jnp.uint32) + jnp.arange(s, dtype=jnp.uint32))[None, :, None]
    queries = (jnp.asarray(q0, jnp.uint32) + jnp.arange(q, dtype=jnp.uint32))[None, None, :]
    return keep_mask(key_B2, (heads, queries, keys), rate)


def _slice(x: jax.Array | None, start: Any, size: int, axis: int) -> Any:
    if x is None:
        return None
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def _over_blocks(body: Any, carry: Any, blocks: int) -> tuple[Any, Any]:
    """`lax.scan` of `body(carry, i)` over the blocks, unrolled with static `i` while they are few.

    Outputs [B, H, S, ...] of the blocks are joined to [B, H, N * S, ...].
    """
    if blocks > UNROLL:
        carry, out_N = jax.lax.scan(body, carry, jnp.arange(blocks))
        return carry, jax.tree.map(_join, out_N)
    outs = []
    for i in range(blocks):
        carry, out = body(carry, i)
        outs.append(out)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *outs)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, key: jax.Array, size: int, rate: float
) -> tuple[jax.Array, jax.Array]:
    """Output [B, H, T, K] and log-sum-exp [B, H, T]."""
    b, h, t, d = q.shape
    v_BHKT = v.swapaxes(2, 3)

    def query_block(_: None, i: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
        q0 = i * size
        q_i, segments_i = _slice(q, q0, size, 2), _slice(segments, q0, size, 1)

        def keys(carry: Any, k0: Any, n: int) -> Any:
            m_BH1Q, total_BH1Q, acc_BHKQ = carry
            both = None if segments is None else (segments_i, _slice(segments, k0, n, 1))
            s_BHSQ = _scores(q_i, _slice(k, k0, n, 2), both, q0, k0)
            m_new = jnp.maximum(m_BH1Q, s_BHSQ.max(2, keepdims=True))
            p_BHSQ = jnp.exp(s_BHSQ - m_new)
            shrink = jnp.exp(m_BH1Q - m_new)
            total_BH1Q = total_BH1Q * shrink + p_BHSQ.sum(2, keepdims=True)
            if rate:
                p_BHSQ = jnp.where(_keep(key, p_BHSQ.shape, q0, k0, rate), p_BHSQ * (1 / (1 - rate)), 0.0)
            pv_BHKQ = _product("bhks,bhsq->bhkq", _slice(v_BHKT, k0, n, 3), p_BHSQ.astype(v.dtype))
            return m_new, total_BH1Q, acc_BHKQ * shrink + pv_BHKQ

        zero = jnp.zeros((b, h, 1, size), jnp.float32)
        carry = (zero + _MASKED, zero, jnp.zeros((b, h, d, size), jnp.float32))
        if isinstance(i, int):
            m, total, acc = keys(carry, 0, q0 + size)
        else:
            m, total, acc = jax.lax.fori_loop(0, i + 1, lambda j, c: keys(c, j * size, size), carry)
        out_BHQK = (acc / total).astype(q.dtype).swapaxes(2, 3)
        return None, (out_BHQK, (m + jnp.log(total))[:, :, 0])

    return _over_blocks(query_block, None, t // size)[1]


def _join(x_NBHS: jax.Array) -> jax.Array:
    """[N, B, H, S, ...] -> [B, H, N * S, ...]."""
    n, b, h, s = x_NBHS.shape[:4]
    return jnp.moveaxis(x_NBHS, 0, 2).reshape(b, h, n * s, *x_NBHS.shape[4:])


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
    """Gradients of q, k and v, key block by key block, each against the queries at or after it.

    Scores stand as [keys, queries], so that no product contracts over the first axis of its first factor, which is
    two to four times as slow on CPU.
    """
    q, k, v, segments, key, out, lse = saved
    scale = q.shape[-1] ** -0.5
    t = q.shape[2]
    along = (g.astype(jnp.float32) * out.astype(jnp.float32)).reshape(-1, t, q.shape[-1])  # as in layers.normalised
    delta_BHT = along.sum(-1).reshape(lse.shape)

    def key_block(dq_BHKT: jax.Array, j: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        k0 = j * size
        k_j, v_j, segments_j = _slice(k, k0, size, 2), _slice(v, k0, size, 2), _slice(segments, k0, size, 1)
        k_BHKS = k_j.swapaxes(2, 3)

        def queries(carry: Any, q0: Any, n: int) -> Any:
            dq_BHKT, dk_j, dv_j = carry
            q_i, g_i, lse_i, delta_i = (_slice(x, q0, n, 2) for x in (q, g, lse, delta_BHT))
            both = None if segments is None else (_slice(segments, q0, n, 1), segments_j)
            s_BHSQ = _scores(q_i, k_j, both, q0, k0)
            p_BHSQ = jnp.exp(s_BHSQ - lse_i[:, :, None])
            dp_BHSQ = _product("bhsk,bhqk->bhsq", v_j, g_i)
            dropped = p_BHSQ
            if rate:
                keep = _keep(key, p_BHSQ.shape, q0, k0, rate)
                dropped, dp_BHSQ = (jnp.where(keep, x * (1 / (1 - rate)), 0.0) for x in (p_BHSQ, dp_BHSQ))
            ds_BHSQ = (p_BHSQ * (dp_BHSQ - delta_i[:, :, None]) * scale).astype(q.dtype)
            dq_BHKQ = _product("bhks,bhsq->bhkq", k_BHKS, ds_BHSQ)
            dk_j = dk_j + _product("bhsq,bhqk->bhsk", ds_BHSQ, q_i)
            dv_j = dv_j + _product("bhsq,bhqk->bhsk", dropped.astype(g.dtype), g_i)
            return _add(dq_BHKT, dq_BHKQ, q0), dk_j, dv_j

        zeros = jnp.zeros(k_j.shape, jnp.float32)
        carry = (dq_BHKT, zeros, zeros)
        if isinstance(j, int):
            dq_BHKT, dk_j, dv_j = queries(carry, k0, t - k0)
        else:
            dq_BHKT, dk_j, dv_j = jax.lax.fori_loop(j, t // size, lambda i, c: queries(c, i * size, size), carry)
        return dq_BHKT, (dk_j.astype(k.dtype), dv_j.astype(v.dtype))

    b, h, _, d = q.shape
    dq_BHKT, (dk, dv) = _over_blocks(key_block, jnp.zeros((b, h, d, t), jnp.float32), t // size)
    return dq_BHKT.swapaxes(2, 3).astype(q.dtype), dk, dv, None, None


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
    s_BGRT = product("bgrk,bgtk->bgrt", q_BGRK, k_BGTK) * k**-0.5
    visible_BT = jnp.arange(k_BGTK.shape[2])[None] < length_B[:, None]
    p_BGRT = jax.nn.softmax(jnp.where(visible_BT[:, None, None], s_BGRT, _MASKED), axis=-1)
    y_BGRK = product("bgrt,bgtk->bgrk", p_BGRT.astype(v_BGTK.dtype), v_BGTK)
    return y_BGRK.reshape(b, 1, h, k).astype(q_B1HK.dtype)
