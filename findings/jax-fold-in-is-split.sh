#!/usr/bin/env bash
# jax.random.fold_in(key, i) is the key that split(key, n) has in place i: both used on one key draw the same numbers.
#
# jax 0.10.2 and flax 0.12.8, on CPU. A usual beginning is "params_key, data_key = split(key)", and then "fold_in(key,
# step)" in the loop. fold_in promises "a new PRNG key", one would say another one than split's. They are the same keys:
# fold_in(key, 0) is split(key)[0] and fold_in(key, 1) is split(key)[1], whatever the number of keys that one splits
# into. The noise of step 0 is then what the first weights were drawn from, and that of step 1 what the first batch was.
# jax_debug_key_reuse, which stops a key that is drawn from twice, lets it pass. Flax's nnx.Rngs makes its keys by
# fold_in, so that the first of nnx.Rngs(0) is split's first of key(0). It holds for the default generator and for
# "rbg", not for "unsafe_rbg", and not with jax_threefry_partitionable=False, which was the default before JAX 0.5.
# Right: fold_in on a key that came out of split and is used for nothing else, or fold_in alone, each purpose with
# numbers of its own.
# In the library: jax/_src/random/threefry2x32.py, where _threefry_split_foldlike hashes the place in the list as
# _threefry_fold_in hashes the number: as a count of 64 bits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import jax
import numpy as np
from flax import nnx


def equal(key: jax.Array) -> int:
    keys = jax.random.split(key, 100)
    folded = [jax.random.fold_in(key, i) for i in range(100)]
    return sum(np.array_equal(jax.random.key_data(a), jax.random.key_data(b)) for a, b in zip(keys, folded))


def draw(key: jax.Array) -> list[str]:
    return [f"{x:.3f}" for x in jax.random.normal(key, (4,)).tolist()]


key = jax.random.key(0)
params_key, data_key = jax.random.split(key)
print(f"weights: {draw(params_key)}")
print(f"batch: {draw(data_key)}")
for step in range(3):
    print(f"noise of step {step}: {draw(jax.random.fold_in(key, step))}")
for name in ("threefry2x32", "rbg", "unsafe_rbg"):
    print(f"{name}: {equal(jax.random.key(7, impl=name))} of 100 keys are the same")
with jax.threefry_partitionable(False):
    print(f"threefry2x32, not partitionable: {equal(jax.random.key(7))} of 100 keys are the same")
first = jax.random.key_data(nnx.Rngs(0).params())
print(f"nnx.Rngs(0).params() is split(key(0))[0]: {np.array_equal(first, jax.random.key_data(params_key))}")
with jax.debug_key_reuse(True):
    key = jax.random.key(0)
    first = jax.random.normal(jax.random.split(key)[0])
    print(f"jax_debug_key_reuse lets it pass: {bool(first == jax.random.normal(jax.random.fold_in(key, 0)))}")
    try:
        jax.random.normal(params_key), jax.random.normal(params_key)
    except jax.errors.KeyReuseError:
        print("jax_debug_key_reuse stops the same name")
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "weights: ['1.004', '-0.906', '-0.748', '-1.171']
batch: ['-2.442', '-2.036', '0.206', '-0.354']
noise of step 0: ['1.004', '-0.906', '-0.748', '-1.171']
noise of step 1: ['-2.442', '-2.036', '0.206', '-0.354']
noise of step 2: ['1.296', '1.355', '-0.410', '-0.772']
threefry2x32: 100 of 100 keys are the same
rbg: 100 of 100 keys are the same
unsafe_rbg: 0 of 100 keys are the same
threefry2x32, not partitionable: 0 of 100 keys are the same
nnx.Rngs(0).params() is split(key(0))[0]: True
jax_debug_key_reuse lets it pass: True
jax_debug_key_reuse stops the same name" ]] || {
  echo "this has changed"
  exit 1
}
