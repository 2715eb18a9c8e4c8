#!/usr/bin/env bash
# Autotuning results that one compilation is given are used by every later one of the process, also without the option.
#
# jaxlib 0.10.2 with its CUDA 12 plugin, compiled for an H100 on a machine without a GPU. xla_gpu_load_autotune_results_from
# names a file of results, and can be given to a single program (compiler_options of jit or compile). One would take it to
# be for that program, and with xla_gpu_autotune_level 0, which turns autotuning off, for none at all. It is read at level 0,
# too, without a GPU; and the same product compiled again without the option still has the tiles of the file: XLA keeps the
# results for the process. JAX's cache of compiled programs doesn't know: what is compiled then is kept under the key of a
# program without results. Plans of both kinds need processes of their own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
"$folder/venv/bin/pip" install -q --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2
cat >"$folder/results.txt" <<'RESULTS'
version: 3
results {
  device: "CUDA: 9.0, Cores: 132, GPU clock: 1.98 GHz, Memory bandwidth: 3352 GB/s, L2 cache: 50 MB, DNN version: 9.19.0"
  hlo: "{\n  tmp_0 = bf16[4096,4096]{1,0} parameter(0)\n  tmp_1 = bf16[4096,4096]{1,0} parameter(1)\n  tmp_2 = bf16[4096,4096]{1,0} dot(bf16[4096,4096]{1,0} tmp_0, bf16[4096,4096]{1,0} tmp_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n  tmp_3 = f32[4096,4096]{1,0} convert(bf16[4096,4096]{1,0} tmp_2)\n  tmp_4 = f32[4096,4096]{1,0} tanh(f32[4096,4096]{1,0} tmp_3)\n  ROOT tmp_5 = bf16[4096,4096]{1,0} convert(f32[4096,4096]{1,0} tmp_4)\n}"
  result {
    triton { block_m: 128 block_n: 128 block_k: 64 num_stages: 4 num_warps: 8 num_ctas: 1 }
  }
  version: 45
}
RESULTS
cat >"$folder/program.py" <<'PYTHON'
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
runtime_version { major: 12 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
devices = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices
here = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())
x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=here)


def tiles(**options):
    """The tile of the product's kernel, in a program that is compiled anew."""
    options["xla_gpu_autotune_level"] = "0"
    text = jax.jit(lambda a, b: jnp.tanh(a @ b)).lower(x, x).compile(compiler_options=options).as_text()
    return re.search(r'"output_tiles":\[\{"sizes":\[(.*?)\]', text)[1].replace('"', "")


print("before:", tiles())
print("given results:", tiles(xla_gpu_load_autotune_results_from=sys.argv[1]))
print("after:", tiles())
PYTHON
found=$(JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/program.py" "$folder/results.txt")
echo "$found"
[[ $found == *"given results: 128,128"* && $found == *"after: 128,128"* && $found != *"before: 128,128"* ]] || {
  echo "this has changed"
  exit 1
}
