#!/usr/bin/env bash
# CTranslate2 converts models whose config.json asks for what it does not do, and computes something else without a word.
#
# ctranslate2 4.8.5 with transformers 5.24.0 and torch 2.13.0, on CPU in float32. One would take a converter to refuse a field
# that it does not know, as it refuses a rope_type that is in none of its tables. Llama with rope_type "llama3" is converted as
# if it were not scaled at all; Llama with another hidden_act computes SiLU; Gemma 2 loses both of its softcaps. Each is right
# in transformers, and a plain Llama agrees to 1e-4.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ctranslate2==4.8.5 transformers==5.24.0 torch==2.13.0 numpy
cat >"$folder/convert.py" <<'PYTHON'
import sys
from pathlib import Path

import ctranslate2
import numpy as np
import tokenizers
import torch
import transformers
from ctranslate2.converters import TransformersConverter
from tokenizers import models, pre_tokenizers, trainers

words = tokenizers.Tokenizer(models.BPE())
words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=259, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet)
words.train_from_iterator(["hello world"] * 3, trainer)
special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
shape = {"vocab_size": 259, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
shape |= {"intermediate_size": 128, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
llama3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0}
llama3 |= {"original_max_position_embeddings": 16}
gemma = shape | {"head_dim": 32, "query_pre_attn_scalar": 32}
MODELS = {
    "a plain Llama": transformers.LlamaConfig(**shape),
    "Llama, rope_type llama3": transformers.LlamaConfig(**shape, rope_parameters=llama3),
    "Llama, hidden_act gelu": transformers.LlamaConfig(**shape, hidden_act="gelu_pytorch_tanh"),
    "Gemma 2, softcaps": transformers.Gemma2Config(**gemma),
}
ids = torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(1))
for number, (name, config) in enumerate(MODELS.items()):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    folder = Path(sys.argv[1]) / str(number)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x) * 0.2)
        logits = model(ids).logits.numpy()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    TransformersConverter(str(folder)).convert(f"{folder}-converted")
    converted = np.array(ctranslate2.Generator(f"{folder}-converted", device="cpu").forward_batch(ids.tolist()))
    print(f"{name}: {'agrees' if np.abs(converted - logits).max() < 1e-3 else 'differs'}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/convert.py" "$folder" 2>/dev/null | grep ": ")
echo "$found"
wanted="a plain Llama: agrees
Llama, rope_type llama3: differs
Llama, hidden_act gelu: differs
Gemma 2, softcaps: differs"
[[ $found == "$wanted" ]] || {
  echo "this has changed"
  exit 1
}
