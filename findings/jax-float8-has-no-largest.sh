#!/usr/bin/env bash
# JAX turns a number just beyond float8's largest into NaN, where PyTorch's float8 of the same name gives the largest.
#
# jax 0.10.2 with ml_dtypes 0.6.0, on CPU. Weights or activations in float8_e4m3fn go up to 448. One would take a larger
# number to become 448, as in PyTorch 2.13.0, in hardware's conversions and in jnp's own conversions to int8 and to
# float4_e2m1fn, or infinity, as in float16. It becomes NaN, from 465 on (464 is rounded to 448), and one NaN spoils the
# whole product: a scale that is one part in twenty too small, or taken from the last step, as delayed scaling does,
# makes a loss of NaN. The types differ among themselves: float8_e5m2 and float8_e4m3 have infinity, the fnuz types NaN,
# float4 its largest, and NaN in float4 is -0: there the fault is gone. NumPy with ml_dtypes does the same. Right:
# jnp.clip to jnp.finfo(dtype).max first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0
cat >"$folder/show.py" <<'PYTHON'
import jax.numpy as jnp
import numpy as np

x = [448.0, 464.0, 465.0, 1e6, jnp.inf, jnp.nan]
print(f"numbers: {x}")
for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3", "float8_e4m3fnuz", "float4_e2m1fn", "int8"):
    dtype = getattr(jnp, name)
    found = jnp.array(x).astype(dtype).astype(jnp.float32).tolist()
    print(f"{name}: {found}")
print(f"float8_e4m3fn, NumPy: {np.array(x, np.float32).astype(jnp.float8_e4m3fn).astype(np.float32).tolist()}")
largest = float(jnp.finfo(jnp.float8_e4m3fn).max)
print(f"float8_e4m3fn, clipped: {jnp.clip(jnp.array(x), -largest, largest).astype(jnp.float8_e4m3fn).astype(jnp.float32).tolist()}")
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "numbers: [448.0, 464.0, 465.0, 1000000.0, inf, nan]
float8_e4m3fn: [448.0, 448.0, nan, nan, nan, nan]
float8_e5m2: [448.0, 448.0, 448.0, inf, inf, nan]
float8_e4m3: [inf, inf, inf, inf, inf, nan]
float8_e4m3fnuz: [nan, nan, nan, nan, nan, nan]
float4_e2m1fn: [6.0, 6.0, 6.0, 6.0, 6.0, -0.0]
int8: [127.0, 127.0, 127.0, 127.0, 127.0, 0.0]
float8_e4m3fn, NumPy: [448.0, 448.0, nan, nan, nan, nan]
float8_e4m3fn, clipped: [448.0, 448.0, 448.0, 448.0, 448.0, nan]" ]] || {
  echo "this has changed"
  exit 1
}
