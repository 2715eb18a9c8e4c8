"""The devices that JAX computes on, and how its backend is started."""

import ctypes
import importlib.util
import os
import platform
from pathlib import Path

import jax

from jaxlm.config import TrainingConfig
from jaxlm.errors import UserError
from jaxlm.parallel.gpus import FRACTION_VARIABLES
from jaxlm.parallel.processes import start

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # parameters of glibc's mallopt, from its malloc.h


def _nvidia_device_visible() -> bool:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(Path("/dev").glob("nvidia[0-9]*"))


def _cpu_is_meant() -> bool:
    return os.environ.get("JAX_PLATFORMS", "") == "cpu"


def _plugin_without_driver() -> bool:
    """Whether JAX's plugin for CUDA is here for its compiler alone (`jaxlm plan`)."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


def find_devices() -> list[jax.Device]:
    """The devices of all processes that JAX computes on.

    Raises:
      UserError: an NVIDIA GPU is there but JAX has only its CPU backend.
    """
    if not os.environ.get("JAX_PLATFORMS") and _plugin_without_driver():
        jax.config.update("jax_platforms", "cpu")  # as JAX would do by itself, after the traceback of a warning
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names a backend that can't start, or is not here
        asked = f"JAX_PLATFORMS ({os.environ.get('JAX_PLATFORMS', '')})"
        reason = f": {str(error).splitlines()[0]}" if str(error) else ""
        raise UserError(
            f'{asked}: JAX found no device{reason}; unset it, or for a GPU: pip install -e ".[cuda12]" (or cuda13)'
        ) from error
    if devices[0].platform == "cpu" and _nvidia_device_visible() and not _cpu_is_meant():
        raise UserError(
            'an NVIDIA GPU is here, but JAX has only its CPU backend: pip install -e ".[cuda12]" (or cuda13), '
            "or set JAX_PLATFORMS=cpu if the CPU is meant"
        )
    return devices


def start_backend(config: TrainingConfig) -> list[jax.Device]:
    """Joins the other processes, sets what JAX's backend reads when it starts, and starts it.

    Returns:
      the devices of all processes.

    Raises:
      UserError: the processes don't find each other, or there are no devices.
    """
    start()
    if not any(os.environ.get(name) for name in FRACTION_VARIABLES):
        os.environ[FRACTION_VARIABLES[0]] = str(config.memory_fraction)
    if _cpu_is_meant() or not _nvidia_device_visible():
        _keep_freed_memory()
        # Else an update begins while the one before it still holds its temporary arrays, and both are kept for good.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    return find_devices()


def _keep_freed_memory() -> None:
    """Makes malloc keep the memory that a process on CPU frees, for its next update (with glibc only).

    XLA on CPU allocates the temporary arrays of each update anew, some 1.2 GB for configs/small.py. By default glibc
    returns such memory to the system, which then zeroes and maps every page again in each update: a tenth of its time.
    With this, the process stays as large as its peak. It is for what the main thread allocates: threads go on to have
    arenas of their own, without which those of the tokenizers library wait for each other.
    """
    if platform.libc_ver()[0] == "glibc":
        never = -1  # as an unsigned threshold, the largest there is
        for parameter, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, never)):
            ctypes.CDLL(None).mallopt(parameter, value)
