"""Markdown tables of result files."""

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


TABLES: dict[str, Callable[[Content], str]] = {"cpu": speed, "start": start}


def table(content: Content) -> str:
    """The table of a result file; raises KeyError where there is none for its kind."""
    return TABLES[content["benchmark"].partition("-")[0]](content)
