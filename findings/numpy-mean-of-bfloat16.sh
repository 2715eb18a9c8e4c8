#!/usr/bin/env bash
# NumPy's sum of a bfloat16 array stops growing at 256 times its numbers: the mean of 100,000 halves is 0.0013.
#
# numpy 2.4.6 with ml_dtypes 0.6.0. np.asarray of a JAX array, safetensors.numpy and JAX checkpoints give bfloat16 as a type
# of ml_dtypes. One would take x.mean() and x.sum() for as good as float16's, whose mean NumPy takes in float32, or as
# jax.numpy's, which sums in float32. For a type that isn't its own NumPy adds one number after the other in that type, and
# bfloat16 has 8 bits: 128 + 0.5 is 128. The mean of weights, a mean of losses or of checkpoints along an axis, and a standard
# deviation come out far too small, by more the longer the array, and nothing warns. (float16's standard deviation is infinite
# from some 65,000 numbers on: that is computed in float16.) np.dot, matmul, max and median are right. Right:
# dtype=np.float32, or astype first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 ml_dtypes==0.6.0
cat >"$folder/mean.py" <<'PYTHON'
import ml_dtypes
import numpy as np

for n in (100, 1_000, 100_000):
    draws = np.random.default_rng(0).normal(size=n)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        halves, normal = np.full(n, 0.5, dtype), draws.astype(dtype)
        columns = np.stack([halves, halves], 1).mean(0)[0]
        found = f"mean {halves.mean():.4f}, along an axis {columns:.4f}, in float32 {halves.mean(dtype=np.float32):.4f}"
        print(f"{n} halves, {np.dtype(dtype)}: {found}; std of {n} normal numbers {normal.std():.2f}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/mean.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "100 halves, float16: mean 0.5000, along an axis 0.5000, in float32 0.5000; std of 100 normal numbers 0.9"*"
1000 halves, bfloat16: mean 0.1279, along an axis 0.1279, in float32 0.5000; std of 1000 normal numbers 0.88
100000 halves, float16: mean 0.5000, along an axis 0.5000, in float32 0.5000; std of 100000 normal numbers inf
100000 halves, bfloat16: mean 0.0013, along an axis 0.0013, in float32 0.5000; std of 100000 normal numbers 0.21" ]] || {
  echo "this has changed"
  exit 1
}
