#!/usr/bin/env bash
# transformers' collator for language models throws given labels away, so that prompts that were masked are learned after all.
#
# transformers 5.24.0 with tokenizers 0.23.3 and torch 2.13.0, on CPU. Rows with input_ids and labels, where labels are -100
# in the prompt, are usual for training on answers. One would take DataCollatorForLanguageModeling(mlm=False), the usual one
# for causal models, to use the labels that a row has, and to make them of the input_ids where it has none. It always makes
# them anew: the -100s are gone, and what is learned is the whole conversation. Rows of several lengths do raise an error,
# about padding of the labels; packed rows, rows of one length and batches of one row go through with no word. Right:
# DataCollatorForSeq2Seq(tokenizer), which keeps labels and pads them with -100, or default_data_collator for rows of one
# length.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3
cat >"$folder/collate.py" <<'PYTHON'
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, PreTrainedTokenizerFast

backend = Tokenizer(models.WordLevel({"<pad>": 0, "user": 5, "says": 6, "yes": 7, "no": 8}, unk_token="<pad>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
rows = [{"input_ids": [5, 6, end], "labels": [-100, -100, end]} for end in (7, 8)]
collators = {"DataCollatorForLanguageModeling": DataCollatorForLanguageModeling(tokenizer, mlm=False)}
collators |= {"DataCollatorForSeq2Seq": DataCollatorForSeq2Seq(tokenizer)}
collators |= {"default_data_collator": transformers.default_data_collator}
for name, collator in collators.items():
    print(f"{name}: {collator([dict(row) for row in rows])['labels'].tolist()}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/collate.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "DataCollatorForLanguageModeling: [[5, 6, 7], [5, 6, 8]]
DataCollatorForSeq2Seq: [[-100, -100, 7], [-100, -100, 8]]
default_data_collator: [[-100, -100, 7], [-100, -100, 8]]" ]] || {
  echo "this has changed"
  exit 1
}
