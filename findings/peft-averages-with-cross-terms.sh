#!/usr/bin/env bash
# In peft, the linear mean of an adapter and itself is twice the adapter: products across adapters are added.
#
# peft 0.21.2 with transformers 5.24.0 and torch 2.13.0, on CPU in float32. add_weighted_adapter makes a new adapter of
# several, for a mean of runs or to take one away from another. One would take combination_type="linear" with weights w and v
# for w times the first one's change of the matrix plus v times the second one's. But A's and B's are summed apart, each times
# the root of its weight, and multiplied then: B1 A1 and B2 A2 have B1 A2 and B2 A1 beside them, as large as what was asked
# for. An adapter with itself at a half each is doubled, not kept, and two unrelated ones are off by as much as the sum
# itself. "svd", the default, is cut to the larger rank, which loses nearly half here. Nothing warns. Right:
# combination_type="cat".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
cat >"$folder/mean.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
settings = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)), settings, adapter_name="one")
model.add_adapter("other", settings)
layer = next(x for name, x in model.named_modules() if name.endswith("q_proj"))
change = {name: layer.get_delta_weight(name).detach() for name in ("one", "other")}
for first, second in (("one", "one"), ("one", "other")):
    asked = (change[first] + change[second]) / 2
    for how in ("linear", "svd", "cat"):
        name = f"{first}_{second}_{how}"
        model.add_weighted_adapter([first, second], [0.5, 0.5], name, combination_type=how)
        got = layer.get_delta_weight(name).detach()
        far = ((got - asked).norm() / asked.norm()).item()
        print(f"mean of {first} and {second}, {how}: {(got.norm() / asked.norm()).item():.1f} times as large, off by {far:.1f}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/mean.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "mean of one and one, linear: 2.0 times as large, off by 1.0
mean of one and one, svd: 1.0 times as large, off by 0.0
mean of one and one, cat: 1.0 times as large, off by 0.0
mean of one and other, linear: 1."* && $found == *"
mean of one and other, svd: 0."*", off by 0."[1-9]*"
mean of one and other, cat: 1.0 times as large, off by 0.0" ]] || {
  echo "this has changed"
  exit 1
}
