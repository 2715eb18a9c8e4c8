"""Process start-up: which devices a run uses, and refusing those it can't use."""

import os
from pathlib import Path

import jax

from jaxlm.config import TrainingConfig
from jaxlm.errors import UserError

# Variables by which launchers tell a process how many of it there are.
_PROCESS_COUNTS = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def _nvidia_device_visible() -> bool:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(Path("/dev").glob("nvidia[0-9]*"))


def find_devices() -> list[jax.Device]:
    """All devices of this host that JAX computes on.

    Raises:
      UserError: an NVIDIA GPU is there but JAX has only its CPU backend.
    """
    try:
        devices = jax.devices()
    except RuntimeError as error:  # JAX_PLATFORMS names a backend that can't start
        raise UserError(f"JAX found no device: {str(error).splitlines()[0]}") from error
    cpu_is_meant = os.environ.get("JAX_PLATFORMS", "") == "cpu"
    if devices[0].platform == "cpu" and _nvidia_device_visible() and not cpu_is_meant:
        raise UserError(
            'an NVIDIA GPU is here, but JAX has only its CPU backend: pip install -e ".[cuda12]" (or cuda13), '
            "or set JAX_PLATFORMS=cpu if the CPU is meant"
        )
    return devices


def training_devices(config: TrainingConfig) -> list[jax.Device]:
    """`find_devices`, checked against what the configuration expects.

    Raises:
      UserError: several processes, another number of devices, or other collectives than asked for.
    """
    for variable in _PROCESS_COUNTS:
        if os.environ.get(variable, "1") not in ("", "1"):
            raise UserError(
                f"{variable} ({os.environ[variable]}): several processes are not supported yet; "
                "start one process, it uses all GPUs of its host"
            )
    devices = find_devices()
    if config.world_size is not None and config.world_size != len(devices):
        raise UserError(
            f"training.world_size ({config.world_size}) differs from the {len(devices)} device(s) found; unset it"
        )
    backend = "gloo" if devices[0].platform == "cpu" else "nccl"
    if config.distributed_backend is not None and config.distributed_backend != backend:
        raise UserError(
            f"training.distributed_backend ({config.distributed_backend}) does not fit {devices[0].platform} devices; "
            f"unset it, or use {backend}"
        )
    return devices
