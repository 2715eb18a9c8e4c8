#!/usr/bin/env bash
# Trained again on the same texts, a Unigram or WordPiece tokenizer of tokenizers has other ids, and WordPiece other words.
#
# tokenizers 0.23.3. One would take training for a function of the texts and the settings, as it is for a usual BPE. The Unigram
# trainer comes to the same tokens, but numbers those of equal weight anew each time; the WordPiece trainer, which is a BPE
# trainer whose alphabet of continuations comes in the order of a hash table, breaks ties between merges otherwise, too. There is
# no seed. So a tokenizer that was made once more, for a lost file or on each machine of a run, fits neither the old
# checkpoint nor the tokenized data, though its size and most of its tokens are the same: every id is valid, and another token's.
# Right: to train once, and to copy and compare tokenizer.json.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3
cat >"$folder/train.py" <<'PYTHON'
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXTS = ["the cat sat on the mat, the dog ate the hat", "lower lowest newer newest wide wider", "return x + y in range"] * 50
settings = {"vocab_size": 90, "special_tokens": ["<unk>"], "show_progress": False}
KINDS = {
    "BPE": lambda: (models.BPE(), trainers.BpeTrainer(**settings)),
    "Unigram": lambda: (models.Unigram(), trainers.UnigramTrainer(**settings, unk_token="<unk>")),
    "WordPiece": lambda: (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(**settings)),
}
for name, kind in KINDS.items():
    trained = []
    for _ in range(8):
        model, trainer = kind()
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.train_from_iterator(TEXTS, trainer)
        trained.append(tokenizer.get_vocab())
    same_ids = all(vocabulary == trained[0] for vocabulary in trained)
    same_tokens = all(set(vocabulary) == set(trained[0]) for vocabulary in trained)
    print(f"{name}: {'the same' if same_tokens else 'other'} tokens, {'the same' if same_ids else 'other'} ids")
PYTHON
found=$("$folder/venv/bin/python" "$folder/train.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "BPE: the same tokens, the same ids
Unigram: the same tokens, other ids
WordPiece: other tokens, other ids" ]] || {
  echo "this has changed"
  exit 1
}
