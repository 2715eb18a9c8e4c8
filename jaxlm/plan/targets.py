"""GPUs that a program can be compiled for without one here, and how fast they are.

Limits are the makers' (datasheets, CUDA's table of compute capabilities). What of them a single kernel reaches has been
measured, by others and never in an update that is predicted here:

- 16-bit products: cuBLAS at 4,096 x 4,096 x 4,096, 716 TFLOP/s of an H100's 989 (pranjalssh/fast.cu, README); it makes
  795 at 8,192, the best that is known (795 too: stas00/ml-engineering, maximum achievable matmul FLOPS, also for A100,
  A100 PCIe, B200), of which other GPUs are taken to reach the same nine tenths.
- memory: BabelStream on a GH200, mean of copy, mul, add and triad, 3.12 of 4.0 TB/s (UoB-HPC/BabelStream, issue 194).
- attention: our kernels and cuDNN's at head size 64 on one H200 (benchmarks/LOG.md, 2026-11-26).
- links: 380 of 450 GB/s between two H100s (NVIDIA/nccl, issue 1264).
- between two kernels of a stream: 1 microsecond (NVIDIA, Getting Started with CUDA Graphs).
"""

import importlib.util
from typing import NamedTuple

from jaxlm.config import nearest
from jaxlm.errors import UserError
from jaxlm.parallel.gpus import GPUS

MEMORY_EFFICIENCY = 3.12 / 4.0
LINK_EFFICIENCY = 380 / 450
# FLOPs that the kernels do, of the 16-bit peak; cuDNN's are counted as five products backward, ours do seven.
ATTENTION_EFFICIENCY = {"forward": 0.27, "backward": 0.36, "cudnn forward": 0.29, "cudnn backward": 0.21}
KERNEL_GAP = 1e-6  # s
HOST_LINK = 50e9  # bytes/s of each GPU's network card, in one direction: 400 Gb/s, as in most clusters of H100s
CUDA_BYTES = 600 * 2**20  # a CUDA context with cuBLAS and cuDNN; assumed, not measured
NCCL_BYTES = 1024 * 2**20  # its buffers, with several GPUs; assumed, not measured


class Target(NamedTuple):
    """What the compiler and the prediction need to know of a GPU, beside `parallel.gpus.GPUS`."""

    capability: str
    cores: int  # streaming multiprocessors
    clock_ghz: float
    l2_mib: int
    bandwidth: float  # of its memory, bytes/s
    link: float  # to the GPUs of its host, bytes/s in one direction: NVLink, or PCIe
    products: float  # of the 16-bit peak


TARGETS = {
    "A100-40GB": Target("8.0", 108, 1.41, 40, 1.555e12, 300e9, 0.78),
    "A100-80GB": Target("8.0", 108, 1.41, 40, 2.039e12, 300e9, 0.78),
    "H100": Target("9.0", 132, 1.98, 50, 3.352e12, 450e9, 0.724),
    "H100 PCIE": Target("9.0", 114, 1.755, 50, 2.039e12, 64e9, 0.724),
    "H200": Target("9.0", 132, 1.98, 50, 4.8e12, 450e9, 0.724),
    "L4": Target("8.9", 58, 2.04, 48, 0.3e12, 32e9, 0.72),
    "L40S": Target("8.9", 142, 2.52, 96, 0.864e12, 32e9, 0.72),
    "RTX 3090": Target("8.6", 82, 1.695, 6, 0.936e12, 32e9, 0.72),
    "RTX 4090": Target("8.9", 128, 2.52, 72, 1.008e12, 32e9, 0.72),
    "B200": Target("10.0", 148, 1.965, 126, 8.0e12, 900e9, 0.70),
}
# JAX 0.11 lowers Triton kernels by the device's name, from a table: where it is not in there, a chip of the same kind.
_KINDS = {"L40S": "L40", "RTX 3090": "A10", "RTX 4090": "GeForce RTX 4090"}
_LARGE = ("8.0", "9.0", "10.0")  # data centre chips: more shared memory and threads than their smaller relatives
_SHARED_KIB = {"8.0": 164, "9.0": 228, "10.0": 228}  # of a multiprocessor; a block may have one less


def usual_hosts(devices: int) -> int:
    """Hosts of eight GPUs each, or one where eight do not divide them."""
    return devices // 8 if devices and devices % 8 == 0 else 1


def target_name(gpu: str) -> str:
    """The name in `TARGETS` of a GPU as people write it.

    Raises:
      UserError: it is not there.
    """
    asked = gpu.strip().upper().replace("_", " ")
    aliases = {"A100": "A100-80GB", "H100 SXM": "H100", "H100-80GB": "H100", "3090": "RTX 3090", "4090": "RTX 4090"}
    name = aliases.get(asked, asked)
    if name in TARGETS:
        return name
    why = "can't be compiled for here" if name in GPUS else "is unknown" + nearest(name, TARGETS)
    raise UserError(f"--gpu ({gpu}) {why}; a program can be planned for: {', '.join(TARGETS)}")


def description(name: str, cuda: int) -> str:
    """The GPU as XLA's compiler wants it described (stream_executor's GpuTargetConfigProto)."""
    target = TARGETS[name]
    large = target.capability in _LARGE
    shared = _SHARED_KIB.get(target.capability, 100) * 1024
    major, minor = target.capability.split(".")
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
  threads_per_core_limit: {2048 if large else 1536} fpus_per_core: {64 if target.capability == "8.0" else 128}
  core_count: {target.cores}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {target.bandwidth:.0f} l2_cache_size: {target.l2_mib * 2**20} clock_rate_ghz: {target.clock_ghz}
  device_memory_size: {GPUS[name].memory_mib * 2**20} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 19 }}
runtime_version {{ major: {cuda} minor: 0 patch: 0 }}
device_description_str: "NVIDIA {_KINDS.get(name, name)}"
"""


def device_line(name: str) -> str:
    """What XLA writes of the GPU of `description` into results of autotuning, and looks for there."""
    target = TARGETS[name]
    kind = f"CUDA: {target.capability}, Cores: {target.cores}"
    speed = f"GPU clock: {target.clock_ghz:g} GHz, Memory bandwidth: {target.bandwidth / 1e9:.0f} GB/s"
    return f"{kind}, {speed}, L2 cache: {target.l2_mib} MB, DNN version: 9.19.0"


def plugin() -> int:
    """The CUDA version, 12 or 13, of JAX's plugin that is installed.

    Raises:
      UserError: there is none, or it is of another version than JAX; names the extra to install.
    """
    from importlib.metadata import PackageNotFoundError, version

    for cuda in (13, 12):
        if importlib.util.find_spec(f"jax_cuda{cuda}_plugin") is None:
            continue
        wanted = version("jaxlib")
        for part in ("plugin", "pjrt"):
            package = f"jax-cuda{cuda}-{part}"
            try:
                found = version(package)
            except PackageNotFoundError:
                found = "not installed"
            if found != wanted:
                raise UserError(
                    f"{package} ({found}) must be of jaxlib's version, {wanted}: pip install {package}=={wanted}"
                )
        return cuda
    raise UserError('the compiler for GPUs is not installed: pip install -e ".[plan]" (Linux on x86-64)')


def topology(gpu: str, devices: int, hosts: int) -> list:
    """JAX devices of GPUs that are not here: a program can be compiled for them, nothing can be put on them.

    Args:
      gpu: of `TARGETS`.
      devices: of all hosts together.

    Raises:
      UserError: as `plugin`, or the hosts don't divide the devices.
    """
    if hosts < 1 or devices % hosts:
        raise UserError(f"--hosts ({hosts}) must divide --devices ({devices})")
    cuda = plugin()
    from jax.experimental import topologies

    shape = f"1x{hosts}x{devices // hosts}"  # partitions, hosts, GPUs of a host
    found = topologies.get_topology_desc(platform="cuda", target_config=description(gpu, cuda), topology=shape)
    return list(found.devices)
