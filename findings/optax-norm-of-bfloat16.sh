#!/usr/bin/env bash
# optax clips gradients in bfloat16 by a norm that is too small: the squares are added up in bfloat16, tensor by tensor.
#
# optax 0.2.8 with jax 0.10.2. One would take clip_by_global_norm(1.0) to leave a norm of 1, give or take a rounding of
# bfloat16. Within a tensor the squares are added in float32; but the sum over tensors is in the gradients' own type, and a
# tensor's share no longer counts once it is under a 256th of what is there. Of a thousand equal tensors the norm comes out
# as half of what it is, so "clipped to 1" is 1.8, and the norm in the log is as wrong; a large tensor hides all small ones
# behind it. In float16 the squares are too large from a norm of 256 on: the norm is inf, and clipping sets the whole update
# to 0, without a NaN. No word of it in either case. Right: cast the gradients to float32 before the clipping.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cat >"$folder/norm.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
import optax


def norm(tree: list[jax.Array]) -> float:
    return sum((np.asarray(x, np.float64) ** 2).sum() for x in tree) ** 0.5


def show(name: str, gradients: list[jax.Array]) -> None:
    clipped, _ = optax.clip_by_global_norm(1.0).update(gradients, optax.EmptyState())
    got = float(optax.tree.norm(gradients))
    print(f"{name}: norm {norm(gradients):.1f}, optax {got:.1f}, clipped to 1.0 it is {norm(clipped):.1f}")


for dtype in (jnp.float32, jnp.bfloat16):
    show(f"1000 tensors, {dtype.__name__}", [jnp.full((16, 64), 0.01, dtype)] * 1000)
show("one of 2^20 and 200 of 1024, bfloat16", [jnp.ones(2**20, jnp.bfloat16)] + [jnp.ones(1024, jnp.bfloat16)] * 200)
show("one of 1000, float16", [jnp.full(1000, 10, jnp.float16)])
PYTHON
found=$("$folder/venv/bin/python" "$folder/norm.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "1000 tensors, float32: norm 10.1, optax 10.1, clipped to 1.0 it is 1.0
1000 tensors, bfloat16: norm 10.1, optax 5.7, clipped to 1.0 it is 1.8
one of 2^20 and 200 of 1024, bfloat16: norm 1119.5, optax 1024.0, clipped to 1.0 it is 1.1
one of 1000, float16: norm 316.2, optax inf, clipped to 1.0 it is 0.0" ]] || {
  echo "this has changed"
  exit 1
}
