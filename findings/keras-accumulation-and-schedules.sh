#!/usr/bin/env bash
# With gradient accumulation in Keras, learning rate schedules and the average of weights run by batches, the rest by updates.
#
# keras 3.15.1 on jax 0.10.2, on CPU in float32. One would take gradient_accumulation_steps=4 with batches of 2 for the same
# training as batches of 8: Keras has the gradients' mean, Adam's correction, the clipping, the weight decay and
# optimizer.iterations by updates. A schedule is asked with the number of batches: a cosine over 100 updates is at 0 after 25,
# and the other three quarters of the run train nothing, though iterations, next to it, says 25. (The docstring does say that
# schedules see the real iterations, in its last sentence.) And use_ema moves the average at each batch, so that momentum 0.99
# is 0.96. Right: a schedule of 4 times the length, and the fourth root of the momentum.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 keras==3.15.1
cat >"$folder/accumulate.py" <<'PYTHON'
import keras
import numpy as np


def trained(parts: int, updates: int, rate, **options) -> tuple[float, int]:
    """With a gradient of -1 throughout, so that the weight is the sum of the learning rates."""
    model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    options |= {"gradient_accumulation_steps": parts} if parts > 1 else {}
    model.compile(keras.optimizers.SGD(rate, **options), loss=lambda asked, got: -got)
    ones = np.ones((8 * updates, 1), np.float32)
    model.fit(ones, ones, batch_size=8 // parts, verbose=0)
    return float(model.layers[0].kernel.numpy()[0, 0]), int(model.optimizer.iterations)


for parts in (1, 4):
    for updates in (25, 100):
        weight, iterations = trained(parts, updates, keras.optimizers.schedules.CosineDecay(1.0, decay_steps=100))
        print(f"8 rows in {parts}, iterations {iterations}: sum of a cosine's learning rates {weight:.1f}")
    averages = [trained(parts, updates, 1.0, use_ema=True, ema_momentum=0.99)[0] for updates in (99, 100)]
    print(f"8 rows in {parts}: the average moves by {averages[1] - averages[0]:.2f} in an update")
PYTHON
found=$(KERAS_BACKEND=jax KERAS_HOME="$folder/keras" "$folder/venv/bin/python" "$folder/accumulate.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "8 rows in 1, iterations 25: sum of a cosine's learning rates 23.8
8 rows in 1, iterations 100: sum of a cosine's learning rates 50.5
8 rows in 1: the average moves by 0.63 in an update
8 rows in 4, iterations 25: sum of a cosine's learning rates 12.2
8 rows in 4, iterations 100: sum of a cosine's learning rates 12.2
8 rows in 4: the average moves by 0.98 in an update" ]] || {
  echo "this has changed"
  exit 1
}
