"""From one text to another: python examples/fine_tune.py

Trains a small model on English (the manual that `help()` shows), exports it as a folder that transformers opens, and
starts from that folder with another text, Python programs. A minute on 2 CPU cores; delete runs/fine_tune to see it
again.
"""

import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

from jaxlm import Config, ModelConfig, Trainer, load, load_config, replace_fields
from jaxlm.interop.export import export

FOLDER = Path("runs/fine_tune")
EXPORTED = FOLDER / "exported"


def write(name: str, texts: Iterable[str]) -> str:
    """Writes a document a line; the file's path."""
    path = FOLDER / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def config(name: str, text: str) -> Config:
    """A short run on `text`."""
    changes = {
        "data.train_files": text,
        "data.max_length": 128,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": 60,
        "training.sample_tokens": 40,
        "training.checkpoint_dir": str(FOLDER / name),
    }
    return replace_fields(load_config("small"), changes)


if __name__ == "__main__":
    manual = write("manual", (topics[name] for name in sorted(topics)))
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    programs = write("programs", (path.read_text(encoding="utf-8") for path in modules))

    shape = {"vocab_size": 2048, "d_model": 128, "n_layers": 2, "d_ff": 512, "max_seq_len": 128}
    Trainer(replace_fields(config("first", manual), {f"model.{name}": value for name, value in shape.items()})).train()

    if not EXPORTED.is_dir():
        best = FOLDER / "first" / "best_model"
        kind = export(load(best), best, EXPORTED, max_shard_size=10**9, dtype="float32")
        print(f"{EXPORTED}: a {kind}")

    # The architecture and the tokenizer come from the folder, so the model's options stay at their defaults.
    second = replace_fields(config("second", programs), {"training.init_from": str(EXPORTED)})
    trainer = Trainer(Config(model=ModelConfig(), training=second.training, data=second.data))
    before = trainer.evaluate()["bits_per_byte"]
    trainer.train()
    print(f"programs: {before:.3f} bits per byte before, {trainer.evaluate()['bits_per_byte']:.3f} after")
