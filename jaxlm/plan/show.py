"""The plan's tables, for people."""

from jaxlm.plan.memory import MADE_OF, Memory
from jaxlm.plan.plan import Plan
from jaxlm.plan.predict import Prediction, Share
from jaxlm.plan.search import Trial

MOST_KERNELS = 20
PREDICTED = (
    "predicted, not measured (docs/plan.md): of the one update that has been measured, GPT-2 124M on an H200, "
    "it says 64 ms and 11.7 GiB where it took 70 ms and 11.9 GiB"
)


def size(value: int) -> str:
    """Bytes in GiB, below one in MiB."""
    unit, name = (2**30, "GiB") if value >= 2**30 else (2**20, "MiB")
    return f"{value / unit:.2f} {name}"


def memory(found: Memory) -> list[str]:
    """A line for each part that is there, and their sum."""
    there = [(part, getattr(found, part), made_of) for part, made_of in MADE_OF.items() if getattr(found, part)]
    lines = [f"{part:13}{size(value):>12}  {made_of}" for part, value, made_of in there]
    return [*lines, f"{'total':13}{size(found.total):>12}  at the peak"]


def plan(made: Plan, price: float | None) -> str:
    """The whole plan."""
    where = f"{made.devices} x {made.gpu}" + (f" on {made.hosts} hosts" if made.hosts > 1 else "")
    ours = "".join(f", pallas {name}" for name in made.own_kernels)
    verdict = "fits" if made.fits else "DOES NOT FIT"
    lines = [
        f"{where}, {made.attention} attention{ours}, compiled by jax {made.jax}",
        "",
        "memory of each GPU",
        *memory(made.memory),
        f"{verdict} into {size(made.usable_bytes)}, the share that JAX takes (training.memory_fraction); CUDA"
        f"{' and NCCL' if made.devices > 1 else ''} may take {size(made.overhead_bytes)} more",
        "",
        "time (predicted)",
        *_time(made, price),
        "",
        *_parts(made.parts, made.seconds_per_update, made.exposed_seconds),
    ]
    for kind, moved in made.collectives.items():
        if moved >= 1e6:  # not the loss, the norm and other single numbers
            lines.append(f"{kind}: {moved / 1e9:.2f} GB, {made.beside_collectives.get(kind, 0):,} kernels beside it")
    lines += [f"warning: {text}" for text in made.warnings]
    return "\n".join([*lines, *(f"note: {text}" for text in made.notes), f"note: {PREDICTED}"])


def _time(made: Plan, price: float | None) -> list[str]:
    each = f" ({made.tokens_per_second / made.devices:,.0f} a GPU)" if made.devices > 1 else ""
    lines = [
        f"{made.seconds_per_update * 1e3:,.1f} ms an update of {made.tokens_per_update:,} tokens; "
        f"{made.tokens_per_second:,.0f} tokens/s{each}; MFU {made.mfu:.1%}"
    ]
    hours = made.hours if made.hours is not None else 1e9 / made.tokens_per_second / 3600
    what = "all updates (training.max_steps)" if made.hours is not None else "a billion tokens"
    cost = "" if price is None else f", at a cost of {hours * made.devices * price:,.2f}"
    lines.append(f"{what}: {hours:,.2f} hours{cost}, without evaluations and saving")
    return lines


def _parts(parts: dict[str, Share], whole: float, exposed: float) -> list[str]:
    lines = [f"{'where it goes':14}{'ms':>9}{'share':>7}{'GB':>10}{'TFLOP':>9}{'kernels':>9}"]
    for part, share in sorted(parts.items(), key=lambda item: -item[1].seconds):
        lines.append(_row(part, share, whole))
    if exposed:
        lines.append(f"{'waiting':14}{exposed * 1e3:9.2f}{exposed / whole:7.1%}  for communication that nothing hides")
    return lines


def _row(name: str, share: Share, whole: float) -> str:
    time = f"{share.seconds * 1e3:9.2f}{share.seconds / whole:7.1%}"
    return f"{name:14}{time}{share.bytes / 1e9:10.2f}{share.flops / 1e12:9.3f}{share.kernels:9,}"


def slowest(found: Prediction) -> str:
    """The kernels that take longest, those of one kind and line together."""
    lines = [f"{'kernels':36}{'ms':>9}{'share':>7}{'GB':>10}{'TFLOP':>9}{'calls':>9}  line in jaxlm/"]
    ranked = sorted(found.slowest.items(), key=lambda item: -item[1].seconds)
    for (family, part, source), share in ranked[:MOST_KERNELS]:
        lines.append(f"{_row(f'{family[:24]} ({part[:8]})'.ljust(36), share, found.seconds)}  {source}")
    return "\n".join(lines)


def trials(found: list[Trial]) -> str:
    """The best ten of a search, and the options of the best."""
    lines = [f"{'tokens/s':>12}{'MFU':>7}{'memory':>12}  options (predicted, not measured)"]
    for trial in found[:10]:
        made = trial.plan
        lines.append(f"{made.tokens_per_second:12,.0f}{made.mfu:7.1%}{size(made.memory_bytes):>12}  {trial.options}")
    return "\n".join([*lines, f"best: {found[0].options}"])
