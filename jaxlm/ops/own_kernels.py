"""Which parts of an update run in this package's kernels for GPUs, beside attention (attention_kernels.py)."""

import importlib.util

import jax

from jaxlm.config import Config
from jaxlm.ops.norm_kernels import LARGEST_WIDTH
from jaxlm.ops.softmax_kernel import takes_vocabulary

NORMS, LOSS = "norms", "loss"
HOPPER = 9.0  # compute capability
LOWEST_CAPABILITY = 8.0  # compute capability that they are made for, the A100's


def why_not_on(capability: float | None) -> str | None:
    """Why fused kernels can't run on a device of this `attention_kernels.compute_capability`; None if they can."""
    if capability is None:
        return "needs an NVIDIA GPU"
    if capability < LOWEST_CAPABILITY:
        return f"needs a GPU of compute capability {LOWEST_CAPABILITY:g} or later, not {capability:g}"
    return None


def why_no_triton() -> str | None:
    """Why this package's kernels can't be compiled; None if they can."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return f"is written for Triton, which Pallas of JAX {jax.__version__} does not have"
    return None


def why_no_mosaic(capability: float) -> str | None:
    """Why the attention kernels of hopper.py can't be compiled; None if they can.

    JAX's own refuse CUDA 12.8 to 12.9.0 for a causal mask, which its assembler gets wrong there (jax 0.11.2,
    pallas/ops/gpu/attention_mgpu.py).
    """
    if capability != HOPPER:
        return f"is made for compute capability {HOPPER:g}, not {capability:g}"
    if jax.__version_info__ < (0, 11):
        return f"needs JAX 0.11, not {jax.__version__}"
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return 'needs CUDA 13: pip install -e ".[cuda13]", or ".[plan]" elsewhere'
    return None


def why_not_own(config: Config, capability: float | None) -> dict[str, str]:
    """Of NORMS, of the residual stream, and LOSS, the softmax of the loss with its gradient: why XLA's kernels run."""
    model, training = config.model, config.training
    why = why_not_on(capability) or why_no_triton()
    if not training.own_kernels:
        why = "is not asked for (training.own_kernels false)"
    elif why is None and not training.use_amp:
        why = "has no float32 (training.use_amp false)"
    elif why is None and training.tensor_parallel > 1:
        why = "can't be split (training.tensor_parallel)"
    if why is not None:
        return dict.fromkeys((NORMS, LOSS), why)
    found = {}
    if model.d_model > LARGEST_WIDTH:
        found[NORMS] = f"takes vectors of up to {LARGEST_WIDTH}, not {model.d_model} (model.d_model)"
    if not takes_vocabulary(model.vocab_size):
        size = f"not {model.vocab_size} (model.vocab_size)"
        found[LOSS] = f"needs a vocabulary that is a multiple of 16 and the sum of few powers of two, {size}"
    return found


def choose_kernels(config: Config, capability: float | None) -> frozenset[str]:
    """NORMS and LOSS, those that can run."""
    return frozenset({NORMS, LOSS} - why_not_own(config, capability).keys())


def left_to_xla(config: Config, capability: float | None, others: frozenset[str] = frozenset()) -> list[str]:
    """What XLA makes the kernels of on a GPU though nobody asked for it, and why, a line each; without `others`."""
    if capability is None or not config.training.own_kernels:
        return []
    whys = why_not_own(config, capability)
    return [f"{name} by XLA: our kernel {why}" for name, why in whys.items() if name not in others]
