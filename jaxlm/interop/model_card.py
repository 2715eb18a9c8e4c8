"""The model card of an exported model: what it was trained on, how, and how well it does."""

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
from flax import nnx

import jaxlm
from jaxlm.checkpoints.items import Progress
from jaxlm.checkpoints.load import LoadedModel
from jaxlm.config import Config, DataConfig, replace_fields, to_dict
from jaxlm.errors import UserError
from jaxlm.report.runs import read_run

# These have no part in the training, and may say more of a machine than a model card should.
PRIVATE = ("checkpoint_dir", "cache_dir", "resume_from_checkpoint", "stop_at_step", "wandb_project")


def model_card(loaded: LoadedModel, source: Path, folder: str, architecture: str) -> str:
    """The text of README.md, for a `folder` of that name and the class `architecture` of transformers.

    `source` is the model's own folder; the run's metrics are looked for beside it.
    """
    progress, config, source = loaded.progress, loaded.config, source.resolve()
    tokens = config.data.max_length * progress.global_batch
    table = {
        "parameters": f"{sum(x.size for x in jax.tree.leaves(nnx.state(loaded.model))):,}",
        "training text": _training_text(config.data),
        "SHA-256 of the text": progress.data_fingerprint,
        "started from": config.training.init_from or "random parameters",
        "updates": f"{progress.step:,} of {progress.total_steps:,}",
        "tokens": f"{progress.step * tokens:,}, in updates of {tokens:,} (padding included)",
        **_scores(source.parent, progress),
    }
    template = files("jaxlm.interop").joinpath("model_card.md").read_text(encoding="utf-8")
    return template.format(
        name=f"{source.parent.name}/{source.name}",
        folder=folder,
        version=jaxlm.__version__,
        architecture=architecture,
        prompt=json.dumps(config.training.sample_prompt or "The")[1:-1],
        bos=loaded.tokenizer.token(loaded.tokenizer.bos_id),
        rows="\n".join(f"| {name} | {value} |" for name, value in table.items()),
        config=json.dumps(_changed_options(config, progress), indent=2),
    )


def _training_text(data: DataConfig) -> str:
    if data.train_files:
        return ", ".join(data.train_files)
    return " ".join(part for part in (data.dataset_name, data.dataset_config, data.dataset_split) if part)


def _scores(run: Path, progress: Progress) -> dict[str, str]:
    """The evaluation of the model's step, from the metrics in the run's folder."""
    try:
        metrics = read_run(run)
        values = [metrics.at(f"eval/{name}", progress.step) for name in ("loss", "perplexity", "bits_per_byte")]
    except (OSError, UserError):
        values = []
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) == 3:
        loss, perplexity, bits = finite
        return {
            "validation loss": f"{loss:.4f} nats a token (perplexity {perplexity:.2f})",
            "validation bits per byte": f"{bits:.4f}",
        }
    best = progress.best_loss
    known = {} if best is None else {"lowest validation loss of the run so far": f"{best:.4f} nats a token"}
    return {**known, "validation loss": "not found: metrics.jsonl has no evaluation of this step"}


def _changed_options(config: Config, progress: Progress) -> dict[str, Any]:
    """The options that are not at their defaults, as a configuration file holds them."""
    config = replace_fields(config, {"model.vocab_size": progress.requested_vocab_size})
    defaults = to_dict(Config())
    return {
        section: {
            name: value for name, value in values.items() if value != defaults[section][name] and name not in PRIVATE
        }
        for section, values in to_dict(config).items()
    }
