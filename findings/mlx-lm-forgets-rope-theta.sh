#!/usr/bin/env bash
# mlx-lm takes the default rope_theta for most folders that transformers 5 has saved, and no scaling of positions.
#
# mlx-lm 0.32.2 with mlx 0.32.4 for CPU, transformers 5.24.0 and torch 2.13.0, in float32. transformers 5 keeps rope_theta and
# the scaling under rope_parameters in config.json; before, they were rope_theta and rope_scaling. One would take a reader to
# know the new name, or to say that the old ones are missing. mlx-lm's Llama looks for the old ones only and has a default for
# each: theta is 10000 whatever the model has, and llama3 scaling is left out. Its Qwen2 has a million for a default, so that
# a Qwen2 with transformers' own, 10000, is another model. Also left out, of older folders too: the window of a Mistral and the
# activation of a Llama. Right: the two old names written into config.json beside the new one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0 torch==2.13.0
cat >"$folder/read.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import torch
import transformers

shape = {"vocab_size": 259, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
shape |= {"intermediate_size": 128, "max_position_embeddings": 64}
llama3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0}
llama3 |= {"original_max_position_embeddings": 16}
theta = {"rope_type": "default", "rope_theta": 500000.0}
MODELS = {
    "a plain Llama": transformers.LlamaConfig(**shape),
    "Llama, rope_theta 500000": transformers.LlamaConfig(**shape, rope_parameters=theta),
    "Llama, rope_type llama3": transformers.LlamaConfig(**shape, rope_parameters=llama3),
    "a plain Qwen2": transformers.Qwen2Config(**shape),
    "Mistral, sliding_window 8": transformers.MistralConfig(**shape, sliding_window=8),
    "Llama, hidden_act gelu": transformers.LlamaConfig(**shape, hidden_act="gelu"),
}
ids = torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(1))
for number, (name, config) in enumerate(MODELS.items()):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x) * 0.2)
        logits = model(ids).logits.numpy()
    folder = Path(sys.argv[1]) / str(number)
    model.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    rope = values["rope_parameters"]
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": rope if "factor" in rope else None}
    found = []
    for config in (values, values | old):
        (folder / "config.json").write_text(json.dumps(config))
        opened, _ = mlx_lm.utils.load_model(folder)
        far = np.abs(np.array(opened(mx.array(ids.tolist()))) - logits).max()
        found.append("agrees" if far < 1e-2 else "differs")
    print(f"{name}: {found[0]}, with the old names {found[1]}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/read.py" "$folder" 2>"$folder/stderr" | grep ": ")
echo "$found"
[[ $found == "a plain Llama: agrees, with the old names agrees
Llama, rope_theta 500000: differs, with the old names agrees
Llama, rope_type llama3: differs, with the old names agrees
a plain Qwen2: differs, with the old names agrees
Mistral, sliding_window 8: differs, with the old names differs
Llama, hidden_act gelu: differs, with the old names differs" ]] || {
  echo "this has changed"
  exit 1
}
