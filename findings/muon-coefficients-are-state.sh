#!/usr/bin/env bash
# In optax's Muon the polynomial's coefficients are part of the optimizer's state, and come back with it.
#
# optax 0.2.8 with jax 0.10.2. One would take `ns_coeffs` for a setting of the rule, as `ns_steps` and `beta` are: build
# the rule with other coefficients, restore the old state, and the new ones count. They do not: `init` puts them into the
# state and `update` reads them from there, so a run that goes on with another choice keeps the old one, without a word;
# of another shape, they change what a checkpoint has to look like. And the names "standard" and "dion", which
# `optax.contrib.muon` takes for them, are a TypeError in `scale_by_muon`, whose signature offers the same union of types.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cat >"$folder/muon.py" <<'PYTHON'
import jax.numpy as jnp
import numpy as np
import optax

params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)}
gradient = {"w": jnp.cos(params["w"])}
axes = {"w": optax.contrib.MuonDimensionNumbers(0, 1)}
jordan, halved = (3.4445, -4.7750, 2.0315), (1.5, -0.5, 0.0)


def step(coefficients, state):
    rule = optax.contrib.scale_by_muon(ns_coeffs=coefficients, weight_dimension_numbers=axes)
    return np.asarray(rule.update(gradient, state or rule.init(params), params)[0]["w"])


old_state = optax.contrib.scale_by_muon(ns_coeffs=jordan, weight_dimension_numbers=axes).init(params)
old, new = step(jordan, None), step(halved, None)
found = step(halved, old_state)
print("the two rules differ:", not np.allclose(old, new, atol=1e-2))
print("the new rule with the old state takes the step of:", "the old rule" if np.array_equal(found, old) else "the new")
optax.contrib.muon(1e-3, ns_coeffs="standard").init(params)
try:
    optax.contrib.scale_by_muon(ns_coeffs="standard", weight_dimension_numbers=axes).init(params)
    print("scale_by_muon takes the name")
except TypeError:
    print("scale_by_muon does not take the name")
PYTHON
found=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/muon.py")
echo "$found"
[[ $found == "the two rules differ: True
the new rule with the old state takes the step of: the old rule
scale_by_muon does not take the name" ]] || {
  echo "this has changed"
  exit 1
}
