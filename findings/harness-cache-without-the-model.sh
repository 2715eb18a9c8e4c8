#!/usr/bin/env bash
# The evaluation harness's cache of answers does not know the model: another one, or a later checkpoint, gets the first one's.
#
# lm-eval 0.4.13 with transformers 5.24.0, datasets 5.2.0 and torch 2.13.0, on CPU. --use_cache (use_cache of simple_evaluate)
# names a file of answers, so that a task needs not be run again for the same model. One would take an answer's key to hold
# the model, or the file to belong to one. The key is the request alone: its kind and its texts. Evaluate one checkpoint after
# the other with the same path, and all have the first one's log-likelihoods and the first one's score, and the second run is
# fast. A line of the log counts requests that were cached, and says no more. So with another tokenizer, dtype or prefix
# token. Right: a path that has the model and its settings in it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 datasets==5.2.0 accelerate==1.15.0 lm_eval==0.4.13
cat >"$folder/score.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import lm_eval
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

folder = Path(sys.argv[1])
ids = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<eos>": 256}
tokenizer = Tokenizer(models.BPE(ids, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
for seed in (0, 1):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=2, initializer_range=1.0)
    GPT2LMHeadModel(config).save_pretrained(folder / f"model{seed}")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / f"model{seed}")
rows = [{"question": f"{i} and", "choices": [" one", " two"], "answer": i % 2} for i in range(20)]
(folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
task = {"task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
task |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices"}
task |= {"doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}


def answers(seed: int, cache: str | None) -> list[float]:
    found = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(folder / f"model{seed}"), "device": "cpu", "dtype": "float32"},
        tasks=[task],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        use_cache=cache,
        bootstrap_iters=0,
        log_samples=True,
    )
    return [value for row in found["samples"]["own"] for value, _ in row["filtered_resps"]]


for how, cache in (("no cache", None), ("one cache", str(folder / "cache"))):
    first, second = answers(0, cache), answers(1, cache)
    equal = sum(x == y for x, y in zip(first, second, strict=True))
    print(f"RESULT {how}: {equal} of {len(first)} log-likelihoods of two models are equal")
PYTHON
found=$(HF_HOME="$folder/home" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/score.py" "$folder" 2>"$folder/stderr" | grep ^RESULT)
echo "$found"
[[ $found == "RESULT no cache: 0 of 40 log-likelihoods of two models are equal
RESULT one cache: 40 of 40 log-likelihoods of two models are equal" ]] || {
  echo "this has changed"
  exit 1
}
