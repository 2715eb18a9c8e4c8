#!/usr/bin/env bash
# With NaN among numbers in bfloat16 or float8, NumPy's sort, argsort and unique leave the numbers out of order.
#
# numpy 2.4.6 with ml_dtypes 0.6.0. np.asarray of a JAX array and safetensors give bfloat16 as a type of ml_dtypes. One
# would take NaN to be sorted to the end, as NumPy documents it and does in float16 and float32, and as jnp.sort does in
# bfloat16. But these types are compared by < alone, where NaN is neither before nor behind anything, so that numbers don't
# get past it. np.sort of 3, NaN, 1, 2, NaN, 1 is the same again, argsort is 0 to 5, and np.unique has a number twice. With
# ten NaN among 10,000 losses a stable argsort has five of the twenty largest at its end, and the usual one is out of order
# as well. max, median and quantile say NaN, so those are safe; a ranking of rows, a cut at the k-th or a count of values
# isn't, and there is no warning. Right: .astype(np.float32) first, or jnp.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 ml_dtypes==0.6.0
cat >"$folder/sort.py" <<'PYTHON'
import ml_dtypes
import numpy as np

few = np.array([3, np.nan, 1, 2, np.nan, 1], np.float32)
losses = np.random.default_rng(0).normal(size=10_000).astype(ml_dtypes.bfloat16)
losses[::1000] = np.nan
for dtype in (np.float16, np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
    x = few.astype(dtype)
    sorts = f"sort {np.sort(x).tolist()}, argsort {np.argsort(x, stable=True).tolist()}, unique {np.unique(x).tolist()}"
    print(f"{np.dtype(dtype)}: {sorts}")
bound = np.sort(losses[~np.isnan(losses)].astype(np.float32))[-20]  # the twentieth from above
for x in (losses.astype(np.float32), losses):
    for kind in ("quicksort", "stable"):
        ranked = x[np.argsort(x, kind=kind)].astype(np.float32)
        ranked = ranked[~np.isnan(ranked)]
        order, largest = bool((np.diff(ranked) >= 0).all()), int((ranked[-20:] >= bound).sum())
        print(f"{x.dtype}, 10 NaN in 10,000, {kind}: in order {order}, of the last 20 {largest} are the largest")
PYTHON
found=$("$folder/venv/bin/python" "$folder/sort.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "float16: sort [1.0, 1.0, 2.0, 3.0, nan, nan], argsort [2, 5, 3, 0, 1, 4], unique [1.0, 2.0, 3.0, nan]
float32: sort [1.0, 1.0, 2.0, 3.0, nan, nan], argsort [2, 5, 3, 0, 1, 4], unique [1.0, 2.0, 3.0, nan]
bfloat16: sort [3.0, nan, 1.0, 2.0, nan, 1.0], argsort [0, 1, 2, 3, 4, 5], unique [3.0, nan, 1.0, 2.0, nan, 1.0]
float8_e4m3fn: sort [3.0, nan, 1.0, 2.0, nan, 1.0], argsort [0, 1, 2, 3, 4, 5], unique [3.0, nan, 1.0, 2.0, nan, 1.0]
float32, 10 NaN in 10,000, quicksort: in order True, of the last 20 20 are the largest
float32, 10 NaN in 10,000, stable: in order True, of the last 20 20 are the largest
bfloat16, 10 NaN in 10,000, quicksort: in order False, of the last 20 20 are the largest
bfloat16, 10 NaN in 10,000, stable: in order False, of the last 20 5 are the largest" ]] || {
  echo "this has changed"
  exit 1
}
