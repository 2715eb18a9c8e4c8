#!/usr/bin/env bash
# optax's reduce_on_plateau takes every negative value for an improvement, so that with an accuracy the rate is never reduced.
#
# optax 0.2.8 with jax 0.10.2. reduce_on_plateau lowers the rate when a value hasn't become smaller for `patience` updates.
# It has no mode for values that should grow, so one hands over the negative accuracy, reward or log-likelihood, and would
# take that for the same curve, turned over. But smaller means smaller than best * (1 - rtol), and for a negative best that
# lies above it: a value that stays the same is an improvement each time, and with rtol=0.01 even one that gets worse by
# half a percent each time is always the new best. The rate stays at its peak for the whole run. Nothing says that values
# have to be positive. Right: 1 - accuracy, or rtol=0 with an atol.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cat >"$folder/plateau.py" <<'PYTHON'
import jax.numpy as jnp
from optax.contrib import reduce_on_plateau


def scale(values: list[float], **options: float) -> float:
    """What the rate is multiplied by after these values."""
    rule = reduce_on_plateau(factor=0.5, patience=2, **options)
    state = rule.init(jnp.ones(1))
    for value in values:
        _, state = rule.update(jnp.ones(1), state, value=jnp.float32(value))
    return float(state.scale)


accuracy = [0.6] * 12
falling = [0.6 * 0.995**step for step in range(12)]
print("1 - accuracy, always 0.6:", scale([1 - x for x in accuracy]))
print("-accuracy, always 0.6:", scale([-x for x in accuracy]))
print("1 - accuracy, falling, rtol=0.01:", scale([1 - x for x in falling], rtol=0.01))
print("-accuracy, falling, rtol=0.01:", scale([-x for x in falling], rtol=0.01))
print("-accuracy, always 0.6, rtol=0, atol=1e-4:", scale([-x for x in accuracy], rtol=0.0, atol=1e-4))
PYTHON
found=$("$folder/venv/bin/python" "$folder/plateau.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "1 - accuracy, always 0.6: 0.03125
-accuracy, always 0.6: 1.0
1 - accuracy, falling, rtol=0.01: 0.03125
-accuracy, falling, rtol=0.01: 1.0
-accuracy, always 0.6, rtol=0, atol=1e-4: 0.03125" ]] || {
  echo "this has changed"
  exit 1
}
