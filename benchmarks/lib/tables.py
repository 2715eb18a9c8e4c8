"""Markdown tables of result files."""

import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from lib.gpu_tables import gpu
from lib.report import markdown

Content = dict[str, Any]


class Look(NamedTuple):
    """How a contender is shown."""

    label: str
    colour: str


CONTENDERS = {
    "ours": Look("jaxlm", "#2f6db5"),
    "eager": Look("transformers, eager", "#c9c2b8"),
    "compiled": Look("transformers, torch.compile", "#8c857b"),
    "litgpt": Look("litgpt, torch.compile", "#b58a2f"),
    "hf_trainer": Look("transformers' Trainer", "#7a9a6b"),
}


def speed(content: Content) -> str:
    """Of cpu.py: one row a contender, in the order measured."""
    heads = ["tokens", "precision", "dropout", "", ">tokens/s, median", ">min - max", ">ms an update"]
    heads += [">of the best PyTorch", ">MFU", ">peak memory", ">loss"]
    rows = []
    for result in content["results"]:
        label = CONTENDERS[result["contender"]].label
        head = [f"{result['batch']} x {result['seq_len']}", result["precision"], f"{result['dropout']:g}", label]
        if "error" in result:
            rows.append([*head, f"failed: {result['error']}", *[""] * 6])
            continue
        if "left_out" in result:
            rows.append([*head, f"left out: {result['left_out']}", *[""] * 6])
            continue
        if not result["turns"]:  # the command was ended before
            rows.append([*head, "not measured", *[""] * 6])
            continue
        rate, ratio, mfu = result["tokens_per_second"], result["ratio_to_best_pytorch"], result["mfu"]
        rows.append(
            [
                *head,
                f"{rate['median']:,.0f}",
                f"{rate['min']:,.0f} - {rate['max']:,.0f}",
                f"{1000 * result['batch'] * result['seq_len'] / rate['median']:,.1f}",
                "-" if ratio is None else f"{ratio:.2f} x",
                "-" if mfu is None else f"{mfu:.0%}",
                f"{result['peak_bytes'] / 2**20:,.0f} MiB",
                f"{result['loss']:.3f}",
            ]
        )
    lines = [_speed_setup(content), "", markdown(heads, rows)]
    for name, reason in content["left_out"].items():
        lines.append(f"\nNo comparison was made with {CONTENDERS[name].label}: {reason}.")
    return "\n".join(lines)


def short_speed(contents: list[Content]) -> str:
    """Of several files of cpu.py: one row a cell, with the best PyTorch there."""
    heads = ["model", "tokens a row", "precision", "dropout", ">jaxlm, tokens/s", "best PyTorch", ">tokens/s", ">ratio"]
    rows = []
    for content in contents:
        key = lambda result: (result["seq_len"], result["precision"], result["dropout"])  # noqa: E731
        for cell, found in itertools.groupby(content["results"], key):
            done = {result["contender"]: result for result in found if "tokens_per_second" in result}
            ours, peers = done.pop("ours", None), list(done.values())
            if ours is None or not peers:
                continue
            best = max(peers, key=lambda result: result["tokens_per_second"]["median"])
            rates = [result["tokens_per_second"]["median"] for result in (ours, best)]
            shown = [f"{rates[0]:,.0f}", CONTENDERS[best["contender"]].label, f"{rates[1]:,.0f}"]
            setting = [content["setup"]["preset"], str(cell[0]), cell[1], f"{cell[2]:g}"]
            rows.append([*setting, *shown, f"{rates[0] / rates[1]:.2f} x"])
    return markdown(heads, rows)


def _speed_setup(content: Content) -> str:
    setup = content["setup"]
    shape = ", ".join(f"{name} {size}" for name, size in setup["shape"].items())
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    peaks = "; ".join(
        f"{library}: " + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s {precision}" for precision, rate in rates.items())
        for library, rates in content["peak_flops"].items()
    )
    measured = f" Best square matrix product, {peaks}." if peaks else ""
    return f"{_machine(content)}; {setup['preset']}: {shape}, {setup['tokens']} tokens an update; {versions}.{measured}"


def _machine(content: Content) -> str:
    here = content["machine"]
    return f"{content['date'][:10]}, {here['cpu']}, {here['cores']} cores, {here['memory_bytes'] / 2**30:.0f} GiB"


def start(content: Content) -> str:
    """Of start.py: one row a stage, then the totals of what has no stages."""
    cold, warm, *others = content["results"]
    rows = []
    for stage in cold["seconds"]:
        name = f"**{content['config']}, to the first update**" if stage == "total" else stage
        rows.append([name, *(f"{result['seconds'][stage]:.1f} s" for result in (cold, warm))])
    by_what: dict[str, dict[str, float]] = {}
    for result in others:
        by_what.setdefault(result["what"], {})[result["caches"]] = result["seconds"]["total"]
    for what, seconds in by_what.items():
        if "-" in seconds:
            rows.append([f"until train.py has shown: {what}", "", f"{seconds['-']:.2f} s"])
        else:
            rows.append([f"{what}, ready batches", *(f"{seconds[caches]:.1f} s" for caches in ("cold", "warm"))])
    return f"{_machine(content)}.\n\n" + markdown(["", ">cold", ">warm"], rows)


def data(content: Content) -> str:
    """Of data.py: one row a measurement, each with what matters of it."""
    shown = {"tokenizing": _tokenizing, "packing": _packing, "loading": _loading, "mixing": _loading, "larger": _larger}
    rows = [[result["part"], result["what"], *shown[result["part"]](result)] for result in content["results"]]
    return f"{_machine(content)}.\n\n" + markdown(["", "", "of", ">rate or time", ">memory"], rows)


def _tokenizing(result: Content) -> list[str]:
    size = result["utf8_bytes"] / 1e6
    of = f"{size:.1f} MB of text, {result['documents']:,} documents, {result['threads']} thread(s)"
    return [of, f"{size / statistics.median(result['seconds']):.2f} MB/s", ""]


def _packing(result: Content) -> list[str]:
    documents, rows = result["documents"], f"{result['rows']:,} rows of {result['max_length']}"
    memory = f"{result['peak_bytes'] / 2**20:,.0f} MiB, {result['peak_bytes'] / documents:.0f} bytes a document"
    return [f"{documents:,} documents into {rows}, {result['full']:.1%} full", f"{result['seconds'][0]:.1f} s", memory]


def _rate(result: Content) -> str:
    return f"{result['tokens_per_second'] / 1e6:.2f} M tokens/s on {result['cores_used']:.1f} cores"


def _loading(result: Content) -> list[str]:
    return [f"{result['rows']:,} rows", _rate(result), f"{result['peak_bytes'] / 2**20:,.0f} MiB"]


def _larger(result: Content) -> list[str]:
    size, limit, own, pages = (
        f"{result[name] / 2**20:,.0f} MiB" for name in ("file_bytes", "limit_bytes", "own_bytes", "file_pages_bytes")
    )
    memory = f"{own} of its own, {pages} of the file's pages"
    return [f"a file of {size}, with a limit of {limit}", _rate(result), memory]


LAST = 3  # points that the growth is taken from: at the small ones, what is always there counts for most
TOLERANCE = 0.15  # of an exponent
QUANTITIES = {  # of growth.py: head, and how it is shown
    "seconds": (">time", lambda s: f"{1000 * s:,.1f} ms" if s < 1 else f"{s:,.2f} s"),
    "temporary_bytes": (">temporary memory, as compiled", lambda n: f"{n / 2**20:,.1f} MiB"),
    "added_bytes": (">memory added, measured", lambda n: f"{n / 2**20:,.1f} MiB"),
    "first_seconds": (">compiling", lambda s: f"{s:.1f} s"),
}


def exponent(results: list[Content], quantity: str) -> float | None:
    """p of quantity ~ value ** p, by least squares over the logarithms of the last points; None where there is none."""
    points = [
        (math.log(result["value"]), math.log(max(result[quantity], 1e-9))) for result in results if quantity in result
    ][-LAST:]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else None


def by_axis(content: Content) -> dict[str, list[Content]]:
    """The results of growth.py, an axis at a time."""
    return {axis: list(results) for axis, results in itertools.groupby(content["results"], lambda r: r["axis"])}


def growth(content: Content) -> str:
    """Of growth.py: one row a measurement, the powers of each axis, and a list of what is worse than it should be."""
    rows, worse = [], []
    for axis, results in by_axis(content).items():
        for result in results:
            shown = [show(result[name]) if name in result else "" for name, (_, show) in QUANTITIES.items()]
            rows.append([axis, f"{result['value']:,} {result['unit']}", *shown])
        exponents = {name: exponent(results, name) for name in QUANTITIES}
        limits = results[0]["limits"]
        rows.append([f"**{axis}**", "grows as their power", *(_power(p, limits.get(n)) for n, p in exponents.items())])
        worse += [
            f"- {axis}: {name} grows as power {power:.2f}, more than {limits[name]:g}"
            for name, power in exponents.items()
            if power is not None and power > limits[name] + TOLERANCE
        ]
    heads = ["", ">", *(head for head, _ in QUANTITIES.values())]
    found = "Worse than it should be:\n" + "\n".join(worse) if worse else "Nothing grows faster than it should."
    return f"{_machine(content)}. Powers are those of the last {LAST} rows.\n\n{markdown(heads, rows)}\n\n{found}"


def _power(power: float | None, limit: float | None) -> str:
    if power is None or limit is None:
        return ""
    return f"**{power:.2f}, at most {limit:g}**" if power > limit + TOLERANCE else f"{power:.2f}, at most {limit:g}"


def recipes(content: Content) -> str:
    """Of recipes.py: when the second recipe is where the first ends, how far it comes in that time; the peer's end."""
    by_key = {(r["text"], r["seed"], r["recipe"]): r["evaluations"] for r in content["results"]}
    rows = []
    for text, seed in dict.fromkeys((text, seed) for text, seed, _ in by_key):
        small, fast = (by_key.get((text, seed, recipe)) for recipe in ("small", "speedrun"))
        if small is None or fast is None:
            continue
        target, whole = (small[-1][name] for name in ("bits_per_byte", "seconds"))
        reached = next((e["seconds"] for e in fast if e["bits_per_byte"] <= target), math.nan)
        lowest = min((e["bits_per_byte"] for e in fast if e["seconds"] <= whole), default=math.nan)
        cells = [f"{target:.3f}", f"{whole:.0f}", f"{reached:.0f}", f"{reached / whole:.2f}x", f"{lowest:.3f}"]
        eager = by_key.get((text, seed, "eager"))
        peer = ["", ""] if eager is None else [f"{eager[-1]['bits_per_byte']:.3f}", f"{eager[-1]['seconds']:.0f}"]
        rows.append([text, f"{seed}", *cells, *peer])
    heads = [">small.py: bits per byte", ">seconds", ">speedrun.py: seconds to that", ">of the time"]
    heads += [">lowest in that time", ">eager PyTorch: bits per byte", ">seconds"]
    return markdown(["text", ">seed", *heads], rows)


def sweep(content: Content) -> str:
    """Of sweep.py: all runs by separate commands, and by one."""
    starts, one = content["results"]
    rows = [
        [f"{len(result['runs'])} runs, {result['what']}", f"{result['seconds']:.1f} s", f"{share:.2f}x"]
        for result, share in ((starts, 1.0), (one, one["seconds"] / starts["seconds"]))
    ]
    return f"{_machine(content)}.\n\n" + markdown(["", ">seconds", ">of the time"], rows)


TABLES: dict[str, Callable[[Content], str]] = {
    "cpu": speed,
    "start": start,
    "data": data,
    "growth": growth,
    "gpu": gpu,
    "recipes": recipes,
    "sweep": sweep,
}


def table(content: Content) -> str:
    """The table of a result file; raises KeyError where there is none for its kind."""
    return TABLES[content["benchmark"].partition("-")[0]](content)
