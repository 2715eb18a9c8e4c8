"""From command to first update, cold and warm, stage by stage: python benchmarks/start.py [--config FILE]

Runs the real command, `scripts/train.py`, up to its first update, and looks at the clock when its lines appear.
Cold: no tokenizer, tokens, plans or compiled programs are cached. Warm: the same command again, for another run's
folder. Then `--help` and two mistakes, and, where --peer-python has torch, PyTorch's time to a first update on batches
that are ready.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cpu
from lib.machine import ROOT, own_versions, say, versions_in
from lib.report import RESULTS, Report
from lib.tables import CONTENDERS, table
from lib.workers import ENVIRONMENT, Worker

STAGES = {  # what has been done when a line begins so
    "text: ": "imports, devices, reading the text",
    "tokenizer: ": "training the tokenizer",
    "tokenized text: ": "tokenizing",
    "validation rows: ": "packing",
    "model: ": "building and initialising the state",
    "compiled the step": "compiling the step",
    "read the compiled step": "compiling the step",
    "step 1/": "first update",
}
TRAIN = [sys.executable, str(ROOT / "scripts" / "train.py")]
AT_ONCE = {  # commands that must answer at once, and their exit code
    "--help": (["--help"], 0),
    "unknown option": (["--config", "configs/small.py", "--training.batchsize", "1"], 2),
    "value out of bounds": (["--config", "configs/small.py", "--training.batch_size", "0"], 2),
}


def environment(caches: Path) -> dict[str, str]:
    """This one, with every cache in the folder `caches`."""
    names = ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    return os.environ | ENVIRONMENT | {name: str(caches / name.lower()) for name in names}


def first_update(options: argparse.Namespace, caches: Path, folder: Path, warm: bool) -> dict[str, float]:
    """{stage: seconds}, in the order in which they ended, and "total", from the start of the process.

    `warm` is whether everything must be in `caches` already; else nothing may be.
    """
    stop = ["--training.stop_at_step", "1", "--training.sample_tokens", "0", "--training.checkpoint_dir", str(folder)]
    start = last = time.perf_counter()
    process = subprocess.Popen(
        [*TRAIN, "--config", options.config, *options.overrides, *stop],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(caches),
        cwd=ROOT,
    )
    stages: dict[str, float] = {}
    lines = []
    for line in process.stderr:
        lines.append(line)
        found = next((stage for begin, stage in STAGES.items() if line.startswith(begin)), None)
        if found is not None and found not in stages:
            now = time.perf_counter()
            stages[found], last = now - last, now
    cached = any(line.startswith("tokenized text: cached") for line in lines)
    if process.wait() != 0 or stages.keys() != set(STAGES.values()) or cached != warm:
        shown = f"exit code {process.returncode}, cached text: {cached}, stages seen: {list(stages)}"
        raise SystemExit(f"{shown}\n{''.join(lines)}")
    return stages | {"total": last - start}


def measure_start(options: argparse.Namespace, caches: Path, folder: Path) -> list[dict[str, Any]]:
    """One cold start and several warm ones; of the latter the one with the median total."""
    cold = first_update(options, caches, folder / "cold", warm=False)
    say(f"cold: {cold['total']:.1f} s")
    warm = []
    for i in range(options.repeats):
        warm.append(first_update(options, caches, folder / f"warm{i}", warm=True))
        say(f"warm: {warm[-1]['total']:.1f} s")
    middle = sorted(warm, key=lambda stages: stages["total"])[len(warm) // 2]
    totals = [stages["total"] for stages in warm]
    return [
        {"what": "train.py", "caches": "cold", "seconds": cold},
        {"what": "train.py", "caches": "warm", "seconds": middle, "min": min(totals), "max": max(totals)},
    ]


def measure_answers(repeats: int, caches: Path) -> Iterator[dict[str, Any]]:
    """How long it takes until help or an error stands there, the median of several."""
    for what, (arguments, expected) in AT_ONCE.items():
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            done = subprocess.run([*TRAIN, *arguments], capture_output=True, env=environment(caches), cwd=ROOT)
            seconds.append(time.perf_counter() - start)
            if done.returncode != expected:
                raise SystemExit(f"{what}: exit code {done.returncode}\n{done.stderr.decode()}")
        total = {"total": statistics.median(seconds)}
        say(f"{what}: {total['total']:.2f} s")
        yield {"what": what, "caches": "-", "seconds": total, "min": min(seconds), "max": max(seconds)}


def measure_peers(python: str, names: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    """From the peers' process to their first update of the small model in float32, with empty caches and again."""
    preset = cpu.PRESETS["small"]
    spec = {"shape": preset.shape, "seq_len": preset.seq_len[0], "tokens": preset.tokens, "updates_a_lap": 1}
    spec = cpu.with_batches(spec | {"text": None, "cache_dir": None}, folder, {})
    spec |= {"precision": "float32", "dropout": 0.0}
    for name in names:
        for caches in ("cold", "warm"):
            command = [python, str(cpu.HERE / cpu.PROGRAMS[name])]
            worker = Worker(command, spec | {"contender": name}, folder / "log", environment(folder / name))
            seconds = worker.answer()["first_lap"] - worker.started
            worker.close()
            say(f"{CONTENDERS[name].label}, {caches}: {seconds:.1f} s")
            yield {"what": CONTENDERS[name].label, "caches": caches, "seconds": {"total": seconds}}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/small.py", help="of the run (default: configs/small.py)")
    parser.add_argument("--repeats", type=int, default=3, help="warm starts, and answers of each kind (default: 3)")
    parser.add_argument("--peer-python", help="interpreter with torch and the peers; none: they are left out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default: results/)")
    parser.add_argument("overrides", nargs="*", metavar="-- --SECTION.FIELD VALUE", help="for train.py, after --")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    versions, peers = own_versions("jax", "jaxlib", "flax", "numba", "tokenizers"), []
    if options.peer_python is not None:
        needs = {name: cpu.NEEDS[name] for name in ("eager", "compiled", "litgpt")}
        there = versions_in(options.peer_python, sorted({package for names in needs.values() for package in names}))
        versions |= there
        peers = [name for name, packages in needs.items() if set(packages) <= set(there)]
    report = Report("start", ["benchmarks/start.py", *arguments], options.out, versions=versions, config=options.config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ours = itertools.chain(
            measure_start(options, folder / "caches", folder), measure_answers(options.repeats, folder / "caches")
        )
        for result in itertools.chain(ours, measure_peers(options.peer_python, peers, folder) if peers else ()):
            report.content["results"].append(result)
            report.write()
    print(table(report.content))
    report.close()


if __name__ == "__main__":
    main(sys.argv[1:])
