"""Every option has the default that people rely on, its bounds, and something that reads it."""

import ast
import dataclasses
import inspect
import json
import math
import textwrap
import typing
from pathlib import Path
from typing import Any

import pytest

from jaxlm.commands.parser import parse_size
from jaxlm.config import (
    SECTIONS,
    Config,
    DataConfig,
    ModelConfig,
    TrainingConfig,
    from_dict,
    load_config,
    replace_fields,
    shipped_configs,
    to_dict,
    validate,
    with_derived,
)
from jaxlm.config.fields import accepts, changed_fields
from jaxlm.errors import UserError
from jaxlm.run.setup import resolve

ROOT = Path(__file__).parents[1]

# Names and defaults are a contract: people's files and scripts have them.
CONTRACT: dict[str, dict[str, object]] = {
    "model": {
        "vocab_size": 50000,
        "d_model": 768,
        "n_heads": 12,
        "n_layers": 12,
        "d_ff": 3072,
        "max_seq_len": 1024,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation": "gelu",
        "pre_norm": True,
        "gradient_checkpointing": False,
    },
    "training": {
        "batch_size": 8,
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "num_epochs": 3,
        "lr_scheduler": "cosine",
        "warmup_steps": 2000,
        "optimizer": "adamw",
        "gradient_accumulation_steps": 8,
        "use_amp": True,
        "amp_dtype": "bfloat16",
        "max_grad_norm": 1.0,
        "save_steps": 2000,
        "eval_steps": 1000,
        "logging_steps": 100,
        "checkpoint_dir": "./checkpoints",
        "save_total_limit": 3,
        "resume_from_checkpoint": None,
        "report_to": ("tensorboard",),
        "world_size": None,
        "distributed_backend": None,
        "use_deepspeed": False,
        "deepspeed_config": None,
        "max_steps": None,
        "stop_at_step": None,
    },
    "data": {
        "dataset_name": "wikitext",
        "dataset_config": "wikitext-103-raw-v1",
        "dataset_split": "train",
        "validation_split": "validation",
        "text_column": "text",
        "max_length": 1024,
        "min_length": 10,
        "pack_sequences": True,
        "packing_strategy": "greedy",
        "preprocessing_num_workers": 8,
        "train_files": (),
        "validation_files": (),
        "tokenizer_path": None,
    },
}
FIELDS = {
    f"{name}.{field.name}": (field, typing.get_type_hints(section)[field.name])
    for name, section in SECTIONS.items()
    for field in dataclasses.fields(section)
}
# What must be set beside a field for its other values to be valid.
COMPANIONS = {
    "model.vocab_size": {"data.tokenizer_path": "own/tokenizer.json"},
    "model.d_model": {"model.n_heads": 1},
    "model.max_seq_len": {"data.max_length": 2, "data.min_length": 0},
    "data.max_length": {"data.min_length": 0},
    "model.positions": {"model.d_model": 32, "model.n_heads": 2},
    "model.rope_scaling": {"model.positions": "rotary", "model.rope_original_length": 512},
    "model.attention": {"data.pack_sequences": False, "model.attention_dropout": 0.0},
}


def set_to(dotted: str, value: object) -> Config:
    return replace_fields(Config(), COMPANIONS.get(dotted, {}) | {dotted: value})


def test_defaults_are_the_contract() -> None:
    defaults = {name: dataclasses.asdict(section()) for name, section in SECTIONS.items()}
    for name, fields in CONTRACT.items():
        assert {field: defaults[name][field] for field in fields} == fields
    assert validate(Config()) == Config()


def test_every_field_has_help_and_a_default_within_its_bounds() -> None:
    for dotted, (field, annotation) in FIELDS.items():
        assert len(field.metadata["help"]) > 10, dotted
        assert accepts(annotation, field.default), dotted


def test_json_round_trip() -> None:
    config = replace_fields(
        Config(),
        {"training.report_to": [], "data.train_files": ["a.txt", "b c.txt"], "model.dropout": 0, "training.eps": 1e-8},
    )
    text = json.dumps(to_dict(config))
    assert from_dict(json.loads(text), "x") == config
    assert json.loads(text)["data"]["train_files"] == ["a.txt", "b c.txt"]
    assert from_dict({}, "x") == Config()
    assert from_dict({"model": {"d_model": 96}}, "x") == Config(model=ModelConfig(d_model=96))


def test_lists_become_tuples() -> None:
    assert DataConfig(train_files=["a", "b"]).train_files == ("a", "b")  # type: ignore[arg-type]
    assert TrainingConfig(report_to=[]).report_to == ()  # type: ignore[arg-type]
    assert DataConfig(train_files="a, b").train_files == ("a", "b")  # type: ignore[arg-type]
    assert hash(set_to("data.train_files", ["a"])) == hash(set_to("data.train_files", ("a",)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.d_modle": 1}, "model.d_modle: unknown field (did you mean model.d_model?)"),
        ({"training.max_length": 1}, "training.max_length: unknown field (did you mean data.max_length?)"),
        ({"modle.d_model": 1}, "modle.d_model: unknown section 'modle' (did you mean model?)"),
        ({"d_model": 1}, "d_model: unknown section 'd_model'"),
        ({"model.zzzz": 1}, "model.zzzz: unknown field"),
    ],
)
def test_unknown_names_get_the_nearest_known_one(values: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        replace_fields(Config(), values)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], 'x.json: expected {"model"'),
        ({"model": None}, 'x.json: expected {"model"'),
        ({"trainng": {}}, "x.json: unknown section 'trainng' (did you mean training?)"),
        ({"data": {"max_lenght": 3}}, "x.json: data.max_lenght: unknown field (did you mean data.max_length?)"),
    ],
)
def test_from_dict_says_where_and_what(values: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(values, "x.json")
    assert str(caught.value).startswith(message)


def outside(field: dataclasses.Field, annotation: object) -> list[object]:
    """Values just beyond each of the field's bounds, and some of other types."""
    limits, values = field.metadata, []
    whole = annotation in (int, int | None)
    if limits["low"] is not None:
        values.append(limits["low"] - 1 if whole else math.nextafter(limits["low"], -math.inf))
    if limits["high"] is not None:
        values.append(limits["high"] + 1 if whole else math.nextafter(limits["high"], math.inf))
    values += [limits[name] for name in ("above", "below") if limits[name] is not None]
    if accepts(annotation, 0.5):
        values += [math.nan, math.inf, -math.inf]
    if limits["choices"]:
        values.append(("no such",) if isinstance(field.default, tuple) else "no such")
    if accepts(annotation, True):
        return [*values, 1, "true"]
    return [*values, True, b"bytes", *([None] if field.default is not None else []), *([0.5] if whole else [])]


def inside(field: dataclasses.Field, annotation: object) -> list[object]:
    """Values just within each of the field's bounds."""
    limits, whole = field.metadata, annotation in (int, int | None)
    values = [limits[name] for name in ("low", "high") if limits[name] is not None]
    if not whole:
        values += [math.nextafter(limits["above"], math.inf)] if limits["above"] is not None else []
        values += [math.nextafter(limits["below"], -math.inf)] if limits["below"] is not None else []
    return values + [(name,) if isinstance(field.default, tuple) else name for name in limits["choices"]]


@pytest.mark.parametrize("dotted", FIELDS)
def test_bounds_are_enforced(dotted: str) -> None:
    field, annotation = FIELDS[dotted]
    optional = accepts(annotation, None)
    values = [value for value in outside(field, annotation) if not (optional and value is None)]
    assert values
    for value in values:
        with pytest.raises(UserError) as caught:
            validate(set_to(dotted, value))
        assert str(caught.value).startswith(f"{dotted} ("), value


@pytest.mark.parametrize("dotted", [d for d, (field, annotation) in FIELDS.items() if inside(field, annotation)])
def test_values_at_the_bounds_are_valid(dotted: str) -> None:
    for value in inside(*FIELDS[dotted]):
        validate(replace_fields(set_to(dotted, value), {} if value is None else of_use(dotted)))


def test_options_without_use_are_told() -> None:
    asked = {"training.muon_momentum": 0.5, "training.loss_scale_window": 9, "model.rope_low_freq_factor": 2.0}
    assert told(asked) == [
        "model.rope_low_freq_factor (2.0) has no use with model.rope_scaling none",
        "training.muon_momentum (0.5) has no use with training.optimizer adamw",
        "training.loss_scale_window (9) has no use with training.amp_dtype bfloat16",
    ]
    float16 = {"training.amp_dtype": "float16", "training.optimizer": "muon"}
    scaled = {"model.positions": "rotary", "model.rope_scaling": "llama3", "model.rope_original_length": 512}
    assert told(asked | float16 | scaled) == []
    fixed = ["training.loss_scale_window (9) has no use with training.loss_scale 64.0"]
    assert told(asked | float16 | scaled | {"training.loss_scale": 64.0}) == fixed
    for name in shipped_configs():
        assert resolve(load_config(name), 1).notes == (), name


def told(asked: dict[str, Any]) -> list[str]:
    return list(resolve(replace_fields(Config(), asked), 1).notes)


def of_use(dotted: str) -> dict[str, Any]:
    """What has to be set beside a field, or it would be of no use."""
    if dotted.startswith("training.lora_"):
        adapted = {"training.init_from": "there", "training.lora_rank": 4}
        return {name: value for name, value in adapted.items() if name != dotted}
    if dotted == "data.anneal_from":
        return {"data.sources": ("a=a:1",), "data.anneal_weights": ("a=1",), "training.max_steps": 9}
    return {"data.validation_split": None} if dotted == "data.validation_fraction" else {}


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"model.n_heads": 7}, "model.n_heads (7) must divide model.d_model (768)"),
        ({"data.max_length": 1025}, "data.max_length (1025) exceeds model.max_seq_len (1024)"),
        (
            {"training.min_loss_scale": 32.0, "training.initial_loss_scale_power": 4},
            "training.min_loss_scale (32) exceeds what the dynamic loss scale starts at",
        ),
        ({"training.batch_schedule": ("1:2",)}, "training.batch_schedule (1:2) must be UPDATE:TIMES, such as 1001:2"),
        ({"training.batch_schedule": ("9:1.5",)}, "training.batch_schedule (9:1.5) must be UPDATE:TIMES"),
        (
            {"training.batch_schedule": ("9:2147483647",)},
            "training.batch_schedule (9:2147483647) makes updates of more than 2147483647 micro-batches",
        ),
        (
            {"training.batch_schedule": ("9:2", "5:3")},
            "training.batch_schedule (5:3): updates must come in order, each once; sort them",
        ),
        (
            {"training.batch_schedule": ("9:2",), "training.compiled_program": "there"},
            "training.compiled_program (there) holds an update of one size, and training.batch_schedule",
        ),
        ({"training.max_time": "soon"}, "training.max_time (soon) must be a time, such as 90s, 30m"),
        ({"training.max_time": "00:00:00"}, "training.max_time (00:00:00) must be a time, such as 90s, 30m"),
        (
            {"training.early_stopping_patience": 3, "data.validation_split": None, "data.validation_fraction": 0},
            "training.early_stopping_patience (3) needs held-out text, and data.validation_fraction is 0",
        ),
        ({"data.document_separator": "a\nb"}, r"data.document_separator ('a\nb') holds a line end; name a line"),
        ({"data.min_length": 1025}, "data.min_length (1025) exceeds data.max_length (1024)"),
        ({"model.vocab_size": 258}, "model.vocab_size (258) must be at least 259"),
        (
            {"model.positions": "rotary", "model.d_model": 36},
            "model.positions (rotary) turns pairs of channels, and model.rotary_fraction (1) of a head's 3 are 3; that",
        ),
        (
            {"model.positions": "sinusoidal", "model.d_model": 9, "model.n_heads": 3},
            "model.positions (sinusoidal) needs",
        ),
        ({"model.rotary_fraction": 0.5}, "model.rotary_fraction (0.5) needs model.positions rotary, not learned"),
        (
            {"model.pre_norm": False, "model.sandwich_norm": True},
            "model.sandwich_norm (true) needs model.pre_norm true",
        ),
        ({"model.n_kv_heads": 5}, "model.n_kv_heads (5) must divide model.n_heads (12)"),
        ({"model.rope_scaling": "linear"}, "model.rope_scaling (linear) needs model.positions rotary, not learned"),
        (
            {"model.rope_scaling": "yarn", "model.positions": "rotary"},
            "model.rope_scaling (yarn) needs model.rope_original_length",
        ),
        (
            {
                "model.rope_scaling": "llama3",
                "model.positions": "rotary",
                "model.rope_original_length": 512,
                "model.rope_low_freq_factor": 4.0,
            },
            "model.rope_high_freq_factor (4.0) must be greater than model.rope_low_freq_factor (4.0)",
        ),
        (
            {
                "model.rope_scaling": "yarn",
                "model.positions": "rotary",
                "model.rope_original_length": 512,
                "model.rope_theta": 1.0,
            },
            "model.rope_scaling (yarn) needs model.rope_theta (1.0) greater than 1",
        ),
        ({"data.validation_files": ("a.txt",)}, "data.validation_files is set but data.train_files is not"),
        (
            {"data.train_files": ("a.txt",), "data.dataset_name": "python-stdlib"},
            "data.train_files (a.txt) and data.dataset_name (python-stdlib) both name the text; leave one out",
        ),
        (
            {"data.dataset_name": "python-stdlib", "data.validation_split": "test"},
            "data.validation_split (test) has no use beside data.dataset_name (python-stdlib); leave it out",
        ),
        (
            {"data.train_files": ("a",), "data.validation_files": ("b", "c"), "data.validation_fraction": 0.2},
            "data.validation_fraction (0.2) has no use beside data.validation_files (b,c); leave it out, or set data",
        ),
        (
            {"data.validation_fraction": 0.2},
            "data.validation_fraction (0.2) has no use beside data.validation_split (validation); leave it out, or set "
            "data.validation_split none",
        ),
        ({"training.xla_options": ("gpu=1",)}, "training.xla_options ('gpu=1') must be xla_NAME=VALUE"),
        ({"training.checkpoint_dir": ""}, "training.checkpoint_dir is empty"),
        ({"training.resume_from_checkpoint": "runs/checkpoint-10000.pt"}, "training.resume_from_checkpoint (runs/"),
    ],
)
def test_fields_that_do_not_fit_together(values: dict, names: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(replace_fields(Config(), values))
    assert str(caught.value).startswith(names)


def test_text_that_is_named_replaces_the_one_before() -> None:
    library, files = {"data.dataset_name": "python-stdlib"}, {"data.train_files": ("a",)}
    base = replace_fields(Config(), library | {"data.validation_fraction": 0.2})
    own = replace_fields(base, files)
    assert (own.data.dataset_name, own.data.validation_fraction) == (Config().data.dataset_name, 0.2)
    own = replace_fields(own, {"data.validation_files": ("v",)})
    assert own.data.validation_fraction == 0.05
    assert replace_fields(own, {"data.train_files": ("b",)}).data.validation_files == ("v",)
    back = validate(replace_fields(own, library))
    assert (back.data.train_files, back.data.validation_files, back.data.dataset_config) == ((), (), None)
    assert replace_fields(back, {"data.min_length": 3}).data.dataset_config is None
    with pytest.raises(UserError, match="both name the text"):
        replace_fields(Config(), {"data.dataset_name": "wikitext"} | files)
    in_a_file = from_dict({"data": {"train_files": ["a"], "dataset_name": "python-stdlib"}}, "x")
    with pytest.raises(
        UserError, match=r"^data.dataset_name \(python-stdlib\) has no use beside data.train_files \(a\)"
    ):
        validate(replace_fields(in_a_file, {"training.seed": 1}))
    assert with_derived(in_a_file) == with_derived(replace_fields(Config(), files)), "how older runs were saved"


def test_old_checkpoint_file_names_the_folder_of_today() -> None:
    with pytest.raises(UserError, match="use runs/checkpoint_10000$"):
        validate(set_to("training.resume_from_checkpoint", "runs/checkpoint-10000.pt"))


def test_changed_fields_leaves_out_what_may_change() -> None:
    old = Config()
    free = {"training.max_steps": 7, "training.num_epochs": 9, "training.logging_steps": 1, "data.cache_dir": "/x"}
    assert changed_fields(old, replace_fields(old, free)) == {}
    both = replace_fields(old, free | {"training.seed": 7, "model.dropout": 0.0, "data.train_files": ("a",)})
    assert changed_fields(old, both) == {
        "model.dropout": (0.1, 0.0),
        "training.seed": (42, 7),
        "data.train_files": ((), ("a",)),
    }


def test_sections_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^model \({'d_model': 96}\) must be a ModelConfig"):
        Config(model={"d_model": 96})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^data .* must be a DataConfig"):
        Config(data=ModelConfig())  # type: ignore[arg-type]


def read_fields() -> dict[str, set[str]]:
    """{section: fields} that the program reads: attributes of `config`, `model`, `training`, `data` or the like."""
    holders = {"model": {"model", "config", "c"}, "training": {"training", "config", "c"}, "data": {"data", "config"}}
    read: dict[str, set[str]] = {name: set() for name in SECTIONS}
    for path in [*(ROOT / "jaxlm").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.parent.name == "config":  # judging a field is no use of it, but devices are laid out and refused there
            used = {"mesh_shape", "check_platform", "mixture_options"}  # and the sources of a mixture read
            tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in used]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                base = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", None)
                for section, names in holders.items():
                    if base in names:
                        read[section].add(node.attr)
    for name, section in SECTIONS.items():  # a property that is read has read its fields
        for attribute, value in vars(section).items():
            if isinstance(value, property) and attribute in read[name]:
                body = ast.parse(textwrap.dedent(inspect.getsource(value.fget)))
                read[name] |= {node.attr for node in ast.walk(body) if isinstance(node, ast.Attribute)}
    return read


def test_every_field_has_a_reader() -> None:
    read = read_fields()
    unread = {dotted for dotted in FIELDS if dotted.partition(".")[2] not in read[dotted.partition(".")[0]]}
    assert unread == set(), "options that nothing reads"


@pytest.mark.parametrize(
    "text", ["80", "GB", "0GB", "-1GB", "80PB", "5 XB", "1e3GB", "", "0.0000000001MB", "0.9MiB", "9" * 400 + "G"]
)
def test_sizes_need_a_number_and_a_unit(text: str) -> None:
    with pytest.raises(UserError, match=r"^--memory \(.*\) must be (a number with a unit|from 1MiB to 1024TiB)"):
        parse_size("--memory", text, low=2**20)


def test_sizes() -> None:
    sizes = {"80GB": 80e9, "80g": 80e9, "80000M": 80e9, "1.5 gib": 3 * 2**29, "1536MiB": 3 * 2**29, "10kb": 10_000}
    assert {text: parse_size("--memory", text) for text in sizes} == sizes
