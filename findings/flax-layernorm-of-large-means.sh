#!/usr/bin/env bash
# Flax's LayerNorm of numbers around 4,000 has outputs in the thousands instead of around 1, in float32.
#
# flax 0.12.8 with jax 0.10.2, on CPU. A LayerNorm takes the mean away, so one would take it to give the same for x and for
# x + 4000, down to the digits that x + 4000 has in float32 (three behind the point). But linen's and nnx's LayerNorm take
# the variance as the mean of the squares less the square of the mean: two numbers of 16 million, whose difference is 1. At
# a mean of 1,000 outputs are off by more than 0.1, at 4,000 some rows' variance comes out as 0, and the row is multiplied
# by a thousand. jax.nn.standardize does the same; the other norms of Flax have the same argument. Hidden states with such
# means come up in deep and in converted models, and a few rows that are far off look like noise. There is an argument
# use_fast_variance, "less numerically stable"; that it is on, and how far off that can be, is easily missed. Right:
# use_fast_variance=False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
cat >"$folder/norm.py" <<'PYTHON'
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

x = jax.random.normal(jax.random.key(0), (64, 512))
norms = {
    "linen": lambda x: nn.LayerNorm().bind({"params": {"scale": jnp.ones(512), "bias": jnp.zeros(512)}})(x),
    "nnx": nnx.LayerNorm(512, rngs=nnx.Rngs(0)),
    "jax.nn.standardize": jax.nn.standardize,
    "use_fast_variance=False": nnx.LayerNorm(512, use_fast_variance=False, rngs=nnx.Rngs(0)),
}
for mean in (100, 1000, 4000):
    moved = x + mean
    exact = np.asarray(moved, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    for name, norm in norms.items():
        off = float(np.abs(np.asarray(norm(moved)) - exact).max())
        said = next((f"off by more than {bound}" for bound in (100, 0.1, 0.02) if off > bound), "right")
        print(f"mean {mean}, {name}: {said}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/norm.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "mean 100, linen: right
mean 100, nnx: right
mean 100, jax.nn.standardize: right
mean 100, use_fast_variance=False: right
mean 1000, linen: off by more than 0.1
mean 1000, nnx: off by more than 0.1
mean 1000, jax.nn.standardize: off by more than 0.1
mean 1000, use_fast_variance=False: right
mean 4000, linen: off by more than 100
mean 4000, nnx: off by more than 100
mean 4000, jax.nn.standardize: off by more than 100
mean 4000, use_fast_variance=False: right" ]] || {
  echo "this has changed"
  exit 1
}
