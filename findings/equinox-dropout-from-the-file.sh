#!/usr/bin/env bash
# Equinox loads dropout's rate with the weights, and whether it is on, in place of what the new model was built with.
#
# equinox 0.13.8 with jax 0.10.2. tree_deserialise_leaves(file, like) reads weights into a model that the program has
# built: its settings are its own, one would say, and only the weights are the file's; so it is with epsilon of
# LayerNorm. But what is not a static field is a leaf, and Dropout's p and inference are, as are a program's own fields
# of type float, int or bool. They are in the file, and come back from it: a model built with Dropout(0.1) for
# fine-tuning has the 0.5 that it was trained with first. And one that was saved after inference_mode, as is natural for
# the best model, comes back with its dropout off, however the new model was built: it is then trained without any.
# Numbers are also cut to the new field's type, 1.5 to 1. Nothing is said. Right: own settings as
# eqx.field(static=True); after loading, the rate put back by eqx.tree_at and eqx.nn.inference_mode(model, value=False);
# or eqx.filter(model, eqx.is_array) saved alone.
# In the library: equinox/_serialisation.py, default_deserialise_filter_spec, the branch for bool, float, complex and
# int.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q equinox==0.13.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import io

import equinox as eqx
import jax


class Model(eqx.Module):
    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    norm: eqx.nn.LayerNorm
    scale: float
    window: int

    def __init__(self, p: float, eps: float, scale: float, window: float, seed: int):
        self.linear = eqx.nn.Linear(2, 2, key=jax.random.key(seed))
        self.dropout, self.norm = eqx.nn.Dropout(p), eqx.nn.LayerNorm(2, eps=eps)
        self.scale, self.window = scale, window


def show(name: str, model: Model) -> None:
    dropout = f"p {model.dropout.p}, inference {model.dropout.inference}"
    print(f"{name}: {dropout}, eps {model.norm.eps}, scale {model.scale}, window {model.window}")


saved = eqx.nn.inference_mode(Model(p=0.5, eps=1e-6, scale=8.0, window=1.5, seed=0))
new = Model(p=0.1, eps=1e-5, scale=4.0, window=16, seed=1)
file = io.BytesIO()
eqx.tree_serialise_leaves(file, saved)
file.seek(0)
loaded = eqx.tree_deserialise_leaves(file, new)
show("saved", saved)
show("built for fine-tuning", new)
show("the same after loading", loaded)
ones = jax.numpy.ones(1000)
print(f"dropped of 1000, built: {int((new.dropout(ones, key=jax.random.key(0)) == 0).sum())}")
print(f"dropped of 1000, loaded: {int((loaded.dropout(ones, key=jax.random.key(0)) == 0).sum())}")
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "saved: p 0.5, inference True, eps 1e-06, scale 8.0, window 1.5
built for fine-tuning: p 0.1, inference False, eps 1e-05, scale 4.0, window 16
the same after loading: p 0.5, inference True, eps 1e-05, scale 8.0, window 1
dropped of 1000, built: 83
dropped of 1000, loaded: 0" ]] || {
  echo "this has changed"
  exit 1
}
