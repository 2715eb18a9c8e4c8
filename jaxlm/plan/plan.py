"""What a run will take on GPUs that are not here: memory, time, and where the time goes."""

import dataclasses
from typing import Any

import jax

from jaxlm.config import Config, shown
from jaxlm.monitor.metrics import model_flops_per_token
from jaxlm.ops.attention_kernels import why_not_fused
from jaxlm.ops.own_kernels import left_to_xla
from jaxlm.parallel.gpus import GPUS
from jaxlm.plan import hlo, memory
from jaxlm.plan.predict import Cluster, Prediction, Share, predict
from jaxlm.plan.program import CompiledUpdate, compile_update, resolve_for
from jaxlm.plan.targets import CUDA_BYTES, NCCL_BYTES, target_name
from jaxlm.train.assemble import Resolved

ASSUMED = "attention: the efficiency of pallas, which has been measured, is taken for mosaic's, which has not"
MUCH = 0.02  # of an update's bytes or seconds: from here on a warning is worth reading


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of one update, predicted; bytes, FLOPs and kernels are a device's."""

    gpu: str
    devices: int
    hosts: int
    attention: str
    own_kernels: tuple[str, ...]  # what else this package's kernels do
    jax: str
    memory: memory.Memory
    memory_bytes: int  # at the peak
    usable_bytes: int  # of the GPU, by training.memory_fraction
    overhead_bytes: int  # what CUDA, cuDNN and NCCL take beside it
    fits: bool
    hbm_bytes: int  # read and written
    flops: int
    kernels: int
    collectives: dict[str, int]  # kind -> bytes of whole arrays
    beside_collectives: dict[str, int]  # kind -> kernels that run between its start and its end
    seconds_per_update: float
    communication_seconds: float
    exposed_seconds: float  # of them, what kernels wait for
    tokens_per_update: int
    tokens_per_second: float  # of all devices
    mfu: float
    hours: float | None  # of training.max_steps updates
    parts: dict[str, Share]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object, `memory` by its parts."""
        return dataclasses.asdict(self)


def plan(config: Config, gpu: str, devices: int = 1, hosts: int = 1) -> Plan:
    """Compiles the update of `config` for `devices` GPUs on `hosts` hosts and predicts what it takes.

    Raises:
      UserError: an unknown GPU, a configuration that is not valid or does not fit the devices, no compiler for GPUs.
    """
    name = target_name(gpu)
    resolved = resolve_for(config, name, devices, hosts)
    return plan_of(resolved, compile_update(resolved, name, hosts), Cluster(name, devices, hosts))[0]


def plan_of(resolved: Resolved, compiled: CompiledUpdate, cluster: Cluster) -> tuple[Plan, Prediction]:
    """The plan of the largest update of a run, which is compiled, and the prediction that it is made from."""
    config, program, largest = resolved.config, hlo.parse(compiled.text), resolved.at_largest_batch()
    found, takes = predict(program, cluster), memory.of_program(largest, compiled)
    training = config.training
    total, whole = found.total, GPUS[cluster.gpu].memory_mib * 2**20
    usable = memory.usable(whole, training.memory_fraction)
    overhead = CUDA_BYTES + (NCCL_BYTES if cluster.devices > 1 else 0)
    tokens = largest.global_batch * config.data.max_length
    updates = training.max_steps and resolved.batches.position(training.max_steps) / largest.global_batch
    sizes = f"an update is the largest of training.batch_schedule ({shown(training.batch_schedule)})"
    assumed = [ASSUMED] if compiled.attention == "mosaic" else []
    rate = tokens / found.seconds
    needed = model_flops_per_token(config, *memory.parameters(resolved))
    made = Plan(
        gpu=cluster.gpu,
        devices=cluster.devices,
        hosts=cluster.hosts,
        attention=compiled.attention,
        own_kernels=compiled.own_kernels,
        jax=jax.__version__,
        memory=takes,
        memory_bytes=takes.total,
        usable_bytes=usable,
        overhead_bytes=overhead,
        fits=takes.total <= usable and overhead <= whole - usable,
        hbm_bytes=total.bytes,
        flops=total.flops,
        kernels=total.kernels,
        collectives=dict(found.collectives),
        beside_collectives=dict(found.beside),
        seconds_per_update=found.seconds,
        communication_seconds=found.communication,
        exposed_seconds=found.exposed,
        tokens_per_update=tokens,
        tokens_per_second=rate,
        mfu=rate * needed / (cluster.devices * GPUS[cluster.gpu].peak),
        hours=None if updates is None else updates * found.seconds / 3600,
        parts=found.parts,
        warnings=tuple(_warnings(resolved, program, found, compiled)),
        notes=(*resolved.notes, *compiled.notes, *([sizes] * bool(training.batch_schedule)), *assumed),
    )
    return made, found


def _warnings(resolved: Resolved, program: hlo.Program, found: Prediction, compiled: CompiledUpdate) -> list[str]:
    """What the program does that a user can change, or would want to know of."""
    lines = []
    total, config = found.total, resolved.config
    if compiled.attention == "blockwise":
        why = why_not_fused(config, resolved.capability) or "model.attention asks for it"
        lines.append(f"attention is blockwise, without a fused kernel: {why}")
    lines += left_to_xla(config, resolved.capability)
    gathered = copied = 0
    for x, computation, times in program.run():
        if x.collective == "all-gather" and x.arrays[-1][0] == "f32" and config.training.use_amp:
            gathered += hlo.collective_bytes(x, computation) * times
        if x.opcode == "copy" and not x.attributes.count("op_name"):
            copied += 2 * x.bytes * times
    if gathered > 0.1 * sum(found.collectives.values()):
        lines.append(f"{gathered / 1e9:.1f} GB of parameters are gathered in float32, twice what 16 bits would take")
    if copied > MUCH * total.bytes:
        lines.append(f"{copied / 1e9:.1f} GB are copies that the compiler adds, mostly of arrays that loops carry")
    if found.exposed > 5 * MUCH * found.seconds:
        advice = "larger micro-batches (training.batch_size), a lower zero_stage, or xla_preset overlap"
        lines.append(
            f"{found.exposed / found.seconds:.0%} of the time is communication that nothing hides; {advice} may help"
        )
    return lines
