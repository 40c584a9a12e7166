# SPDX-License-Identifier: MIT
"""The one conversion between image messages and numpy arrays.

The common encodings are read and written with numpy alone, which is fast and independent of the
numpy that a ``cv_bridge`` was built against. Any other encoding (Bayer, YUV, ...) goes through
``cv_bridge`` where that is installed. OpenCV reads compressed images.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import DTypeLike, NDArray
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header


class ImageError(ValueError):
    """An image that cannot be read or written; the message names what was received and expected."""


class Encoding(NamedTuple):
    """Memory layout of one pixel."""

    dtype: DTypeLike
    channels: int


ENCODINGS: dict[str, Encoding] = {
    "rgb8": Encoding(np.uint8, 3),
    "bgr8": Encoding(np.uint8, 3),
    "rgba8": Encoding(np.uint8, 4),
    "bgra8": Encoding(np.uint8, 4),
    "mono8": Encoding(np.uint8, 1),
    "16UC1": Encoding(np.uint16, 1),  # depth in mm, 0 = invalid
    "32FC1": Encoding(np.float32, 1),  # depth in m, NaN = invalid; any other scalar field
    "32FC2": Encoding(np.float32, 2),  # flow in px
}
"""The encodings that numpy handles here."""

_TO_RGB: dict[str, Callable[[NDArray[Any]], NDArray[np.uint8]]] = {
    "rgb8": lambda a: a,
    "bgr8": lambda a: a[..., ::-1],
    "rgba8": lambda a: a[..., :3],
    "bgra8": lambda a: a[..., 2::-1],
    "mono8": lambda a: np.repeat(a[..., None], 3, axis=-1),
}


_COMPRESSED = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG"}  # by their first bytes


def image_to_array(msg: Image) -> NDArray[Any]:
    """The pixels ``[H, W]`` or ``[H, W, C]`` of an image in its own encoding, native byte order.

    The array shares the message's memory where the layout allows. Row padding (``step``) and
    ``is_bigendian`` are honoured.

    Raises:
        ImageError: for an encoding that is not in ENCODINGS, an empty image, a ``step`` smaller
            than a row, or data whose length is not ``step * height``.
    """
    layout = ENCODINGS.get(msg.encoding)
    if layout is None:
        raise ImageError(
            f"image encoding {msg.encoding!r} is not supported, expected one of {[*ENCODINGS]}"
        )
    dtype = np.dtype(layout.dtype).newbyteorder(">" if msg.is_bigendian else "<")
    pixels = _rows(msg, msg.width * layout.channels * dtype.itemsize).view(dtype)
    pixels = pixels.astype(dtype.newbyteorder("="), copy=False)
    shape = (msg.height, msg.width, layout.channels)
    return pixels.reshape(shape[:2] if layout.channels == 1 else shape)


def image_to_rgb(msg: Image | CompressedImage) -> NDArray[np.uint8]:
    """The colours ``uint8 [H, W, 3]`` (RGB, contiguous) of an image; mono becomes grey.

    Compressed images are JPEG or PNG, whatever their ``format`` says of it, with the pixels where
    the file has them: a camera's orientation tag would move pokes away from what was poked.

    Raises:
        ImageError: as :func:`image_to_array`; and for an encoding that holds no colour, or that
            needs ``cv_bridge`` where it is not installed or fails; for compressed data that is
            neither JPEG nor PNG or is damaged.
    """
    if isinstance(msg, CompressedImage):
        return _decompress(msg)
    if msg.encoding in _TO_RGB:
        return np.ascontiguousarray(_TO_RGB[msg.encoding](image_to_array(msg)))
    if msg.encoding in ENCODINGS:
        raise ImageError(
            f"image encoding {msg.encoding!r} holds no colour, expected one of {[*_TO_RGB]}"
        )
    _check_size(msg)
    try:
        from cv_bridge import CvBridge
    except ImportError as error:
        raise ImageError(
            f"image encoding {msg.encoding!r} needs cv_bridge, which cannot be imported ({error}); "
            f"install it, or publish one of {[*_TO_RGB]}"
        ) from error
    try:
        return np.ascontiguousarray(CvBridge().imgmsg_to_cv2(msg, "rgb8"))
    except Exception as error:  # cv_bridge and OpenCV raise many types for bad data
        raise ImageError(f"cv_bridge cannot read encoding {msg.encoding!r}: {error}") from error


def array_to_image(pixels: NDArray[Any], encoding: str, header: Header) -> Image:
    """An image message of ``pixels`` ``[H, W]`` or ``[H, W, C]``, with a copy of the data.

    Raises:
        ImageError: for an unknown encoding, or an array that has not exactly its type and shape.
    """
    layout = ENCODINGS.get(encoding)
    if layout is None:
        raise ImageError(f"image encoding {encoding!r} is unknown, expected one of {[*ENCODINGS]}")
    channels = () if layout.channels == 1 else (layout.channels,)
    fits = pixels.ndim == 2 + len(channels) and pixels.shape[2:] == channels and pixels.size > 0
    if pixels.dtype != layout.dtype or not fits:
        raise ImageError(
            f"encoding {encoding!r} expects {np.dtype(layout.dtype)} of shape "
            f"{('H', 'W', *channels)}, received {pixels.dtype} of shape {pixels.shape}"
        )
    return Image(
        header=header,
        height=pixels.shape[0],
        width=pixels.shape[1],
        encoding=encoding,
        is_bigendian=int(sys.byteorder == "big"),
        step=pixels[0].nbytes,
        data=flat_array("B", pixels),
    )


def flat_array(typecode: str, values: NDArray[Any]) -> array:
    """``values`` in row-major order as the one type that message fields take without a slow check.

    Assigning a list or a numpy array instead makes the setter look at each element.
    """
    data: array = array(typecode)
    data.frombytes(np.ascontiguousarray(values).tobytes())
    return data


def _decompress(msg: CompressedImage) -> NDArray[np.uint8]:
    data = np.frombuffer(msg.data, np.uint8)
    kind = next((k for start, k in _COMPRESSED.items() if bytes(data[: len(start)]) == start), None)
    if kind is None:
        raise ImageError(
            f"compressed image of format {msg.format!r} begins with {bytes(data[:8])!r}, "
            f"expected {' or '.join(_COMPRESSED.values())}"
        )
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:  # of a size beyond OpenCV's limits, for example
        raise ImageError(f"{kind} image of {data.size} bytes cannot be read: {error}") from error
    if pixels is None:
        raise ImageError(f"{kind} image of {data.size} bytes is damaged and cannot be read")
    return np.ascontiguousarray(pixels[..., ::-1])


def _check_size(msg: Image) -> None:
    if msg.height == 0 or msg.width == 0:
        raise ImageError(f"image is empty: {msg.width} x {msg.height} px (width x height)")


def _rows(msg: Image, row_bytes: int) -> NDArray[np.uint8]:
    """The data as contiguous bytes ``[H, row_bytes]``, without the rows' padding."""
    _check_size(msg)
    if msg.step < row_bytes:
        raise ImageError(
            f"image step is {msg.step} bytes, expected at least {row_bytes} "
            f"({msg.width} px of {msg.encoding!r})"
        )
    if len(msg.data) != msg.step * msg.height:
        raise ImageError(
            f"image data has {len(msg.data)} bytes, expected step * height = "
            f"{msg.step} * {msg.height} = {msg.step * msg.height}"
        )
    rows = np.frombuffer(msg.data, np.uint8).reshape(msg.height, msg.step)
    return np.ascontiguousarray(rows[:, :row_bytes])
