#!/usr/bin/env bash
# A BPE of tokenizers leaves out what is not in its alphabet, and limit_alphabet takes away bytes of the initial alphabet.
#
# tokenizers 0.23.3. WordLevel, WordPiece and Unigram raise an error if a text has something unknown and there is no token
# for that. One would take a BPE without unk_token to do the same. It encodes the rest: "Hello Zebra 42!" is decoded to
# "ello er ", with no word, and the loss on such texts is low, as the rare parts are gone. A byte-level BPE is said to know
# every text, but it does so only with initial_alphabet=ByteLevel.alphabet(), and then not with limit_alphabet, the "maximum
# different characters to keep". One would take that to limit what comes on top of the initial alphabet, or to keep the most
# frequent characters. It counts the initial alphabet as well, as all equally frequent and before any text, and keeps some
# of it by chance: other bytes each time, whatever the training texts consist of. Right: all 256 bytes and no
# limit_alphabet, or an unk_token that is also a special token; and a look at decode(encode(text)).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3
cat >"$folder/alphabet.py" <<'PYTHON'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = ["hello world hello there"] * 3
BYTES = pre_tokenizers.ByteLevel.alphabet()


def back(model: models.Model, trainer: trainers.Trainer, text: str) -> str:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainer)
    try:
        return repr(tokenizer.decode(tokenizer.encode(text).ids))
    except Exception:  # tokenizers has no other class
        return "error"


quiet = {"show_progress": False}
text = "Hello Zebra 42!"
print("WordLevel:", back(models.WordLevel(unk_token="?"), trainers.WordLevelTrainer(**quiet), text))
print("WordPiece:", back(models.WordPiece(unk_token="?"), trainers.WordPieceTrainer(**quiet), text))
print("Unigram:", back(models.Unigram(), trainers.UnigramTrainer(vocab_size=20, **quiet), text))
print("BPE:", back(models.BPE(), trainers.BpeTrainer(**quiet), text))
print("BPE, all bytes:", back(models.BPE(), trainers.BpeTrainer(initial_alphabet=BYTES, **quiet), text))
limited = {"initial_alphabet": BYTES, "limit_alphabet": 64, **quiet}
texts = {back(models.BPE(), trainers.BpeTrainer(**limited), TEXTS[0]) for _ in range(9)}
right = repr(TEXTS[0]) in texts
print(f"BPE, all bytes, limit_alphabet=64, a training text: right {right}, always the same {len(texts) == 1}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/alphabet.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "WordLevel: error
WordPiece: error
Unigram: error
BPE: 'ello er '
BPE, all bytes: 'Hello Zebra 42!'
BPE, all bytes, limit_alphabet=64, a training text: right False, always the same False" ]] || {
  echo "this has changed"
  exit 1
}
