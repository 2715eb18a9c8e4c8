#!/usr/bin/env bash
# transformers reads a GGUF file without the scaling of its rotary positions, which the file names.
#
# transformers 5.24.0 with gguf 0.19.0 and torch 2.13.0, on CPU in float32. One would take from_pretrained(folder, gguf_file=...)
# for the model that the file has: the tensors, rope.freq_base and the norms' epsilon all come over exactly. But of the keys
# <architecture>.rope.scaling.*, which the gguf package writes and llama.cpp reads, none is looked at (for gpt-oss alone they
# are): a Qwen2 (and a Llama just so) with linear or YaRN scaling is opened with plain positions and computes something else,
# without a word. Right: from_pretrained with config=, of the original folder, beside gguf_file=.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 gguf==0.19.0 torch==2.13.0 accelerate==1.15.0
cat >"$folder/read.py" <<'PYTHON'
import sys

import gguf
import torch
import transformers

NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
OF_LAYERS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
OF_LAYERS |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
OF_LAYERS |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
shape = {"vocab_size": 259, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
shape |= {"intermediate_size": 128, "max_position_embeddings": 64}
plain = {"rope_type": "default", "rope_theta": 300.0}
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def write(model: transformers.PreTrainedModel, rope: dict) -> None:
    file = gguf.GGUFWriter(f"{sys.argv[1]}/model.gguf", "qwen2")
    numbers = {"context_length": 64, "embedding_length": 64, "block_count": 2, "feed_forward_length": 128, "head_count": 4}
    numbers |= {"head_count_kv": 2, "layer_norm_rms_eps": 1e-6, "vocab_size": 259, "rope_freq_base": rope["rope_theta"]}
    for name, value in numbers.items():
        getattr(file, f"add_{name}")(value)
    if rope["rope_type"] != "default":
        file.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        file.add_rope_scaling_factor(rope["factor"])
        file.add_rope_scaling_orig_ctx_len(16)
    for name, tensor in model.state_dict().items():
        base, end = name.rsplit(".", 1)
        layer = base.split(".", 3)
        file.add_tensor(f"{NAMES.get(base) or f'blk.{layer[2]}.{OF_LAYERS[layer[3]]}'}.{end}", tensor.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


ids = torch.arange(40)[None]
for rope in (plain, plain | {"rope_type": "linear", "factor": 4.0}, plain | yarn):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**shape, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x) * 0.2)
        write(model, rope)
        for name, given in (("the file", {}), ("with config=", {"config": config})):
            given |= {"gguf_file": "model.gguf", "dtype": "float32"}
            opened = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], **given)
            far = (opened.eval()(ids).logits - model(ids).logits).abs().max()
            print(f"{rope['rope_type']}, {name}: {'agrees' if far < 1e-4 else 'differs'}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/read.py" "$folder" 2>"$folder/stderr" | grep ": ")
echo "$found"
[[ $found == "default, the file: agrees
default, with config=: agrees
linear, the file: differs
linear, with config=: agrees
yarn, the file: differs
yarn, with config=: agrees" ]] || {
  echo "this has changed"
  exit 1
}
