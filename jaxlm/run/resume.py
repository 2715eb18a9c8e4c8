"""Going on from a checkpoint: which one, and whether it is of the same run."""

import json
from pathlib import Path

from jaxlm.checkpoints import folder
from jaxlm.checkpoints.items import read_config, read_progress
from jaxlm.config import Config
from jaxlm.config.fields import changed_fields
from jaxlm.errors import UserError
from jaxlm.parallel.mesh import row_shards, show_row_shards
from jaxlm.parallel.processes import barrier, is_leader, say
from jaxlm.train.assemble import Resolved


def find_resume(config: Config, run_folder: Path) -> Path | None:
    """The checkpoint to go on from: the one that resume_from_checkpoint names, else the newest of the run's folder.

    Puts the folder in order first, if a crash left it in disorder.

    Raises:
      UserError: the named one is not there or damaged, or all are damaged.
    """
    if is_leader():
        folder.clean(run_folder)
    barrier("put the folder in order")
    named = config.training.resume_from_checkpoint
    if named is not None:
        return folder.find_checkpoint(named, run_folder, say)
    return folder.newest_intact(run_folder, say)


def keep_global_batch(resolved: Resolved, checkpoint: Path) -> Resolved:
    """`resolved` with as many micro-batches as it takes to keep the checkpoint's rows an update on these devices.

    Raises:
      UserError: no number of them does.
    """
    training = resolved.config.training
    micro_batch = training.batch_size * row_shards(resolved.mesh)
    kept = read_progress(checkpoint).global_batch
    if kept % micro_batch:
        raise UserError(
            f"training.batch_size ({training.batch_size}) x {show_row_shards(resolved.mesh)} must divide the {kept} "
            f"rows an update of {checkpoint}; change it, or the number of devices"
        )
    steps = kept // micro_batch
    if steps == training.gradient_accumulation_steps:
        return resolved
    say(
        f"training.gradient_accumulation_steps: {steps} instead of {training.gradient_accumulation_steps}, for the "
        f"{kept} rows an update of {checkpoint}"
    )
    return resolved.with_fields({"training.gradient_accumulation_steps": steps})


def check_same_run(checkpoint: Path, config: Config, asked_vocab_size: int, fingerprint: str, model_class: str) -> None:
    """Refuses to go on with another configuration or other text than the checkpoint's.

    Args:
      config: with the tokenizer's own vocabulary size.
      asked_vocab_size: model.vocab_size as the user set it.
      fingerprint: of the text.
      model_class: name of the model's class.

    Raises:
      UserError: shows each difference.
    """
    progress, saved = read_progress(checkpoint), read_config(checkpoint)
    changes = changed_fields(saved, config)
    if asked_vocab_size not in (progress.requested_vocab_size, saved.model.vocab_size):
        changes["model.vocab_size"] = (progress.requested_vocab_size, asked_vocab_size)
    if progress.model_class != model_class:
        changes["the model's class"] = (progress.model_class, model_class)
    if changes:
        differences = "; ".join(
            f"{name} was {json.dumps(old)}, is {json.dumps(new)}" for name, (old, new) in changes.items()
        )
        raise UserError(
            f"{checkpoint} was trained with another configuration: {differences}. Set it back, name another "
            "--training.checkpoint_dir, or start over with --fresh (the old folder is kept)"
        )
    if progress.data_fingerprint != fingerprint:
        raise UserError(
            f"data: the text is not the one that {checkpoint} was trained on; "
            "restore it, or start over with --fresh (the old folder is kept)"
        )


def is_finished(config: Config, run_folder: Path, checkpoint: Path | None, total_steps: int) -> bool:
    """Whether the run has nothing left to do."""
    final = run_folder / "final_model"
    if checkpoint is None or config.training.resume_from_checkpoint not in (None, "latest"):
        return False
    at_end = lambda saved: read_progress(saved).step >= total_steps  # noqa: E731
    return at_end(checkpoint) and folder.damage_anywhere(final) is None and at_end(final)
