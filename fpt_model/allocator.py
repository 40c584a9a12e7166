# SPDX-License-Identifier: MIT
"""How this process gets memory from the system and gives it back, where glibc manages it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MMAP_FROM = 2**30, 2**25  # bytes; older versions refuse the first
_NEVER = -1
_ADAPTED = (
    2**25,
    2**26,
)  # to which glibc raises both thresholds by itself when large blocks are freed
_APART = 2**16
_kept = False


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process, for its next tensors; whether that could be set.

    glibc returns blocks of some MB to the system as soon as they are freed. PyTorch on the CPU
    takes and frees many of them in each pass, and the system fills each new page with zeros: a
    third of the time of training fpt-tiny, up to a quarter of that of its dense flow (less where
    large blocks were freed before, to which glibc adapts). The price is that the process keeps what
    it once needed. It is a setting of the whole process, so programs make it, not this library;
    elsewhere than with glibc, or with another allocator preloaded, nothing changes.
    """
    global _kept
    mallopt = _mallopt()
    if mallopt is None:
        return False
    large = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_FROM)
    _kept = bool(mallopt(_M_TRIM_THRESHOLD, _NEVER)) and large
    return _kept


@contextmanager
def blocks_apart() -> Iterator[None]:
    """Blocks taken meanwhile lie apart from all others: those that are freed leave no holes.

    For what makes a model, whose weights stay, out of others that do not. In the holes between them
    later tensors would find their places each time elsewhere, until all of a third of a gigabyte
    that fpt-base once needed more is in use again, by nothing. Afterwards freed memory is kept, or
    returned as glibc does once large blocks were freed.
    """
    mallopt = _mallopt()
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _APART)
    try:
        yield
    finally:
        if _kept:
            keep_freed_memory()
        elif mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _ADAPTED[0])
            mallopt(_M_TRIM_THRESHOLD, _ADAPTED[1])


def return_freed_memory() -> None:
    """Give the system what is free now, this once: also what lies between blocks in use."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim.argtypes = (ctypes.c_size_t,)
        trim(0)


def _mallopt() -> Any:
    function = _function("mallopt")
    if function is not None:
        function.argtypes = ctypes.c_int, ctypes.c_int
    return function


def _function(name: str) -> Any:
    """Of glibc; None elsewhere."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, TypeError):  # TypeError: on Windows
        return None
