#!/usr/bin/env bash
# transformers' AutoTokenizer gives a Qwen2 folder Qwen's own pre-tokenizer, whatever tokenizer.json and its class say.
#
# transformers 5.24.0 with tokenizers 0.23.3. A folder with model_type "qwen2" in config.json, a tokenizer.json of its own and
# "tokenizer_class": "PreTrainedTokenizerFast". One would take AutoTokenizer to open that class with that file, as it does for
# "llama". It opens Qwen2Tokenizer, which takes the vocabulary and the merges from the file, and puts its own normalizer (NFC),
# its own splitting into words and a token <|endoftext|> beside them: other ids, and one more token than the model may have
# rows. PreTrainedTokenizerFast.from_pretrained of the same folder is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3
cat >"$folder/open.py" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
tokenizer.train_from_iterator(["x = 12345\n", "a = 12345\n"] * 9, trainer)
for kind in ("llama", "qwen2"):
    folder = Path(sys.argv[1]) / kind
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    auto, fast = AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    same = auto("x = 12345")["input_ids"] == fast("x = 12345")["input_ids"]
    print(f"{kind}: {type(auto).__name__}, ids {'equal' if same else 'differ'}, {len(auto) - len(fast)} tokens more")
PYTHON
found=$("$folder/venv/bin/python" "$folder/open.py" "$folder" 2>/dev/null)
echo "$found"
[[ $found == *"llama: "*", ids equal, 0 tokens more"* && $found == *"qwen2: Qwen2Tokenizer, ids differ, 1 tokens more"* ]] || {
  echo "this has changed"
  exit 1
}
