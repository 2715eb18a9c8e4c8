#!/usr/bin/env bash
# JAX's cache of compiled programs misses every program once its folder has been moved or copied.
#
# jax 0.10.2, seen on CPU; mended in 0.11. One would take a folder of cached programs to be good wherever it lies, on
# another path or on another machine of the same kind: an entry's name is a hash of the program, the options and the versions.
# But JAX sets an option of XLA by itself, on every backend, the folder for autotuned fusions, which it puts below the cache's own folder, and
# leaves that option in the hash, so the path of the folder is a part of each key. A restored CI cache at another path, or
# one of another user, compiles (and on a GPU tunes) everything anew, without a word.
# With jax_persistent_cache_enable_xla_caches "none" the copy is used, in 0.10.2 too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat >"$folder/program.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_enable_xla_caches", sys.argv[2])
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((64, 64))).block_until_ready()
print("hits:", sum(event.endswith("/cache_hits") for event in events))
PYTHON
run() { echo "$1, xla caches $2: $(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py" "$folder/$1" "$2")"; }
usual=xla_gpu_per_fusion_autotune_cache_dir
found=$(
  run first $usual && run first $usual && cp -r "$folder/first" "$folder/copy" && run copy $usual
  run second none && cp -r "$folder/second" "$folder/copied" && run copied none
)
echo "$found"
numbers=$(grep -o '[0-9]*$' <<<"$found" | tr '\n' ' ')
[[ $numbers == "0 3 0 0 3 " ]] || {
  echo "this has changed"
  exit 1
}
