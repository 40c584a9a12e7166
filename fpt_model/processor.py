# SPDX-License-Identifier: MIT
"""What this processor is good at, where torch's choice of code is not the fastest."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch


def _cpuinfo(*kinds: str) -> list[str]:
    """The different lines of /proc/cpuinfo that start so; none where there is no such file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return sorted({line for line in lines if line.startswith(kinds)})


def name() -> str:
    """As its maker calls it, else its kind."""
    return " ".join(line.split(":")[-1].strip() for line in _cpuinfo("model name")) or (
        platform.machine()
    )


def description() -> str:
    """What code of ``-march=native`` depends on; homes may be shared by several machines."""
    return "".join(_cpuinfo("model name", "flags", "Features", "CPU part")) + platform.machine()


@cache
def mkl_is_slow() -> bool:
    """Whether torch multiplies float32 by MKL on a processor with AVX-512 that is not Intel's.

    There it takes its code for AVX2, and oneDNN is 2.2 times as fast.
    """
    vendors = {line.split(":")[-1].strip() for line in _cpuinfo("vendor_id")}
    return (
        "avx512f" in description()
        and bool(vendors - {"GenuineIntel"})
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@cache
def multiplies_bfloat16() -> bool:
    """Whether it does in vector registers (AVX-512 BF16), and has no AMX, which was not measured.

    torch's fused attention takes as long there in bfloat16 as in float32.
    """
    try:
        amx = torch.cpu._is_amx_tile_supported()
        return bool(torch.cpu._is_avx512_bf16_supported()) and not amx
    except AttributeError:  # another torch, or another kind of processor
        return False


def multiplies_faster(dtype: torch.dtype) -> bool:
    """Whether C++ of our own, in AVX-512, multiplies faster in this type than torch here."""
    faster = {torch.float32: mkl_is_slow, torch.bfloat16: multiplies_bfloat16}
    return dtype in faster and faster[dtype]()
