#!/usr/bin/env bash
# Compiled by numba, the sum of 20 million ones in float32 is 16,777,216, and their mean 0.84, where NumPy's are right.
#
# numba 0.68.1, numpy 2.4.6. One would take x.sum(), np.sum(x) and x.mean() in an njit function for NumPy's own, up to the
# last digit: the same names, documented as supported, and the type that comes out is float32 in both. NumPy adds in pairs of
# halves (np.sum's documentation says so), so that its error grows with the logarithm of the length. numba adds one number after
# the other in float32 (array_sum and array_mean in numba/np/arraymath.py), whose 24 bits end at 2^24: from there on a one is
# lost. The mean of 20 million losses of 0.1 is 0.105, and the longer the array, the smaller a mean becomes. No message, and
# without njit, or under NUMBA_DISABLE_JIT=1 as one would look for the reason, the numbers are right. With parallel=True each
# thread adds up its own part, and the sum depends on the number of threads. Right: x.sum(dtype=np.float64), or a float64
# total in a loop.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numba==0.68.1 numpy==2.4.6
cat >"$folder/sums.py" <<'PYTHON'
import numba
import numpy as np


def plain(x):
    return x.sum(), x.mean()


@numba.njit
def in_float64(x):
    return x.sum(dtype=np.float64)


compiled = numba.njit(plain)
parallel = numba.njit(parallel=True)(plain)
for value in (1, 0.1):
    x = np.full(20_000_000, value, np.float32)
    for name, function in (("NumPy", plain), ("numba", compiled)):
        total, mean = function(x)
        print(f"{value}, {name}: sum {total:.0f}, mean {mean:.3f}")
    print(f"{value}, numba in float64: {in_float64(x):.0f}")
x = np.ones(20_000_000, np.float32)
for threads in (1, 2):
    numba.set_num_threads(threads)
    print(f"parallel, threads {threads}: {parallel(x)[0]:.0f}")
PYTHON
found=$(NUMBA_NUM_THREADS=2 "$folder/venv/bin/python" "$folder/sums.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "1, NumPy: sum 20000000, mean 1.000
1, numba: sum 16777216, mean 0.839
1, numba in float64: 20000000
0.1, NumPy: sum 2000000, mean 0.100
0.1, numba: sum 2097152, mean 0.105
0.1, numba in float64: 2000000
parallel, threads 1: 16777216
parallel, threads 2: 20000000" ]] || {
  echo "this has changed"
  exit 1
}
