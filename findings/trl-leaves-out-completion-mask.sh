#!/usr/bin/env bash
# TRL's SFTTrainer trains on all tokens of rows with a completion_mask unless told otherwise, but heeds assistant_masks.
#
# trl 1.16.0 with transformers 5.24.0. A data set may be tokenized already. SFTTrainer then takes the columns that it
# makes itself: input_ids with completion_mask (0 for the prompt, 1 for the answer) or assistant_masks.
# completion_only_loss is None by default, which is said to mean that "loss is computed on the completion for
# prompt-completion datasets". One would take rows with a completion_mask for such data. But what is looked at is
# whether the first row has the fields "prompt" and "completion", which tokenized rows no longer have: the labels are
# all of the input, the mask is dropped, and the model learns to write prompts as well. The same numbers under the name
# assistant_masks are heeded. Right: completion_only_loss=True for tokenized rows, or a column "labels" with -100 for
# the prompt, and a look at one batch of trainer.get_train_dataloader().
# In the library: trl/trainer/sft_trainer.py, where self.completion_only_loss is set from dataset_sample, and where
# mask_columns is made of it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q trl==1.16.0 transformers==5.24.0 datasets==5.2.0 accelerate==1.15.0 \
  tokenizers==0.23.3 torch==2.13.0
cat >"$folder/show.py" <<'PYTHON'
import tempfile

import datasets
import transformers
import trl
from tokenizers import Tokenizer, models

words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "<eos>": 2}, unk_token="<unk>"))
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
config = transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=2, eos_token_id=2)
model = transformers.GPT2LMHeadModel(config)
tokens, mask = [3, 4, 5, 6, 7], [0, 0, 0, 1, 1]


def show(name: str, row: dict[str, list[int]], **options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.SFTConfig(output_dir=folder, report_to="none", use_cpu=True, disable_tqdm=True, **options)
        rows = datasets.Dataset.from_list([row])
        trainer = trl.SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
        print(f"{name}: labels {next(iter(trainer.get_train_dataloader()))['labels'][0].tolist()}")


show("completion_mask", {"input_ids": tokens, "completion_mask": mask})
show("assistant_masks", {"input_ids": tokens, "assistant_masks": mask})
show("completion_mask, completion_only_loss=True", {"input_ids": tokens, "completion_mask": mask},
     completion_only_loss=True)
show("labels", {"input_ids": tokens, "labels": [-100, -100, -100, 6, 7]})
PYTHON
found=$(HF_HOME="$folder/home" CUDA_VISIBLE_DEVICES=none "$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "completion_mask: labels [3, 4, 5, 6, 7]
assistant_masks: labels [-100, -100, -100, 6, 7]
completion_mask, completion_only_loss=True: labels [-100, -100, -100, 6, 7]
labels: labels [-100, -100, -100, 6, 7]" ]] || {
  echo "this has changed"
  exit 1
}
