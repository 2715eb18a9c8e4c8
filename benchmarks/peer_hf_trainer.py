"""A PyTorch peer of cpu.py with everything around the step: transformers' Trainer on the same GPT-2, eager.

It logs as often as jaxlm does, shows its progress bar, and saves nothing. Needs torch, transformers, accelerate, NumPy.
"""

from pathlib import Path
from typing import Any

import torch
from lib.worker import Turns
from peer_torch import Batches, gpt2, start
from transformers import Trainer, TrainerCallback, TrainingArguments


class Rows(torch.utils.data.Dataset):
    """The batches' rows, one by one."""

    def __init__(self, batches: Batches) -> None:
        self.tokens, self.labels = (x.flatten(0, 1) for x in (batches.tokens_NBT, batches.labels_NBT))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


class Laps(TrainerCallback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.turns.lap(logs["loss"])


def main() -> None:
    turns, spec = start()
    model, training = gpt2(spec), spec["training"]
    arguments = TrainingArguments(
        output_dir=str(Path(spec["folder"]) / "run_hf_trainer"),
        per_device_train_batch_size=spec["batch"],
        max_steps=10**9,
        logging_steps=spec["updates_a_lap"],
        bf16=spec["precision"] == "bf16",
        optim="adamw_torch_fused",
        learning_rate=training["learning_rate"],
        weight_decay=training["weight_decay"],
        max_grad_norm=training["max_grad_norm"],
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    turns.about |= {"parameters": model.num_parameters(), "threads": torch.get_num_threads()}
    Trainer(model, arguments, train_dataset=Rows(Batches(spec)), callbacks=[Laps(turns)]).train()


if __name__ == "__main__":
    main()
