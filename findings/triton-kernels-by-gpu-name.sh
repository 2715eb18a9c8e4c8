#!/usr/bin/env bash
# JAX 0.11 lowers a Pallas-Triton kernel by the GPU's name, not by the compute capability that the compiler was given.
#
# jax 0.11.2 with jax-cuda13-plugin 0.11.2, on a machine without a GPU. A program can be compiled ahead for a GPU that a
# target description names (jax.experimental.topologies). One would take the description's compute capability to decide
# which kernels it gets. It does for XLA's own; a Triton kernel of Pallas is lowered for the capability that a table in JAX
# has for the name of the devices of the mesh (within shard_map; outside of it the default device is asked, whatever the
# program is for). "NVIDIA L40" is in the table, "NVIDIA L40S" and "NVIDIA GeForce RTX 3090" are not, and for these the
# default device is asked too, which here is a CPU: "No supported GPU devices found". The same description under a name
# of the table compiles. jax 0.10.2 has no such table and compiles them all. Needs Python 3.12 or later.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=$(command -v python3.13 || command -v python3.12)
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "jax[cuda13-local]==0.11.2"
cat >"$folder/names.py" <<'PYTHON'
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import triton
from jax.sharding import Mesh, NamedSharding, PartitionSpec

warnings.simplefilter("ignore")
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 102400 shared_memory_per_block_optin: 101376
  threads_per_core_limit: 1536 core_count: 142 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 864000000000 l2_cache_size: 100663296 clock_rate_ghz: 2.5 device_memory_size: 48305799168
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 8 minor: 9 }
}
platform_name: "CUDA"
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NAME"
"""


def double(x_ref, o_ref):
    o_ref[...] = x_ref[...] * 2


def program(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(double, out_shape=shape, compiler_params=triton.CompilerParams())(x)


for name in ("NVIDIA L40", "NVIDIA L40S", "NVIDIA GeForce RTX 3090"):
    found = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.replace("NAME", name), topology="1x1x1"
    )
    mesh, split = Mesh(np.array(found.devices), ("x",)), PartitionSpec("x")
    x = jax.ShapeDtypeStruct((128,), jnp.float32, sharding=NamedSharding(mesh, split))
    sharded = jax.shard_map(program, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    try:
        jax.jit(sharded).lower(x).compile()
    except RuntimeError as error:
        print(f"{name}: {str(error)[:34]}")
    else:
        print(f"{name}: compiled")
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/names.py" 2>"$folder/errors") || { cat "$folder/errors"; exit 1; }
echo "$found"
[[ $found == "NVIDIA L40: compiled
NVIDIA L40S: No supported GPU devices found, pl
NVIDIA GeForce RTX 3090: No supported GPU devices found, pl" ]] || {
  echo "this has changed"
  exit 1
}
