"""Keeps memory that a process on CPU frees, for its next update."""

import ctypes
import platform

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # parameters of glibc's mallopt, from its malloc.h


def keep_freed_memory() -> bool:
    """Makes malloc keep freed memory in the process; returns whether it could (with glibc only).

    XLA on CPU allocates the temporary arrays of each update anew, some 1.2 GB for configs/small.py. By default glibc
    returns such memory to the system, which then zeroes and maps every page again in each update: a fifth of its time.
    With this, the process stays as large as its peak.

    Call it before XLA starts its threads: a thread that has an arena of its own keeps it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    never = -1  # as an unsigned threshold, the largest there is
    return all([mallopt(ARENA_MAX, 1), mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, never)])
