"""Reads runs' folders, also of unfinished and older runs, and works out what the report says about them."""

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.config import Config, shown
from jaxlm.config.batches import batches_of
from jaxlm.config.fields import field_values
from jaxlm.errors import UserError
from jaxlm.monitor.anomalies import LossSpikes

Points = list[tuple[int, float]]  # (step, value), by step; NaN where the value was not finite
FOLDER_OPTIONS = ("training.checkpoint_dir", "training.resume_from_checkpoint")  # differ between any two runs
MOST_SAMPLES = 9


class Event(NamedTuple):
    """Something that happened at a step."""

    step: int
    kind: str  # "started", "resumed", "changed", "skipped", "spike", "not finite"
    text: str


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    name: str
    finished: bool
    series: dict[str, Points]  # by metric
    last_step: int
    starts: list[dict[str, Any]]  # the lines of starts.jsonl
    samples: list[dict[str, Any]]  # the lines of samples.jsonl, by step
    config: dict[str, Any]  # {"section.field": value}
    unreadable_lines: int  # of metrics.jsonl

    @cached_property
    def events(self) -> list[Event]:
        """Starts, loss spikes, losses that were not finite and skipped updates, by step."""
        found = []
        for start in self.starts:
            what = f"resumed from step {start['step']:,}" if start["step"] else "started"
            when = f", {start['time'][:16].replace('T', ' ')} UTC" if "time" in start else ""
            where = f", on {start['devices']}: {start['command']}" if "command" in start else ""
            found.append(Event(start["step"], what.split()[0], what + when + where))
            changed = [f"{name}: {old} became {new}" for name, (old, new) in (start.get("changed") or {}).items()]
            found += [Event(start["step"], "changed", text) for text in changed]
        spikes = LossSpikes()
        for step, loss in self.points("train/loss"):
            spike = spikes.look(loss)
            if spike is not None:
                found.append(Event(step, "spike", spike))
            elif not math.isfinite(loss):
                found.append(Event(step, "not finite", "the loss was not finite"))
        for (_, before), (step, total) in pairwise([(0, 0.0), *self.finite("train/skipped_steps")]):
            if total > before:
                count = int(total - before)
                found.append(Event(step, "skipped", f"{count} update{'s' * (count > 1)} skipped, not finite"))
        return sorted(found, key=lambda event: event.step)

    def points(self, metric: str) -> Points:
        return self.series.get(metric, [])

    def finite(self, metric: str) -> Points:
        return [(step, value) for step, value in self.points(metric) if math.isfinite(value)]

    def at(self, metric: str, step: int) -> float | None:
        """The value of a metric at a step, if there is one."""
        return dict(self.points(metric)).get(step)

    def _rows_taken(self, step: int) -> int:
        """Rows that the updates up to `step` learned from; a start may have changed how many an update takes."""
        rows, last = 0, self.starts[-1]
        for start in reversed(self.starts):
            batches = batches_of({"rows_an_update": last["rows_an_update"]} | start)
            rows += batches.position(max(step, start["step"])) - batches.position(start["step"])
            step = min(step, start["step"])
        return rows

    @cached_property
    def course(self) -> dict[str, Points]:
        """What the updates up to a step took, at the steps with a rate: tokens without padding, hours without
        evaluations and saves, FLOPs of the model; {} if the folder does not say.
        """
        start = self.starts[-1] if self.starts else {}
        if not (start.get("train") and start.get("rows_an_update")):
            return {}
        tokens_a_row = start["train"]["row_length"] * start["train"]["fill"]
        rates = {step: rate for step, rate in self.finite("train/tokens_per_second") if rate > 0}
        tokens = {step: self._rows_taken(step) * tokens_a_row for step in sorted({0, *rates, self.last_step})}
        course, hours = {"tokens": list(tokens.items())}, 0.0
        if rates:
            course["hours"] = [(0, 0.0)]
        for before, step in pairwise(tokens):
            if step in rates:
                hours += (tokens[step] - tokens[before]) / rates[step] / 3600
                course["hours"].append((step, hours))
        if "flops_per_token" in start:
            course["FLOPs"] = [(step, taken * start["flops_per_token"]) for step, taken in tokens.items()]
        return course

    @cached_property
    def key_figures(self) -> dict[str, str]:
        """The run in numbers: {label: value}."""
        start = self.starts[-1] if self.starts else {}
        figures = {}
        figures["Steps"] = f"{self.last_step:,}" + (f" of {start['total_steps']:,}" if "total_steps" in start else "")
        if start.get("own_loss"):
            figures["Own loss"] = start["own_loss"]
        if evaluated := self.finite("eval/loss"):
            step, loss = min(evaluated, key=lambda point: point[1])
            figures["Best validation loss"] = f"{number(loss)} at step {step:,}"
            figures["Best bits per byte"] = number(self.at("eval/bits_per_byte", step))
            figures["Best perplexity"] = number(self.at("eval/perplexity", step))
            figures["Last validation loss"] = number(self.points("eval/loss")[-1][1])
        if losses := self.points("train/loss"):
            figures["Last training loss"] = number(losses[-1][1])
        if rates := self.finite("train/tokens_per_second"):
            figures["Median tokens/s"] = number(statistics.median(rate for _, rate in rates))
        if mfu := self.finite("train/mfu"):
            figures["Median MFU"] = f"{statistics.median(value for _, value in mfu):.1%}"
        if self.course:
            figures["Rows filled"] = f"{start['train']['fill']:.1%}"
            figures["Tokens trained on"] = number(self.course["tokens"][-1][1])
            if "hours" in self.course:  # without evaluations and saves
                figures["Time in updates"] = str(timedelta(seconds=round(3600 * self.course["hours"][-1][1])))
        if epochs := self.finite("train/epoch"):
            figures["Epochs"] = number(epochs[-1][1], 3)
        for metric, owner in (("train/memory_gib", "a device"), ("train/host_memory_gib", "the process")):
            if gib := self.finite(metric):
                figures[f"Peak memory of {owner}"] = f"{max(value for _, value in gib):.2f} GiB"
        if skipped := self.finite("train/skipped_steps"):
            figures["Skipped updates"] = number(skipped[-1][1])
        if "parameters" in start:
            figures |= {"Parameters": f"{start['parameters']:,}", "Devices": start["devices"]}
        return figures

    def options_by_default(self) -> tuple[list[list[Any]], list[list[Any]]]:
        """Rows of an option, its value and its default: those that were changed, and all others."""
        defaults = field_values(Config())
        rows = [
            [name, shown(v), shown(defaults[name]) if name in defaults else None] for name, v in self.config.items()
        ]
        return [row for row in rows if row[1] != row[2]], [row for row in rows if row[1] == row[2]]

    def samples_to_show(self) -> list[dict[str, Any]]:
        """Some of the samples, evenly over the run, the first and the last among them."""
        count = min(len(self.samples), MOST_SAMPLES)
        return [self.samples[round(i * (len(self.samples) - 1) / max(1, count - 1))] for i in range(count)]


def read_run(folder: Path, name: str | None = None) -> Run:
    """Reads the run in `folder`.

    Raises:
      UserError: it holds no run, or no rows yet.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; name a run's folder (training.checkpoint_dir)")
    if not os.path.isfile(folder / "metrics.jsonl"):  # which says no, too, where one may not look
        raise UserError(f"{folder}: not a run's folder, it has no metrics.jsonl; name a run's training.checkpoint_dir")
    lines = _lines(folder / "metrics.jsonl")
    starts = read_lines(folder / "starts.jsonl")
    rows = _rows_of_course(lines, starts)
    if not rows:
        raise UserError(f"{folder}: has no rows yet; wait for the first one (step 1)")
    series: dict[str, Points] = {}
    for step, row in sorted(rows.items()):
        for metric, value in row.items():
            if metric != "step" and (value is None or isinstance(value, int | float)):
                series.setdefault(metric, []).append((step, math.nan if value is None else float(value)))
    if not starts:  # an older run's folder: where its rows go back, it was resumed
        steps = [line["step"] for line in lines if line is not None and isinstance(line.get("step"), int)]
        starts = [{"step": step - 1} for before, step in pairwise(steps) if step <= before]
    last_step, config = max(rows), _read_config(folder / "config.json")
    samples = {
        (line["step"], str(line.get("name"))): line
        for line in read_lines(folder / "samples.jsonl")
        if isinstance(line.get("step"), int) and line["step"] <= last_step and isinstance(line.get("text"), str)
    }
    return Run(
        name=name or folder.resolve().name,
        finished=_is_finished(folder, starts, rows, config.get("training.early_stopping_patience")),
        series=series,
        last_step=last_step,
        starts=starts,
        samples=[samples[key] for key in sorted(samples)],
        config=config,
        unreadable_lines=lines.count(None),
    )


def _rows_of_course(lines: Sequence[dict[str, Any] | None], starts: Sequence[Mapping[str, Any]]) -> dict[int, Any]:
    """{step: row} of the way that the run has gone: where a start went back, what was written beyond it is left out.

    Of two rows of a step the later one wins.
    """
    back, least = dict[int, int](), len(lines)
    for start in reversed([start for start in starts if "metrics_lines" in start]):
        if start["metrics_lines"] <= least:  # else the file is another one since
            least = start["metrics_lines"]
            back.setdefault(least, start["step"])
    rows: dict[int, Any] = {}
    for number, line in enumerate([*lines, None]):  # a start may have written nothing yet
        if number in back:
            rows = {step: row for step, row in rows.items() if step <= back[number]}
        if line is not None and isinstance(line.get("step"), int):
            rows[line["step"]] = line
    return rows


def _is_finished(
    folder: Path, starts: Sequence[Mapping[str, Any]], rows: Mapping[int, Any], patience: int | None
) -> bool:
    """Whether final_model is that of the run's end: there may be one from before it went back, or was made longer."""
    final = _read_object(folder / "final_model" / "progress" / "progress.json")
    step, total = final.get("step", -1), starts[-1].get("total_steps", max(rows)) if starts else max(rows)
    early = patience is not None and final.get("evaluations_since_best", 0) >= patience
    return step in rows and (early or bool(step >= total))


def has_rows(folder: Path) -> bool:
    """Whether `read_run` finds a run in `folder`, with rows."""
    return bool(_rows_of_course(_lines(folder / "metrics.jsonl"), read_lines(folder / "starts.jsonl")))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads the runs in `folders`, under names that tell them apart; a folder of runs stands for all of them."""
    folders = [run for folder in folders for run in _runs_in(folder)]
    names = [folder.resolve().name for folder in folders]
    return [read_run(f, name if names.count(name) == 1 else str(f)) for f, name in zip(folders, names, strict=True)]


def _runs_in(folder: Path) -> list[Path]:
    """`folder`, or the runs in it that have begun."""
    inside = sorted(folder.glob("*/metrics.jsonl"))
    if not inside or os.path.isfile(folder / "metrics.jsonl"):
        return [folder]
    return [path.parent for path in inside if has_rows(path.parent)] or [inside[0].parent]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; the last one may still be being written."""
    return [line for line in _lines(path) if line is not None]


def _lines(path: Path) -> list[dict[str, Any] | None]:
    """The object on each whole line; None where there is none."""
    return [_object(line) for line in path.read_bytes().split(b"\n")[:-1]] if os.path.isfile(path) else []


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    try:
        return _object(path.read_bytes()) or {}
    except OSError:
        return {}


def _read_config(path: Path) -> dict[str, Any]:
    """{"section.field": value}, not checked: an older version's may have other fields."""
    sections = {section: values for section, values in _read_object(path).items() if isinstance(values, dict)}
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def side_by_side(tables: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Rows of a label and its value in every table, or None."""
    labels = dict.fromkeys(label for own in tables for label in own)
    return [[label, *(own.get(label) for own in tables)] for label in labels]


def differing_options(runs: Sequence[Run]) -> list[list[Any]]:
    """Rows of an option and its value in every run; a run without config.json has None, and differs nowhere.

    What an older version did not know yet is at its default.
    """
    configs = [field_values(Config()) | run.config if run.config else {} for run in runs]
    options = [{name: shown(v) for name, v in config.items() if name not in FOLDER_OPTIONS} for config in configs]
    return [
        row for row in side_by_side(options) if len({v for v, own in zip(row[1:], options, strict=True) if own}) > 1
    ]


def number(value: float | None, digits: int = 4) -> str:
    """`value` to some significant digits, such as 12,345 or 4.592 or 3e-05; a dash where there is none."""
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    whole = abs(value) < 1e15 and (abs(value) >= 10 ** (digits - 1) or float(value).is_integer())
    return f"{value:,.0f}" if whole else f"{value:.{digits}g}"
