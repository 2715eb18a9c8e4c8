"""What kernels.py gives to attention: the cases, the dense reference, and the program's kernels called alike.

Shapes: B rows, T positions (Q of queries, S of keys), H heads, G heads of keys and values, K channels of a head.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig
from jaxlm.ops.attention_kernels import FUSED, causal_attention, why_unsupported
from jaxlm.ops.masks import keep_mask

Attention = Callable[..., Any]
RATE = 0.1  # of dropout
CANDIDATE = "cudnn, packed"  # the program does not choose it yet: no GPU has told whether it is right, and faster
MOST = 32  # documents a row of a case; cuDNN keeps a row of numbers for each


@dataclasses.dataclass(frozen=True)
class Case:
    """What attention is given."""

    head_size: int
    length: int
    dtype: str = "bfloat16"
    segments: bool = False
    dropout: bool = False
    grouped: bool = False  # two query heads share a head of keys and values
    rows: int = 2
    heads: int = 4


def checked(cut: bool) -> list[Case]:
    """The cases to check, those that tell most first."""
    if cut:
        return [
            Case(64, 160, "bfloat16", segments=True, dropout=True, grouped=True, rows=1, heads=2),
            Case(80, 64, "float16", rows=1, heads=2),
            Case(64, 48, "float32", segments=True, rows=1, heads=2),
        ]
    options = [
        dict(zip(("segments", "dropout", "grouped"), chosen, strict=True))
        for chosen in itertools.product((False, True), repeat=3)
    ]
    plain, everything = options[0], options[-1]
    lengths = ((1024, "bfloat16"), (1000, "float16"), (128, "bfloat16"), (2048, "bfloat16"))
    return [
        *(Case(64, 512, **chosen) for chosen in reversed(options)),
        *(Case(size, t, dtype, **everything) for t, dtype in lengths for size in (64, 80, 128, 256)),
        *(Case(64, 777, "float32", **chosen) for chosen in (everything, plain)),
        *(Case(size, t, dtype) for t, dtype in lengths for size in (64, 80, 128, 256)),
    ]


def timed(cut: bool) -> list[Case]:
    """The cases to time: GPT-2 124M's heads, and wider ones."""
    if cut:
        return [Case(64, 64, segments=True, rows=1, heads=2)]
    large = {"rows": 32, "heads": 12}
    return [
        Case(64, 1024, segments=True, **large),
        Case(64, 1024, **large),
        Case(64, 1024, segments=True, dropout=True, **large),
        Case(64, 1024, dropout=True, **large),
        Case(64, 1024, segments=True, rows=8, heads=12),
        Case(128, 1024, segments=True, rows=8, heads=16),
        Case(128, 1024, rows=8, heads=16),
        Case(64, 2048, segments=True, rows=16, heads=12),
    ]


def implementations(case: Case, capability: float | None) -> list[str]:
    """The kernels that the program may choose for it.

    Args:
      capability: of the GPU; None on a CPU, where Pallas is interpreted.
    """
    if capability is None:
        return ["pallas", "blockwise"]
    config = Config(
        model=ModelConfig(
            d_model=case.heads * case.head_size, n_heads=case.heads, attention_dropout=RATE if case.dropout else 0.0
        ),
        training=TrainingConfig(use_amp=case.dtype != "float32"),
        data=DataConfig(pack_sequences=case.segments),
    )
    fused = [kernel for kernel in FUSED if why_unsupported(kernel, config, capability) is None]
    candidates = [CANDIDATE] if why_no_candidate(case, capability) is None else []
    return [*fused, *candidates, "blockwise"]


def why_no_candidate(case: Case, capability: float) -> str | None:
    """Why `cudnn_packed` can't do a case; None if it can."""
    if not case.segments or case.dropout or case.dtype == "float32" or case.head_size > 128:
        return "is for packed rows in 16 bits without dropout, of heads up to 128"
    if capability < 9:
        return "needs compute capability 9.0"
    return "was wrong with grouped heads before JAX 0.11" if case.grouped and jax.__version_info__ < (0, 11) else None


def inputs(case: Case) -> tuple[jax.Array, ...]:
    """q, k, v, the gradient of the output, segments [B, T] (some five a row) and dropout keys [B, 2]."""
    rng = np.random.default_rng(0)
    b, t, k = case.rows, case.length, case.head_size
    groups = case.heads // 2 if case.grouped else case.heads
    q, g = (rng.standard_normal((b, t, case.heads, k), np.float32) for _ in range(2))
    keys_and_values = (rng.standard_normal((b, t, groups, k), np.float32) for _ in range(2))
    segments_BT = np.minimum(1 + np.cumsum(rng.random((b, t)) < 4 / t, axis=1, dtype=np.int32), MOST)
    keys_B2 = rng.integers(0, 2**32, (b, 2), np.uint32)
    arrays = (jnp.asarray(x, case.dtype) for x in (q, *keys_and_values, g))
    return (*arrays, jnp.asarray(segments_BT), jnp.asarray(keys_B2))


def dense(case: Case, dtype: str, precision: str | None) -> Attention:
    """Attention with the whole matrix of scores, each product's factors and result in `dtype`, the softmax in float32.

    In float32 it is the reference; in the kernel's own dtype, the yardstick.
    """

    def attend(
        q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array, key_B2: jax.Array
    ) -> Any:
        def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
            x, y = x.astype(dtype), y.astype(dtype)
            return jnp.einsum(spec, x, y, precision=precision)

        _, t, heads, size = q_BTHK.shape
        k_BTHK, v_BTHK = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k_BTGK, v_BTGK))
        visible_BHQS = jnp.tril(jnp.ones((t, t), bool))[None, None]
        if case.segments:
            visible_BHQS = visible_BHQS & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
        s_BHQS = product("bqhk,bshk->bhqs", q_BTHK, k_BTHK).astype(jnp.float32) * size**-0.5
        p_BHQS = jax.nn.softmax(jnp.where(visible_BHQS, s_BHQS, -jnp.inf), axis=-1)
        if case.dropout:
            number = lambda n: jnp.arange(n, dtype=jnp.uint32)  # noqa: E731
            coordinates = (number(heads)[:, None, None], number(t)[None, :, None], number(t)[None, None, :])
            p_BHQS = jnp.where(keep_mask(key_B2, coordinates, RATE), p_BHQS / (1 - RATE), 0.0)
        return product("bhqs,bshk->bqhk", p_BHQS, v_BTHK)

    return attend


def cudnn_packed(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array, key_B2: jax.Array
) -> jax.Array:
    """NVIDIA's kernel for packed documents, of JAX's private modules; segments 1, 2, ... up to MOST a row."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    lengths_BD = (segments_BT[:, :, None] == jnp.arange(1, MOST + 1, dtype=jnp.int32)).sum(1, dtype=jnp.int32)
    ends_BD, used_BD = jnp.cumsum(lengths_BD, axis=1, dtype=jnp.int32), lengths_BD > 0
    offsets = jnp.pad(jnp.where(used_BD, ends_BD, -1), ((0, 0), (1, 0)))
    lengths = jnp.where(used_BD, lengths_BD, -1)
    where = {"q_seqlen": lengths, "kv_seqlen": lengths, "q_offsets": offsets, "kv_offsets": offsets}
    scale = q_BTHK.shape[-1] ** -0.5
    return dot_product_attention(q_BTHK, k_BTGK, v_BTGK, **where, scale=scale, mask_type=MaskType.PADDING_CAUSAL)


def kernel(case: Case, implementation: str, attention: Attention = causal_attention) -> Attention:
    """The program's attention, called as the model calls it; or the candidate."""
    if implementation == CANDIDATE:
        return cudnn_packed

    def attend(
        q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array, key_B2: jax.Array
    ) -> Any:
        return attention(
            q_BTHK,
            k_BTGK,
            v_BTGK,
            segments_BT if case.segments else None,
            implementation=implementation,
            key_B2=key_B2 if case.dropout else None,
            rate=RATE if case.dropout else 0.0,
        )

    return attend


def with_gradients(attend: Attention) -> Attention:
    """The output, and the gradients of q, k and v for the gradient g of the output."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, *rest: jax.Array) -> Any:
        out, back = jax.vjp(lambda *x: attend(*x, *rest), q, k, v)
        return (out, *back(g.astype(out.dtype)))

    return both
