#!/usr/bin/env bash
# In torchmetrics Accuracy(task="multiclass") and MulticlassAccuracy are two numbers, and the F1 scores are, too.
#
# torchmetrics 1.9.0 with torch 2.13.0, on CPU. Accuracy(task="multiclass") is, as its text says, a wrapper that makes a
# MulticlassAccuracy: one would take it for the same metric under two names. Their default of average differs: the
# wrapper takes "micro", the share of right answers, and the class takes "macro", the mean over classes, where a rare
# class counts as much as a frequent one. If a model always says the class that 90 of 100 rows have, one says 0.90 and
# the other 0.33. The functions multiclass_accuracy and accuracy differ in the same way. A change from one to the other,
# as in a tidy-up of imports, moves a curve. Binary outputs have a trap of their own: a batch of logits that happen to
# lie between 0 and 1 is taken for probabilities, while logits beyond are put through a sigmoid, batch by batch, so that
# the same row is right in one batch and wrong in another. Right: average= always given, and sigmoid applied by hand.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torchmetrics==1.9.0 torch==2.13.0 numpy==2.4.6
cat >"$folder/show.py" <<'PYTHON'
import torch
from torchmetrics import Accuracy, F1Score
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.functional import accuracy
from torchmetrics.functional.classification import multiclass_accuracy

target = torch.tensor([0] * 90 + [1] * 5 + [2] * 5)
said = torch.zeros(100, dtype=torch.long)
METRICS = {
    "Accuracy, multiclass": Accuracy(task="multiclass", num_classes=3),
    "MulticlassAccuracy": MulticlassAccuracy(num_classes=3),
    "accuracy, multiclass": lambda *x: accuracy(*x, task="multiclass", num_classes=3),
    "multiclass_accuracy": lambda *x: multiclass_accuracy(*x, num_classes=3),
    "F1Score, multiclass": F1Score(task="multiclass", num_classes=3),
    "MulticlassF1Score": MulticlassF1Score(num_classes=3),
}
for name, metric in METRICS.items():
    print(f"{name}: {float(metric(said, target)):.2f}")
logits, positive = torch.tensor([0.2, 0.3, 0.4, 1.5]), torch.ones(4, dtype=torch.long)
one_batch, two_batches = Accuracy(task="binary"), Accuracy(task="binary")
one_batch.update(logits, positive)
two_batches.update(logits[:2], positive[:2])
two_batches.update(logits[2:], positive[2:])
print(f"binary logits above 0, all positive: {float(one_batch.compute()):.2f} in one batch, {float(two_batches.compute()):.2f} in two")
PYTHON
found=$("$folder/venv/bin/python" "$folder/show.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "Accuracy, multiclass: 0.90
MulticlassAccuracy: 0.33
accuracy, multiclass: 0.90
multiclass_accuracy: 0.33
F1Score, multiclass: 0.90
MulticlassF1Score: 0.32
binary logits above 0, all positive: 1.00 in one batch, 0.50 in two" ]] || {
  echo "this has changed"
  exit 1
}
