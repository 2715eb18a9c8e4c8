#!/usr/bin/env bash
# On a CPU jax.device_put shares a NumPy array's memory, or copies it, by its address, and may_alias=False changes nothing.
#
# jax 0.10.2, numpy 2.4.6. Arrays of JAX are immutable, device_put's documentation promises "a copy", and with may_alias=False
# that x "will be copied". So one would fill a buffer with one batch after the other and put each of them. On a CPU the result
# is the buffer itself if that starts at a multiple of 64 bytes, and a copy otherwise: all batches that were put are the last
# one, or they are not. Memory of NumPy's own is at such an address now and then, what mmap and shared memory give always is,
# so that a test with a small np.zeros proves nothing. may_alias only reaches arrays that are JAX's already (_shard_np_array
# in jax/_src/interpreters/pxla.py doesn't look at it; JAX's issue 37830). make_array_from_process_local_data shares as well.
# What helps: jnp.array, jnp.asarray, or .copy() of the array first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 numpy==2.4.6
cat >"$folder/put.py" <<'PYTHON'
import mmap

import jax
import jax.numpy as jnp
import numpy as np

one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
PUTS = {
    "device_put": jax.device_put,
    "device_put, may_alias=False": lambda batch: jax.device_put(batch, may_alias=False),
    "make_array_from_process_local_data": lambda batch: jax.make_array_from_process_local_data(one_device, batch),
    "device_put of a copy": lambda batch: jax.device_put(batch.copy()),
    "jnp.asarray": jnp.asarray,
    "jnp.array": jnp.array,
}


def buffer(n: int, past: int) -> np.ndarray:
    """n numbers from an address that is `past` bytes beyond a multiple of 64."""
    raw = np.zeros(4 * n + 128, np.uint8)
    start = -raw.ctypes.data % 64 + past
    return raw[start : start + 4 * n].view(np.int32)


def batches(put, where: np.ndarray) -> list[int]:
    found = []
    for number in range(3):
        where[:] = number
        found.append(jax.block_until_ready(put(where)))
    return [int(batch[0]) for batch in found]


for name, put in PUTS.items():
    # The copy's own address is NumPy's choice: it doesn't matter, as nothing else writes there.
    aligned, other = batches(put, buffer(1000, 0)), batches(put, buffer(1000, 16))
    mapped = batches(put, np.frombuffer(mmap.mmap(-1, 4000), np.int32))
    print(f"{name}: {aligned}, 16 bytes on {other}, in mmap {mapped}")
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/put.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "device_put: [2, 2, 2], 16 bytes on [0, 1, 2], in mmap [2, 2, 2]
device_put, may_alias=False: [2, 2, 2], 16 bytes on [0, 1, 2], in mmap [2, 2, 2]
make_array_from_process_local_data: [2, 2, 2], 16 bytes on [0, 1, 2], in mmap [2, 2, 2]
device_put of a copy: [0, 1, 2], 16 bytes on [0, 1, 2], in mmap [0, 1, 2]
jnp.asarray: [0, 1, 2], 16 bytes on [0, 1, 2], in mmap [0, 1, 2]
jnp.array: [0, 1, 2], 16 bytes on [0, 1, 2], in mmap [0, 1, 2]" ]] || {
  echo "this has changed"
  exit 1
}
