"""Says whether this machine can train: versions, driver, devices, kernels, and one small update of a small model."""

import argparse
import json
import platform
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from jaxlm.commands.parser import Parser
from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig

DRIVER = Path("/proc/driver/nvidia/version")
SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "datasets", "tokenizers", "numpy")


def add_options(parser: Parser) -> None:
    """It has none: jaxlm train --dry_run does the same for a configuration and its text."""


def run(_: argparse.Namespace) -> None:
    installed = {found.metadata["Name"]: found.version for found in distributions()}
    plugins = sorted(name for name in installed if name.startswith("jax-cuda"))
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print("packages: " + ", ".join(f"{name} {installed[name]}" for name in (*SHOWN, *plugins)))
    print(f"driver: {DRIVER.read_text().splitlines()[0] if DRIVER.is_file() else 'no NVIDIA driver'}", flush=True)

    from jaxlm.parallel.devices import start_backend
    from jaxlm.run.setup import resolve

    with tempfile.TemporaryDirectory() as folder:
        resolved = resolve(_small_run(Path(folder)), lambda config: start_backend(config.training))

        from jaxlm.commands.dry_run import DryRun

        DryRun(resolved).train()
    first = resolved.devices[0]
    print(f"this machine trains, on {len(resolved.devices)} x {first.device_kind} ({first.platform})")


def _small_run(folder: Path) -> Config:
    """A run of a small model in `folder`, with the precision and the kernels of a large one."""
    text = folder / "text.jsonl"
    words = [f"{i * i} is the square of {i}" for i in range(1000)]
    text.write_text("".join(json.dumps({"text": ", ".join(words[i : i + 5])}) + "\n" for i in range(1000)))
    return Config(
        model=ModelConfig(vocab_size=512, d_model=128, n_heads=2, n_layers=2, d_ff=256, max_seq_len=128),
        training=TrainingConfig(
            batch_size=2,
            gradient_accumulation_steps=1,
            checkpoint_dir=str(folder / "run"),
            report_to=(),
            sample_tokens=0,
        ),
        data=DataConfig(train_files=(str(text),), max_length=128, cache_dir=str(folder / "cache")),
    )
