"""Names of GPUs and sizes of their memory, as people write them; imports nothing heavy."""

import math
import re
from typing import NamedTuple

from jaxlm.config import nearest
from jaxlm.errors import UserError


class GPU(NamedTuple):
    """What is known of a GPU."""

    memory_mib: int  # as nvidia-smi shows it
    peak: float = math.nan  # dense 16-bit FLOP/s with float32 sums, by the maker's datasheet; NaN: not known


GPUS = {  # names in upper case, as people write them
    "T4": GPU(15360, 65e12),
    "V100-16GB": GPU(16384, 125e12),
    "V100-32GB": GPU(32768, 125e12),
    "P100": GPU(16384),
    "A10": GPU(23028, 125e12),
    "A10G": GPU(23028),
    "L4": GPU(23034, 121e12),
    "L40S": GPU(46068, 362e12),
    "A40": GPU(46068, 150e12),
    "RTX A6000": GPU(49140),
    "A100-40GB": GPU(40960, 312e12),
    "A100-80GB": GPU(81920, 312e12),
    "H100": GPU(81559, 989e12),
    "H100 PCIE": GPU(81559, 756e12),
    "H100 NVL": GPU(95830, 835e12),
    "H200": GPU(143771, 989e12),
    "H200 NVL": GPU(143771, 835e12),
    "GH200": GPU(97871, 989e12),
    "B200": GPU(183359, 2250e12),
    "RTX 3080": GPU(10240),
    "RTX 3090": GPU(24576, 71e12),
    "RTX 4080": GPU(16376),
    "RTX 4090": GPU(24564, 165e12),
    "RTX 5090": GPU(32607),
}
FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # before training.memory_fraction


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
    return GPUS[asked].memory_mib * 2**20


def gpu_of(device_kind: str) -> str | None:
    """The name in `GPUS` of a device that JAX or nvidia-smi calls so ("NVIDIA H100 PCIe"); None: it is not there."""
    kind = device_kind.upper()
    other = r"(?!.*\b(TI|SUPER|D|LAPTOP|MAX-Q|MIG)\b)"  # behind a name they make it another device, or a part of one
    names = (name for name in sorted(GPUS, key=len, reverse=True) if re.search(rf"\b{model_of(name)}\b{other}", kind))
    return next(names, None)


def peak_flops(device_kind: str) -> float:
    """Dense 16-bit peak in FLOP/s of a device by the name that JAX gives it; NaN: not known."""
    name = gpu_of(device_kind)
    return math.nan if name is None else GPUS[name].peak


def model_of(name: str) -> str:
    """A GPU's name without the size of its memory."""
    return re.sub(r"-\d+GB$", "", name)
