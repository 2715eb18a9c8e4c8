"""Evaluation tasks while a run trains, by EleutherAI's harness: python examples/eval_tasks.py

Learns to count, and is asked at each evaluation which of two numbers comes next. Two minutes on 2 CPU cores. Needs
`pip install "lm-eval[hf]"`; with a network, the harness's own tasks go by their names, such as Tasks("hellaswag").
"""

import json
import random
import tempfile
from pathlib import Path

import lm_eval

from jaxlm import Hook, Running, Trainer, load, load_config, replace_fields
from jaxlm.interop.export import export

QUESTIONS = [(f"After {i} comes", [f" {i + 1}.", f" {i + 17}."]) for i in range(0, 400, 7)]


class Tasks(Hook):
    """Scores the model at each evaluation; the scores are in that step's row."""

    def __init__(self, *tasks: str | dict) -> None:
        self.tasks = tasks

    def on_evaluate(self, run: Running, metrics: dict[str, float]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            own, theirs = Path(folder, "jaxlm"), Path(folder, "transformers")
            run.save_model(own)
            export(load(own), own, theirs, max_shard_size=10**9, dtype="float32")
            options = {"model_args": {"pretrained": str(theirs)}, "device": "cpu", "bootstrap_iters": 0}
            results = lm_eval.simple_evaluate("hf", tasks=list(self.tasks), **options)["results"]
        for task, values in results.items():
            scores = {f"{task}/{name.removesuffix(',none')}": x for name, x in values.items() if type(x) is float}
            run.metrics_tracker.update(scores, run.current_step)


def counting(folder: Path) -> dict:
    """A task of one's own, as the harness describes them."""
    rows = [{"question": question, "choices": choices} for question, choices in QUESTIONS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "counting.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "counting.jsonl")}}}
    ask = {"doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": 0, "target_delimiter": ""}
    return {"task": "counting", "output_type": "multiple_choice", "test_split": "test", **data, **ask}


config = replace_fields(
    load_config("small"),
    {
        "model.vocab_size": 400,
        "model.n_layers": 2,
        "model.d_model": 128,
        "model.d_ff": 512,
        "model.max_seq_len": 64,
        "data.max_length": 64,
        "data.min_length": 4,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": 120,
        "training.eval_steps": 40,
        "training.sample_prompt": "After 7 comes",
        "training.checkpoint_dir": "runs/eval_tasks",
    },
)

if __name__ == "__main__":
    lines = [f"After {i} comes {i + 1}." for i in range(400)] * 20
    random.Random(0).shuffle(lines)
    result = Trainer(config, train_dataset=lines, hooks=[Tasks(counting(Path("runs")))]).train()
    print([(row["step"], row["counting/acc"]) for row in result.rows() if "counting/acc" in row])
