#!/usr/bin/env bash
# Flax's MultiHeadAttention goes on decoding when its cache is full: each new token takes the place of the last one.
#
# flax 0.12.8 with jax 0.10.2, on CPU. init_cache sets the number of tokens to be decoded. One would take one more to be
# an error, as an input of another shape is, or to drop the oldest, as a sliding window does. The index is past the end,
# and dynamic_update_slice moves a write that does not fit back to the last place: the newest token's key and value go
# over those of the token before, and so on. Up to the cache's length, outputs agree with one pass over the whole text;
# after it they are others, by what looks like a little, so that a generation of 100 tokens too many reads as a model
# that gets worse. There is no way to see it in the outputs; cache_index keeps counting. linen's module has the same
# code. Right: compare cache_index with the cache's length before each call, and init_cache with all tokens, the
# prompt's, too.
# In the library: flax/nnx/nn/attention.py, MultiHeadAttention.__call__ (lax.dynamic_update_slice at cache_index).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q flax==0.12.8 jax==0.10.2 jaxlib==0.10.2
cat >"$folder/show.py" <<'PYTHON'
import jax
import jax.numpy as jnp
from flax import nnx

tokens = jax.random.normal(jax.random.key(0), (1, 8, 16))


def attention() -> nnx.MultiHeadAttention:
    return nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0))


whole = attention()(tokens, mask=nnx.make_causal_mask(jnp.ones((1, 8))))
for length in (8, 5):
    layer = attention()
    layer.init_cache((1, length, 16))
    outputs = jnp.stack([layer(tokens[:, i : i + 1], decode=True)[:, 0] for i in range(8)], axis=1)
    off = jnp.abs(outputs - whole).max((0, 2))
    print(f"cache of {length}, index {int(layer.cache_index[...])}: {['right' if x < 1e-5 else 'off' for x in off.tolist()]}")
    kept = (jnp.abs(layer.cached_key[...][0, -1]) > 0).any()
    last = layer.key(tokens[:, -1:])[0, 0]
    print(f"cache of {length}, its last place has the last token's key: {bool(jnp.allclose(layer.cached_key[...][0, -1], last) and kept)}")
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "cache of 8, index 8: ['right', 'right', 'right', 'right', 'right', 'right', 'right', 'right']
cache of 8, its last place has the last token's key: True
cache of 5, index 8: ['right', 'right', 'right', 'right', 'right', 'off', 'off', 'off']
cache of 5, its last place has the last token's key: True" ]] || {
  echo "this has changed"
  exit 1
}
