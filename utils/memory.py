"""Memory of the host that a training frees and asks for again in every step."""

from __future__ import annotations

import ctypes
import platform

# Numbers of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next request instead of handing it back to the system.

    A training step on the CPU frees and takes gigabytes. glibc gives large blocks back at once, and the system clears
    every page again when it is asked for: up to a third of a step at UNI size. The greatest memory a process needs
    stays about the same; it just keeps it until its end. Only with glibc (Linux); elsewhere nothing is changed.

    returns: whether it took effect.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    never = -1
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, never))
