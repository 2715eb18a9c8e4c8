"""One Transformer block and what it is made of.

Shapes: B rows, T positions, D model width, F feed-forward width, H heads, G heads of keys and values, K channels of a
head; I and O, what a linear layer takes and gives.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig
from jaxlm.model.attention import cached_attention, causal_attention, write_cache
from jaxlm.model.dropout import dropout
from jaxlm.model.positions import rotate
from jaxlm.ops.matmul import on_cpu

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {  # of float32 values
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "swish": jax.nn.swish,
}
GATES = {"swiglu": "swish", "geglu": "gelu"}  # the activation of the gate
PRODUCT = "product"  # what recomputing with remat_policy dots keeps

Cache = tuple[jax.Array, jax.Array]  # keys and values of one layer: [B, T, G, K] as computed, [B, G, T, K] as kept


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` in the dtype of `x`.

    On CPU a 16-bit product is written in float32 and rounded afterwards: XLA's own 16-bit output takes 1.6x as long.
    """
    return jax.lax.platform_dependent(x, y, cpu=partial(_rounded, spec), default=lambda x, y: jnp.einsum(spec, x, y))


def _rounded(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return on_cpu(spec, x, y).astype(x.dtype)


@jax.custom_vjp
def matmul(x_BTI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """x @ w, all in one dtype, forward and backward; O is one axis or two."""
    o = "no"[1 - w_IO.ndim :]
    return _product(f"bti,i{o}->bt{o}", x_BTI, w_IO)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], g_BTO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTI, w_IO = saved
    o = "no"[1 - w_IO.ndim :]
    return _product(f"bt{o},i{o}->bti", g_BTO, w_IO), _weight_gradient(x_BTI, g_BTO, o)


def _weight_gradient(x_BTI: jax.Array, g_BTO: jax.Array, o: str) -> jax.Array:
    """The sum over the tokens of x times g, [I, O].

    XLA's CPU products transpose the first factor: in float32 slowly, together with what it was made from, so that there
    it is the narrower of the two.
    """

    def narrow_first(x: jax.Array, g: jax.Array) -> jax.Array:
        if x.dtype != jnp.float32 or x[0, 0].size <= g[0, 0].size:
            return _rounded(f"bti,bt{o}->i{o}", x, g)
        return jnp.moveaxis(jax.lax.optimization_barrier(_rounded(f"bt{o},bti->{o}i", g, x)), -1, 0)

    direct = partial(jnp.einsum, f"bti,bt{o}->i{o}")
    return jax.lax.platform_dependent(x_BTI, g_BTO, cpu=narrow_first, default=direct)


matmul.defvjp(lambda x, w: (matmul(x, w), (x, w)), _matmul_backward)


@jax.custom_vjp
def add_bias(x_BTO: jax.Array, b_O: jax.Array) -> jax.Array:
    """x + b in one dtype; O is one axis or two. The gradient of b is a product with ones: XLA's CPU sums are slow."""
    return x_BTO + b_O[None, None]


def _add_bias_backward(_: None, g_BTO: jax.Array) -> tuple[jax.Array, jax.Array]:
    o = "no"[2 - g_BTO.ndim :]
    return g_BTO, _product(f"bt,bt{o}->{o}", jnp.ones(g_BTO.shape[:2], g_BTO.dtype), g_BTO)


add_bias.defvjp(lambda x, b: (add_bias(x, b), None), _add_bias_backward)


def _activated(x: jax.Array, name: str) -> jax.Array:
    wide = x.astype(jnp.float32)
    y = ACTIVATIONS[GATES[name]](wide[:, :, 0]) * wide[:, :, 1] if name in GATES else ACTIVATIONS[name](wide)
    return y.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def activate(x: jax.Array, name: str) -> jax.Array:
    """The feed-forward activation, computed in float32: [B, T, F] of [B, T, F], or of [B, T, 2, F] if it is gated.

    The backward pass keeps `x` alone, and makes the rest again.
    """
    return _activated(x, name)


def _activate_backward(name: str, x: jax.Array, g_BTF: jax.Array) -> tuple[jax.Array]:
    x, g_BTF = jax.lax.optimization_barrier((x, g_BTF))  # or XLA finds it made already, and keeps it
    return jax.vjp(partial(_activated, name=name), x)[1](g_BTF)


activate.defvjp(lambda x, name: (activate(x, name), x), _activate_backward)


class Linear(nnx.Module):
    """x @ kernel + bias with GPT-2's initialisation: normal weights of `std`, zero biases (none without `use_bias`).

    Parameters are float32, computation is in `dtype`. `d_out` may have two axes: the kernel is then several matrices.
    """

    def __init__(
        self, d_in: int, d_out: tuple[int, ...], std: float, dtype: Any, rngs: nnx.Rngs, *, use_bias: bool = True
    ):
        self.dtype, self.use_bias = dtype, use_bias
        self.kernel = nnx.Param(nnx.initializers.normal(std)(rngs.params(), (d_in, *d_out)))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(d_out))

    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        y_BTO = matmul(x_BTI.astype(self.dtype), self.kernel[...].astype(self.dtype))
        if self.use_bias:
            y_BTO = add_bias(y_BTO, self.bias[...].astype(self.dtype))
        return checkpoint_name(y_BTO, PRODUCT)


def make_norm(config: ModelConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    """The norm of the residual stream that `config.norm` names; statistics are float32.

    RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if config.norm == "rmsnorm":
        return nnx.RMSNorm(config.d_model, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
    epsilon, use_bias = config.norm_epsilon, config.use_bias
    return nnx.LayerNorm(config.d_model, epsilon=epsilon, use_bias=use_bias, dtype=dtype, rngs=rngs)


def normalised(norm: nnx.LayerNorm | nnx.RMSNorm, x_BTD: jax.Array) -> jax.Array:
    """`norm` of each token. The tokens are one axis meanwhile: of a single row XLA's CPU sums take 15 times as long."""
    return norm(x_BTD.reshape(-1, x_BTD.shape[-1])).reshape(x_BTD.shape)


class Attention(nnx.Module):
    """Multi-head causal self-attention with its projections.

    Queries, keys and values come from one kernel [D, 3, D]; with fewer heads of keys and values than of queries
    (grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245) from two, [D, D] and [D, 2, G * K]. The axis of 3
    or 2 lets heads be split over devices.
    """

    def __init__(self, config: ModelConfig, implementation: str, dtype: Any, rngs: nnx.Rngs):
        self.config, self.implementation = config, implementation
        d, bias = config.d_model, config.use_bias
        head_size = d // config.n_heads
        if config.kv_heads == config.n_heads:
            self.qkv = Linear(d, (3, d), 0.02, dtype, rngs, use_bias=bias)
        else:
            self.q = Linear(d, (d,), 0.02, dtype, rngs, use_bias=bias)
            self.kv = Linear(d, (2, config.kv_heads * head_size), 0.02, dtype, rngs, use_bias=bias)
        self.out = Linear(d, (d,), 0.02 / (2 * config.n_layers) ** 0.5, dtype, rngs, use_bias=bias)
        if config.qk_norm:
            self.q_norm = nnx.RMSNorm(head_size, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
            self.k_norm = nnx.RMSNorm(head_size, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)

    def heads(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, K], keys and values [B, T, G, K]; normalised and rotated as the configuration says."""
        b, t, d = x_BTD.shape
        config = self.config
        if config.kv_heads == config.n_heads:
            flat = jax.lax.split(self.qkv(x_BTD), (1, 1, 1), axis=2)  # its gradient joins them; that of slices adds
        else:
            flat = [self.q(x_BTD), *jax.lax.split(self.kv(x_BTD), (1, 1), axis=2)]
        q, k, v = (x.reshape(b, t, -1, d // config.n_heads) for x in flat)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.positions == "rotary":
            q, k = (rotate(x, positions_BT, config) for x in (q, k))
        return q, k, v

    def __call__(
        self, x_BTD: jax.Array, segments_BT: jax.Array | None, positions_BT: jax.Array, key_B2: jax.Array | None
    ) -> tuple[jax.Array, Cache]:
        q, k, v = self.heads(x_BTD, positions_BT)
        y_BTHK = causal_attention(
            q,
            k,
            v,
            segments_BT,
            implementation=self.implementation,
            key_B2=key_B2,
            rate=self.config.attention_dropout,
        )
        return self.out(y_BTHK.reshape(x_BTD.shape)), (k, v)

    def decode(self, x_B1D: jax.Array, position_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        q, k, v = self.heads(x_B1D, position_B[:, None])
        keys, values = (write_cache(old, new, position_B) for old, new in zip(cache, (k, v), strict=True))
        y_B1HK = cached_attention(q, keys, values, position_B + 1)
        return self.out(y_B1HK.reshape(x_B1D.shape)), (keys, values)


class Mlp(nnx.Module):
    """Two linear layers around an activation.

    Gated (Shazeer 2020, arXiv:2002.05202), `up` is two matrices, [D, 2, F]: the gate, which the activation is for, and
    what it is multiplied with.
    """

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs):
        self.activation = config.activation
        d, f, bias = config.d_model, config.d_ff, config.use_bias
        self.up = Linear(d, (2, f) if config.activation in GATES else (f,), 0.02, dtype, rngs, use_bias=bias)
        self.down = Linear(f, (d,), 0.02 / (2 * config.n_layers) ** 0.5, dtype, rngs, use_bias=bias)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(activate(self.up(x_BTD), self.activation))


class Block(nnx.Module):
    """Attention and feed-forward, each with a residual, a norm (before or after) and dropout."""

    def __init__(self, config: ModelConfig, implementation: str, dtype: Any, rngs: nnx.Rngs):
        self.config = config
        self.attention = Attention(config, implementation, dtype, rngs)
        self.mlp = Mlp(config, dtype, rngs)
        self.norm1 = make_norm(config, dtype, rngs)
        self.norm2 = make_norm(config, dtype, rngs)

    def _residuals(self, x_BTD: jax.Array, attend: Callable[[jax.Array], tuple[jax.Array, Cache]], keys: Any) -> Any:
        pre, rate = self.config.pre_norm, self.config.dropout
        y, cache = attend(normalised(self.norm1, x_BTD) if pre else x_BTD)
        x_BTD = x_BTD + dropout(y, keys[0], rate)
        x_BTD = x_BTD if pre else normalised(self.norm1, x_BTD)
        y = self.mlp(normalised(self.norm2, x_BTD) if pre else x_BTD)
        x_BTD = x_BTD + dropout(y, keys[1], rate)
        return x_BTD if pre else normalised(self.norm2, x_BTD), cache

    def __call__(
        self, x_BTD: jax.Array, segments_BT: jax.Array | None, positions_BT: jax.Array, keys_SB2: jax.Array | None
    ) -> tuple[jax.Array, Cache]:
        """keys_SB2: uint32 dropout keys of the three sites, or None. Returns the output, and the keys and values."""
        attention_key, *residual_keys = (None, None, None) if keys_SB2 is None else tuple(keys_SB2)
        attend = lambda y: self.attention(y, segments_BT, positions_BT, attention_key)  # noqa: E731
        return self._residuals(x_BTD, attend, residual_keys)

    def decode(self, x_B1D: jax.Array, position_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One position a row, at index `position_B`, with the keys and values [B, G, T, K] before it in `cache`."""
        return self._residuals(x_B1D, lambda y: self.attention.decode(y, position_B, cache), (None, None))
