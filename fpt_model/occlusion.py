# SPDX-License-Identifier: MIT
"""Which of the surfaces seen in an image will be hidden after a motion: a moved depth image.

Every pixel is a patch of surface. It is moved to where its motion takes it and drawn there into a
depth buffer, as large as the motion of its neighbours makes it. What is drawn over by something
nearer is hidden. What no pixel shows (the inside of a drawer, the back of a body) hides nothing
here, and what leaves the image is not hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fpt_model.scene_flow import MIN_RATIO

TOLERANCE = 0.02
"""What covers something must be nearer by this share of the depth."""

_MAX_REACH = 2.0  # px from its middle to its edge, of the largest patch: what comes close grows


def occluded(depth: NDArray[np.floating], motion: ArrayLike) -> NDArray[np.bool_]:
    """``[H, W]``: what is seen now and hidden afterwards.

    Args:
        depth: ``[H, W]`` m; NaN: unknown, which neither hides nor is hidden.
        motion: ``[H, W, 3]``: du, dv in px of this image, and relative depth ``Z' / Z - 1``. As Z
            is known, these are the motion in space; the camera's intrinsics cancel out.

    Raises ValueError for shapes that do not fit.
    """
    z, m = np.asarray(depth, np.float64), np.asarray(motion, np.float64)
    if z.ndim != 2 or m.shape != (*z.shape, 3):
        raise ValueError(
            f"expected depth [H, W] and motion [H, W, 3], received shapes {z.shape} and {m.shape}"
        )
    height, width = z.shape
    rows, columns = np.mgrid[0:height, 0:width]
    u, v = columns + m[..., 0], rows + m[..., 1]
    z_after = z * np.maximum(1 + m[..., 2], MIN_RATIO)
    known = np.isfinite(z_after) & np.isfinite(u) & np.isfinite(v)
    # of each patch how its place and depth change from a pixel to the next
    apart = [_apart(np.where(known, z, np.nan), axis) for axis in (0, 1)]
    (u_x, u_y), (v_x, v_y), (z_x, z_y) = (_derivatives(a, apart) for a in (u, v, z_after))
    mirrored = u_x * v_y < u_y * v_x  # one would see its back
    slope = np.abs(z_x) + np.abs(z_y)
    # half its bounding box
    reach_u, reach_v = (
        np.clip((np.abs(x) + np.abs(y)) / 2, 0.5, _MAX_REACH) for x, y in ((u_x, u_y), (v_x, v_y))
    )

    u, v, z_after = u[known], v[known], z_after[known]
    reach_u, reach_v, slope = reach_u[known], reach_v[known], slope[known]
    middle_u, middle_v = np.floor(u + 0.5), np.floor(v + 0.5)
    buffer = np.full(height * width, np.inf)
    radius = int(np.ceil(_MAX_REACH))
    for step_v in range(-radius, radius + 1):
        for step_u in range(-radius, radius + 1):
            # beyond its own pixel a patch covers those whose centres it reaches
            far = (reach_u > abs(step_u) - 0.5) & (reach_v > abs(step_v) - 0.5)
            i = slice(None) if step_u == step_v == 0 else np.flatnonzero(far)
            x, y = middle_u[i] + step_u, middle_v[i] + step_v
            drawn = (np.abs(x - u[i]) < reach_u[i]) | (step_u == 0)
            drawn &= (np.abs(y - v[i]) < reach_v[i]) | (step_v == 0)
            drawn &= (x >= 0) & (x < width) & (y >= 0) & (y < height)
            cell = (y[drawn] * width + x[drawn]).astype(np.intp)
            np.minimum.at(buffer, cell, z_after[i][drawn])

    inside = (middle_u >= 0) & (middle_u < width) & (middle_v >= 0) & (middle_v < height)
    cell = np.where(inside, middle_v * width + middle_u, 0).astype(np.intp)
    # a slanted surface's own neighbours are nearer, too, by less than it changes across two pixels
    hidden = np.zeros((height, width), bool)
    hidden[known] = inside & (
        (buffer[cell] < z_after * (1 - TOLERANCE) - 2 * slope) | mirrored[known]
    )
    return hidden


def turned_away(
    u: NDArray[np.floating],
    v: NDArray[np.floating],
    depth: NDArray[np.floating],
    bodies: NDArray[np.integer],
) -> NDArray[np.bool_]:
    """``[H, W]``: of which patches one would see the back, by where each pixel goes.

    A patch whose image is mirrored has turned its back. Depths afterwards would not always tell:
    what then covers it may be nearer by its own thickness alone, such as that of a door's leaf.

    Args:
        u, v: ``[H, W]``, px, where the surface seen in each pixel goes.
        depth: ``[H, W]`` m, now; 0: no surface.
        bodies: ``[H, W]``, what it is of. How a patch is turned tells the neighbour of the same
            body that is nearest to it in depth, so that no edge counts.
    """
    z = np.where(depth > 0, depth, np.nan)
    apart = [np.where(np.diff(bodies, axis=axis) == 0, _apart(z, axis), np.nan) for axis in (0, 1)]
    (u_x, u_y), (v_x, v_y) = (_derivatives(np.asarray(a, np.float64), apart) for a in (u, v))
    mirrored: NDArray[np.bool_] = u_x * v_y < u_y * v_x
    return mirrored


def _apart(depth: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """How far neighbours are from each other, as a share of the depth."""
    n = depth.shape[axis]
    nearer = np.fmin(depth.take(range(n - 1), axis), depth.take(range(1, n), axis))
    return np.asarray(np.abs(np.diff(depth, axis=axis)) / nearer)


def _derivatives(
    field: NDArray[np.float64], apart: Sequence[NDArray[np.float64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``[H, W]`` each, by x and by y: to the side of the neighbour that is nearer in depth.

    ``apart``, along the axes 0 and 1, tells how far neighbours are from each other (see
    :func:`_apart`), NaN if they are none. So the edge of a surface, where one side is another
    surface, does not count. Where both are about as near, as at the joint of a drawer's flush
    front, it is the side to which the field changes less. Without a neighbour it is 0.
    """

    def along(axis: int) -> NDArray[np.float64]:
        step = np.diff(field, axis=axis)
        distance = apart[axis]
        step = np.where(np.isnan(distance), np.nan, step)
        nothing = np.full_like(field.take([0], axis), np.nan)
        before, after = np.concatenate([nothing, step], axis), np.concatenate([step, nothing], axis)
        to_before = np.concatenate([nothing, distance], axis)
        to_after = np.concatenate([distance, nothing], axis)
        decides = np.abs(to_after - to_before) > TOLERANCE
        use_after = np.where(decides, to_after < to_before, np.abs(after) < np.abs(before))
        use_after |= np.isnan(to_before)
        return np.nan_to_num(np.where(use_after, after, before))

    return along(1), along(0)
