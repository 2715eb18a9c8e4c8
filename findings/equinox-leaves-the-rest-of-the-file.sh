#!/usr/bin/env bash
# Equinox reads as many arrays as the model has: a file of four layers loads as two, and the head is the third layer.
#
# equinox 0.13.8 with jax 0.10.2. tree_deserialise_leaves compares shapes and types: an array of another shape is
# refused. One would take a file with other arrays than the model's to be refused, too. But arrays are read one behind
# the other, without names, until the model has all of its own, and whether the file is at its end is not looked at. A
# model of two layers takes the first two of four, and what comes behind the layers gets the third one's numbers, if the
# shapes allow: here the head is the saved model's layer 2, and the saved head is not read at all. Two fields of one
# shape that have changed places in the class are swapped in the same way. A file that is too short does raise an error.
# Right: the number of layers and of leaves in the file's first line, compared before the arrays are read, and a read of
# the file's rest.
# In the library: equinox/_serialisation.py, tree_deserialise_leaves.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q equinox==0.13.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import io

import equinox as eqx
import jax
import jax.numpy as jnp


class Model(eqx.Module):
    layers: list[jax.Array]
    head: jax.Array

    def __init__(self, n_layers: int, width: int = 2, number: float = 0.0):
        self.layers = [jnp.full((width, width), number * (i + 1)) for i in range(n_layers)]
        self.head = jnp.full((width, width), number * 100)


def show(name: str, new: Model) -> None:
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, Model(4, number=1.0))
    size = file.tell()
    file.seek(0)
    try:
        model = eqx.tree_deserialise_leaves(file, new)
        layers = [float(layer[0, 0]) for layer in model.layers]
        print(f"{name}: layers {layers}, head {float(model.head[0, 0])}, {size - file.tell()} bytes not read")
    except Exception as error:
        print(f"{name}: {type(error).__name__}")


show("four layers", Model(4))
show("two layers", Model(2))
show("no layer", Model(0))
show("five layers", Model(5))
show("four layers of another width", Model(4, width=3))
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "four layers: layers [1.0, 2.0, 3.0, 4.0], head 100.0, 0 bytes not read
two layers: layers [1.0, 2.0], head 3.0, 288 bytes not read
no layer: layers [], head 1.0, 576 bytes not read
five layers: TreePathError
four layers of another width: RuntimeError" ]] || {
  echo "this has changed"
  exit 1
}
