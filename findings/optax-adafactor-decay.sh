#!/usr/bin/env bash
# Weight decay in optax's adafactor is a share of the weights at each step, whatever the learning rate is.
#
# optax 0.2.8 with jax 0.10.2. In optax's other rules (adamw, lion, lamb, muon) weight decay comes before the learning rate: a
# step takes learning rate times decay off a weight, and a schedule rules both. One would take weight_decay_rate of
# optax.adafactor, which is documented as "rate at which to decay weights", for the same number. It is added behind the
# learning rate: with 0.1, each step takes a tenth of all weights, in the warmup and with a learning rate of 0, too, and after
# 50 steps half a percent is left. Nothing says so; the loss only stays high. Right: weight_decay_rate = decay times the peak
# learning rate, or no rate and optax.add_decayed_weights before the learning rate in a chain of one's own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cat >"$folder/decay.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import optax


def left(rule: optax.GradientTransformation, steps: int) -> float:
    def step(carry, _):
        weights, state = carry
        update, state = rule.update(jnp.zeros_like(weights), state, weights)
        return (optax.apply_updates(weights, update), state), None

    weights = jnp.ones((4, 4))
    return float(jax.lax.scan(step, (weights, rule.init(weights)), None, steps)[0][0][0, 0])


for rate in (0.0, 1e-3):
    rules = {"adamw": optax.adamw(rate, weight_decay=0.1), "lion": optax.lion(rate, weight_decay=0.1)}
    rules |= {"adafactor": optax.adafactor(rate, weight_decay_rate=0.1)}
    found = ", ".join(f"{name} {left(rule, 50):.3f}" for name, rule in rules.items())
    print(f"learning rate {rate}, decay 0.1, left of a weight after 50 steps without a gradient: {found}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/decay.py" 2>"$folder/stderr")
echo "$found"
text="decay 0.1, left of a weight after 50 steps without a gradient"
[[ $found == "learning rate 0.0, $text: adamw 1.000, lion 1.000, adafactor 0.005
learning rate 0.001, $text: adamw 0.995, lion 0.995, adafactor 0.005" ]] || {
  echo "this has changed"
  exit 1
}
