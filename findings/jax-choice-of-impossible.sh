#!/usr/bin/env bash
# jax.random.choice without replacement draws elements of probability 0 once the others are used up.
#
# jax 0.10.2. With p, one would take elements of probability 0 never to be drawn: numpy's choice says "Fewer non-zero
# entries in p than size" and raises. JAX fills up with the impossible ones, by their index: four of [0, 0.5, 0, 0.5, 0]
# are the two possible and the elements 0 and 2, the same ones for every key, and there is no sign. Rows that are
# excluded from a sample, finished texts or masked experts come back so. Replacement is safe, unless all probabilities
# are 0: then it is the first element, always (numpy: "Probabilities do not sum to 1"), and likewise random.categorical
# where every logit is -inf. With NaN among the logits, categorical draws the NaN, each time. Right: count the possible
# ones first, or mask what comes back.
# In the library: jax/_src/random.py, choice: the largest of Gumbel noise plus log(p), which is -inf for those.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

p = np.array([0, 0.5, 0, 0.5, 0])
keys = jax.random.split(jax.random.key(0), 100)


def drawn(draw) -> str:
    return " or ".join(map(str, np.unique(np.asarray(jax.vmap(draw)(keys)), axis=0).tolist()))


def choice(key: jax.Array, replace: bool, p: np.ndarray) -> jax.Array:
    return jax.random.choice(key, 5, (4,), replace=replace, p=jnp.array(p))


print(f"four of {p.tolist()}, without replacement: {drawn(lambda key: jnp.sort(choice(key, False, p)))}")
print(f"elements drawn with replacement: {drawn(lambda key: choice(key, True, p)[0])}")
print(f"with replacement, all 0: {drawn(lambda key: choice(key, True, p * 0))}")
print(f"categorical, all -inf: {drawn(lambda key: jax.random.categorical(key, jnp.full(5, -jnp.inf)))}")
print(f"categorical, a NaN: {drawn(lambda key: jax.random.categorical(key, jnp.array([9, 0, jnp.nan, 0])))}")
try:
    np.random.default_rng(0).choice(5, 4, replace=False, p=p)
except ValueError as error:
    print(f"numpy: {error}")
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "four of [0.0, 0.5, 0.0, 0.5, 0.0], without replacement: [0, 1, 2, 3]
elements drawn with replacement: 1 or 3
with replacement, all 0: [0, 0, 0, 0]
categorical, all -inf: 0
categorical, a NaN: 2
numpy: Fewer non-zero entries in p than size" ]] || {
  echo "this has changed"
  exit 1
}
