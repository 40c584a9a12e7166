# SPDX-License-Identifier: MIT
"""What the benchmarks' tables have in common: where and when they were measured."""

from __future__ import annotations

import contextlib
import datetime
import gc
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fpt_model import processor
from fpt_model.allocator import return_freed_memory


def where(threads: int, **more: str) -> dict[str, str]:
    """Date, commit and machine of a run, and ``more``."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "machine": f"{processor.name()}, {threads} threads",
    } | more


def medians(calls: Mapping[str, Callable[[], object]], times: int) -> dict[str, float]:
    """Seconds of each call, made in turns, after one of each to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(times):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def forget_peak() -> None:
    """Let :func:`peak_gb` speak of what comes from here on, where the system can (Linux)."""
    gc.collect()
    return_freed_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


def peak_gb() -> float:
    """The process's largest resident memory, in GiB."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
