"""Names of GPUs and sizes of their memory, as people write them; imports nothing heavy."""

import re

from jaxlm.config import nearest
from jaxlm.errors import UserError

# Bytes of memory that nvidia-smi shows, in MiB; names in upper case.
GPUS = {
    "T4": 15360,
    "V100-16GB": 16384,
    "V100-32GB": 32768,
    "P100": 16384,
    "A10": 23028,
    "A10G": 23028,
    "L4": 23034,
    "L40S": 46068,
    "A40": 46068,
    "RTX A6000": 49140,
    "A100-40GB": 40960,
    "A100-80GB": 81920,
    "H100": 81559,
    "H200": 143771,
    "B200": 183359,
    "RTX 3080": 10240,
    "RTX 3090": 24576,
    "RTX 4080": 16376,
    "RTX 4090": 24564,
    "RTX 5090": 32607,
}
FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # before training.memory_fraction
UNITS = {"G": 10**9, "GB": 10**9, "GIB": 2**30, "M": 10**6, "MB": 10**6, "MIB": 2**20}
SMALLEST, LARGEST = 2**20, 2**50  # memory of a device


def memory_of(gpu: str) -> int:
    """Bytes of memory of a GPU in `GPUS`, in any case.

    Raises:
      UserError: it is not there; names those that it may stand for.
    """
    asked = gpu.strip().upper()
    if asked not in GPUS:
        longer = [name for name in GPUS if asked and name.startswith(asked)]
        shorter = [name for name in GPUS if asked.startswith((f"{name}-", f"{name} "))]
        near = f" (did you mean {' or '.join(longer or shorter)}?)" if longer or shorter else nearest(asked, GPUS)
        raise UserError(f"--gpu ({gpu}) is unknown{near}; known: {', '.join(GPUS)}; or give --memory")
    return GPUS[asked] * 2**20


def parse_memory(text: str) -> int:
    """Bytes in "80GB" or "80G" (10^9), "79.6GiB" (2^30), "500MB", "500M" or "500MiB", in any case.

    Raises:
      UserError: it is none of these, or no size that a device has.
    """
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text.strip().upper())
    if match is None:
        raise UserError(f"--memory ({text}) must be a number with G, GB, GiB, M, MB or MiB, such as 80GB")
    size = float(match[1]) * UNITS[match[2]]
    if not SMALLEST <= size <= LARGEST:
        raise UserError(f"--memory ({text}) must be from {SMALLEST // 2**20}MiB to {LARGEST // 2**30}GiB")
    return int(size)
