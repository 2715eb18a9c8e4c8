#!/usr/bin/env bash
# Keras excludes variables from weight decay by the last part of their path, and a second call forgets the first one.
#
# keras 3.15.1, on JAX. Weight decay is usually kept from biases and normalizations, by names: ["bias", "layer_norm"].
# exclude_from_weight_decay takes such names, "if any string in var_names appears in the model variable's name". In
# Keras 2 a name had the layers in it ("encoder/layer_norm/gamma:0"), and variable.path still has them. But a variable's
# name in Keras 3 is the last part alone: gamma, beta, kernel. So "layer_norm" excludes nothing, "mlp" does not, either,
# and gamma and beta decay; it is no error that nothing was found. Two calls, one for the biases and one for the rest,
# are worse than one: the later call throws away what the earlier one excluded, names and variables. Right: one call
# with var_list=[v for v in model.trainable_variables if ... v.path ...], before the optimizer is built.
# In the library: keras/src/optimizers/base_optimizer.py, _use_weight_decay (re.search in variable.name) and
# exclude_from_weight_decay, which begins with an empty set.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import keras

layers = [keras.layers.Dense(4, name="mlp"), keras.layers.LayerNormalization(name="layer_norm")]
model = keras.Sequential([keras.Input((4,)), *layers], name="gpt")
variables = model.trainable_variables


def show(name: str, *calls: dict[str, list]) -> None:
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    for call in calls:
        optimizer.exclude_from_weight_decay(**call)
    optimizer.build(variables)
    for variable in variables:
        variable.assign(keras.ops.ones(variable.shape))
    optimizer.apply_gradients([(keras.ops.zeros(variable.shape), variable) for variable in variables])
    decayed = [variable.path.removeprefix("gpt/") for variable in variables if float(keras.ops.mean(variable)) < 1]
    print(f"{name}: {', '.join(decayed)} decay")


show("nothing excluded")
show("bias, layer_norm", {"var_names": ["bias", "layer_norm"]})
show("mlp", {"var_names": ["mlp"]})
show("bias, then gamma", {"var_names": ["bias"]}, {"var_names": ["gamma"]})
show("by path", {"var_list": [v for v in variables if "layer_norm" in v.path or v.path.endswith("bias")]})
PYTHON
export KERAS_BACKEND=jax JAX_PLATFORMS=cpu KERAS_HOME="$folder"
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "nothing excluded: mlp/kernel, mlp/bias, layer_norm/gamma, layer_norm/beta decay
bias, layer_norm: mlp/kernel, layer_norm/gamma, layer_norm/beta decay
mlp: mlp/kernel, mlp/bias, layer_norm/gamma, layer_norm/beta decay
bias, then gamma: mlp/kernel, mlp/bias, layer_norm/beta decay
by path: mlp/kernel decay" ]] || {
  echo "this has changed"
  exit 1
}
