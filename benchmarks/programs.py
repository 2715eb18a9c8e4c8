"""Guards what the compiler makes of four updates: memory, bytes, kernels and collectives, as compiled for H100s.

    python benchmarks/programs.py          # fails where one is more than 1% above the committed table
    python benchmarks/programs.py --write  # rewrites results/programs.json; the commit says why
    python benchmarks/programs.py --docs   # prints the table of docs/memory.md
    python benchmarks/programs.py --ingredients  # and that of docs/recipes.md

No GPU is needed, but the compiler for it (the extra "plan"), and the JAX that the table was made with.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

from jaxlm.config import load_config, replace_fields
from jaxlm.plan.plan import Plan, plan
from jaxlm.plan.targets import usual_hosts
from jaxlm.run.setup import resolve

TABLE = Path(__file__).parent / "results" / "programs.json"
GROWTH = 1.01  # at most
TWO_ROWS = {"training.batch_size": 2, "training.gradient_accumulation_steps": 16}
PROGRAMS: dict[str, tuple[str, int, dict[str, Any]]] = {  # name -> (configuration, GPUs, its differences)
    "124m": ("gpt2_124m", 1, {"training.batch_size": 32, "training.gradient_accumulation_steps": 1}),
    "medium": ("medium", 1, {}),
    "1300m, stage 2": ("gpt2_1300m", 8, TWO_ROWS | {"training.zero_stage": 2}),
    "1300m, stage 3": ("gpt2_1300m", 8, TWO_ROWS | {"training.zero_stage": 3}),
}
DOCS: list[tuple[str, int, dict[str, Any]]] = [
    ("medium", 1, {}),
    ("gpt2_124m", 1, {}),
    ("llama_125m", 1, {}),
    ("gpt2_350m", 1, {}),
    ("large", 8, {}),
    ("gpt2_350m", 8, {}),
    *(("gpt2_1300m", 8, {"training.zero_stage": stage}) for stage in (1, 2, 3)),
    ("gpt2_1300m", 64, {}),
    ("gpt2_6700m", 8, {}),
    ("gpt2_6700m", 64, {}),
    ("gpt2_6700m", 512, {}),
]
INGREDIENTS: dict[str, dict[str, Any]] = {  # each beside configs/speedrun_124m.py with one micro-batch an update
    "the recipe": {},
    "learned positions": {"model.positions": "learned"},
    "LayerNorm": {"model.norm": "layernorm"},
    "norms without scales": {"model.norm_scale": False},
    "biases": {"model.use_bias": True},
    "queries and keys not normalised": {"model.qk_norm": False},
    "relu2": {"model.activation": "relu2"},
    "capped logits": {"model.logit_softcap": 15.0},
    "zero-initialised outputs": {"model.zero_init_outputs": True},
    "value embedding": {"model.value_embedding": True},
    "AdamW": {"training.optimizer": "adamw"},
    "NorMuon": {"training.optimizer": "normuon"},
    "polar_express": {"training.muon_coefficients": "polar_express"},
    "embeddings' own rate": {"training.embedding_lr_ratio": 2.0},
    "cautious decay": {"training.cautious_decay": True},
    "an average": {"training.ema_decay": 0.999},
}


def print_ingredients() -> None:
    """Memory and bytes of the update of a recipe with one thing changed, on one H100, as Markdown."""
    base = replace_fields(load_config("speedrun_124m"), {"training.gradient_accumulation_steps": 1})
    print("| an update with | GiB | GB moved | kernels | predicted ms |")
    print("|---|--:|--:|--:|--:|", flush=True)
    for name, fields in INGREDIENTS.items():
        found = plan(replace_fields(base, fields), "H100")
        size, moved = found.memory_bytes / 2**30, found.hbm_bytes / 1e9
        time = f"{found.seconds_per_update * 1e3:.1f}"
        print(f"| {name} | {size:.2f} | {moved:.1f} | {found.kernels:,} | {time} |", flush=True)


def measure(name: str) -> dict[str, int]:
    """What is guarded of a program, a device and an update."""
    config, devices, fields = PROGRAMS[name]
    found: Plan = plan(replace_fields(load_config(config), fields), "H100", devices)
    sizes = {"temporary_bytes": found.memory.temporaries, "hbm_bytes": found.hbm_bytes, "kernels": found.kernels}
    return sizes | {kind: size for kind, size in found.collectives.items() if size >= 1e6}


def grown(name: str, found: dict[str, int], expected: dict[str, int]) -> list[str]:
    """A line for each figure that is more than 1% above the table's, or not in it."""
    return [
        f"{name}: {what} {found[what]:,}, in the table {expected.get(what, 0):,}"
        for what in found
        if found[what] > GROWTH * expected.get(what, 0)
    ]


def print_table() -> None:
    """Predicted memory and speed of the shipped configurations, as Markdown."""
    print("| configuration | GPUs | `zero_stage` | state, GiB | all, GiB | ms an update | tokens/s a GPU | MFU |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    for name, devices, fields in DOCS:
        config = replace_fields(load_config(name), fields)
        found = plan(config, "H100", devices, usual_hosts(devices))
        state = (found.memory.parameters + found.memory.optimizer) / 2**30
        speed = found.tokens_per_second / devices
        time = f"{found.seconds_per_update * 1e3:,.0f} | {speed:,.0f} | {found.mfu:.0%}"
        stage = resolve(config, devices).config.training.zero_stage or 0
        print(f"| {name} | {devices} | {stage} | {state:.1f} | {found.memory_bytes / 2**30:.1f} | {time} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the table")
    parser.add_argument("--docs", action="store_true", help="print the table of docs/memory.md")
    parser.add_argument("--ingredients", action="store_true", help="print the table of docs/recipes.md")
    arguments = parser.parse_args()
    if arguments.docs or arguments.ingredients:
        (print_table if arguments.docs else print_ingredients)()
        return
    write = arguments.write
    table = {"jax": jax.__version__, "programs": {}} if write else json.loads(TABLE.read_text(encoding="utf-8"))
    if table["jax"] != jax.__version__:
        sys.exit(f"this is jax {jax.__version__}; the table needs pip install jax[cuda13-local]=={table['jax']}")
    lines = []
    for name in PROGRAMS:
        found = measure(name)
        print(f"{name}: {json.dumps(found)}", flush=True)
        if write:
            table["programs"][name] = found
            TABLE.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        else:
            lines += grown(name, found, table["programs"][name])
    sys.exit("\n".join(lines) if lines else 0)


if __name__ == "__main__":
    main()
