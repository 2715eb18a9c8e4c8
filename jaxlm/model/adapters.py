"""Low-rank adapters of linear layers (LoRA, Hu et al. 2021, arXiv:2106.09685).

Shapes: B rows, T positions, I and O the input and output axes of a linear layer, N matrices of one layer (queries, keys
and values), R the rank.
"""

from fnmatch import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxlm.model.dropout import derived_key, dropout
from jaxlm.model.layers import Linear
from jaxlm.ops.matmul import einsum, matmul

ADAPTER = "adapter"  # the name of an adapter in the layer's parameters
LINEAR = ("attention/qkv", "attention/q", "attention/kv", "attention/out", "mlp/up", "mlp/down")  # of a block


class Adapter(nnx.Module):
    """What is added to a layer's product: x @ a @ b * scale, with a and b of each of the layer's matrices.

    `a` [I, R] or [I, N, R] is random, `b` [R, O] or [N, R, O] zero, both float32; computed in `dtype`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        rank: int,
        scale: float,
        rate: float,
        number: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.scale, self.rate, self.number, self.dtype = scale, rate, number, dtype
        d_in, *matrices, d_out = shape
        bound = d_in**-0.5  # as PEFT has it
        uniform = nnx.initializers.uniform(2 * bound)
        self.a = nnx.Param(uniform(rngs.params(), (d_in, *matrices, rank)) - bound)
        self.b = nnx.Param(jnp.zeros((*matrices, rank, d_out)))

    def __call__(self, x_BTI: jax.Array, key_B2: jax.Array | None) -> jax.Array:
        """[B, T, O] or [B, T, N, O]; `key_B2` of dropout, on the input; None: there is none."""
        if self.rate and key_B2 is not None:
            x_BTI = dropout(x_BTI, derived_key(key_B2, self.number), self.rate)
        a, b = self.a[...].astype(self.dtype), self.b[...].astype(self.dtype)
        low = matmul(x_BTI.astype(self.dtype), a)
        y_BTO = matmul(low, b) if b.ndim == 2 else einsum("btnr,nro->btno", low, b)
        return y_BTO * jnp.asarray(self.scale, y_BTO.dtype)


def add_adapters(
    blocks: nnx.Module, targets: tuple[str, ...], rank: int, scale: float, rate: float, rngs: nnx.Rngs
) -> None:
    """Gives the linear layers of the stacked `blocks` whose names match `targets` (such as "attention/*") adapters."""
    for number, name in enumerate(LINEAR):
        room, layer = name.split("/")
        linear = getattr(getattr(blocks, room), layer, None)
        if isinstance(linear, Linear) and any(fnmatch(name, pattern) for pattern in targets):
            layers, *shape = linear.kernel.shape
            one = lambda rngs: Adapter(tuple(shape), rank, scale, rate, number, linear.dtype, rngs)  # noqa: B023, E731
            linear.adapter = nnx.vmap(one)(rngs.split(layers))
            linear.use_adapter = True


def merged_kernel(kernel: Any, adapter: Any, scale: float) -> Any:
    """A stacked kernel with its adapter added to it, float32: [L, I, O] or [L, I, N, O] of arrays of NumPy or JAX."""
    a, b = adapter["a"].astype("float32"), adapter["b"].astype("float32")
    spec = "lir,lro->lio" if b.ndim == 3 else "linr,lnro->lino"
    return kernel.astype("float32") + scale * jnp.einsum(spec, a, b, precision="highest")
