"""The implementations of causal attention, and which of them a run uses.

Shapes: B rows, T positions, H query heads, G heads of keys and values, K channels of a head.

- `cudnn`: NVIDIA's flash attention, for plain causal attention on GPUs.
- `pallas`: this package's GPU kernels (flash.py), which also do packed documents and dropout.
- `mosaic`: the same for Hopper, without Triton (hopper.py).
- `blockwise`: plain JAX (blockwise.py), for everything, on every backend.
"""

import jax

from jaxlm.config import Config
from jaxlm.errors import UserError
from jaxlm.ops.blockwise import blockwise_attention
from jaxlm.ops.flash import MAX_HEAD_SIZE, flash_attention, flash_attention_of_product
from jaxlm.ops.own_kernels import why_no_mosaic, why_no_triton, why_not_on

FUSED = ("cudnn", "pallas", "mosaic")  # GPU kernels, in the order of preference
OURS = FUSED[1:]
HEAD_SIZES = {"pallas": MAX_HEAD_SIZE, "mosaic": 128}  # the largest


def causal_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array | None,
    key_B2: jax.Array | None = None,
    rate: float = 0.0,
    softcap: float | None = None,
    *,
    implementation: str,
) -> jax.Array:
    """Softmax attention of each position to itself and to the positions before it in its segment.

    Query head h uses head h * G // H of keys and values; G divides H.

    Args:
      segments_BT: int32; positions of different segments don't see each other. None: one segment.
      key_B2: uint32 dropout key of each row; None: no dropout.
      rate: dropout rate of the attention weights.
      softcap: scores become softcap * tanh(scores / softcap); None: they stay. "blockwise" alone can do it.
      implementation: "blockwise", "cudnn" (needs a GPU, 16-bit inputs, no segments, no dropout), "pallas" (needs a
        GPU, or is interpreted; the positions of a segment lie together) or "mosaic" (needs Hopper and 16-bit inputs).

    Returns:
      [B, T, H, K] in the dtype of `q_BTHK`.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q_BTHK, k_BTGK, v_BTGK, is_causal=True, implementation="cudnn")
    if implementation == "pallas":
        return flash_attention(q_BTHK, k_BTGK, v_BTGK, segments_BT, key_B2, rate)
    if implementation == "mosaic":
        from jaxlm.ops.hopper import (
            hopper_attention,  # only where it is chosen, like Triton: its dialect changes with JAX
        )

        return hopper_attention(q_BTHK, k_BTGK, v_BTGK, segments_BT, key_B2, rate)
    assert implementation == "blockwise", implementation
    return blockwise_attention(q_BTHK, k_BTGK, v_BTGK, segments_BT, key_B2, rate, softcap)


def attention_of_product(
    qkv_BT3HK: jax.Array,
    bias_3HK: jax.Array | None,
    segments_BT: jax.Array | None,
    key_B2: jax.Array | None,
    rate: float,
    *,
    implementation: str,
) -> jax.Array:
    """`causal_attention` of the parts of a product, with their biases, read where they stand by the kernels of OURS."""
    attend = flash_attention_of_product
    if implementation == "mosaic":
        from jaxlm.ops.hopper import hopper_attention_of_product as attend
    return attend(qkv_BT3HK, bias_3HK, segments_BT, key_B2, rate)


def compute_capability(device: jax.Device) -> float | None:
    """The compute capability of an NVIDIA GPU, such as 9.0; None for a CPU."""
    return float(device.compute_capability) if device.platform == "gpu" else None


def why_unsupported(kernel: str, config: Config, capability: float | None) -> str | None:
    """Why a fused kernel, one of FUSED, can't do what the configuration needs; None if it can.

    Args:
      capability: the GPU's, as `compute_capability` gives it.
    """
    model, training = config.model, config.training
    head_size = model.head_size
    if (why := why_not_on(capability)) is not None:
        return why
    if not training.use_amp:
        return "has no float32 (training.use_amp false)"
    if model.attention_softcap is not None:
        return f"can't squash scores (model.attention_softcap {model.attention_softcap:g})"
    assert capability is not None
    if kernel in OURS:
        why = why_no_triton() if kernel == "pallas" else why_no_mosaic(capability)
        if why is not None:
            return why
        if head_size > HEAD_SIZES[kernel]:
            return f"needs a head size up to {HEAD_SIZES[kernel]}, not {head_size}"
        split = model.kv_heads % training.tensor_parallel == 0
        return None if split else f"can't split {model.kv_heads} heads (training.tensor_parallel)"
    if config.data.pack_sequences:
        return "can't keep packed documents apart (data.pack_sequences)"
    if model.attention_dropout:
        return "has no dropout that a resumed run can repeat (model.attention_dropout)"
    largest = 256 if capability >= 9 else 128
    fits = head_size % 8 == 0 and head_size <= largest
    return None if fits else f"needs a head size that is a multiple of 8 up to {largest}, not {head_size}"


def choose_attention(config: Config, capability: float | None) -> str:
    """The implementation that a run uses: the first of FUSED that supports the configuration, else blockwise.

    Raises:
      UserError: the configuration asks for a kernel that can't do it on this device.
    """
    asked = config.model.attention
    if asked == "auto":
        return next((kernel for kernel in FUSED if why_unsupported(kernel, config, capability) is None), "blockwise")
    why = why_unsupported(asked, config, capability) if asked in FUSED else None
    if why is not None:
        raise UserError(f"model.attention ({asked}) {why}; use auto or blockwise")
    return asked


def choose_ours(config: Config, capability: float | None) -> str:
    """The first of OURS that supports the configuration, else blockwise: what can do whatever cudnn can't."""
    return next((kernel for kernel in OURS if why_unsupported(kernel, config, capability) is None), "blockwise")


def why_not_fused(config: Config, capability: float | None) -> str | None:
    """Why `auto` chose no fused kernel on a GPU; None if it chose one, or on a CPU."""
    if capability is None or config.model.attention != "auto" or choose_attention(config, capability) in FUSED:
        return None
    whys: dict[str | None, list[str]] = {}
    for kernel in OURS:
        whys.setdefault(why_unsupported(kernel, config, capability), []).append(kernel)
    return "; ".join(f"{' and '.join(kernels)} {why}" for why, kernels in whys.items())
