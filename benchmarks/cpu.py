"""Training speed on this machine's CPU, side by side with PyTorch: python benchmarks/cpu.py [--preset NAME] [...]

Ours is `Trainer.train()`, with all that is around the step; the peers are transformers' GPT-2 in a plain loop, eager
and compiled, litgpt's GPT, and transformers' Trainer, of the same shape on the same rows. README.md, next to this
file, has the method.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.machine import own_versions, say, versions_in, without_paths
from lib.report import RESULTS, Report
from lib.tables import CONTENDERS, table
from lib.worker import UNTIMED, WARM_UP
from lib.workers import ENVIRONMENT, take_turns
from ours import dump_batches

HERE = Path(__file__).resolve().parent
NEEDS = {  # packages of each contender that is not ours
    "eager": ["torch", "transformers"],
    "compiled": ["torch", "transformers"],
    "litgpt": ["torch", "litgpt"],
    "hf_trainer": ["torch", "transformers", "accelerate"],
}
PROGRAMS = {
    "ours": "ours.py",
    "eager": "peer_torch.py",
    "compiled": "peer_torch.py",
    "litgpt": "peer_litgpt.py",
    "hf_trainer": "peer_hf_trainer.py",
}
PRECISIONS = ("float32", "bf16")
WITHOUT_DROPOUT = {"litgpt"}  # what has none can't be measured with it
QUICK = 512  # rows of the matrices that tell without the peak whether PyTorch can be measured
LONGEST_LAP = 60.0  # seconds that the peers' products alone may take
QUIET = 0.05  # share of the CPU that other processes may take in a turn
TRAINING = {"learning_rate": 3e-4, "weight_decay": 0.01, "max_grad_norm": 1.0}  # no warm-up, so a low rate


@dataclass(frozen=True)
class Preset:
    """A model, and how it is measured."""

    shape: dict[str, int]
    seq_len: tuple[int, ...]
    tokens: int  # an update, at every sequence length
    dropout: tuple[float, ...]
    updates_a_lap: int  # jaxlm and transformers' Trainer log after each lap
    laps: int  # timed, in a turn
    contenders: tuple[str, ...] = ("ours", "eager", "compiled", "litgpt")


def _shape(vocab_size: int, d_model: int, n_heads: int, n_layers: int) -> dict[str, int]:
    sizes = {"vocab_size": vocab_size, "d_model": d_model, "n_heads": n_heads, "n_layers": n_layers}
    return sizes | {"d_ff": 4 * d_model}


PRESETS = {
    "small": Preset(_shape(4096, 256, 4, 4), (512, 1024), 8192, (0.1, 0.0), 1, 4),  # configs/small.py
    "30m": Preset(_shape(8192, 512, 8, 8), (512, 1024), 4096, (0.1, 0.0), 1, 3),
    "tiny": Preset(_shape(512, 128, 4, 4), (64,), 768, (0.0,), 10, 6, tuple(CONTENDERS)),
}


def summarize(results: list[dict[str, Any]], tokens: int, flops: float, peak: float | None) -> None:
    """Adds tokens/s (median and range over the turns so far), MFU, and the ratio to the cell's best PyTorch figure."""
    done = [result for result in results if result["turns"] and "error" not in result]
    for result in done:
        rates = [tokens * len(seconds) / sum(seconds) for seconds in result["turns"]]
        median = statistics.median(rates)
        result["tokens_per_second"] = {"median": median, "min": min(rates), "max": max(rates)}
        result["mfu"] = None if peak is None else median * flops / peak
    peers = [result["tokens_per_second"]["median"] for result in done if result["contender"] != "ours"]
    for result in done:
        result["ratio_to_best_pytorch"] = result["tokens_per_second"]["median"] / max(peers) if peers else None


def _result(contender: str, cell: dict[str, Any]) -> dict[str, Any]:
    setting = {name: cell[name] for name in ("seq_len", "batch", "precision", "dropout")}
    return {"contender": contender, **setting, "turns": [], "others": []}


def measure_cell(
    commands: dict[str, list[str]],
    cell: dict[str, Any],
    options: argparse.Namespace,
    peak: float | None,
    report: Report,
) -> None:
    """Puts results of all contenders at one sequence length, precision and dropout into `report`, turn by turn."""
    from jaxlm.monitor.metrics import flops_per_token

    shown = f"{cell['seq_len']} tokens, {cell['precision']}, dropout {cell['dropout']:g}"
    say(f"{shown}: {', '.join(commands)} are compiling and warming up")
    lap_tokens = cell["batch"] * cell["seq_len"] * cell["updates_a_lap"]
    results = {name: _result(name, cell) for name in commands}
    report.content["results"] += results.values()
    shape, parameters = cell["shape"], 0
    for name, answer in take_turns(commands, cell, options.repeats, options.laps, Path(cell["folder"])):
        result = results[name]
        if "seconds" not in answer:  # what it says of itself, or why it ended
            result |= {key: value for key, value in answer.items() if key != "first_lap"}
            parameters = parameters or answer.get("parameters", 0)
            continue
        result["turns"].append(answer["seconds"])
        result["others"].append(answer["others"])
        result |= {"loss": answer["loss"], "peak_bytes": answer["peak_bytes"]}
        rate = lap_tokens * len(answer["seconds"]) / sum(answer["seconds"])
        say(f"  turn {len(result['turns'])}/{options.repeats}: {CONTENDERS[name].label:<28} {rate:>8,.0f} tokens/s")
        flops = flops_per_token(parameters, shape["n_layers"], cell["seq_len"], shape["d_model"])
        summarize(list(results.values()), lap_tokens, flops, peak)
        report.write()


def measure_peaks(interpreters: dict[str, str], *sizes: int) -> dict[str, dict[str, float]]:
    """{library: {precision: FLOP/s}} of square matrix products, by each library's interpreter."""
    peaks = {}
    for library, interpreter in interpreters.items():
        say(f"the peak of matrix products by {library}")
        command = [interpreter, str(HERE / "peak.py"), library, *map(str, sizes)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | ENVIRONMENT)
        peaks[library] = json.loads(done.stdout)
    return peaks


def why_not_pytorch(cell: dict[str, Any], rate: float) -> str | None:
    """Why a cell has no peers: at `rate` FLOP/s, as in bf16 on a CPU that has none, they take hours. None: it has."""
    from jaxlm.monitor.metrics import flops_per_token

    shape = cell["shape"]
    parameters = 12 * shape["n_layers"] * shape["d_model"] ** 2 + shape["vocab_size"] * shape["d_model"]
    flops = flops_per_token(parameters, shape["n_layers"], cell["seq_len"], shape["d_model"])
    seconds = flops * cell["tokens"] * cell["updates_a_lap"] / rate
    if seconds < LONGEST_LAP:
        return None
    return f"at {rate / 1e9:.1f} GFLOP/s, a lap's updates take {seconds:,.0f} s or more"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, with what the preset says where they say nothing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="small", help="the model (default: small)")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has torch and the peers")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, metavar="NAME", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender (default: 5)")
    parser.add_argument(
        "--precision", nargs="+", choices=["float32", "bf16"], default=["float32", "bf16"], help="(default: both)"
    )
    parser.add_argument("--no-peak", action="store_true", help="don't measure the peak, and give no MFU")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="text to train on, instead of the standard library")
    parser.add_argument("--cache_dir", help="as data.cache_dir")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default: results/)")
    own = parser.add_argument_group("instead of what the preset says")
    own.add_argument("--seq_len", nargs="+", type=int, help="tokens a row")
    own.add_argument("--dropout", nargs="+", type=float, help="of everything that has dropout")
    own.add_argument("--tokens", type=int, help="of an update; rows are as many as make them up")
    own.add_argument("--updates_a_lap", type=int, help="updates between two logged rows; a lap is timed as a whole")
    own.add_argument("--laps", type=int, help="timed laps of a turn")
    for name in next(iter(PRESETS.values())).shape:
        own.add_argument(f"--{name}", type=int, help="of the model")
    options = parser.parse_args(arguments)
    preset = PRESETS[options.preset]
    for name in ("seq_len", "dropout", "tokens", "updates_a_lap", "laps"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(preset, name))
    options.shape = {name: getattr(options, name) or size for name, size in preset.shape.items()}
    options.only = options.only or list(preset.contenders)
    if min(options.repeats, options.laps, options.updates_a_lap) < 1:
        parser.error("--repeats, --laps and --updates_a_lap must be at least 1")
    if options.tokens < max(options.seq_len):
        parser.error(f"--tokens ({options.tokens}) is less than a row of --seq_len ({max(options.seq_len)})")
    if shutil.which(options.peer_python) is None:
        parser.error(f"--peer-python ({options.peer_python}): no such program")
    return options


def contender_commands(options: argparse.Namespace) -> tuple[dict[str, list[str]], dict[str, str], dict[str, str]]:
    """(command of each contender that can run, why each other one can't, versions of everything)."""
    peers = [name for name in options.only if name != "ours"]
    packages = sorted({package for name in peers for package in NEEDS[name]})
    there = versions_in(options.peer_python, packages) if peers else {}
    left_out, commands = {}, {}
    for name in options.only:
        missing = [package for package in NEEDS.get(name, []) if package not in there]
        if missing:
            python = without_paths(options.peer_python)
            left_out[name] = f"{', '.join(missing)} not installed in {python} (--peer-python names another)"
        else:
            python = sys.executable if name == "ours" else options.peer_python
            commands[name] = [python, str(HERE / PROGRAMS[name])]
    return commands, left_out, own_versions("jax", "jaxlib", "flax", "optax", "grain") | there


def with_batches(spec: dict[str, Any], folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """`spec` with the vocabulary that the text gave, and its batches written to `folder`; `facts` says what they are.

    Args:
      spec: `shape`, `seq_len`, `tokens` an update, `updates_a_lap`, `text` and `cache_dir`, as the options say.
    """
    spec = spec | {"batch": spec["tokens"] // spec["seq_len"], "training": TRAINING, "folder": str(folder)}
    spec |= {"device": "cpu", "overrides": {}}
    path = folder / f"batches_{spec['seq_len']}.npz"
    facts |= dump_batches(spec | {"contender": "ours", "precision": "float32", "dropout": 0.0}, path)
    shape = spec["shape"] | {"vocab_size": facts["vocab_size"]}
    return spec | {"data": str(path), "bos_id": facts["bos_id"], "shape": shape}


def cells(options: argparse.Namespace, folder: Path, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings to measure; `facts` says of each sequence length what its batches are."""
    names = ("shape", "tokens", "updates_a_lap", "text", "cache_dir")
    for seq_len in options.seq_len:
        spec = {name: getattr(options, name) for name in names} | {"seq_len": seq_len}
        spec = with_batches(spec, folder, facts.setdefault(str(seq_len), {}))
        for precision, dropout in itertools.product(options.precision, options.dropout):
            yield spec | {"precision": precision, "dropout": dropout}


def main(arguments: list[str]) -> int:
    """Measures and reports; 0 if all that was asked for and is installed ran, 1 if a contender failed."""
    options = parse(arguments)
    commands, left_out, versions = contender_commands(options)
    for name, reason in left_out.items():
        say(f"{CONTENDERS[name].label}: left out, {reason}")
    if not commands:
        return 1
    torch = {"torch": options.peer_python} if "torch" in versions else {}
    rates = measure_peaks(torch, QUICK) if options.no_peak else measure_peaks({"jax": sys.executable} | torch)
    peaks = {} if options.no_peak else rates
    method = {"repeats": options.repeats, "laps": options.laps, "updates_a_lap": options.updates_a_lap}
    report = Report(
        f"cpu-{options.preset}",
        ["benchmarks/cpu.py", *arguments],
        options.out,
        versions=versions,
        setup={"preset": options.preset, "shape": options.shape, "tokens": options.tokens, **TRAINING},
        method=method | {"untimed_laps": UNTIMED, "warm_up_laps": WARM_UP},
        peak_flops=peaks,
        left_out=left_out,
        data={},
    )
    content = report.content
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells(options, Path(folder), content["data"]):
            able = [name for name in commands if not cell["dropout"] or name not in WITHOUT_DROPOUT]
            slow = why_not_pytorch(cell, rates["torch"][cell["precision"]]) if "torch" in rates else None
            running = {name: commands[name] for name in able if slow is None or name == "ours"}
            peak = max((peak[cell["precision"]] for peak in peaks.values()), default=None)
            if running:
                measure_cell(running, cell, options, peak, report)
            for name in (name for name in able if name not in running):
                say(f"{CONTENDERS[name].label}, {cell['precision']}: left out, {slow}")
                content["results"].append(_result(name, cell) | {"left_out": slow})
    print(table(content))
    disturbed = max((share for result in content["results"] for share in result["others"] if share), default=0.0)
    if disturbed > QUIET:
        print(f"\nNot quiet: other processes took up to {disturbed:.0%} of the CPU in a turn. Measure again.")
    report.close()
    return int(any("error" in result for result in content["results"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
