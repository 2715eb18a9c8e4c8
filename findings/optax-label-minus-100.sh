#!/usr/bin/env bash
# In optax's cross-entropy a label of -100 is the 100th token from the vocabulary's end, and it is learned.
#
# optax 0.2.8 with jax 0.10.2, on CPU. Labels that don't count are -100 in PyTorch, and in the labels that the collators of
# transformers and TRL make, also as NumPy arrays for JAX. One would take softmax_cross_entropy_with_integer_labels to leave
# such labels out, or to give NaN as it does for a label beyond the vocabulary. But negative labels count from the end, as
# indices of Python do: with 32,000 tokens -100 is token 31,900, and -1 is the last one. All losses are ordinary numbers.
# Padding and prompts are then positions at which that token is to be said, and the model learns to say it; the mean loss
# falls, as that is easily learned. Only with fewer than 100 tokens there is NaN. The documentation says that labels
# are assumed to be between 0 and num_classes - 1. Right: where=labels >= 0, which makes those losses 0, and
# the sum divided by the number of the others; the mean would divide by all.
# In the library: optax/losses/_classification.py, jnp.take_along_axis of the logits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import optax

loss = optax.softmax_cross_entropy_with_integer_labels
logits = jax.random.normal(jax.random.key(0), (32_000,))
for label, same in ((-100, 31_900), (-1, 31_999), (32_000, None), (-32_001, None)):
    found = loss(logits, jnp.array(label))
    is_same = same is not None and found == loss(logits, jnp.array(same))
    print(f"label {label}: {same if is_same else 'NaN' if jnp.isnan(found) else 'another number'}")

# Ten tokens to learn and thirty that don't count.
labels = jnp.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10] + [-100] * 30)


def all_labels(bias: jax.Array) -> jax.Array:
    return loss(jnp.broadcast_to(bias, (40, 32_000)), labels).mean()


def without(bias: jax.Array) -> jax.Array:
    counts = labels >= 0
    return loss(jnp.broadcast_to(bias, (40, 32_000)), labels, where=counts).sum() / counts.sum()


for name, objective in (("as they are", all_labels), ("where=labels >= 0", without)):
    bias = jnp.zeros(32_000)
    for _ in range(100):
        bias -= 10 * jax.grad(objective)(bias)
    print(f"trained, {name}: most likely {int(bias.argmax())}, with {float(jax.nn.softmax(bias).max()):.2f}")
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "label -100: 31900
label -1: 31999
label 32000: NaN
label -32001: NaN
trained, as they are: most likely 31900, with 0.74
trained, where=labels >= 0: most likely 1, with 0.10" ]] || {
  echo "this has changed"
  exit 1
}
