"""Says whether this machine can train: versions, driver, devices, kernels, and one small update of a small model."""

import argparse
import platform
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from jaxlm.commands.parser import Parser
from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig

DRIVER = Path("/proc/driver/nvidia/version")


def add_options(parser: Parser) -> None:
    """It has none: jaxlm train --dry_run does the same for a configuration and its text."""


def run(_: argparse.Namespace) -> None:
    from jaxlm.commands.dry_run import DryRun
    from jaxlm.monitor.start_report import PACKAGES
    from jaxlm.parallel.devices import start_backend
    from jaxlm.run.setup import resolve

    installed = {found.metadata["Name"]: found.version for found in distributions()}
    plugins = sorted(name for name in installed if name.startswith("jax-cuda"))
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print("packages: " + ", ".join(f"{name} {installed[name]}" for name in (*PACKAGES, *plugins)))
    print(f"driver: {DRIVER.read_text().splitlines()[0] if DRIVER.is_file() else 'no NVIDIA driver'}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(", ".join(f"{i * i} is the square of {i}" for i in range(5000)))
        model = ModelConfig(vocab_size=512, d_model=128, n_heads=2, n_layers=2, d_ff=256, max_seq_len=128)
        data = DataConfig(train_files=(str(text),), max_length=128, cache_dir=f"{folder}/cache")
        training = TrainingConfig(batch_size=2, checkpoint_dir=f"{folder}/run", report_to=(), sample_tokens=0)
        resolved = resolve(Config(model, training, data), lambda config: start_backend(config.training))
        DryRun(resolved).train()
    first = resolved.devices[0]
    print(f"this machine trains, on {len(resolved.devices)} x {first.device_kind} ({first.platform})")
