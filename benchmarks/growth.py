"""How time and memory grow, and what grows faster than it should: python benchmarks/growth.py [--only AXIS ...]

sequence     tokens of a row, at a constant number of tokens an update: memory must stay, time may grow as the row does
layers, vocabulary, batch      all may grow in proportion
documents    to tokens: reading, holding out, tokenizing
packing      rows for documents, a strategy at a time

Each measurement runs in a process of its own. README.md, next to this file, has the method.
"""

import argparse
import contextlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lib.machine import cores, own_versions, say
from lib.report import RESULTS, Report
from lib.tables import table
from lib.worker import answer_part, forget_peak, peak_bytes, status_bytes
from lib.workers import ENVIRONMENT, in_a_process

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig
from jaxlm.config.validate import LARGEST_INT

SECONDS = 2.0  # of timed updates, at least
UPDATES = 3  # timed, at least
MOST_UPDATES = 20
WORDS = 400_000  # of the text for the steps
DOCUMENT_WORDS = 16  # on average, of the documents that are tokenized
VOCABULARY = 512  # learned; a larger one is filled up with tokens that no text has
SHAPE = {
    "vocab_size": VOCABULARY,
    "d_model": 128,
    "n_heads": 4,
    "n_layers": 2,
    "d_ff": 512,
    "seq_len": 256,
    "batch": 16,
}
NARROW = {"d_model": 32, "n_heads": 1, "n_layers": 1, "d_ff": 128}


class Axis(NamedTuple):
    """What grows, and the power of it that each quantity may grow with."""

    values: tuple[int, ...]
    unit: str
    limits: dict[str, float]


DATA_LIMITS = {"seconds": 1.0, "added_bytes": 1.0}
STEP_LIMITS = {**DATA_LIMITS, "temporary_bytes": 1.0, "first_seconds": 1.0}
AXES = {
    "sequence": Axis(
        tuple(2**n for n in range(9, 16)), "tokens a row", {**STEP_LIMITS, "temporary_bytes": 0.0, "added_bytes": 0.0}
    ),
    "layers": Axis((2, 4, 8, 16, 32), "layers", STEP_LIMITS),
    "vocabulary": Axis(tuple(2**n for n in range(10, 16)), "tokens known", STEP_LIMITS),
    "batch": Axis((4, 8, 16, 32, 64), "rows", STEP_LIMITS),
    "documents": Axis(tuple(4**n for n in range(6, 10)), "documents", DATA_LIMITS),
    "packing": Axis((500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000), "documents", DATA_LIMITS),
}


def chosen(axis: str, value: int, tokens: int) -> dict[str, int]:
    """The shape of a step: `SHAPE`, but for what `axis` says."""
    return (
        SHAPE
        | {
            "sequence": NARROW | {"seq_len": value, "batch": tokens // value},
            "layers": {"n_layers": value, "batch": 4},
            "vocabulary": {"vocab_size": value},
            "batch": {"batch": value},
        }[axis]
    )


# -------------------------------------------------------------------------------------------- the text


def write_text(folder: Path) -> None:
    """<folder>/text.txt, one long document of made-up words, and <folder>/tokenizer.json, learned from it."""
    from jaxlm.data.tokenizer import Tokenizer

    text = " ".join(made_up_words(WORDS, seed=0))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    Tokenizer.train([text], VOCABULARY).save(folder)


def made_up_words(count: int, seed: int) -> list[str]:
    """Of 2 to 10 letters, some a hundred times as frequent as others, the same on every machine."""
    rng = random.Random(seed)
    known = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(5000)]
    return rng.choices(known, [1 / (10 + n) for n in range(len(known))], k=count)


def write_documents(path: Path, count: int) -> None:
    """A .jsonl file of `count` documents, 1 to 2 * DOCUMENT_WORDS words each."""
    rng, words = random.Random(1), made_up_words(2**16, seed=0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            begin = rng.randrange(len(words) - 2 * DOCUMENT_WORDS)
            text = " ".join(words[begin : begin + rng.randint(1, 2 * DOCUMENT_WORDS)])
            file.write(json.dumps({"text": text}) + "\n")


def filled_up(folder: Path, size: int) -> str:
    """The tokenizer of `folder` with unused tokens up to `size`; its path."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<unused {n}>": n for n in range(len(vocabulary), size)}
    path = folder / f"tokenizer_{size}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


# -------------------------------------------------------------------------------------------- one measurement


def configuration(spec: dict[str, Any]) -> Config:
    """A run without end, in float32, that does nothing but update and log."""
    sizes, folder = dict(spec["shape"]), Path(spec["folder"])
    seq_len, batch = sizes.pop("seq_len"), sizes.pop("batch")
    return Config(
        model=ModelConfig(**sizes, max_seq_len=seq_len, dropout=0.0, attention_dropout=0.0),
        training=TrainingConfig(
            batch_size=batch,
            gradient_accumulation_steps=1,
            use_amp=False,
            max_steps=LARGEST_INT - 1,
            logging_steps=1,
            eval_steps=LARGEST_INT,
            save_steps=LARGEST_INT,
            checkpoint_dir=str(folder / "run"),
            report_to=(),
        ),
        data=DataConfig(
            train_files=(str(folder / "text.txt"),),
            tokenizer_path=filled_up(folder, sizes["vocab_size"]),
            max_length=seq_len,
            packing_strategy="first_fit",
            cache_dir=str(folder / "cache"),
        ),
    )


def step(spec: dict[str, Any]) -> dict[str, Any]:
    """Updates of `Trainer.train()`. `added_bytes`: what updates need beyond what is resident between them."""
    from jaxlm import Trainer

    class Enough(Exception):
        pass

    class Measured(Trainer):
        def _log_metrics(self, loss: float) -> None:
            super()._log_metrics(loss)
            times.append(time.perf_counter())
            if self.current_step == 1:
                time.sleep(0.5)
                measured["resident_bytes"] = status_bytes("VmRSS")
                forget_peak()
            elif len(times) > 1 + UPDATES and (times[-1] - times[1] > SECONDS or len(times) > MOST_UPDATES):
                raise Enough

    measured: dict[str, Any] = {"parameters": 0}
    trainer = Measured(configuration(spec))
    times = [time.perf_counter()]
    with contextlib.suppress(Enough):
        trainer.train()
    updates = [after - before for before, after in itertools.pairwise(times[1:])]
    memory = trainer.train_step.memory_analysis()
    return {
        "parameters": trainer.assembly.parameters,
        "seconds": min(updates),
        "updates": updates,
        "first_seconds": times[1] - times[0] - min(updates),
        "temporary_bytes": memory.temp_size_in_bytes,
        "resident_bytes": measured["resident_bytes"],
        "added_bytes": peak_bytes() - measured["resident_bytes"],
    }


def documents(spec: dict[str, Any]) -> dict[str, Any]:
    """`prepare` of documents in a file, with a tokenizer; `added_bytes`: beyond what was resident before."""
    from jaxlm.data.tokens import prepare

    folder = Path(spec["folder"])
    names = {"train_files": (str(folder / "documents.jsonl"),), "tokenizer_path": str(folder / "tokenizer.json")}
    data = DataConfig(**names, cache_dir=str(folder / "cache"), preprocessing_num_workers=cores())
    write_documents(folder / "documents.jsonl", spec["value"])
    before = status_bytes("VmRSS")
    forget_peak()
    start = time.perf_counter()
    prepared = prepare(data, VOCABULARY, None, say)
    seconds = time.perf_counter() - start
    found = len(prepared.train) + len(prepared.validation)
    if found != spec["value"]:
        raise SystemExit(f"{found} documents were tokenized of {spec['value']}")
    return {"seconds": seconds, "resident_bytes": before, "added_bytes": peak_bytes() - before}


def packing(spec: dict[str, Any]) -> dict[str, Any]:
    """As data.py measures it."""
    from data import packing as measure

    (result,) = measure({"strategy": spec["strategy"], "documents": spec["value"], "seq_len": 512, "mean_length": 400})
    return {"seconds": min(result["seconds"]), "added_bytes": result["peak_bytes"]}


PARTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "step": step,
    "documents": documents,
    "packing": packing,
}


# -------------------------------------------------------------------------------------------- the command


def measure(axis: str, value: int, strategy: str | None, tokens: int) -> dict[str, Any]:
    """The quantities at one point of an axis, and what they belong to."""
    part = axis if axis in PARTS else "step"
    with tempfile.TemporaryDirectory() as folder:
        if part != "packing":
            write_text(Path(folder))
        spec: dict[str, Any] = {"folder": folder, "value": value, "strategy": strategy}
        if part == "step":
            spec["shape"] = chosen(axis, value, tokens)
        result = in_a_process(__file__, part, spec, ENVIRONMENT)
    name = axis if strategy is None else f"{axis}, {strategy}"
    return {"axis": name, "unit": AXES[axis].unit, "value": value, "limits": AXES[axis].limits, **result}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options]"
    )
    parser.add_argument("--only", nargs="+", choices=AXES, default=list(AXES), help="what to measure (default: all)")
    for name, axis in AXES.items():
        shown = f"{axis.values[0]} ... {axis.values[-1]}"
        parser.add_argument(f"--{name}", nargs="+", type=int, default=list(axis.values), help=f"(default: {shown})")
    parser.add_argument("--tokens", type=int, default=2**15, help="of an update, for `sequence` (default: 32768)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default: results/)")
    options = parser.parse_args(arguments)
    if max(options.sequence) > options.tokens:
        parser.error(f"--tokens ({options.tokens}) is less than a row of --sequence ({max(options.sequence)})")
    return options


def main(arguments: list[str]) -> None:
    from data import STRATEGIES

    options = parse(arguments)
    report = Report("growth", ["benchmarks/growth.py", *arguments], options.out, versions=own_versions("jax", "jaxlib"))
    for axis in options.only:
        for strategy in STRATEGIES if axis == "packing" else (None,):
            for value in sorted(getattr(options, axis)):
                result = measure(axis, value, strategy, options.tokens)
                added = result["added_bytes"] / 2**20
                say(f"{result['axis']} {value:,}: {result['seconds']:.3f} s, {added:,.0f} MiB added")
                report.content["results"].append(result)
                report.write()
    print(table(report.content))
    report.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        answer_part(PARTS)
    else:
        main(sys.argv[1:])
