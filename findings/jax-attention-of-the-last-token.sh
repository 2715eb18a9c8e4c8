#!/usr/bin/env bash
# Causal attention of JAX lets one new token see the first key alone, not the ones before it in the cache.
#
# jax 0.10.2, on CPU. In generation the queries are the newest tokens and the keys are all tokens so far. is_causal=True
# says "causal attention will be applied", so one would take the last query to be at the last key, as in FlashAttention
# and in transformers. jax.nn.dot_product_attention puts the first query at the first key: one new token behind three
# others sees the oldest token alone, and two new ones see one and two. The shapes are right, text comes out, and
# nothing is said. local_window_size counts places in the same way. And a row whose mask is all False (padding) is not
# 0, as with PyTorch: it is the mean of all values, masked ones included, so that what must not be seen leaks into
# padding's output, and from there into a mean over positions. Right: is_causal=False for one new token, or a mask of
# one's own, and outputs of padding masked.
# In the library: jax/_src/nn/functions.py, _get_causal_mask (tril of T by S) and _get_large_negative.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat >"$folder/show.py" <<'PYTHON'
import jax
import jax.numpy as jnp

# Equal scores: each query's output is the mean of the values that it sees, and the keys' values are 1, 10, 100, 1000.
values = jnp.array([1.0, 10.0, 100.0, 1000.0]).reshape(1, 4, 1, 1)
keys = jnp.ones((1, 4, 1, 1))


def seen(queries: int, **options) -> list[float]:
    output = jax.nn.dot_product_attention(jnp.ones((1, queries, 1, 1)), keys, values, **options)
    return [round(x, 2) for x in output.ravel().tolist()]


print(f"all four tokens: {seen(4, is_causal=True)}")
print(f"the last token, is_causal=True: {seen(1, is_causal=True)}")
print(f"the last two, is_causal=True: {seen(2, is_causal=True)}")
print(f"the last token, is_causal=False: {seen(1)}")
print(f"the last token, a window of 2 to the left: {seen(1, local_window_size=(2, 0))}")
last_two = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)[None, None]
print(f"the last two, a mask of one's own: {seen(2, mask=last_two)}")
print(f"a token that may see nothing: {seen(1, mask=jnp.zeros((1, 1, 1, 4), bool))}")
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "all four tokens: [1.0, 5.5, 37.0, 277.75]
the last token, is_causal=True: [1.0]
the last two, is_causal=True: [1.0, 5.5]
the last token, is_causal=False: [277.75]
the last token, a window of 2 to the left: [1.0]
the last two, a mask of one's own: [37.0, 277.75]
a token that may see nothing: [277.75]" ]] || {
  echo "this has changed"
  exit 1
}
