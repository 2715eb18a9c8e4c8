#!/usr/bin/env bash
# A tokenizer that is trained again keeps its added tokens under their old ids, which new tokens have as well.
#
# tokenizers 0.23.3. To have a tokenizer for other texts one opens an old tokenizer.json, for its normalizer, its splitting
# and its special tokens, and calls train_from_iterator. One would take tokens that had been added (add_special_tokens) to
# go behind the new vocabulary, or to be dropped. They keep their ids, and if the new vocabulary is larger, the same id is a
# token of it as well: here the text "ld" and the mark <new>, with one row of the embedding, and "old" is decoded to "o", as
# a special token is left out. Saved and opened again, <new> has another id than the one that the data was tokenized with.
# No error or warning at any point. Right: the added tokens among the trainer's special_tokens, or a new Tokenizer that
# takes over the old one's parts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3
cat >"$folder/again.py" <<'PYTHON'
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def trainer(size: int) -> trainers.BpeTrainer:
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    return trainers.BpeTrainer(vocab_size=size, special_tokens=["<end>"], initial_alphabet=bytes_, show_progress=False)


path = str(Path(sys.argv[1]) / "tokenizer.json")
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer.train_from_iterator(["hello"] * 3, trainer(259))
tokenizer.add_special_tokens(["<new>"])
tokenizer.save(path)
tokenizer = Tokenizer.from_file(path)
tokenizer.train_from_iterator(["hello hello world world"] * 3, trainer(280))
mark = tokenizer.token_to_id("<new>")
print(f"id {mark} is {sorted(token for token, i in tokenizer.get_vocab().items() if i == mark)}")
tokenizer.save(path)
print(f"<new> is {tokenizer.encode('<new>').ids}, saved and opened {Tokenizer.from_file(path).encode('<new>').ids}")
print(f"{tokenizer.encode('old').ids} is decoded to {tokenizer.decode(tokenizer.encode('old').ids)!r}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/again.py" "$folder" 2>"$folder/stderr")
echo "$found"
[[ $found == "id 259 is ['<new>', 'ld']
<new> is [259], saved and opened [267]
[79, 259] is decoded to 'o'" ]] || {
  echo "this has changed"
  exit 1
}
