#!/usr/bin/env bash
# The evaluation loss of transformers' Trainer depends on batch size and order of rows, if texts have several lengths.
#
# transformers 5.24.0 with accelerate 1.15.0, tokenizers 0.23.3 and torch 2.13.0, on CPU in float32. One would take
# eval_loss for the mean over all tokens, as the training loss now is (Trainer counts the tokens of all accumulated
# batches), or at least for a number of the model and the data alone. It is a mean of the batches' means, weighted by rows:
# side by side in a batch, a token of a long text counts as much as one of a short text; in batches of their own it counts
# less. So per_device_eval_batch_size, the rows' order and the number of GPUs move the loss, here by 15 %, and with it the
# best checkpoint (load_best_model_at_end) and early stopping. Two runs compare only with the same batches. Right: an
# evaluation set packed into rows of one length, without padding, or a loop of one's own that sums losses and tokens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 accelerate==1.15.0
cat >"$folder/evaluate.py" <<'PYTHON'
import sys

import torch
from tokenizers import Tokenizer, models
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import Trainer, TrainingArguments

torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.5, pad_token_id=0, **sizes)).eval()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0})), pad_token="<pad>")
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
short = [torch.randint(1, 32, (3,)).tolist() for _ in range(6)]
long = [torch.randint(32, 64, (60,)).tolist() for _ in range(2)]
mixed = [{"input_ids": ids} for ids in [*short[:3], long[0], *short[3:], long[1]]]
by_length = sorted(mixed, key=lambda row: len(row["input_ids"]))


def loss(rows: list[dict], size: int) -> float:
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(sys.argv[1], per_device_eval_batch_size=size, **options)
    return Trainer(model, arguments, data_collator=collator, eval_dataset=rows).evaluate()["eval_loss"]


total = count = 0
with torch.no_grad():
    for row in mixed:
        ids = torch.tensor([row["input_ids"]])
        total += model(ids, labels=ids).loss.item() * (ids.numel() - 1)
        count += ids.numel() - 1
found = {"mean over tokens": total / count} | {f"batches of {n}": loss(mixed, n) for n in (1, 2, 4, 8)}
found |= {"batches of 4, rows by length": loss(by_length, 4)}
for name, value in found.items():
    print(f"{name}: {value:.1f}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/evaluate.py" "$folder/out" 2>"$folder/stderr" | grep -v eval_)
echo "$found"
[[ $found == "mean over tokens: 7.3
batches of 1: 6.4
batches of 2: 6.2
batches of 4: 7.3
batches of 8: 7.3
batches of 4, rows by length: 6.7" ]] || {
  echo "this has changed"
  exit 1
}
