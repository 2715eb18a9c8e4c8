#!/usr/bin/env bash
# PyTorch's average of a bfloat16 model never moves: AveragedModel keeps bfloat16, which rounds a thousandth off.
#
# torch 2.13.0, on CPU. AveragedModel with get_ema_multi_avg_fn(0.999) is PyTorch's own average of weights over the
# steps. One would take it to come near the weights within some thousand steps, in whatever type the model is. The
# average is a copy of the model, in its type, and each step adds a thousandth of the difference. In bfloat16 a change
# of less than a 256th to a 512th is rounded off, so weights that go from 1 to 1.5 leave the average at 1 after 10,000
# steps; at 0.99 it stops a good way off. It is what one evaluates and saves: the model at its start. Neither the
# class's text nor a warning says so. Right: float() on the AveragedModel, with an avg_fn of one's own, 0.999 * average
# + 0.001 * new (multi_avg_fn raises an error for mixed types).
# In the library: torch/optim/swa_utils.py, AveragedModel.__init__ (deepcopy) and get_ema_multi_avg_fn (lerp in the
# copy's type).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def average(dtype: torch.dtype, decay: float, steps: int) -> float:
    model = torch.nn.Linear(1, 1, bias=False, dtype=dtype)
    torch.nn.init.constant_(model.weight, 1.0)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    averaged.update_parameters(model)  # the first call copies
    torch.nn.init.constant_(model.weight, 1.5)
    for _ in range(steps):
        averaged.update_parameters(model)
    return averaged.module.weight.item()


for decay in (0.9, 0.99, 0.999):
    found = [average(dtype, decay, 10_000) for dtype in (torch.float32, torch.bfloat16)]
    print(f"from 1 to 1.5 with decay {decay}, after 10,000 steps: {found[0]:.2f} in float32, {found[1]:.2f} in bfloat16")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "from 1 to 1.5 with decay 0.9, after 10,000 steps: 1.50 in float32, 1.47 in bfloat16
from 1 to 1.5 with decay 0.99, after 10,000 steps: 1.50 in float32, 1.11 in bfloat16
from 1 to 1.5 with decay 0.999, after 10,000 steps: 1.50 in float32, 1.00 in bfloat16" ]] || {
  echo "this has changed"
  exit 1
}
