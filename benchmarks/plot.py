"""Tables and pictures of results.

    python benchmarks/plot.py RESULTS.json [RESULTS.json ...]       their tables, in Markdown, on stdout
    python benchmarks/plot.py RESULTS.json --out FILE               and a picture of the first
    python benchmarks/plot.py --short RESULTS.json [...]            of files of cpu.py: a row a cell, and its ratio

FILE ends in .png or .svg. Needs matplotlib: pip install -e ".[bench]"
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from lib.tables import CONTENDERS, QUANTITIES, TABLES, by_axis, short_speed, table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxlm.config import load_config
from jaxlm.monitor.metrics import flops_per_token

INK, FAINT = "#2b2b2b", "#dddddd"
RECIPES = {  # their names and colours
    "small": ("small.py", "#8c857b"),
    "speedrun": ("speedrun.py", "#2f6db5"),
    "eager": ("PyTorch, eager", "#b58a2f"),
}
LINES = "-", "--", ":"  # a style a text
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def plot_speed(report: dict[str, Any]) -> Figure:
    """Bars of tokens/s, a panel a sequence length, a group a precision and dropout, with the range over the turns."""
    done = [result for result in report["results"] if "tokens_per_second" in result]
    lengths = list(dict.fromkeys(result["seq_len"] for result in done))
    names = [name for name in CONTENDERS if any(result["contender"] == name for result in done)]
    groups = list(dict.fromkeys((result["precision"], result["dropout"]) for result in done))
    width = max(6.5, 1.0 + 0.42 * len(names) * len(groups) * len(lengths))
    figure, panels = plt.subplots(
        1, len(lengths), figsize=(width, 4.6), layout="constrained", squeeze=False, sharey=True
    )
    for axes, seq_len in zip(panels[0], lengths, strict=True):
        speed_bars(axes, [result for result in done if result["seq_len"] == seq_len], groups, names)
        axes.set_xlabel(f"{seq_len} tokens a row")
    panels[0, 0].set_ylabel("tokens/s, median and range")
    setup, machine = report["setup"], report["machine"]
    shape = ", ".join(f"{name} {size:,}" for name, size in setup["shape"].items())
    versions = ", ".join(f"{n} {report['versions'][n]}" for n in ("jax", "torch") if n in report["versions"])
    small = f"{shape}; {setup['tokens']:,} tokens an update\n{machine['cpu']}; {versions}; {report['date'][:10]}"
    heading(panels[0, 0], f"Training speed on {machine['cores']} CPU cores: {setup['preset']}", small)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(*unique(handles, labels), loc="outside lower center", ncols=min(len(names), 3))
    return figure


def speed_bars(axes: Axes, results: list[dict[str, Any]], groups: list[Any], names: list[str]) -> None:
    width = 0.84 / len(names)
    for result in results:
        rate, (label, colour) = result["tokens_per_second"], CONTENDERS[result["contender"]]
        offset = (names.index(result["contender"]) - (len(names) - 1) / 2) * width
        x = groups.index((result["precision"], result["dropout"])) + offset
        below, above = rate["median"] - rate["min"], rate["max"] - rate["median"]
        axes.bar(x, rate["median"], width * 0.92, color=colour, label=label)
        axes.errorbar(x, rate["median"], [[below], [above]], color=INK, linewidth=1, capsize=2)
        shown = f"{rate['median']:,.0f}"
        place = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "rotation": 90}
        axes.annotate(shown, (x, rate["max"]), (0, 5), va="bottom", **place)
    axes.set_xticks(range(len(groups)), [f"{precision}\ndropout {dropout:g}" for precision, dropout in groups])
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.margins(y=0.25)


def plot_start(report: dict[str, Any]) -> Figure:
    """Bars from the command to the first update, made up of the stages."""
    cold, warm = report["results"][:2]
    figure, axes = plt.subplots(figsize=(8.5, 3.4), layout="constrained")
    colours = plt.get_cmap("tab10").colors
    for y, result in enumerate((warm, cold)):
        left = 0.0
        for i, stage in enumerate(stage for stage in cold["seconds"] if stage != "total"):
            axes.barh(y, result["seconds"][stage], left=left, color=colours[i], label=stage, height=0.6)
            left += result["seconds"][stage]
        axes.annotate(f"{left:.1f} s", (left, y), (5, 0), textcoords="offset points", va="center", fontweight="bold")
    axes.set_yticks([0, 1], ["warm", "cold"])
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x")
    axes.set_xlabel("seconds since the command")
    axes.margins(x=0.1)
    machine = f"{report['machine']['cpu']}, {report['machine']['cores']} cores; {report['date'][:10]}"
    heading(axes, f"{report['config']}: command to first update", machine)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(*unique(handles, labels), loc="outside lower center", ncols=3)
    return figure


def plot_growth(report: dict[str, Any]) -> Figure:
    """A panel an axis: each quantity as a multiple of its first value, on logarithmic scales."""
    axes_of = by_axis(report)
    columns = min(3, len(axes_of))
    rows = -(-len(axes_of) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 0.9 + 2.9 * rows), layout="constrained", squeeze=False
    )
    for axes, (axis, results) in zip(panels.flat, axes_of.items(), strict=False):
        growth_lines(axes, results)
        axes.set_title(axis, loc="left", fontweight="bold")
        axes.set_xlabel(results[0]["unit"])
    for axes in panels.flat[len(axes_of) :]:
        axes.set_axis_off()
    machine = f"{report['machine']['cpu']}, {report['machine']['cores']} cores; {report['date'][:10]}"
    figure.suptitle(f"Growth, as multiples of the first value\n{machine}", x=0.01, ha="left", fontsize=11)
    pairs = [axes.get_legend_handles_labels() for axes in panels.flat]
    handles, labels = ([item for pair in pairs for item in pair[i]] for i in (0, 1))
    figure.legend(*unique(handles, labels), loc="outside lower center", ncols=3)
    return figure


def growth_lines(axes: Axes, results: list[dict[str, Any]]) -> None:
    sizes = [result["value"] for result in results]
    colours = plt.get_cmap("tab10").colors
    axes.plot(sizes, [size / sizes[0] for size in sizes], color=INK, linestyle=":", linewidth=1, label="in proportion")
    for colour, (name, (head, _)) in zip(colours, QUANTITIES.items(), strict=False):
        values = [result[name] for result in results if name in result]
        if values and min(values) > 0:
            multiples = [value / values[0] for value in values]
            axes.plot(sizes, multiples, color=colour, marker="o", markersize=3.5, label=head.removeprefix(">"))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g} x")
    axes.tick_params(axis="x", labelrotation=45)


def plot_recipes(report: dict[str, Any]) -> Figure:
    """Bits per byte of the held-out text, by minutes since the command, by tokens and by FLOPs; a line a run."""
    model, t = load_config("small").model, load_config("small").data.max_length
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained", sharey=True)
    texts = list(dict.fromkeys(result["text"] for result in report["results"]))
    for result in report["results"]:
        done = result["evaluations"]
        a_token = flops_per_token(result["parameters"], model.n_layers, t, model.d_model)
        name, colour = RECIPES[result["recipe"]]
        look = {"color": colour, "linestyle": LINES[texts.index(result["text"])]}
        label, bits = f"{name}, {result['text']}", [e["bits_per_byte"] for e in done]
        tokens = [e["tokens"] for e in done]
        xs = [e["seconds"] / 60 for e in done], [n / 1e6 for n in tokens], [n * a_token / 1e12 for n in tokens]
        for axes, x in zip(panels, xs, strict=True):
            axes.plot(x, bits, label=label, marker="o", markersize=3, **look)
    for axes, label in zip(panels, ("minutes since the command", "million tokens", "TFLOP"), strict=True):
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
    panels[0].set_ylabel("bits per byte, held-out text")
    machine = f"{report['machine']['cpu']}, {report['machine']['cores']} cores; {report['date'][:10]}"
    heading(panels[0], "Recipes for one model", machine)
    figure.legend(*unique(*panels[0].get_legend_handles_labels()), loc="outside lower center", ncols=3)
    return figure


def unique(handles: list[Any], labels: list[str]) -> tuple[list[Any], list[str]]:
    by_label = dict(zip(labels, handles, strict=True))
    return list(by_label.values()), list(by_label)


def heading(axes: Axes, title: str, small: str) -> None:
    """A bold title, and smaller lines under it."""
    lines = small.count("\n") + 1
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=6 + 12 * lines)
    said = axes.text(0, 1, small, transform=axes.transAxes, fontsize=9, va="bottom", color="#666666", linespacing=1.3)
    said.set_in_layout(False)  # it may reach over the next panel, which would be moved away


PLOTS = {"cpu": plot_speed, "start": plot_start, "growth": plot_growth, "recipes": plot_recipes}


def save(figure: Figure, path: Path) -> None:
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.savefig(path, dpi=160, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options]"
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json", help="written by the benchmarks here")
    parser.add_argument("--short", action="store_true", help="one table of all, of files of cpu.py")
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture to write, .png or .svg")
    options = parser.parse_args()
    if options.out is not None and options.out.suffix not in (".png", ".svg"):
        parser.error(f"--out ({options.out}) must end in .png or .svg")
    for source in options.results:
        if not source.is_file():
            parser.error(f"{source}: no such file")
    reports = [json.loads(source.read_text(encoding="utf-8")) for source in options.results]
    kinds = [report["benchmark"].partition("-")[0] for report in reports]
    if lacking := [str(source) for source, kind in zip(options.results, kinds, strict=True) if kind not in TABLES]:
        parser.error(f"{lacking[0]}: has no table; read the file itself")
    if options.out is not None and kinds[0] not in PLOTS:
        parser.error(f"--out: there is no picture of {kinds[0]} results; use one of {', '.join(PLOTS)}")
    if options.short:
        if not all(report["benchmark"].startswith("cpu-") for report in reports):
            parser.error("--short is for files of cpu.py")
        print(short_speed(reports))
    for source, report in () if options.short else zip(options.results, reports, strict=True):
        print(f"{source.name}: `{report['command']}`\n\n{table(report)}\n")
    if options.out is not None:
        with plt.rc_context(STYLE):
            save(PLOTS[kinds[0]](reports[0]), options.out)


if __name__ == "__main__":
    main()
