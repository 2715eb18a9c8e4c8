"""DeepSpeed's JSON file: every key is mapped, ignored or refused, and docs/deepspeed.md says which."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import Config, TrainingConfig, replace_fields
from jaxlm.config.fields import accepts, field_values
from jaxlm.errors import UserError
from jaxlm.interop.deepspeed import RULES, TABLES, Rule, apply

PAGE = Path(__file__).parents[1] / "docs" / "deepspeed.md"
DEFAULTS = field_values(Config())
TRAIN, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
BATCH = {MICRO: 8, STEPS: 8}  # TrainingConfig's own defaults

File = dict[str, Any]  # keys may be dotted: {"fp16.enabled": True}


def nested(file: File) -> File:
    """The file with dotted keys as sections in sections."""
    values: File = {}
    for dotted, value in file.items():
        *sections, key = dotted.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return values


def optimizer(type: str, **params: Any) -> File:
    return {"optimizer": {"type": type, "params": {"lr": 1e-4, "weight_decay": 0.01} | params}}


def scheduler(type: str, **params: Any) -> File:
    return {"scheduler": {"type": type, "params": {"warmup_num_steps": 2000, "warmup_type": "linear"} | params}}


def zero(**values: Any) -> File:
    return {"zero_optimization": {"stage": 0} | values}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(file: Any, world: int | None = 1, batch: bool = True, **fields: Any) -> tuple[Config, list[str]]:
    """Applies a file's text, or its object beside a batch size: `run({...}, world=4, **{"training.seed": 7})`."""
    text = file if isinstance(file, str) else json.dumps(nested(file) | (BATCH if batch else {}))
    Path("ds.json").write_text(text, encoding="utf-8")
    training = TrainingConfig(use_deepspeed=True, deepspeed_config="ds.json")
    return apply(replace_fields(Config(training=training), fields), world)


def changed(file: Any, **rest: Any) -> dict[str, Any]:
    """The fields that a file sets to something else than the default, without those that every file here sets."""
    usual = DEFAULTS | {
        "training.use_deepspeed": True,
        "training.deepspeed_config": "ds.json",
        "training.zero_stage": 0,
    }
    return {name: value for name, value in field_values(run(file, **rest)[0]).items() if value != usual[name]}


def accepted(file: Any) -> list[str]:
    """The lines of the report on ignored keys."""
    return [line.removeprefix("training.deepspeed_config: ") for line in run(file)[1] if " accepted" in line]


def refused(file: Any, **rest: Any) -> str:
    """The error's text behind the file's name; it is one line."""
    with pytest.raises(UserError, match=r"^training\.deepspeed_config \(ds\.json\): .*$") as error:
        run(file, **rest)
    return str(error.value).partition("ds.json): ")[2]


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
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b'{"a": 1} // comment', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[1]", "must hold a JSON object"),
        (b'{"gradient_clipping": NaN}', "gradient_clipping (nan) must be a finite number"),
        (b'{"fp16": {"enabled": true, "enabled": false}}', "enabled is there twice"),
        (b'{"bf16": {}, "bf16": {}}', "bf16 is there twice"),
        (b"[" * 100_000, "nested too deeply"),
        *[(b'{"log_level": %s%s}' % (b"[" * n, b"]" * n), "") for n in range(800, 1001, 10)],  # about as deep as Python
        (None, "No such file or directory"),
        ("folder", "Is a directory"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_files_that_cannot_be_read(content: bytes | str | None, message: str) -> None:
    if content == "folder":
        Path("ds.json").mkdir()
    elif isinstance(content, bytes):
        Path("ds.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"^training\.deepspeed_config \(ds\.json\): .*{re.escape(message)}"):
        apply(Config(training=TrainingConfig(use_deepspeed=True, deepspeed_config="ds.json")), 1)


# --- what is mapped ---------------------------------------------------------------------------------------------------

LOSS_SCALE = {
    "fp16.loss_scale": 128,
    "fp16.initial_scale_power": 20,
    "fp16.loss_scale_window": 50,
    "fp16.hysteresis": 4,
    "fp16.min_loss_scale": 2,
}
DECAY = {"lr_scheduler": "linear", "min_lr_ratio": 0.0}
MAPPED: list[tuple[File, dict[str, Any]]] = [
    # optimizer
    (optimizer("AdamW"), {}),
    (optimizer("adamw", lr=2e-4), {"learning_rate": 2e-4}),
    (optimizer("Adam", betas=[0.8, 0.99], eps=1e-6), {"beta1": 0.8, "beta2": 0.99, "eps": 1e-6}),
    (optimizer("Adam", adam_w_mode=True, weight_decay=0), {"weight_decay": 0}),
    (optimizer("Adam", adam_w_mode=False), {"optimizer": "adam"}),
    (optimizer("AdamW", adam_w_mode=False), {}),  # as in DeepSpeed
    (optimizer("lamb", eps=1e-6, max_coeff=10, min_coeff=0.01), {"optimizer": "lamb", "eps": 1e-6}),
    (optimizer("LION", betas=[0.9, 0.99]), {"optimizer": "lion", "beta2": 0.99}),
    (optimizer("SGD", momentum=0.5), {"optimizer": "sgd", "beta1": 0.5}),
    (optimizer("SGD", dampening=0, nesterov=False), {"optimizer": "sgd", "beta1": 0.0}),
    # DeepSpeed's defaults of what is left out
    ({"optimizer.type": "AdamW"}, {"learning_rate": 1e-3, "weight_decay": 0.0}),
    ({"optimizer.type": "AdamW", "optimizer.params.torch_adam": True}, {"learning_rate": 1e-3}),
    ({"scheduler.type": "WarmupLR"}, {"lr_scheduler": "constant", "warmup_steps": 1000, "warmup_shape": "log"}),
    # scheduler
    (
        scheduler("WarmupLR", warmup_max_lr=1e-3, warmup_min_lr=1e-4),
        {"lr_scheduler": "constant", "learning_rate": 1e-3, "warmup_min_ratio": 0.1},
    ),
    (scheduler("WarmupLR", warmup_min_lr=0), {"lr_scheduler": "constant"}),
    (
        scheduler("WarmupDecayLR", total_num_steps=500, warmup_max_lr=2e-4, warmup_num_steps=5, warmup_type="log"),
        {"schedule_steps": 500, "learning_rate": 2e-4, "warmup_steps": 5, "warmup_shape": "log"} | DECAY,
    ),
    (scheduler("WarmupDecayLR", total_num_steps="auto"), {"learning_rate": 1e-3} | DECAY),
    (scheduler("WarmupCosineLR", total_num_steps=500), {"min_lr_ratio": 1e-4, "schedule_steps": 500}),
    (
        scheduler("WarmupCosineLR", total_num_steps=500, cos_min_ratio=0.2, warmup_min_ratio=0.3),
        {"min_lr_ratio": 0.2, "warmup_min_ratio": 0.3, "schedule_steps": 500},
    ),
    # precision
    ({"fp16.enabled": True}, {"amp_dtype": "float16"}),
    (
        {"fp16.enabled": True, "fp16.auto_cast": False} | LOSS_SCALE,
        {
            "amp_dtype": "float16",
            "loss_scale": 128,
            "initial_loss_scale_power": 20,
            "loss_scale_window": 50,
            "loss_scale_hysteresis": 4,
            "min_loss_scale": 2,
        },
    ),
    ({"fp16.enabled": False} | LOSS_SCALE, {"use_amp": False}),
    (LOSS_SCALE, {"use_amp": False}),
    ({"fp16": {}}, {"use_amp": False}),
    ({"bf16.enabled": True}, {}),
    ({"bfloat16.enabled": True, "fp16.enabled": False} | LOSS_SCALE, {}),
    ({"bf16.enabled": False, "fp16.enabled": False}, {"use_amp": False}),
    ({"bf16.enabled": "auto", "fp16.enabled": False}, {}),
    ({"bf16.enabled": "auto", "fp16.enabled": "auto"} | LOSS_SCALE, {}),
    ({"bf16.enabled": False, "fp16.enabled": "auto"}, {"use_amp": False}),
    ({"fp16.enabled": "auto"}, {}),
    # the rest
    ({"gradient_clipping": 0.5}, {"max_grad_norm": 0.5}),
    ({"gradient_clipping": 0}, {"max_grad_norm": None}),
    *[({"data_types.grad_accum_dtype": name}, {}) for name in ("fp32", "float32", None)],
    *[({"data_types.grad_accum_dtype": name}, {"accumulator_dtype": "bfloat16"}) for name in ("bf16", "bfloat16")],
    *[({"data_types.grad_accum_dtype": name}, {"accumulator_dtype": "float16"}) for name in ("fp16", "float16")],
    ({"steps_per_print": 7}, {"logging_steps": 7}),
    ({"steps_per_print": None}, {}),
    ({"tensorboard.enabled": True, "tensorboard.output_path": "logs", "tensorboard.job_name": "run"}, {}),
    ({"tensorboard.enabled": False}, {"report_to": ()}),
    ({"tensorboard.output_path": "logs"}, {}),
    (
        {"wandb.enabled": True, "wandb.project": "mine"},
        {"report_to": ("tensorboard", "wandb"), "wandb_project": "mine"},
    ),
    ({"wandb.enabled": False, "wandb.project": "mine"}, {}),
    ({"tensorboard.enabled": False, "wandb.enabled": True}, {"report_to": ("wandb",)}),  # each says a part
    (zero(stage=1), {"zero_stage": 1}),
    (zero(stage=2.0), {"zero_stage": 2}),
    (zero(stage=3), {"zero_stage": 3}),
    (zero(stage="auto"), {"zero_stage": 2}),
    ({"zero_optimization": True}, {"zero_stage": 1}),
    ({"zero_optimization": False}, {}),
    (zero(stage=0), {}),
    (zero(offload_optimizer={"device": "cpu", "pin_memory": True}), {"offload_optimizer": True}),
    (zero(offload_optimizer={"device": "none"}, offload_param={"device": "none"}), {}),
    (zero(offload_optimizer=None, offload_param=None), {}),
    (zero(cpu_offload=True), {"offload_optimizer": True}),
    (zero(cpu_offload=False), {}),
    (zero(cpu_offload=True, offload_optimizer={"device": "cpu"}), {"offload_optimizer": True}),
    (zero(cpu_offload=False, offload_optimizer={"device": "cpu"}), {"offload_optimizer": True}),
]


@pytest.mark.parametrize(("file", "fields"), MAPPED, ids=str)
def test_mapped(file: File, fields: dict[str, Any]) -> None:
    assert changed(file) == {f"training.{name}": value for name, value in fields.items()}
    once, _ = run(file)
    assert apply(once, 1)[0] == once


@pytest.mark.parametrize("blocks", [4, None, False])  # false is what many files have
def test_activation_checkpointing(blocks: Any) -> None:
    section = {"partition_activations": False, "number_checkpoints": blocks, "profile": True}
    for file in ({"activation_checkpointing": section}, {"activation_checkpointing": {}}):
        assert changed(file) == {"model.gradient_checkpointing": True}


def test_no_zero_section_is_stage_0() -> None:
    config, lines = run({})
    assert config.training.zero_stage == 0
    assert any("zero_optimization.stage 0" in line for line in lines)
    for file, stage in (({}, 2), (zero(stage="auto"), 1)):
        assert run(file, **{"training.zero_stage": stage})[0].training.zero_stage == stage


def test_the_schedulers_learning_rate_wins() -> None:
    file = scheduler("WarmupLR", warmup_max_lr=1e-3) | optimizer("AdamW", lr=5e-4)  # whatever stands first
    for either in (file, dict(reversed(file.items()))):
        config, lines = run(either)
        assert config.training.learning_rate == 1e-3
        assert [line for line in lines if "warmup_max_lr (0.001)" in line and "0.0005" in line]
    for name, rate in (("WarmupLR", 5e-4), ("WarmupDecayLR", 1e-3), ("WarmupCosineLR", 5e-4)):
        steps = {} if name == "WarmupLR" else {"total_num_steps": 9}
        config, lines = run(scheduler(name, **steps) | optimizer("AdamW", lr=5e-4))
        assert config.training.learning_rate == rate
        assert any("the learning rate" in line for line in lines) == (rate != 5e-4)


def test_what_the_file_leaves_out_may_be_set_in_config() -> None:
    """DeepSpeed's defaults fill only what both the file and the configuration leave open."""
    own = {"training.weight_decay": 0.1, "training.warmup_steps": 5, "training.learning_rate": 3e-4}
    file = {"optimizer.type": "AdamW", "scheduler.type": "WarmupLR"}
    assert changed(file, **own) == own | {"training.lr_scheduler": "constant", "training.warmup_shape": "log"}


def test_the_report_names_what_is_left_out_or_not_the_same() -> None:
    (line,) = (line for line in run({"optimizer.type": "AdamW"})[1] if "as DeepSpeed has it" in line)
    assert "optimizer.params.lr 0.001" in line and "weight_decay 0.0" in line and "params.eps" not in line
    (line,) = (line for line in run({})[1] if "as TrainingConfig has it" in line)
    for part in ("optimizer", "cosine", "max_grad_norm 1.0", "fp16, bf16", "amp_dtype bfloat16"):
        assert part in line
    assert any("trust ratio" in line for line in run(optimizer("Lamb"))[1])
    full = optimizer("AdamW") | scheduler("WarmupLR") | {"gradient_clipping": 1, "bf16.enabled": True}
    assert not [line for line in run(full)[1] if "as TrainingConfig has it" in line]


def test_betas_are_left_to_deepspeeds_defaults() -> None:
    training = TrainingConfig()  # the table has no default for betas, as it would change nothing
    assert (training.beta1, training.beta2, training.eps) == (0.9, 0.999, 1e-8)


def test_trackers_of_ones_own_stay_as_they_are() -> None:
    own = type("Own", (), {"__deepcopy__": None})()  # as a tracker with an open file, it can't be copied
    assert run({"wandb.enabled": False}, **{"training.report_to": (own,)})[0].training.report_to == (own,)


# --- the batch --------------------------------------------------------------------------------------------------------

GIVEN = [names for n in (1, 2, 3) for names in itertools.combinations((TRAIN, MICRO, STEPS), n)]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(GIVEN), *[st.integers(1, 9)] * 3)
def test_the_batch_rule(names: tuple[str, ...], micro: int, steps: int, world: int) -> None:
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
    "sizes",
    [
        {TRAIN: "auto"},
        {TRAIN: "auto", MICRO: "auto", STEPS: "auto"},
        {MICRO: "auto", STEPS: "auto"},
        {STEPS: "auto"},
        {TRAIN: "auto", STEPS: 3},
        {TRAIN: "auto", MICRO: 6},
        {TRAIN: 36, MICRO: "auto", STEPS: "auto"},
        {TRAIN: 36, MICRO: "auto"},
        {TRAIN: 36, STEPS: "auto"},
    ],
    ids=str,
)
def test_auto_takes_configs_sizes(sizes: File) -> None:
    own = {"training.batch_size": 6, "training.gradient_accumulation_steps": 3}
    training = run(sizes, world=2, batch=False, **own)[0].training
    assert (training.batch_size, training.gradient_accumulation_steps) == (6, 3)


@pytest.mark.parametrize(
    ("sizes", "world", "parts"),
    [
        ({}, 4, ["none of train_batch_size, train_micro", "is there"]),
        ({TRAIN: None}, 4, ["none of"]),
        ({TRAIN: 0}, 4, ["train_batch_size (0) must be at least 1"]),
        ({STEPS: -1, MICRO: 1}, 4, ["gradient_accumulation_steps (-1) must be at least 1"]),
        ({TRAIN: 64, MICRO: 5}, 4, ["(64) is not a multiple", "* devices (4) = 20", f"{TRAIN} 60 or {TRAIN} 80"]),
        ({TRAIN: 64, MICRO: 5}, None, ["(64) is not a multiple", "(5) = 5"]),
        ({TRAIN: 3}, 4, [f"{TRAIN} (3) is not a multiple", f"; {TRAIN} 4 would fit"]),
        ({TRAIN: 64, MICRO: 5, STEPS: 2}, None, ["not a multiple", "(5) * gradient_accumulation_steps (2) = 10"]),
        ({TRAIN: 64, MICRO: "auto", STEPS: "auto"}, 2, ["micro_batch_size_per_gpu (8)", "= 128", "devices 1"]),
    ],
    ids=str,
)
def test_batches_that_do_not_fit(sizes: File, world: int | None, parts: list[str]) -> None:
    text = refused(sizes, world=world, batch=False)
    assert not [part for part in parts if part not in text], text


# --- whole files ------------------------------------------------------------------------------------------------------


def test_the_example_of_the_page() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    training = run(example, world=4)[0].training
    assert training == dataclasses.replace(
        TrainingConfig(use_deepspeed=True, deepspeed_config=training.deepspeed_config),
        batch_size=4,
        gradient_accumulation_steps=4,
        amp_dtype="float16",
        zero_stage=2,
    )
    text = refused(example, world=2)
    for part in ("(64)", "(4)", "devices (2)", "= 32", f"{TRAIN} 32", f"{STEPS} 8", f"{MICRO} 8", "devices 4"):
        assert part in text


HUGGING_FACE = """{
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
             "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "amp": {"enabled": "auto", "opt_level": "auto"},
    "optimizer": {"type": "AdamW",
                  "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupDecayLR",
                  "params": {"total_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto",
                             "warmup_num_steps": "auto", "warmup_type": "linear"}},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": true},
                          "offload_param": {"device": "none"}, "overlap_comm": true, "contiguous_gradients": true,
                          "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
                          "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
                          "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": true},
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": false}"""


def test_a_file_for_hugging_face() -> None:
    own = {"training.learning_rate": 3e-4, "training.batch_size": 2, "training.amp_dtype": "float16"}
    assert changed(HUGGING_FACE, world=8, **own) == own | {
        "training.zero_stage": 3,
        "training.offload_optimizer": True,
        "training.lr_scheduler": "linear",
        "training.min_lr_ratio": 0.0,
        "training.logging_steps": 2000,
    }
    assert run(HUGGING_FACE, world=8, **own)[1] == [
        "training.deepspeed_config: offload_optimizer.pin_memory, overlap_comm, contiguous_gradients, sub_group_size, "
        "stage3_max_live_parameters, stage3_max_reuse_distance accepted: XLA decides these",
        "training.deepspeed_config: stage3_gather_16bit_weights_on_model_save accepted: checkpoints are jaxlm's own, "
        "and load on any number of devices",
    ]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_all_contradictions_in_one_error() -> None:
    own = {
        "training.learning_rate": 0.001,
        "training.optimizer": "sgd",
        "training.amp_dtype": "float16",
        "training.batch_size": 16,
        "training.report_to": ("wandb",),
        "training.max_grad_norm": 2.0,
        "training.seed": 7,
    }
    file = optimizer("AdamW") | {"bf16.enabled": True, MICRO: 4, "tensorboard.enabled": True, "gradient_clipping": 1}
    file |= zero(offload_optimizer={"device": "none"}, cpu_offload=True)  # two keys of the file
    parts = refused(file, batch=False, **own).split("; ")
    assert set(parts[:-1]) == {
        "training.learning_rate is 0.001, optimizer.params.lr is 0.0001",
        'training.optimizer is sgd, optimizer.type is "AdamW"',
        "training.amp_dtype is float16, bf16.enabled is true",
        "training.batch_size is 16, train_micro_batch_size_per_gpu is 4",
        "training.report_to is wandb, tensorboard.enabled is true",
        "training.max_grad_norm is 2.0, gradient_clipping is 1",
        'zero_optimization.offload_optimizer.device is "none", zero_optimization.cpu_offload is true',
    }
    assert '"auto"' in parts[-1]


DECAYING = scheduler("WarmupDecayLR", total_num_steps=9, warmup_max_lr=1e-4)


@pytest.mark.parametrize(
    ("file", "own", "part"),
    [
        ({"fp16.enabled": False}, {"amp_dtype": "float16"}, "amp_dtype is float16, fp16.enabled is false"),
        ({"bf16.enabled": True}, {"use_amp": False}, "use_amp is false, bf16.enabled is true"),
        ({"gradient_clipping": 0}, {"max_grad_norm": 2.0}, "max_grad_norm is 2.0, gradient_clipping is 0"),
        ({"gradient_clipping": 1}, {"max_grad_norm": None}, "max_grad_norm is none, gradient_clipping is 1"),
        (zero(stage=1), {"zero_stage": 2}, "zero_stage is 2, zero_optimization.stage is 1"),
        (zero(cpu_offload=True, offload_optimizer={"device": "none"}), {}, "cpu_offload is true, zero_optimization."),
        (DECAYING, {"min_lr_ratio": 0.5}, 'min_lr_ratio is 0.5, scheduler.type is "WarmupDecayLR"'),
        ({TRAIN: 64, MICRO: 8, STEPS: "auto"}, {"gradient_accumulation_steps": 2}, "(64) is not"),
        ({TRAIN: 64, STEPS: 4}, {"batch_size": 4}, "batch_size is 4, train_batch_size (64) / (gradient"),
    ],
    ids=str,
)
def test_contradictions(file: File, own: dict[str, Any], part: str) -> None:
    fields = {f"training.{name}": value for name, value in own.items()}
    assert part in refused(file, batch=TRAIN not in file, **fields)


def test_agreement_is_no_contradiction() -> None:
    own = {"training.learning_rate": 5e-4, "training.max_grad_norm": 0.5}
    assert changed(optimizer("AdamW", lr=5e-4) | {"gradient_clipping": 0.5}, **own) == own
    own = {"training.use_amp": False, "training.amp_dtype": "float16"}
    assert changed({"fp16.enabled": False}, **own) == own


QUOTES = "; numbers, true and false stand without quotes"
TYPES = "Adam, AdamW, Lamb, Lion, SGD"


@pytest.mark.parametrize(
    ("file", "part"),
    [
        # unknown keys
        ({"zero_optimisation.stage": 2}, "unknown key zero_optimisation (did you mean zero_optimization?)"),
        (zero(stge=2), "unknown key zero_optimization.stge (did you mean stage?)"),
        (
            zero(offload_optimizer={"divice": "cpu"}),
            "zero_optimization.offload_optimizer.divice (did you mean device?)",
        ),
        (optimizer("AdamW", learning_rate=1), "unknown key optimizer.params.learning_rate"),
        (optimizer("AdamW", wieght_decay=1), "optimizer.params.wieght_decay (did you mean weight_decay?)"),
        (optimizer("Lion", eps=1e-8), "unknown key optimizer.params.eps"),
        (scheduler("WarmupLR", total_num_steps=9), "unknown key scheduler.params.total_num_steps"),
        ({"fp16.enabled": False, "fp16.los_scale": 1}, "fp16.los_scale (did you mean loss_scale?)"),
        ('{"fp16.enabled": true}', "unknown key fp16.enabled"),
        ({"quux": 1}, "unknown key quux"),
        # types
        ({"gradient_clipping": "0.5"}, f'gradient_clipping ("0.5") must be float{QUOTES}'),
        ({"gradient_clipping": True}, "gradient_clipping (true) must be float"),
        ({"gradient_clipping": [0] * 10_000}, "...) must be float"),
        ({"fp16": True}, "fp16 (true) must be an object"),
        ({"fp16.enabled": "yes"}, 'fp16.enabled ("yes") must be true or false'),
        ({"fp16.enabled": True, "fp16.initial_scale_power": 1.5}, "fp16.initial_scale_power (1.5) must be int"),
        ({"fp16.loss_scale": "dynamic"}, 'fp16.loss_scale ("dynamic") must be float; a number without quotes; 0 is'),
        (zero(stage="2"), f'zero_optimization.stage ("2") must be int{QUOTES}'),
        (zero(stage=None), "zero_optimization.stage (null) must be int"),
        (zero(reduce_bucket_size="5e8"), f'reduce_bucket_size ("5e8") must be int{QUOTES}'),
        (zero(reduce_bucket_size=0.5), "zero_optimization.reduce_bucket_size (0.5) must be int"),
        (zero(offload_optimizer={"device": 1}), "zero_optimization.offload_optimizer.device (1) must be one of cpu,"),
        (optimizer("AdamW", betas=0.9), "optimizer.params.betas (0.9) must be list; two numbers"),
        (optimizer("AdamW", betas=[0.9]), "optimizer.params.betas ([0.9]) must be list; two numbers"),
        (optimizer("AdamW", betas=[0.9, "x"]), "optimizer.params.betas ('x') must be float"),
        ({TRAIN: "64"}, f'train_batch_size ("64") must be int or null{QUOTES}'),
        ({"optimizer.type": "AdamW", "optimizer.params": []}, "optimizer.params ([]) must be an object"),
        ({"optimizer.type": "AdamW", "optimizer.params": "auto"}, 'optimizer.params ("auto") must be an object'),
        # values
        ({"fp16.enabled": True, "bf16.enabled": True}, "fp16.enabled and bf16.enabled are both true"),
        ({"bf16": {}, "bfloat16": {}}, "bf16 and bfloat16 are the same section"),
        ({"gradient_clipping": -1}, "gradient_clipping (-1) must be greater than 0"),
        ({"steps_per_print": 0}, "steps_per_print (0) must be at least 1"),
        ({"data_types.grad_accum_dtype": "int8"}, 'grad_accum_dtype ("int8") must be one of fp32, bf16, fp16'),
        (zero(stage=5), "zero_optimization.stage (5) must be at most 3"),
        (
            zero(offload_optimizer={"device": "nvme"}),
            '("nvme") must be one of cpu, none; there is no offloading to disk',
        ),
        (optimizer("AdamW", lr=0), "optimizer.params.lr (0) must be greater than 0"),
        (optimizer("AdamW", betas=[0.9, 2]), "optimizer.params.betas (2) must be less than 1"),
        ({"optimizer": {}}, f"optimizer.type (null) must be one of {TYPES}"),
        ({"optimizer.type": 3}, f"optimizer.type (3) must be one of {TYPES}"),
        ({"optimizer.type": "auto"}, f'optimizer.type ("auto") must be one of {TYPES}'),
        ({"optimizer.params": {}, "optimizer.type": "Muon"}, f'optimizer.type ("Muon") must be one of {TYPES}'),
        (optimizer("AdmaW"), f'optimizer.type ("AdmaW") must be one of {TYPES} (did you mean AdamW?)'),
        (optimizer("sgd"), f'optimizer.type ("sgd") must be one of {TYPES}'),  # DeepSpeed takes torch's as they are
        ({"scheduler.params": {}}, "scheduler.type (null) must be one of WarmupLR, WarmupDecayLR, WarmupCosineLR"),
        (scheduler("OneCycle"), 'scheduler.type ("OneCycle") must be one of WarmupLR, WarmupDecayLR, WarmupCosineLR'),
        (scheduler("warmuplr"), 'scheduler.type ("warmuplr") must be one of WarmupLR, WarmupDecayLR, WarmupCosineLR'),
        (scheduler("WarmupDecayLR"), "scheduler.params.total_num_steps is missing"),
        (scheduler("WarmupCosineLR"), "scheduler.params.total_num_steps is missing"),
        (scheduler("WarmupLR", warmup_type="cubic"), "scheduler.params.warmup_type (cubic) is not one of linear, log"),
        (scheduler("WarmupLR", warmup_min_lr=1), "warmup_min_lr (1) must be from 0 to the peak learning rate (0.0001)"),
        (scheduler("WarmupLR", warmup_max_lr=0), "scheduler.params.warmup_max_lr (0) must be greater than 0"),
    ],
    ids=lambda value: str(value)[:80],
)
def test_bad_keys_and_values(file: Any, part: str) -> None:
    assert part in refused(file, batch=TRAIN not in file)


# --- the tables -------------------------------------------------------------------------------------------------------


def types_with(key: str) -> list[str]:
    """The types of optimizer or scheduler that have this one of their params."""
    section, _, name = key.partition(".params.")
    return [type for type in RULES[f"{section}.type"].values if name in TABLES["params"][type].split()]


def file_with(key: str, value: Any) -> File:
    """A file that has the key, and what it doesn't make sense without."""
    section = key.partition(".")[0]
    needed: File = {"fp16": {"fp16.enabled": True}, "optimizer": {"optimizer.type": "Adam"}}.get(section, {})
    if ".params." in key:
        needed = {f"{section}.type": types_with(key)[0]}
        if needed.get("scheduler.type") in types_with("scheduler.params.total_num_steps"):
            needed |= {"scheduler.params.total_num_steps": "auto"}
    return needed | {key: value}


@pytest.mark.parametrize("key", [key for key, rule in RULES.items() if rule.refused is None])
def test_auto_leaves_a_field_as_it_is(key: str) -> None:
    if key.endswith(".type"):
        assert f'{key} ("auto") must be one of' in refused(file_with(key, "auto"))
        return
    for field in RULES[key].fields:
        assert field_values(run(file_with(key, "auto"))[0])[field] == (
            2 if field == "training.zero_stage" else DEFAULTS[field]
        )
    assert not accepted(file_with(key, "auto"))


@pytest.mark.parametrize("key", [key for key, rule in RULES.items() if rule.refused is not None])
def test_refused_unless_it_asks_for_nothing(key: str) -> None:
    rule = RULES[key]
    for value in [7, True, "auto", *([False] if False not in rule.off else [])]:
        if value not in rule.off:
            assert refused(file_with(key, value)) == f"{key} ({json.dumps(value)}) is not supported: {rule.refused}"
    assert refused(file_with(key, {"enabled": True})) == f"{key} is not supported: {rule.refused}"
    for value in (*rule.off, {"enabled": False, "anything": 1}, {"enabled": "auto", "anything": "auto"}):
        assert not accepted(file_with(key, value))


@pytest.mark.parametrize("key", [key for key, rule in RULES.items() if rule.ignored is not None])
def test_ignored_with_a_line_for_the_reason(key: str) -> None:
    rule = RULES[key]
    name = key.removeprefix("zero_optimization.").removesuffix(".enabled")
    fine = {value: accepts(rule.kind, json.loads(value)) for value in ("true", "5", '"x"', "[1]", '{"a": 1}')}
    assert set(fine.values()) == {True, False}
    for value, good in fine.items():
        file = file_with(key, json.loads(value))
        if good:
            assert accepted(file) == ([f"{name} accepted: {rule.ignored}"] if rule.ignored else [])
        else:
            assert refused(file).startswith(f"{key} ({value}) must be ")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        (
            zero(overlap_comm=False, allgather_bucket_size=5e8),
            "overlap_comm, allgather_bucket_size accepted: XLA decides",
        ),
        ({"csv_monitor.enabled": True, "csv_monitor.job_name": "x"}, "csv_monitor accepted: the rows are in metrics"),
        ({"flops_profiler.enabled": False, "flops_profiler.profile_step": 3, "flops_profiler.output_file": None}, None),
        ({"csv_monitor.enabled": False, "csv_monitor.output_path": "x"}, None),
        ({"comms_logger.enabled": False, "comms_logger.verbose": True}, None),
        ({"dump_state": False, "wall_clock_breakdown": False, "memory_breakdown": False}, None),
        (
            {"wall_clock_breakdown": True, "dump_state": True},
            "wall_clock_breakdown, dump_state accepted: what is printed",
        ),
        (
            zero(contiguous_gradients=True) | {"checkpoint.parallel_write.pipeline_stage": False},
            "contiguous_gradients acc",
        ),
    ],
    ids=str,
)
def test_one_line_for_each_reason(file: File, line: str | None) -> None:
    assert [each.startswith(str(line)) for each in accepted(file)] == [True] * (line is not None)


def test_the_tables_name_each_key_once() -> None:
    sections = [item for reason in TABLES["ignored"].values() for item in reason.items()]
    ignored = [
        f"{section}.{name.partition(':')[0]}".lstrip(".") for section, names in sections for name in names.split()
    ]
    refused = [key for keys in TABLES["refused"].values() for key in keys.split()]
    assert sorted([*TABLES["mapped"], *ignored, *refused]) == sorted(RULES)
    assert set(TABLES["harmless"]) <= set(refused)
    params = {name for names in TABLES["params"].values() for name in names.split()}
    assert params == {key.partition(".params.")[2] for key in RULES if ".params." in key}
    for key, rule in RULES.items():
        assert rule.fields or rule.note or rule.refused or rule.ignored is not None, key


def verdict(rule: Rule) -> str:
    """The third column of the page."""
    if rule.refused is not None:
        fine = ", ".join(f"`{json.dumps(value)}`" for value in rule.off if value is not None)
        return f"**refused**: {rule.refused}" + (f" (fine: {fine})" if fine else "")
    if rule.ignored is not None:
        return f"accepted: {rule.ignored}".removesuffix(": ")
    values = ", ".join(f"{key}: {json.dumps(value)}" for key, value in rule.values.items())
    default = "" if rule.default is None else f"DeepSpeed's default {rule.default}"
    rest = "; ".join(filter(None, (values, rule.note, default, rule.hint)))
    fields = ", ".join(f"`{field}`" for field in rule.fields)
    return f"{fields} ({rest})" if fields and rest else fields or rest


def page_rows() -> list[str]:
    """The table of docs/deepspeed.md: keys of a section with the same fate share a row."""
    rows: dict[str, dict[tuple[str, str], list[str]]] = {}
    for key, rule in RULES.items():
        section, _, name = key.rpartition(".")
        types = types_with(key) if section.endswith(".params") else []
        some = types and len(types) < len(RULES[section.replace("params", "type")].values)
        label = f"{section} ({', '.join(types)})" if some else section or "top level"
        rows.setdefault(section, {}).setdefault((label, verdict(rule)), []).append(f"`{name}`")
    return [
        f"| {label} | {', '.join(names)} | {text} |" for row in rows.values() for (label, text), names in row.items()
    ]


HEAD = ["| section | key | becomes |", "|---|---|---|"]


def test_the_page_is_current() -> None:
    table = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert table == [*HEAD, *page_rows()], "run python tests/test_deepspeed.py"


if __name__ == "__main__":  # rewrites the page's table
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = lines.index(HEAD[0])
    after = next((n for n in range(first, len(lines)) if not lines[n].startswith("|")), len(lines))
    PAGE.write_text("\n".join([*lines[:first], *HEAD, *page_rows(), *lines[after:]]) + "\n", encoding="utf-8")
