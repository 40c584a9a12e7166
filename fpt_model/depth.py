# SPDX-License-Identifier: MIT
"""Depth images: their units, which values are valid, and the camera that they belong to.

Depth is along the optical axis (x right, y down, z ahead), in metres, NaN where unknown. It is
*registered*: pixel by pixel that of the colour image, of the same size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fpt_model.geometry import inside_image


class DepthError(ValueError):
    """Depth or a camera's intrinsics that cannot be used; names what was received."""


class DepthFormat(NamedTuple):
    """What the numbers of a depth image mean (REP-118, REP-117).

    Valid is what is finite and above 0: sensors mark a pixel without depth by 0 or NaN, one that is
    too near or too far by an infinity.
    """

    dtype: DTypeLike
    metres: float  # of one step

    def read(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """``[H, W]`` in metres, NaN where invalid; DepthError for another type or shape."""
        if values.ndim != 2 or values.dtype != self.dtype:
            raise DepthError(
                f"depth must be {np.dtype(self.dtype)} of shape (H, W), received {values.dtype} "
                f"of shape {values.shape}"
            )
        metres = values.astype(np.float32) * np.float32(self.metres)
        return np.where(np.isfinite(metres) & (metres > 0), metres, np.float32(np.nan))


DEPTH_FORMATS = {
    "32FC1": DepthFormat(np.float32, 1.0),
    "16UC1": DepthFormat(np.uint16, 1e-3),
}
"""By the encoding of an image message."""


@dataclass(frozen=True)
class Intrinsics:
    """A pinhole camera, in px: ``u = fx X / Z + cx``, ``v = fy Y / Z + cy``.

    Pixel centres are at whole numbers, as in `sensor_msgs/CameraInfo` and `fpt_model.geometry`.
    Raises DepthError unless all are finite and the focal lengths positive.
    """

    fx: float
    fy: float
    cx: float
    cy: float

    def __post_init__(self) -> None:
        values = (self.fx, self.fy, self.cx, self.cy)
        if not (all(map(math.isfinite, values)) and self.fx > 0 and self.fy > 0):
            raise DepthError(
                "intrinsics must be finite with positive focal lengths, received "
                + ", ".join(
                    f"{k}={v:g}" for k, v in zip(("fx", "fy", "cx", "cy"), values, strict=True)
                )
            )

    @classmethod
    def from_matrix(cls, matrix: ArrayLike) -> Intrinsics:
        """Of a camera matrix ``K [3, 3]`` or the projection matrix ``P [3, 4]``."""
        m = np.asarray(matrix, np.float64)
        return cls(float(m[0, 0]), float(m[1, 1]), float(m[0, 2]), float(m[1, 2]))

    @classmethod
    def nominal(cls, size: tuple[int, int]) -> Intrinsics:
        """A guess for images of ``size = (height, width)``: centred, as far as the image is wide.

        That is a field of view of 53 degrees.
        """
        height, width = size
        return cls(width, width, (width - 1) / 2, (height - 1) / 2)

    @property
    def focal(self) -> NDArray[np.float64]:
        """``[2]``: fx, fy."""
        return np.array([self.fx, self.fy])

    @property
    def centre(self) -> NDArray[np.float64]:
        """``[2]``: cx, cy."""
        return np.array([self.cx, self.cy])

    def unproject(self, xy: ArrayLike, depth: ArrayLike) -> NDArray[np.float64]:
        """Pixels ``[..., 2]`` at ``depth [...]`` in m to points ``[..., 3]``, m, optical frame."""
        z = np.asarray(depth, np.float64)[..., None]
        ray = (np.asarray(xy, np.float64) - self.centre) / self.focal
        return np.concatenate([ray * z, z], -1)

    def project(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points ``[..., 3]`` in m to pixels ``[..., 2]``; those behind the camera are NaN."""
        p = np.asarray(points, np.float64)
        z = np.where(p[..., 2:] > 0, p[..., 2:], np.nan)
        return p[..., :2] / z * self.focal + self.centre


@dataclass(frozen=True, eq=False)
class Depth:
    """The registered depth of an image. DepthError if there is none in it, or one not above 0."""

    metres: NDArray[np.float32]  # [H, W], NaN where unknown
    intrinsics: Intrinsics

    def __post_init__(self) -> None:
        if not np.all(np.isnan(self.metres) | (self.metres > 0)):
            raise DepthError(
                "depth must be above 0 m, and NaN where it is unknown, received "
                f"{np.nanmin(self.metres):g} m"
            )
        if not np.isfinite(self.metres).any():
            raise DepthError(f"none of the {self.metres.size} px has a valid depth")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in px."""
        return self.metres.shape[0], self.metres.shape[1]

    def at(self, xy: ArrayLike) -> NDArray[np.float64]:
        """``[...]`` m of the pixel that each position ``[..., 2]`` in px lies in, NaN if unknown.

        Nothing is interpolated: between an object and what is behind it there is nothing.
        """
        height, width = self.size
        cell = np.floor(np.nan_to_num(np.asarray(xy, np.float64)) + 0.5)
        inside = np.clip(cell, 0, [width - 1, height - 1]).astype(np.intp)
        column, row = np.moveaxis(inside, -1, 0)
        found = self.metres[row, column]  # the outer border belongs to the last pixels
        return np.where(inside_image(xy, self.size), found, np.nan).astype(np.float64)
