"""Options that are set and have no use beside the others: no mistake, but not what somebody who sets one expects."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from jaxlm.config.fields import field_values, shown
from jaxlm.config.schema import FIELDS, FROM_OPTAX, Config

ADAM = ("adamw", "adam", "lamb", "muon", "normuon")
OPTAX = tuple(f"optax.{name}" for name in FROM_OPTAX)  # each takes what it takes

# {option: (another, the values of that with which it has a use)}
NEEDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "model.remat_policy": ("model.gradient_checkpointing", (True,)),
    "model.rope_theta": ("model.positions", ("rotary",)),
    "model.rope_scaling_factor": ("model.rope_scaling", ("linear", "llama3", "yarn")),
    "model.rope_original_length": ("model.rope_scaling", ("llama3", "yarn")),
    "model.rope_low_freq_factor": ("model.rope_scaling", ("llama3",)),
    "model.rope_high_freq_factor": ("model.rope_scaling", ("llama3",)),
    "training.decay_fraction": ("training.lr_scheduler", ("wsd",)),
    "training.lr_power": ("training.lr_scheduler", ("polynomial",)),
    "training.min_lr_ratio": ("training.lr_scheduler", ("cosine", "linear", "polynomial", "wsd")),
    "training.beta1": ("training.optimizer", (*ADAM, *OPTAX, "sgd", "lion")),
    "training.beta2": ("training.optimizer", (*ADAM, *OPTAX, "lion")),
    "training.eps": ("training.optimizer", (*ADAM, *OPTAX)),
    "training.muon_momentum": ("training.optimizer", ("muon", "normuon")),
    "training.muon_coefficients": ("training.optimizer", ("muon", "normuon")),
    "training.amp_dtype": ("training.use_amp", (True,)),
    "training.loss_scale": ("training.amp_dtype", ("float16",)),
    "training.initial_loss_scale_power": ("training.loss_scale", (0,)),
    "training.loss_scale_window": ("training.loss_scale", (0,)),
    "training.loss_scale_hysteresis": ("training.loss_scale", (0,)),
    "training.min_loss_scale": ("training.loss_scale", (0,)),
    "data.packing_strategy": ("data.pack_sequences", (True,)),
}


def unused_options(asked: Config, complete: Config) -> Iterator[str]:
    """A line for each option that has no use.

    Args:
      asked: whose options count, where they are not at their defaults.
      complete: the configuration that it became.
    """
    for name, value in field_values(asked).items():
        if value != FIELDS[name].default and (reason := _reason(name, complete)) is not None:
            yield f"{name} ({shown(value)}) has no use with {reason}"


def _reason(name: str, config: Config) -> str | None:
    if name not in NEEDS:
        return None
    other, values = NEEDS[name]
    there = attrgetter(other)(config)
    return _reason(other, config) if there in values else f"{other} {shown(there)}"
