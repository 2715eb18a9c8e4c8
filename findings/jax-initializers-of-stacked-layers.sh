#!/usr/bin/env bash
# JAX's initializers make the weights of twelve stacked layers, or of eight heads, three times too small, without a word.
#
# jax 0.10.2. Layers that a scan goes over are one array [layers, in, out], and attention has kernels [in, heads, size]. One
# would take lecun_normal() of such a shape for what it gives layer by layer, a spread of 1/sqrt(in), or for an error at the
# third axis. But all axes before the last two are taken for the window of a convolution, whose size multiplies the number
# of inputs: of 12 layers each weight is sqrt(12) times too small, with 8 heads sqrt(8) times; he_normal and xavier_uniform
# are the same, and orthogonal is orthogonal over all layers together. The model trains, only worse, as the signal shrinks
# from layer to layer, the more the deeper it is. normal(std) is right. Right: batch_axis=0 for layers, in_axis=0 and
# out_axis=(-2, -1) for heads, or a vmap of the initializer over keys.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat >"$folder/spread.py" <<'PYTHON'
import jax
from jax.nn import initializers

LAYERS, IN, HEADS, SIZE = 12, 512, 8, 64
key = jax.random.key(0)


def spread(weights: jax.Array) -> str:
    return f"{float(weights.std()) * IN**0.5:.2f}"


print("spread times sqrt(in):")
for name in ("lecun_normal", "he_normal", "xavier_uniform"):
    kind = getattr(initializers, name)
    stacked = spread(kind()(key, (LAYERS, IN, IN)))
    named = spread(kind(batch_axis=0)(key, (LAYERS, IN, IN)))
    print(f"{name}: a layer {spread(kind()(key, (IN, IN)))}, {LAYERS} layers {stacked}, with batch_axis=0 {named}")
kind = initializers.lecun_normal
heads, named = kind()(key, (IN, HEADS, SIZE)), kind(in_axis=0, out_axis=(-2, -1))(key, (IN, HEADS, SIZE))
print(f"lecun_normal: {HEADS} heads {spread(heads)}, with in_axis=0 {spread(named)}")
each = jax.vmap(lambda key: kind()(key, (IN, IN)))(jax.random.split(key, LAYERS))
print(f"lecun_normal: vmap over {LAYERS} layers {spread(each)}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/spread.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "spread times sqrt(in):
lecun_normal: a layer 1.00, 12 layers 0.29, with batch_axis=0 1.00
he_normal: a layer 1.41, 12 layers 0.41, with batch_axis=0 1.41
xavier_uniform: a layer 1.00, 12 layers 0.29, with batch_axis=0 1.00
lecun_normal: 8 heads 0.35, with in_axis=0 1.00
lecun_normal: vmap over 12 layers 1.00" ]] || {
  echo "this has changed"
  exit 1
}
