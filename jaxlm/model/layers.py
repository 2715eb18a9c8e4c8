"""One Transformer block and what it is made of.

Shapes: B rows, T positions, D model width, F feed-forward width, H heads, K channels of a head.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig
from jaxlm.model.attention import cached_attention, causal_attention
from jaxlm.model.dropout import dropout

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "swish": jax.nn.swish,
}
NORM_EPSILON = 1e-5  # GPT-2's
PRODUCT = "product"  # what recomputing with remat_policy dots keeps

Cache = tuple[jax.Array, jax.Array]  # keys and values [B, T, H, K] of one layer


def sinusoids(positions_BT: jax.Array, d_model: int) -> jax.Array:
    """Sinusoidal position embedding (Vaswani et al. 2017, section 3.5), float32 [B, T, D]."""
    half = d_model // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(table, ((0, 0), (0, 0), (0, d_model - 2 * half)))


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in its split-halves form, computed in float32."""
    half = x_BTHK.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BT1K = (positions_BT[..., None].astype(jnp.float32) * frequencies[None, None])[:, :, None]
    cos, sin = jnp.cos(angles_BT1K), jnp.sin(angles_BT1K)
    x1, x2 = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTHK.dtype)


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` in the dtype of `x`.

    On CPU a 16-bit product is written in float32 and rounded afterwards: XLA's own 16-bit output takes 1.6x as long.
    """

    def wide(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(x.dtype)

    return jax.lax.platform_dependent(x, y, cpu=wide, default=lambda x, y: jnp.einsum(spec, x, y))


@jax.custom_vjp
def affine(x_BTI: jax.Array, w_IO: jax.Array, b_O: jax.Array) -> jax.Array:
    """x @ w + b, all in one dtype; O is one axis or two.

    The gradient of b is a product with ones, as XLA's CPU reduction is slow.
    """
    o = "no"[-b_O.ndim :]
    return _product(f"bti,i{o}->bt{o}", x_BTI, w_IO) + b_O[None, None]


def _affine_forward(x_BTI: jax.Array, w_IO: jax.Array, b_O: jax.Array) -> tuple[jax.Array, Any]:
    return affine(x_BTI, w_IO, b_O), (x_BTI, w_IO)


def _affine_backward(saved: Any, g_BTO: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_BTI, w_IO = saved
    o = "no"[1 - w_IO.ndim :]
    ones_BT = jnp.ones(x_BTI.shape[:2], g_BTO.dtype)
    return (
        _product(f"bt{o},i{o}->bti", g_BTO, w_IO),
        _product(f"bti,bt{o}->i{o}", x_BTI, g_BTO),
        _product(f"bt,bt{o}->{o}", ones_BT, g_BTO),
    )


affine.defvjp(_affine_forward, _affine_backward)


class Linear(nnx.Module):
    """`affine` with GPT-2's initialisation: normal weights, zero biases; float32 parameters, computed in `dtype`."""

    def __init__(self, d_in: int, d_out: tuple[int, ...], std: float, dtype: Any, rngs: nnx.Rngs):
        self.dtype = dtype
        self.kernel = nnx.Param(nnx.initializers.normal(std)(rngs.params(), (d_in, *d_out)))
        self.bias = nnx.Param(jnp.zeros(d_out))

    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        x_BTI, w, b = (array.astype(self.dtype) for array in (x_BTI, self.kernel[...], self.bias[...]))
        return checkpoint_name(affine(x_BTI, w, b), PRODUCT)


def layer_norm(d_model: int, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(d_model, epsilon=NORM_EPSILON, dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head causal self-attention with its projections."""

    def __init__(self, config: ModelConfig, implementation: str, dtype: Any, rngs: nnx.Rngs):
        self.config, self.implementation = config, implementation
        d = config.d_model
        self.qkv = Linear(d, (3, d), 0.02, dtype, rngs)  # three axes, so that heads can be split over devices
        self.out = Linear(d, (d,), 0.02 / (2 * config.n_layers) ** 0.5, dtype, rngs)

    def heads(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values [B, T, H, K], rotated if positions are rotary."""
        b, t, d = x_BTD.shape
        qkv_BT3D = self.qkv(x_BTD)
        q, k, v = (qkv_BT3D[:, :, i].reshape(b, t, self.config.n_heads, d // self.config.n_heads) for i in range(3))
        if self.config.positions == "rotary":
            q, k = (rotate(x, positions_BT, self.config.rope_theta) for x in (q, k))
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

    def decode(self, x_B1D: jax.Array, position: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        q, k, v = self.heads(x_B1D, jnp.broadcast_to(position, (x_B1D.shape[0], 1)))
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1)
            for old, new in zip(cache, (k, v), strict=True)
        )
        y_B1HK = cached_attention(q, keys, values, position + 1)
        return self.out(y_B1HK.reshape(x_B1D.shape)), (keys, values)


class Mlp(nnx.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs):
        self.activation = config.activation
        self.up = Linear(config.d_model, (config.d_ff,), 0.02, dtype, rngs)
        self.down = Linear(config.d_ff, (config.d_model,), 0.02 / (2 * config.n_layers) ** 0.5, dtype, rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x_BTD)))


class Block(nnx.Module):
    """Attention and feed-forward, each with a residual, a norm (before or after) and dropout."""

    def __init__(self, config: ModelConfig, implementation: str, dtype: Any, rngs: nnx.Rngs):
        self.config = config
        self.attention = Attention(config, implementation, dtype, rngs)
        self.mlp = Mlp(config, dtype, rngs)
        self.norm1 = layer_norm(config.d_model, dtype, rngs)
        self.norm2 = layer_norm(config.d_model, dtype, rngs)

    def _residuals(self, x_BTD: jax.Array, attend: Callable[[jax.Array], tuple[jax.Array, Cache]], keys: Any) -> Any:
        pre, rate = self.config.pre_norm, self.config.dropout
        y, cache = attend(self.norm1(x_BTD) if pre else x_BTD)
        x_BTD = x_BTD + dropout(y, keys[0], rate)
        x_BTD = x_BTD if pre else self.norm1(x_BTD)
        y = self.mlp(self.norm2(x_BTD) if pre else x_BTD)
        x_BTD = x_BTD + dropout(y, keys[1], rate)
        return x_BTD if pre else self.norm2(x_BTD), cache

    def __call__(
        self, x_BTD: jax.Array, segments_BT: jax.Array | None, positions_BT: jax.Array, keys_SB2: jax.Array | None
    ) -> tuple[jax.Array, Cache]:
        """keys_SB2: uint32 dropout keys of the three sites, or None. Returns the output, and the keys and values."""
        attention_key, *residual_keys = (None, None, None) if keys_SB2 is None else tuple(keys_SB2)
        attend = lambda y: self.attention(y, segments_BT, positions_BT, attention_key)  # noqa: E731
        return self._residuals(x_BTD, attend, residual_keys)

    def decode(self, x_B1D: jax.Array, position: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One position a row, at index `position`, with the keys and values before it in `cache`."""
        return self._residuals(x_B1D, lambda y: self.attention.decode(y, position, cache), (None, None))
