"""Time to a loss: configs/speedrun.py beside configs/small.py, on three kinds of text: python benchmarks/recipes.py

For each text and seed both are trained from their commands to their ends, one after the other, with empty caches. What
counts is the clock from the command on, compiling, evaluating and saving included. small.py is that of --baseline.
With --peer-python also a plain GPT of that size in eager PyTorch, whose tokens are there already (peer_recipe.py).
A run that is in the result file already is not made again (--go_on), so that the whole can be made in parts.
"""

import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
from lib.machine import ROOT, own_versions, say
from lib.report import RESULTS, Report
from lib.tables import table
from start import environment

from jaxlm.config.batches import batches_of

RECIPES = ("small", "speedrun", "eager")  # in this order
EVALUATED = re.compile(r"step (\d+): validation loss [\d.]+, perplexity [\d.]+, ([\d.]+) bits per byte")
NAMES = [
    "Ada",
    "Boole",
    "Church",
    "Dijkstra",
    "Euler",
    "Fermat",
    "Gauss",
    "Hopper",
    "Iverson",
    "Jacobi",
    "Knuth",
    "Lovelace",
]
GOODS = ["apples", "books", "candles", "dates", "eggs", "figs", "grain", "honey", "ink", "jars", "kettles", "lamps"]


def ledgers(megabytes: int) -> Iterator[str]:
    """Documents of who paid whom for what, with the balances that follow, the same every time."""
    random_, made = random.Random(0), 0
    while made < megabytes * 1_000_000:
        people = random_.sample(NAMES, 4)
        money = {name: random_.randrange(50, 500) for name in people}
        lines = [f"Opening: {', '.join(f'{name} {coins}' for name, coins in money.items())}."]
        for _ in range(random_.randrange(20, 120)):
            buyer, seller = random_.sample(people, 2)
            count, price = random_.randrange(1, 10), random_.randrange(1, 20)
            sentence = f"{buyer} buys {count} {random_.choice(GOODS)} from {seller} at {price} each"
            if money[buyer] < count * price:
                lines.append(f"{sentence}, but has only {money[buyer]}.")
                continue
            money[buyer] -= count * price
            money[seller] += count * price
            lines.append(f"{sentence}: {count * price}. Now {buyer} has {money[buyer]}, {seller} {money[seller]}.")
        lines.append(f"Closing: {', '.join(f'{name} {coins}' for name, coins in money.items())}.")
        made += len(document := "\n".join(lines) + "\n")
        yield document


def text_options(text: str, folder: Path) -> list[str]:
    """Options of train.py for a text; it is made in `folder` if it isn't there."""
    if text == "python":  # what both configurations have
        return []
    if not folder.is_dir():
        folder.mkdir(parents=True)
        if text == "ledgers":
            documents = [json.dumps({"text": document}) for document in ledgers(8)]
            (folder / "ledgers.jsonl").write_text("\n".join(documents) + "\n", encoding="utf-8")
        else:  # C++: the headers that come with pyarrow, which the package needs
            for file in files("pyarrow") or []:
                if file.suffix == ".h" and "include" in file.parts:
                    (folder / "_".join(file.parts)).with_suffix(".txt").write_bytes(file.read_binary())
    return ["--data.train_files", str(folder / "*")]  # the commit of --baseline may not know folders


def watch(command: list[str], source: Path, folder: Path) -> dict[str, Any]:
    """Seconds from a run's command to its end and to each evaluation, and what that said; caches are in `folder`."""
    caches = environment(folder / "caches") | {"PYTHONPATH": str(source)}
    start, evaluations, lines = time.perf_counter(), [], []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=caches, cwd=source) as process:
        for line in process.stderr or ():
            lines.append(line)
            if found := EVALUATED.search(line):
                seconds = time.perf_counter() - start
                evaluations.append({"step": int(found[1]), "seconds": seconds, "bits_per_byte": float(found[2])})
    if process.returncode or not evaluations:
        raise SystemExit(f"{command}: exit code {process.returncode}\n{''.join(lines[-20:])}")
    return {"seconds": time.perf_counter() - start, "evaluations": evaluations}


def train(recipe: str, source: Path, options: list[str], folder: Path) -> dict[str, Any]:
    """A run of ours."""
    command = [sys.executable, str(source / "scripts" / "train.py"), "--config", f"configs/{recipe}.py"]
    run = watch([*command, "--training.checkpoint_dir", str(folder / recipe), *options], source, folder)
    started = json.loads((folder / recipe / "starts.jsonl").read_text().splitlines()[0])
    a_row = started["train"]["row_length"] * started["train"]["fill"]
    batches = batches_of(started)
    for evaluation in run["evaluations"]:
        evaluation["tokens"] = round(batches.position(evaluation["step"]) * a_row)
    return run | {"parameters": started["parameters"]}


def train_peer(python: Path, options: list[str], folder: Path) -> dict[str, Any]:
    """A run of PyTorch's, on small.py's tokens and with as many in an update, for as many updates."""
    from jaxlm.commands.parser import Parser, add_config_file, add_config_options, config_from
    from jaxlm.run.text import prepare_text

    parser = Parser("")
    add_config_file(parser)
    add_config_options(parser)
    config = config_from(parser.parse_args(["--config", "small", "--data.cache_dir", str(folder / "text"), *options]))
    text, model, training = prepare_text(config, None), config.model, config.training
    (held_out,) = text.eval_rows.values()
    rows = [held_out[i] for i in range(len(held_out))]
    arrays = {name: np.stack([row[name] for row in rows]) for name in ("tokens", "targets", "segments")}
    np.savez(folder / "text.npz", train=text.rows.tokens, bytes=text.eval_bytes, **arrays)
    steps = math.ceil(len(text.rows) / training.batch_size / training.gradient_accumulation_steps)
    spec = {
        "data": str(folder / "text.npz"),
        "shape": {name: vars(model)[name] for name in ("d_model", "n_heads", "n_layers", "d_ff")}
        | {"vocab_size": text.tokenizer.vocab_size},
        "seq_len": config.data.max_length,
        "rows": training.batch_size,
        "micro_batches": training.gradient_accumulation_steps,
        "steps": steps if training.max_steps is None else training.max_steps,
        "eval_steps": training.eval_steps,
        "seed": training.seed,
    }
    run = watch([str(python.absolute()), str(ROOT / "benchmarks" / "peer_recipe.py"), json.dumps(spec)], ROOT, folder)
    for evaluation in run["evaluations"]:
        evaluation["tokens"] = evaluation["step"] * spec["rows"] * spec["micro_batches"] * spec["seq_len"]
    return run | json.loads((folder / "text.json").read_text())


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--texts", nargs="+", default=["python", "headers", "ledgers"], choices=("python", "headers", "ledgers")
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[42, 1, 2], help="for python; other texts take the first"
    )
    parser.add_argument("--peer-python", type=Path, help="of an environment with PyTorch; none: no peer")
    parser.add_argument("--baseline", default="1c6a717", help="commit whose small.py it is (default: 1c6a717)")
    parser.add_argument("--go_on", type=Path, help="result file to add what it lacks to")
    parser.add_argument(
        "--runs", type=Path, help="folder to keep the runs in, for jaxlm report; none: they are deleted"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default: results/)")
    parser.add_argument("overrides", nargs="*", metavar="-- --SECTION.FIELD VALUE", help="for both, after --")
    options = parser.parse_args(arguments)
    report = Report(
        "recipes", ["benchmarks/recipes.py", *arguments], options.out, versions=own_versions("jax", "jaxlib", "optax")
    )
    if options.go_on is not None:
        report.path, report.content = options.go_on, json.loads(options.go_on.read_text(encoding="utf-8"))
    results = report.content["results"]
    done = {(r["text"], r["seed"], r["recipe"]) for r in results}
    wanted = [
        (text, seed) for text in options.texts for seed in (options.seeds if text == "python" else options.seeds[:1])
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder, before = Path(temporary), Path(temporary) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", "-f", before, options.baseline], cwd=ROOT, check=True)
        try:
            for text, seed in wanted:
                given = [*text_options(text, folder / "texts" / text), "--training.seed", str(seed), *options.overrides]
                for recipe in RECIPES if options.peer_python else RECIPES[:2]:
                    if (text, seed, recipe) in done:
                        continue
                    runs = (options.runs or folder / "runs").absolute() / f"{text}_{seed}"
                    runs.mkdir(parents=True, exist_ok=True)
                    say(f"{text}, seed {seed}: {recipe}")
                    if recipe == "eager":
                        run = train_peer(options.peer_python, given, runs)
                    else:
                        run = train(recipe, before if recipe == "small" else ROOT, given, runs)
                    results.append({"text": text, "seed": seed, "recipe": recipe, **run})
                    report.write()
                    last = run["evaluations"][-1]["bits_per_byte"]
                    say(f"    {last:.4f} bits per byte after {run['seconds']:.0f} s")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=False)
    print(table(report.content))
    report.close()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(sys.argv[1:])
