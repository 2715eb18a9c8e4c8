"""Pictures of a benchmark's results: `plot.py RESULTS.json --out FILE`.

FILE ends in .png or .svg. Needs matplotlib: pip install -e ".[bench]"
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CONTENDERS = {  # label and colour
    "ours": ("jaxlm", "#2f6db5"),
    "eager": ("transformers, eager", "#c9c2b8"),
    "compiled": ("transformers, torch.compile", "#8c857b"),
}
INK, FAINT = "#2b2b2b", "#dddddd"
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
    """Bars of tokens/s, one group a precision and dropout, with the range over the turns."""
    done = [result for result in report["results"] if "tokens_per_second" in result]
    groups = list(dict.fromkeys((result["precision"], result["dropout"]) for result in done))
    names = [name for name in CONTENDERS if any(result["contender"] == name for result in done)]
    width = 0.84 / len(names)
    figure, axes = plt.subplots(figsize=(max(6.5, 1.2 + 2.1 * len(groups)), 4.4), layout="constrained")
    for result in done:
        rate, (label, colour) = result["tokens_per_second"], CONTENDERS[result["contender"]]
        offset = (names.index(result["contender"]) - (len(names) - 1) / 2) * width
        x = groups.index((result["precision"], result["dropout"])) + offset
        below, above = rate["median"] - rate["min"], rate["max"] - rate["median"]
        axes.bar(x, rate["median"], width * 0.92, color=colour, label=label)
        axes.errorbar(x, rate["median"], [[below], [above]], color=INK, linewidth=1, capsize=3)
        axes.annotate(
            f"{rate['median']:,.0f}", (x, rate["max"]), (0, 4), textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_xticks(range(len(groups)), [f"{precision}\ndropout {dropout:g}" for precision, dropout in groups])
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("tokens/s, median and range")
    axes.margins(y=0.12)
    setup, machine = report["setup"], report["machine"]
    shape = setup["shape"]
    model = (
        f"d_model {shape['d_model']}, {shape['n_layers']} layers, vocabulary {shape['vocab_size']:,}, "
        f"{setup['batch']} x {setup['seq_len']} tokens an update"
    )
    versions = ", ".join(f"{n} {report['versions'][n]}" for n in ("jax", "torch") if n in report["versions"])
    heading(axes, f"Training speed on {machine['cores']} CPU cores", f"{model}\n{machine['cpu']}; {versions}")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(*unique(handles, labels), loc="outside lower center", ncols=len(names))
    return figure


def unique(handles: list[Any], labels: list[str]) -> tuple[list[Any], list[str]]:
    by_label = dict(zip(labels, handles, strict=True))
    return list(by_label.values()), list(by_label)


def heading(axes: Axes, title: str, small: str) -> None:
    """A bold title, and smaller lines under it."""
    lines = small.count("\n") + 1
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=6 + 12 * lines)
    axes.text(0, 1, small, transform=axes.transAxes, fontsize=9, va="bottom", color="#666666", linespacing=1.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="written by cpu.py")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="picture to write, .png or .svg")
    options = parser.parse_args()
    if options.out.suffix not in (".png", ".svg"):
        parser.error(f"--out ({options.out}) must end in .png or .svg")
    if not options.results.is_file():
        parser.error(f"{options.results}: no such file")
    with plt.rc_context(STYLE):
        figure = plot_speed(json.loads(options.results.read_text(encoding="utf-8")))
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        figure.savefig(options.out, dpi=160, facecolor="white")


if __name__ == "__main__":
    main()
