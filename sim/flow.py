# SPDX-License-Identifier: MIT
"""True flow from depth, body masks and rigid motions: numpy only.

Conventions, used by everything in `sim`:

* Optical frame: x right, y down, z forward, metres. `camera_pose` maps optical to world.
* Pixel coordinate u of a pixel centre is its integer index, so `K[0, 2]` is (width - 1) / 2 for a
  centred camera. Flow is normalised: dx is a fraction of the width, dy of the height.
* `body_motion[b]` is the world-frame rigid motion T_after @ inv(T_before) of body b; body 0 is the
  static world and its motion is the identity.
* `camera_motion` is the pose of the camera after the motion in its own frame before, so that the
  pose afterwards is `camera_pose @ camera_motion`.
* Depth 0 means no surface: such points lie at infinity and see the camera's rotation only.
* Relative depth is that of `fpt_model.scene_flow`: the depth after over that before, less one. It
  is defined at infinity, too, where only the camera's rotation changes it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_DEPTH = 1e-3
"""Depth in metres below which a moved point is taken to be at this depth: it left the view."""


class PointFlow(NamedTuple):
    """Motion of M points."""

    flow: NDArray[np.float32]  # [M, 2] normalised displacement (fractions of width, height)
    scene_flow: NDArray[np.float32]  # [M, 3] metres, after minus before, each in its optical frame
    depth: NDArray[np.float32]  # [M] metres after the motion, 0 where there was no surface
    depth_change: NDArray[np.float32]  # [M] relative: depth after / before - 1

    @property
    def motion(self) -> NDArray[np.float32]:
        """[M, 3]: flow and depth_change, what three-dimensional models predict."""
        return np.concatenate([self.flow, self.depth_change[..., None]], -1)


def optical_motions(
    camera_pose: NDArray[np.floating],
    body_motion: NDArray[np.floating],
    camera_motion: NDArray[np.floating] | None = None,
) -> NDArray[np.float64]:
    """Rigid motions of the bodies as the camera sees them.

    Args:
        camera_pose: [4, 4], optical frame in the world.
        body_motion: [..., n, 4, 4], world-frame motions.
        camera_motion: [..., 4, 4] or None for a static camera.

    Returns:
        [..., n, 4, 4], mapping optical coordinates before to optical coordinates after.
    """
    pose = np.asarray(camera_pose, np.float64)
    change = np.asarray(body_motion, np.float64) - np.eye(4)  # bodies at rest: exactly zero
    moved = np.eye(4) + np.linalg.inv(pose) @ change @ pose
    if camera_motion is not None:
        inverse = np.linalg.inv(np.asarray(camera_motion, np.float64))
        moved = inverse[..., None, :, :] @ moved
    return moved


def point_flow(
    xy: NDArray[np.floating] | NDArray[np.integer],
    depth: NDArray[np.floating],
    bodies: NDArray[np.integer],
    K: NDArray[np.floating],
    size: tuple[int, int],
    camera_pose: NDArray[np.floating],
    body_motion: NDArray[np.floating],
    camera_motion: NDArray[np.floating] | None = None,
) -> PointFlow:
    """Flow of M points of one picture.

    Args:
        xy: [M, 2] pixel coordinates (u, v) of the points.
        depth: [M] metres at these points, 0 for none.
        bodies: [M] body indices at these points.
        K: [3, 3] intrinsics in pixels.
        size: (height, width) of the picture, the unit of the flow.
        camera_pose, body_motion, camera_motion: see the module's text, [4,4], [n,4,4], [4,4].
    """
    motions = optical_motions(camera_pose, body_motion, camera_motion).astype(np.float32)
    xy = np.asarray(xy, np.float32)
    depth = np.asarray(depth, np.float32)
    focal = np.array([K[0, 0], K[1, 1]], np.float32)
    centre = np.array([K[0, 2], K[1, 2]], np.float32)
    surface = depth > 0
    z = np.where(surface, depth, np.float32(1))  # at infinity only the direction counts

    points = np.empty((len(xy), 3), np.float32)
    points[:, :2] = (xy - centre) / focal * z[:, None]
    points[:, 2] = z
    motion = motions[bodies]  # [M, 4, 4]
    # Displacements are built from (R - I) x + t: still points get an exact zero.
    rotation = motion[:, :3, :3] - np.eye(3, dtype=np.float32)
    delta = np.einsum("mij,mj->mi", rotation, points)
    delta += motion[:, :3, 3] * surface[:, None]
    z_after = np.maximum(z + delta[:, 2], np.float32(MIN_DEPTH))
    # u' - u = f (x + dx) / (z + dz) - f x / z = f (dx - x / z dz) / (z + dz)
    ray = points[:, :2] / z[:, None]
    flow = focal * (delta[:, :2] - ray * (z_after - z)[:, None]) / z_after[:, None]
    flow /= np.array([size[1], size[0]], np.float32)
    return PointFlow(
        flow=flow,
        scene_flow=delta * surface[:, None],
        depth=np.where(surface, z_after, np.float32(0)),
        depth_change=(z_after - z) / z,
    )


def dense_flow(
    depth: NDArray[np.floating],
    bodies: NDArray[np.integer],
    K: NDArray[np.floating],
    camera_pose: NDArray[np.floating],
    body_motion: NDArray[np.floating],
    camera_motion: NDArray[np.floating] | None = None,
) -> PointFlow:
    """`point_flow` at each pixel: fields of shape [H, W, ...]."""
    height, width = depth.shape
    v, u = np.mgrid[0:height, 0:width]
    result = point_flow(
        np.stack([u.ravel(), v.ravel()], axis=-1),
        depth.ravel(),
        bodies.ravel(),
        K,
        (height, width),
        camera_pose,
        body_motion,
        camera_motion,
    )
    return PointFlow(
        result.flow.reshape(height, width, 2),
        result.scene_flow.reshape(height, width, 3),
        result.depth.reshape(height, width),
        result.depth_change.reshape(height, width),
    )


def moving_bodies(body_motion: NDArray[np.floating]) -> NDArray[np.bool_]:
    """[..., n] bool: which bodies of `body_motion` [..., n, 4, 4] are not at rest."""
    return np.abs(body_motion - np.eye(4)).max(axis=(-2, -1)) > 1e-5
