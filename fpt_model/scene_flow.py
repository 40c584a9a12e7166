# SPDX-License-Identifier: MIT
"""Between motion in an image with relative depth and motion in space, for three-dimensional models.

The motion of a point is ``(du, dv, r)``: its displacement in the image in px (in the predictor's
arrays: fractions of width and height), and the *relative depth* ``r = Z' / Z - 1``, its
displacement along the optical axis over its depth at the start. Dimensionless, positive away from
the camera. Why so: an image alone does not tell a near small thing from a far large one, and
neither ``du`` nor ``r`` depends on that scale; ``r`` is of the size of ``du`` over the focal length
for motions of equal length, so that one network and one noise level serve both; and metres are
linear in it, ``dz = Z r``, so that a Gaussian stays one. No crop, mirroring or turn of the image
changes it. With the depth Z (metres) of a point ``(u, v)``, known from a depth image::

    X  = ((u - cx) / fx Z,                (v - cy) / fy Z,                Z)
    X' = ((u + du - cx) / fx Z (1 + r),   (v + dv - cy) / fy Z (1 + r),   Z (1 + r))

Scene flow is ``X' - X``, in metres over the model's horizon, in the optical frame of the image.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fpt_model.depth import Depth, Intrinsics
from fpt_model.mixture import FlowMixture, Reduce

MIN_RATIO = 0.01
"""Depth after over before the motion is taken to be at least this: nothing passes the camera."""

Array = NDArray[np.float64]


def _ratio(motion: Array) -> Array:
    """``[...]``: Z' / Z."""
    return np.maximum(1 + motion[..., 2], MIN_RATIO)


def displacement(xy: ArrayLike, depth: ArrayLike, motion: ArrayLike, camera: Intrinsics) -> Array:
    """Scene flow ``[..., 3]`` (m) of pixels ``xy [..., 2]`` at ``depth [...]`` (m).

    ``motion [..., 3]`` is du, dv (px) and relative depth. NaN where the depth is.
    """
    xy, z, m = (np.asarray(a, np.float64) for a in (xy, depth, motion))
    return camera.unproject(xy + m[..., :2], z * _ratio(m)) - camera.unproject(xy, z)


def image_motion(xy: ArrayLike, depth: ArrayLike, flow: ArrayLike, camera: Intrinsics) -> Array:
    """The inverse of :func:`displacement`: scene flow ``[..., 3]`` (m) to du, dv (px) and r.

    du and dv are NaN for what ends behind the camera, where r is -1 or less.
    """
    xy, z, f = (np.asarray(a, np.float64) for a in (xy, depth, flow))
    after = camera.unproject(xy, z) + f
    return np.concatenate([camera.project(after) - xy, f[..., 2:] / z[..., None]], -1)


def displacement_covariance(
    xy: ArrayLike, depth: ArrayLike, motion: ArrayLike, covariance: ArrayLike, camera: Intrinsics
) -> Array:
    """Covariance ``[..., 3, 3]`` (m^2) of scene flow, to first order about ``motion [..., 3]``.

    ``covariance [..., 3, 3]`` is that of du, dv (px) and relative depth.
    """
    xy, z, m = (np.asarray(a, np.float64) for a in (xy, depth, motion))
    jacobian = np.zeros((*m.shape[:-1], 3, 3))
    moved = (xy + m[..., :2] - camera.centre) / camera.focal
    jacobian[..., 0, 0] = z * _ratio(m) / camera.fx
    jacobian[..., 1, 1] = z * _ratio(m) / camera.fy
    jacobian[..., :2, 2] = z[..., None] * moved
    jacobian[..., 2, 2] = z
    return jacobian @ np.asarray(covariance, np.float64) @ np.swapaxes(jacobian, -1, -2)


def reduce_motion(mixture: FlowMixture, how: Reduce, camera: Intrinsics) -> Array:
    """``[..., 3]``: one motion (du, dv px, relative depth) a point, of a mixture in these units.

    What the least expected error is depends on the unit of the axes: relative depth counts in focal
    lengths, by which motions of equal length near the image's centre count the same.
    """
    focal = float(camera.focal.mean())
    motion: Array = mixture.scaled(1.0, 1.0, focal).reduce(how) / [1.0, 1.0, focal]
    return motion


class SceneFlow(NamedTuple):
    """Motion of N points in space, metres over the horizon, optical frame; NaN without depth."""

    points: Array  # [N, 3]
    flow: Array  # [N, 3]
    weight: Array  # [N] probability of the mixture's component that is nearest to the flow
    std: Array  # [N] root of the trace of the flow's covariance, to first order


def scene_flow(mixture: FlowMixture, motion: Array, xy: ArrayLike, depth: Depth) -> SceneFlow:
    """Of pixels ``xy [N, 2]`` whose ``mixture [N]`` is of du, dv (px) and relative depth.

    ``motion [N, 3]`` is what :func:`reduce_motion` makes of it.
    """
    camera, z = depth.intrinsics, depth.at(xy)
    spread = displacement_covariance(xy, z, motion, mixture.covariance(), camera)
    scale = np.array([1.0, 1.0, camera.focal.mean()])
    apart = np.linalg.norm((mixture.means - motion[..., None, :]) * scale, axis=-1)
    nearest = apart.argmin(-1)[..., None]
    known = np.isfinite(z)
    return SceneFlow(
        camera.unproject(xy, z),
        displacement(xy, z, motion, camera),
        np.where(known, np.take_along_axis(mixture.weights, nearest, -1)[..., 0], np.nan),
        np.sqrt(np.trace(spread, axis1=-2, axis2=-1)),
    )


_ALIKE = 0.02  # relative difference of depth at which two points hardly share a surface


def upsample_motion(motion: ArrayLike, depth: NDArray[np.floating]) -> Array:
    """Motion ``[h, w, 3]`` at the cells of a grid over the image to ``[H, W, 3]``, by its depth.

    Joint bilateral upsampling (Kopf et al., SIGGRAPH 2007): of the four cells around a pixel those
    count that are as far away as it is, so that the motion does not bleed over the edge of what
    moves. ``depth [H, W]`` in m; where it is NaN the upsampling is bilinear.
    """
    field, z = np.asarray(motion, np.float64), np.asarray(depth, np.float64)
    (h, w), (height, width) = field.shape[:2], z.shape
    y, x = (np.arange(height) + 0.5) * h / height - 0.5, (np.arange(width) + 0.5) * w / width - 0.5
    row_of, column_of = (
        np.minimum(((np.arange(n) + 0.5) * size / n).astype(np.intp), size - 1)
        for n, size in ((h, height), (w, width))
    )
    cells = z[row_of][:, column_of]  # depth at the cells' centres
    total, weights = np.zeros((height, width, 3)), np.zeros((height, width, 1))
    for step_y in (0, 1):
        for step_x in (0, 1):
            near_y, near_x = (
                np.floor(y).astype(np.intp) + step_y,
                np.floor(x).astype(np.intp) + step_x,
            )
            rows, columns = np.clip(near_y, 0, h - 1), np.clip(near_x, 0, w - 1)
            linear = np.outer(1 - np.abs(y - near_y), 1 - np.abs(x - near_x))
            apart = (cells[rows][:, columns] - z) / z / _ALIKE
            alike = np.nan_to_num(np.exp(-np.square(np.minimum(np.abs(apart), 5))), nan=1e-11)
            weight = (linear * alike)[..., None] + 1e-20
            total += weight * field[rows][:, columns]
            weights += weight
    return np.asarray(total / weights)
