"""Tells the allocator of the C library to keep the memory of deleted tensors."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the process reuse freed memory and not return it to the system, if the allocator is that of glibc.

    Otherwise, the memory of large tensors is mapped again each time. On two cores, this takes a third of the time of an
    exhaustive search (benchmarks/oracle.py). It changes the whole process, so only commands call it.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 2**25)  # the largest value that glibc accepts
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_TOP_PAD, 2**26)
