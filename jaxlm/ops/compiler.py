"""XLA options that the run's programs are compiled with.

They are passed to the compiler with each program rather than through XLA_FLAGS, where an option that this version of
XLA doesn't know ends the process. Options that the user has set in XLA_FLAGS are left alone.
"""

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax

from jaxlm.config import TrainingConfig
from jaxlm.config.validate import xla_option

Options = dict[str, str | bool]  # numbers are written out

COMBINED_BYTES = str(256 * 2**20)  # gradients or parameters in one message: a layer of most models is smaller
PRESETS: dict[str, Options] = {
    "none": {},
    # Communication while computing, in messages of a layer or more, as JAX's notes on GPU performance recommend.
    "overlap": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_all_reduce_combine_threshold_bytes": COMBINED_BYTES,
        "xla_gpu_all_gather_combine_threshold_bytes": COMBINED_BYTES,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": COMBINED_BYTES,
    },
}
LOAD, DUMP = "xla_gpu_load_autotune_results_from", "xla_gpu_dump_autotune_results_to"
# Replaces operations that sum in any order. Autotuning stays on: its choices are kept in the cache of compiled
# programs, so that a resumed run uses the same program.
REPEATABLE: Options = {"xla_gpu_exclude_nondeterministic_ops": True}


# XLA would run the forward kernel of a scanned layer twice, once in a fusion that writes its results into those of all.
_OF_KERNELS: dict[str, Options] = {"mosaic": {"xla_gpu_enable_dynamic_slice_fusion": False}}


def keep_programs(folder: Path) -> None:
    """Lets JAX keep compiled programs in `folder`, and find them there again after it was moved or copied."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.__version_info__ < (0, 11):  # findings/jax-cache-copied.sh
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def compiler_options(training: TrainingConfig, platform: str, report: Callable[[str], None]) -> Options:
    """The options for this run's programs that the installed XLA knows; `report` is called with a line on each other.

    Args:
      platform: JAX's name of the backend; presets and determinism apply to "gpu" alone.
    """
    wanted: Options = {}
    if platform == "gpu":
        wanted |= PRESETS[training.xla_preset] | (REPEATABLE if training.deterministic else {})
    return _that_may_be_set(wanted | dict(xla_option(text) for text in training.xla_options), report)


@cache
def options_of_kernel(attention: str, report: Callable[[str], None]) -> Options:
    """The options for programs with this attention kernel, as those of `compiler_options`."""
    return _that_may_be_set(_OF_KERNELS.get(attention, {}), report)


def _that_may_be_set(wanted: Options, report: Callable[[str], None]) -> Options:
    in_environment = set(re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", "")))
    return {name: value for name, value in wanted.items() if _may_set(name, value, in_environment, report)}


def _may_set(name: str, value: str | bool, in_environment: set[str], report: Callable[[str], None]) -> bool:
    if name in in_environment:
        report(f"{name}: as XLA_FLAGS has it")
        return False
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        report(f"{name}={value}: left out, this XLA does not take it ({str(error).splitlines()[0][:100]})")
        return False
    return True


def describe(training: TrainingConfig, options: Options) -> str:
    """For the start report: whether a run on GPUs repeats bit for bit, and which options were asked for."""
    repeats = all(name in options for name in REPEATABLE)
    repeat = "repeatable operations only" if repeats else "a run may not repeat bit for bit (training.deterministic)"
    preset = "" if training.xla_preset == "none" else f", preset {training.xla_preset}"
    own = f", {' '.join(training.xla_options)}" if training.xla_options else ""
    tuned = ", tuned as the folder of the run says" if LOAD in options else ""
    return f"{repeat}{preset}{own}{tuned}"
