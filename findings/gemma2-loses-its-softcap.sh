#!/usr/bin/env bash
# Under transformers 4.57, Gemma 2 computes its attention without the softcap, unless it is asked for eager attention.
#
# transformers 4.57.6 and 5.24.0 with torch 2.13.0, on CPU in float32. attn_logit_softcapping is a part of the model: 50 is the
# default, and scores were capped when it was trained. One would take the way in which attention is computed for a matter of
# speed, or to be refused where it can't do what the model has. Version 4.57 takes sdpa by default, hands it the softcap,
# and it drops it without a word. Some exporters and decoders hold transformers below 5. With 5.24 sdpa is refused, and
# eager is the default. Right, under 4: attn_implementation="eager".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
cat >"$folder/cap.py" <<'PYTHON'
import torch
import transformers

shape = {"vocab_size": 259, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
shape |= {"intermediate_size": 128, "head_dim": 32, "query_pre_attn_scalar": 32, "pad_token_id": 0}
ids = torch.arange(3, 43)[None]
logits = {}
for cap in (None, 5.0):
    for how in ("the default", "eager"):
        torch.manual_seed(0)
        config = transformers.Gemma2Config(**shape, attn_logit_softcapping=cap, final_logit_softcapping=None)
        options = {} if how == "the default" else {"attn_implementation": how}
        model = transformers.AutoModelForCausalLM.from_config(config, **options).eval()
        with torch.no_grad():
            for x in model.parameters():
                x.add_(torch.randn_like(x) * 0.2)
            logits[cap, how] = model(ids).logits
for cap in (None, 5.0):
    far = (logits[cap, "the default"] - logits[cap, "eager"]).abs().max()
    print(f"{transformers.__version__}, softcap {cap}: the default {'agrees with' if far < 1e-3 else 'differs from'} eager")
far = (logits[5.0, "the default"] - logits[None, "eager"]).abs().max()
print(f"{transformers.__version__}: the default {'is as without' if far < 1e-3 else 'has'} the softcap")
PYTHON
found=""
for version in 4.57.6 5.24.0; do
  "$folder/venv/bin/pip" install -q "transformers==$version"
  found+="$("$folder/venv/bin/python" "$folder/cap.py" 2>"$folder/stderr")"$'\n'
done
echo "$found"
[[ $found == "4.57.6, softcap None: the default agrees with eager
4.57.6, softcap 5.0: the default differs from eager
4.57.6: the default is as without the softcap
5.24.0, softcap None: the default agrees with eager
5.24.0, softcap 5.0: the default agrees with eager
5.24.0: the default has the softcap
" ]] || {
  echo "this has changed"
  exit 1
}
