#!/usr/bin/env bash
# A gradient with NaN stays in optax's MultiSteps for ever: with zero_nans or apply_if_finite inside, no weight moves.
#
# optax 0.2.8 with jax 0.10.2. MultiSteps adds up the gradients of k batches and hands the mean to the optimizer that it
# wraps. One would take a NaN to spoil the update that it is part of, and the next to begin with a sum of zero. But the
# sum is emptied by multiplying it with 0, and NaN times 0 is NaN: every later mean is NaN as well. A plain optimizer
# shows it by NaN in all weights. With the usual protection inside, it does not show: zero_nans makes each later update
# 0, and apply_if_finite leaves each out (until it has left out as many as it may), so that the weights never move again
# while the loss stays at a good number. Right: the protection around MultiSteps or before it, or
# should_skip_update_fn=optax.skip_not_finite, which looks at each batch's gradient.
# In the library: optax/transforms/_accumulation.py, MultiSteps: acc_grads=jax.tree.map(lambda ga: ... (1 - emit) *
# ga).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import jax.numpy as jnp
import optax

GRADIENTS = (1.0, 1.0, float("nan"), 1.0, 1.0, 1.0, 1.0, 1.0)  # two make one update: the second of four is spoiled


def show(name: str, optimizer: optax.GradientTransformation | optax.MultiSteps) -> None:
    weight, weights = jnp.zeros(1), []
    state = optimizer.init(weight)
    for gradient in GRADIENTS:
        update, state = optimizer.update(jnp.array([gradient]), state, weight)
        weight = optax.apply_updates(weight, update)
        weights.append(float(weight[0]))
    print(f"{name}: {weights[1::2]}")


sgd, steps = optax.sgd(1.0), optax.MultiSteps
show("sgd", steps(sgd, 2))
show("zero_nans inside", steps(optax.chain(optax.zero_nans(), sgd), 2))
show("apply_if_finite inside", steps(optax.apply_if_finite(sgd, 100), 2))
show("zero_nans before", optax.chain(optax.zero_nans(), steps(sgd, 2).gradient_transformation()))
show("apply_if_finite around", optax.apply_if_finite(steps(sgd, 2).gradient_transformation(), 100))
show("skip_not_finite", steps(sgd, 2, should_skip_update_fn=optax.skip_not_finite))
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "sgd: [-1.0, nan, nan, nan]
zero_nans inside: [-1.0, -1.0, -1.0, -1.0]
apply_if_finite inside: [-1.0, -1.0, -1.0, -1.0]
zero_nans before: [-1.0, -1.5, -2.5, -3.5]
apply_if_finite around: [-1.0, -1.0, -2.0, -3.0]
skip_not_finite: [-1.0, -1.0, -2.0, -3.0]" ]] || {
  echo "this has changed"
  exit 1
}
