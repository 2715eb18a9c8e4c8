"""Training speed on a GPU beside PyTorch, cell by cell while there is time. A part of suite.py.

Ours is `Trainer.train()` whole (../ours.py); the peers are transformers' GPT-2 and a plain GPT, both compiled
(../peer_torch.py, ../peer_gpt.py). One after another has the GPU for itself: METHOD.md says why.
"""

import dataclasses
import json
import math
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cpu import TRAINING
from lib.gpu_tables import instead, speed_setting
from lib.machine import say
from lib.worker import answers
from lib.workers import Worker, WorkerFailed
from ours import dump_batches

from jaxlm.config import load_config
from jaxlm.monitor.metrics import flops_per_token
from jaxlm.parallel.gpus import peak_flops

BENCHMARKS = Path(__file__).resolve().parents[1]
PROGRAMS = {"ours": "ours.py", "gpt": "peer_gpt.py", "compiled": "peer_torch.py"}
NEEDS = {"before": [], "ours": [], "gpt": ["torch"], "compiled": ["torch", "transformers"]}
SIZES = ("vocab_size", "d_model", "n_heads", "n_layers", "d_ff")
MODELS = {"124m": "gpt2_124m", "350m": "gpt2_350m", "1300m": "gpt2_1300m"}  # names of configurations
ROWS = {"124m": 32, "350m": 16, "1300m": 8}  # an update; all fit in 80 GB, as METHOD.md reckons
SEQ_LEN = 1024
TINY = {"vocab_size": 300, "d_model": 32, "n_heads": 2, "n_layers": 1, "d_ff": 64}  # of all models, with `cut`
TURNS, LAPS, UPDATES_A_LAP = 2, 3, 10
LEAST_SECONDS = 60  # a contender is not begun with less left
FULL = re.compile(r"RESOURCE_EXHAUSTED|OutOfMemoryError|out of memory", re.IGNORECASE)
ALL = ("ours", "gpt", "compiled")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A setting, and who is measured in it; the peers know no packing and recompute nothing."""

    model: str
    contenders: tuple[str, ...] = ("ours",)
    packed: bool = True
    dropout: float = 0.0
    remat: bool = False
    overrides: tuple[tuple[str, Any], ...] = ()  # options of ours
    warm: bool = False  # whether ours is started again, with what it compiled


CELLS = (  # in order of importance
    Cell("124m", ALL, warm=True),
    Cell("124m", packed=False),
    Cell("124m", ("ours", "gpt"), dropout=0.1),
    Cell("350m", ("ours", "gpt"), warm=True),
    Cell("1300m", ("ours", "gpt"), warm=True),
    Cell("124m", packed=False, dropout=0.1),
    Cell("124m", overrides=(("model.scan_layers", True),)),
    Cell("124m", remat=True),
    Cell("1300m", remat=True),
    Cell("350m", dropout=0.1),
    Cell("350m", packed=False),
    Cell("1300m", packed=False),
    Cell("1300m", dropout=0.1),
    Cell("350m", ("compiled",)),
    Cell("1300m", ("compiled",)),
    Cell("124m", ("compiled",), dropout=0.1),
    Cell("350m", remat=True),
)
CUT = (CELLS[0], Cell("124m", packed=False, dropout=0.1, remat=True))


def cells(models: list[str], ab: list[list[Any]], fixed: dict[str, Any], cut: bool, before: str | None) -> list[Cell]:
    """Those of `models`, the first beside an earlier jaxlm if `before` names one.

    With `ab`, [[name, value], ...], ours alone with each of these in turn on top of `fixed`.
    """
    if not ab:
        cut_cells = [dataclasses.replace(cell, model=models[0]) for cell in CUT]
        chosen = cut_cells if cut else [cell for cell in CELLS if cell.model in models]
        if before is not None:
            chosen[0] = dataclasses.replace(chosen[0], contenders=("before", *chosen[0].contenders))
        return [dataclasses.replace(cell, overrides=tuple((dict(cell.overrides) | fixed).items())) for cell in chosen]
    tried = [tuple((fixed | {name: value}).items()) for name, value in ab]
    return [Cell(model, overrides=overrides, warm=True) for model in models for overrides in tried]


def cell_spec(spec: dict[str, Any], cell: Cell, folder: Path) -> dict[str, Any]:
    """What ../ours.py and the peers take, but for the batches."""
    model = load_config(MODELS[cell.model]).model
    shape = TINY if spec["cut"] else {name: getattr(model, name) for name in SIZES}
    overrides = {"data.pack_sequences": cell.packed, "model.gradient_checkpointing": cell.remat}
    overrides |= {"training.memory_fraction": 0.9}  # PyTorch takes what there is
    return {
        "shape": shape,
        "seq_len": 32 if spec["cut"] else SEQ_LEN,
        "batch": 2 if spec["cut"] else spec["rows"][cell.model],
        "updates_a_lap": 1 if spec["cut"] else UPDATES_A_LAP,
        "precision": "bf16",
        "dropout": cell.dropout,
        "training": TRAINING,
        "overrides": overrides | dict(cell.overrides),
        "text": spec["text"],
        "cache_dir": spec["cache_dir"],
        "folder": str(folder),
        "device": "cuda" if spec["platform"] == "cuda" else "cpu",
    }


def environment(spec: dict[str, Any], contender: str, caches: Path) -> dict[str, str]:
    """What a contender's process adds to ours; what is compiled goes to `caches`."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
    own = {name: str(caches / name.lower()) for name in names}
    own |= {"TORCH_COMPILE_DISABLE": "1"} if spec["cut"] else {}  # it takes half a minute
    if contender == "before":
        own["PYTHONPATH"] = spec["before"]
    return own | {"JAX_PLATFORMS": spec["platform"]}


def linked_caches(caches: Path, text: Path) -> None:
    """A folder for one contender in one cell: with the tokenized text of all, and nothing compiled yet."""
    caches.mkdir()
    for name in ("tokens", "tokenizers"):
        if (text / name).is_dir():
            (caches / name).symlink_to(text / name)


def measured(
    contender: str, cell: Cell, contender_spec: dict[str, Any], own: dict[str, str], before: str | None, end: float
) -> Any:
    """What one contender answers: seconds to its first update, cold and perhaps warm, and its turns.

    Raises:
      WorkerFailed: it ended; `end` (of `time.monotonic`) has come, its memory did not suffice, or something is wrong.
    """
    earlier = before is not None and contender == "before"
    program = Path(str(before), "benchmarks/ours.py") if earlier else BENCHMARKS / PROGRAMS[contender]
    command = [sys.executable, str(program)]
    log = Path(contender_spec["folder"]) / f"{contender}.log"

    def first(worker: Worker) -> tuple[dict[str, Any], float]:
        about = worker.answer()
        return about, about["first_update"] - worker.started

    def started() -> Worker:
        worker = Worker(command, contender_spec, log, own)
        timer = threading.Timer(max(0.0, end - time.monotonic()), worker.process.kill)
        timer.daemon = True
        timer.start()
        return worker

    worker = started()
    try:
        about, cold = first(worker)
        turns = [worker.run(1 if contender_spec["updates_a_lap"] == 1 else LAPS) for _ in range(TURNS)]
    finally:
        worker.close()
    warm = None
    if contender == "ours" and cell.warm and time.monotonic() < end - LEAST_SECONDS / 2:
        again = started()
        try:
            warm = first(again)[1]
        except WorkerFailed as failure:
            say(f"  no warm start: {failure}")
        finally:
            again.close()
    facts = {name: about[name] for name in ("parameters", "attention", "device") if name in about}
    return facts | {
        "first_update_seconds": {"cold": cold, "warm": warm},
        "turns": [turn["seconds"] for turn in turns],
        "loss": turns[-1]["loss"],
        "peak_bytes": turns[-1]["peak_bytes"],
    }


def summarized(result: dict[str, Any], spec: dict[str, Any], gpu: str | None) -> dict[str, Any]:
    """`result` with tokens/s and MFU, which is None where the peak of the GPU is not known."""
    tokens = spec["batch"] * spec["seq_len"] * spec["updates_a_lap"]
    rates = [tokens * len(seconds) / sum(seconds) for seconds in result["turns"]]
    median, shape = statistics.median(rates), spec["shape"]
    flops = flops_per_token(result["parameters"], shape["n_layers"], spec["seq_len"], shape["d_model"])
    if not math.isfinite(result["loss"]):
        return {"error": f"the loss is {result['loss']}"}
    mfu = median * flops / peak_flops(gpu or "")
    rate = {"median": median, "min": min(rates), "max": max(rates)}
    return result | {"tokens_per_second": rate, "mfu": mfu if mfu > 0 else None}


def why(failure: WorkerFailed, log: Path, late: bool) -> dict[str, str]:
    """What became of a contender that ended; a full memory is a result, not an error."""
    if late:
        return {"left_out": "cut off: no time"}
    full = log.is_file() and FULL.search(log.read_text(errors="replace"))
    return {"out_of_memory": str(failure)} if full else {"error": str(failure)}


def results(spec: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """Of every contender in every cell, in order, those too that were left out."""
    end = time.monotonic() + spec["seconds"]
    for number, cell in enumerate(cells(spec["models"], spec["ab"], spec["fixed"], spec["cut"], spec["before"])):
        home = folder / str(number)
        home.mkdir()
        cell_facts = cell_spec(spec, cell, home)
        about = {name: getattr(cell, name) for name in ("model", "packed", "dropout", "remat")}
        about |= {"rows": cell_facts["batch"], "seq_len": cell_facts["seq_len"], "overrides": dict(cell.overrides)}
        for contender in cell.contenders:
            shown = about | {"contender": contender}
            missing = [package for package in NEEDS[contender] if find_spec(package) is None]
            if missing or (not spec["cut"] and time.monotonic() > end - LEAST_SECONDS):
                yield shown | {"left_out": f"{', '.join(missing)} not installed" if missing else "no time"}
                continue
            if "data" not in cell_facts:
                made = dump_batches(cell_facts | {"contender": "ours"}, home / "batches.npz")
                cell_facts |= {"data": str(home / "batches.npz"), "bos_id": made["bos_id"]}
                cell_facts["shape"] = cell_facts["shape"] | {"vocab_size": made["vocab_size"]}
                about |= {"rows_filled": made["rows_filled"], "vocab_size": made["vocab_size"]}
            caches = home / f"{contender}_caches"
            linked_caches(caches, Path(spec["cache_dir"]))
            contender_spec = cell_facts | {"contender": contender, "cache_dir": str(caches)}
            try:
                found = measured(
                    contender, cell, contender_spec, environment(spec, contender, caches), spec["before"], end
                )
            except WorkerFailed as failure:
                yield about | {"contender": contender} | why(failure, home / f"{contender}.log", time.monotonic() > end)
                continue
            yield about | {"contender": contender} | summarized(found, contender_spec, spec["gpu"])


def main() -> None:
    spec, answer = json.loads(sys.argv[1]), answers()
    with tempfile.TemporaryDirectory() as folder:
        for result in results(spec, Path(folder)):
            answer(result)
            rate = result.get("tokens_per_second")
            shown = instead(result) if rate is None else f"{rate['median']:,.0f} tokens/s"
            say(f"  {result['contender']}, {speed_setting(result)}: {shown}")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # of this process, which only prepares text
    main()
