#!/usr/bin/env bash
# tiktoken leaves out all text that its pattern does not match, and says nothing: 'a, b' comes back as 'a b'.
#
# tiktoken 0.14.0. One would take an Encoding whose vocabulary has all 256 bytes to encode every text so that decode
# gives it back; the README says of byte pair encoding that it is reversible and lossless and works on arbitrary text.
# pat_str is described as a regex pattern that is used to split the text. But only what the pattern finds is encoded,
# and what is between two finds is thrown away: with words and spaces all punctuation is gone, and with GPT-2's pattern
# less its last alternative, the line breaks and tabs before a word. Regex splits of tokenizers keep what is between. A
# model is then trained on, and scored with, texts without these characters; encode and encode_ordinary_batch are alike.
# Right: a pattern whose last alternatives take everything that is left, such as |[\s\S], and a check in the tests that
# decode(encode(text)) is the text for texts of all sorts of characters. In the library: tiktoken's src/lib.rs,
# encode_ordinary and encode: for mat in regex.find_iter(text).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tiktoken==0.14.0
cat >"$folder/show.py" <<'PYTHON'
import tiktoken

texts = ["a, b! (c)", "x = 1\n\ty += 2\n", "caf\u00e9 na\u00efve", "plain words"]
patterns = {
    "words and spaces": r"\w+|\s+",
    "words, spaces and the rest": r"\w+|\s+|[\s\S]",
    "like GPT-2, less the last part": r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+",
    "words of ASCII only": r" ?[A-Za-z]+",
}
ranks = {bytes([byte]): byte for byte in range(256)}
for name, pattern in patterns.items():
    encoding = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    back = [encoding.decode(encoding.encode(text)) for text in texts]
    assert back == [encoding.decode(ids) for ids in encoding.encode_ordinary_batch(texts)]
    lost = sum(len(text) for text in texts) - sum(len(text) for text in back)
    print(f"{name}: {lost} characters lost, {ascii(back[0])}, {ascii(back[1]).replace(chr(92), '/')}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "words and spaces: 7 characters lost, 'a b c', 'x  1/n/ty  2/n'
words, spaces and the rest: 0 characters lost, 'a, b! (c)', 'x = 1/n/ty += 2/n'
like GPT-2, less the last part: 3 characters lost, 'a, b! (c)', 'x = 1y += 2'
words of ASCII only: 19 characters lost, 'a bc', 'xy'" ]] || {
  echo "this has changed"
  exit 1
}
