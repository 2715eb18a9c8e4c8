"""Markdown tables of result files."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

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
    shown = {"tokenizing": _tokenizing, "packing": _packing, "loading": _loading, "larger": _larger}
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


TABLES: dict[str, Callable[[Content], str]] = {"cpu": speed, "start": start, "data": data}


def table(content: Content) -> str:
    """The table of a result file; raises KeyError where there is none for its kind."""
    return TABLES[content["benchmark"].partition("-")[0]](content)
