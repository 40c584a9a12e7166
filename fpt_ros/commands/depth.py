# SPDX-License-Identifier: MIT
"""Depth files in; coloured points with their predicted motion out, as PLY or in Open3D's viewer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fpt_model import FPTConfig
from fpt_model.depth import DEPTH_FORMATS, Depth, DepthError, Intrinsics
from fpt_model.geometry import grid, normalised_to_pixels
from fpt_ros.commands.arguments import UserError, parse_intrinsics

if TYPE_CHECKING:  # as in predict
    from fpt_ros.pipeline import Answer

Columns = dict[str, NDArray[Any]]


def check_dz(dz: NDArray[np.float64], config: FPTConfig) -> None:
    """UserError for pokes that move in depth, ``dz [P]`` m, of a model that knows none."""
    in_depth = dz[np.nan_to_num(dz) != 0]
    if config.flow_dim == 2 and len(in_depth):
        raise UserError(
            f"a poke in depth needs a three-dimensional model, {config.name} is planar; "
            f"received dz={in_depth[0]:g}"
        )


def read_depth_file(path: Path, intrinsics: str | None, size: tuple[int, int]) -> Depth:
    """Registered depth of a picture of ``size = (height, width)``; UserError for anything else.

    A picture or ``.npy``: 16-bit values are mm, floats m. Without ``intrinsics``, "fx,fy,cx,cy"
    (px), the nominal camera is taken: then sideways lengths are right up to a factor alone.
    """
    if not path.is_file():
        raise UserError(f"no such file {str(path)!r}")
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    except (ValueError, OSError, EOFError, cv2.error) as error:
        raise UserError(f"--depth: cannot read {str(path)!r}: {error}") from error
    if not isinstance(values, np.ndarray):  # OpenCV's None, or an archive of several
        raise UserError(f"--depth: expected a picture or .npy, received {str(path)!r}")
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    layout = next((f for f in DEPTH_FORMATS.values() if values.dtype == f.dtype), None)
    if layout is None or values.shape != size:
        raise UserError(
            "--depth: expected 16-bit mm or float m in one channel, of the picture's size "
            f"{size[1]} x {size[0]}, received {values.dtype} of shape {values.shape}"
        )
    try:
        camera = Intrinsics.nominal(size)
        if intrinsics is not None:
            camera = Intrinsics(*parse_intrinsics(intrinsics))
        return Depth(layout.read(values), camera)
    except DepthError as error:
        raise UserError(f"--depth: {error}") from error


def scene_columns(answer: Answer) -> Columns:
    """The points of the dense grid that have depth, as columns of a PLY file; see docs/depth.md."""
    scene, view = answer.scene_flow, answer.view
    pixels = np.floor(normalised_to_pixels(grid(answer.dense_size), view.size) + 0.5).astype(int)
    known = np.isfinite(scene.points).all(-1)
    colours = view.image[pixels[:, 1], pixels[:, 0]]
    columns: Columns = {name: scene.points[known, i] for i, name in enumerate("xyz")}
    columns |= {name: colours[known, i] for i, name in enumerate(("red", "green", "blue"))}
    columns |= {f"v{name}": scene.flow[known, i] for i, name in enumerate("xyz")}
    columns |= {"weight": scene.weight[known], "std": scene.std[known]}
    return columns


def show(columns: Columns) -> None:
    """Open a window with the points and a line along the motion of each that moves.

    Raises UserError where Open3D is not installed.
    """
    try:
        import open3d
    except ImportError as error:
        raise UserError(f"--view needs Open3D ({error}): pip install open3d") from error
    cloud, lines = view_geometries(open3d, columns)
    open3d.visualization.draw_geometries(
        [cloud, lines],
        window_name="predicted motion",
        lookat=cloud.get_center(),
        front=[0.0, 0.0, -1.0],
        up=[0.0, -1.0, 0.0],
        zoom=0.6,
    )


def view_geometries(open3d: Any, columns: Columns) -> tuple[Any, Any]:
    """A ``PointCloud``, and a ``LineSet`` from points to where they go, of the module's classes."""
    points = np.stack([columns[name] for name in "xyz"], -1)
    flow = np.stack([columns[f"v{name}"] for name in "xyz"], -1)
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
    colours = np.stack([columns[name] for name in ("red", "green", "blue")], -1) / 255
    cloud.colors = open3d.utility.Vector3dVector(colours)
    moves = np.flatnonzero(np.linalg.norm(flow, axis=-1) > 0.01 * points[:, 2])
    ends = np.concatenate([points[moves], (points + flow)[moves]])
    pairs = np.stack([np.arange(len(moves)), np.arange(len(moves)) + len(moves)], -1)
    lines = open3d.geometry.LineSet(
        open3d.utility.Vector3dVector(ends), open3d.utility.Vector2iVector(pairs.reshape(-1, 2))
    )
    lines.paint_uniform_color([1.0, 0.4, 0.0])
    return cloud, lines
