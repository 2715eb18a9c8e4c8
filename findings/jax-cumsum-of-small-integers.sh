#!/usr/bin/env bash
# jnp.cumsum of small integers wraps around at 128 or 256, where jnp.sum and NumPy's cumsum take a wider type.
#
# jax 0.10.2. The places of tokens are often the running sum of a mask of zeros and ones, and offsets in a packed row
# that of lengths. jnp.cumsum is "JAX implementation of numpy.cumsum"; numpy.cumsum makes an int8 or uint8 array 64 bits
# wide, and jnp.sum makes it 32 bits wide, so one would take jnp.cumsum to do so, too. It keeps the type: of 300 ones,
# the last sum is 44. Rows shorter than 128 or 256 tokens are right, so tests pass, and long ones have their positions
# start again. The same in uint16 past 65,535 tokens. jnp.nancumsum, add.accumulate and jnp.dot (NumPy's as well) are no
# better; bool is summed in int32, and jnp.cumulative_sum, another name for the same in the array API, widens. The text
# of the function says that the type is the input's. Right: dtype=jnp.int32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import jax.numpy as jnp
import numpy as np

for dtype in ("bool", "int8", "uint8", "uint16"):
    ones = jnp.ones(70_000 if dtype == "uint16" else 300, dtype)
    sums = {"sum": jnp.sum(ones), "cumsum": jnp.cumsum(ones)[-1], "cumulative_sum": jnp.cumulative_sum(ones)[-1]}
    sums |= {"NumPy's cumsum": np.cumsum(np.asarray(ones))[-1]}
    print(f"{dtype}, {len(ones)} ones: " + ", ".join(f"{name} {int(total)} in {total.dtype}" for name, total in sums.items()))
mask = jnp.ones((1, 300), jnp.int8)
positions = jnp.cumsum(mask, axis=1) - 1
print(f"positions 126 to 129 of a mask in int8: {positions[0, 126:130].tolist()}")
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "bool, 300 ones: sum 300 in int32, cumsum 300 in int32, cumulative_sum 300 in int32, NumPy's cumsum 300 in int64
int8, 300 ones: sum 300 in int32, cumsum 44 in int8, cumulative_sum 300 in int32, NumPy's cumsum 300 in int64
uint8, 300 ones: sum 300 in uint32, cumsum 44 in uint8, cumulative_sum 300 in uint32, NumPy's cumsum 300 in uint64
uint16, 70000 ones: sum 70000 in uint32, cumsum 4464 in uint16, cumulative_sum 70000 in uint32, NumPy's cumsum 70000 in uint64
positions 126 to 129 of a mask in int8: [126, 127, -128, -127]" ]] || {
  echo "this has changed"
  exit 1
}
