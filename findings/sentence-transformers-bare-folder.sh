#!/usr/bin/env bash
# sentence-transformers takes the last token of one folder and the mean of another, and a GPT-2's embedding is its batch's.
#
# sentence-transformers 6.2.0 with transformers 5.24.0 and torch 2.13.0, on CPU in float32. One would take a folder of a language
# model, which says nothing of pooling, to be opened in one way, and a text to have one embedding. The pooling goes by the
# first of "architectures": the last token if it ends in ForCausalLM, as LlamaForCausalLM does, else the mean, as for
# GPT2LMHeadModel; no word of either. And a batch is padded on the tokenizer's side: on the left, which is usual for generation,
# a shorter text begins at a later position. With rotary positions that is the same; with a GPT-2's learned ones the same
# text is another vector in each company. Right: modules=[Transformer(...), Pooling(...)], and padding_side="right".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q sentence-transformers==6.2.0 transformers==5.24.0 torch==2.13.0
cat >"$folder/embed.py" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

words = Tokenizer(models.BPE())
words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = pre_tokenizers.ByteLevel.alphabet()
options = {"vocab_size": 258, "special_tokens": ["<pad>", "</s>"], "show_progress": False}
words.train_from_iterator(["a"], trainers.BpeTrainer(initial_alphabet=alphabet, **options))
gpt2 = {"vocab_size": 258, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1}
llama = {"vocab_size": 258, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
for name, config in (("Llama", transformers.LlamaConfig(**llama)), ("GPT-2", transformers.GPT2Config(**gpt2))):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x) * 0.1)
    for side in ("right", "left"):
        folder = Path(sys.argv[1]) / f"{name}-{side}"
        model.save_pretrained(folder)
        special = {"pad_token": "<pad>", "eos_token": "</s>", "padding_side": side}
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
        opened = SentenceTransformer(str(folder), device="cpu")
        alone = opened.encode(["a short text"])[0]
        together = opened.encode(["a short text", "a text that is longer than the other"])[0]
        cosine = float(alone @ together / np.linalg.norm(alone) / np.linalg.norm(together))
        pooling = opened[1].get_config_dict()["pooling_mode"]
        print(f"{name}, {side}: {pooling}, beside a longer text {'the same' if cosine > 0.9999 else 'another'}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/embed.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == "Llama, right: lasttoken, beside a longer text the same
Llama, left: lasttoken, beside a longer text the same
GPT-2, right: mean, beside a longer text the same
GPT-2, left: mean, beside a longer text another" ]] || {
  echo "this has changed"
  exit 1
}
