#!/usr/bin/env bash
# nnx.update loads parameters of other shapes, names and number without a word: what isn't in the state stays random.
#
# flax 0.12.8 with jax 0.10.2. nnx.update(model, state) is how parameters, of a checkpoint, say, come into a model. One
# would take a name that the model or the checkpoint doesn't have, or another shape, for an error, as in nnx.merge or in
# PyTorch's load_state_dict. A misspelt name becomes a new attribute beside the parameter, which stays random; another shape
# replaces the parameter; what the state lacks stays as it was drawn. So the checkpoint of a model with a tied head, which
# has that matrix once, goes into a model with a head of its own, and that head stays random; the other way round the tied
# matrix becomes the head's, and the embedding's is lost. Right: compare paths and shapes first, or nnx.merge(graphdef,
# state).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
cat >"$folder/load.py" <<'PYTHON'
import jax
import jax.numpy as jnp
from flax import nnx


class Model(nnx.Module):
    def __init__(self, tied: bool, seed: int):
        rngs = nnx.Rngs(seed)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (8, 4)))
        self.head = self.embedding if tied else nnx.Param(jax.random.normal(rngs.params(), (8, 4)))


def saved(model: Model) -> dict:
    return nnx.to_pure_dict(nnx.state(model))


def equal(x: nnx.Param, y: nnx.Param) -> bool:
    return bool((x[...] == y[...]).all())


tied, own = Model(True, 1), Model(False, 2)
model, drawn = Model(False, 3), Model(False, 3)
nnx.update(model, saved(tied))
loaded, random = equal(model.embedding, tied.embedding), equal(model.head, drawn.head)
print(f"tied into untied: embedding is loaded {loaded}, head is still random {random}")
model = Model(True, 4)
nnx.update(model, saved(own))
head, embedding = equal(model.embedding, own.head), equal(model.embedding, own.embedding)
print(f"untied into tied: is the head's {head}, is the embedding's {embedding}")
model = Model(False, 3)
nnx.update(model, {"embeddings": jnp.zeros((8, 4))})
random = equal(model.embedding, drawn.embedding)
print(f"misspelt: embedding is still random {random}, new attribute {hasattr(model, 'embeddings')}")
nnx.update(model, {"embedding": jnp.zeros((16, 2))})
print(f"another shape: {model.embedding.shape} instead of {drawn.embedding.shape}")
try:
    nnx.merge(nnx.split(own)[0], nnx.state(tied))
except ValueError as error:
    print(f"nnx.merge: {error}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/load.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "tied into untied: embedding is loaded True, head is still random True
untied into tied: is the head's True, is the embedding's False
misspelt: embedding is still random True, new attribute True
another shape: (16, 2) instead of (8, 4)
nnx.merge: Incorrect number of leaves, expected 2 leaves, but got 1." ]] || {
  echo "this has changed"
  exit 1
}
