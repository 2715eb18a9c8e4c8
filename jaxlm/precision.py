"""The number formats of a run: float32 master parameters, computation in the configured type."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.config import TrainingConfig


def compute_dtype(config: TrainingConfig) -> DTypeLike:
    """float32 without use_amp, else amp_dtype. Softmax, loss and norm statistics are float32 in either case."""
    return jnp.dtype(config.amp_dtype) if config.use_amp else jnp.dtype("float32")
