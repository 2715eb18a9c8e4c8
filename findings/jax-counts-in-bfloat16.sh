#!/usr/bin/env bash
# A histogram of a bfloat16 array by jax.numpy has at most 256 in each bin, and nanmean of many float16 numbers is 0.
#
# jax 0.10.2, on CPU. jnp.mean, sum and var of such arrays are right, as they are summed in float32. One would take counts for
# right as well: a count is a whole number, whatever it counts, and NumPy's histogram gives int64. But jnp.histogram adds
# up ones of the array's own type: in bfloat16 a bin stops at 256, as 256 + 1 is 256, and in float16 at 2,048. A histogram of
# weights or activations looks flat, a bin with half the numbers is as high as one with a hundredth, and density=True divides
# by the sum of these counts. jnp.nanmean and jnp.average(weights=...) divide by a number of elements, or a sum of weights, of
# that type: beyond 65,504 elements it is infinite in float16, and the mean 0. Nothing warns. Right: astype(jnp.float32) first.
# In the library: jax/_src/numpy/lax_numpy.py, histogram, whose weights are ones_like(a).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

# Half of all numbers are in the first of four bins, and a hundredth in the last.
numbers = np.repeat(np.array([0.125, 0.375, 0.625, 0.875], np.float32), [50_000, 40_000, 9_000, 1_000])
for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
    x = jnp.asarray(numbers, dtype)
    counts = [int(count) for count in jnp.histogram(x, 4, (0, 1))[0]]
    density = [round(float(d), 1) for d in jnp.histogram(x, 4, (0, 1), density=True)[0]]
    average = jnp.average(x, weights=jnp.ones_like(x))
    print(f"{jnp.dtype(dtype)}: counts {counts}, density {density}")
    print(f"    mean {jnp.mean(x):.2f}, nanmean {jnp.nanmean(x):.2f}, average {average:.2f}")
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "float32: counts [50000, 40000, 9000, 1000], density [2.0, 1.6, 0.4, 0.0]
    mean 0.28, nanmean 0.28, average 0.28
float16: counts [2048, 2048, 2048, 1000], density [1.1, 1.1, 1.1, 0.6]
    mean 0.28, nanmean 0.00, average 0.00
bfloat16: counts [256, 256, 256, 256], density [1.0, 1.0, 1.0, 1.0]
    mean 0.28, nanmean 0.28, average 0.28" ]] || {
  echo "this has changed"
  exit 1
}
