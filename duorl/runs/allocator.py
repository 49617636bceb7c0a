"""The C library's allocator, told to keep the memory that tensors give back."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the process reuse freed memory in place of returning it to the system, where glibc is the allocator.

    Large tensors are otherwise mapped and paged in anew each time: on two cores a third of an exhaustive search
    goes there (benchmarks/oracle.py). For a whole process, so commands call it and the library does not.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 2**25)  # the largest that glibc takes
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_TOP_PAD, 2**26)
