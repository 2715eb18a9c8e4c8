#!/usr/bin/env bash
# JAX takes the lower 32 bits of a seed: seeds that differ above those give the same numbers, though a key has room for 64.
#
# jax 0.10.2 with flax 0.12.8. jax.random.key(seed) is documented to take "a 64- or 32-bit integer used as the value of the
# key", and a key is two words of 32 bits. One would take 5 and 2^32 + 5 for two seeds, as they are in NumPy, or for an
# error, as such a number is in jnp.asarray and in fold_in. But without jax_enable_x64 the upper half is dropped: seeds made
# as run << 32 | process, or of a hash's upper half, are all one, and "ten runs with ten seeds" are one run ten times, with
# no spread between them. nnx.Rngs takes the same way. With jax_enable_x64 the keys differ, so that this setting changes all
# draws of such seeds, too. Right: fold_in(key(upper), lower), or seeds below 2^32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 numpy==2.4.6
cat >"$folder/seeds.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def words(seed: int) -> list[int]:
    return jax.random.key_data(jax.random.key(seed)).tolist()


def error(function) -> str:
    try:
        return str(function())
    except OverflowError:
        return "OverflowError"


for wide in (False, True):
    jax.config.update("jax_enable_x64", wide)
    print(f"jax_enable_x64={wide}: the keys of 5 and 2^32 + 5 are {words(5)} and {words(2**32 + 5)}")
jax.config.update("jax_enable_x64", False)
draws = {float(jax.random.normal(nnx.Rngs(run << 32 | 1).params())) for run in range(10)}
print(f"nnx.Rngs, 10 seeds: {len(draws)} different draws")
print(f"NumPy, 10 seeds: {len({np.random.default_rng(run << 32 | 1).normal() for run in range(10)})} different draws")
print("jnp.asarray:", error(lambda: jnp.asarray(2**32 + 5)))
print("fold_in:", error(lambda: jax.random.fold_in(jax.random.key(0), 2**32 + 5)))
PYTHON
found=$("$folder/venv/bin/python" "$folder/seeds.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "jax_enable_x64=False: the keys of 5 and 2^32 + 5 are [0, 5] and [0, 5]
jax_enable_x64=True: the keys of 5 and 2^32 + 5 are [0, 5] and [1, 5]
nnx.Rngs, 10 seeds: 1 different draws
NumPy, 10 seeds: 10 different draws
jnp.asarray: OverflowError
fold_in: OverflowError" ]] || {
  echo "this has changed"
  exit 1
}
