# SPDX-License-Identifier: MIT
"""Pokes and predicted modes as markers for RViz, in the optical frame of the image.

A pixel lies on its ray at a depth of 1 m, with the camera's intrinsics where `camera_info` tells
them: in RViz's Camera display the markers then cover what they are about. Otherwise with those of a
nominal camera, see :meth:`Intrinsics.nominal`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from geometry_msgs.msg import Point, Pose, Quaternion, Vector3
from numpy.typing import NDArray
from rclpy.duration import Duration
from sensor_msgs.msg import CameraInfo
from std_msgs.msg import ColorRGBA, Header
from visualization_msgs.msg import Marker, MarkerArray

from fpt_model.depth import DepthError, Intrinsics
from fpt_model.mixture import FlowMixture
from fpt_model.visualize import (
    ELLIPSE_SIGMAS,
    MIN_DRAWN_WEIGHT,
    MODE_COLOUR,
    POKE_COLOUR,
    Colour,
    evenly,
)
from fpt_ros.depth import camera_intrinsics
from fpt_ros.pokes import Pokes, Size

MAX_MARKED_QUERIES = 64
"""Of more queries than this an even selection is marked."""

MIN_ARROW_PX = 0.5
"""Shorter motions get no arrow: RViz cannot orient it, and it would hide its ellipse."""

DEPTH_M = 1.0
"""Depth of all markers along the optical axis."""

_SHAFT_PX, _HEAD_PX, _HEAD_LENGTH_PX = 2.0, 5.0, 6.0
_ELLIPSE_OPACITY = 0.4  # of its mode's arrow
_FLAT_M = 1e-3  # thickness of an ellipse


def display_camera(
    info: CameraInfo | None, size: Size, report: Callable[[str], Any] = lambda _: None
) -> Intrinsics:
    """That of the rectified camera, as image_geometry takes it: the projection matrix P.

    The nominal one where ``info`` is None, or of no use, not calibrated or about an image of
    another size, say: then ``report`` is told why.
    """
    if info is not None:
        try:
            return camera_intrinsics(info, size)
        except DepthError as error:
            report(f"the markers may not cover what they are about in RViz: {error}")
    return Intrinsics.nominal(size)


class Display:
    """Remembers which markers are on display, so that those no longer there are deleted."""

    def __init__(self) -> None:
        self._shown: set[tuple[str, int]] = set()

    def renew(self, drawn: list[Marker], header: Header, lifetime_s: float) -> MarkerArray:
        """Markers in place of those before; RViz removes them after ``lifetime_s``, 0: never."""
        lifetime = Duration(seconds=lifetime_s).to_msg()
        for marker in drawn:
            marker.header, marker.lifetime = header, lifetime
        shown = {(marker.ns, marker.id) for marker in drawn}
        gone = [
            Marker(header=header, ns=ns, id=i, action=Marker.DELETE)
            for ns, i in sorted(self._shown - shown)
        ]
        self._shown = shown
        return MarkerArray(markers=[*gone, *drawn])


class Markers:
    """Makes the markers of one answer after the other.

    Namespaces ``pokes`` (arrows), ``modes`` (an arrow for each query and component, opacity = its
    weight) and ``covariances`` (its ellipse of ELLIPSE_SIGMAS standard deviations). An id stays
    with its poke, or its query and component: ``query * components + component``.
    """

    def __init__(self) -> None:
        self._display = Display()

    def update(
        self,
        pokes: Pokes,
        queries: NDArray[np.float64],
        mixture: FlowMixture,
        camera: Intrinsics,
        header: Header,
        lifetime_s: float,
    ) -> MarkerArray:
        """All markers of an answer, and the deletion of those no longer there.

        Args:
            pokes: in px.
            queries: ``[Q, 2]`` px, and mixture ``[Q]``, their motion in px.
            header: the image's.
            lifetime_s: after which RViz removes what was not renewed; 0: never.
        """
        drawn = [
            poke_arrow("pokes", i, camera, start, flow, 1.0)
            for i, (start, flow) in enumerate(zip(pokes.xy, pokes.flow, strict=True))
            if np.hypot(*flow) >= MIN_ARROW_PX
        ]
        marked = evenly(len(queries), MAX_MARKED_QUERIES)
        drawn += self._modes(mixture[marked], queries[marked], marked, camera)
        return self._display.renew(drawn, header, lifetime_s)

    def _modes(
        self,
        mixture: FlowMixture,
        queries: NDArray[np.float64],
        numbers: NDArray[np.intp],
        camera: Intrinsics,
    ) -> list[Marker]:
        weights, means = mixture.weights, mixture.means
        to_plane = DEPTH_M / camera.focal
        covariances = mixture.scaled(*to_plane).component_covariances()
        variances, axes = np.linalg.eigh(covariances)  # ascending; axes in columns
        diameters = 2 * ELLIPSE_SIGMAS * np.sqrt(np.maximum(variances, 0))
        angles = np.arctan2(axes[..., 1, 1], axes[..., 0, 1])  # of the major axis
        drawn = []
        for row, component in np.argwhere(weights >= MIN_DRAWN_WEIGHT):
            number = int(numbers[row] * mixture.components + component)
            weight = float(weights[row, component])
            start, motion = queries[row], means[row, component]
            if np.hypot(*motion) >= MIN_ARROW_PX:
                drawn.append(
                    _arrow("modes", number, camera, start, start + motion, MODE_COLOUR, weight)
                )
            minor, major = diameters[row, component]
            half = angles[row, component] / 2
            drawn.append(
                Marker(
                    ns="covariances",
                    id=number,
                    type=Marker.SPHERE,
                    pose=Pose(
                        position=_point(camera.unproject(start + motion, DEPTH_M)),
                        orientation=Quaternion(z=float(np.sin(half)), w=float(np.cos(half))),
                    ),
                    scale=Vector3(x=float(major), y=float(minor), z=_FLAT_M),
                    color=_colour(MODE_COLOUR, _ELLIPSE_OPACITY * weight),
                )
            )
        return drawn


def poke_arrow(
    ns: str,
    number: int,
    camera: Intrinsics,
    start: NDArray[np.float64],
    flow: NDArray[np.float64],
    opacity: float,
) -> Marker:
    """The arrow of a poke at ``start [2]`` px by ``flow [2]`` px, without header and lifetime."""
    return _arrow(ns, number, camera, start, start + flow, POKE_COLOUR, opacity)


def motion_in_space_markers(
    start: NDArray[np.float64], motion: NDArray[np.float64], covariance: NDArray[np.float64]
) -> list[Marker]:
    """Namespace ``motion``: an arrow by ``motion [3]`` from ``start [3]``, m in the optical frame,
    and at its end the ellipsoid of ELLIPSE_SIGMAS standard deviations of its ``covariance``."""
    tip = start + motion
    length = float(np.linalg.norm(motion))
    variances, axes = np.linalg.eigh(covariance)
    axes[:, 0] *= np.sign(np.linalg.det(axes))  # a rotation, not a mirroring
    diameters = 2 * ELLIPSE_SIGMAS * np.sqrt(np.maximum(variances, _FLAT_M**2))
    rotation, _ = cv2.Rodrigues(axes)  # its axis, as long as its angle
    half = float(np.linalg.norm(rotation)) / 2
    x, y, z = (rotation[:, 0] * np.sinc(half / np.pi) / 2).tolist()
    return [
        Marker(
            ns="motion",
            id=0,
            type=Marker.ARROW,
            points=[_point(start), _point(tip)],
            scale=Vector3(x=0.05 * length, y=0.1 * length, z=0.2 * length),
            color=_colour(MODE_COLOUR, 1.0),
        ),
        Marker(
            ns="motion",
            id=1,
            type=Marker.SPHERE,
            pose=Pose(position=_point(tip), orientation=Quaternion(x=x, y=y, z=z, w=np.cos(half))),
            scale=Vector3(x=diameters[0], y=diameters[1], z=diameters[2]),
            color=_colour(MODE_COLOUR, _ELLIPSE_OPACITY),
        ),
    ]


def _point(xyz: NDArray[np.float64]) -> Point:
    x, y, z = xyz.tolist()
    return Point(x=x, y=y, z=z)


def _arrow(
    ns: str,
    number: int,
    camera: Intrinsics,
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    colour: Colour,
    opacity: float,
) -> Marker:
    px = DEPTH_M / camera.focal.mean()  # m, about
    return Marker(
        ns=ns,
        id=number,
        type=Marker.ARROW,
        points=[_point(xyz) for xyz in camera.unproject([start, end], np.full(2, DEPTH_M))],
        scale=Vector3(x=px * _SHAFT_PX, y=px * _HEAD_PX, z=px * _HEAD_LENGTH_PX),
        color=_colour(colour, opacity),
    )


def _colour(rgb: Colour, opacity: float) -> ColorRGBA:
    r, g, b = (channel / 255 for channel in rgb)
    return ColorRGBA(r=r, g=g, b=b, a=opacity)
