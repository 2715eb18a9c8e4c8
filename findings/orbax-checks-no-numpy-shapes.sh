#!/usr/bin/env bash
# orbax restores an array of another shape than the target's if the target is of NumPy: only JAX arrays are compared.
#
# orbax-checkpoint 0.12.8 with jax 0.10.2. A target says what is to be restored, and one of another shape is refused:
# with a jax.Array of (4,) for a saved one of (6,), StandardCheckpointer raises "not compatible with the stored shape".
# One would take that to hold for every array. Where the target has a NumPy array, or where one was saved, the shape is
# not looked at: the array comes back in the target's type, and in the size that it was saved in. PyTreeCheckpointer,
# given item without restore_args, does so with JAX arrays, too. Statistics, masks and counts, often kept in NumPy, then
# are another run's size, and broadcasting hides that: a vector of one number goes with any. Right: JAX arrays on both
# sides, or a comparison of one's own of what came back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

folder = tempfile.TemporaryDirectory()
standard, plain = ocp.StandardCheckpointer(), ocp.PyTreeCheckpointer()


def show(name: str, checkpointer: ocp.Checkpointer, saved: object, target: object, **options) -> None:
    path = f"{folder.name}/{name.replace(' ', '_')}"
    checkpointer.save(path, {"x": saved})
    if checkpointer is standard:
        checkpointer.wait_until_finished()
    try:
        found = checkpointer.restore(path, **options) if options else checkpointer.restore(path, {"x": target})
        print(f"{name}: {found['x'].shape} {found['x'].dtype}")
    except ValueError as error:
        print(f"{name}: {str(error).split('.')[0]}")


six, four = np.arange(6, dtype=np.float32), np.zeros(4, np.int32)
show("JAX", standard, jnp.array(six), jnp.array(four))
show("NumPy saved, ShapeDtypeStruct asked for", standard, six, jax.ShapeDtypeStruct((4,), jnp.int32))
show("NumPy", standard, six, four)
show("JAX saved, NumPy asked for", standard, jnp.array(six), four)
show("JAX, PyTreeCheckpointer with item", plain, jnp.array(six), None, item={"x": jnp.array(four)})
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "JAX: Requested shape: (4,) is not compatible with the stored shape: (6,)
NumPy saved, ShapeDtypeStruct asked for: (6,) int32
NumPy: (6,) int32
JAX saved, NumPy asked for: (6,) int32
JAX, PyTreeCheckpointer with item: (6,) float32" ]] || {
  echo "this has changed"
  exit 1
}
