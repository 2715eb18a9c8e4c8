"""Options of XLA that the run's programs are compiled with: presets by name, and what makes them repeatable.

They go to the compiler with each program rather than through XLA_FLAGS, where an option that this version of XLA does
not know ends the process. What XLA_FLAGS says stays.
"""

import os
import re
from collections.abc import Callable

import jax

from jaxlm.config import TrainingConfig, xla_option

Options = dict[str, str | bool]  # numbers are written out

LAYER_BYTES = 256 * 2**20  # of gradients or parameters that travel in one message: the layers of most models are less
PRESETS: dict[str, Options] = {
    "none": {},
    # Communication while computing, in messages of a layer or more, as JAX's notes on GPU performance have it.
    "overlap": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_all_reduce_combine_threshold_bytes": str(LAYER_BYTES),
        "xla_gpu_all_gather_combine_threshold_bytes": str(LAYER_BYTES),
        "xla_gpu_reduce_scatter_combine_threshold_bytes": str(LAYER_BYTES),
    },
}
# Operations that sum in any order give way to others. It leaves autotuning on: what that chose is kept in the cache of
# compiled programs, so that a run which goes on does so with the very program that it began with.
REPEATABLE: Options = {"xla_gpu_exclude_nondeterministic_ops": True}


def compiler_options(training: TrainingConfig, platform: str, report: Callable[[str], None]) -> Options:
    """The options for this run's programs, as far as the installed XLA knows them; `report` hears of the others.

    Args:
      platform: JAX's name of the backend; presets and determinism are about "gpu".
    """
    wanted: Options = {}
    if platform == "gpu":
        wanted |= PRESETS[training.xla_preset] | (REPEATABLE if training.deterministic else {})
    wanted |= dict(xla_option(text) for text in training.xla_options)
    in_environment = set(re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", "")))
    return {name: value for name, value in wanted.items() if _may_set(name, value, in_environment, report)}


def _may_set(name: str, value: str | bool, taken: set[str], report: Callable[[str], None]) -> bool:
    if name in taken:
        report(f"{name}: as XLA_FLAGS has it")
        return False
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        report(f"{name}={value}: left out, this XLA does not take it ({str(error).splitlines()[0][:100]})")
        return False
    return True


def describe(training: TrainingConfig, options: Options) -> str:
    """Whether a GPU's run repeats bit for bit, and what was asked of XLA, in words."""
    repeats = all(name in options for name in REPEATABLE)
    said = "repeatable operations only" if repeats else "a run may not repeat bit for bit (training.deterministic)"
    preset = "" if training.xla_preset == "none" else f", preset {training.xla_preset}"
    own = f", {' '.join(training.xla_options)}" if training.xla_options else ""
    return f"{said}{preset}{own}"
