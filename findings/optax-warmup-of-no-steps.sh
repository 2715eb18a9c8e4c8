#!/usr/bin/env bash
# Without steps of warmup, optax's warmup_constant_schedule stays at its first value, a learning rate of 0, for ever.
#
# optax 0.2.8. The fewer steps a warmup has, the sooner the rate is at its peak: with 2 after two steps, with 1 after
# one. One would take 0 to mean no warmup, the peak from the start, as it does in warmup_cosine_decay_schedule, in
# warmup_exponential_decay_schedule, and in the function of transformers with the same purpose. In
# warmup_constant_schedule and linear_schedule it is the other end: the rate is the first value, 0, at every step. The
# model does not learn, and all that shows is a loss that stays where it was; the note about it is logged at a level
# that is not shown. A warmup that is a share of the steps, int(0.01 * steps), is 0 in a short run. That a linear
# schedule of no steps stays at its first value is said in the text on transition_steps, but not in the one on
# warmup_steps. Right: max(1, warmup_steps), or constant_schedule where there is no warmup.
# In the library: optax/schedules/_schedule.py, polynomial_schedule, at "if transition_steps <= 0".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import jax.numpy as jnp
import optax


def show(name: str, schedule: optax.Schedule) -> None:
    print(f"{name}: {[round(float(schedule(step)), 2) for step in range(5)]}")


for warmup in (3, 2, 1, 0):
    show(f"warmup_constant, {warmup} steps", optax.warmup_constant_schedule(0.0, 1.0, warmup))
show("warmup_cosine_decay, 0 steps", optax.warmup_cosine_decay_schedule(0.0, 1.0, 0, 4))
show("warmup_exponential_decay, 0 steps", optax.warmup_exponential_decay_schedule(0.0, 1.0, 0, 4, 0.5))
show("linear from 0 to 1, 0 steps", optax.linear_schedule(0.0, 1.0, 0))
show("linear from 1 to 0, 0 steps", optax.linear_schedule(1.0, 0.0, 0))
weights, optimizer = jnp.ones(2), optax.adamw(optax.warmup_constant_schedule(0.0, 1e-3, 0))
state = optimizer.init(weights)
for _ in range(100):
    updates, state = optimizer.update(jnp.ones(2), state, weights)
    weights = optax.apply_updates(weights, updates)
print(f"weights after 100 steps of adamw: {weights.tolist()}")
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "warmup_constant, 3 steps: [0.0, 0.33, 0.67, 1.0, 1.0]
warmup_constant, 2 steps: [0.0, 0.5, 1.0, 1.0, 1.0]
warmup_constant, 1 steps: [0.0, 1.0, 1.0, 1.0, 1.0]
warmup_constant, 0 steps: [0.0, 0.0, 0.0, 0.0, 0.0]
warmup_cosine_decay, 0 steps: [1.0, 0.85, 0.5, 0.15, 0.0]
warmup_exponential_decay, 0 steps: [1.0, 0.84, 0.71, 0.59, 0.5]
linear from 0 to 1, 0 steps: [0.0, 0.0, 0.0, 0.0, 0.0]
linear from 1 to 0, 0 steps: [1.0, 1.0, 1.0, 1.0, 1.0]
weights after 100 steps of adamw: [1.0, 1.0]" ]] || {
  echo "this has changed"
  exit 1
}
