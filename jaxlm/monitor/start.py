"""The start of a run: what will run, for people in a few lines, and for starts.jsonl in the run's folder."""

import dataclasses
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

import jaxlm
from jaxlm.config import Config
from jaxlm.data.loader import Rows
from jaxlm.data.packing import Plan
from jaxlm.monitor.sinks import open_lines
from jaxlm.ops.platform import cpu_has_bfloat16
from jaxlm.train.optim import Schedule, effective_warmup, schedule_end
from jaxlm.train.precision import compute_dtype

FILE = "starts.jsonl"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "datasets", "tokenizers", "numpy")


@dataclasses.dataclass(frozen=True)
class Start:
    """A run that is about to start, or to go on."""

    config: Config  # resolved
    devices: Sequence[jax.Device]
    layout: str  # in words
    attention: str  # kernel
    not_fused: str | None  # why it is no fused one, on GPUs
    compiler: str | None  # what was asked of XLA, on GPUs
    parameters: int
    bytes_of_state: int  # on a device: parameters, optimizer, gradients
    loss_scale: float | None  # float16's
    rows: Rows
    eval_rows: Rows
    data_fingerprint: str
    row_shards: str  # in words: what a micro-batch's rows are split over
    global_batch: int  # rows an update
    step: int  # updates done
    total_steps: int
    schedule: Schedule

    @property
    def _devices(self) -> str:
        return f"{len(self.devices)} x {self.devices[0].device_kind} ({self.devices[0].platform})"

    def lines(self) -> Iterator[str]:
        """The report on stderr."""
        model, training = self.config.model, self.config.training
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        layers = "scanned" if model.scan_layers else "unrolled"
        remat = f"recomputed ({model.remat_policy})" if model.gradient_checkpointing else "kept"
        scaled = f", loss scale from {self.loss_scale:g}" if self.loss_scale is not None else ""
        yield f"model: {self.parameters:,} parameters, vocabulary {model.vocab_size:,}"
        yield f"layers: {layers}, activations {remat}"
        yield f"devices: {self._devices}{processes}"
        yield f"layout: {self.layout}"
        dtype = compute_dtype(training)
        instead = self.devices[0].platform == "cpu" and dtype == "bfloat16" and not cpu_has_bfloat16()
        in_float32 = " (multiplied in float32: this CPU has no bfloat16)" if instead else ""
        yield f"precision: float32 parameters, {dtype} compute{in_float32}{scaled}"
        yield f"kernels: {self.attention} attention, chunked cross entropy"
        if self.not_fused is not None:
            yield f"attention is not fused: {self.not_fused}"
        if self.compiler is not None:
            yield f"compiler: {self.compiler}"
        yield (f"memory: {self.bytes_of_state / 2**20:,.0f} MiB a device of parameters, optimizer and gradients")
        accumulated = training.gradient_accumulation_steps
        yield (
            f"batch: {training.batch_size} rows x {self.row_shards} x "
            f"{accumulated} micro-batch{'es' * (accumulated > 1)} = {self.global_batch} rows, "
            f"{self.global_batch * self.config.data.max_length:,} tokens"
        )
        yield from self._lines_of_schedule()

    def _lines_of_schedule(self) -> Iterator[str]:
        training, steps = self.config.training, self.total_steps
        warmup, end = effective_warmup(training, steps), schedule_end(training, steps)
        yield (
            f"steps: {steps:,} ({steps * self.global_batch / len(self.rows):.2f} epochs), "
            f"{training.lr_scheduler} schedule, {warmup} of warm-up"
        )
        if end != steps:
            last = float(self.schedule(jax.numpy.int32(end)))
            yield f"the schedule ends at step {end:,}: the learning rate is {last:.3g} from there on"
        if warmup < training.warmup_steps:
            yield f"training.warmup_steps ({training.warmup_steps}) exceeds a tenth of the run: shortened to {warmup}"

    def append_to(self, folder: Path) -> None:
        """Adds this start to starts.jsonl of the run in `folder`."""
        facts = of_program() | {
            "step": self.step,
            "total_steps": self.total_steps,
            "parameters": self.parameters,
            "devices": self._devices,
            "processes": jax.process_count(),
            "layout": self.layout,
            "attention": self.attention,
            "compiler": self.compiler,
            "rows_an_update": self.global_batch,
            "data_fingerprint": self.data_fingerprint,
            "train": of_plan(self.rows.plan),
            "validation": of_plan(self.eval_rows.plan),
        }
        with open_lines(folder / FILE) as file:
            file.write(json.dumps(facts) + "\n")


def of_program() -> dict[str, Any]:
    """The command, and the versions of what it runs on."""
    found = {name: installed for name in PACKAGES if (installed := _version(name)) is not None}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": _command(sys.orig_argv),
        "commit": commit_of(Path(__file__).parents[2]),
        "versions": {"jaxlm": jaxlm.__version__, "python": platform.python_version()} | found,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _command(words: list[str]) -> str:
    """What was typed: `python FILE ...`, or `jaxlm ...` where that is installed as a command."""
    installed = len(words) > 1 and Path(words[1]).name == "jaxlm"
    return shlex.join(["jaxlm", *words[2:]] if installed else ["python", *words[1:]])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit_of(folder: Path) -> str | None:
    """The git commit checked out in `folder`, "-dirty" if files of it have changed; none if it is no clone."""
    if not (folder / ".git").exists():  # git would look in the folders above, too
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def of_plan(plan: Plan) -> dict[str, int | float]:
    """How documents were put into rows; `tokens` are those that the rows hold."""
    return {
        "rows": len(plan),
        "row_length": plan.max_length,
        "tokens": plan.pairs,
        "fill": plan.efficiency,
        "documents": plan.documents,
        "cut_documents": plan.cut_documents,
        "dropped_documents": plan.dropped_documents,
        "dropped_tokens": plan.dropped_tokens,
    }
