# SPDX-License-Identifier: MIT
"""How this process gets memory from the system and gives it back, where glibc manages it."""

from __future__ import annotations

import ctypes
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MMAP_FROM = 2**30, 2**25  # bytes; older versions refuse the first
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process, for its next tensors; whether that could be set.

    glibc returns blocks of some MB to the system as soon as they are freed. PyTorch on the CPU
    takes and frees many of them in each pass, and the system fills each new page with zeros: a
    third of the time of training fpt-tiny, up to a quarter of that of its dense flow (less where
    large blocks were freed before, to which glibc adapts). The price is that the process keeps what
    it once needed. It is a setting of the whole process, so programs make it, not this library;
    elsewhere than with glibc, or with another allocator preloaded, nothing changes.
    """
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    mallopt.argtypes = ctypes.c_int, ctypes.c_int
    large = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_FROM)
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER)) and large


def return_freed_memory() -> None:
    """Give the system what is free now, this once: also what lies between blocks in use.

    Loading a model leaves such holes, a third of a gigabyte for one of half a gigabyte.
    """
    trim = _function("malloc_trim")
    if trim is not None:
        trim.argtypes = (ctypes.c_size_t,)
        trim(0)


def _function(name: str) -> Any:
    """Of glibc; None elsewhere."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, TypeError):  # TypeError: on Windows
        return None
