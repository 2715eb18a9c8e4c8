#!/usr/bin/env bash
# A symbol of one's own with a space in it gets an id from sentencepiece, and text with the symbol never has that id.
#
# sentencepiece 0.2.3. user_defined_symbols are "treated as single, indivisible tokens in any context" and, where the
# text has one, "guaranteed to be tokenized as that single token": so it is with "<end>". One would take "<end of turn>"
# or "### Answer:" for one, too. It gets an id, so that piece_to_id finds it, and text with it is cut into pieces all
# the same: before the search for symbols, spaces have become U+2581 (the lower bar), which the symbol as it was given
# does not have. So a mark of a chat is several ids, with room in the vocabulary for the one that it was to be, and
# nothing is said at training or later. Right: symbols without spaces, or with the bar in place of the space, which is
# found in texts with plain spaces, and comes back as a space.
# In the library: src/normalizer.cc, Normalizer::Normalize, which replaces spaces also in what the matcher of symbols
# has found; the model's own matcher then looks for the symbol as it was given. The promise is in
# doc/special_symbols.md.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q sentencepiece==0.2.3
cat >"$folder/show.py" <<'PYTHON'
import io
import random

import sentencepiece

random.seed(0)
WORDS = "the cat sat on a mat and quick brown foxes jump over lazy dogs of user turn end in".split()
TEXTS = [" ".join(random.choices(WORDS, k=12)) for _ in range(1000)]


def show(symbol: str, text: str) -> None:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=80, model_type="bpe", minloglevel=2,
        user_defined_symbols=["<", ">", symbol],
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    ids = processor.encode(text)
    place, times = processor.piece_to_id(symbol), ids.count(processor.piece_to_id(symbol))
    name = symbol.replace("\u2581", "(bar)")
    print(f"{name!r}: id {place}, {times} times in {len(ids)} tokens of {text!r}, back {processor.decode(ids)!r}")


show("<end>", "cat <end> dogs")
show("<end of turn>", "cat <end of turn> dogs")
show("<end\u2581of\u2581turn>", "cat <end of turn> dogs")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "'<end>': id 5, 1 times in 4 tokens of 'cat <end> dogs', back 'cat <end> dogs'
'<end of turn>': id 5, 0 times in 9 tokens of 'cat <end of turn> dogs', back 'cat <end of turn> dogs'
'<end(bar)of(bar)turn>': id 5, 1 times in 4 tokens of 'cat <end of turn> dogs', back 'cat <end of turn> dogs'" ]] || {
  echo "this has changed"
  exit 1
}
