"""Going on from a checkpoint: which one, and whether it is of the same run."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, TypeAlias

from jaxlm.checkpoints import folder
from jaxlm.checkpoints.items import read_config, read_progress
from jaxlm.config import Config
from jaxlm.config.fields import changed_fields, plain
from jaxlm.config.schema import MIDWAY
from jaxlm.errors import UserError
from jaxlm.parallel.mesh import row_shards, show_row_shards
from jaxlm.parallel.processes import barrier, is_leader, say
from jaxlm.report.runs import read_lines
from jaxlm.run.ending import stops_early
from jaxlm.run.sweep import FILE as SWEEP
from jaxlm.train.assemble import Resolved
from jaxlm.train.schedules import Schedule, build_schedule

Changes: TypeAlias = dict[str, list[Any]]  # {"section.field": [before, now]}, as starts.jsonl has it
ROWS = "rows_an_update"


def find_resume(config: Config, run_folder: Path) -> Path | None:
    """The checkpoint to go on from: the one that resume_from_checkpoint names, else the newest of the run's folder.

    Puts the folder in order first, if a crash left it in disorder.

    Raises:
      UserError: the named one is not there or damaged, or all are damaged; or the folder is a sweep's.
    """
    if os.path.isfile(run_folder / SWEEP):
        where = f"training.checkpoint_dir ({run_folder})"
        raise UserError(f"{where} holds a sweep, whose runs have folders of their own; name another, or one of those")
    if is_leader():
        folder.clean(run_folder)
    barrier("put the folder in order")
    named = config.training.resume_from_checkpoint
    if named not in (None, "latest"):
        return folder.find_checkpoint(named)
    newest = folder.newest_intact(run_folder, say)
    if named is not None and newest is None:
        say(f"training.resume_from_checkpoint ({named}): no checkpoint in {run_folder} yet, the run starts")
    return newest


def go_on(
    resolved: Resolved,
    checkpoint: Path | None,
    asked_vocab_size: int,
    fingerprint: str,
    model_class: str,
    loss: str | None,
) -> tuple[Resolved, Changes]:
    """`resolved` at the checkpoint's place in the stream of rows, and what the user has decided to change there.

    Without a checkpoint it starts, at the first row.

    A batch that the user doesn't change (training.allow_change) keeps the checkpoint's rows an update, with as many
    micro-batches as that takes on these devices. A decision holds until it is in a checkpoint: a crash before that
    doesn't ask for it again.

    Args:
      resolved: with the tokenizer's own vocabulary size.
      asked_vocab_size: model.vocab_size as the user set it.
      fingerprint: of the text.
      model_class: name of the model's class.
      loss: name of an own one.

    Raises:
      UserError: another configuration or other text than the checkpoint's, with each difference; or no number of
        micro-batches gives as many rows.
    """
    if checkpoint is None:
        return resolved, {}
    config, progress, saved = resolved.config, read_progress(checkpoint), read_config(checkpoint)
    allowed, decided = config.training.allow_change, _decided(config, progress.step)
    changes = {name: [plain(old), plain(new)] for name, (old, new) in changed_fields(saved, config).items()}
    refused = {name: change for name, change in changes.items() if name not in allowed and decided.get(name) != change}
    if asked_vocab_size not in (progress.requested_vocab_size, saved.model.vocab_size):
        refused["model.vocab_size"] = [progress.requested_vocab_size, asked_vocab_size]
    if progress.model_class != model_class:
        refused["the model's class"] = [progress.model_class, model_class]
    if progress.loss != loss:
        refused["compute_loss"] = [progress.loss, loss]
    _refuse(checkpoint, refused, other_text=progress.data_fingerprint != fingerprint)
    if not {"training.batch_size", "training.gradient_accumulation_steps"} & set(allowed):
        _, rows = decided.get(ROWS, [None, progress.global_batch])
        resolved = _with_global_batch(resolved, rows, checkpoint)
    if resolved.global_batch != progress.global_batch:
        changes[ROWS] = [progress.global_batch, resolved.global_batch]
    for name, (old, new) in changes.items():
        say(f"changed at step {progress.step}: {name} was {json.dumps(old)}, is {json.dumps(new)}")
    offset = progress.position - resolved.batches.position(progress.step)
    first = config.data.anneal_from
    annealed = progress.anneal_row if first is not None and progress.step >= first - 1 else None
    return dataclasses.replace(resolved, offset=offset, annealed=annealed), changes


def _decided(config: Config, step: int) -> Changes:
    """What the run's last start changed, if it went on from `step`."""
    starts = Path(config.training.checkpoint_dir).expanduser() / "starts.jsonl"
    last = read_lines(starts)[-1:]
    return last[0].get("changed") or {} if last and last[0].get("step") == step else {}


def _refuse(checkpoint: Path, changes: Changes, other_text: bool) -> None:
    """Raises UserError, with each difference and the ways out, if there is any."""
    ways = (
        "start another with jaxlm train, in another --training.checkpoint_dir or with --fresh (the old folder is kept)"
    )
    if not any(name.startswith(("model.", "the model")) for name in changes):
        ways += f"; --training.init_from {checkpoint} starts a new run there with this model's parameters"
    if changes:
        differences = "; ".join(
            f"{name} was {json.dumps(old)}, is {json.dumps(new)}" for name, (old, new) in changes.items()
        )
        fixed = [name for name in changes if name not in MIDWAY]
        allow = "" if fixed else f"allow it with --allow_change {','.join(changes)}, "
        why = f" ({', '.join(fixed)} can't change in the middle of a run)" if fixed else ""
        raise UserError(
            f"{checkpoint} was trained with another configuration: {differences}. Set it back{why}, {allow}or {ways}"
        )
    if other_text:
        raise UserError(f"data: the text is not the one that {checkpoint} was trained on; restore it, or {ways}")


def _with_global_batch(resolved: Resolved, rows: int, checkpoint: Path) -> Resolved:
    """`resolved` with as many micro-batches as it takes for `rows` an update; UserError if no number of them does."""
    training, devices = resolved.config.training, show_row_shards(resolved.mesh)
    micro_batch = training.batch_size * row_shards(resolved.mesh)
    if rows % micro_batch:
        raise UserError(
            f"training.batch_size ({training.batch_size}) on {devices} makes micro-batches of {micro_batch} rows, and "
            f"the {rows} rows of an update of {checkpoint} are no multiple of that; change training.batch_size or the "
            "number of devices, or allow another update with --allow_change training.batch_size"
        )
    steps = rows // micro_batch
    if steps != training.gradient_accumulation_steps:
        was = training.gradient_accumulation_steps
        say(f"training.gradient_accumulation_steps: {steps} instead of {was}, for {rows} rows in an update as before")
    return resolved.with_fields({"training.gradient_accumulation_steps": steps})


def say_going_on(checkpoint: Path, schedule: Schedule, total_steps: int) -> None:
    """Says where the run goes on, and how the learning rate does, if its schedule is another than before."""
    progress, training = read_progress(checkpoint), read_config(checkpoint).training
    step, before = progress.step, build_schedule(training, progress.total_steps)
    say(f"resuming from {checkpoint} at step {step}")
    if step < total_steps and schedule(step) != before(step):
        length = f" for {total_steps:,} updates instead of {progress.total_steps:,}" * (
            total_steps != progress.total_steps
        )
        say(
            f"the schedule is laid out anew{length}: update {step + 1:,} has the learning rate {schedule(step):.3g}, "
            f"the last one {schedule(total_steps - 1):.3g}; as it was, update {step + 1:,} had {before(step):.3g}"
        )


def is_finished(config: Config, run_folder: Path, checkpoint: Path | None, total_steps: int) -> bool:
    """Whether the run has nothing left to do. Raises UserError if `checkpoint` lies beyond where it ends or stops."""
    final, training, ends = run_folder / "final_model", config.training, total_steps
    step = 0 if checkpoint is None else read_progress(checkpoint).step
    if checkpoint is not None and stops_early(config.training, read_progress(checkpoint).evaluations_since_best):
        ends = min(step, ends)
    newest = training.resume_from_checkpoint in (None, "latest")
    if newest and ends <= step and folder.damage_anywhere(final) is None and read_progress(final).step >= ends:
        return True
    if step > total_steps:
        end = f"{checkpoint} is of step {step:,}, and this run would end at {total_steps:,}"
        raise UserError(f"{end}; raise training.num_epochs or training.max_steps")
    if training.stop_at_step is not None and training.stop_at_step < step:
        where = f"training.stop_at_step ({training.stop_at_step}) is behind {checkpoint}"
        raise UserError(f"{where}, from which the run goes on; raise it, or leave it out")
    return False
