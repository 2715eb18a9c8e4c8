#!/usr/bin/env bash
# orbax writes the arrays "a.b" and "a" > "b" of one tree to one place: both come back with the numbers of one of them.
#
# orbax-checkpoint 0.12.8 with jax 0.10.2. Names of parameters have dots in PyTorch's files, in adapters and in flattened
# trees, and a dict may have such names beside nested ones: {"layers": {"0": weights}, "layers.0": their average}. One would
# take a checkpoint for what was saved, or for an error at save. An array is stored under its path, joined by dots, so that
# these two have one place: the checkpoint's tree lists both, the numbers of one are written over the other's, and restore
# gives both the same, without a word. (If the shapes differ, save raises an error from deep inside.) "layers/0" beside
# "layers" > "0" is right. Right: no dots in keys, or an item of the checkpoint (ocp.args.Composite) for each tree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8
cat >"$folder/dots.py" <<'PYTHON'
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

folder = Path(sys.argv[1]) / "checkpoints"
checkpointer = ocp.StandardCheckpointer()


def back(name: str, tree: dict) -> None:
    checkpointer.save(folder / name, tree)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(folder / name, jax.tree.map(jnp.zeros_like, tree))
    kept = jax.tree.all(jax.tree.map(jnp.array_equal, tree, restored))
    first, second = jax.tree.leaves(restored)
    print(f"{name}: comes back as saved {bool(kept)}, both with the same numbers {bool((first == second).all())}")


for name, key in {"dot": "layers.0", "slash": "layers/0", "another name": "statistics"}.items():
    back(name, {"layers": {"0": jnp.array([1.0, 2.0])}, key: jnp.array([3.0, 4.0])})
PYTHON
found=$("$folder/venv/bin/python" "$folder/dots.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == "dot: comes back as saved False, both with the same numbers True
slash: comes back as saved True, both with the same numbers False
another name: comes back as saved True, both with the same numbers False" ]] || {
  echo "this has changed"
  exit 1
}
