# SPDX-License-Identifier: MIT
"""Counts, times, the stage at work and the last error of a running node; its diagnostics status."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from rclpy.impl.rcutils_logger import RcutilsLogger

STAGES = (
    "convert",  # image message to pixels
    "encode",
    "predict",  # the distribution of the queries
    "dense",  # the distributions of the grid
    "flow",
    "influence",
    "draw",
    "mark",
    "evaluate",  # a part of the hypotheses of EvaluatePokes
    "sample",  # a query of SampleFlow
    "publish",
)
"""The steps of the node's work."""

MODEL_STAGES = frozenset(("encode", "predict", "dense", "flow", "influence"))
"""The stages that the model library computes; all else is the node's own."""

TIMES = (
    *(f"{stage} time" for stage in STAGES),
    "processing time",
    "overhead time",
    "pipeline latency",
)
"""What is timed: each stage; all that is done for one image, and what of that is the node's own;
from its stamp to its last output."""

_ANSWERS = ("answers", " answered")  # how the names of counters of answers end
_FAILURES = ("image", "internal")  # errors of the camera or the node, not of one who asks
_WINDOW = 100  # latest times that the figures are taken over
_LOG_INTERVAL_S = 1.0  # between two log lines about the same kind of error
_SILENCE_S = 2.0  # without an image, after which that is worth a warning: a camera may be slower,
_PERIODS = 3.0  # then it is so many times what images lately took to come


class Monitor:
    """Collects what an operator wants to know. Safe to use from several threads.

    Args:
        logger: of errors and warnings.
        on_time: called with the name (of TIMES) and the milliseconds of everything timed.
    """

    def __init__(self, logger: RcutilsLogger, on_time: Callable[[str, float], None]) -> None:
        self._logger, self._on_time = logger, on_time
        self._lock = Lock()
        self._counts: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()  # counts at the last status
        self._times_ms: dict[str, deque[float]] = {name: deque(maxlen=_WINDOW) for name in TIMES}
        self._logged_at: dict[str, float] = {}
        self._image_at = -math.inf
        self._periods_s: deque[float] = deque(maxlen=5)  # between the latest images
        self.model_ms = 0.0  # all time of MODEL_STAGES so far
        self._at_work: dict[str, float] = {}  # stages, and when they began
        self._last_error = ""
        self._failures_s: tuple[float, float] | None = None  # first and last since an answer
        self._failure = ""

    def count(self, what: str, n: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[what] += n
            if what.endswith(_ANSWERS):
                self._failures_s = None

    @property
    def counts(self) -> dict[str, int]:
        """All counters."""
        with self._lock:
            return dict(self._counts)

    def image_received(self) -> None:
        """Count an image, and note that the camera is alive."""
        self.count("images received")
        now = time.monotonic()
        with self._lock:
            if self._image_at > -math.inf:
                self._periods_s.append(now - self._image_at)
            self._image_at = now

    def remember_error(self, kind: str, text: str) -> None:
        """Count and remember an error that is logged elsewhere."""
        with self._lock:
            self._counts[f"errors: {kind}"] += 1
            self._last_error = f"{kind}: {text}"
            if kind in _FAILURES:
                self._failed()

    def image_failed(self) -> None:
        """Note that an image could not be read, which a request's error tells."""
        with self._lock:
            self._failed()

    def _failed(self) -> None:
        now = time.monotonic()
        first, last = self._failures_s or (now, now)
        # after a pause, in which nothing was tried, it begins anew
        self._failures_s = (first if now - last <= self._silence_s() else now), now

    def error(self, kind: str, text: str) -> None:
        """Count and remember an error; log it unless the same kind was logged just now."""
        self.remember_error(kind, text)
        with self._lock:
            due = self._due(kind)
        if due:
            self._logger.error(f"{kind}: {text}")

    def warn(self, kind: str, text: str) -> None:
        """Log a warning unless the same kind was logged just now."""
        with self._lock:
            due = self._due(kind)
        if due:
            self._logger.warning(text)

    def fail(self, text: str) -> None:
        """Remember why the node cannot work at all; empty when it can again."""
        with self._lock:
            self._failure = text

    def time(self, name: str, duration_ms: float) -> None:
        """Record a duration of TIMES."""
        with self._lock:
            self._times_ms[name].append(duration_ms)
        self._on_time(name, duration_ms)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record how long the body takes, a stage of STAGES; meanwhile it counts as at work."""
        start = time.monotonic()
        with self._lock:
            self._at_work[name] = start
        try:
            yield
        finally:
            with self._lock:
                del self._at_work[name]
        duration_ms = 1e3 * (time.monotonic() - start)
        if name in MODEL_STAGES:
            self.model_ms += duration_ms
        self.time(f"{name} time", duration_ms)

    def status(
        self, name: str, hardware_id: str, state: str, facts: dict[str, str], stuck_after_s: float
    ) -> DiagnosticStatus:
        """What happened since the last status.

        ERROR when the node cannot work, or for longer than ``stuck_after_s`` a stage has been at
        work, or all that was tried has failed; WARN when it is not active, hears no camera, or
        refused or dropped something. The values are ``facts``, all counters, and the times, "n/a"
        before the first.
        """
        now = time.monotonic()
        with self._lock:
            new = self._counts - self._reported
            self._reported = self._counts.copy()
            errors = sum(n for what, n in new.items() if what.startswith("errors"))
            old, future = new["images dropped: too old"], new["images from the future"]
            stage, began = min(self._at_work.items(), key=lambda x: x[1], default=("", now))
            failing_since, last_failure = self._failures_s or (now, -math.inf)
            level, message = DiagnosticStatus.WARN, ""
            if self._failure:
                level, message = DiagnosticStatus.ERROR, self._failure
            elif now - began > stuck_after_s:
                level = DiagnosticStatus.ERROR
                message = f"stuck: {stage} has been at work for {now - began:.1f} s"
            elif state != "active":
                message = state
            elif now - last_failure <= self._silence_s() and now - failing_since > stuck_after_s:
                level = DiagnosticStatus.ERROR
                message = f"no answer for {now - failing_since:.1f} s; {self._last_error}"
            elif errors:
                message = f"{errors} errors; {self._last_error}"
            elif old:
                message = f"{old} images dropped as too old"
            elif future:
                message = (
                    f"{future} images stamped ahead of the clock; how old they are is not known"
                )
            elif now - self._image_at > self._silence_s():
                message = "no image received; check topic and QoS"
                if self._image_at > -math.inf:
                    message = f"no image for {now - self._image_at:.0f} s; is the camera running?"
            else:
                level, message = DiagnosticStatus.OK, "answering"
            values = {"state": state, **facts}
            values.update((what, str(n)) for what, n in sorted(self._counts.items()))
            for what, times in self._times_ms.items():
                values[what] = (
                    f"{times[-1]:.1f} ms, median {statistics.median(times):.1f}" if times else "n/a"
                )
            values["at work"] = f"{stage}, for {now - began:.1f} s" if stage else "n/a"
            values["last error"] = self._last_error or "none"
        return DiagnosticStatus(
            level=level,
            name=name,
            message=message,
            hardware_id=hardware_id,
            values=[KeyValue(key=k, value=v) for k, v in values.items()],
        )

    def _silence_s(self) -> float:
        """How long no image may come without a word: not for nothing, of a slow camera."""
        period = statistics.median(self._periods_s) if self._periods_s else 0.0
        return max(_SILENCE_S, _PERIODS * period)

    def _due(self, kind: str) -> bool:
        """Whether it is time to log about ``kind`` (again), which is then taken as done."""
        now = time.monotonic()
        due = now - self._logged_at.get(kind, -math.inf) >= _LOG_INTERVAL_S
        if due:
            self._logged_at[kind] = now
        return due
