"""The report's page: one file, with nothing outside it."""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any

import jaxlm
from jaxlm.report import runs as of
from jaxlm.report.charts import Chart, Line, figure
from jaxlm.report.elements import Element, document, element, number
from jaxlm.report.runs import Run

POINTS = 30_000  # of all charts, so that the file stays small
SHOWN_SAMPLES, SAMPLE_LENGTH = 9, 1500  # characters
SHOWN_MARKS = 40
NOTHING_OUTSIDE = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

# Rows that have a chart of their own: title, unit, names of the rows with their labels, factor.
CHARTS: list[tuple[str, str, dict[str, str], float]] = [
    ("Loss", "nats a token", {"train/loss": "training", "eval/loss": "validation"}, 1),
    ("Bits a byte", "validation", {"eval/bits_per_byte": "validation"}, 1),
    ("Learning rate", "", {"train/learning_rate": "learning rate"}, 1),
    ("Gradient norm", "before clipping", {"train/grad_norm": "gradient norm"}, 1),
    ("Throughput", "tokens/s", {"train/tokens_per_second": "tokens/s"}, 1),
    ("MFU", "% of the devices' peak", {"train/mfu": "MFU"}, 100),
    (
        "Memory",
        "GiB, peak so far",
        {"train/memory_gib": "fullest device", "train/host_memory_gib": "process"},
        1,
    ),
    ("Loss scale", "float16", {"train/loss_scale": "loss scale"}, 1),
]
NOT_DRAWN = {"train/epoch", "train/skipped_steps", "eval/perplexity"}
NOISY = {"train/loss", "train/grad_norm", "train/tokens_per_second", "train/mfu"}
SIGNED = ("skipped", "not finite", "spike")


def page(runs: Sequence[Run]) -> str:
    """The HTML of a run, or of several compared."""
    one = len(runs) == 1
    title = runs[0].name if one else f"{len(runs)} runs compared"
    here = files("jaxlm.report")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=NOTHING_OUTSIDE),
        element("title", f"{title} \N{MIDDLE DOT} jaxlm"),
        element("style", (here / "report.css").read_text(encoding="utf-8")),
    )
    body = element(
        "body",
        element("h1", title),
        *(_state(runs[0]) if one else [_state_of_several(runs)]),
        *(_tiles(runs[0]) if one else _comparison(runs)),
        element("h2", "Curves"),
        element("div", *_figures(runs), class_="charts"),
        *(part for i, run in enumerate(runs) for part in _details(run, i, one)),
        element(
            "p",
            f"Written {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} by jaxlm {jaxlm.__version__}.",
            class_="faint",
        ),
        element("script", (here / "report.js").read_text(encoding="utf-8")),
    )
    return document(element("html", head, body, lang="en"))


# ---- The top ---------------------------------------------------------------------------------------------------------


def _state(run: Run) -> Iterator[Element]:
    total = run.facts.get("total_steps")
    at = f"step {run.last_step:,}" + (f" of {total:,}" if total else "")
    state = "Finished" if run.finished else "Not finished"
    devices = f", {run.facts['devices']}" if "devices" in run.facts else ""
    yield element("p", f"{state}: {at}{devices}.", class_="faint")


def _state_of_several(runs: Sequence[Run]) -> Element:
    items = [
        element("li", element("span", class_=_key(i)), f"{run.name}: {'finished' if run.finished else 'not finished'}")
        for i, run in enumerate(runs)
    ]
    return element("ul", *items, class_="legend")


def _key(i: int) -> str:
    return f"key c{i % 8} d{i // 8 % 3}"


def _tiles(run: Run) -> Iterator[Element]:
    tiles = [element("div", element("small", name), element("b", value)) for name, value in of.figures(run)]
    yield element("div", *tiles, class_="tiles")


def _comparison(runs: Sequence[Run]) -> Iterator[Element]:
    named = [dict(of.figures(run)) for run in runs]
    rows = dict.fromkeys(name for found in named for name in found)
    yield element("h2", "Final figures")
    yield _table(["", *_headings(runs)], [[name, *(found.get(name) for found in named)] for name in rows])
    yield element("h2", "Where the configurations differ")
    fields = of.differing(runs)
    if not all(run.config for run in runs):
        yield element("p", "A run without config.json is left out of this table.", class_="faint")
    if fields:
        values = [[name, *(_shown(run, name) for run in runs)] for name in fields]
        yield _table(["", *_headings(runs)], values)
    else:
        yield element("p", "Nowhere, but for the folder.")


def _headings(runs: Sequence[Run]) -> list[Element]:
    return [element("span", element("span", class_=_key(i)), run.name) for i, run in enumerate(runs)]


def _shown(run: Run, name: str) -> str | None:
    return of.shown_value(run.config[name]) if name in run.config else None


def _table(head: Sequence[str | Element], rows: Sequence[Sequence[str | None]], long: bool = False) -> Element:
    """The first cell of a row is its heading; none is a dash."""
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", "\N{EN DASH}" if text is None else text) for text in row[1:]),
        )
        for row in rows
    ]
    top = element("thead", element("tr", *(element("th", text, scope="col") for text in head)))
    return element(
        "div", element("table", top, element("tbody", *body)), class_="scroll" + " long" * long, tabindex="0"
    )


# ---- Curves ----------------------------------------------------------------------------------------------------------


def _figures(runs: Sequence[Run]) -> Iterator[Element]:
    known = {name for _, _, names, _ in CHARTS for name in names} | NOT_DRAWN
    own = sorted({name for run in runs for name in run.series} - known)
    wanted = [*CHARTS, *((name, "", {name: name}, 1.0) for name in own)]
    charts = [chart for title, unit, names, factor in wanted for chart in _charts(runs, title, unit, names, factor)]
    drawn = sum(len(chart.lines) for chart in charts) + sum(len(chart.lines) for chart in charts if chart.both_scales)
    columns = max(25, min(300, POINTS // (2 * max(1, drawn))))
    for i, chart in enumerate(charts):
        made = figure(chart, f"chart{i}", columns)
        if i == 0:
            made.set("class", made.get("class", "") + " wide")
        yield made


def _charts(runs: Sequence[Run], title: str, unit: str, names: dict[str, str], factor: float) -> Iterator[Chart]:
    """One chart with all names for one run; a chart for each name, with all runs, for several."""
    drawn = {
        name: [(i, run) for i, run in enumerate(runs) if run.values(name)] for name in names if not _is_dull(runs, name)
    }
    if len(runs) == 1:
        lines = [
            _line(runs[0], label, name, factor, i) for i, (name, label) in enumerate(names.items()) if drawn.get(name)
        ]
        if lines:
            yield _with_marks(title, unit, lines, runs)
        return
    for name, label in names.items():
        if drawn.get(name):
            lines = [_line(run, run.name, name, factor, i) for i, run in drawn[name]]
            both = unit if label.lower() in (title.lower(), unit) else f"{label}, {unit}"
            yield _with_marks(title, both.removesuffix(", "), lines, runs)


def _is_dull(runs: Sequence[Run], name: str) -> bool:
    """A loss scale that is not in use."""
    return name == "train/loss_scale" and all(value == 1 for run in runs for value in run.values(name))


def _line(run: Run, label: str, name: str, factor: float, colour: int) -> Line:
    points = [(step, value * factor) for step, value in run.points(name)]
    return Line(label, points, colour, marked=name.startswith("eval/"), noisy=name in NOISY)


def _with_marks(title: str, unit: str, lines: list[Line], runs: Sequence[Run]) -> Chart:
    found = [(mark, i) for i, run in enumerate(runs) for mark in run.marks]
    is_loss = title == "Loss"
    own_colour = (lambda i: i) if len(runs) > 1 else (lambda i: 6)
    signs = [(mark.step, mark.kind, own_colour(i)) for mark, i in found if mark.kind in SIGNED]
    return Chart(
        title,
        unit,
        lines,
        resumes=[(mark.step, own_colour(i)) for mark, i in found if mark.kind == "resumed"][:SHOWN_MARKS],
        signs=signs[:SHOWN_MARKS] if is_loss or title == "Gradient norm" else [],
        both_scales=is_loss,
    )


# ---- Run by run ------------------------------------------------------------------------------------------------------


def _details(run: Run, i: int, one: bool) -> Iterator[Element]:
    parts: dict[str, Callable[[Run], Iterator[Element]]] = {
        "Samples": _samples,
        "What happened": _events,
        "Packing": _packing,
        "Configuration": _configuration,
        "How to run it again": _again,
    }
    if not one:
        heading = element("h2", run.name)
        sections = [
            element("details", element("summary", title), *made)
            for title, part in parts.items()
            if (made := [*part(run)])
        ]
        yield element("section", heading, *sections, class_=f"run c{i % 8}")
        return
    for title, part in parts.items():
        made = list(part(run))
        if made:
            yield element("h2", title)
            yield from made


def _samples(run: Run) -> Iterator[Element]:
    """Some of them, evenly over the run, the first and the last among them."""
    count = len(run.samples)
    shown = min(count, SHOWN_SAMPLES)
    chosen = sorted({round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)})
    cards = []
    for sample in (run.samples[i] for i in chosen):
        text, loss = sample["text"], run.at("eval/loss", sample["step"])
        cut = text[:SAMPLE_LENGTH] + "\N{HORIZONTAL ELLIPSIS}" * (len(text) > SAMPLE_LENGTH)
        name = sample.get("name", "sample")
        heading = ("Step " if name == "sample" else f"{name}, step ") + f"{sample['step']:,}"
        heading += f", validation loss {number(loss)}" if loss is not None else ""
        cards.append(element("div", element("h3", heading), element("pre", cut, tabindex="0")))
    if cards:
        if len(chosen) < count:
            yield element("p", f"{len(chosen)} of {count}; all are in samples.jsonl.", class_="faint")
        yield element("div", *cards, class_="samples")


def _events(run: Run) -> Iterator[Element]:
    found = run.marks
    if found:
        rows = [[f"{mark.step:,}", mark.text] for mark in found[:SHOWN_MARKS]]
        yield _table(["step", "what"], rows, long=True)
    if len(found) > SHOWN_MARKS:
        yield element("p", f"... and {len(found) - SHOWN_MARKS:,} more.", class_="faint")
    if run.unreadable:
        yield element("p", f"{run.unreadable:,} line(s) of metrics.jsonl could not be read, and are left out.")


def _packing(run: Run) -> Iterator[Element]:
    columns = {name: run.facts[name] for name in ("train", "validation") if name in run.facts}
    labels = {
        "rows": "Rows",
        "row_length": "Tokens a row can hold",
        "tokens": "Tokens in rows",
        "documents": "Documents",
        "cut_documents": "... cut into pieces",
        "dropped_documents": "... dropped, too short",
        "dropped_tokens": "Tokens in those",
    }
    for name, facts in columns.items():
        yield element("p", f"{name}: rows are {facts['fill']:.1%} full")
        yield element("div", element("div", style=f"width:{facts['fill']:.2%}"), class_="bar")
    if columns:
        rows = [[label, *(f"{facts[key]:,}" for facts in columns.values())] for key, label in labels.items()]
        yield _table(["", *columns], rows)


def _configuration(run: Run) -> Iterator[Element]:
    if not run.config:
        yield element("p", "config.json is not there, or is not readable.")
        return
    defaults = of.default_fields()

    def rows(names: Sequence[str]) -> list[list[str | None]]:
        return [
            [name, _shown(run, name), of.shown_value(defaults[name]) if name in defaults else None] for name in names
        ]

    changed = of.changed_from_defaults(run)
    yield _table(["changed from the default", "value", "default"], rows(changed), long=True)
    same = [name for name in run.config if name not in changed]
    table = _table(["as by default", "value"], [row[:2] for row in rows(same)], long=True)
    yield element("details", element("summary", f"The other {len(same)} options"), table)


def _again(run: Run) -> Iterator[Element]:
    if "command" not in run.facts:
        yield element(
            "p", "The folder has no starts.jsonl: the run is of an older version. config.json has its options."
        )
        return
    facts = run.facts
    lines = []
    if facts.get("commit"):
        changed = "   # with changes that were not committed" * facts["commit"].endswith("-dirty")
        lines.append(f"git checkout {shlex.quote(facts['commit'].removesuffix('-dirty'))}{changed}")
    packages = [f"{name}=={version}" for name, version in facts["versions"].items() if name not in ("jaxlm", "python")]
    lines += ["pip install " + shlex.join(packages), facts["command"]]
    yield element("pre", "\n".join(lines), tabindex="0")
    told: dict[str, Any] = {
        "jaxlm": facts["versions"]["jaxlm"],
        "Python": f"{facts['versions']['python']}, {facts['system']}",
        "Devices": f"{facts['devices']}, {facts['processes']} process(es)",
        "Layout": facts["layout"],
        "Attention": facts["attention"],
        "Fingerprint of the text": facts["data_fingerprint"],
    }
    yield _table(["", ""], [[name, str(value)] for name, value in told.items()], long=True)
    starts = [
        [f"{start['step']:,}", of.shown_time(start["time"]), start["devices"], start["command"]] for start in run.starts
    ]
    yield element("h3", "Starts")
    yield _table(["from step", "time", "devices", "command"], starts, long=True)
