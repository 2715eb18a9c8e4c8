#!/usr/bin/env bash
# In optax, Adam of bfloat16 parameters never forgets a large gradient, and with injected settings its b2 is 1.
#
# optax 0.2.8 with jax 0.10.2. One would take Adam's averages for averages, coarse ones if the parameters are bfloat16. But
# the second moment has the parameters' type (mu_dtype is for the first one only), and 0.999 of a bfloat16 number is that
# number again: it grows and never falls. After 50 gradients of 4 and 10,000 of 0.01, updates are a hundredth of the learning
# rate and stay there, where float32 is back at nine tenths. And inject_hyperparams, which is used to change or to log the
# learning rate, rounds all settings to the parameters' type: b2=0.999 becomes 1, and the first update is NaN. Right: float32
# parameters, with a bfloat16 copy to compute with; hyperparam_dtype=jnp.float32 for the settings.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cat >"$folder/adam.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import optax


def last_update(rule: optax.GradientTransformation, dtype: str, gradients: list[float]) -> float:
    state = rule.init(jnp.zeros(1, dtype))

    def step(state, gradient):
        update, state = rule.update(gradient[None], state)
        return state, update

    return float(jax.jit(lambda g: jax.lax.scan(step, state, g))(jnp.array(gradients, dtype))[1][-1, 0])


for dtype in ("float32", "bfloat16"):
    behind = [last_update(optax.adam(1.0), dtype, [4.0] * 50 + [0.01] * small) for small in (100, 10_000)]
    print(f"{dtype}: behind large gradients {-behind[0]:.3f}, after 10000 small ones {-behind[1]:.3f}")
    for name, asked in (("none", None), ("float32", jnp.float32)):
        rule = optax.inject_hyperparams(optax.adam, hyperparam_dtype=asked)(1e-3)
        state = rule.init(jnp.zeros(1, dtype))
        update, _ = rule.update(jnp.full(1, 0.1, dtype), state)
        print(f"{dtype}, hyperparam_dtype {name}: b2 {float(state.hyperparams['b2']):.4f}, update {float(update[0]):.4f}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/adam.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "float32: "*"small ones 0.860
float32, hyperparam_dtype none: b2 0.9990, update -0.0010
float32, hyperparam_dtype float32: b2 0.9990, update -0.0010
bfloat16: "*"small ones 0.011
bfloat16, hyperparam_dtype none: b2 1.0000, update nan
bfloat16, hyperparam_dtype float32: b2 0.9990, update -0.0010" ]] || {
  echo "this has changed"
  exit 1
}
