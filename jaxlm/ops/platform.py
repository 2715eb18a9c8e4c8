"""What this machine's CPU can do."""

import functools
import re
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # names of the x86 and Arm instructions for bfloat16 products


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16 products; False if the system (not Linux) can't say."""
    if not CPU_INFO.is_file():
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE)
    return flags is not None and not BFLOAT16_FLAGS.isdisjoint(flags[1].split())
