"""Damaged configurations in JSON and Python, command lines, and DeepSpeed files."""

import io
import json
import random
import types
import typing
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from jaxlm.commands.parser import Parser, add_config_options, config_from
from jaxlm.config import SECTIONS, Config, from_dict, load_config, replace_fields, to_dict, validate, with_derived
from jaxlm.interop import deepspeed
from lib.fuzzing.damage import FIELDS, FIELDS_OF, Defect, as_json, damage_leaf, damaged_bytes, junk, misspelt

PYTHON = (
    "10**5000", "-(10**400)", "float('nan')", "b'x'", "object()", "lambda: 0", "{1, 2}", "(1,)", "range(3)", "print",
    "...", "1j", "int", "[float]", "'a\\nb'", "'\\ud800'", "['a', None]", "{'a': 1}", "True", "undefined", "1/0",
    "(" * 300,
)  # fmt: skip
LINES = (
    "import nosuch", "raise SystemExit", "raise SystemExit('done')", "raise ValueError('a\\nb')", "assert False", "1/0",
    "config = 1", "del config", "open('nosuch')", "[][0]", "{}['a']", "x = '", "\tx", "f(", "def f(): return f()\nf()",
    "\0", "# coding: nosuch", "raise MemoryError", "config.model = None", "next(iter(()))",
)  # fmt: skip
DEEPSPEED = {
    "train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 100}},
    "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2}, "bf16": {"enabled": False},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True},
    "steps_per_print": 100, "wall_clock_breakdown": False, "tensorboard": {"enabled": True, "output_path": "x"},
    "activation_checkpointing": {"partition_activations": False}, "communication_data_type": "fp32",
}  # fmt: skip


def valid_value(rng: random.Random, dotted: str) -> Any:
    """Some value that the field's declaration allows."""
    field, annotation = FIELDS[dotted]
    limits = field.metadata
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    kind = rng.choice(kinds)
    low = limits["low"] if limits["low"] is not None else limits["above"] if limits["above"] is not None else 0
    if kind is type(None):
        return None
    if typing.get_origin(kind) is tuple:
        return rng.sample(limits["choices"] or ("a.txt", "b c.jsonl", "é.csv"), rng.randrange(3))
    if kind is bool:
        return rng.random() < 0.5
    if limits["choices"]:
        return rng.choice(limits["choices"])
    if kind is str:
        return rng.choice(("a", "runs/x", "é", "b.json", "text"))
    if kind is int:
        return rng.choice((low, low + 1, low + 7, max(low, 64)))
    return rng.choice((low + 1e-3, low + 0.5, low + rng.random() / 2))


def some_values(rng: random.Random) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for dotted in rng.sample(list(FIELDS), rng.choice((0, 1, 2, 3, 12))):
        section, _, name = dotted.partition(".")
        values[section][name] = valid_value(rng, dotted)
    return values


def check_config(config: Config) -> None:
    """What every start does with a configuration, and that it survives being saved."""
    deepspeed.apply(validate(config), world=None)
    validate(with_derived(config))
    if from_dict(json.loads(json.dumps(to_dict(config))), "saved") != config:
        raise Defect("a saved configuration is another one")


def json_config(rng: random.Random, folder: Path) -> None:
    values = some_values(rng)
    for _ in range(rng.choice((0, 1, 1, 2))):
        damage_leaf(rng, values)
    path = folder / rng.choice(("c.json", "c.json", "c.json", "c.py", "c.toml", "c"))
    path.write_bytes(as_json(rng, values))
    check_config(load_config(str(path)))


def python_config(rng: random.Random, folder: Path) -> None:
    sections = []
    for section, values in some_values(rng).items():
        given = {name: repr(value) for name, value in values.items()}
        if rng.random() < 0.2:
            given[rng.choice(FIELDS_OF[section])] = rng.choice(PYTHON)
        if rng.random() < 0.1:
            given[misspelt(rng, rng.choice(FIELDS_OF[section]))] = "1"
        arguments = ", ".join(f"{name}={value}" for name, value in given.items())
        sections.append(f"{section}={SECTIONS[section].__name__}({arguments})")
    lines = ["from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig"]
    lines.append(f"config = Config({', '.join(sections)})")
    if rng.random() < 0.3:
        lines.insert(rng.randrange(3), rng.choice(LINES))
    content = "\n".join(lines).encode(errors="surrogatepass")
    path = folder / "c.py"
    path.write_bytes(damaged_bytes(rng, content) if rng.random() < 0.3 else content)
    with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
        config = load_config(str(path))
    check_config(config)


def command_line(rng: random.Random, folder: Path) -> None:
    (folder / "c.json").write_text("{}")
    arguments = [f"--config={folder / 'c.json'}"]
    for dotted in rng.sample(list(FIELDS), rng.choice((1, 1, 2, 6))):
        name = misspelt(rng, dotted) if rng.random() < 0.1 else dotted
        value = valid_value(rng, dotted) if rng.random() < 0.5 else junk(rng)
        text = value if isinstance(value, str) else json.dumps(value)
        arguments += [f"--{name}={text}"] if rng.random() < 0.7 else [f"--{name}", text]
    if rng.random() < 0.1:
        arguments.insert(rng.randrange(len(arguments)), rng.choice(("-h", "--", "-", "stray", "--fresh", "\udcff")))
    (folder / "arguments.json").write_text(json.dumps(arguments))
    parser = Parser("fuzz")
    parser.add_argument("--config", required=True)
    add_config_options(parser)
    with redirect_stdout(io.StringIO()):
        try:
            parsed = parser.parse_args(arguments)
        except SystemExit as end:
            if end.code == 0:  # --help
                return
            raise
    check_config(config_from(parsed))


def deepspeed_file(rng: random.Random, folder: Path) -> None:
    values = json.loads(json.dumps({name: DEEPSPEED[name] for name in rng.sample(list(DEEPSPEED), rng.randrange(8))}))
    for _ in range(rng.choice((0, 1, 1, 2))):
        damage_leaf(rng, values)
    path = folder / "ds.json"
    path.write_bytes(as_json(rng, values))
    given = {"training.use_deepspeed": True, "training.deepspeed_config": str(path)}
    config, _ = deepspeed.apply(validate(replace_fields(Config(), given)), world=rng.choice((None, 1, 4)))
    validate(with_derived(config))
