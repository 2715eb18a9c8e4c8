"""What every layout of the training state holds and moves, against ZeRO's theory, on fake CPU devices.

    python benchmarks/collectives.py [--devices 8] [--steps 20] [--json FILE] [--d_model 128 ...]

For each ZeRO stage, hybrid ZeRO and tensor parallelism, with 1 and K micro-batches: the losses of some updates against
those of one device, the bytes that a device holds of parameters, gradients and optimizer state (of the real arrays),
and the bytes of each collective in the compiled update, loops counted as often as they run. Volumes are in multiples of
the parameters' bytes in float32; an all-reduce counts twice its size, as it is a reduce-scatter and an all-gather.
"""

import argparse
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig
from jaxlm.parallel.layout import bytes_a_device
from jaxlm.parallel.mesh import TRAIN_BATCH, make_mesh
from jaxlm.plan import hlo
from jaxlm.train.assemble import Resolved, assemble
from jaxlm.train.schedules import build_schedule

LENGTH = 32  # tokens of a row
SMALLEST = 65  # bytes of a collective that counts: the loss, the norm and other single numbers are not meant


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout: devices along (replica, data, tensor), the ZeRO stage, the micro-batches of an update."""

    mesh: tuple[int, int, int]
    stage: int
    k: int

    @property
    def name(self) -> str:
        kind = "hybrid, " if self.mesh[0] > 1 else "tensor, " if self.mesh[2] > 1 else ""
        return f"{kind}stage {self.stage}"


def cases(n: int) -> list[Case]:
    plain = [Case((1, n, 1), stage, k) for k in (1, 4) for stage in range(4)]
    hybrid = [Case((2, n // 2, 1), stage, 4) for stage in (2, 3)]
    tensor = [Case((1, n // 2, 2), stage, 4) for stage in (0, 3)]
    return [*plain, *hybrid, *tensor]


def theory_held(case: Case, parameters: int) -> dict[str, float]:
    """Bytes a device: float32 parameters, gradients, two moments; shards are divided by "data", all by "tensor"."""
    _, data, tensor = case.mesh
    sharded = lambda stage: data if case.stage >= stage else 1  # noqa: E731
    parts = {"parameters": 4 / sharded(3), "gradients": 4 / sharded(2), "optimizer": 8 / sharded(1)}
    return {name: parameters / tensor * factor for name, factor in parts.items()}


def theory_moved(case: Case) -> float | None:
    """Parameters' bytes that ZeRO moves between the devices of a group, in float32 (arXiv:1910.02054, section 7).

    Stages 0 and 1 reduce gradients once an update, stage 2 every micro-batch, as its shards are all that is kept;
    stage 3 gathers parameters for the forward and the backward pass of every micro-batch too. Replicas then sum their
    shards. None: tensor parallelism moves activations, which have nothing to do with parameters.
    """
    replicas, data, tensor = case.mesh
    if tensor > 1:
        return None
    return {0: 2, 1: 2, 2: case.k + 1, 3: 3 * case.k}[case.stage] + (2 / data if replicas > 1 else 0)


def example_config(case: Case, options: argparse.Namespace) -> Config:
    model = ModelConfig(
        vocab_size=options.vocab_size,
        d_model=options.d_model,
        n_heads=4,
        n_layers=options.n_layers,
        d_ff=4 * options.d_model,
        max_seq_len=LENGTH,
        scan_layers=case.stage == 3,  # as by default: XLA on CPU merges the two gatherings of unrolled layers
    )
    replicas, data, _ = case.mesh
    training = TrainingConfig(
        batch_size=options.rows // (case.k * replicas * data),
        gradient_accumulation_steps=case.k,
        zero_stage=case.stage,
        use_amp=False,
        warmup_steps=0,
        learning_rate=1e-2,
        eps=1e-4,
    )
    return Config(model=model, training=training, data=DataConfig(max_length=LENGTH))


def batches(case: Case, options: argparse.Namespace) -> Iterator[dict[str, np.ndarray]]:
    """The same rows for every case, in `case.k` micro-batches: [K, rows / K, LENGTH] of int32."""
    rng = np.random.default_rng(0)
    for _ in range(options.steps):
        tokens, targets = rng.integers(3, options.vocab_size, (2, options.rows, LENGTH))
        batch = {"tokens": tokens % 7 + targets % 2, "targets": tokens % 7, "segments": tokens // tokens}
        batch["positions"] = np.tile(np.arange(LENGTH), (options.rows, 1))
        batch = {name: x.astype(np.int32).reshape(case.k, -1, LENGTH) for name, x in batch.items()}
        batch["rows"] = np.arange(options.rows, dtype=np.int32).reshape(case.k, -1)
        yield batch


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Losses of `options.steps` updates, and the bytes that a device holds and that an update moves."""
    config = example_config(case, options)
    mesh = make_mesh(jax.devices()[: math.prod(case.mesh)], case.mesh)
    assembly = assemble(Resolved(config, mesh))
    numbers = assembly.numbers(config.training)
    state, abstract = assembly.init(numbers), assembly.abstract_state
    held = {
        "parameters": on_first_device(state.params),
        "gradients": assembly.layout.bytes_of_state(abstract) - bytes_a_device(abstract),
        "optimizer": on_first_device(state.opt_state),
    }
    parameters, step, losses = assembly.parameters, assembly.compiled_step, []
    schedule = build_schedule(config.training, 100)
    for i, host_batch in enumerate(batches(case, options)):
        batch = jax.device_put(host_batch, NamedSharding(mesh, TRAIN_BATCH))
        state, metrics = step(state, batch, numbers | {"learning_rate": np.float32(schedule(i))})
        losses.append(float(metrics["loss"]))
    moved = hlo.bytes_moved(hlo.parse(step.as_text()), at_least=SMALLEST)
    return {
        "case": dataclasses.asdict(case) | {"name": case.name},
        "parameters": parameters,
        "losses": losses,
        "held": held,
        "theory_held": theory_held(case, parameters),
        "moved": {kind: size / (4 * parameters) for kind, size in moved.items()},
        "theory_moved": theory_moved(case),
    }


def on_first_device(tree: Any) -> int:
    """Bytes of the shards that really are on the first device."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards if shard.device == first
    )


def tables(results: list[dict[str, Any]], reference: list[float]) -> str:
    """Both tables, in Markdown."""
    lines = [
        "| layout | K | largest difference of a loss | parameters | gradients | optimizer | of theory |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        case, held, theory = result["case"], result["held"], result["theory_held"]
        off = max(abs(a - b) / b for a, b in zip(result["losses"], reference, strict=True))
        ratio = sum(held.values()) / sum(theory.values())
        sizes = " | ".join(f"{size / 1024:,.0f} KiB" for size in held.values())
        lines.append(f"| {label(case)} | {case['k']} | {off:.0e} | {sizes} | {ratio:.3f} |")
    lines += [
        "",
        f"| layout | K | {' | '.join(hlo.COLLECTIVES)} | sum | theory |",
        "|---|---:|" + "---:|" * (len(hlo.COLLECTIVES) + 2),
    ]
    for result in results:
        volumes = [result["moved"].get(kind, 0.0) for kind in hlo.COLLECTIVES]
        cells = " | ".join(f"{v:.2f}" for v in [*volumes, sum(volumes)])
        lines.append(f"| {label(result['case'])} | {result['case']['k']} | {cells} | {result['theory_moved'] or ''} |")
    return "\n".join(lines)


def label(case: dict[str, Any]) -> str:
    shape = " x ".join(str(n) for n in case["mesh"])
    return f"{case['name']} ({shape})"


def cases_named(text: str, n: int) -> list[Case]:
    """The cases in whose name the regular expression `text` is found."""
    return [case for case in cases(n) if re.search(text, f"{case.name}, K={case.k}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "devices": 8,
        "steps": 20,
        "rows": 32,
        "d_model": 128,
        "n_layers": 4,
        "vocab_size": 512,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="", help="regular expression for names such as 'hybrid, stage 2, K=4'")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    reference = measure(Case((1, 1, 1), 0, 1), options)["losses"]
    results = [measure(case, options) for case in cases_named(options.only, options.devices)]
    print(tables(results, reference))
    if options.json:
        options.json.write_text(json.dumps({"reference": reference, "results": results}, indent=1))


if __name__ == "__main__":
    main()
