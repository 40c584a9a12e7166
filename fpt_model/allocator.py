# SPDX-License-Identifier: MIT
"""How this process gets memory from the system and gives it back, where glibc manages it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MMAP_FROM = 2**30, 2**25  # bytes; older versions refuse the first
_NEVER = -1
# bytes, to which glibc raises both thresholds by itself when large blocks are freed
_ADAPTED = {_M_MMAP_THRESHOLD: 2**25, _M_TRIM_THRESHOLD: 2**26}
_APART = 2**16  # bytes

_lock = Lock()
_kept = False
_apart = 0  # how many are at it


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process, for its next tensors; whether that could be set.

    glibc returns blocks of some MB to the system as soon as they are freed. PyTorch on the CPU
    takes and frees many of them in each pass, and the system fills each new page with zeros: a
    third of the time of training fpt-tiny, up to a quarter of that of its dense flow (less where
    large blocks were freed before, to which glibc adapts). The price is that the process keeps what
    it once needed. It is a setting of the whole process, so programs make it, not this library
    (but see :func:`blocks_apart`); elsewhere than with glibc, or with another allocator preloaded,
    nothing changes.
    """
    global _kept
    with _lock:
        _kept = _keep()
        return _kept


def _keep() -> bool:
    mallopt = _mallopt()
    if mallopt is None:
        return False
    large = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_FROM)
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER)) and large


@contextmanager
def blocks_apart() -> Iterator[None]:
    """Blocks taken meanwhile lie apart from all others: those that are freed leave no holes.

    For what makes a model, whose weights stay, out of others that do not. In the holes between them
    later tensors would find their places each time elsewhere, until all of a third of a gigabyte
    that fpt-base once needed more is in use again, by nothing. Afterwards freed memory is kept, if
    the program wants that; otherwise glibc's thresholds are what they are once large blocks were
    freed, and stay there. Nothing changes where the environment sets glibc's, since they cannot be
    read, to be set again.
    """
    global _apart
    mallopt = None
    if not {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & set(os.environ):
        mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    with _lock:
        _apart += 1
        mallopt(_M_MMAP_THRESHOLD, _APART)
    try:
        yield
    finally:
        with _lock:
            _apart -= 1
            if not _apart and not (_kept and _keep()):
                for threshold, size in _ADAPTED.items():
                    mallopt(threshold, size)


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
