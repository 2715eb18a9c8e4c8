"""Causal attention in plain JAX that never holds a T x T array, for every backend.

Shapes: B rows, T positions, H query heads, G heads of keys and values, K channels of a head, Q queries of a block, S
keys of a block, N = T / Q blocks.

FlashAttention (Dao et al. 2022, arXiv:2205.14135): each block of queries sees only the keys at or before it, softmax
statistics are float32, and the backward pass recomputes the weights from the saved log-sum-exp.

Scores are [keys, queries], so that no product contracts over the first axis of its first factor, which is two to four
times as slow on CPU.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.ops.masks import MASKED, keep_mask
from jaxlm.ops.matmul import einsum

BLOCK = 128  # queries a block: of 64, 128, 256 and 512, 64 and 128 were the fastest on 2 CPU cores at 512 tokens
UNROLL = 8  # up to this many blocks are unrolled, each against its whole prefix; longer sequences loop over key blocks

Index = int | jax.Array  # static in unrolled blocks, traced in loops
Segments = tuple[jax.Array | None, jax.Array | None]  # of queries [B, Q] and keys [B, S]


class _Inputs(NamedTuple):
    """Queries, keys and values [B, H, T, K], segments int32 [B, T] and dropout key uint32 [B, 2]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    segments: jax.Array | None
    key: jax.Array | None


Residuals = tuple[_Inputs, jax.Array, jax.Array]  # with the output [B, H, T, K] and the log-sum-exp [B, H, T]


def blockwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    key: jax.Array | None,
    rate: float,
    softcap: float | None = None,
) -> jax.Array:
    """`attention_kernels.causal_attention`, [B, T, H, K]."""
    t, shared = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, shared, axis=2) if shared > 1 else x for x in (k, v))
    blocks = -(-t // BLOCK)
    size = -(-t // blocks)
    padding = (0, blocks * size - t)
    q, k, v = (jnp.pad(x, ((0, 0), padding, (0, 0), (0, 0))).transpose(0, 2, 1, 3) for x in (q, k, v))
    segments = None if segments is None else jnp.pad(segments, ((0, 0), padding))
    out_BHTK = _attention(_Inputs(q, k, v, segments, key), size, 0.0 if key is None else rate, softcap)
    return out_BHTK.transpose(0, 2, 1, 3)[:, :t]


def dropout_mask(key_B2: jax.Array | None, shape: tuple[int, ...], q0: Index, k0: Index, rate: float) -> jax.Array:
    """Which weights to keep, bool [B, H, S, Q] (`shape`), of queries from position q0 on and keys from k0 on.

    It depends on the row's key, the head and the two positions alone.
    """
    assert key_B2 is not None
    _, h, s, q = shape
    heads = jnp.arange(h, dtype=jnp.uint32)[:, None, None]
    keys = (jnp.asarray(k0, jnp.uint32) + jnp.arange(s, dtype=jnp.uint32))[None, :, None]
    queries = (jnp.asarray(q0, jnp.uint32) + jnp.arange(q, dtype=jnp.uint32))[None, None, :]
    return keep_mask(key_B2, (heads, queries, keys), rate)


def _scores(
    q_BHQK: jax.Array, k_BHSK: jax.Array, segments: Segments, q0: Index, k0: Index, softcap: float | None
) -> jax.Array:
    """Masked, scaled float32 scores [B, H, S, Q] of queries from position q0 on and keys from k0 on."""
    s_BHSQ = einsum("bhsk,bhqk->bhsq", k_BHSK, q_BHQK, jnp.float32) * q_BHQK.shape[-1] ** -0.5
    if softcap is not None:
        s_BHSQ = softcap * jnp.tanh(s_BHSQ / softcap)
    k_positions = k0 + jnp.arange(k_BHSK.shape[2])[:, None]
    q_positions = q0 + jnp.arange(q_BHQK.shape[2])[None, :]
    visible = (k_positions <= q_positions)[None, None]
    q_segments, k_segments = segments
    if q_segments is not None and k_segments is not None:
        visible = visible & (k_segments[:, None, :, None] == q_segments[:, None, None, :])
    return jnp.where(visible, s_BHSQ, MASKED)


def _slice(x: jax.Array, start: Index, size: int, axis: int = 2) -> jax.Array:
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def _segments(x: _Inputs, start: Index, size: int) -> jax.Array | None:
    return None if x.segments is None else _slice(x.segments, start, size, 1)


def _add_at(total: jax.Array, part: jax.Array, start: Index) -> jax.Array:
    """`total`, with `part` added from index `start` of the last axis on."""
    return jax.lax.dynamic_update_slice_in_dim(total, _slice(total, start, part.shape[3], 3) + part, start, axis=3)


def _over_blocks(body: Callable[[Any, Index], tuple[Any, Any]], carry: Any, blocks: int) -> tuple[Any, Any]:
    """`lax.scan` of `body(carry, i)` over the blocks, unrolled with static `i` while they are few.

    Outputs [B, H, S, ...] of the blocks are joined to [B, H, N * S, ...].
    """
    if blocks > UNROLL:
        carry, out_N = jax.lax.scan(body, carry, jnp.arange(blocks))
        join = lambda x: jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:])  # noqa: E731
        return carry, jax.tree.map(join, out_N)
    outs = []
    for i in range(blocks):
        carry, out = body(carry, i)
        outs.append(out)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *outs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _attention(x: _Inputs, size: int, rate: float, softcap: float | None) -> jax.Array:
    """[B, H, T, K], by blocks of `size` queries."""
    return _forward(x, size, rate, softcap)[0]


def _forward(x: _Inputs, size: int, rate: float, softcap: float | None) -> tuple[jax.Array, Residuals]:
    """Output [B, H, T, K], query block by query block, and what the backward pass needs."""
    b, h, t, d = x.q.shape
    v_BHKT = x.v.swapaxes(2, 3)

    def query_block(_: None, i: Index) -> tuple[None, tuple[jax.Array, jax.Array]]:
        q0 = i * size
        q_i, segments_i = _slice(x.q, q0, size), _segments(x, q0, size)

        def add_keys(carry: tuple[jax.Array, ...], k0: Index, n: int) -> tuple[jax.Array, ...]:
            """The running maximum, sum and output, with the keys from k0 to k0 + n."""
            max_BH1Q, total_BH1Q, acc_BHKQ = carry
            segments = segments_i, _segments(x, k0, n)
            s_BHSQ = _scores(q_i, _slice(x.k, k0, n), segments, q0, k0, softcap)
            new_BH1Q = jnp.maximum(max_BH1Q, s_BHSQ.max(2, keepdims=True))
            p_BHSQ = jnp.exp(s_BHSQ - new_BH1Q)
            shrink = jnp.exp(max_BH1Q - new_BH1Q)
            total_BH1Q = total_BH1Q * shrink + p_BHSQ.sum(2, keepdims=True)
            if rate:
                p_BHSQ = jnp.where(dropout_mask(x.key, p_BHSQ.shape, q0, k0, rate), p_BHSQ * (1 / (1 - rate)), 0.0)
            pv_BHKQ = einsum("bhks,bhsq->bhkq", _slice(v_BHKT, k0, n, 3), p_BHSQ.astype(x.v.dtype), jnp.float32)
            return new_BH1Q, total_BH1Q, acc_BHKQ * shrink + pv_BHKQ

        zero = jnp.zeros((b, h, 1, size), jnp.float32)
        carry = (zero + MASKED, zero, jnp.zeros((b, h, d, size), jnp.float32))
        if isinstance(i, int):
            max_BH1Q, total_BH1Q, acc_BHKQ = add_keys(carry, 0, (i + 1) * size)
        else:
            loop = lambda j, carry: add_keys(carry, j * size, size)  # noqa: E731
            max_BH1Q, total_BH1Q, acc_BHKQ = jax.lax.fori_loop(0, i + 1, loop, carry)
        out_BHQK = (acc_BHKQ / total_BH1Q).astype(x.q.dtype).swapaxes(2, 3)
        return None, (out_BHQK, (max_BH1Q + jnp.log(total_BH1Q))[:, :, 0])

    _, (out_BHTK, lse_BHT) = _over_blocks(query_block, None, t // size)
    return out_BHTK, (x, out_BHTK, lse_BHT)


def _backward(size: int, rate: float, softcap: float | None, saved: Residuals, g: jax.Array) -> tuple[_Inputs]:
    """Gradients of q, k and v, key block by key block, each against the queries at or after it."""
    x, out, lse_BHT = saved
    b, h, t, d = x.q.shape
    along = (g.astype(jnp.float32) * out.astype(jnp.float32)).reshape(-1, t, d)  # of [1, H, T, K] CPU sums are slow
    delta_BHT = along.sum(-1).reshape(lse_BHT.shape)

    def key_block(dq_BHKT: jax.Array, j: Index) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        k0 = j * size
        k_j, v_j, segments_j = _slice(x.k, k0, size), _slice(x.v, k0, size), _segments(x, k0, size)
        k_BHKS = k_j.swapaxes(2, 3)

        def add_queries(carry: tuple[jax.Array, ...], q0: Index, n: int) -> tuple[jax.Array, ...]:
            """The gradients, with what the queries from q0 to q0 + n add to them."""
            dq_BHKT, dk_j, dv_j = carry
            q_i, g_i, lse_i, delta_i = (_slice(y, q0, n) for y in (x.q, g, lse_BHT, delta_BHT))
            s_BHSQ = _scores(q_i, k_j, (_segments(x, q0, n), segments_j), q0, k0, softcap)
            p_BHSQ = jnp.exp(s_BHSQ - lse_i[:, :, None])
            dp_BHSQ = einsum("bhsk,bhqk->bhsq", v_j, g_i, jnp.float32)
            dropped = p_BHSQ
            if rate:
                keep = dropout_mask(x.key, p_BHSQ.shape, q0, k0, rate)
                dropped, dp_BHSQ = (jnp.where(keep, y * (1 / (1 - rate)), 0.0) for y in (p_BHSQ, dp_BHSQ))
            ds_BHSQ = p_BHSQ * (dp_BHSQ - delta_i[:, :, None]) * d**-0.5
            if softcap is not None:  # where a score is masked, its weight is 0 already
                ds_BHSQ = ds_BHSQ * (1 - jnp.square(jnp.maximum(s_BHSQ, -softcap) / softcap))
            ds_BHSQ = ds_BHSQ.astype(x.q.dtype)
            dq_BHKQ = einsum("bhks,bhsq->bhkq", k_BHKS, ds_BHSQ, jnp.float32)
            dk_j = dk_j + einsum("bhsq,bhqk->bhsk", ds_BHSQ, q_i, jnp.float32)
            dv_j = dv_j + einsum("bhsq,bhqk->bhsk", dropped.astype(g.dtype), g_i, jnp.float32)
            return _add_at(dq_BHKT, dq_BHKQ, q0), dk_j, dv_j

        zeros = jnp.zeros(k_j.shape, jnp.float32)
        carry = (dq_BHKT, zeros, zeros)
        if isinstance(j, int):
            dq_BHKT, dk_j, dv_j = add_queries(carry, k0, t - j * size)
        else:
            loop = lambda i, carry: add_queries(carry, i * size, size)  # noqa: E731
            dq_BHKT, dk_j, dv_j = jax.lax.fori_loop(j, t // size, loop, carry)
        return dq_BHKT, (dk_j.astype(x.k.dtype), dv_j.astype(x.v.dtype))

    dq_BHKT, (dk, dv) = _over_blocks(key_block, jnp.zeros((b, h, d, t), jnp.float32), t // size)
    return (x._replace(q=dq_BHKT.swapaxes(2, 3).astype(x.q.dtype), k=dk, v=dv, segments=None, key=None),)


_attention.defvjp(_forward, _backward)
