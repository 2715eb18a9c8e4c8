"""The start of a run: what will run, for people in a few lines, and for starts.jsonl in the run's folder."""

import dataclasses
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import jaxlm
from jaxlm.config.validate import profiled_steps
from jaxlm.data.loader import AnyRows, Rows
from jaxlm.data.mixture import Mixture
from jaxlm.data.streaming import StreamedRows
from jaxlm.monitor.metrics import model_flops_per_token
from jaxlm.monitor.sinks import open_lines
from jaxlm.ops import compiler
from jaxlm.ops.attention_kernels import why_not_fused
from jaxlm.ops.own_kernels import LOSS, left_to_xla
from jaxlm.ops.platform import cpu_has_bfloat16
from jaxlm.ops.reductions import logits_dtype
from jaxlm.parallel.mesh import show_row_shards
from jaxlm.train.assemble import Assembly, Resolved
from jaxlm.train.own_loss import name_of
from jaxlm.train.precision import compute_dtype, scales_loss
from jaxlm.train.schedules import Schedule, effective_warmup, schedule_end
from jaxlm.train.step import TrainState

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "datasets", "tokenizers", "numpy")


@dataclasses.dataclass(frozen=True)
class StartReport:
    """A run that is about to start, or to go on."""

    resolved: Resolved
    assembly: Assembly
    state: TrainState
    rows: AnyRows
    eval_rows: Mapping[str, Rows]
    data_fingerprint: str
    total_steps: int
    schedule: Schedule
    changed: dict[str, Any]  # {"section.field": [before, now]}: what the user has changed in the middle of the run

    @property
    def _devices(self) -> str:
        first = self.resolved.devices[0]
        return f"{len(self.resolved.devices)} x {first.device_kind} ({first.platform})"

    @cached_property
    def flops_per_token(self) -> float:
        """Of the training."""
        return model_flops_per_token(self.resolved.config, self.assembly.parameters, self.assembly.frozen)

    @property
    def _compiler(self) -> str | None:
        on_gpu = self.assembly.layout.platform == "gpu"
        return compiler.describe(self.resolved.config.training, self.assembly.options) if on_gpu else None

    def lines(self) -> Iterator[str]:
        """The report on stderr."""
        config, layout, steps = self.resolved.config, self.assembly.layout, self.total_steps
        model, training, global_batch = config.model, config.training, self.resolved.global_batch
        yield f"model: {self.assembly.parameters:,} parameters, vocabulary {model.vocab_size:,}"
        if self.assembly.frozen:
            adapters = f"adapters of rank {training.lora_rank} on {', '.join(training.lora_targets)}"
            what = f"all but {', '.join(training.freeze)}" if training.lora_rank is None else adapters
            yield f"trained: {self.assembly.parameters - self.assembly.frozen:,} of them, {what}"
        activations = f"recomputed ({model.remat_policy})" if model.gradient_checkpointing else "kept"
        yield f"layers: {'scanned' if model.scan_layers else 'unrolled'}, activations {activations}"
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        yield f"devices: {self._devices}{processes}"
        yield f"layout: {layout.describe()}"
        dtype = compute_dtype(training)
        widened = layout.platform == "cpu" and dtype == "bfloat16" and not cpu_has_bfloat16()
        in_float32 = " (multiplied in float32: this CPU has no bfloat16)" if widened else ""
        scaled = f", loss scale from {float(self.state.loss_scale.scale):g}" if scales_loss(training) else ""
        yield f"precision: float32 parameters, {dtype} compute{in_float32}{scaled}"
        in_16_bits = ", float16 logits" if logits_dtype(training, layout.platform) == "float16" else ""
        own = name_of(self.assembly.own_loss)
        loss = f"chunked cross entropy{in_16_bits}" if own is None else f"own loss ({own})"
        used = self.assembly.own_kernels - (frozenset() if own is None else {LOSS})
        ours = "".join(f", pallas {name}" for name in sorted(used, reverse=True))
        yield f"kernels: {self.assembly.attention} attention{ours}, {loss}"
        if not_fused := why_not_fused(config, self.resolved.capability):
            yield f"attention is not fused: {not_fused}"
        yield from left_to_xla(config, self.resolved.capability, frozenset() if own is None else frozenset({LOSS}))
        if self._compiler is not None:
            yield f"compiler: {self._compiler}"
        state = layout.bytes_of_state(self.assembly.abstract_state)
        yield f"memory: {state / 2**20:,.0f} MiB a device of parameters, optimizer and gradients"
        batches, tokens = self.resolved.batches, global_batch * config.data.max_length
        accumulated = training.gradient_accumulation_steps
        yield (
            f"batch: {training.batch_size} rows x {show_row_shards(self.resolved.mesh)} x "
            f"{accumulated} micro-batch{'es' * (accumulated > 1)} = {global_batch} rows, "
            f"{tokens:,} tokens"
        )
        for first, times in batches.schedule:
            ends = ", after the run's end" * (first >= steps)
            yield f"batch from update {first + 1:,} on: {times} x {global_batch} rows, {times * tokens:,} tokens{ends}"
        if isinstance(self.rows, Mixture):
            place, anneal = batches.position(steps), (self.resolved.anneal_row, config.data.anneal_from)
            yield from self.rows.describe(place, *anneal)
        warmup, end = effective_warmup(training, steps), schedule_end(training, steps)
        epochs = self.rows.epochs(batches.position(steps))
        of_text = "" if epochs is None else f" ({epochs:.2f} epochs)"
        yield f"steps: {steps:,}{of_text}, {training.lr_scheduler} schedule, {warmup} of warm-up"
        if training.max_steps is None and epochs is not None and epochs > 1.1 * training.num_epochs:
            last = batches.rows * batches.micro_batches(steps - 1)
            rows = f"the last update has {last} rows, the text {sum(map(len, self.rows.parts.values()))}"
            yield f"training.num_epochs ({training.num_epochs:g}): the run goes over more of the text than that; {rows}"
        if end != steps:
            yield f"the schedule ends at step {end:,}: the learning rate is {self.schedule(end):.3g} from there on"
        if warmup < training.warmup_steps:
            yield f"training.warmup_steps ({training.warmup_steps}) exceeds a tenth of the run: shortened to {warmup}"
        if training.profile_steps is not None and profiled_steps(training.profile_steps)[1] <= int(self.state.step):
            done = f"update {int(self.state.step):,} has been made"
            yield f"training.profile_steps ({training.profile_steps}): no profile, as {done}"

    def append_to(self, folder: Path) -> None:
        """Adds this start to starts.jsonl of the run in `folder`."""
        part_of_it = {"measured_on": "first shard"} if isinstance(self.rows, StreamedRows) else {}
        rows = folder / "metrics.jsonl"
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": _command(sys.orig_argv),
            "commit": _commit(Path(__file__).parents[2]),
            "versions": {"jaxlm": jaxlm.__version__, "python": platform.python_version()}
            | {package: version(package) for package in PACKAGES},
            "system": f"{platform.system()} {platform.machine()}",
            "step": int(self.state.step),
            "total_steps": self.total_steps,
            "metrics_lines": rows.read_bytes().count(b"\n") if rows.exists() else 0,  # of earlier starts
            "parameters": self.assembly.parameters,
            "flops_per_token": self.flops_per_token,
            "devices": self._devices,
            "processes": jax.process_count(),
            "layout": self.assembly.layout.describe(),
            "attention": self.assembly.attention,
            "own_kernels": ", ".join(sorted(self.assembly.own_kernels)),
            "own_loss": name_of(self.assembly.own_loss),
            "compiler": self._compiler,
            "rows_an_update": self.resolved.global_batch,
            "batch_schedule": ",".join(self.resolved.config.training.batch_schedule),
            "changed": self.changed,
            "data_fingerprint": self.data_fingerprint,
            "train": _packing(self.rows.parts) | part_of_it,
            "validation": _packing(self.eval_rows) if self.eval_rows else {},
        }
        with open_lines(folder / "starts.jsonl") as file:
            file.write(json.dumps(start) + "\n")


def _command(words: list[str]) -> str:
    """What was typed: `python FILE ...`, or `jaxlm ...` where that is installed as a command."""
    installed = len(words) > 1 and Path(words[1]).name == "jaxlm"
    return shlex.join(["jaxlm", *words[2:]] if installed else ["python", *words[1:]])


def _commit(folder: Path) -> str | None:
    """The git commit checked out in `folder`, "-dirty" if files of it have changed; None if it is no clone."""
    in_folder = ["git", "-C", str(folder), "--git-dir=.git"]  # without the last, git looks in the folders above, too
    command = [*in_folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _packing(parts: Mapping[str, Rows]) -> dict[str, int | float]:
    """How documents were put into rows, of all sources together; `tokens` are those that the rows hold."""
    plans = [rows.plan for rows in parts.values()]
    counts = ("documents", "cut_documents", "dropped_documents", "dropped_tokens")
    rows, length, tokens = sum(map(len, plans)), plans[0].max_length, sum(plan.pairs for plan in plans)
    size = {"rows": rows, "row_length": length, "tokens": tokens, "fill": tokens / (rows * length)}
    return size | {name: sum(getattr(plan, name) for plan in plans) for name in counts}
