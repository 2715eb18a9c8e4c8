#!/usr/bin/env bash
# Merged by peft, an adapter of GPT-2's token embedding changes the output head as well, and nothing says so.
#
# peft 0.21.2 with transformers 5.24.0 and torch 2.13.0, on CPU in float32. Adapters on the embedding are for new words or a
# new language. One would take merge_and_unload for the same model in one piece, as it is for every other target. While an
# adapter is apart, it is added to what the embedding gives; the head, whose matrix is the same, has none of it. Merged into that
# matrix, it is in both, and the logits are others. peft warns of that for embed_tokens and lm_head, as Llama's are called; for
# GPT-2's wte it does not, and with ensure_weight_tying it says that no tied module is among the targets. Right: a model that
# is opened with tie_word_embeddings=False, its head filled with the embedding, or trainable_token_indices.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q peft==0.21.2 transformers==5.24.0 torch==2.13.0
cat >"$folder/merge.py" <<'PYTHON'
import warnings

import peft
import torch
import transformers

gpt2 = {"vocab_size": 259, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
llama = {"vocab_size": 259, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
llama = transformers.LlamaConfig(**llama, tie_word_embeddings=True)
CASES = {
    "Llama, embed_tokens": (llama, ["embed_tokens"]),
    "GPT-2, wte": (transformers.GPT2Config(**gpt2), ["wte"]),
    "GPT-2, c_attn": (transformers.GPT2Config(**gpt2), ["c_attn"]),
    "GPT-2 not tied, wte": (transformers.GPT2Config(**gpt2, tie_word_embeddings=False), ["wte"]),
}
ids = torch.arange(3, 43)[None]
for name, (config, targets) in CASES.items():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    adapters = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=targets == ["c_attn"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        apart = peft.get_peft_model(model, adapters).eval()
        with torch.no_grad():
            for key, x in apart.named_parameters():
                if "lora_" in key:
                    x.copy_(torch.randn_like(x) * 0.1)
            logits = apart(ids).logits
            merged = apart.merge_and_unload()(ids).logits
    warned = any("tie" in str(warning.message) for warning in said)
    how = "agrees" if (merged - logits).abs().max() < 1e-4 else "differs"
    print(f"{name}: merged {how}, {'a warning' if warned else 'no warning'}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/merge.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "Llama, embed_tokens: merged differs, a warning
GPT-2, wte: merged differs, no warning
GPT-2, c_attn: merged agrees, no warning
GPT-2 not tied, wte: merged agrees, no warning" ]] || {
  echo "this has changed"
  exit 1
}
