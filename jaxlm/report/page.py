"""The report's page: the data of its charts, which report.js draws, and all else through template.html."""

import math
import re
import time
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from itertools import pairwise
from operator import itemgetter
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

import jaxlm
from jaxlm.report.runs import Points, Run, differing_options, number, side_by_side

MOST_POINTS = 30_000  # of all charts together, so that the file stays small
MOST_MARKS = 200  # of a kind
SMOOTHED_FROM = 60  # points
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # HTML can't hold these

AVERAGE_LOSS = {"eval/average_loss": "validation, average"}  # of the parameters, with ema_decay
AVERAGE_BITS = {"eval/average_bits_per_byte": "average"}
# Charts: title, unit, {metric: label}, factor. A metric that is in none of them, nor in NOT_DRAWN, gets its own.
CHARTS: list[tuple[str, str, dict[str, str], float]] = [
    ("Loss", "nats per token", {"train/loss": "training", "eval/loss": "validation", **AVERAGE_LOSS}, 1),
    ("Bits per byte", "validation", {"eval/bits_per_byte": "validation", **AVERAGE_BITS}, 1),
    ("Learning rate", "", {"train/learning_rate": "learning rate"}, 1),
    ("Gradient norm", "before clipping", {"train/grad_norm": "gradient norm"}, 1),
    ("Throughput", "tokens/s", {"train/tokens_per_second": "tokens/s"}, 1),
    ("MFU", "% of the devices' peak", {"train/mfu": "MFU"}, 100),
    ("Memory", "GiB, peak so far", {"train/memory_gib": "fullest device", "train/host_memory_gib": "process"}, 1),
    ("Loss scale", "float16", {"train/loss_scale": "loss scale"}, 1),
]
AXES = ("tokens", "hours", "FLOPs")  # to draw by, beside steps
NOT_DRAWN = {"train/epoch", "train/skipped_steps", "eval/perplexity", "eval/average_perplexity"}
NOISY = {"train/loss", "train/grad_norm", "train/tokens_per_second", "train/mfu"}
SYMBOLS = {"resumed": "\u250a", "changed": "\u25c6", "spike": "\u25be", "skipped": "\u2715", "not finite": "\u2715"}


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("jaxlm", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template("template.html")


def page(runs: Sequence[Run]) -> str:
    """The HTML of a run, or of several compared."""
    html = _template().render(
        runs=runs,
        charts=list(charts(runs)),
        courses=[courses_of(run) for run in runs],
        axes=[name for name in AXES if all(name in run.course for run in runs)],
        differing_options=differing_options(runs),
        side_by_side=side_by_side,
        number=number,
        file=lambda name: files("jaxlm.report").joinpath(name).read_text(encoding="utf-8"),
        written=f"Written {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} by jaxlm {jaxlm.__version__}.",
    )
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", html)


def charts(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """The charts, as report.js takes them: of one run, each with all its metrics; of several, one for each metric."""
    in_charts = {metric for _, _, metrics, _ in CHARTS for metric in metrics}
    others = sorted({metric for run in runs for metric in run.series} - in_charts - NOT_DRAWN)
    columns = max(25, min(300, MOST_POINTS // (4 * sum(len(run.series) for run in runs) + 1)))
    marks = [
        {"kind": kind, "symbol": symbol, "colour": i if len(runs) > 1 else 6, "run": i, "steps": steps[:MOST_MARKS]}
        for i, run in enumerate(runs)
        for kind, symbol in SYMBOLS.items()
        if (steps := [event.step for event in run.events if event.kind == kind])
    ]
    for title, unit, metrics, factor in [*CHARTS, *((metric, "", {metric: metric}, 1.0) for metric in others)]:
        for group in [metrics] if len(runs) == 1 else [{metric: label} for metric, label in metrics.items()]:
            lines = [
                line | {"label": label if len(runs) == 1 else run.name, "colour": i + j, "run": j}
                for i, (metric, label) in enumerate(group.items())
                for j, run in enumerate(runs)
                for line in lines_of(run, metric, factor, columns)
            ]
            if lines:
                yield {
                    "title": title if group == metrics else f"{title}, {', '.join(group.values())}",
                    "unit": unit,
                    "lines": lines,
                    "marks": marks,
                    "log_switch": title == "Loss",
                }


def courses_of(run: Run) -> dict[str, list[list[float]]]:
    """Some of the points of `Run.course`, by axis."""
    courses = {axis: [points[i] for i in places(len(points), 50)] for axis, points in run.course.items()}
    return {axis: [[step, float(f"{value:.6g}")] for step, value in points] for axis, points in courses.items()}


def lines_of(run: Run, metric: str, factor: float, columns: int) -> Iterator[dict[str, Any]]:
    """A metric's line and, where it is long and noisy, its smoothed line; None in y is a gap."""
    values = {value for _, value in run.finite(metric)}
    if not values or (metric == "train/loss_scale" and values == {1.0}):  # not in use
        return
    points = run.points(metric)
    lines = {"plain": thinned(points, columns)}
    if metric in NOISY and len(points) >= SMOOTHED_FROM:
        lines = {"faint": lines["plain"], "smoothed": smoothed(points, columns // 2)}
    for kind, line in lines.items():
        yield {
            "x": [step for step, _ in line],
            "y": [float(f"{value * factor:.5g}") if math.isfinite(value) else None for _, value in line],
            "kind": kind,
        }


def thinned(points: Points, columns: int) -> Points:
    """The lowest and the highest point of each part between two `places`; all points, if they are few."""
    if len(points) <= 2 * columns:
        return points
    kept = {points[0], points[-1]}
    for start, end in pairwise(places(len(points), columns)):
        known = [point for point in points[start:end] if math.isfinite(point[1])] or points[start : start + 1]
        kept |= {min(known, key=itemgetter(1)), max(known, key=itemgetter(1))}
    return sorted(kept)


def smoothed(points: Points, columns: int) -> Points:
    """Means of about a fiftieth of the points around `places`, as many before as behind, so that nothing is shifted."""
    line = []
    for i in places(len(points), columns):
        half = min(max(2, len(points) // 100), i, len(points) - 1 - i)
        window = [value for _, value in points[i - half : i + half + 1] if math.isfinite(value)]
        line.append((points[i][0], fmean(window) if window else math.nan))
    return line


def places(length: int, columns: int) -> list[int]:
    """Indices of points, even on a linear and on a logarithmic axis, `columns` each; the first and last among them."""
    shares = [i / (columns - 1) for i in range(columns)]
    return sorted({round(share * (length - 1)) for share in shares} | {round(length**share) - 1 for share in shares})
