"""The one place where a configuration is judged."""

import dataclasses
import operator
import os
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from jaxlm.config.batches import read_schedule
from jaxlm.config.fields import accepts, check_choice, excerpt, field_values, nearest, shown, type_name, without_use
from jaxlm.config.mixture import mixture_options
from jaxlm.config.schema import FIELDS, PYTHON, Config, ModelConfig, TrainingConfig
from jaxlm.errors import UserError, one_line

SINK_PACKAGES = ("wandb", "trackio")  # names in training.report_to that need a package of that name
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 3.4e38  # what JAX computes with: int32, float32
BOUNDS = {
    "low": ("at least", operator.ge),
    "above": ("greater than", operator.gt),
    "high": ("at most", operator.le),
    "below": ("less than", operator.lt),
}


def check_field(dotted: str, field: dataclasses.Field, value: object) -> None:
    """Checks one value against its declared type and bounds; UserError names it `dotted`."""
    if not accepts(field.type, value):
        raise UserError(f"{dotted} ({excerpt(value)}) must be {type_name(field.type)}")
    limits = field.metadata
    for item in value if isinstance(value, tuple) else (value,):
        if not isinstance(item, str):
            continue
        if limits["choices"] and not limits["others"]:
            check_choice(dotted, item, limits["choices"])
        if "\0" in item:
            raise UserError(f"{dotted} ({excerpt(item)}) holds a NUL character; remove it")
        if limits["path"] and item.startswith("~") and os.path.expanduser(item) == item:
            raise UserError(f"{dotted} ({item}): there is no such user; write the path in full")
    if isinstance(value, int | float):
        largest = LARGEST_FLOAT if accepts(field.type, 0.5) else LARGEST_INT
        if not abs(value) <= largest:  # NaN compares with nothing
            raise UserError(f"{dotted} ({excerpt(value)}) must be a finite number, at most {largest}")
        for name, (words, holds) in BOUNDS.items():
            if limits[name] is not None and not holds(value, limits[name]):
                none = ", or none" if accepts(field.type, None) else ""
                raise UserError(f"{dotted} ({value}) must be {words} {limits[name]}{none}")


def _model_conflicts(model: ModelConfig) -> Iterator[str]:
    """What does not fit together in the model."""
    if model.head_dim is None and model.d_model % model.n_heads:
        yield f"model.n_heads ({model.n_heads}) must divide model.d_model ({model.d_model})"
    if model.n_heads % model.kv_heads:
        yield f"model.n_kv_heads ({model.n_kv_heads}) must divide model.n_heads ({model.n_heads})"
    if model.positions == "rotary" and (model.rotary_size % 2 or model.rotary_size < 2):
        yield (
            f"model.positions ({model.positions}) turns pairs of channels, and model.rotary_fraction "
            f"({model.rotary_fraction:g}) of a head's {model.head_size} are {model.rotary_size}; that must be even"
        )
    if model.positions == "sinusoidal" and model.d_model % 2:
        yield f"model.positions ({model.positions}) needs an even model.d_model, not {model.d_model}"
    if model.positions != "rotary" and model.rotary_fraction != 1:
        yield f"model.rotary_fraction ({model.rotary_fraction:g}) needs model.positions rotary, not {model.positions}"
    for name in ("sandwich_norm", "parallel_residual"):
        if not model.pre_norm and vars(model)[name]:
            yield f"model.{name} (true) needs model.pre_norm true"
    if model.rope_scaling is None:
        return
    named = f"model.rope_scaling ({model.rope_scaling})"
    if model.positions != "rotary":
        yield f"{named} needs model.positions rotary, not {model.positions}"
    if model.rope_scaling != "linear" and model.rope_original_length is None:
        yield f"{named} needs model.rope_original_length, the context in tokens before it was stretched"
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    if model.rope_scaling == "llama3" and high <= low:
        yield f"model.rope_high_freq_factor ({high}) must be greater than model.rope_low_freq_factor ({low})"
    if model.rope_scaling == "yarn" and model.rope_theta <= 1:
        yield f"{named} needs model.rope_theta ({model.rope_theta}) greater than 1"


def _is_sink(found: object) -> bool:
    return all(callable(getattr(found, method, None)) for method in ("write", "close"))


def own_sink(name: str) -> type:
    """The class that "module:Class" in training.report_to names; UserError if there is none, or it is no sink."""
    module, _, attribute = name.partition(":")
    where = f"training.report_to ({name})"
    try:
        found = vars(import_module(module)).get(attribute)
    except Exception as error:
        how = "put the module into this folder or that of the configuration, or install it"
        kind = type(error).__name__
        what = f"{one_line(error)}; {how}" if isinstance(error, ImportError) else f"raises {kind} ({one_line(error)})"
        raise UserError(f"{where}: {what}") from error
    if not isinstance(found, type) or not _is_sink(found):
        raise UserError(f"{where}: is not a class with write(row, step) and close(); see jaxlm.monitor.sinks.Sink")
    return found


def _check_report_to(report_to: tuple[object, ...]) -> None:
    known = FIELDS["training.report_to"].metadata["choices"]
    for sink in report_to:
        if sink in SINK_PACKAGES and find_spec(sink) is None:
            raise UserError(f'training.report_to ({sink}): the package is not installed; pip install -e ".[{sink}]"')
        if isinstance(sink, str) and re.fullmatch("[^:]+:[^:]+", sink):
            own_sink(sink)
        elif sink not in known and (isinstance(sink, str | type) or not _is_sink(sink)):
            own = f"module:Class, or an object with write(row, step) and close(){nearest(str(sink), known)}"
            raise UserError(f"training.report_to ({excerpt(sink, str)}) is not one of {', '.join(known)}, {own}")


def check_fields(config: Config) -> None:
    """Checks each value by itself, against its declared type and bounds; UserError names it."""
    for dotted, value in field_values(config).items():
        check_field(dotted, FIELDS[dotted], value)


def profiled_steps(text: str) -> tuple[int, int]:
    """First and last update, counted from 1, of training.profile_steps, "A:B"; UserError if it is none of that form."""
    found = re.fullmatch(r"(\d{1,10}):(\d{1,10})", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"training.profile_steps ({text}) must be A:B, the first and the last update, such as 11:15")
    return first, last


def seconds_of(name: str, value: float | str) -> float:
    """Seconds, or a text of a time: a number and s, m, h or d, or SLURM's D-HH:MM:SS; UserError names it `name`."""
    if not isinstance(value, str):
        return value
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value):
        seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]
    elif found := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", value):
        days, *rest = (int(part or 0) for part in found.groups())
        seconds = 86400 * days + 3600 * rest[0] + 60 * rest[1] + rest[2]
    else:
        seconds = 0
    if seconds <= 0:
        raise UserError(f"{name} ({excerpt(value, str)}) must be a time, such as 90s, 30m, 7.5h, 2d or 1-12:00:00")
    return seconds


def xla_option(text: str) -> tuple[str, str | bool]:
    """Name and value of an item of training.xla_options, "NAME=VALUE"; UserError if it is none of that form."""
    found = re.fullmatch(r"(xla_\w+)=(\S+)", text)
    if not found:
        raise UserError(
            f"training.xla_options ({excerpt(text)}) must be xla_NAME=VALUE, such as xla_gpu_enable_triton_gemm=false"
        )
    name, value = found.groups()
    return name, value == "true" if value in ("true", "false") else value


def mesh_shape(config: Config, n_devices: int) -> tuple[int, int, int]:
    """Devices along (replica, data, tensor); UserError if `n_devices` can't be divided as the configuration asks."""
    training = config.training
    if training.world_size not in (None, n_devices):
        raise UserError(
            f"training.world_size ({training.world_size}) differs from the number of devices found, {n_devices}; "
            "start it where there are as many, or unset it"
        )
    tensor, group = training.tensor_parallel, training.zero_group_size or n_devices
    if n_devices % tensor:
        raise UserError(f"training.tensor_parallel ({tensor}) must divide {n_devices}, the number of devices")
    if n_devices % group or group % tensor:
        raise UserError(
            f"training.zero_group_size ({group}) must divide {n_devices}, the number of devices, and be a multiple of "
            f"training.tensor_parallel ({tensor})"
        )
    return n_devices // group, group // tensor, tensor


def check_platform(config: Config, platform: str) -> None:
    """Raises UserError if it asks for other collectives than those of JAX's `platform`, such as "cpu"."""
    asked, backend = config.training.distributed_backend, "gloo" if platform == "cpu" else "nccl"
    if asked not in (None, backend):
        raise UserError(
            f"training.distributed_backend ({asked}) does not fit {platform} devices; unset it, or use {backend}"
        )


def check_steps(config: Config, total_steps: int, last_step: int) -> None:
    """Raises UserError if the run has too many updates, or stops, at `last_step`, before what is to be profiled."""
    training = config.training
    if total_steps > LARGEST_INT:
        raise UserError(f"training.num_epochs ({training.num_epochs}) is more than {LARGEST_INT} updates; lower it")
    if training.profile_steps is not None and profiled_steps(training.profile_steps)[0] > last_step:
        raise UserError(
            f"training.profile_steps ({training.profile_steps}) begins after the run's last update, {last_step}"
        )


def validate(config: Config) -> Config:
    """Checks everything that can be known without touching files or devices; returns `config`.

    Raises:
      UserError: names the field, its value and what to do.
    """
    check_fields(config)
    check_together(config)
    return config


def check_together(config: Config) -> None:
    """Checks what has to hold between fields, each of which is valid; UserError names them."""
    conflict = next(_conflicts(config), None)
    if conflict:
        raise UserError(conflict)
    if config.training.profile_steps is not None:
        profiled_steps(config.training.profile_steps)
    if config.training.max_time is not None:
        seconds_of("training.max_time", config.training.max_time)
    for text in config.training.xla_options:
        xla_option(text)
    mixture_options(config.data)
    _check_report_to(config.training.report_to)


def _batch_conflicts(training: TrainingConfig) -> Iterator[str]:
    if training.noise_scale_steps and training.batch_size * training.gradient_accumulation_steps < 2:
        yield (
            f"training.noise_scale_steps ({training.noise_scale_steps}) compares rows of an update, and a device "
            "has one; raise training.batch_size or training.gradient_accumulation_steps, or leave it out"
        )
    times = max([1, *(times for _, times in read_schedule(training.batch_schedule))])
    if times * training.gradient_accumulation_steps > LARGEST_INT:
        yield (
            f"training.batch_schedule ({shown(training.batch_schedule)}) makes updates of more than {LARGEST_INT} "
            "micro-batches; lower its TIMES"
        )
    if training.compiled_program and training.batch_schedule:
        yield (
            f"training.compiled_program ({training.compiled_program}) holds an update of one size, and "
            f"training.batch_schedule ({shown(training.batch_schedule)}) asks for several; leave one out"
        )
    if training.compiled_program and training.keep_autotuning:
        yield (
            f"training.keep_autotuning (true) has nothing to keep where training.compiled_program "
            f"({training.compiled_program}) is compiled already; leave one out"
        )


def _lora_conflicts(training: TrainingConfig) -> Iterator[str]:
    if training.lora_rank is None:
        for name in ("lora_alpha", "lora_dropout", "lora_targets"):
            value, default = getattr(training, name), FIELDS[f"training.{name}"].default
            if value != default:
                yield f"training.{name} ({shown(value)}) has no use without training.lora_rank; set that"
        return
    if training.init_from is None:
        yield f"training.lora_rank ({training.lora_rank}) adapts a model; name it with training.init_from"
    if not training.lora_targets:
        yield f"training.lora_targets ([]) leaves no layer to adapt, beside training.lora_rank ({training.lora_rank})"
    if training.freeze:
        rank, freeze = training.lora_rank, shown(training.freeze)
        yield f"training.freeze ({freeze}) has no use beside training.lora_rank ({rank}), which trains adapters alone"


def _mixture_conflicts(config: Config) -> Iterator[str]:
    data, max_steps = config.data, config.training.max_steps
    if data.sources and data.train_files:
        named = f"data.train_files ({shown(data.train_files)}) and data.sources ({shown(data.sources)})"
        yield f"{named} both name the text; leave one out"
    if data.sources and max_steps is None:
        yield "data.sources is set but training.max_steps is not: a mixture has no end of its own; set it"
    if data.anneal_weights and not data.sources:
        yield f"data.anneal_weights ({shown(data.anneal_weights)}) has no use without data.sources; set that"
    if bool(data.anneal_weights) != (data.anneal_from is not None):
        values = f"data.anneal_weights ({shown(data.anneal_weights)}) and data.anneal_from ({shown(data.anneal_from)})"
        yield f"{values} have a use together only; set both, or neither"
    if data.anneal_from is not None and max_steps is not None and data.anneal_from > max_steps:
        how = "lower it, or end earlier with training.stop_at_step"
        yield f"data.anneal_from ({data.anneal_from}) exceeds training.max_steps ({max_steps}); {how}"


def _streaming_conflicts(config: Config) -> Iterator[str]:
    data, training = config.data, config.training
    if not data.streaming:
        return
    if data.sources or data.dataset_name == PYTHON:
        text = "a mixture (data.sources)" if data.sources else "a text that a program hands over"
        yield f"data.streaming is not for {text}; leave it out"
    if data.tokenizer_path is None and training.init_from is None:
        yield "data.streaming needs a tokenizer that is there; set data.tokenizer_path, or leave it out"
    if training.max_steps is None:
        yield "data.streaming is set but training.max_steps is not: the text's length is not known; set it"
    if data.validation_fraction and "data.validation_fraction" not in without_use(data):
        yield (
            f"data.streaming: no text can be held out of one that is not all there (data.validation_fraction "
            f"{data.validation_fraction}); name data.validation_files, or set it to 0"
        )


def _conflicts(config: Config) -> Iterator[str]:
    """What does not fit together."""
    model, training, data = config.model, config.training, config.data
    unused = without_use(data)
    yield from _model_conflicts(model)
    tensor = training.tensor_parallel
    for name, size in {"n_heads": model.n_heads, "n_kv_heads": model.kv_heads, "d_ff": model.d_ff}.items():
        if size % tensor:
            yield f"training.tensor_parallel ({tensor}) must divide model.{name} ({size})"
    if training.cautious_decay and training.optimizer in ("adam", "sgd"):
        other = "adamw" if training.optimizer == "adam" else "lion"
        yield (
            f"training.cautious_decay is for decoupled weight decay, which training.optimizer ({training.optimizer}) "
            f"has not; use {other}, or leave it out"
        )
    yield from _batch_conflicts(training)
    yield from _lora_conflicts(training)
    elsewhere = "data.validation_fraction" in unused or data.dataset_name == PYTHON
    if training.early_stopping_patience and not (data.validation_fraction or elsewhere):
        yield (
            f"training.early_stopping_patience ({training.early_stopping_patience}) needs held-out text, and "
            f"data.validation_fraction is {data.validation_fraction}; raise that, or leave it out"
        )
    if data.max_length > model.max_seq_len:
        yield f"data.max_length ({data.max_length}) exceeds model.max_seq_len ({model.max_seq_len}); lower it"
    if model.vocab_size < 259 and data.tokenizer_path is None and training.init_from is None:
        yield f"model.vocab_size ({model.vocab_size}) must be at least 259: 256 bytes and 3 special tokens"
    for name in ("bos_token", "eos_token", "pad_token"):
        if getattr(data, name) is not None and data.tokenizer_path is None and training.init_from is None:
            yield f"data.{name} is for a tokenizer that is there; set data.tokenizer_path, or leave it out"
    yield from _mixture_conflicts(config)
    yield from _streaming_conflicts(config)
    if data.validation_files and not (data.train_files or data.sources):
        yield "data.validation_files is set but data.train_files is not; set both, or validation_split"
    for name, by in unused.items():
        value, reason = operator.attrgetter(name, by)(config)
        if value not in (None, FIELDS[name].default):
            none = "" if by == "data.dataset_name" else f", or set {by} {'[]' if by.endswith('files') else 'none'}"
            yield f"{name} ({shown(value)}) has no use beside {by} ({shown(reason)}); leave it out{none}"
    if "\n" in (data.document_separator or ""):
        yield f"data.document_separator ({data.document_separator!r}) holds a line end; name a line ('': an empty one)"
    if data.min_length > data.max_length:
        yield f"data.min_length ({data.min_length}) exceeds data.max_length ({data.max_length}); lower it"
    power = training.initial_loss_scale_power
    if not training.loss_scale and training.min_loss_scale > 2**power:
        first = f"what the dynamic loss scale starts at, 2 to training.initial_loss_scale_power ({power})"
        yield f"training.min_loss_scale ({training.min_loss_scale:g}) exceeds {first}; lower it"
    if training.checkpoint_dir == "":
        yield "training.checkpoint_dir is empty; name a folder"
    file = Path(training.resume_from_checkpoint or "")
    if file.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        folder = file.with_name(file.stem.replace("-", "_"))
        yield f"training.resume_from_checkpoint ({file}): checkpoints here are folders; use {folder}"
