"""Everything that has to be known of a GPU, in one call: benchmarks/gpu/run [--minutes 9] [--only PART ...]

First whether it is right (kernels, losses, kill and resume), then how fast it is, beside PyTorch. Each part is a
process of its own; one that fails is noted, the rest goes on, and the exit code is 1. METHOD.md, next to this file,
has the method. `--cut` with JAX_PLATFORMS=cpu is all of it on any machine, with tiny shapes, for tests.
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lib

from lib.machine import own_versions, say
from lib.report import RESULTS, Report
from lib.tables import table
from lib.workers import OutOfTime, WorkerFailed, stream
from speed import MODELS, ROWS

from jaxlm.commands.parser import convert
from jaxlm.config import SECTIONS, Config, check_fields, replace_fields
from jaxlm.errors import UserError

HERE = Path(__file__).resolve().parent
PARTS = ("kernels", "losses", "resume", "speed")
SHARE_OF_KERNELS = 0.3  # of the time, where other parts follow; the rest take what they need or what is left
GRACE = 15  # seconds that a part has to say what it left out
BATCH = {"training.batch_size", "training.gradient_accumulation_steps", "data.max_length"}  # --rows says how many
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint")
PACKAGES += ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
PACKAGES += ("torch", "triton", "transformers")
QUERY = {"name": "name", "driver_version": "driver", "memory.total": "memory", "power.limit": "power_limit"}


def gpu() -> dict[str, str] | None:
    """Name, driver, memory and power limit of the GPU in use; None where nvidia-smi tells of none."""
    first = os.environ["CUDA_VISIBLE_DEVICES"].partition(",")[0]
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", f"--id={first}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    values = next(csv.reader([done.stdout], skipinitialspace=True))
    return dict(zip(QUERY.values(), (value.strip() for value in values), strict=True))


def setting(text: str, name: str) -> Any:
    """`text` as a value of the option `name`, "section.field".

    Raises:
      UserError: there is no such option, it has no such value, or it would change the size of an update.
    """
    section, _, field = name.partition(".")
    hints = typing.get_type_hints(SECTIONS[section]) if section in SECTIONS else {}
    if field not in hints:
        raise UserError(f"{name}: no such option; name it as train.py does, such as model.attention")
    if name in BATCH:
        raise UserError(f"{name}: changes what an update is; --rows says how many rows it has")
    value = convert(name, text, hints[field])
    check_fields(replace_fields(Config(), {name: value}))
    return value


def pairs(texts: list[str]) -> list[tuple[str, str]]:
    """What stands before and behind the first "=" of each text.

    Raises:
      UserError: there is none.
    """
    for text in texts:
        if "=" not in text:
            raise UserError(f"{text}: must be NAME=VALUE")
    return [tuple(text.split("=", 1)) for text in texts]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9, help="for all of it (default: 9)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all, in this order)")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="whose speed (default: all; with --ab: 124m)")
    parser.add_argument("--rows", nargs="+", default=[], metavar="MODEL=N", help=f"an update (default: {_shown(ROWS)})")
    parser.add_argument(
        "--ab", nargs="+", default=[], metavar="NAME=VALUE[,VALUE]", help="ours alone with each value: speed only"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="an option of ours in all speed cells"
    )
    parser.add_argument("--before", metavar="FOLDER", help="an earlier jaxlm, whose speed comes first")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="to train on, instead of the standard library")
    parser.add_argument("--cut", action="store_true", help="tiny shapes: a test of the suite, not of the machine")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default: ../results)")
    options = parser.parse_args(arguments)
    try:
        options.fixed = {name: setting(text, name) for name, text in pairs(options.set)}
        options.ab = [[name, setting(text, name)] for name, texts in pairs(options.ab) for text in texts.split(",")]
        options.rows = ROWS | {name: int(count) for name, count in pairs(options.rows)}
    except (ValueError, UserError) as error:
        parser.error(str(error))
    if options.rows.keys() != ROWS.keys() or min(options.rows.values()) < 1:
        parser.error(f"--rows takes a number of rows for any of {', '.join(ROWS)}")
    if options.before is not None and not (Path(options.before) / "benchmarks/ours.py").is_file():
        parser.error(f"--before ({options.before}) holds no checkout: git archive COMMIT | tar x -C FOLDER makes one")
    if options.before is not None and (options.ab or "speed" not in options.only):
        parser.error(f"--before ({options.before}) is measured in the first cell of speed, which is left out here")
    if options.ab:
        options.only = ["speed"]
    options.models = options.models or (["124m"] if options.ab else list(MODELS))
    options.only = [part for part in PARTS if part in options.only]
    options.before = options.before and str(Path(options.before).resolve())
    options.text = [str(Path(file).resolve()) for file in options.text] if options.text else None
    return options


def _shown(rows: dict[str, int]) -> str:
    return " ".join(f"{name}={count}" for name, count in rows.items())


def small_text(folder: Path) -> list[str]:
    """A file of made-up text, for `--cut`."""
    rng, words = random.Random(1), ["the", "small", "model", "reads", "a", "row", "and", "writes", "it"]
    documents = (" ".join(rng.choices(words, k=rng.randint(3, 60))) for _ in range(300))
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return [str(file)]


def run_part(part: str, spec: dict[str, Any], share: float, end: float, report: Report) -> None:
    """Puts the results of one part into `report`, each as it comes; it plans with `share` of the time left."""
    results, left = report.content["results"], end - time.monotonic()
    if left <= 0:
        results.append({"part": part, "left_out": "no time"})
        return
    begin = time.monotonic()
    spec = spec | {"seconds": share * left}
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        command = [sys.executable, str(HERE / f"{part}.py"), json.dumps(spec)]
        environment = {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": spec["platform"]}  # no other one
        for result in stream(command, environment, left + GRACE):
            results.append({"part": part, **result})
            report.write()
    except (WorkerFailed, OutOfTime) as failure:
        say(f"  {part} failed: {failure}")
        results.append({"part": part, "error": str(failure)})
    report.content["seconds"][part] = round(time.monotonic() - begin, 1)
    report.write()


def failed(result: dict[str, Any]) -> bool:
    return "error" in result or result.get("passed") is False


def main(arguments: list[str]) -> int:
    """Measures and reports; 1 if anything was wrong or failed, 2 without a GPU."""
    options = parse(arguments)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi numbers them
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    here = gpu()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the part, too
    platform = "cpu" if os.environ.get("JAX_PLATFORMS") == "cpu" else "cuda"
    if platform == "cuda" and here is None:
        print("error: nvidia-smi finds no GPU; JAX_PLATFORMS=cpu with --cut tests the suite itself", file=sys.stderr)
        return 2
    if platform == "cpu" and not options.cut:
        print("error: JAX_PLATFORMS=cpu: only --cut is for a CPU; cpu.py measures one", file=sys.stderr)
        return 2
    here = here if platform == "cuda" else None
    report = Report(
        "gpu-cut" if options.cut else "gpu-ab" if options.ab else "gpu",
        ["benchmarks/gpu/suite.py", *arguments],
        options.out,
        device=here["name"] if here else None,
        gpu=here,
        versions=own_versions(*PACKAGES),
        minutes=options.minutes,
        seconds={},
    )
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        text = options.text or (small_text(Path(folder)) if options.cut else None)
        caches = Path(folder) / "caches"
        caches.mkdir()
        spec = {name: getattr(options, name) for name in ("cut", "models", "rows", "ab", "fixed", "before")}
        spec |= {"text": text, "cache_dir": str(caches), "platform": platform, "gpu": here and here["name"]}
        for part in options.only:
            say(f"{part}, {max(0.0, end - time.monotonic()):.0f} s left")
            share = SHARE_OF_KERNELS if part == "kernels" and len(options.only) > 1 else 1.0
            run_part(part, spec, share, end, report)
    print(table(report.content))
    report.close()
    return int(any(failed(result) for result in report.content["results"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
