"""The jaxlm side of cpu.py and gpu/speed.py: `Trainer.train()` as it is, with data, metrics, sinks and progress bar.

A subclass of Trainer, in the way that the README shows, hears of every logged step, where it waits for its turns.
"""

import contextlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from lib.machine import say
from lib.worker import Turns

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig, replace_fields
from jaxlm.config.validate import LARGEST_INT

BATCHES = 16  # of real text that the peers go round


def configuration(spec: dict[str, Any]) -> Config:
    """A run without end of the model in `spec`: one micro-batch an update, and the peers' optimizer.

    What `spec["overrides"]`, {"section.field": value}, says comes last.
    """
    text = {"train_files": spec["text"]} if spec["text"] else {"dataset_name": "python-stdlib", "dataset_config": None}
    dropout, seq_len = spec["dropout"], spec["seq_len"]
    config = Config(
        model=ModelConfig(**spec["shape"], max_seq_len=seq_len, dropout=dropout, attention_dropout=dropout),
        training=TrainingConfig(
            batch_size=spec["batch"],
            gradient_accumulation_steps=1,
            lr_scheduler="constant",
            warmup_steps=0,
            use_amp=spec["precision"] == "bf16",
            max_steps=LARGEST_INT - 1,
            logging_steps=spec["updates_a_lap"],
            eval_steps=LARGEST_INT,
            save_steps=LARGEST_INT,
            watchdog_seconds=0,  # it would take the others' turns for a hang
            checkpoint_dir=str(Path(spec["folder"]) / f"run_{spec['contender']}"),
            **spec["training"],
        ),
        data=DataConfig(max_length=seq_len, packing_strategy="first_fit", cache_dir=spec["cache_dir"], **text),
    )
    return replace_fields(config, spec["overrides"])


def dump_batches(spec: dict[str, Any], path: Path) -> dict[str, Any]:
    """Writes the run's first BATCHES batches to `path` (.npz, [N, B, T] each), and says what they are."""
    from jaxlm.config.batches import Batches
    from jaxlm.data.loader import Rows, train_batches
    from jaxlm.data.packing import plan_cached
    from jaxlm.data.tokens import prepare

    config = configuration(spec)
    data = config.data
    prepared = prepare(data, config.model.vocab_size, None, say)
    rows = Rows(prepared.train, plan_cached(prepared.train, data, say))
    with contextlib.closing(train_batches(rows, config.training.seed, Batches(spec["batch"]), 0)) as stream:
        batches = [{name: array[0] for name, array in batch.items()} for batch in itertools.islice(stream, BATCHES)]
    arrays = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
    np.savez(path, **arrays)
    return {
        "text": prepared.source_name if not spec["text"] else "own files",
        "vocab_size": prepared.tokenizer.vocab_size,
        "bos_id": prepared.tokenizer.bos_id,
        "rows_filled": float((arrays["segments"] > 0).mean()),
    }


def train(spec: dict[str, Any], turns: Turns) -> None:
    from jaxlm import Trainer

    class Timed(Trainer):
        def _log_metrics(self, loss: float) -> None:
            super()._log_metrics(loss)
            turns.updated()
            if self.current_step % spec["updates_a_lap"] == 0:  # step 1 is logged, too
                turns.lap(loss)

    trainer = Timed(configuration(spec))
    device = trainer.resolved.devices[0]
    if device.platform == "gpu":
        turns.peak = lambda: device.memory_stats()["peak_bytes_in_use"]
    turns.about |= {"parameters": trainer.assembly.parameters, "attention": trainer.assembly.attention}
    turns.about |= {"device": device.device_kind}
    trainer.train()


if __name__ == "__main__":
    train(json.loads(sys.argv[1]), Turns())
