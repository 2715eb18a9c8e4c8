"""Which batch size, ZeRO stage and recomputation make an update of the same rows fastest on given GPUs."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.config import Config, replace_fields, shown, to_dict
from jaxlm.data.atomic import atomic_write
from jaxlm.errors import UserError
from jaxlm.parallel.gpus import GPUS
from jaxlm.parallel.processes import say
from jaxlm.plan import memory
from jaxlm.plan.plan import Plan, plan_of
from jaxlm.plan.predict import Cluster
from jaxlm.plan.program import compile_update, resolve_for
from jaxlm.train.assemble import Resolved

HOPELESS = 1.5  # an approximation by this much over the memory is not compiled
REMAT: tuple[dict[str, Any], ...] = (
    {"model.gradient_checkpointing": False},
    {"model.gradient_checkpointing": True, "model.remat_policy": "dots"},
    {"model.gradient_checkpointing": True, "model.remat_policy": "full"},
)


@dataclasses.dataclass(frozen=True)
class Trial:
    fields: dict[str, Any]  # of the configuration, by their dotted names
    changed: dict[str, Any]  # those that differ from the one that was asked for
    plan: Plan

    @property
    def options(self) -> str:
        """What it changes, as on the command line."""
        return " ".join(f"--{name} {shown(value)}" for name, value in self.changed.items()) or "as configured"

    def to_json(self) -> dict[str, Any]:
        return {"fields": self.fields, **self.plan.to_json()}


def search(config: Config, cluster: Cluster, trials: int) -> list[Trial]:
    """Plans of up to `trials` settings, the fastest that fits first; all have the rows an update of `config`.

    Starts from `config` and changes one thing at a time, keeping what is faster: the rows of a micro-batch, what is
    recomputed, whether layers are scanned, the ZeRO stage, tensor parallelism where nothing else fits.

    Raises:
      UserError: as `plan.plan`, or nothing that was tried fits.
    """
    start = resolve_for(config, cluster.gpu, cluster.devices, cluster.hosts)
    known: dict[str, Trial | None] = {}
    best = _try(start, _fields_of(start), cluster, known)
    improved = True
    while improved and len(known) < trials:
        improved = False
        fits = best is not None and best.plan.fits
        for fields in _neighbours(start, best.fields if best else _fields_of(start), cluster, fits):
            if len(known) >= trials:
                break
            if (key := json.dumps(fields, sort_keys=True)) in known:
                continue
            trial = _try(start, fields, cluster, known, key)
            if trial and trial.plan.fits and _better(trial, best):
                best, improved = trial, True
                break
    found = sorted((trial for trial in known.values() if trial), key=lambda trial: -trial.plan.tokens_per_second)
    fitting = [trial for trial in found if trial.plan.fits]
    if not fitting:
        raise UserError(
            f"nothing that was tried fits {cluster.devices} x {cluster.gpu}: more GPUs, or a smaller model, are needed"
        )
    return fitting


def _better(trial: Trial, best: Trial | None) -> bool:
    return best is None or not best.plan.fits or trial.plan.tokens_per_second > best.plan.tokens_per_second


def _fields_of(resolved: Resolved) -> dict[str, Any]:
    model, training = resolved.config.model, resolved.config.training
    return {
        "training.batch_size": training.batch_size,
        "training.gradient_accumulation_steps": training.gradient_accumulation_steps,
        "model.gradient_checkpointing": model.gradient_checkpointing,
        "model.remat_policy": model.remat_policy,
        "model.scan_layers": model.scan_layers,
        "training.zero_stage": training.zero_stage or 0,
        "training.tensor_parallel": training.tensor_parallel,
    }


def _neighbours(start: Resolved, fields: dict[str, Any], cluster: Cluster, fits: bool) -> Iterator[dict[str, Any]]:
    """Settings that differ from `fields` in one thing; those that are more likely to be faster first."""
    rows, micro = start.global_batch, fields["training.batch_size"]

    def with_rows(batch_size: int, more: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        changed = fields | (more or {})
        if not changed["model.gradient_checkpointing"]:
            changed["model.remat_policy"] = start.config.model.remat_policy  # which nothing reads then
        an_update = batch_size * cluster.devices // changed["training.tensor_parallel"]
        if batch_size >= 1 and rows % an_update == 0:
            counts = {"training.batch_size": batch_size, "training.gradient_accumulation_steps": rows // an_update}
            yield changed | counts

    if fits:
        yield from with_rows(2 * micro)
    else:
        yield from with_rows(micro // 2)
        yield from with_rows(micro // 4)
    yield fields | {"model.scan_layers": not fields["model.scan_layers"]}
    for remat in REMAT:
        for times in (1, 4) if remat["model.gradient_checkpointing"] else (1, 1 / 2, 1 / 4):
            yield from with_rows(int(micro * times), remat)
    if cluster.devices > 1:
        for stage in (1, 2, 3, 0):
            yield fields | {"training.zero_stage": stage}
    for tensor in (2, 4, 8):
        if cluster.devices % tensor == 0 and start.config.model.n_heads % tensor == 0:
            yield from with_rows(micro * tensor, {"training.tensor_parallel": tensor})


def _try(
    start: Resolved, fields: dict[str, Any], cluster: Cluster, known: dict[str, Trial | None], key: str | None = None
) -> Trial | None:
    """The plan of `start` with `fields`, also noted in `known`; None if it can't be, or is hopelessly too large."""
    key = key or json.dumps(fields, sort_keys=True)
    known[key] = None
    try:
        resolved = resolve_for(start.with_fields(fields).config, cluster.gpu, cluster.devices, cluster.hosts)
    except UserError:  # `start` is valid, but a DeepSpeed file or another option rules this out
        return None
    share = memory.usable(_memory_of(cluster), resolved.config.training.memory_fraction)
    if memory.approximation(resolved.at_largest_batch()).total > HOPELESS * share:
        return None
    made, _ = plan_of(resolved, compile_update(resolved, cluster.gpu, cluster.hosts), cluster)
    asked = _fields_of(start)
    trial = Trial(fields, {name: value for name, value in fields.items() if value != asked[name]}, made)
    known[key] = trial
    fits = "" if made.fits else ", does not fit"
    say(f"{made.tokens_per_second:,.0f} tokens/s, {made.memory_bytes / 2**30:.1f} GiB{fits}: {trial.options}")
    return trial


def _memory_of(cluster: Cluster) -> int:
    return GPUS[cluster.gpu].memory_mib * 2**20


def write_config(config: Config, best: Trial, path: Path) -> None:
    """Writes `config` with the best trial's fields as JSON.

    Raises:
      UserError: it can't be written.
    """
    try:
        atomic_write(path, json.dumps(to_dict(replace_fields(config, best.fields)), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--write ({path}) can't be written: {error.strerror}") from error
