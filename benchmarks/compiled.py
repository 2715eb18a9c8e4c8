"""Compiles the update of a configuration for H100s that are not here, and says what the compiler makes of it.

    pip install --no-deps jax-cuda12-plugin==VERSION_OF_JAX jax-cuda12-pjrt==VERSION_OF_JAX  # cuda13 with jax 0.11
    python benchmarks/compiled.py --config gpt2_124m --training.batch_size 32 --training.gradient_accumulation_steps 1
    python benchmarks/compiled.py --config gpt2_1300m --devices 8 --training.zero_stage 3 --out step.hlo

Prints a JSON object: bytes of memory a device, kinds of operations, and collectives, of the program as scheduled.
Products are chosen without autotuning, as there is no device to tune on.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from jax.experimental import topologies

from jaxlm.commands.parser import Parser, add_config_file, add_config_options, config_from
from jaxlm.plan.memory import peak_bytes
from jaxlm.run.setup import resolve
from jaxlm.train.assemble import assemble

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 19 }
runtime_version { major: @CUDA minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
KINDS = (
    r" (fusion|custom-call|copy|transpose|while|sort|scatter|all-\w+-start|reduce-scatter-start|collective-\w+-start)\("
)


def h100s(devices: int, hosts: int) -> list[jax.Device]:
    """GPUs of a topology: enough to compile for, nothing can be put on them."""
    target = H100.replace("@CUDA", "13" if jax.__version_info__ >= (0, 11) else "12")
    shape = f"1x{hosts}x{devices // hosts}"  # partitions x hosts x devices of a host
    return list(topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape).devices)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    config = config_from(arguments)
    resolved = resolve(config, h100s(arguments.devices, arguments.hosts))
    # jax 0.11 cannot choose "deterministic" products without a device to try them on; 0.10 can.
    assembly = assemble(resolved, attention=arguments.attention, options={"xla_gpu_autotune_level": "0"})
    compiled = assembly.compiled_step
    text = compiled.as_text()
    if arguments.out is not None:
        arguments.out.write_text(text)
    use = compiled.memory_analysis()
    return {
        "jax": jax.__version__,
        "attention": assembly.attention,
        "memory_bytes": peak_bytes(compiled),
        "temporary_bytes": use.temp_size_in_bytes,
        "operations": dict(Counter(re.findall(KINDS, text))),
        "custom_calls": dict(Counter(re.findall(r'custom_call_target="([^"]+)"', text))),
    }


def main() -> None:
    parser = Parser(__doc__)
    add_config_file(parser)
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="GPUs of all hosts together")
    parser.add_argument("--hosts", type=int, default=1, metavar="H")
    parser.add_argument("--attention", metavar="KERNEL", help="default: the one that a run would take")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the program's text")
    add_config_options(parser)
    print(json.dumps(measure(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
