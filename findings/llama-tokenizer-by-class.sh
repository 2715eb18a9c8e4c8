#!/usr/bin/env bash
# transformers 5 reads one tokenizer.model in two ways: right without a class, and as Llama's if the class is LlamaTokenizer.
#
# transformers 5.24.0 with tokenizers 0.23.3 and sentencepiece 0.2.3. A sentencepiece model says of itself how texts are
# normalized, whether a blank is put in front, and whether it is a BPE or a Unigram. One would take LlamaTokenizer, or a
# folder that names it in tokenizer_config.json, to go by that, as AutoTokenizer does for a folder of model_type llama that
# names no class. It takes the pieces only and has its own rules for the rest: a Unigram's pieces become a BPE that hardly
# merges, the normalization is left out, a blank is put in front where there should be none, and none in front of a text that
# begins with a blank. The last is wrong for Llama's own settings, too: " the cat" and "the cat" have the same ids. Every id
# is valid, nothing warns. Right: no tokenizer_class in the folder and AutoTokenizer, which has sentencepiece's pieces.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2
cat >"$folder/read.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import sentencepiece
import transformers

folder = Path(sys.argv[1])
words = "the cat sat on a mat and the dog ran to the red house of an old man who has two hats".split()
lines = [" ".join(words[i % len(words)] for i in range(n, n + 12)) for n in range(200)]
llama = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
kinds = {"Llama's settings": llama, "default normalization": {"model_type": "bpe"}}
kinds |= {"no blank in front": llama | {"add_dummy_prefix": False}, "Unigram": llama | {"model_type": "unigram"}}
for kind, settings in kinds.items():
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    read = {"no class": transformers.AutoTokenizer.from_pretrained(folder)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    read["LlamaTokenizer"] = transformers.AutoTokenizer.from_pretrained(folder)
    for name, tokenizer in read.items():
        texts = ("the cat", " the cat", "the  cat")
        same = [tokenizer.encode(text, add_special_tokens=False) == own.encode(text) for text in texts]
        pieces = " ".join(tokenizer.tokenize(" the cat"))
        print(f"{kind}, {name}: {sum(same)} of {len(same)} right; pieces of ' the cat': {pieces}")
PYTHON
found=$(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/read.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == "Llama's settings, no class: 3 of 3 right; pieces of ' the cat': ▁ ▁the ▁cat
Llama's settings, LlamaTokenizer: 2 of 3 right; pieces of ' the cat': ▁the ▁cat
default normalization, no class: 3 of 3 right; "*"
default normalization, LlamaTokenizer: 2 of 3 right; "*"
no blank in front, no class: 3 of 3 right; "*"
no blank in front, LlamaTokenizer: 1 of 3 right; "*"
Unigram, no class: 3 of 3 right; pieces of ' the cat': ▁ ▁the ▁cat
Unigram, LlamaTokenizer: 0 of 3 right; pieces of ' the cat': ▁ t h e ▁ c a t" ]] || {
  echo "this has changed"
  exit 1
}
