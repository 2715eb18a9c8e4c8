#!/usr/bin/env bash
# transformers keeps packed texts apart only with use_cache=False: a plain call of the model lets them read each other.
#
# transformers 5.24.0 with torch 2.13.0, on CPU in float32. Several texts in one row, with position_ids that begin at 0 again:
# the model finds the beginnings itself and masks what lies before, so that each text has the logits that it has alone. One
# would take that to hold for any call with these arguments. But it is done only if there is no cache yet, and forward() makes
# an empty one first where use_cache isn't False, as in each config: in a loop of one's own (Trainer turns it off) the second
# text attends to the first, and the loss is another. Gradient checkpointing, which should change nothing, turns it off, too,
# and mends it; an attention_mask of ones breaks it again. GPT-OSS (which doesn't hand the positions to its masks), OPT and
# MPT mix the texts with use_cache=False as well. No word of any of it. Right: use_cache=False and no mask, and a look at the
# logits of a text alone and in a pack.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cat >"$folder/packed.py" <<'PYTHON'
import torch
import transformers

first, second = torch.arange(3, 12)[None], torch.arange(20, 33)[None]
row = torch.cat([first, second], 1)
positions = torch.cat([torch.arange(9), torch.arange(13)])[None]
shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
grouped = shape | {"num_key_value_heads": 2, "intermediate_size": 64}


def model_of(name: str, **sizes) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    made = getattr(transformers, name)
    sizes |= {"dropout": 0.0} if name.startswith("OPT") else {}
    model = made._from_config(made.config_class(**sizes), attn_implementation="eager").train()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x) * 0.1)
    return model


def compare(name: str, model: transformers.PreTrainedModel, **arguments) -> None:
    alone = model(second, use_cache=False).logits
    packed = model(row, position_ids=positions, **arguments).logits[:, first.shape[1] :]
    far = (alone - packed).abs().max().item()
    print(f"{name}: a text in a pack {'is as' if far < 1e-4 else 'is not as'} alone")


llama = model_of("LlamaForCausalLM", **grouped)
compare("Llama", llama)
compare("Llama, use_cache=False", llama, use_cache=False)
compare("Llama, use_cache=False, mask of ones", llama, use_cache=False, attention_mask=torch.ones_like(row))
llama.gradient_checkpointing_enable()
compare("Llama, gradient checkpointing", llama)
experts = {"head_dim": 16, "sliding_window": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
others = {"GptOssForCausalLM": grouped | experts, "OPTForCausalLM": shape | {"ffn_dim": 64, "word_embed_proj_dim": 32}}
others["MptForCausalLM"] = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 2}
others |= {"GPT2LMHeadModel": shape | {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}}
for name, sizes in others.items():
    compare(f"{name}, use_cache=False", model_of(name, **sizes), use_cache=False)
PYTHON
found=$("$folder/venv/bin/python" "$folder/packed.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "Llama: a text in a pack is not as alone
Llama, use_cache=False: a text in a pack is as alone
Llama, use_cache=False, mask of ones: a text in a pack is not as alone
Llama, gradient checkpointing: a text in a pack is as alone
GptOssForCausalLM, use_cache=False: a text in a pack is not as alone
OPTForCausalLM, use_cache=False: a text in a pack is not as alone
MptForCausalLM, use_cache=False: a text in a pack is not as alone
GPT2LMHeadModel, use_cache=False: a text in a pack is as alone" ]] || {
  echo "this has changed"
  exit 1
}
