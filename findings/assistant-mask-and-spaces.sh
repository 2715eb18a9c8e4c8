#!/usr/bin/env bash
# The mask of an answer leaves out the spaces at its end, in tokenizers whose places of tokens are trimmed.
#
# transformers 5.24.0, tokenizers 0.23.3. With {% generation %} in a chat template, return_assistant_tokens_mask=True says
# which tokens are the assistant's, to learn from those alone. One would take every token between the two marks for one
# of them. But the first and the last are looked up by characters, and a post-processor ByteLevel with trim_offsets (as
# GPT-2's and Llama 3's have it) gives a token that is a space no characters at all. At the end of an answer that is cut
# there, it is left out; in the middle it is in, as all between the first and the last are.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3 jinja2==3.1.6
cat >"$folder/mask.py" <<'PYTHON'
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def learned(trim: bool, answer: str) -> str:
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(ALPHABET)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=MARKED)
    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]
    found = tokenizer.apply_chat_template(
        talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    kept = [i for i, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    return tokenizer.decode(kept)


for trim in (False, True):
    for answer in ("a b", "a  "):
        print(f"trim_offsets {trim}, answer {answer!r}: {learned(trim, answer)!r}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/mask.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "trim_offsets False, answer 'a b': 'a b'
trim_offsets False, answer 'a  ': 'a  '
trim_offsets True, answer 'a b': 'a b'
trim_offsets True, answer 'a  ': 'a '" ]] || {
  echo "this has changed"
  exit 1
}
