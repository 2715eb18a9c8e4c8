#!/usr/bin/env bash
# Sums over rows that are written as products with ones become one product, of all that is summed, once all is there.
#
# jaxlib 0.10.2 with its CUDA 12 plugin, compiled for an H100 on a machine without a GPU. ones @ g sums the rows of g. One
# would take XLA to make a kernel of each, wherever in a program they stand. It merges products that share a factor: here
# one kernel has the sums of all four arrays, 3,072 columns, so that all four have to be in memory together until then.
# In a training step they are the gradients of all layers. Sums by reduce stay apart.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
"$folder/venv/bin/pip" install -q --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2
cat >"$folder/program.py" <<'PYTHON'
import re

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


def kernels(f, *arguments):
    """The results of the kernels that XLA makes of f for an H100."""
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape, dtype in arguments]
    text = jax.jit(f).lower(*given).compile(compiler_options={"xla_gpu_autotune_level": "0"}).as_text()
    entry = text[text.index("ENTRY") :]
    return re.findall(r"= (.+?) (?:fusion|custom-call|copy)\(", entry.replace("{1,0}", "").replace("{0}", ""))


shape = ((32768, 768), jnp.bfloat16)


def by_product(*rows):
    ones = jnp.ones((1, 32768), jnp.bfloat16)
    return [jnp.dot(ones, g) for g in rows]


print("products:", kernels(by_product, *[shape] * 4))
print("sums:", kernels(lambda *rows: [g.sum(0, dtype=jnp.float32) for g in rows], *[shape] * 4))
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py" 2>/dev/null)
echo "$found"
[[ $found == "products: ["*",3072]"*"
sums: ["* && ${found##*sums} != *"3072"* ]] || {
  echo "this has changed"
  exit 1
}
