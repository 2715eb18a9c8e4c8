#!/usr/bin/env bash
# A tokenizer that transformers saves after a call with truncation cuts every text, where the file is read by tokenizers.
#
# transformers 5.24.0 with tokenizers 0.23.3. One would take truncation=True and max_length for arguments of one call, as
# they are in transformers: the next call without them gives all of a text. But the call sets them in the tokenizer
# underneath, and save_pretrained writes that, length and all, into tokenizer.json, padding too. transformers sets both anew with
# each call, so nobody sees it there. Tokenizer.from_file, and what is built on it (data pipelines, servers in Rust), cuts
# each text to the length of the last call before the save. Right: no_truncation() and no_padding() behind
# Tokenizer.from_file, or on backend_tokenizer before the save.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3
cat >"$folder/save.py" <<'PYTHON'
import sys

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

words = Tokenizer(models.BPE())
words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = pre_tokenizers.ByteLevel.alphabet()
options = {"vocab_size": 257, "special_tokens": ["<pad>"], "show_progress": False}
words.train_from_iterator(["a"], trainers.BpeTrainer(initial_alphabet=alphabet, **options))
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
TEXT = "twenty-six characters long"

tokenizer(["a text"], truncation=True, max_length=8, padding=True)
tokenizer.save_pretrained(sys.argv[1])
auto = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
print(f"transformers: {len(auto(TEXT)['input_ids'])} tokens")
plain = Tokenizer.from_file(f"{sys.argv[1]}/tokenizer.json")
print(f"tokenizers: {len(plain.encode(TEXT).ids)} tokens")
plain.no_truncation()
print(f"tokenizers, no_truncation: {len(plain.encode(TEXT).ids)} tokens")
PYTHON
found=$("$folder/venv/bin/python" "$folder/save.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == "transformers: 26 tokens
tokenizers: 8 tokens
tokenizers, no_truncation: 26 tokens" ]] || {
  echo "this has changed"
  exit 1
}
