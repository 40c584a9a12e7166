# SPDX-License-Identifier: MIT
"""Pokes and query points in px of an image, and the check that they lie in it. Needs no ROS.

The unit and the convention of a pixel coordinate are those of ``fpt_model.geometry``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fpt_model.geometry import inside_image

Size = tuple[int, int]  # (height, width) in px


class RequestError(ValueError):
    """A request that cannot be answered; the text names the element and value at fault."""


@dataclass(frozen=True)
class Pokes:
    """Pokes in px: positions ``xy [P, 2]`` and displacements ``flow [P, 2]``, float64.

    ``dz [P]`` is the displacement along the optical axis in m, away from the camera; NaN: unknown,
    which all are if it is left out.
    """

    xy: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))
    flow: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))
    dz: NDArray[np.float64] = None  # type: ignore[assignment]  # never None once made

    def __post_init__(self) -> None:
        if self.dz is None:
            object.__setattr__(self, "dz", np.full(len(self.xy), np.nan))

    def __len__(self) -> int:
        return len(self.xy)

    def __getitem__(self, index: slice | NDArray[np.generic]) -> Pokes:
        return Pokes(self.xy[index], self.flow[index], self.dz[index])

    def pass_camera(self, depth: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which ``[P]`` would end behind the camera, from ``depth [P]`` in m; none from NaN."""
        return self.dz <= -depth


def check_inside(what: str, xy: NDArray[np.float64], size: Size) -> None:
    """Refuse positions ``xy [N, 2]`` in px that lie outside an image of ``size``.

    Raises:
        RequestError: naming the first of them; ``what`` is its name in the message, "poke" say.
    """
    outside = np.flatnonzero(~inside_image(xy, size))
    if outside.size:
        height, width = size
        x, y = xy[outside[0]]
        raise RequestError(
            f"{what} {outside[0]} of {len(xy)} at x={x:g}, y={y:g} px lies outside the "
            f"{width} x {height} px image, expected -0.5 <= x <= {width - 0.5} and "
            f"-0.5 <= y <= {height - 0.5}"
        )
