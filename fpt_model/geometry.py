# SPDX-License-Identifier: MIT
"""The one place that maps between image pixels, normalised image and the model's square input.

Conventions (everything is (x, y), x right, y down):

* *pixels*: the centre of the pixel in column ``i`` and row ``j`` is ``(i, j)``, as in OpenCV and in
  ``sensor_msgs/CameraInfo``. The outer border of the image is ``[-0.5, width - 0.5]``.
* *normalised*: the outer border of the whole image is ``[0, 1]^2``; a pixel centre is at
  ``((i + 0.5) / width, (j + 0.5) / height)``.
* *model*: the same as normalised, for the square region of the image that the model is given.

Displacements (flow, pokes) carry the unit of their positions and have no offset. A third component
is the same in all three: relative depth, see :mod:`fpt_model.scene_flow`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Fit = Literal["crop", "stretch"]


def _image_scale(size: tuple[int, int]) -> NDArray[np.float64]:
    """``(width, height)`` of ``size = (height, width)``; ValueError unless both are positive."""
    height, width = size
    if height <= 0 or width <= 0:
        raise ValueError(f"image size (height, width) must be positive, received {(height, width)}")
    return np.array([width, height], dtype=np.float64)


def pixels_to_normalised(xy: ArrayLike, size: tuple[int, int]) -> NDArray[np.float64]:
    """Pixel positions ``[..., 2]`` of an image of ``size = (height, width)`` to ``[0, 1]^2``."""
    return (np.asarray(xy, dtype=np.float64) + 0.5) / _image_scale(size)


def normalised_to_pixels(xy: ArrayLike, size: tuple[int, int]) -> NDArray[np.float64]:
    """Inverse of :func:`pixels_to_normalised`."""
    return np.asarray(xy, dtype=np.float64) * _image_scale(size) - 0.5


def displacement_pixels_to_normalised(d: ArrayLike, size: tuple[int, int]) -> NDArray[np.float64]:
    """Displacements ``[..., 2]`` in px to fractions of the image's width and height."""
    return np.asarray(d, dtype=np.float64) / _image_scale(size)


def displacement_normalised_to_pixels(d: ArrayLike, size: tuple[int, int]) -> NDArray[np.float64]:
    """Inverse of :func:`displacement_pixels_to_normalised`."""
    return np.asarray(d, dtype=np.float64) * _image_scale(size)


def inside_image(xy_px: ArrayLike, size: tuple[int, int]) -> NDArray[np.bool_]:
    """True ``[...]`` where a pixel position ``[..., 2]`` is finite and within the image."""
    xy = np.asarray(xy_px, dtype=np.float64)
    return np.all((xy >= -0.5) & (xy <= _image_scale(size) - 0.5), axis=-1)


def grid(size: tuple[int, int]) -> NDArray[np.float64]:
    """Cell centres ``[h * w, 2]`` of an ``(h, w)`` grid over ``[0, 1]^2``, row-major."""
    h, w = size
    if h <= 0 or w <= 0:
        raise ValueError(f"grid size (h, w) must be positive, received {(h, w)}")
    x, y = np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h)
    return np.stack([x, y], axis=-1).reshape(-1, 2)


@dataclass(frozen=True)
class ModelView:
    """The region of a ``height`` x ``width`` image that becomes the model's square input.

    ``fit="crop"`` is the centred square with the image's short side, as in the public FPT code
    (offset rounded half to even); points outside of it have model coordinates outside [0, 1].
    ``fit="stretch"`` is the whole image, squeezed to a square.
    """

    height: int
    width: int
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        _image_scale((self.height, self.width))
        if self.fit not in ("crop", "stretch"):
            raise ValueError(f'fit must be "crop" or "stretch", received {self.fit!r}')

    @property
    def box(self) -> tuple[int, int, int, int]:
        """``(left, top, width, height)`` of the region in px, in whole pixels."""
        if self.fit == "stretch":
            return 0, 0, self.width, self.height
        side = min(self.height, self.width)
        return round((self.width - side) / 2), round((self.height - side) / 2), side, side

    @property
    def scale(self) -> NDArray[np.float64]:
        """``[2]``: image size / region size, i.e. model / normalised displacement."""
        _, _, w, h = self.box
        return np.array([self.width / w, self.height / h])

    @property
    def offset(self) -> NDArray[np.float64]:
        """``[2]``: the model coordinate of the normalised origin."""
        left, top, w, h = self.box
        return np.array([-left / w, -top / h])

    def to_model(self, xy: ArrayLike) -> NDArray[np.float64]:
        """Normalised positions ``[..., 2]`` to model positions."""
        return np.asarray(xy, dtype=np.float64) * self.scale + self.offset

    def displacement_to_model(self, d: ArrayLike) -> NDArray[np.float64]:
        """Normalised displacements ``[..., D]`` to model units; a third component stays."""
        d = np.asarray(d, dtype=np.float64)
        return d * self._displacement_scale(d.shape[-1])

    def displacement_to_normalised(self, d: ArrayLike) -> NDArray[np.float64]:
        """Inverse of :meth:`displacement_to_model`."""
        d = np.asarray(d, dtype=np.float64)
        return d / self._displacement_scale(d.shape[-1])

    def _displacement_scale(self, dims: int) -> NDArray[np.float64]:
        return np.concatenate([self.scale, np.ones(dims - 2)])
