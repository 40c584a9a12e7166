# SPDX-License-Identifier: MIT
"""Where the node's callbacks leave what arrived until the worker has time for it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from threading import Condition

from sensor_msgs.msg import Image

from fpt_msgs.msg import PokeArray, QueryArray

_MAX_REQUESTS = 64  # pokes and queries that may wait; the oldest make room


@dataclass
class Request:
    """Pokes or queries, and when they arrived (time.monotonic)."""

    msg: PokeArray | QueryArray
    arrived_s: float


@dataclass
class Batch:
    """Everything that arrived since the last batch."""

    image: Image | None
    requests: list[Request]
    woken: bool  # something else happened that calls for an answer


class Inbox:
    """Holds only the newest image, so that a slow worker never falls behind a fast camera."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._image: Image | None = None
        self._requests: deque[Request] = deque(maxlen=_MAX_REQUESTS)
        self._wake = False
        self._closed = False

    def put_image(self, image: Image) -> bool:
        """Leave an image; True when it replaced one that nobody had taken."""
        with self._changed:
            replaced = self._image is not None
            self._image = image
            self._changed.notify()
            return replaced

    def put_request(self, msg: PokeArray | QueryArray) -> bool:
        """Leave pokes or queries; True when the oldest that waited had to make room."""
        with self._changed:
            full = len(self._requests) == _MAX_REQUESTS
            self._requests.append(Request(msg, time.monotonic()))
            self._changed.notify()
            return full

    def wake(self) -> None:
        """Call for an answer although nothing arrived."""
        with self._changed:
            self._wake = True
            self._changed.notify()

    def close(self) -> None:
        """Let the worker end: from now on :meth:`take` returns None."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether the worker should end."""
        return self._closed

    def take(self, timeout_s: float | None = None) -> Batch | None:
        """Wait until something arrives, or for ``timeout_s``; None when closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._wake or self._image is not None or self._requests,
                timeout_s,
            )
            if self._closed:
                return None
            batch = Batch(self._image, list(self._requests), self._wake)
            self._image, self._wake = None, False
            self._requests.clear()
            return batch
