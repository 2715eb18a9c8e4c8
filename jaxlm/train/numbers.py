"""Numbers as inputs of a compiled program: runs that differ in nothing else share it.

Zero or none against a value is not such a difference: without weight decay, say, there is no code for it.
"""

import dataclasses
from typing import Any, cast

import jax
import numpy as np

from jaxlm.config import Config, DataConfig, TrainingConfig
from jaxlm.train.precision import initial_loss_scale

Numbers = dict[str, jax.Array]

# Options that are inputs, where they are neither zero nor none.
FLOATS = (
    "weight_decay", "beta1", "beta2", "eps", "muon_momentum", "embedding_lr_ratio", "ema_decay", "max_grad_norm",
    "min_loss_scale",
)  # fmt: skip
INPUTS: dict[str, type[np.number]] = dict.fromkeys(FLOATS, np.float32) | dict.fromkeys(
    ("loss_scale_window", "loss_scale_hysteresis"), np.int32
)
# The other options of training and data that a program is made from, and all of the model's; no more is in it.
TRAINING = (
    "batch_size", "gradient_accumulation_steps", "optimizer", "muon_coefficients", "cautious_decay",
    "decay_embeddings", "z_loss", "use_amp", "amp_dtype", "loss_scale", "accumulator_dtype", "zero_stage",
    "zero_group_size", "tensor_parallel", "offload_optimizer", "loss_chunk_mib", "lora_rank", "lora_alpha",
    "lora_dropout", "lora_targets", "freeze",
)  # fmt: skip
DATA = ("max_length", "pack_sequences")


def program_config(config: Config) -> Config:
    """What a program is made from. All else is at its default, and inputs are no numbers: none can be built in."""
    training = {name: vars(config.training)[name] for name in (*TRAINING, *INPUTS)}
    training |= {name: "an input" for name in (*INPUTS, "loss_scale") if training[name]}
    data = {name: vars(config.data)[name] for name in DATA}
    return Config(config.model, TrainingConfig(**training), DataConfig(**data))


def run_numbers(training: TrainingConfig) -> dict[str, np.ndarray]:
    """The inputs that stay the same all through a run (float32, int32; `key` is uint32 [2])."""
    inputs = {name: np.asarray(vars(training)[name], kind) for name, kind in _inputs(training).items()}
    return inputs | {
        "initial_loss_scale": np.asarray(initial_loss_scale(training), np.float32),
        "key": np.asarray(_key_data(training.seed)),
    }


def at_rate(numbers: Numbers, learning_rate: float) -> Numbers:
    """All the numbers of an update."""
    return numbers | {"learning_rate": cast(jax.Array, np.float32(learning_rate))}


def abstract_numbers(training: TrainingConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Their shapes and dtypes."""
    floats = dict.fromkeys(("initial_loss_scale", "learning_rate"), np.float32)
    scalars = {name: jax.ShapeDtypeStruct((), kind) for name, kind in (_inputs(training) | floats).items()}
    return scalars | {"key": jax.eval_shape(lambda: _key_data(0))}


def _inputs(training: TrainingConfig) -> dict[str, type[np.number]]:
    return {name: kind for name, kind in INPUTS.items() if vars(training)[name]}


def _key_data(seed: int) -> jax.Array:
    return jax.random.key_data(jax.random.key(seed))


def with_inputs(training: TrainingConfig, numbers: Numbers) -> TrainingConfig:
    """The options of a program with its inputs, traced, in their places."""
    inputs: dict[str, Any] = {name: numbers[name] for name in INPUTS if name in numbers}
    return dataclasses.replace(training, **inputs)
