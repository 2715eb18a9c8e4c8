#!/usr/bin/env bash
# Of several spaces OpenVINO's converted tokenizers read one where Metaspace splits: indented code loses its indentation.
#
# openvino-tokenizers 2026.4.1.0 with openvino 2026.4.1, tokenizers 0.23.3 and transformers 5.24.0. One would take
# convert_tokenizer for all or nothing: what it doesn't support of a tokenizer.json (CharDelimiterSplit, say) is an error, and all
# else has the same ids. But of several spaces in a row only the last is left where the pre-tokenizer is Metaspace, in BPE as in
# Unigram, and so it is with each Split whose delimiter goes to the piece behind it (merged_with_next). An added token with
# single_word=True is found inside of other words, "do" in "dogs". There is no error and no warning, and texts with
# single spaces have the right ids. Right: compare the ids of texts with several spaces and line breaks before a converted
# tokenizer is used. Metaspace with split=False and Split with "isolated" come over rightly.
# In the library: openvino_tokenizers/tokenizer_pipeline.py, metaspace_splitter, which asks for "mergedwithnext".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openvino-tokenizers==2026.4.1.0 openvino==2026.4.1 tokenizers==0.23.3 transformers==5.24.0 \
  numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import openvino
import openvino_tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "if x:\n\n    return  dogs"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def show(name: str, pre: pre_tokenizers.PreTokenizer, unigram: bool = False, added: AddedToken | None = None) -> None:
    options = {"special_tokens": ["<unk>"], "show_progress": False}
    if unigram:
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(vocab_size=40, unk_token="<unk>", **options)
    else:
        alphabet = [] if isinstance(pre, pre_tokenizers.Metaspace) else pre_tokenizers.ByteLevel.alphabet()
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + 40, initial_alphabet=alphabet, **options)
    tokenizer.pre_tokenizer = pre
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_tokens([added] if added else [])
    given = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    converted = openvino.Core().compile_model(openvino_tokenizers.convert_tokenizer(given), "CPU")
    found = converted([TEXT])["input_ids"][0].tolist()
    if found == given(TEXT)["input_ids"]:
        print(f"{name}: the same")
        return
    for which, ids in (("tokenizers", given(TEXT)["input_ids"]), ("OpenVINO", found)):
        tokens = (" " if added else "").join(given.convert_ids_to_tokens(ids))
        print(f"{name}, {which}: {tokens.translate(str.maketrans('▁ĠĊ' + chr(10), '__||'))}")


def split(behavior: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s"), behavior), BYTES])


show("BPE, Metaspace", pre_tokenizers.Metaspace())
show("Unigram, Metaspace", pre_tokenizers.Metaspace(), unigram=True)
show("BPE, Metaspace without split", pre_tokenizers.Metaspace(split=False))
show("isolated", split("isolated"))
show("merged_with_next", split("merged_with_next"))
word = AddedToken("do", single_word=True)
show("single_word", pre_tokenizers.ByteLevel(add_prefix_space=False), added=word)
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr" | grep ": ") || { tail -5 "$folder/stderr"; exit 1; }
echo "$found"
[[ $found == "BPE, Metaspace, tokenizers: _if_x:||____return__dogs
BPE, Metaspace, OpenVINO: _if_x:||_return_dogs
Unigram, Metaspace, tokenizers: _if_x:||____return__dogs
Unigram, Metaspace, OpenVINO: _if_x:||_return_dogs
BPE, Metaspace without split: the same
isolated: the same
merged_with_next, tokenizers: if_x:||____return__dogs
merged_with_next, OpenVINO: if_x:_return_dogs
single_word, tokenizers: if _x : ||___ _return _ _dogs
single_word, OpenVINO: if _x : ||___ _return __ do gs" ]] || {
  echo "this has changed"
  exit 1
}
