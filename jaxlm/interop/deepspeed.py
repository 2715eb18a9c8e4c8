"""DeepSpeed's JSON file: its keys become fields of Config, are accepted because nothing follows from them, or refused.

The tables say which of the three for every key; docs/deepspeed.md shows them. Names, meanings and defaults are those of
https://www.deepspeed.ai/docs/config-json/, https://deepspeed.readthedocs.io/en/latest/schedulers.html and, where these
differ, of the program (github.com/deepspeedai/DeepSpeed); "auto" is https://huggingface.co/docs/transformers/deepspeed's.
"""

import dataclasses
import json
import math
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from jaxlm.config import SECTIONS, Config, nearest, plain, replace_fields, type_name
from jaxlm.config.fields import SHOWN, accepts
from jaxlm.config.validate import check_field
from jaxlm.errors import UserError

PAIR = "two numbers"  # a kind, beside Python's types
MISSING = object()


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of a key: it sets `fields`, is `accepted` or `refused` for a reason, or _File has code for it."""

    kind: Any  # the type of its value
    fields: tuple[str, ...] = ()
    accepted: str | None = None  # "": no line in the report
    refused: str | None = None
    values: dict[str, Any] | None = None  # DeepSpeed's value -> jaxlm's, where they differ; the others are errors
    harmless: tuple[Any, ...] = ()  # values that ask for nothing
    default: Any = MISSING  # DeepSpeed's, for keys that mean something by being left out
    note: str = ""  # for the documentation
    auto: bool = True  # whether "auto" is taken
    hint: str = ""  # what to do about a value of another type

    def parts(self, value: Any) -> Iterable[tuple[str, Any]]:
        """The fields with what each gets of `value`."""
        return zip(self.fields, value if self.kind == PAIR else [value] * len(self.fields), strict=True)


Table = dict[str, Any]  # name -> Rule, or the Table of a section


def _to(kind: Any, *fields: str, **rest: Any) -> Rule:
    return Rule(kind, fields, **rest)


def _accept(kind: Any, why: str, names: str) -> Table:
    # Switches that are off ask for nothing; a tuning key that is off still says something that is not followed.
    return {name: Rule(kind, accepted=why, harmless=() if why == XLA else (False, None)) for name in names.split()}


def _refuse(why: str, names: str, harmless: tuple[Any, ...] = (False, None), kind: Any = object) -> Table:
    return {name: Rule(kind, refused=why, harmless=harmless, auto=False) for name in names.split()}


XLA = "XLA decides these"
NOTHING = "they have nothing to act on here"
LOGS = "what is printed is jaxlm's"
CHECKPOINTS = "checkpoints are jaxlm's own, and load on any number of devices"
MEND = 'make them equal, leave the fields at their defaults, or write "auto" in the file'
NO = "it has no counterpart here; remove it"
NVME = "use cpu or none, there is no offloading to disk"
PARAMETERS = "only the optimizer state can be offloaded; use none, and stage 3 to shard the parameters"
PLUS = "ZeRO++ has no counterpart here; remove it"

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPES |= {ours: ours for ours in DTYPES.values()}

OFFLOAD_OPTIMIZER: Table = {
    "device": _to(str, "training.offload_optimizer", values={"cpu": True, "none": False}, refused=NVME),
    **_accept(bool, XLA, "pin_memory pipeline_read pipeline_write fast_init super_offload convert_grad_on_cpu"),
    **_accept(float, XLA, "ratio cpuadam_cores_perc"),
    **_accept(int, XLA, "buffer_count"),
    **_accept(str | None, "", "nvme_path"),
}
OFFLOAD_PARAM: Table = {
    **_refuse(PARAMETERS, "device", harmless=("none", "auto"), kind=str),
    **_accept(bool, "", "pin_memory"),
    **_accept(int, "", "buffer_count buffer_size max_in_cpu"),
    **_accept(str | None, "", "nvme_path"),
}
# DeepSpeed takes these with and without "stage3_" before the name.
STAGE3_SIZES = (
    "max_live_parameters max_reuse_distance prefetch_bucket_size param_persistence_threshold "
    "model_persistence_threshold module_granularity_threshold partition_stream_chunk_size"
)
STAGE3_SWITCHES = "use_all_reduce_for_fetch_params allgather_sequential"
ZERO: Table = {
    "stage": _to(int, "training.zero_stage", default=0),
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "offload_param": OFFLOAD_PARAM,
    "cpu_offload": _to(bool, "training.offload_optimizer", harmless=(False, None), note="deprecated by DeepSpeed"),
    **_refuse(PARAMETERS, "cpu_offload_param cpu_offload_params"),
    **_refuse("set training.zero_group_size instead", "mics_shard_size", harmless=(-1,)),
    **_refuse("set training.zero_group_size instead", "mics_hierarchical_params_gather"),
    **_refuse(PLUS, "zero_hpz_partition_size", harmless=(1,)),
    **_refuse(PLUS, "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients"),
    **_refuse(PLUS, "zeropp_loco_param"),
    **_refuse("ZenFlow has no counterpart here; remove it", "zenflow"),
    **_accept(bool, XLA, "overlap_comm reduce_scatter contiguous_gradients allgather_partitions round_robin_gradients"),
    **_accept(bool, XLA, "use_multi_rank_bucket_allreduce memory_efficient_linear parameter_alignment grad_hooks"),
    **_accept(bool, XLA, f"cpu_offload_use_pin_memory legacy_stage1 {STAGE3_SWITCHES}"),
    **_accept(bool, XLA, " ".join(f"stage3_{name}" for name in STAGE3_SWITCHES.split())),
    **_accept(int, XLA, f"reduce_bucket_size allgather_bucket_size sub_group_size {STAGE3_SIZES}"),
    **_accept(int, XLA, " ".join(f"stage3_{name}" for name in STAGE3_SIZES.split())),
    **_accept(bool, CHECKPOINTS, "elastic_checkpoint load_from_fp32_weights pipeline_loading_checkpoint"),
    **_accept(bool, CHECKPOINTS, "stage3_gather_fp16_weights_on_model_save stage3_gather_16bit_weights_on_model_save"),
    **_accept(bool, CHECKPOINTS, "gather_16bit_weights_on_model_save"),
    **_accept(bool, NOTHING, "ignore_unused_parameters override_module_apply save_muon_momentum_buffer_in_memory"),
    **_accept(bool, NOTHING, "compute_grad_norm enable_sanity_checks log_trace_cache_warnings"),
    **_accept(dict, NOTHING, "leaf_module"),
}

FP16: Table = {
    "enabled": Rule(bool, note="`training.use_amp`, `training.amp_dtype` float16; without fp16 and bf16: float32"),
    "loss_scale": _to(float, "training.loss_scale", note="0: dynamic", hint="use 0, which is dynamic"),
    "initial_scale_power": _to(int, "training.initial_loss_scale_power"),
    "loss_scale_window": _to(int, "training.loss_scale_window"),
    "hysteresis": _to(int, "training.loss_scale_hysteresis"),
    "min_loss_scale": _to(float, "training.min_loss_scale"),
    **_accept(bool, NOTHING, "auto_cast"),
    **_accept(bool, "", "fused_mode"),
    **_refuse("the hysteresis is renewed when the scale grows; set it false", "consecutive_hysteresis"),
    **_refuse("master weights are float32; set it false", "fp16_master_weights_and_grads"),
}
BF16: Table = {
    "enabled": Rule(bool, note="`training.use_amp`, `training.amp_dtype` bfloat16; without fp16 and bf16: float32"),
    **_accept(bool, NOTHING, "immediate_grad_update check_grad_overflow"),
    **_refuse("master weights and optimizer state are float32; set it false", "bf16_master_weights_and_grads"),
    **_refuse("master weights and optimizer state are float32; set it false", "bf16_optimizer_states"),
}
DATA_TYPES: Table = {
    "grad_accum_dtype": _to(str | None, "training.accumulator_dtype", values=DTYPES, harmless=(None,)),
    **_refuse("parameters are float32, computation is what fp16 and bf16 say", "param_dtype buffer_dtype"),
}
ACTIVATIONS: Table = {
    **_refuse("recomputed activations are neither split nor moved; set it false", "partition_activations"),
    **_refuse("recomputed activations are neither split nor moved; set it false", "cpu_checkpointing"),
    **_accept(bool, XLA, "contiguous_memory_optimization synchronize_checkpoint_boundary profile"),
    **_accept(int | bool | None, XLA, "number_checkpoints"),  # false, which many files have, is DeepSpeed's null
}

EVENTS = "event files go to logs/ in training.checkpoint_dir"
TENSORBOARD: Table = {
    "enabled": Rule(bool, note="`training.report_to` with or without tensorboard"),
    **_accept(str | None, EVENTS, "output_path job_name"),
}
WANDB: Table = {
    "enabled": Rule(bool, note="`training.report_to` with or without wandb"),
    "project": _to(str, "training.wandb_project"),
    **_accept(str | None, "W&B takes these from WANDB_RUN_GROUP and WANDB_ENTITY", "group team"),
}
CSV: Table = {
    **_accept(bool, "the rows are in metrics.jsonl in training.checkpoint_dir", "enabled"),
    **_accept(str | None, "", "output_path job_name"),
}
FLOPS: Table = {
    **_accept(bool, "train/mfu is logged", "enabled"),
    **_accept(float, "", "recompute_fwd_factor"),
    **_accept(int, "", "profile_step module_depth top_modules"),
    **_accept(bool, "", "detailed"),
    **_accept(str | None, "", "output_file"),
}
COMMS: Table = {
    **_accept(bool, LOGS, "enabled"),
    **_accept(bool, "", "verbose prof_all debug"),
    **_accept(list, "", "prof_ops"),
}
CHECKPOINT: Table = {
    **_accept(str, CHECKPOINTS, "tag_validation"),
    **_accept(bool, CHECKPOINTS, "load_universal use_node_local_storage"),
    "parallel_write": _accept(bool, CHECKPOINTS, "pipeline_stage"),
    **_accept(dict | None, CHECKPOINTS, "writer"),
    **_accept(bool, CHECKPOINTS, "checkpoint_serialization"),
}

COMMON: Table = {
    "lr": _to(float, "training.learning_rate", default=0.001),
    "weight_decay": _to(float, "training.weight_decay", default=0.0, note="not of biases and norms"),
    **_accept(bool, XLA, "fused foreach capturable differentiable set_grad_none"),
    **_refuse("AMSGrad has no counterpart here; set it false", "amsgrad"),
    **_refuse("the loss is minimised; set it false", "maximize"),
    **_refuse("use gradient_clipping, as DeepSpeed asks for too", "max_grad_norm", harmless=()),
}
BETAS: Table = {"betas": _to(PAIR, "training.beta1", "training.beta2", default=(0.9, 0.999))}
MOMENTS: Table = {
    **COMMON,
    **BETAS,
    "eps": _to(float, "training.eps", default=1e-8),
    **_refuse("moments are always corrected; set it true", "bias_correction", harmless=(True,)),
}
ADAM: Table = {
    **MOMENTS,
    "adam_w_mode": Rule(bool, note="Adam with false is `training.optimizer` adam; AdamW is always adamw"),
    **_accept(bool, XLA, "torch_adam"),
    **_refuse("optimizer state is float32; set it true", "fp32_optimizer_states", harmless=(True,)),
}
LAMB: Table = {
    **MOMENTS,
    **_refuse("eps stays outside the root; set it false", "eps_inside_sqrt"),
    **_refuse("the trust ratio is not bounded; remove it", "max_coeff", harmless=(10.0,)),
    **_refuse("the trust ratio is not bounded; remove it", "min_coeff", harmless=(0.01,)),
}
SGD: Table = {
    **COMMON,
    "momentum": _to(float, "training.beta1", default=0.0),
    **_refuse("momentum is not damped; set it 0", "dampening", harmless=(0,)),
    **_refuse("Nesterov momentum has no counterpart here; set it false", "nesterov"),
}
OPTIMIZERS: dict[str, tuple[str, Table]] = {
    "Adam": ("adamw", ADAM),
    "AdamW": ("adamw", ADAM),
    "Lamb": ("lamb", LAMB),
    "Lion": ("lion", {**COMMON, **BETAS}),
    "SGD": ("sgd", SGD),
}
DEEPSPEEDS = ["OneBitAdam", "ZeroOneAdam", "OneBitLamb", "Adagrad", "MuAdam", "MuAdamW", "MuSGD", "Muon"]
TORCHS = ["Adadelta", "Adafactor", "Adamax", "ASGD", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam"]
OTHER_OPTIMIZERS = [*DEEPSPEEDS, *TORCHS]
ANY_CASE = {*OPTIMIZERS, *DEEPSPEEDS} - {"SGD"}  # DeepSpeed looks for torch's by their exact name

STEPS = _to(int, "training.schedule_steps", note="has to be there; a number or auto")
WARMUP: Table = {
    "warmup_num_steps": _to(int, "training.warmup_steps", default=1000, note="at most a tenth of the run"),
    "warmup_type": _to(str, "training.warmup_shape", default="log"),
    **_refuse("set training.resume_from_checkpoint to go on with a run", "last_batch_iteration", harmless=(-1,)),
}
# Without it WarmupLR rises to the optimizer's learning rate, WarmupDecayLR to a default of its own.
PEAK = _to(float, "training.learning_rate", note="wins over optimizer.params.lr")
FLOOR = Rule(float, note="`training.warmup_min_ratio`, divided by warmup_max_lr")
SCHEDULERS: dict[str, tuple[dict[str, Any], Table]] = {
    "WarmupLR": (
        {"training.lr_scheduler": "constant"},
        {"warmup_min_lr": FLOOR, "warmup_max_lr": PEAK, **WARMUP},
    ),
    "WarmupDecayLR": (
        {"training.lr_scheduler": "linear", "training.min_lr_ratio": 0.0},
        {
            "total_num_steps": STEPS,
            "warmup_min_lr": FLOOR,
            "warmup_max_lr": dataclasses.replace(PEAK, default=0.001),
            **WARMUP,
        },
    ),
    "WarmupCosineLR": (
        {"training.lr_scheduler": "cosine"},
        {
            "total_num_steps": STEPS,
            "warmup_min_ratio": _to(float, "training.warmup_min_ratio", default=0.0),
            "cos_min_ratio": _to(float, "training.min_lr_ratio", default=0.0001),
            **WARMUP,
        },
    ),
}
OTHER_SCHEDULERS = ["LRRangeTest", "OneCycle"]

TRAIN, MICRO, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
BATCH = {MICRO: "training.batch_size", ACCUMULATION: "training.gradient_accumulation_steps"}
TABLE: Table = {
    TRAIN: Rule(int | None, note=f"{MICRO} * {ACCUMULATION} * devices; checked, or gives one of them"),
    MICRO: Rule(int | None, note="`training.batch_size`"),
    ACCUMULATION: Rule(int | None, note="`training.gradient_accumulation_steps`"),
    "optimizer": {
        "type": Rule(str, note="`training.optimizer`: " + ", ".join(OPTIMIZERS), auto=False),
        "params": Rule(dict, note="below, by type", auto=False),
        **_accept(bool, "", "legacy_fusion"),
    },
    "scheduler": {
        "type": Rule(str, note="`training.lr_scheduler`: " + ", ".join(SCHEDULERS), auto=False),
        "params": Rule(dict, note="below, by type", auto=False),
    },
    "gradient_clipping": _to(float, "training.max_grad_norm", note="0: none"),
    "fp16": FP16,
    "bf16": BF16,
    "data_types": DATA_TYPES,
    "zero_optimization": ZERO,
    "activation_checkpointing": ACTIVATIONS,
    "steps_per_print": _to(int | None, "training.logging_steps", harmless=(None,)),
    "tensorboard": TENSORBOARD,
    "wandb": WANDB,
    "csv_monitor": CSV,
    "flops_profiler": FLOPS,
    "comms_logger": COMMS,
    "checkpoint": CHECKPOINT,
    **_accept(bool, LOGS, "wall_clock_breakdown memory_breakdown dump_state"),
    **_accept(str, LOGS, "log_level"),
    **_accept(bool, XLA, "disable_allgather fp32_allreduce prescale_gradients sparse_gradients graph_harvesting"),
    **_accept(float, XLA, "gradient_predivide_factor allgather_size"),
    **_accept(str | None, XLA, "communication_data_type seq_parallel_comm_data_type"),
    **_accept(dict, XLA, "compile timers"),
    **_accept(bool, NOTHING, "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer disable_python_gc"),
    **_accept(bool, NOTHING, "dataloader_drop_last use_data_before_expert_parallelism"),
    **_accept(int | None, NOTHING, "vocabulary_size"),
    **_refuse("updates come at the end of the accumulation; set it true", "managed_gradient_accumulation", (True,)),
    **_refuse("gradients are averaged; set it mean", "gradient_allreduce_op", harmless=("mean",)),
    **_refuse("use bf16 or fp16", "amp torch_autocast"),
    **_refuse("there is no offloading to disk; remove it", "aio"),
    **_refuse("model.attention is dense; remove it", "sparse_attention"),
    **_refuse("set training.tensor_parallel instead", "tensor_parallel", ({"autotp_size": 0}, {"autotp_size": 1})),
    **_refuse("a sequence stays on one device; set it 1", "sequence_parallel_size", harmless=(1, None)),
    **_refuse("set training.report_to (tensorboard, wandb, trackio) instead", "comet trackio"),
    **_refuse("the devices may change at any resume without it; remove it", "elasticity"),
    **_refuse(NO, "pipeline expert_parallel autotuning hybrid_engine nebula datastates_ckpt casync_ckpt eigenvalue"),
    **_refuse(NO, "compression_training quantize_training weight_quantization progressive_layer_drop"),
    **_refuse(NO, "curriculum_learning data_efficiency"),
}


# Top-level keys without which DeepSpeed would train otherwise, but which may as well be given in TrainingConfig.
LEFT_TO_CONFIG = {
    "optimizer": "training.optimizer",
    "scheduler": "training.lr_scheduler",
    "gradient_clipping": "training.max_grad_norm",
}


def load(path: str) -> dict[str, Any]:
    """The JSON object in the file.

    Raises:
      UserError: it can't be read, is no JSON object, or has a key twice, which DeepSpeed refuses too.
    """
    where = f"training.deepspeed_config ({path})"

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise UserError(f"{where}: {twice[0]} is there twice; remove one")
        return dict(pairs)

    def constant(text: str) -> NoReturn:
        raise UserError(f"{where}: {text} is not a JSON number")

    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; name a DeepSpeed JSON file") from error
    except RecursionError as error:
        raise UserError(f"{where}: its brackets are nested too deeply; name a DeepSpeed JSON file") from error
    except ValueError as error:  # bad JSON, bad UTF-8
        raise UserError(f"{where}: not JSON ({error}); comments are not taken") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold a JSON object")
    return values


def apply(config: Config, world: int | None) -> tuple[Config, list[str]]:
    """`config` with its deepspeed_config applied, and lines for the start-up report.

    Args:
      world: devices that rows are split over; None: not known yet, then what needs it is left as it is.

    Raises:
      UserError: the file is bad, asks for what jaxlm lacks, contradicts `config`, or does not fit `world`.
    """
    training = config.training
    if training.deepspeed_config is None:
        default = training.use_deepspeed and training.zero_stage is None
        return (replace_fields(config, {"training.zero_stage": 2}) if default else config), []
    if not training.deepspeed_config:
        raise UserError("training.deepspeed_config is empty; name a DeepSpeed JSON file, or none")
    if not training.use_deepspeed:
        raise UserError(f"training.deepspeed_config ({training.deepspeed_config}): set training.use_deepspeed true too")
    file = _File(config, training.deepspeed_config)
    file.read(TABLE, _modern(load(training.deepspeed_config), file.error))
    file.read_optimizer()
    file.read_scheduler()
    file.settle_precision()
    file.follow()
    file.settle_learning_rates()
    file.settle_zero()
    file.settle_reports()
    file.settle_batch(world)
    return replace_fields(config, file.changes()), file.report()


def _modern(values: dict[str, Any], error: Callable[[str], UserError]) -> dict[str, Any]:
    """The file with two deprecated spellings replaced: bfloat16 for bf16, and zero_optimization as a bool."""
    if "bf16" in values and "bfloat16" in values:
        raise error("bf16 and bfloat16 are the same section; remove one")
    values = {"bf16" if key == "bfloat16" else key: value for key, value in values.items()}
    if "zero_optimization" in values and isinstance(values["zero_optimization"], bool):
        values["zero_optimization"] = {"stage": int(values["zero_optimization"])}
    return values


def _fields(config: Config) -> dict[str, Any]:
    """Every field's value by dotted name."""
    sections = dataclasses.asdict(config).items()
    return {f"{section}.{name}": value for section, fields in sections for name, value in fields.items()}


DEFAULTS = _fields(Config())


def _shown(value: Any) -> str:
    """A value of Config for a message, as on the command line."""
    return value if isinstance(value, str) else "none" if value is None else json.dumps(plain(value))


def _json(value: Any) -> str:
    """A value of the file for a message, as it stands there: the quotes of "2" may be what is wrong with it."""
    try:
        text = json.dumps(value)
    except RecursionError:  # reading stopped just short of this
        text = "..."
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _typed(kind: Any, value: Any) -> Any:
    """`value`, if it is of this kind, or MISSING; sizes are often written as 5e8."""
    if kind == PAIR:
        fits = isinstance(value, list) and len(value) == 2 and all(accepts(float, item) for item in value)
        return value if fits else MISSING
    if isinstance(value, float) and value.is_integer() and not accepts(kind, value):
        value = int(value)
    return value if kind is object or accepts(kind, value) else MISSING


def _only_quoted(kind: Any, value: Any) -> bool:
    """Whether `value` would be of this kind without its quotes."""
    try:
        return isinstance(value, str) and _typed(kind, json.loads(value)) is not MISSING
    except (ValueError, RecursionError):
        return False


class _File:
    """A file as it is read: first its keys are checked and collected, then they become fields and lines."""

    def __init__(self, config: Config, path: str) -> None:
        self.name = f"training.deepspeed_config ({path})"
        self.own = _fields(config)
        self.rules: dict[str, Rule] = {}  # by dotted key: those that are there, in sections that are not switched off
        self.values: dict[str, Any] = {}  # the same, and the sections themselves
        self.stated: dict[str, tuple[Any, str]] = {}  # field -> value, and what the file says in words
        self.implied: dict[str, tuple[Any, str]] = {}  # the same for DeepSpeed's defaults of what the file leaves out
        self.conflicts: list[str] = []
        self.accepted: dict[str, list[str]] = {}  # reason -> keys
        self.lines: list[str] = []

    def error(self, text: str) -> UserError:
        return UserError(f"{self.name}: {text}")

    def given(self, key: str) -> Any:
        """The value of a key, or None where it is left out or auto."""
        value = self.values.get(key)
        return None if value == "auto" else value

    def read(self, table: Table, values: dict[str, Any], prefix: str = "", active: bool = True) -> None:
        """Checks names and types of `values`; a section with `enabled` false is checked, but leaves only that."""
        for key, value in values.items():
            dotted = prefix + key
            if key not in table:
                raise self.error(f"unknown key {dotted}{nearest(key, table)}")
            rule = table[key]
            if isinstance(rule, Rule):
                value = self.checked(rule, dotted, value)
                if active or key == "enabled":
                    self.rules[dotted], self.values[dotted] = rule, value
            elif value is not None:
                if not isinstance(value, dict):
                    raise self.error(f"{dotted} ({_json(value)}) must be an object")
                self.values[dotted] = value
                self.read(rule, value, f"{dotted}.", active and value.get("enabled") is not False)

    def checked(self, rule: Rule, key: str, value: Any) -> Any:
        """`value`, if it has the rule's type."""
        if value == "auto" and rule.auto:
            return value
        typed = _typed(rule.kind, value)
        if typed is MISSING:
            kind = rule.kind if rule.kind == PAIR else type_name(rule.kind)
            kind = kind.replace("dict", "an object").replace("none", "null")
            hint = "write it without quotes" if _only_quoted(rule.kind, value) else rule.hint
            raise self.error(f"{key} ({_json(value)}) must be {kind}{hint and '; '}{hint}")
        return typed

    def read_params(self, section: str, table: Table) -> None:
        """Checks a section's `params`, and notes DeepSpeed's defaults for those that are left out."""
        prefix = f"{section}.params."
        self.read(table, self.values.get(prefix[:-1]) or {}, prefix)
        for name, rule in table.items():
            if rule.default is not MISSING and prefix + name not in self.values:
                for field, value in rule.parts(rule.default):
                    self.implied[field] = value, f"{prefix}{name} {_json(value)}"

    def chosen(self, section: str, known: Iterable[str], others: list[str]) -> str:
        """A section's type, as it is spelt in `known`; DeepSpeed's own optimizers may be in any case."""
        use = f"use one of {', '.join(known)}"
        if f"{section}.type" not in self.values:
            raise self.error(f"{section}.type is missing; {use}")
        said = self.values[f"{section}.type"]
        for name in [*known, *others]:
            if said == name or (name in ANY_CASE and said.lower() == name.lower()):
                if name in others:
                    raise self.error(f"{section}.type ({_json(said)}) is not supported; {use}")
                return name
        raise self.error(f"{section}.type ({_json(said)}) is unknown{nearest(said, known)}; {use}")

    def read_optimizer(self) -> None:
        if "optimizer" not in self.values:
            return
        name = self.chosen("optimizer", OPTIMIZERS, OTHER_OPTIMIZERS)
        ours, table = OPTIMIZERS[name]
        self.read_params("optimizer", table)
        if name == "Adam" and self.values.get("optimizer.params.adam_w_mode") is False:
            ours = "adam"
        if ours == "adamw" and self.values.get("optimizer.params.torch_adam") is True:
            self.implied.pop("training.weight_decay", None)  # torch's AdamW has the default that TrainingConfig has
        if ours == "lamb":
            self.lines.append("DeepSpeed's Lamb keeps the trust ratio between 0.01 and 10, jaxlm's is not bounded")
        self.state("training.optimizer", ours, "optimizer.type", name)

    def read_scheduler(self) -> None:
        if "scheduler" not in self.values:
            return
        name = self.chosen("scheduler", SCHEDULERS, OTHER_SCHEDULERS)
        fields, table = SCHEDULERS[name]
        self.read_params("scheduler", table)
        if "total_num_steps" in table and "scheduler.params.total_num_steps" not in self.values:
            raise self.error(f"scheduler.params.total_num_steps is missing; {name} needs a number or auto")
        for field, value in fields.items():
            self.state(field, value, "scheduler.type", name)

    def state(self, field: str, value: Any, key: str, said: Any) -> None:
        """Notes that the file sets `field` to `value`, by saying `said` at `key`."""
        section, name = field.split(".")
        declared = {f.name: f for f in dataclasses.fields(SECTIONS[section])}[name]
        check_field(f"{self.name}: {key}", declared, typing.get_type_hints(SECTIONS[section])[name], value)
        words = f"{key} is {_json(said)}"
        before, other = self.stated.get(field, (value, words))
        if before != value and field != "training.learning_rate":  # for which settle_learning_rates has a rule
            self.conflicts.append(f"{other}, {words}")
        self.stated[field] = value, words

    def result(self, field: str) -> Any:
        """What `field` will be: the file wins, then what Config sets, then DeepSpeed's default, then Config's."""
        if field in self.stated:
            return self.stated[field][0]
        if field in self.implied and self.own[field] == DEFAULTS[field]:
            return self.implied[field][0]
        return self.own[field]

    def follow(self) -> None:
        """Does what the rules say of each key; keys without an action are for the methods below."""
        for key, rule in self.rules.items():
            value = self.values[key]
            off = isinstance(value, dict) and (not value or value.get("enabled") in (False, "auto"))
            if off or value in rule.harmless or (value == "auto" and rule.auto):
                continue
            if rule.refused and (rule.values is None or value not in rule.values):
                said = key if isinstance(value, dict | list) else f"{key} ({_json(value)})"
                raise self.error(f"{said} is not supported: {rule.refused}")
            if rule.values is not None and value not in rule.values:
                raise self.error(f"{key} ({_json(value)}) must be one of {', '.join(rule.values)}")
            if rule.accepted:
                name = key.removeprefix("zero_optimization.").removesuffix(".enabled")
                self.accepted.setdefault(rule.accepted, []).append(name)
            ours = rule.values[value] if rule.values is not None else value
            if key == "gradient_clipping" and not value:
                ours = None
            for field, part in rule.parts(ours):
                self.state(field, part, key, value)

    def settle_learning_rates(self) -> None:
        """The scheduler sets the learning rate, whatever the optimizer's was."""
        key, lowest_key = "scheduler.params.warmup_max_lr", "scheduler.params.warmup_min_lr"
        peak, lowest, optimizers = self.given(key), self.given(lowest_key), self.given("optimizer.params.lr")
        if optimizers is not None and key not in self.values and self.values.get("scheduler.type") == "WarmupDecayLR":
            peak = SCHEDULERS["WarmupDecayLR"][1]["warmup_max_lr"].default
        if peak is not None:
            self.state("training.learning_rate", peak, key, peak)
            if optimizers not in (None, peak):
                self.lines.append(f"{key} ({peak}) is the learning rate, as in DeepSpeed: not {optimizers}")
        if lowest is not None:
            peak = self.result("training.learning_rate")
            if not 0 <= lowest <= peak:
                raise self.error(f"{lowest_key} ({lowest}) must be from 0 to the peak learning rate ({peak})")
            self.state("training.warmup_min_ratio", lowest / peak, f"{lowest_key} / {peak}", lowest / peak)

    def settle_precision(self) -> None:
        """fp16 and bf16 together: one of them, float32 if a section is there but none is enabled, or Config's."""
        sections = {"float16": "fp16", "bfloat16": "bf16"}
        flags = {dtype: self.flag(section) for dtype, section in sections.items()}
        enabled, disabled = ([d for d, flag in flags.items() if flag is wanted] for wanted in (True, False))
        dtype = self.own["training.amp_dtype"] if self.own["training.use_amp"] else "float32"
        if len(enabled) == 2:
            raise self.error("fp16.enabled and bf16.enabled are both true; enable one")
        if enabled:
            dtype = enabled[0]
            self.state("training.use_amp", True, f"{sections[dtype]}.enabled", True)
            self.state("training.amp_dtype", dtype, f"{sections[dtype]}.enabled", True)
        elif disabled and dtype != "float32" and flags[dtype] != "auto":
            said = f"{sections[disabled[0]]}.enabled"
            if self.own["training.amp_dtype"] != DEFAULTS["training.amp_dtype"]:
                self.conflicts.append(f"training.amp_dtype is {dtype}, {said} is false")
            self.state("training.use_amp", False, said, False)
        if dtype != "float16":  # many files have a loss scale and leave fp16 off
            self.rules = {key: rule for key, rule in self.rules.items() if not key.startswith("fp16.")}

    def flag(self, section: str) -> Any:
        """`enabled` of a section: true, false, auto; none without the section."""
        return (self.values.get(f"{section}.enabled") or False) if section in self.values else None

    def settle_zero(self) -> None:
        stage = self.values.get("zero_optimization.stage")
        if stage is None:
            self.implied["training.zero_stage"] = 0, "zero_optimization.stage 0"
        elif stage == "auto" and self.own["training.zero_stage"] is None:
            self.state("training.zero_stage", 2, "zero_optimization.stage", "auto")
        if "activation_checkpointing" in self.values:
            self.state("model.gradient_checkpointing", True, "activation_checkpointing", "there")

    def settle_reports(self) -> None:
        names, said = list(self.own["training.report_to"]), ("", None)
        for name in ("tensorboard", "wandb"):
            wanted = self.given(f"{name}.enabled")
            if wanted is not None and wanted != (name in names):
                names = [*names, name] if wanted else [other for other in names if other != name]
                said = f"{name}.enabled", wanted
        if said[0]:
            self.state("training.report_to", tuple(names), *said)

    def settle_batch(self, world: int | None) -> None:
        """Two of the three sizes give the third; of one alone, accumulation is 1."""
        said = {key: self.values[key] for key in (TRAIN, *BATCH) if self.values.get(key) is not None}
        if not said:
            raise self.error(f"none of {TRAIN}, {', '.join(BATCH)} is there; set two of them, or auto")
        for key, value in said.items():
            if value != "auto" and value < 1:
                raise self.error(f"{key} ({value}) must be at least 1")
        train = self.given(TRAIN)
        # DeepSpeed takes no accumulation alone; here the micro-batch is Config's then, as it is beside a total on auto.
        left_to_config = BATCH if TRAIN in said and train is None else [MICRO] if list(said) == [ACCUMULATION] else []
        sizes = {key: self.own[BATCH[key]] for key in BATCH if key in left_to_config or said.get(key) == "auto"}
        sizes |= {key: said[key] for key in BATCH if self.given(key) is not None}
        if ACCUMULATION not in sizes and (train is None or MICRO not in sizes):
            sizes[ACCUMULATION] = 1
            self.state(BATCH[ACCUMULATION], 1, f"{ACCUMULATION} (left out)", 1)
        for key in BATCH:
            if self.given(key) is not None:
                self.state(BATCH[key], said[key], key, said[key])
        if train is not None:
            self.check_batch(train, sizes, world)

    def check_batch(self, train: int, sizes: dict[str, int], world: int | None) -> None:
        """Sets the size that is missing from `sizes`, if any; all of them and the devices must make up `train`."""
        product = math.prod(sizes.values()) * (world or 1)
        shown = " * ".join(f"{key} ({size})" for key, size in sizes.items()) + (f" * {world} devices" if world else "")
        missing = [key for key in BATCH if key not in sizes]
        if missing and not train % product:
            if world:
                self.state(BATCH[missing[0]], train // product, f"{TRAIN} ({train}) / ({shown})", train // product)
            return
        if not missing and (train == product or (world is None and not train % product)):
            return
        if missing or world is None:
            multiples = [n * product for n in (train // product, train // product + 1) if n]
            fits = [f"{TRAIN} {multiple}" for multiple in multiples]
            raise self.error(
                f"{TRAIN} ({train}) is not a multiple of {shown} = {product}; {' or '.join(fits)} would fit"
            )
        rest = {key: product // size for key, size in sizes.items()}
        fits = [f"{TRAIN} {product}", *(f"{key} {train // n}" for key, n in rest.items() if not train % n)]
        if not train % (product // world):
            fits.append(f"{train // (product // world)} devices")
        raise self.error(f"{TRAIN} ({train}) is not {shown} = {product}; {' or '.join(fits)} would fit")

    def changes(self) -> dict[str, Any]:
        """The fields to set."""
        conflicts = self.conflicts + [
            f"{field} is {_shown(self.own[field])}, {said}"
            for field, (value, said) in self.stated.items()
            if self.own[field] not in (DEFAULTS[field], value)
        ]
        if conflicts:
            raise self.error(f"{'; '.join(conflicts)}; {MEND}")
        return {field: self.result(field) for field in self.stated | self.implied}

    def report(self) -> list[str]:
        """Lines that say what the file left open and what nothing follows from."""
        lines = [*self.lines, *(f"{', '.join(keys)} accepted: {why}" for why, keys in self.accepted.items())]
        defaults = [
            said
            for field, (value, said) in self.implied.items()
            if field not in self.stated and self.own[field] == DEFAULTS[field] != value
        ]
        if defaults:
            lines.append(f"left out of the file, so as DeepSpeed has it: {', '.join(defaults)}")
        left = {key: field for key, field in LEFT_TO_CONFIG.items() if key not in self.values}
        if "fp16" not in self.values and "bf16" not in self.values:
            left["fp16, bf16"] = "training.amp_dtype" if self.own["training.use_amp"] else "training.use_amp"
        if left:
            kept = ", ".join(f"{key} ({field} {_shown(self.own[field])})" for key, field in left.items())
            lines.append(f"left out of the file, so as TrainingConfig has it: {kept}")
        return [f"training.deepspeed_config: {line}" for line in lines]
