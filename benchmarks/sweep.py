"""A sweep of 12 learning rates beside 12 starts of train.py: python benchmarks/sweep.py

The tiny model of cpu.py, 100 updates and one evaluation a run, in float32. Caches are warm for both: the text is
tokenized and the step compiled by a run that does not count. Half of the starts come before the sweep, half behind it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lib.machine import ROOT, own_versions, say
from lib.report import RESULTS, Report
from lib.tables import table
from start import environment

TINY = {  # the shape is cpu.py's
    "model.vocab_size": 512, "model.d_model": 128, "model.n_heads": 4, "model.n_layers": 4, "model.d_ff": 512,
    "model.max_seq_len": 64, "data.max_length": 64, "data.validation_fraction": 0.002, "training.batch_size": 12,
    "training.gradient_accumulation_steps": 1, "training.use_amp": "false", "training.logging_steps": 10,
    "training.eval_steps": 100, "training.save_steps": 100, "training.sample_tokens": 0,
}  # fmt: skip


def seconds_of(
    program: str, folder: Path, caches: Path, overrides: list[str], *options: str, checkout: Path = ROOT
) -> float:
    """From the start of a command of ours to its end."""
    tiny = [f"--{name}={value}" for name, value in TINY.items()]
    where = f"--training.checkpoint_dir={folder}"
    command = [
        sys.executable,
        str(checkout / "scripts" / program),
        "--config",
        "small",
        *tiny,
        *overrides,
        where,
        *options,
    ]
    start = time.perf_counter()
    variables = environment(caches) | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=checkout)
    if done.returncode:
        raise SystemExit(f"{program}: exit code {done.returncode}\n{done.stderr}")
    return time.perf_counter() - start


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=12, help="learning rates (default: 12)")
    parser.add_argument("--updates", type=int, default=100, help="of each run (default: 100)")
    text = "a checkout whose train.py makes the separate starts, such as one of an earlier commit (default: this one)"
    parser.add_argument("--starts_of", type=Path, default=ROOT, help=text)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default: results/)")
    parser.add_argument("overrides", nargs="*", metavar="-- --SECTION.FIELD VALUE", help="for all runs, after --")
    options = parser.parse_args(arguments)
    overrides = [*options.overrides, f"--training.max_steps={options.updates}"]
    facts: dict[str, Any] = {"versions": own_versions("jax", "jaxlib", "flax"), "updates": options.updates}
    report = Report("sweep", ["benchmarks/sweep.py", *arguments], options.out, **facts)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        caches, swept = folder / "caches", folder / "sweep"
        for number, checkout in enumerate({ROOT, options.starts_of.resolve()}):
            seconds_of("train.py", folder / f"unmeasured{number}", caches, overrides, checkout=checkout)
        vary = f"training.learning_rate=1e-4:1e-1:log:{options.points}"
        rates = [1e-4 * 1000 ** (i / (options.points - 1)) for i in range(options.points)]
        starts, sweep = [], 0.0
        for i, rate in enumerate(rates):
            if i == options.points // 2:
                sweep = seconds_of("sweep.py", swept, caches, overrides, "--vary", vary)
                say(f"sweep: {sweep:.1f} s")
            given = f"--training.learning_rate={rate:.5g}"
            seconds = seconds_of(
                "train.py", folder / f"run{i}", caches, overrides, given, checkout=options.starts_of.resolve()
            )
            starts.append(seconds)
            say(f"start {i + 1} of {options.points}: {starts[-1]:.1f} s")
        trials = json.loads((swept / "sweep.json").read_text())["trials"]
    report.content["results"] += [
        {"what": "train.py", "seconds": sum(starts), "runs": starts},
        {"what": "sweep.py", "seconds": sweep, "runs": [trial["seconds"] for trial in trials]},
    ]
    print(table(report.content))
    report.close()


if __name__ == "__main__":
    main(sys.argv[1:])
