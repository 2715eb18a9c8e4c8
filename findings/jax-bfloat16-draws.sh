#!/usr/bin/env bash
# JAX draws with noise of the type that it is given: from logits in bfloat16, rare tokens hardly ever come up.
#
# jax 0.10.2, on CPU. One would take jax.random.categorical for draws from softmax(logits), as good as the logits are, which here
# are exact. But the noise is made in the logits' type, and a uniform number in bfloat16 has 128 values: from 32,000 equal
# logits, 2,000 draws are of 420 tokens in place of 1,930, all near the first, and a token with a probability of 0.0003
# comes up in less than a twentieth of its times. bernoulli with p in bfloat16 (a mask of dropout, say) is true eight times too
# often at 0.001, and normal has no value beyond 2.9. The documentation names a limit for float32 only, 1e-7. Right: logits
# and p cast to float32, or mode="high" in those two; initial values drawn in float32 and rounded.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat >"$folder/draws.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

EQUAL = jnp.zeros(32_000)
FEW = jnp.array([0.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0])  # as exact in bfloat16; the last has a probability of 0.0003
key = jax.random.key(0)
for name, dtype, mode in (("float32", "float32", None), ("bfloat16", "bfloat16", None), ("high", "bfloat16", "high")):
    tokens = np.asarray(jax.random.categorical(key, EQUAL.astype(dtype), shape=(2000,), mode=mode))
    last = jax.random.categorical(key, FEW.astype(dtype), shape=(10**6,), mode=mode) == 6
    true = jax.random.bernoulli(key, jnp.asarray(0.001, dtype), (10**6,), mode=mode or "low")
    often = f"{last.mean() / jax.nn.softmax(FEW)[-1]:.1f} and {true.mean() / 0.001:.1f}"
    print(f"{name}: {len(np.unique(tokens)) / 2000:.0%} differ, drawn {often} times as often as asked")
for dtype in ("float32", "bfloat16"):
    x = np.asarray(jax.random.normal(key, (10**6,), dtype)).astype(np.float32)
    print(f"{dtype}: normal has {len(np.unique(x))} values, up to {np.abs(x).max():.2f}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/draws.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "float32: 97% differ, drawn 0.9 and 1.0 times"*"
bfloat16: 21% differ, drawn 0.0 and 7.7 times"*"
high: 96% differ, drawn 1.2 and 1.0 times"*"
bfloat16: normal has 128 values, up to 2.89" ]] || {
  echo "this has changed"
  exit 1
}
