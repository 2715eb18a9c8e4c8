#!/usr/bin/env bash
# Added tokens with letters like e-acute come back from a byte-level tokenizer as broken bytes.
#
# tokenizers 0.23.3. One would take decode to give back each added token as it is: it is a piece of text with an id. But
# the byte-level decoder goes over added tokens as well: a letter that stands for a byte in its alphabet (all of Latin-1
# from inverted exclamation mark on, and U+0100 to U+0143) becomes that one byte, which is no UTF-8. "café" that was
# added is "caf" and a replacement character, though the same word as ordinary tokens comes back right; words in Greek
# or Japanese come back right, too, as they are outside the alphabet, so that only western European languages are hit.
# Encoding is right: ids and training are in order, and texts that the model writes are damaged. It is the same for
# special tokens when they are not skipped. Right: only ASCII in added tokens of a byte-level tokenizer, or words in
# training.
# In the library: tokenizers/src/pre_tokenizers/byte_level.rs, decode_chain: per token, all letters or none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3
cat >"$folder/show.py" <<'PYTHON'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
words = ["caf\u00e9", "na\u00efve", "\u00abend\u00bb", "\u0394x", "\u732b", "plain"]
before = [tokenizer.decode(tokenizer.encode(word).ids) == word for word in words]
tokenizer.add_tokens(words)
for word, right in zip(words, before, strict=True):
    encoding = tokenizer.encode(word)
    text = tokenizer.decode(encoding.ids)
    how = "comes back" if text == word else f"comes back as {ascii(text)[1:-1]}".replace("\\ufffd", "(U+FFFD)")
    said = "came back" if right else "did not come back"
    print(f"{ascii(word)[1:-1]}: ".replace("\\", "") + f"{said} as bytes, and {how} as {len(encoding.ids)} added token")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "cafxe9: came back as bytes, and comes back as caf(U+FFFD) as 1 added token
naxefve: came back as bytes, and comes back as na(U+FFFD)ve as 1 added token
xabendxbb: came back as bytes, and comes back as (U+FFFD)end(U+FFFD) as 1 added token
u0394x: came back as bytes, and comes back as 1 added token
u732b: came back as bytes, and comes back as 1 added token
plain: came back as bytes, and comes back as 1 added token" ]] || {
  echo "this has changed"
  exit 1
}
