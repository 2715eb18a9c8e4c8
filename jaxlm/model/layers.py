"""Linear layers, norms and the feed-forward part of a Transformer block.

Shapes: B rows, T positions, D model width, F feed-forward width; I and O, the input and output axes of a linear layer.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxlm.config import ModelConfig
from jaxlm.ops.matmul import add_bias, matmul
from jaxlm.ops.norm_kernels import Factors, Terms, multiply_norm
from jaxlm.ops.norms import normalise, normalise_sum
from jaxlm.ops.scheduling import recomputed

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {  # of float32 values
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv:2109.08668
    "swish": jax.nn.swish,
}
GATES = {"swiglu": "swish", "geglu": "gelu"}  # the activation of the gate
Parts = tuple[jax.Array, jax.Array | None]  # a product and its bias, not added yet
PRODUCT = "product"  # checkpoint name of the products, which remat_policy dots keeps


def activate(x: jax.Array, bias: jax.Array | None, name: str) -> jax.Array:
    """The feed-forward activation of x + bias, computed in float32; the backward pass keeps x alone.

    [B, T, F] of [B, T, F], or of [B, T, 2, F] if it is gated; `bias` has the last axes of x.
    """

    def f(x: jax.Array, bias: jax.Array | None) -> jax.Array:
        wide = (x if bias is None else add_bias(x, bias)).astype(jnp.float32)
        y = ACTIVATIONS[GATES[name]](wide[:, :, 0]) * wide[:, :, 1] if name in GATES else ACTIVATIONS[name](wide)
        return y.astype(x.dtype)

    return recomputed(f)(x, bias)


def residual_std(config: ModelConfig) -> float:
    """Of the matrices whose products are added to the residual stream: GPT-2's, or none (`zero_init_outputs`)."""
    return 0.0 if config.zero_init_outputs else 0.02 / (2 * config.n_layers) ** 0.5


class Linear(nnx.Module):
    """x @ kernel + bias with GPT-2's initialisation: normal weights of `std`, zero biases (none without `use_bias`).

    Parameters are float32, computation is in `dtype`. `d_out` may have two axes: the kernel is then several matrices.
    """

    adapter: Callable[[jax.Array, jax.Array | None], jax.Array]  # where there is one

    def __init__(
        self, d_in: int, d_out: tuple[int, ...], std: float, dtype: DTypeLike, rngs: nnx.Rngs, *, use_bias: bool = True
    ):
        self.dtype, self.use_bias, self.use_adapter = dtype, use_bias, False
        self.kernel = nnx.Param(nnx.initializers.normal(std)(rngs.params(), (d_in, *d_out)))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(d_out))

    def parts(self, x_BTI: jax.Array, key_B2: jax.Array | None = None) -> Parts:
        """x @ kernel, and the bias, for those who can add it as they read the product.

        The product has what an adapter adds to it (`adapters.add_adapters`); `key_B2` is for that one's dropout.
        """
        y_BTO = matmul(x_BTI.astype(self.dtype), self.kernel[...].astype(self.dtype))
        if self.use_adapter:
            y_BTO = y_BTO + self.adapter(x_BTI, key_B2)
        return checkpoint_name(y_BTO, PRODUCT), self.bias[...].astype(self.dtype) if self.use_bias else None

    def parts_of_norm(self, norm: "Norm", terms: Terms) -> tuple[jax.Array, Parts]:
        """The sum of the terms, and the `parts` of its norm, which is not kept for the backward pass; on GPUs."""
        w = self.kernel[...].astype(self.dtype)
        x_BTI, y_BTO = multiply_norm(terms, norm.factors(), w, norm.epsilon, norm.centred)
        return x_BTI, (checkpoint_name(y_BTO, PRODUCT), self.bias[...].astype(self.dtype) if self.use_bias else None)

    def __call__(self, x_BTI: jax.Array, key_B2: jax.Array | None = None) -> jax.Array:
        y_BTO, bias_O = self.parts(x_BTI, key_B2)
        return y_BTO if bias_O is None else add_bias(y_BTO, bias_O)


class Norm(nnx.Module):
    """LayerNorm or RMSNorm (`kind`) of the last axis, of `size` channels, in the dtype of its input.

    Without `norm_scale` it has no factors to learn (OLMo, arXiv:2402.00838).
    """

    def __init__(self, size: int, config: ModelConfig, *, kind: str):
        self.epsilon, self.centred = config.norm_epsilon, kind == "layernorm"
        self.use_scale, self.use_bias = config.norm_scale, self.centred and config.use_bias
        if self.use_scale:
            self.scale = nnx.Param(jnp.ones(size))
        if self.use_bias:
            self.bias = nnx.Param(jnp.zeros(size))

    def factors(self) -> Factors:
        return Factors(self.scale[...] if self.use_scale else None, self.bias[...] if self.use_bias else None)

    def __call__(self, x_ND: jax.Array) -> jax.Array:
        return normalise(x_ND, *self.factors(), self.epsilon, self.centred)

    def of_sum(self, terms: Terms, by_kernels: bool, goes_on: bool = True) -> tuple[jax.Array, jax.Array]:
        """`ops.norms.normalise_sum`: the sum of the terms, [B, T, D], and its norm."""
        return normalise_sum(terms, self.factors(), self.epsilon, self.centred, by_kernels=by_kernels, goes_on=goes_on)


class Mlp(nnx.Module):
    """Two linear layers around an activation.

    If gated (Shazeer 2020, arXiv:2002.05202), `up` is two matrices, [D, 2, F]: the gate, to which the activation is
    applied, and its factor.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.activation = config.activation
        d, f, bias = config.d_model, config.d_ff, config.use_bias
        self.up = Linear(d, (2, f) if config.activation in GATES else (f,), 0.02, dtype, rngs, use_bias=bias)
        self.down = Linear(f, (d,), residual_std(config), dtype, rngs, use_bias=bias)

    def __call__(self, x_BTD: jax.Array, key_B2: jax.Array | None = None) -> Parts:
        """A product and its bias, as `Linear.parts`."""
        return self._after(self.up.parts(x_BTD, key_B2), key_B2)

    def of_norm(self, norm: Norm, terms: Terms, key_B2: jax.Array | None = None) -> tuple[jax.Array, Parts]:
        """The sum of the terms, and the feed-forward part of its norm: `Linear.parts_of_norm`."""
        x_BTD, parts = self.up.parts_of_norm(norm, terms)
        return x_BTD, self._after(parts, key_B2)

    def _after(self, parts: Parts, key_B2: jax.Array | None) -> Parts:
        return self.down.parts(activate(*parts, self.activation), key_B2)
