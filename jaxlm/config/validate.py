"""The one place where a configuration is judged."""

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxlm.config.fields import SHOWN, accepts, excerpt, nearest, type_name
from jaxlm.config.schema import SECTIONS, Config, ModelConfig
from jaxlm.errors import UserError, one_line

SINK_PACKAGES = ("wandb", "trackio")  # names in training.report_to that need a package of that name
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 3.4e38  # what JAX computes with: int32, float32


def _check_other(dotted: str, limits: Mapping[str, Any], item: Any) -> None:
    """Raises UserError unless `item`, which is none of the choices, is valid all the same."""
    if limits["others"] is not None and limits["others"](item):
        return
    shown, hint = (item[:SHOWN], nearest(item, limits["choices"])) if isinstance(item, str) else (excerpt(item), "")
    own = "" if limits["others"] is None else ", module:Class, or an object with write(row, step) and close()"
    raise UserError(f"{dotted} ({shown}) is not one of {', '.join(limits['choices'])}{own}{hint}")


def check_field(dotted: str, field: Any, annotation: Any, value: Any) -> None:
    """Checks one value against its declared type and bounds; UserError names it `dotted`."""
    if not accepts(annotation, value):
        raise UserError(f"{dotted} ({excerpt(value)}) must be {type_name(annotation)}")
    limits = field.metadata
    if value is None:
        return
    for item in value if isinstance(value, tuple) else (value,):
        if limits["choices"] and item not in limits["choices"]:
            _check_other(dotted, limits, item)
        if isinstance(item, str) and "\0" in item:
            raise UserError(f"{dotted} ({excerpt(item)}) holds a NUL character; remove it")
    if isinstance(value, int | float):
        largest = LARGEST_FLOAT if accepts(annotation, 0.5) else LARGEST_INT
        if not abs(value) <= largest:  # NaN compares with nothing
            raise UserError(f"{dotted} ({excerpt(value)}) must be a finite number, at most {largest}")
        if limits["low"] is not None and value < limits["low"]:
            raise UserError(f"{dotted} ({value}) must be at least {limits['low']}")
        if limits["above"] is not None and value <= limits["above"]:
            raise UserError(f"{dotted} ({value}) must be greater than {limits['above']}")
        if limits["high"] is not None and value > limits["high"]:
            raise UserError(f"{dotted} ({value}) must be at most {limits['high']}")
        if limits["below"] is not None and value >= limits["below"]:
            raise UserError(f"{dotted} ({value}) must be less than {limits['below']}")


def _check_home_folders(config: Config) -> None:
    """Refuses paths such as ~nobody/text, where there is no user of that name."""
    training, data = config.training, config.data
    paths: dict[str, Iterable[str | None]] = {
        "training.checkpoint_dir": [training.checkpoint_dir],
        "training.resume_from_checkpoint": [training.resume_from_checkpoint],
        "training.init_from": [training.init_from],
        "data.train_files": data.train_files,
        "data.validation_files": data.validation_files,
        "data.tokenizer_path": [data.tokenizer_path],
        "data.cache_dir": [data.cache_dir],
    }
    for dotted, named in paths.items():
        for path in named:
            try:
                Path(path or "").expanduser()
            except RuntimeError as error:
                raise UserError(f"{dotted} ({path}): there is no such user; write the path in full") from error


def _check_model(model: ModelConfig) -> None:
    """What has to fit together in the model."""
    if model.d_model % model.n_heads:
        raise UserError(f"model.n_heads ({model.n_heads}) must divide model.d_model ({model.d_model})")
    if model.n_heads % model.kv_heads:
        raise UserError(f"model.n_kv_heads ({model.n_kv_heads}) must divide model.n_heads ({model.n_heads})")
    if model.positions != "learned" and model.d_model // model.n_heads % 2:
        raise UserError(
            f"model.positions ({model.positions}) needs an even head size; "
            f"model.d_model / model.n_heads is {model.d_model // model.n_heads}"
        )
    if model.rope_scaling is None:
        return
    named = f"model.rope_scaling ({model.rope_scaling})"
    if model.positions != "rotary":
        raise UserError(f"{named} needs model.positions rotary, not {model.positions}")
    if model.rope_scaling != "linear" and model.rope_original_length is None:
        raise UserError(f"{named} needs model.rope_original_length, the context in tokens before it was stretched")
    if model.rope_scaling == "llama3" and model.rope_high_freq_factor <= model.rope_low_freq_factor:
        raise UserError(
            f"model.rope_high_freq_factor ({model.rope_high_freq_factor}) must be greater than "
            f"model.rope_low_freq_factor ({model.rope_low_freq_factor})"
        )
    if model.rope_scaling == "yarn" and model.rope_theta <= 1:
        raise UserError(f"{named} needs model.rope_theta ({model.rope_theta}) greater than 1")


def _check_tensor_parallel(model: ModelConfig, tensor: int) -> None:
    for name, value in {"n_heads": model.n_heads, "n_kv_heads": model.kv_heads, "d_ff": model.d_ff}.items():
        if value % tensor:
            raise UserError(f"training.tensor_parallel ({tensor}) must divide model.{name} ({value})")


def _check_report_to(report_to: tuple[Any, ...]) -> None:
    for name in report_to:
        if name in SINK_PACKAGES and find_spec(name) is None:
            raise UserError(f'training.report_to ({name}): the package is not installed; pip install -e ".[{name}]"')
        if isinstance(name, str) and ":" in name:
            own_sink(name)


def own_sink(name: str) -> type:
    """The class that "module:Class" in training.report_to names.

    Raises:
      UserError: there is none, or it has no write(row, step) and close().
    """
    module, _, attribute = name.partition(":")
    where = f"training.report_to ({name})"
    try:
        found = vars(import_module(module)).get(attribute)
    except ImportError as error:
        raise UserError(f"{where}: {one_line(error)}; put the module's folder on PYTHONPATH, or install it") from error
    if not isinstance(found, type) or not all(callable(getattr(found, method, None)) for method in ("write", "close")):
        raise UserError(f"{where}: is not a class with write(row, step) and close(); see jaxlm.monitor.sinks.Sink")
    return found


def check_fields(config: Config) -> None:
    """Checks each value by itself, against its declared type and bounds; UserError names it."""
    for name, section in SECTIONS.items():
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            check_field(f"{name}.{field.name}", field, hints[field.name], getattr(getattr(config, name), field.name))
    _check_home_folders(config)


def profiled_steps(text: str) -> tuple[int, int]:
    """First and last update of training.profile_steps, "A:B", counted from 1.

    Raises:
      UserError: not of that form, or A is 0 or after B.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"training.profile_steps ({text}) must be A:B, the first and the last update, such as 11:15")
    return first, last


def xla_option(text: str) -> tuple[str, str | bool]:
    """Name and value of an item of training.xla_options, "NAME=VALUE".

    Raises:
      UserError: not of that form.
    """
    found = re.fullmatch(r"(xla_\w+)=(\S+)", text)
    if not found:
        raise UserError(
            f"training.xla_options ({excerpt(text)}) must be xla_NAME=VALUE, such as xla_gpu_enable_triton_gemm=false"
        )
    name, value = found.groups()
    return name, value == "true" if value in ("true", "false") else value


def mesh_shape(config: Config, n_devices: int) -> tuple[int, int, int]:
    """Devices along (replica, data, tensor) for a configuration on `n_devices`.

    Raises:
      UserError: there are other numbers of devices than it expects, or they can't be divided as it asks.
    """
    training = config.training
    if training.world_size not in (None, n_devices):
        raise UserError(
            f"training.world_size ({training.world_size}) differs from the {n_devices} device(s) found; "
            "start it where there are as many, or unset it"
        )
    tensor, group = training.tensor_parallel, training.zero_group_size or n_devices
    if n_devices % tensor:
        raise UserError(f"training.tensor_parallel ({tensor}) must divide the {n_devices} device(s)")
    if n_devices % group or group % tensor:
        raise UserError(
            f"training.zero_group_size ({group}) must divide the {n_devices} device(s) and be a multiple of "
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
    """Raises UserError if the run has too many updates, or ends before what is to be profiled.

    Args:
      total_steps: updates of the whole run.
      last_step: the update at which it stops this time.
    """
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
    model, training, data = config.model, config.training, config.data
    _check_model(model)
    _check_tensor_parallel(model, training.tensor_parallel)
    if training.profile_steps is not None:
        profiled_steps(training.profile_steps)
    for text in training.xla_options:
        xla_option(text)
    _check_report_to(training.report_to)
    if data.max_length > model.max_seq_len:
        raise UserError(
            f"data.max_length ({data.max_length}) exceeds model.max_seq_len ({model.max_seq_len}); lower it"
        )
    if model.vocab_size < 259 and data.tokenizer_path is None and training.init_from is None:
        raise UserError(f"model.vocab_size ({model.vocab_size}) must be at least 259: 256 bytes and 3 special tokens")
    if data.validation_files and not data.train_files:
        raise UserError("data.validation_files is set but data.train_files is not; set both, or validation_split")
    if data.min_length > data.max_length:
        raise UserError(f"data.min_length ({data.min_length}) exceeds data.max_length ({data.max_length}); lower it")
    if not training.loss_scale and training.min_loss_scale > 2**training.initial_loss_scale_power:
        raise UserError(
            f"training.min_loss_scale ({training.min_loss_scale:g}) exceeds what the dynamic loss scale starts at, 2 "
            f"to training.initial_loss_scale_power ({training.initial_loss_scale_power}); lower it"
        )
    if training.checkpoint_dir == "":
        raise UserError("training.checkpoint_dir is empty; name a folder")
    resume = training.resume_from_checkpoint
    if resume is not None and resume.endswith((".pt", ".pth", ".bin", ".ckpt")):
        path = Path(resume)
        raise UserError(
            f"training.resume_from_checkpoint ({resume}): checkpoints here are folders; "
            f"use {path.with_name(path.stem.replace('-', '_'))}"
        )
