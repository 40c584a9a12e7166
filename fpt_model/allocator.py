# SPDX-License-Identifier: MIT
"""How this process gets memory from the system: a setting of glibc's, for programs to make."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MMAP_FROM = 2**30  # bytes
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process, for its next tensors; whether that could be set.

    glibc returns blocks of some MB to the system as soon as they are freed. PyTorch on the CPU
    takes and frees many of them in each pass, and the system fills each new page with zeros: a
    third of the time of training fpt-tiny, a quarter of that of its dense flow. The price is that
    the process keeps what it once needed. It is a setting of the whole process, so programs make
    it, not this library; elsewhere than with glibc, or with another allocator preloaded, nothing
    changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # another libc; TypeError: on Windows
        return False
    mallopt.argtypes = ctypes.c_int, ctypes.c_int
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_FROM) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
