# SPDX-License-Identifier: MIT
"""Counts, times and the last error of a running node, and their `/diagnostics` status."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

_WINDOW = 100  # latest durations of a stage that its figures are taken over
_LOG_INTERVAL_S = 1.0  # between two log lines about the same kind of error
_SILENCE_S = 2.0  # without an image, after which that is worth a warning


class Monitor:
    """Collects what an operator wants to know. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()  # counts at the last status
        self._times_ms: dict[str, deque[float]] = {}
        self._logged_at: dict[str, float] = {}
        self._image_at = -math.inf
        self._last_error = ""
        self._failure = ""

    def count(self, what: str, n: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[what] += n

    def image_received(self) -> None:
        """Count an image, and note that the camera is alive."""
        self.count("images received")
        self._image_at = time.monotonic()

    def error(self, kind: str, text: str) -> None:
        """Count an error of a kind and remember its text."""
        with self._lock:
            self._counts[f"errors: {kind}"] += 1
            self._last_error = f"{kind}: {text}"

    def due(self, kind: str) -> bool:
        """Whether it is time to log about ``kind`` (again), which is then taken as done."""
        now = time.monotonic()
        with self._lock:
            due = now - self._logged_at.get(kind, -math.inf) >= _LOG_INTERVAL_S
            if due:
                self._logged_at[kind] = now
            return due

    def fail(self, text: str) -> None:
        """Remember why the node cannot work at all; empty when it can again."""
        with self._lock:
            self._failure = text

    def time(self, stage: str, duration_ms: float) -> None:
        """Record a duration of a stage."""
        with self._lock:
            self._times_ms.setdefault(stage, deque(maxlen=_WINDOW)).append(duration_ms)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record how long the body takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.time(name, 1e3 * (time.perf_counter() - start))

    def status(
        self, name: str, hardware_id: str, state: str, facts: dict[str, str]
    ) -> DiagnosticStatus:
        """What happened since the last status.

        ERROR when the node cannot work, WARN when it is not active, hears no camera, or refused or
        dropped something. The values are ``facts``, all counters, and the times of each stage.
        """
        with self._lock:
            new = self._counts - self._reported
            self._reported = self._counts.copy()
            errors = sum(n for what, n in new.items() if what.startswith("errors"))
            old = new["images dropped: too old"]
            level, message = DiagnosticStatus.WARN, ""
            if self._failure:
                level, message = DiagnosticStatus.ERROR, self._failure
            elif state != "active":
                message = state
            elif errors:
                message = f"{errors} errors; {self._last_error}"
            elif old:
                message = f"{old} images dropped as too old"
            elif time.monotonic() - self._image_at > _SILENCE_S:
                message = "no image received; check topic and QoS"
            else:
                level, message = DiagnosticStatus.OK, "answering"
            values = {"state": state, **facts}
            values.update((what, str(n)) for what, n in sorted(self._counts.items()))
            for stage, times in self._times_ms.items():
                values[f"{stage} time"] = f"{times[-1]:.1f} ms, mean {sum(times) / len(times):.1f}"
            values["last error"] = self._last_error or "none"
        return DiagnosticStatus(
            level=level,
            name=name,
            message=message,
            hardware_id=hardware_id,
            values=[KeyValue(key=k, value=v) for k, v in values.items()],
        )
