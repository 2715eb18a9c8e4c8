#!/usr/bin/env bash
# A Flax embedding in bfloat16 learns from 5,000 uses of a token what it learns from 256, with float32 weights, too.
#
# flax 0.12.8 with jax 0.10.2, on CPU. Mixed precision in Flax is dtype=bfloat16 with parameters in float32: one would take
# each gradient to be rounded once, to two or three digits. That holds for Dense, and for an embedding as a product with
# one-hot rows. But Embed casts its table first and takes the rows then, and the gradient of taking rows adds them one by
# one in bfloat16, where 256 + 1 is 256. A token that is in a batch 5,000 times (a space, a line break, the end of a text)
# gets the gradient of 256 uses; random gradients with a small mean come to less than a fifth of their sum. It is the same
# in linen and nnx, with weights in bfloat16, for segment_sum, and for a weight in bfloat16 that each step of a lax.scan
# uses. Nothing says so. Right: take the rows from the float32 table and cast those (an Embed without dtype, and the cast
# behind it).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
cat >"$folder/embed.py" <<'PYTHON'
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

USES = 5000
ids = jnp.zeros(USES, jnp.int32)
half = jnp.bfloat16
table = jnp.ones((8, 4))


def total(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32).sum()


def of_linen() -> jax.Array:
    embed = nn.Embed(8, 4, dtype=half)
    gradient = jax.grad(lambda params: total(embed.apply(params, ids)))(embed.init(jax.random.key(0), ids))
    return gradient["params"]["embedding"]


def of_nnx(dtype: jnp.dtype) -> jax.Array:
    embed = nnx.Embed(8, 4, dtype=dtype, rngs=nnx.Rngs(0))
    return jax.tree.leaves(nnx.grad(lambda embed: total(embed(ids)))(embed))[0]


def in_scan(table: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda sum, i: (sum + total(table.astype(half)[i]), None), 0.0, ids)[0]


random = (jax.random.normal(jax.random.key(0), (2**16, 4)) + 0.1).astype(half)
many = jnp.zeros(2**16, jnp.int32)
rows = jax.nn.one_hot(ids, 8, dtype=half)
found = {
    "rows in float32": jax.grad(lambda table: total(table[ids]))(table),
    "linen.Embed in bfloat16": of_linen(),
    "nnx.Embed in bfloat16": of_nnx(half),
    "nnx.Embed in float32": of_nnx(jnp.float32),
    "one-hot product in bfloat16": jax.grad(lambda table: total(rows @ table.astype(half)))(table),
    "rows first, then bfloat16": jax.grad(lambda table: total(table[ids].astype(half)))(table),
    "bfloat16 table in a scan": jax.grad(in_scan)(table.astype(half)),
}
for name, gradient in found.items():
    print(f"{name}: {float(gradient[0, 0]):.0f} of {USES}")
share = jax.grad(lambda table: total(table.astype(half)[many] * random))(table)[0] / random.astype(jnp.float32).sum(0)
print(f"65536 random gradients: less than a fifth of their sum: {bool((share < 0.2).all())}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/embed.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "rows in float32: 5000 of 5000
linen.Embed in bfloat16: 256 of 5000
nnx.Embed in bfloat16: 256 of 5000
nnx.Embed in float32: 5000 of 5000
one-hot product in bfloat16: 4992 of 5000
rows first, then bfloat16: 5000 of 5000
bfloat16 table in a scan: 256 of 5000
65536 random gradients: less than a fifth of their sum: True" ]] || {
  echo "this has changed"
  exit 1
}
