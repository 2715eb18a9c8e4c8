#!/usr/bin/env bash
# Rounding a value explicitly makes XLA's program for a GPU read and write less.
#
# jaxlib 0.10.2 with its CUDA 12 plugin, compiled for an H100 on a machine without a GPU. A value is computed in float32,
# stored as bfloat16, and summed over rows: the gradient of an activation and that of the bias before it. One would take
# `reduce_precision` to the format that the value is stored in anyway to cost an operation. Without it XLA takes the sum of
# the unrounded value, as it may keep excess precision, and for that writes all of it in float32 first, and reads it again
# for both results. With it, one kernel writes the rounded value and sums it up on the way.
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


shape = ((32768, 3072), jnp.bfloat16)


def gradients(x, g, rounded):
    x, g = x.astype(jnp.float32), g.astype(jnp.float32)
    dx = jax.vjp(lambda x: jax.nn.gelu(x, approximate=True), x)[1](g)[0]
    dx = dx.astype(jnp.bfloat16)
    if rounded:
        dx = jax.lax.reduce_precision(dx, 8, 7)
    return dx, dx.sum(0, dtype=jnp.float32)


print("as it is:", kernels(lambda x, g: gradients(x, g, False), shape, shape))
print("rounded:", kernels(lambda x, g: gradients(x, g, True), shape, shape))
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py" 2>/dev/null)
echo "$found"
[[ $found == "as it is: ["*"f32[32768,3072]"*"
rounded: ["* && ${found##*rounded} != *"f32[32768,3072]"* ]] || {
  echo "this has changed"
  exit 1
}
