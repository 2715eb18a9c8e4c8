"""DeepSpeed's JSON file: every key is mapped, accepted or refused, and docs/deepspeed.md says which."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm.config import Config, TrainingConfig, replace_fields
from jaxlm.errors import UserError
from jaxlm.interop.deepspeed import (
    DEFAULTS,
    OPTIMIZERS,
    OTHER_OPTIMIZERS,
    SCHEDULERS,
    TABLE,
    Rule,
    _fields,
    apply,
    load,
)

PAGE = Path(__file__).parents[1] / "docs" / "deepspeed.md"
BATCH = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 8}  # TrainingConfig's own defaults
EXAMPLE = """{"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4,
"optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01}}, "fp16": {"enabled": true},
"zero_optimization": {"stage": 2}}"""

Applied = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[Config, list[str]]]:
    """Applies a file's text, or its object beside a batch size: `run({...}, world=4, **{"training.seed": 7})`."""

    def run(file: Any, world: int | None = 1, batch: bool = True, **fields: Any) -> tuple[Config, list[str]]:
        path = tmp_path / "ds.json"
        text = file if isinstance(file, str) else json.dumps(file | (BATCH if batch else {}))
        path.write_text(text, encoding="utf-8")
        training = TrainingConfig(use_deepspeed=True, deepspeed_config=str(path))
        return apply(replace_fields(Config(training=training), fields), world)

    return run


@pytest.fixture
def changed(run: Callable[..., tuple[Config, list[str]]]) -> Applied:
    """The fields that a file sets to something else than the default, without those that every file here sets."""
    ours = {"training.use_deepspeed", "training.deepspeed_config"}

    def changed(file: Any, **rest: Any) -> dict[str, Any]:
        values = _fields(run(file, **rest)[0])
        if "training.zero_stage" not in rest and values["training.zero_stage"] == 0:
            del values["training.zero_stage"]
        return {name: value for name, value in values.items() if value != DEFAULTS[name] and name not in ours}

    return changed


@pytest.fixture
def refused(run: Callable[..., tuple[Config, list[str]]]) -> Callable[..., str]:
    """The error's text behind the file's name; it is one line."""

    def refused(file: Any, **rest: Any) -> str:
        with pytest.raises(UserError) as error:
            run(file, **rest)
        text = str(error.value)
        assert "\n" not in text
        assert re.match(r"training\.deepspeed_config \(.*ds\.json\): ", text)
        return text.partition("ds.json): ")[2]

    return refused


def optimizer(type: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": type, "params": {"lr": 1e-4, "weight_decay": 0.01} | params}}


def scheduler(type: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": type, "params": {"warmup_num_steps": 2000, "warmup_type": "linear"} | params}}


def zero(**values: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 0} | values}


# --- without a file ---------------------------------------------------------------------------------------------------


def test_without_a_file() -> None:
    assert apply(Config(), 4) == (Config(), [])
    training = TrainingConfig(use_deepspeed=True)
    assert apply(Config(training=training), None)[0].training == dataclasses.replace(training, zero_stage=2)
    chosen = Config(training=TrainingConfig(use_deepspeed=True, zero_stage=1))
    assert apply(chosen, 4) == (chosen, [])


def test_a_file_needs_use_deepspeed() -> None:
    with pytest.raises(UserError, match=r"^training\.deepspeed_config \(ds.json\): set training.use_deepspeed true"):
        apply(Config(training=TrainingConfig(deepspeed_config="ds.json")), 1)
    with pytest.raises(UserError, match=r"^training\.deepspeed_config is empty; name a DeepSpeed JSON file, or none"):
        apply(Config(training=TrainingConfig(deepspeed_config="", use_deepspeed=True)), 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("{", "not JSON"),
        ('{"a": 1} // comment', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"gradient_clipping": NaN}', "NaN is not a JSON number"),
        ('{"fp16": {"enabled": true, "enabled": false}}', "enabled is there twice"),
        ('{"bf16": {}, "bf16": {}}', "bf16 is there twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=re.escape(f"training.deepspeed_config ({path}): ")) as error:
        load(str(path))
    assert message in str(error.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Is a directory"):
        load(str(tmp_path))


# --- what is mapped ---------------------------------------------------------------------------------------------------

MAPPED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # optimizer
    (optimizer("AdamW"), {}),
    (optimizer("adamw", lr=2e-4), {"learning_rate": 2e-4}),
    (optimizer("Adam", betas=[0.8, 0.99], eps=1e-6), {"beta1": 0.8, "beta2": 0.99, "eps": 1e-6}),
    (optimizer("Adam", adam_w_mode=True, weight_decay=0), {"weight_decay": 0}),
    (optimizer("Adam", adam_w_mode=False), {"optimizer": "adam"}),
    (optimizer("AdamW", adam_w_mode=False), {}),  # as in DeepSpeed
    (optimizer("Lamb", eps=1e-6, max_coeff=10, min_coeff=0.01), {"optimizer": "lamb", "eps": 1e-6}),
    (optimizer("LION", betas=[0.9, 0.99]), {"optimizer": "lion", "beta2": 0.99}),
    (optimizer("SGD", momentum=0.5), {"optimizer": "sgd", "beta1": 0.5}),
    (optimizer("SGD", dampening=0, nesterov=False), {"optimizer": "sgd", "beta1": 0.0}),
    # DeepSpeed's defaults of what is left out
    ({"optimizer": {"type": "AdamW"}}, {"learning_rate": 1e-3, "weight_decay": 0.0}),
    ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, {"learning_rate": 1e-3}),
    (
        {"scheduler": {"type": "WarmupLR"}},
        {"lr_scheduler": "constant", "warmup_steps": 1000, "warmup_shape": "log"},
    ),
    # scheduler
    (
        scheduler("WarmupLR", warmup_max_lr=1e-3, warmup_min_lr=1e-4),
        {"lr_scheduler": "constant", "learning_rate": 1e-3, "warmup_min_ratio": 0.1},
    ),
    (scheduler("WarmupLR", warmup_min_lr=0), {"lr_scheduler": "constant"}),
    (
        scheduler("WarmupDecayLR", total_num_steps=500, warmup_max_lr=2e-4, warmup_num_steps=5, warmup_type="log"),
        {
            "lr_scheduler": "linear",
            "min_lr_ratio": 0.0,
            "schedule_steps": 500,
            "learning_rate": 2e-4,
            "warmup_steps": 5,
            "warmup_shape": "log",
        },
    ),
    (
        scheduler("WarmupDecayLR", total_num_steps="auto"),
        {"lr_scheduler": "linear", "min_lr_ratio": 0.0, "learning_rate": 1e-3},
    ),
    (scheduler("WarmupCosineLR", total_num_steps=500), {"min_lr_ratio": 1e-4, "schedule_steps": 500}),
    (
        scheduler("WarmupCosineLR", total_num_steps=500, cos_min_ratio=0.2, warmup_min_ratio=0.3),
        {"min_lr_ratio": 0.2, "warmup_min_ratio": 0.3, "schedule_steps": 500},
    ),
    # precision
    ({"fp16": {"enabled": True}}, {"amp_dtype": "float16"}),
    (
        {
            "fp16": {
                "enabled": True,
                "loss_scale": 128,
                "initial_scale_power": 20,
                "loss_scale_window": 50,
                "hysteresis": 4,
                "min_loss_scale": 2,
                "auto_cast": False,
                "consecutive_hysteresis": False,
                "fp16_master_weights_and_grads": False,
            }
        },
        {
            "amp_dtype": "float16",
            "loss_scale": 128,
            "initial_loss_scale_power": 20,
            "loss_scale_window": 50,
            "loss_scale_hysteresis": 4,
            "min_loss_scale": 2,
        },
    ),
    ({"fp16": {"enabled": False, "loss_scale": 128}}, {"use_amp": False}),
    ({"fp16": {}}, {"use_amp": False}),
    ({"bf16": {"enabled": True}}, {}),
    ({"bfloat16": {"enabled": True}, "fp16": {"enabled": False, "hysteresis": 4}}, {}),
    ({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, {"use_amp": False}),
    ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}}, {}),
    ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "hysteresis": 4}}, {}),
    ({"bf16": {"enabled": False}, "fp16": {"enabled": "auto"}}, {"use_amp": False}),
    ({"fp16": {"enabled": "auto"}}, {}),
    # the rest
    ({"gradient_clipping": 0.5}, {"max_grad_norm": 0.5}),
    ({"gradient_clipping": 0}, {"max_grad_norm": None}),
    ({"data_types": {"grad_accum_dtype": "fp32"}}, {}),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, {"accumulator_dtype": "bfloat16"}),
    ({"data_types": {"grad_accum_dtype": "fp16"}}, {"accumulator_dtype": "float16"}),
    ({"data_types": {"grad_accum_dtype": None}}, {}),
    ({"steps_per_print": 7}, {"logging_steps": 7}),
    ({"steps_per_print": None}, {}),
    ({"tensorboard": {"enabled": True, "output_path": "logs", "job_name": "run"}}, {}),
    ({"tensorboard": {"enabled": False}}, {"report_to": ()}),
    ({"tensorboard": {"output_path": "logs"}}, {}),
    (
        {"wandb": {"enabled": True, "project": "mine"}},
        {"report_to": ("tensorboard", "wandb"), "wandb_project": "mine"},
    ),
    ({"wandb": {"enabled": False, "project": "mine"}}, {}),
    (zero(stage=1), {"zero_stage": 1}),
    (zero(stage=2.0), {"zero_stage": 2}),
    (zero(stage=3), {"zero_stage": 3}),
    ({"zero_optimization": True}, {"zero_stage": 1}),
    ({"zero_optimization": False}, {}),
    (zero(stage=0), {}),
    (zero(offload_optimizer={"device": "cpu", "pin_memory": True}), {"offload_optimizer": True}),
    (zero(offload_optimizer={"device": "none"}, offload_param={"device": "none"}), {}),
    (zero(offload_optimizer=None, offload_param=None), {}),
    (zero(cpu_offload=True), {"offload_optimizer": True}),
    (zero(cpu_offload=False), {}),
    (zero(mics_shard_size=-1, zero_hpz_partition_size=1, zero_quantized_weights=False, zeropp_loco_param=None), {}),
]


@pytest.mark.parametrize(("file", "fields"), MAPPED, ids=str)
def test_mapped(changed: Applied, file: dict[str, Any], fields: dict[str, Any]) -> None:
    assert changed(file) == {f"training.{name}": value for name, value in fields.items()}


@pytest.mark.parametrize(("file", "fields"), MAPPED, ids=str)
def test_applying_twice_changes_nothing_more(
    run: Callable[..., tuple[Config, list[str]]], file: dict[str, Any], fields: dict[str, Any]
) -> None:
    once, _ = run(file)
    assert apply(once, 1)[0] == once


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"partition_activations": False, "number_checkpoints": 4, "profile": True},
        {"number_checkpoints": None},
        {"number_checkpoints": False},  # which many files have
    ],
)
def test_activation_checkpointing(changed: Applied, section: dict[str, Any]) -> None:
    assert changed({"activation_checkpointing": section}) == {"model.gradient_checkpointing": True}


def test_no_zero_section_is_stage_0(run: Callable[..., tuple[Config, list[str]]]) -> None:
    config, lines = run({})
    assert config.training.zero_stage == 0
    assert any("zero_optimization.stage 0" in line for line in lines)
    assert run({}, **{"training.zero_stage": 2})[0].training.zero_stage == 2


def test_the_schedulers_learning_rate_wins(run: Callable[..., tuple[Config, list[str]]]) -> None:
    file = scheduler("WarmupLR", warmup_max_lr=1e-3) | optimizer("AdamW", lr=5e-4)  # whatever stands first
    for either in (file, dict(reversed(file.items()))):
        config, lines = run(either)
        assert config.training.learning_rate == 1e-3
        assert [line for line in lines if "warmup_max_lr (0.001)" in line and "0.0005" in line]
    assert run(scheduler("WarmupLR") | optimizer("AdamW", lr=5e-4))[0].training.learning_rate == 5e-4
    assert run(scheduler("WarmupDecayLR", total_num_steps=9) | optimizer("AdamW", lr=5e-4))[
        0
    ].training.learning_rate == (1e-3)
    cosine, lines = run(scheduler("WarmupCosineLR", total_num_steps=9) | optimizer("AdamW", lr=5e-4))
    assert cosine.training.learning_rate == 5e-4 and not [line for line in lines if "learning rate" in line]


def test_lamb_says_that_its_trust_ratio_is_not_bounded(run: Callable[..., tuple[Config, list[str]]]) -> None:
    assert any("trust ratio" in line for line in run(optimizer("Lamb"))[1])


def test_what_the_file_leaves_out_may_be_set_in_config(changed: Applied) -> None:
    """DeepSpeed's defaults fill only what both the file and the configuration leave open."""
    own = {"training.weight_decay": 0.1, "training.warmup_steps": 5, "training.learning_rate": 3e-4}
    file = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
    assert changed(file, **own) == own | {"training.lr_scheduler": "constant", "training.warmup_shape": "log"}


def test_defaults_that_change_something_are_named(run: Callable[..., tuple[Config, list[str]]]) -> None:
    (line,) = (line for line in run({"optimizer": {"type": "AdamW"}})[1] if "as DeepSpeed has it" in line)
    assert "optimizer.params.lr 0.001" in line and "weight_decay 0.0" in line and "betas" not in line


def test_sections_that_are_left_out_are_named(run: Callable[..., tuple[Config, list[str]]]) -> None:
    (line,) = (line for line in run({})[1] if "as TrainingConfig has it" in line)
    for part in ("optimizer", "cosine", "max_grad_norm 1.0", "fp16, bf16", "amp_dtype bfloat16"):
        assert part in line
    full = optimizer("AdamW") | scheduler("WarmupLR") | {"gradient_clipping": 1, "bf16": {"enabled": True}}
    assert not [line for line in run(full)[1] if "as TrainingConfig has it" in line]


# --- the batch --------------------------------------------------------------------------------------------------------

TRAIN, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
GIVEN = [names for n in (1, 2, 3) for names in itertools.combinations((TRAIN, MICRO, STEPS), n)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.sampled_from(GIVEN), *[st.integers(1, 9)] * 3)
def test_the_batch_rule(
    run: Callable[..., tuple[Config, list[str]]], names: tuple[str, ...], micro: int, steps: int, world: int
) -> None:
    if STEPS not in names and len(names) == 1:
        steps = 1  # of one size alone
    if names == (STEPS,):
        micro = 8  # TrainingConfig's
    sizes = {TRAIN: micro * steps * world, MICRO: micro, STEPS: steps}
    training = run({name: sizes[name] for name in names}, world=world, batch=False)[0].training
    assert (training.batch_size, training.gradient_accumulation_steps) == (micro, steps)
    later = run({name: sizes[name] for name in names}, world=None, batch=False)[0]
    assert apply(later, world)[0].training == training


@pytest.mark.parametrize(
    ("sizes", "result"),
    [
        ({TRAIN: "auto"}, (6, 3)),
        ({TRAIN: "auto", MICRO: "auto", STEPS: "auto"}, (6, 3)),
        ({MICRO: "auto", STEPS: "auto"}, (6, 3)),
        ({STEPS: "auto"}, (6, 3)),
        ({TRAIN: "auto", STEPS: 3}, (6, 3)),
        ({TRAIN: "auto", MICRO: 6}, (6, 3)),
        ({TRAIN: 36, MICRO: "auto", STEPS: "auto"}, (6, 3)),
        ({TRAIN: 36, MICRO: "auto"}, (6, 3)),
        ({TRAIN: 36, STEPS: "auto"}, (6, 3)),
    ],
    ids=str,
)
def test_auto_takes_configs_sizes(
    run: Callable[..., tuple[Config, list[str]]], sizes: dict[str, Any], result: tuple[int, int]
) -> None:
    own = {"training.batch_size": 6, "training.gradient_accumulation_steps": 3}
    training = run(sizes, world=2, batch=False, **own)[0].training
    assert (training.batch_size, training.gradient_accumulation_steps) == result


@pytest.mark.parametrize(
    ("sizes", "world", "parts"),
    [
        ({}, 4, ["none of train_batch_size, train_micro", "is there"]),
        ({TRAIN: None}, 4, ["none of"]),
        ({TRAIN: 0}, 4, ["train_batch_size (0) must be at least 1"]),
        ({STEPS: -1, MICRO: 1}, 4, ["gradient_accumulation_steps (-1) must be at least 1"]),
        ({TRAIN: 64, MICRO: 5}, 4, ["(64) is not a multiple", "* 4 devices = 20", f"{TRAIN} 60 or {TRAIN} 80"]),
        ({TRAIN: 64, MICRO: 5}, None, ["(64) is not a multiple", "(5) = 5"]),
        ({TRAIN: 3}, 4, [f"{TRAIN} (3) is not a multiple", f"; {TRAIN} 4 would fit"]),
        ({TRAIN: 64, MICRO: 5, STEPS: 2}, None, ["not a multiple", "(5) * gradient_accumulation_steps (2) = 10"]),
        ({TRAIN: 64, MICRO: "auto", STEPS: "auto"}, 2, ["micro_batch_size_per_gpu (8)", "= 128", "1 devices"]),
    ],
    ids=str,
)
def test_batches_that_do_not_fit(
    refused: Callable[..., str], sizes: dict[str, Any], world: int | None, parts: list[str]
) -> None:
    text = refused(sizes, world=world, batch=False)
    assert not [part for part in parts if part not in text], text


# --- whole files ------------------------------------------------------------------------------------------------------


def test_the_example(run: Callable[..., tuple[Config, list[str]]], refused: Callable[..., str]) -> None:
    training = run(EXAMPLE, world=4)[0].training
    assert training == dataclasses.replace(
        TrainingConfig(use_deepspeed=True, deepspeed_config=training.deepspeed_config),
        batch_size=4,
        gradient_accumulation_steps=4,
        amp_dtype="float16",
        zero_stage=2,
    )
    text = refused(EXAMPLE, world=2)
    for part in ("(64)", "(4)", "2 devices", "= 32", f"{TRAIN} 32", f"{STEPS} 8", f"{MICRO} 8", "4 devices"):
        assert part in text


HUGGING_FACE: dict[str, Any] = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "amp": {"enabled": "auto", "opt_level": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto",
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "warmup_type": "linear",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def test_a_file_for_hugging_face(run: Callable[..., tuple[Config, list[str]]]) -> None:
    own = {"training.learning_rate": 3e-4, "training.batch_size": 2, "training.amp_dtype": "float16"}
    config, lines = run(HUGGING_FACE, world=8, batch=False, **own)
    expected = own | {
        "training.zero_stage": 3,
        "training.offload_optimizer": True,
        "training.lr_scheduler": "linear",
        "training.min_lr_ratio": 0.0,
        "training.logging_steps": 2000,
    }
    values = _fields(config)
    assert {name: value for name, value in values.items() if value != DEFAULTS[name]} == expected | {
        name: values[name] for name in ("training.use_deepspeed", "training.deepspeed_config")
    }
    assert lines == [
        "training.deepspeed_config: offload_optimizer.pin_memory, overlap_comm, contiguous_gradients, sub_group_size, "
        "stage3_max_live_parameters, stage3_max_reuse_distance accepted: XLA decides these",
        "training.deepspeed_config: stage3_gather_16bit_weights_on_model_save accepted: checkpoints are jaxlm's own, "
        "and load on any number of devices",
    ]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_all_contradictions_in_one_error(refused: Callable[..., str]) -> None:
    own = {
        "training.learning_rate": 0.001,
        "training.optimizer": "sgd",
        "training.amp_dtype": "float16",
        "training.batch_size": 16,
        "training.report_to": ("wandb",),
        "training.seed": 7,
    }
    file = optimizer("AdamW") | {"bf16": {"enabled": True}, MICRO: 4, "tensorboard": {"enabled": True}}
    parts = refused(file, batch=False, **own).split("; ")
    assert set(parts[:-1]) == {
        "training.learning_rate is 0.001, optimizer.params.lr is 0.0001",
        'training.optimizer is sgd, optimizer.type is "AdamW"',
        "training.amp_dtype is float16, bf16.enabled is true",
        "training.batch_size is 16, train_micro_batch_size_per_gpu is 4",
        'training.report_to is ["wandb"], tensorboard.enabled is true',
    }
    assert '"auto"' in parts[-1]


@pytest.mark.parametrize(
    ("file", "own", "part"),
    [
        ({"fp16": {"enabled": False}}, {"amp_dtype": "float16"}, "amp_dtype is float16, fp16.enabled is false"),
        ({"bf16": {"enabled": True}}, {"use_amp": False}, "use_amp is false, bf16.enabled is true"),
        ({"gradient_clipping": 0}, {"max_grad_norm": 2.0}, "max_grad_norm is 2.0, gradient_clipping is 0"),
        ({"gradient_clipping": 1}, {"max_grad_norm": None}, "max_grad_norm is none, gradient_clipping is 1"),
        (zero(stage=1), {"zero_stage": 2}, "zero_stage is 2, zero_optimization.stage is 1"),
        (
            scheduler("WarmupDecayLR", total_num_steps=9, warmup_max_lr=1e-4),
            {"min_lr_ratio": 0.5},
            'min_lr_ratio is 0.5, scheduler.type is "WarmupDecayLR"',
        ),
        ({TRAIN: 64, MICRO: 8, STEPS: "auto"}, {STEPS: 2}, "(64) is not"),
        ({TRAIN: 64, STEPS: 4}, {"batch_size": 4}, "batch_size is 4, train_batch_size (64) / (gradient"),
    ],
    ids=str,
)
def test_contradictions(refused: Callable[..., str], file: dict[str, Any], own: dict[str, Any], part: str) -> None:
    text = refused(
        file, batch=not {TRAIN, MICRO, STEPS} & set(file), **{f"training.{name}": value for name, value in own.items()}
    )
    assert part in text


def test_contradictions_inside_a_file(refused: Callable[..., str]) -> None:
    file = zero(offload_optimizer={"device": "none"}, cpu_offload=True) | {"gradient_clipping": 1}
    parts = refused(file, **{"training.max_grad_norm": 2.0}).split("; ")
    assert set(parts[:-1]) == {
        'zero_optimization.offload_optimizer.device is "none", zero_optimization.cpu_offload is true',
        "training.max_grad_norm is 2.0, gradient_clipping is 1",
    }


def test_agreement_inside_a_file(changed: Applied) -> None:
    file = zero(offload_optimizer={"device": "cpu"}, cpu_offload=True)
    assert changed(file) == {"training.offload_optimizer": True}
    both = {"tensorboard": {"enabled": False}, "wandb": {"enabled": True}}  # one field, of which each key says a part
    assert changed(both) == {"training.report_to": ("wandb",)}


def test_agreement_is_no_contradiction(changed: Applied) -> None:
    own = {"training.learning_rate": 5e-4, "training.max_grad_norm": 0.5}
    assert changed(optimizer("AdamW", lr=5e-4) | {"gradient_clipping": 0.5}, **own) == own


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ({"zero_optimisation": {"stage": 2}}, "unknown key zero_optimisation (did you mean zero_optimization?)"),
        (zero(stge=2), "unknown key zero_optimization.stge (did you mean stage?)"),
        (
            zero(offload_optimizer={"divice": "cpu"}),
            "zero_optimization.offload_optimizer.divice (did you mean device?)",
        ),
        (optimizer("AdamW", learning_rate=1), "unknown key optimizer.params.learning_rate"),
        (optimizer("AdamW", wieght_decay=1), "optimizer.params.wieght_decay (did you mean weight_decay?)"),
        (optimizer("Lion", eps=1e-8), "unknown key optimizer.params.eps"),
        (scheduler("WarmupLR", total_num_steps=9), "unknown key scheduler.params.total_num_steps"),
        ({"fp16": {"enabled": False, "los_scale": 1}}, "fp16.los_scale (did you mean loss_scale?)"),
        ({"quux": 1}, "unknown key quux"),
    ],
    ids=str,
)
def test_unknown_keys(refused: Callable[..., str], file: dict[str, Any], part: str) -> None:
    assert part in refused(file)


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ({"gradient_clipping": "0.5"}, 'gradient_clipping ("0.5") must be float; write it without quotes'),
        ({"gradient_clipping": True}, "gradient_clipping (true) must be float"),
        ({"gradient_clipping": -1}, "gradient_clipping (-1) must be greater than 0"),
        ({"fp16": True}, "fp16 (true) must be an object"),
        ({"fp16": {"enabled": "yes"}}, 'fp16.enabled ("yes") must be true or false'),
        ({"fp16": {"enabled": True, "initial_scale_power": 1.5}}, "fp16.initial_scale_power (1.5) must be int"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled and bf16.enabled are both true"),
        ({"bf16": {}, "bfloat16": {}}, "bf16 and bfloat16 are the same section"),
        (zero(stage=5), "zero_optimization.stage (5) must be at most 3"),
        (zero(stage="2"), 'zero_optimization.stage ("2") must be int; write it without quotes'),
        (zero(stage=None), "zero_optimization.stage (null) must be int"),
        (zero(overlap_comm="true"), 'overlap_comm ("true") must be true or false; write it without quotes'),
        (zero(reduce_bucket_size="5e8"), 'reduce_bucket_size ("5e8") must be int; write it without quotes'),
        (optimizer("AdamW", lr="1e-4"), 'optimizer.params.lr ("1e-4") must be float; write it without quotes'),
        (optimizer("AdamW", betas=0.9), "optimizer.params.betas (0.9) must be two numbers"),
        (optimizer("AdamW", betas=1.0), "optimizer.params.betas (1.0) must be two numbers"),
        ({TRAIN: "64"}, 'train_batch_size ("64") must be int or null; write it without quotes'),
        ({"fp16": {"loss_scale": "dynamic"}}, 'fp16.loss_scale ("dynamic") must be float; use 0, which is dynamic'),
        ({"fp16": {"loss_scale": "128"}}, 'fp16.loss_scale ("128") must be float; write it without quotes'),
        ({"gradient_clipping": [0] * 10_000}, "...) must be float"),
        (zero(reduce_bucket_size=0.5), "zero_optimization.reduce_bucket_size (0.5) must be int"),
        (zero(offload_optimizer={"device": 1}), "zero_optimization.offload_optimizer.device (1) must be text"),
        ({TRAIN: 1.5}, "train_batch_size (1.5) must be int or null"),
        ({"optimizer": {"type": 3}}, "optimizer.type (3) must be text"),
        ({"optimizer": {"type": "AdamW", "params": []}}, "optimizer.params ([]) must be an object"),
        ({"optimizer": {"type": "AdamW", "params": "auto"}}, 'optimizer.params ("auto") must be an object'),
        ({"optimizer": {}}, "optimizer.type is missing; use one of Adam, AdamW"),
        (optimizer("AdamW", lr=0), "optimizer.params.lr (0) must be greater than 0"),
        (optimizer("AdamW", betas=[0.9]), "optimizer.params.betas ([0.9]) must be two numbers"),
        (optimizer("AdamW", betas=[0.9, 2]), "optimizer.params.betas (2) must be less than 1"),
        (optimizer("AdmaW"), 'optimizer.type ("AdmaW") is unknown (did you mean AdamW?)'),
        (optimizer("sgd"), 'optimizer.type ("sgd") is unknown'),  # DeepSpeed takes torch's by their exact name
        ({"scheduler": {"params": {}}}, "scheduler.type is missing"),
        (scheduler("StepLR"), 'scheduler.type ("StepLR") is unknown'),
        (scheduler("WarmupDecayLR"), "scheduler.params.total_num_steps is missing"),
        (scheduler("WarmupCosineLR"), "scheduler.params.total_num_steps is missing"),
        (scheduler("WarmupLR", warmup_type="cubic"), "scheduler.params.warmup_type (cubic) is not one of linear, log"),
        (scheduler("WarmupLR", warmup_min_lr=1), "warmup_min_lr (1) must be from 0 to the peak learning rate (0.0001)"),
        (scheduler("WarmupLR", warmup_max_lr=0), "scheduler.params.warmup_max_lr (0) must be greater than 0"),
        ({"data_types": {"grad_accum_dtype": "int8"}}, 'grad_accum_dtype ("int8") must be one of fp32, bf16, fp16'),
        ({"steps_per_print": 0}, "steps_per_print (0) must be at least 1"),
    ],
    ids=str,
)
def test_bad_values(refused: Callable[..., str], file: dict[str, Any], part: str) -> None:
    assert part in refused(file, batch=TRAIN not in file)


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_other_optimizers_are_refused_by_name(refused: Callable[..., str], name: str) -> None:
    assert f'optimizer.type ("{name}") is not supported; use one of' in refused(optimizer(name))


@pytest.mark.parametrize("name", ["LRRangeTest", "OneCycle"])
def test_other_schedulers_are_refused_by_name(refused: Callable[..., str], name: str) -> None:
    assert f'scheduler.type ("{name}") is not supported; use one of WarmupLR' in refused(scheduler(name))


REFUSED: list[tuple[dict[str, Any], str]] = [
    (zero(offload_optimizer={"device": "nvme", "nvme_path": "/nvme"}), "zero_optimization.offload_optimizer.device"),
    (zero(offload_param={"device": "cpu"}), 'zero_optimization.offload_param.device ("cpu")'),
    (zero(offload_param={"device": "nvme"}), "only the optimizer state can be offloaded"),
    (zero(cpu_offload_param=True), "zero_optimization.cpu_offload_param (true)"),
    (zero(mics_shard_size=8), "zero_optimization.mics_shard_size (8) is not supported: set training.zero_group_size"),
    (zero(mics_hierarchical_params_gather=True), "zero_optimization.mics_hierarchical_params_gather"),
    (zero(zero_hpz_partition_size=8), "zero_optimization.zero_hpz_partition_size (8)"),
    (zero(zero_quantized_weights=True), "zero_optimization.zero_quantized_weights"),
    (zero(zero_quantized_gradients=True), "zero_optimization.zero_quantized_gradients"),
    (zero(zeropp_loco_param={"err_beta": 0.8}), "zero_optimization.zeropp_loco_param"),
    (zero(zenflow={"topk_ratio": 0.1}), "zero_optimization.zenflow"),
    ({"activation_checkpointing": {"partition_activations": True}}, "activation_checkpointing.partition_activations"),
    ({"activation_checkpointing": {"cpu_checkpointing": True}}, "activation_checkpointing.cpu_checkpointing"),
    ({"fp16": {"enabled": True, "consecutive_hysteresis": True}}, "fp16.consecutive_hysteresis"),
    ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, "fp16.fp16_master_weights_and_grads"),
    ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states"),
    (optimizer("Adam", amsgrad=True), "optimizer.params.amsgrad"),
    (optimizer("Adam", bias_correction=False), "optimizer.params.bias_correction (false)"),
    (optimizer("Adam", max_grad_norm=1.0), "optimizer.params.max_grad_norm (1.0) is not supported: use gradient_cl"),
    (optimizer("Lamb", max_coeff=0.3), "optimizer.params.max_coeff"),
    (optimizer("SGD", nesterov=True), "optimizer.params.nesterov"),
    (optimizer("SGD", dampening=0.1), "optimizer.params.dampening"),
    (scheduler("WarmupLR", last_batch_iteration=5), "scheduler.params.last_batch_iteration (5)"),
    ({"amp": {"enabled": True, "opt_level": "O1"}}, "amp is not supported: use bf16 or fp16"),
    ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention is not supported"),
    ({"tensor_parallel": {"autotp_size": 4}}, "training.tensor_parallel"),
    ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op ("sum")'),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size (2)"),
]


WHOLE_SECTIONS = (
    *("aio", "pipeline", "expert_parallel", "compression_training", "quantize_training", "weight_quantization"),
    *("curriculum_learning", "data_efficiency", "elasticity", "autotuning", "torch_autocast", "hybrid_engine"),
    *("progressive_layer_drop", "eigenvalue", "comet", "trackio", "nebula", "datastates_ckpt"),
)


@pytest.mark.parametrize("name", WHOLE_SECTIONS)
def test_whole_sections_are_refused_unless_they_are_off(
    run: Callable[..., tuple[Config, list[str]]], refused: Callable[..., str], name: str
) -> None:
    assert refused({name: {"enabled": True}}).startswith(f"{name} is not supported: ")
    run({name: {"enabled": False, "anything": 1}})


@pytest.mark.parametrize(("file", "part"), REFUSED, ids=str)
def test_refused(refused: Callable[..., str], file: dict[str, Any], part: str) -> None:
    text = refused(file)
    assert part in text and ": " in text


OFF: list[dict[str, Any]] = [
    {"amp": {"enabled": False}},
    {"amp": {"enabled": "auto", "opt_level": "auto"}},
    {"flops_profiler": {"enabled": False, "profile_step": 3, "output_file": None}},
    {"curriculum_learning": {"enabled": False, "curriculum_type": "seqlen"}},
    {"elasticity": {"enabled": False}},
    {"csv_monitor": {"enabled": False, "output_path": "x", "job_name": "y"}},
    {"comms_logger": {"enabled": False, "verbose": True}},
    {"sparse_attention": None},
    {"tensor_parallel": {"autotp_size": 1}},
    {"gradient_allreduce_op": "mean"},
    {"dump_state": False, "wall_clock_breakdown": False, "memory_breakdown": False},
    {"bf16": {"enabled": True, "bf16_master_weights_and_grads": False, "bf16_optimizer_states": False}},
    zero(zero_quantized_weights=False, zero_quantized_gradients=False, mics_hierarchical_params_gather=False),
]


@pytest.mark.parametrize("file", OFF, ids=str)
def test_what_is_off_is_passed_over(run: Callable[..., tuple[Config, list[str]]], file: dict[str, Any]) -> None:
    lines = run(file)[1]
    assert not [line for line in lines if "accepted" in line]


ACCEPTED: list[tuple[dict[str, Any], str]] = [
    (zero(overlap_comm=False, allgather_bucket_size=5e8), "overlap_comm, allgather_bucket_size accepted: XLA decides"),
    (zero(stage3_max_live_parameters=1e9, max_live_parameters=1), "stage3_max_live_parameters, max_live_parameters"),
    (zero(elastic_checkpoint=True), "elastic_checkpoint accepted: checkpoints"),
    ({"csv_monitor": {"enabled": True, "job_name": "x"}}, "csv_monitor accepted: the rows are in metrics.jsonl"),
    ({"flops_profiler": {"enabled": True, "profile_step": 1}}, "flops_profiler accepted: train/mfu is logged"),
    (
        {"tensorboard": {"enabled": True, "output_path": "x"}},
        "tensorboard.output_path accepted: event files go to logs/",
    ),
    ({"wandb": {"enabled": True, "team": "x"}}, "wandb.team accepted"),
    ({"wall_clock_breakdown": True, "dump_state": True}, "wall_clock_breakdown, dump_state accepted"),
    (
        {"checkpoint": {"tag_validation": "Warn", "parallel_write": {"pipeline_stage": True}}},
        "checkpoint.tag_validation",
    ),
    ({"communication_data_type": "fp16", "prescale_gradients": True}, "communication_data_type, prescale_gradients"),
    (optimizer("AdamW", torch_adam=True, fused=True), "optimizer.params.torch_adam, optimizer.params.fused accepted"),
]


@pytest.mark.parametrize(("file", "part"), ACCEPTED, ids=str)
def test_accepted_with_a_line(run: Callable[..., tuple[Config, list[str]]], file: dict[str, Any], part: str) -> None:
    (line,) = (line for line in run(file)[1] if "accepted" in line)
    assert line.startswith(f"training.deepspeed_config: {part}")


# --- the tables -------------------------------------------------------------------------------------------------------


def rules(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Rule]]:
    """Section, key and rule of everything in a table."""
    for name, rule in table.items():
        if isinstance(rule, Rule):
            yield prefix, name, rule
        else:
            yield from rules(rule, f"{prefix}.{name}".removeprefix("."))


def all_rules() -> Iterator[tuple[str, str, Rule]]:
    yield from rules(TABLE)
    for name, (_, table) in OPTIMIZERS.items():
        yield from rules(table, f"optimizer.params ({name})")
    for name, (_, table) in SCHEDULERS.items():
        yield from rules(table, f"scheduler.params ({name})")


def test_every_rule_is_one_of_three_things_or_documented() -> None:
    for section, name, rule in all_rules():
        assert rule.fields or rule.refused or rule.accepted is not None or rule.note, f"{section}.{name}"
        assert set(rule.fields) <= set(DEFAULTS)
        assert not (rule.accepted is not None and (rule.fields or rule.refused)), f"{section}.{name}"


@pytest.mark.parametrize(
    ("section", "name", "rule"), [pytest.param(*each, id=f"{each[0]}.{each[1]}") for each in all_rules()]
)
def test_auto(
    run: Callable[..., tuple[Config, list[str]]], refused: Callable[..., str], section: str, name: str, rule: Rule
) -> None:
    """Mapped and accepted keys may be auto, and leave the field as it is; refused ones may not."""
    path, _, kind = section.removesuffix(")").partition(" (")
    value: dict[str, Any] = {name: "auto"}
    if kind:  # params of an optimizer or a scheduler
        needed = {"total_num_steps": "auto"} if "total_num_steps" in SCHEDULERS.get(kind, ({}, {}))[1] else {}
        value = {path.removesuffix(".params"): {"type": kind, "params": needed | value}}
    else:
        for outer in reversed(path.split(".") if path else []):
            value = {outer: {"fp16": {"enabled": True}, "optimizer": {"type": "Adam"}}.get(outer, {}) | value}
    if rule.auto or "auto" in rule.harmless:
        values = _fields(run(value)[0])
        for field in rule.fields:
            assert values[field] == (2 if field == "training.zero_stage" else DEFAULTS[field])
    else:
        assert f'{name} ("auto")' in refused(value)


def verdict(rule: Rule) -> str:
    default = "" if not isinstance(rule.default, int | float | str | tuple) else f"DeepSpeed's default {rule.default}"
    if rule.fields:
        values = ", ".join(f"{key}: {json.dumps(value)}" for key, value in (rule.values or {}).items())
        said = ", ".join(f"`{field}`" for field in rule.fields)
        others = f"others refused: {rule.refused}" if rule.refused else ""
        rest = "; ".join(part for part in (values, rule.note, default, others) if part)
        return said + (f" ({rest})" if rest else "")
    if rule.refused:
        fine = ", ".join(f"`{json.dumps(value)}`" for value in rule.harmless)
        return f"**refused**: {rule.refused}" + (f" (fine: {fine})" if fine else "")
    if rule.accepted is not None:
        return f"accepted: {rule.accepted}" if rule.accepted else "accepted"
    return rule.note


def page_rows() -> list[str]:
    """The table of docs/deepspeed.md: keys of a section with the same fate share a row, and so do types."""
    types: dict[tuple[str, str, str], list[str]] = {}
    for section, name, rule in all_rules():
        path, _, kind = section.removesuffix(")").partition(" (")
        types.setdefault((path, name, verdict(rule)), []).append(kind)
    rows: dict[tuple[str, str], list[str]] = {}
    for (path, name, text), kinds in types.items():
        shared = len(kinds) == {"optimizer.params": len(OPTIMIZERS), "scheduler.params": len(SCHEDULERS)}.get(path, 1)
        label = path if shared else f"{path} ({', '.join(kinds)})"
        rows.setdefault((label or "top level", text), []).append(f"`{name}`")
    return [f"| {label} | {', '.join(names)} | {text} |" for (label, text), names in rows.items()]


HEAD = ["| section | key | becomes |", "|---|---|---|"]


def test_the_page_is_current() -> None:
    table = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert table == [*HEAD, *page_rows()], "run python tests/test_deepspeed.py"


def test_the_pages_example_is_the_one_that_works() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert json.loads(block) == json.loads(EXAMPLE)


if __name__ == "__main__":  # rewrites the page's table
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = lines.index(HEAD[0])
    after = next((n for n in range(first, len(lines)) if not lines[n].startswith("|")), len(lines))
    PAGE.write_text("\n".join([*lines[:first], *HEAD, *page_rows(), *lines[after:]]) + "\n", encoding="utf-8")
