"""What a run's folder tells: its rows, starts, samples and configuration; also of a run that goes on, or is older."""

import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxlm.config import Config, to_dict
from jaxlm.errors import UserError
from jaxlm.monitor.anomalies import LossSpikes
from jaxlm.report.elements import duration, number

Points = list[tuple[int, float]]  # (step, value); NaN where the value was not finite
OWN_PLACE = ("training.checkpoint_dir", "training.resume_from_checkpoint")  # no difference between two runs


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: int
    kind: str  # "resumed", "skipped", "spike", "not finite"
    text: str


@dataclass(frozen=True)
class Run:
    """A run, as its folder has it."""

    folder: Path
    name: str
    series: dict[str, Points]
    last_step: int
    starts: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)  # {"section.field": value}
    unreadable: int = 0  # lines

    def points(self, name: str) -> Points:
        return self.series.get(name, [])

    def values(self, name: str) -> list[float]:
        """Those that are finite."""
        return [value for _, value in self.points(name) if math.isfinite(value)]

    @property
    def facts(self) -> dict[str, Any]:
        """Those of the last start; empty in an older run's folder."""
        return self.starts[-1] if self.starts else {}

    @property
    def finished(self) -> bool:
        return (self.folder / "final_model").is_dir()

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best evaluation."""
        found = [(value, step) for step, value in self.points("eval/loss") if math.isfinite(value)]
        return (min(found)[1], min(found)[0]) if found else None

    @cached_property
    def marks(self) -> list[Mark]:
        """What happened on the way, in order."""
        return _marks(self)

    def at(self, name: str, step: int) -> float | None:
        return dict(self.points(name)).get(step)


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_run(folder: Path, name: str | None = None) -> Run:
    """The run in `folder`.

    Raises:
      UserError: it holds no run, or no rows yet.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run's folder (training.checkpoint_dir)")
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: not a run's folder, it has no metrics.jsonl; name a run's training.checkpoint_dir")
    lines, unreadable = _read_lines(folder / "metrics.jsonl")
    written = [line for line in lines if isinstance(line.get("step"), int)]
    if not written:
        raise UserError(f"{folder}: has no rows yet; wait for the first one (step 1)")
    rows = {row["step"]: row for row in written}  # the later row of a step wins
    starts = _read_lines(folder / "starts.jsonl")[0]
    if not starts:  # an older run's folder: where its rows go back, it was resumed
        steps = [row["step"] for row in written]
        starts = [{"step": now - 1} for before, now in pairwise(steps) if now <= before]
    samples = {
        (line["step"], str(line.get("name"))): line
        for line in _read_lines(folder / "samples.jsonl")[0]
        if isinstance(line.get("step"), int) and isinstance(line.get("text"), str)
    }
    return Run(
        folder=folder,
        name=name or folder.resolve().name,
        series=_series(rows),
        last_step=max(rows),
        starts=starts,
        samples=[samples[key] for key in sorted(samples)],
        config=_read_config(folder / "config.json"),
        unreadable=unreadable,
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in `folders`, under names that tell them apart."""
    names = [folder.resolve().name for folder in folders]
    shown = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    return [read_run(folder, name) for folder, name in zip(folders, shown, strict=True)]


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects in a file of JSON lines, and how many lines are none; the last one may still be being written."""
    if not path.is_file():
        return [], 0
    found, bad = [], 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            bad += 1
    return found, bad


def _series(rows: dict[int, dict[str, Any]]) -> dict[str, Points]:
    series: dict[str, Points] = {}
    for step in sorted(rows):
        for name, value in rows[step].items():
            if name == "step" or not (value is None or isinstance(value, int | float)):
                continue
            series.setdefault(name, []).append((step, math.nan if value is None else float(value)))
    return series


def _read_config(path: Path) -> dict[str, Any]:
    """As it is: an older version's may have other fields."""
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
        return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    except (OSError, ValueError, AttributeError):
        return {}


# ---- What follows from it --------------------------------------------------------------------------------------------


def _marks(run: Run) -> list[Mark]:
    found = [Mark(start["step"], "resumed", _resumed(start)) for start in run.starts if start["step"]]
    spikes = LossSpikes()
    for step, loss in run.points("train/loss"):
        spike = spikes.look(loss)
        if spike is not None:
            found.append(Mark(step, "spike", spike))
        elif not math.isfinite(loss):
            found.append(Mark(step, "not finite", "the loss was not finite"))
    before = 0.0
    for step, skipped in run.points("train/skipped_steps"):
        if skipped > before:
            count = int(skipped - before)
            found.append(Mark(step, "skipped", f"{count} update{'s' * (count > 1)} skipped, not finite"))
        before = skipped if math.isfinite(skipped) else before
    return sorted(found, key=lambda mark: mark.step)


def _resumed(start: dict[str, Any]) -> str:
    when = f", {shown_time(start['time'])}" if "time" in start else ""
    return f"resumed from step {start['step']:,}{when}"


def shown_time(text: str) -> str:
    """2026-11-24T22:10:00Z as people write it."""
    return re.sub(r"T(\d\d:\d\d):\d\dZ$", r" \1 UTC", text)


def tokens_an_update(run: Run) -> float | None:
    """On average, padding not counted."""
    train, rows = run.facts.get("train"), run.facts.get("rows_an_update")
    return rows * train["row_length"] * train["fill"] if train and rows else None


def seconds_of_updates(run: Run) -> float | None:
    """Time spent on updates, without evaluations and saves: tokens between rows by tokens/s."""
    tokens = tokens_an_update(run)
    if tokens is None:
        return None
    seconds, before = 0.0, 0
    for step, rate in run.points("train/tokens_per_second"):
        if rate > 0:
            seconds += (step - before) * tokens / rate
            before = step
    return seconds or None


def figures(run: Run) -> Iterator[tuple[str, str]]:
    """What a run came to: (name, value)."""
    total = run.facts.get("total_steps")
    yield "Steps", f"{run.last_step:,}" + (f" of {total:,}" if total else "")
    best, evaluated = run.best, run.points("eval/loss")
    if best is not None:
        step, loss = best
        yield "Validation loss, best", f"{number(loss)} at step {step:,}"
        yield "Bits a byte, there", number(run.at("eval/bits_per_byte", step))
        yield "Perplexity, there", number(run.at("eval/perplexity", step))
        yield "Validation loss, last", number(evaluated[-1][1])
    if run.points("train/loss"):
        yield "Training loss, last", number(run.points("train/loss")[-1][1])
    rates, mfu = run.values("train/tokens_per_second"), run.values("train/mfu")
    if rates:
        yield "Tokens/s, median", number(statistics.median(rates))
    if mfu:
        yield "MFU, median", f"{statistics.median(mfu):.1%}"
    tokens, seconds = tokens_an_update(run), seconds_of_updates(run)
    if tokens is not None:
        yield "Tokens trained on", number(run.last_step * tokens)
    if run.values("train/epoch"):
        yield "Epochs", number(run.values("train/epoch")[-1], 3)
    if seconds is not None:
        yield "Time in updates", duration(seconds)
    for name, label in (("train/memory_gib", "a device"), ("train/host_memory_gib", "the process")):
        if run.values(name):
            yield f"Memory of {label}, peak", f"{max(run.values(name)):.2f} GiB"
    if run.values("train/skipped_steps"):
        yield "Skipped updates", number(run.values("train/skipped_steps")[-1])
    if "parameters" in run.facts:
        yield "Parameters", f"{run.facts['parameters']:,}"
    if "devices" in run.facts:
        yield "Devices", run.facts["devices"]


def changed_from_defaults(run: Run) -> list[str]:
    """Names of the fields that are not as in `Config()`."""
    defaults = default_fields()
    return [name for name, value in run.config.items() if name not in defaults or value != defaults[name]]


def default_fields() -> dict[str, Any]:
    return {f"{section}.{name}": v for section, values in to_dict(Config()).items() for name, v in values.items()}


def differing(runs: Sequence[Run]) -> list[str]:
    """Names of the fields in which `runs` differ, but for where they are."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    told = [run for run in runs if run.config]
    return [
        name for name in names if name not in OWN_PLACE and len({json.dumps(run.config.get(name)) for run in told}) > 1
    ]


def shown_value(value: Any) -> str:
    """A field's value as the command line takes it."""
    if isinstance(value, list):
        return ",".join(map(str, value)) or "[]"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value) or '""'
