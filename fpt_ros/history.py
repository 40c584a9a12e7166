# SPDX-License-Identifier: MIT
"""The images that a request can name, and the encodings of those that were asked about."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from fpt_ros.images import ImageError
from fpt_ros.pokes import Pokes, Size

if TYPE_CHECKING:  # it imports torch, which programs without a model must not wait for
    from fpt_ros.pipeline import View


def stamp_ns(header: Header) -> int:
    """A header's stamp in nanoseconds."""
    return int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)


_SET_BACK_NS = 500_000_000  # less is disorder on the way


def was_set_back(before: Header, now: Header) -> bool:
    """Whether the clock was, between two messages of a topic: a bag or a simulation began again.

    What came before is then of another time, whatever its stamps are near to. Of cameras that never
    stamp nothing can be told; a simulation's first image may have the stamp 0.
    """
    return stamp_ns(now) < stamp_ns(before) - _SET_BACK_NS


def format_stamp(ns: int) -> str:
    """Nanoseconds as seconds, exactly, unlike a float."""
    return f"{ns // 1_000_000_000}.{ns % 1_000_000_000:09d} s"


@dataclass
class Conditions:
    """What is asked of an image, px; None: nothing was sent."""

    pokes: Pokes | None = None
    queries: NDArray[np.float64] | None = None


@dataclass(eq=False)
class HeldImage:
    """An image, the pokes and queries that named it, and its encoding once it was needed."""

    msg: Image | CompressedImage
    named: Conditions = field(default_factory=Conditions)
    view: View | None = None
    error: str = ""  # why it cannot be read
    arrived_s: float = field(default_factory=time.monotonic)
    depth_msg: Image | None = None  # the nearest to it of all that came
    depth_tried: bool = False  # whether it was reported that it has no usable depth,
    useless_depth: Image | None = None  # and this is no usable one
    dropped: bool = False  # it came before the clock was set back

    @property
    def header(self) -> Header:
        """That of the message."""
        return self.msg.header

    @property
    def size(self) -> Size | None:
        """(height, width) in px, as far as it is known: a compressed image tells it when read."""
        if self.view is not None:
            return self.view.size
        if self.error or isinstance(self.msg, CompressedImage):
            return None
        height, width = self.msg.height, self.msg.width
        return (height, width) if height and width else None


class ImageHistory:
    """The last ``images`` images, and the last ``scenes`` that were asked about.

    An encoding takes far more memory than an image, hence two limits. An image is encoded when it
    is first asked about, and once, as long as its encoding is kept.
    """

    def __init__(self, images: int, scenes: int) -> None:
        self._latest: deque[HeldImage] = deque(maxlen=images)
        self._encoded: deque[HeldImage] = deque()  # the last one asked about last
        self._scenes = scenes

    def add(self, image: HeldImage) -> Header | None:
        """Hold an image as the newest.

        Where the clock was set back none of those before is held any more; then the header of the
        last one of them is returned.
        """
        before = self._latest[-1].header if self._latest else image.header
        set_back = was_set_back(before, image.header)
        if set_back:
            for held in self._all():
                held.dropped, held.view = True, None
            self._latest.clear()
            self._encoded.clear()
        self._latest.append(image)
        return before if set_back else None

    def find(self, ns: int) -> HeldImage | None:
        """The image with this stamp; of several (a bag that loops repeats them) the newest."""
        return next((held for held in self._all() if stamp_ns(held.header) == ns), None)

    def describe(self) -> str:
        """How many images there are, and of which time."""
        stamps = [stamp_ns(held.header) for held in self._all()]
        if not stamps:
            return "none is held"
        return f"{len(stamps)} are held, from {format_stamp(min(stamps))} to " + format_stamp(
            max(stamps)
        )

    def view(self, held: HeldImage, encode: Callable[[Image | CompressedImage], View]) -> View:
        """The image with its encoding, made now if need be.

        Raises:
            ImageError: it cannot be read; also on every further try, which costs nothing.
        """
        if held.error:
            raise ImageError(held.error)
        if held.view is None:
            try:
                held.view = encode(held.msg)
            except ImageError as error:
                held.error = str(error)
                raise
        elif not held.dropped:
            self._encoded.remove(held)
        if not held.dropped:  # else somebody's still, but not to be found any more
            self._encoded.append(held)
            if len(self._encoded) > self._scenes:
                self._encoded.popleft().view = None
        return held.view

    def _all(self) -> list[HeldImage]:
        """Newest first; the encoded ones may be older than the latest."""
        older = sorted(self._encoded, key=lambda held: held.arrived_s, reverse=True)
        return list(dict.fromkeys([*reversed(self._latest), *older]))
