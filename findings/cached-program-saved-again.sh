#!/usr/bin/env bash
# A CPU program that came out of JAX's persistent cache is serialized without its code: it loads, and fails when called.
#
# jax 0.10.2. `jax.experimental.serialize_executable` turns a compiled program into bytes. One would take the bytes to be
# as good whether XLA has just compiled the program or JAX has read it from its compilation cache. They are not: after a
# cache hit they are a third of the size, `deserialize_and_load` takes them, and the first call says that a function is
# not found. So a program that is to be saved has to be compiled with the cache off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat >"$folder/save.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
from jax.experimental.serialize_executable import deserialize_and_load, serialize

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def layers(x, w):
    for _ in range(3):
        x = jnp.tanh(x @ w) + jnp.sum(x, -1, keepdims=True)
    return x


x = w = jnp.ones((32, 32))
kept, *trees = serialize(jax.jit(layers).lower(x, w).compile())
loaded = deserialize_and_load(kept, *trees)
try:
    print(f"{len(kept)} bytes, called: {float(loaded(x, w).sum()):.0f}")
except jax.errors.JaxRuntimeError as error:
    print(f"{len(kept)} bytes, called: {error}")
PYTHON
fresh=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/save.py" "$folder/cache")
cached=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/save.py" "$folder/cache")
echo "compiled: $fresh"
echo "out of the cache: $cached"
[[ $fresh == *"called: 34636800" && $cached == *"called: "*" not found "* ]] || {
  echo "this has changed"
  exit 1
}
