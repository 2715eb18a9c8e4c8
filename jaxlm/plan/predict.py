"""How long a compiled update takes on its GPUs: each kernel at the slower of its two limits, and the communication.

A roofline of single kernels (Williams et al. 2009, doi:10.1145/1498765.1498785) over the program as XLA scheduled it.
Collectives run beside kernels between their start and their end; what is not done by then is waited for.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

from jaxlm.parallel.gpus import GPUS
from jaxlm.plan import targets
from jaxlm.plan.hlo import Instruction, Program, collective_bytes
from jaxlm.plan.kernels import PARTS, Kernel, kernel_of
from jaxlm.plan.targets import TARGETS


@dataclass
class Share:
    """Of an update."""

    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0
    kernels: int = 0


@dataclass
class Prediction:
    """An update of one device."""

    seconds: float = 0.0
    parts: dict[str, Share] = field(default_factory=lambda: {part: Share() for part in PARTS})
    communication: float = 0.0  # s of collectives, hidden or not
    exposed: float = 0.0  # s that kernels wait for them
    collectives: Counter[str] = field(default_factory=Counter)  # kind -> bytes of whole arrays
    beside: Counter[str] = field(default_factory=Counter)  # kind -> kernels between its starts and its ends
    slowest: dict[tuple[str, str, str], Share] = field(default_factory=lambda: defaultdict(Share))

    @property
    def total(self) -> Share:
        shares = self.parts.values()
        sums = (sum(getattr(share, name) for share in shares) for name in ("seconds", "bytes", "flops", "kernels"))
        return Share(*sums)


@dataclass(frozen=True)
class Cluster:
    gpu: str  # of TARGETS
    devices: int
    hosts: int


def predict(program: Program, cluster: Cluster) -> Prediction:
    """The time of an update, and what it is made of."""
    found = Prediction()
    found.seconds = _run(program, program.entry, 1, cluster, found)
    return found


def kernel_seconds(kernel: Kernel, gpu: str) -> float:
    """The time of one call at the slower of its limits, with the gap before it."""
    target, peak = TARGETS[gpu], GPUS[gpu].peak
    if kernel.attention is not None:  # measured whole; what its programs load again comes from the cache
        return kernel.flops / (peak * targets.ATTENTION_EFFICIENCY[kernel.attention]) + targets.KERNEL_GAP
    by_memory = kernel.bytes / (target.bandwidth * targets.MEMORY_EFFICIENCY)
    by_products = (kernel.flops_16 + 2 * kernel.flops_32) / (peak * target.products)
    return max(by_memory, by_products) + targets.KERNEL_GAP


def _run(program: Program, name: str, times: int, cluster: Cluster, found: Prediction) -> float:
    """Seconds of one run of a computation that runs `times` times; adds what all of them take to `found`."""
    now = link_free = 0.0
    ends: dict[str, tuple[float, str, int]] = {}
    kernels = 0
    computation = program.computations[name]
    for x in computation.instructions.values():
        if x.opcode in ("while", "call", "conditional"):
            now += sum(x.trips * _run(program, inner, times * x.trips, cluster, found) for inner in x.calls)
        elif x.collective is not None:
            size = collective_bytes(x, computation)
            seconds = collective_seconds(x.collective, size, group_of(x, cluster), cluster)
            link_free = max(link_free, now) + seconds
            ends[x.name] = (link_free, x.collective, kernels)
            found.communication += seconds * times
            found.collectives[x.collective] += size * times
            if not x.opcode.endswith("-start"):
                now = _wait(ends.pop(x.name), now, kernels, times, found)
        elif x.opcode.endswith("-done") and x.operands and x.operands[0] in ends:
            now = _wait(ends.pop(x.operands[0]), now, kernels, times, found)
        elif (kernel := kernel_of(x, computation, program)) is not None:
            kernels += 1
            now += _add(kernel, times, cluster.gpu, found)
    return now


def _wait(end: tuple[float, str, int], now: float, kernels: int, times: int, found: Prediction) -> float:
    until, kind, before = end
    found.beside[kind] += (kernels - before) * times
    found.exposed += max(0.0, until - now) * times
    return max(now, until)


def _add(kernel: Kernel, times: int, gpu: str, found: Prediction) -> float:
    seconds = kernel_seconds(kernel, gpu)
    family = re.sub(r"[.\d]+$", "", kernel.name)
    for share in (found.parts[kernel.part], found.slowest[family, kernel.part, kernel.source]):
        share.seconds += seconds * times
        share.bytes += kernel.bytes * times
        share.flops += kernel.flops * times
        share.kernels += times
    return seconds


def group_of(x: Instruction, cluster: Cluster) -> list[int]:
    """The first group of devices that take part in a collective, from however XLA writes them."""
    text = x.attributes
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(d) for d in found[1].split(",")]
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = np.arange(cluster.devices).reshape([int(d) for d in found[2].split(",")])
        if found[3]:
            ids = ids.transpose([int(d) for d in found[3].split(",")])
        return [int(i) for i in ids.reshape(-1, int(found[1]))[0]]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):  # jax 0.11
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        along = [axis for axis in sizes if f"'{axis}'" in found[2]]
        ids = np.arange(cluster.devices).reshape(list(sizes.values()))
        first = ids[tuple(slice(None) if axis in along else 0 for axis in sizes)]
        return [int(i) for i in first.ravel()]
    return list(range(cluster.devices))


def collective_seconds(kind: str, size: int, group: list[int], cluster: Cluster) -> float:
    """Time of a ring of the group's devices: (n - 1) / n of the array over each link, an all-reduce twice.

    Between hosts every GPU has a network card of its own; those of a host share theirs where the group has them all.
    """
    n, a_host = len(group), cluster.devices // cluster.hosts
    if n == 1:
        return 0.0
    link = TARGETS[cluster.gpu].link
    here = sum(device // a_host == group[0] // a_host for device in group)
    if here < n:
        link = min(link, targets.HOST_LINK * here) if here > 1 else targets.HOST_LINK
    passes = 2 if kind == "all-reduce" else 1
    return passes * size * (n - 1) / n / (link * targets.LINK_EFFICIENCY)
