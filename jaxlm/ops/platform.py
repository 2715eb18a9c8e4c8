"""How an operation chooses between its implementation for CPUs and the one for GPUs."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # names of the x86 and Arm instructions for bfloat16 products

Result = TypeVar("Result")


def by_platform(*args: Any, cpu: Callable[..., Result], default: Callable[..., Result]) -> Result:
    """`cpu(*args)` in a program that is compiled for CPUs, `default(*args)` in any other.

    The choice is made when the program is lowered, so that one for GPUs can be lowered where there is only a CPU.
    """
    return jax.lax.platform_dependent(*args, cpu=cpu, default=default)


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16 products; False if the system (not Linux) can't say."""
    if not CPU_INFO.is_file():
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE)
    return flags is not None and not BFLOAT16_FLAGS.isdisjoint(flags[1].split())
