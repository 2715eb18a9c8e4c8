"""Memory that a process on CPU frees stays with it, for the next update."""

import ctypes
import platform

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # parameters of glibc's mallopt, as in its malloc.h


def keep_freed_memory() -> bool:
    """Tells malloc not to give freed memory back to the system; returns whether it does so (with glibc alone).

    XLA on CPU asks malloc for the temporary arrays of each update anew, some 1.2 GB for configs/small.py. By itself
    glibc takes such from the system and gives it back, so that the system zeroes and maps every page again, each
    update: a fifth of its time. The process stays as large as it was at its largest.

    Call it before XLA's threads start: a thread that has memory of its own keeps to it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    keep_all = -1  # as the unsigned threshold above which it gives back: the largest there is
    return all([mallopt(ARENA_MAX, 1), mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, keep_all)])
