# SPDX-License-Identifier: MIT
"""Where the node's callbacks leave what arrived until the worker has time for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

from sensor_msgs.msg import CompressedImage, Image

from fpt_msgs.msg import PokeArray, QueryArray
from fpt_ros.history import HeldImage, stamp_ns
from fpt_ros.pokes import RequestError

MAX_REQUESTS = 64
"""Requests of all kinds that may wait; the oldest make room."""


def _ignore(_: Any) -> None:
    pass


@dataclass(eq=False)
class Request:
    """Something asked about an image, whichever way it came.

    Attributes:
        kind: "pokes", "queries", or the name of a service or action; counts and errors carry it.
        msg: what was sent; its header names the image by its stamp.
        done: takes the response, or the reason why there is none. Messages get no response.
        progress: takes what is worth telling before the response.
        cancelled: whether nobody waits for the response any more.
        arrived_s: when it arrived, by time.monotonic.
    """

    kind: str
    msg: Any
    done: Callable[[Any | RequestError], None] = _ignore
    progress: Callable[[Any], None] = _ignore
    cancelled: Callable[[], bool] = bool
    arrived_s: float = field(default_factory=time.monotonic)

    @property
    def is_command(self) -> bool:
        """Pokes or queries of a topic, which change what is published and get no response."""
        return isinstance(self.msg, PokeArray | QueryArray)

    @property
    def stands(self) -> bool:
        """Whether it is for all images to come, until another one of its kind."""
        return self.is_command and stamp_ns(self.msg.header) == 0


@dataclass
class Batch:
    """Everything that arrived since the last batch."""

    images: list[HeldImage]  # oldest first; the last of those that may be held
    superseded: int  # images that a newer one followed
    requests: list[Request]
    woken: bool  # something else happened that calls for an answer
    depths: list[Image] = field(default_factory=list)  # oldest first


class Inbox:
    """Keeps what arrives, in order. Of images no more than ``max_images``, the newest."""

    def __init__(self, max_images: int) -> None:
        self._changed = Condition()
        self._images: deque[HeldImage] = deque(maxlen=max_images)
        self._arrived = 0
        self._depths: deque[Image] = deque(maxlen=max_images)
        self._requests: deque[Request] = deque()
        self._wake = False
        self._closed = False

    def put_image(self, image: Image | CompressedImage) -> None:
        """Leave an image."""
        with self._changed:
            self._images.append(HeldImage(image))  # from now on it gets old
            self._arrived += 1
            self._changed.notify()

    def put_depth(self, depth: Image) -> None:
        """Leave a depth image."""
        with self._changed:
            self._depths.append(depth)
            self._changed.notify()

    def put(self, request: Request) -> Request | None:
        """Leave a request; returns the one that had to make room, if any.

        That is the oldest that nobody misses, pokes that stand where newer ones do, or else the
        oldest that does not stand.
        """
        with self._changed:
            dropped = self._least_missed(request) if len(self._requests) == MAX_REQUESTS else None
            if dropped is not None:
                self._requests.remove(dropped)
            self._requests.append(request)
            self._changed.notify()
            return dropped

    def _least_missed(self, new: Request) -> Request:
        followed = {new.kind} if new.stands else set()
        missed = None
        for request in reversed(self._requests):
            if request.stands:
                missed = request if request.kind in followed else missed
                followed.add(request.kind)
        return missed or next(request for request in self._requests if not request.stands)

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

    def leftover(self) -> list[Request]:
        """The requests that nobody took."""
        with self._changed:
            requests = list(self._requests)
            self._requests.clear()
            return requests

    def take(self, timeout_s: float | None = None) -> Batch | None:
        """Wait until something arrives, or for ``timeout_s``; None when closed."""
        with self._changed:
            self._changed.wait_for(self._anything, timeout_s)
            if self._closed:
                return None
            batch = Batch(
                list(self._images),
                max(0, self._arrived - 1),
                list(self._requests),
                self._wake,
                list(self._depths),
            )
            self._images.clear()
            self._requests.clear()
            self._depths.clear()
            self._arrived, self._wake = 0, False
            return batch

    def _anything(self) -> bool:
        return bool(self._closed or self._wake or self._images or self._requests or self._depths)
