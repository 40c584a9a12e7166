# SPDX-License-Identifier: MIT
"""Depth images and camera_info of the node: which belong to an image, and what is wrong with them.

There is no message_filters here: an image need not wait for what does not come. An image takes the
depth whose stamp is nearest, if that is near enough.
"""

from __future__ import annotations

import math
import time
from collections import deque

import numpy as np
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

from fpt_model.depth import DEPTH_FORMATS, Depth, DepthError, Intrinsics
from fpt_ros.history import format_stamp, stamp_ns, was_set_back
from fpt_ros.images import ImageError, image_to_array
from fpt_ros.pokes import Size

SILENCE_S = 1.0
"""Depth that did not come for this long is not waited for."""


def camera_intrinsics(info: CameraInfo, size: Size) -> Intrinsics:
    """Those of the rectified camera: of the projection matrix P, after roi and binning.

    P is of the whole image at full resolution; as in image_geometry, the region of interest is cut
    out of it before the pixels are binned. The region is taken for that of the rectified image.

    Raises:
        DepthError: it is of images of another size than ``size = (height, width)``, not
            calibrated (zeros, NaN), or of the second camera of a stereo pair, whose P places points
            relative to the first one.
    """
    roi = info.roi
    whole = not (roi.width or roi.height)
    full = (info.height, info.width) if whole else (roi.height, roi.width)
    binning = np.maximum((info.binning_y, info.binning_x), 1)  # 0 is none, too
    if np.any(np.abs(np.array(size) - full / binning) >= 1):  # drivers round either way
        told = f"{full[1]} x {full[0]} px"
        if not whole:
            told += f" (roi of {info.width} x {info.height} px)"
        if (binning > 1).any():
            told += f", binned {binning[1]} x {binning[0]}"
        raise DepthError(f"camera_info is of {told}, the image has {size[1]} x {size[0]} px")
    if info.p[3] or info.p[7]:
        raise DepthError(
            f"camera_info has a baseline, P[3] = {info.p[3]:g} and P[7] = {info.p[7]:g}: expected "
            "0, a single camera or the first of a pair"
        )
    try:
        projection = np.array(info.p).reshape(3, 4)  # a copy: the message stays as it came
        if not whole:
            projection[:2, 2] -= roi.x_offset, roi.y_offset
        projection[:2] /= binning[::-1, None]
        return Intrinsics.from_matrix(projection)
    except DepthError as error:
        raise DepthError(f"the projection matrix of camera_info is unusable: {error}") from error


def read_depth(msg: Image, info: CameraInfo | None, header: Header, size: Size) -> Depth:
    """The depth of an image of ``size`` with ``header``.

    Raises:
        DepthError: it is not registered (another size or frame), of another encoding than 32FC1
            (m) and 16UC1 (mm), damaged, without any valid value, or ``info`` is missing or wrong.
    """
    if info is None:
        raise DepthError("no camera_info was received: depth without intrinsics tells no place")
    if (msg.height, msg.width) != size:
        raise DepthError(
            f"depth has {msg.width} x {msg.height} px, the image {size[1]} x {size[0]} px: "
            "expected depth that is registered to the image"
        )
    for what, other in (("depth", msg.header.frame_id), ("camera_info", info.header.frame_id)):
        if other != header.frame_id:
            raise DepthError(
                f"{what} is in frame {other!r}, the image in {header.frame_id!r}: expected the "
                "same optical frame"
            )
    if msg.encoding not in DEPTH_FORMATS:
        raise DepthError(
            f"depth encoding {msg.encoding!r} is not supported, expected one of {[*DEPTH_FORMATS]}"
        )
    camera = camera_intrinsics(info, size)
    try:
        values = image_to_array(msg)
    except ImageError as error:
        raise DepthError(f"depth cannot be read: {error}") from error
    return Depth(DEPTH_FORMATS[msg.encoding].read(values), camera)


class DepthHistory:
    """The last ``images`` depth images."""

    def __init__(self, images: int) -> None:
        self._latest: deque[Image] = deque(maxlen=images)
        self._heard_s = -math.inf

    def add(self, msg: Image) -> None:
        """Hold one as the newest; alone, where the clock was set back."""
        if self._latest and was_set_back(self._latest[-1].header, msg.header):
            self._latest.clear()
        self._latest.append(msg)
        self._heard_s = time.monotonic()

    def set_back(self, before: Header, now: Header) -> None:
        """Drop all if it is of the time ``before`` the images' clock was set back to ``now``.

        Nothing if depth of the new time came before the image that tells of it.
        """
        middle = (stamp_ns(before) + stamp_ns(now)) // 2
        if self._latest and stamp_ns(self._latest[-1].header) >= middle:
            self._latest.clear()

    @property
    def alive(self) -> bool:
        """Whether depth came lately, so that it is worth to wait for some."""
        return time.monotonic() - self._heard_s < SILENCE_S

    def settled(self, header: Header) -> bool:
        """Whether none will come that is nearer to an image than those held: they come in order."""
        newest = next(reversed(self._latest), None)
        return newest is not None and stamp_ns(newest.header) >= stamp_ns(header)

    def find(self, header: Header, slop_ms: float, known: Image | None = None) -> Image | None:
        """The one whose stamp is nearest to an image's, at most ``slop_ms`` away.

        ``known`` is one that was found before, and need not be held any more.
        """
        nearest = self._nearest(header, known)
        return nearest if nearest is not None and self._lag_ms(nearest, header) <= slop_ms else None

    def describe(self, header: Header, slop_ms: float) -> str:
        """Why there is none for an image."""
        wanted = f"no depth within {slop_ms:g} ms of the image's stamp"
        nearest = self._nearest(header)
        if nearest is None:
            return f"{wanted}: none was received; check topic and QoS"
        silence_s = time.monotonic() - self._heard_s
        return (
            f"{wanted} {format_stamp(stamp_ns(header))}: the nearest is "
            f"{self._lag_ms(nearest, header):.0f} ms away, the last came {silence_s:.1f} s ago"
        )

    def _nearest(self, header: Header, known: Image | None = None) -> Image | None:
        newest_first = [*reversed(self._latest), *([known] if known is not None else [])]
        return min(newest_first, key=lambda msg: self._lag_ms(msg, header), default=None)

    @staticmethod
    def _lag_ms(msg: Image, header: Header) -> float:
        return abs(stamp_ns(msg.header) - stamp_ns(header)) / 1e6
