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
        return 'needs CUDA 13: pip install -e ".[cuda13]"'
    return None


def choose_kernels(config: Config, capability: float | None) -> frozenset[str]:
    """NORMS, of the residual stream, and LOSS, the softmax of the loss with its gradient; those that can run."""
    model, training = config.model, config.training
    split = training.tensor_parallel > 1  # the compiler divides the work, and can't divide a kernel's
    possible = why_not_on(capability) is None and why_no_triton() is None and training.use_amp and not split
    if not possible or not training.own_kernels:
        return frozenset()
    fits = {NORMS: model.d_model <= LARGEST_WIDTH, LOSS: takes_vocabulary(model.vocab_size)}
    return frozenset(name for name, small in fits.items() if small)
