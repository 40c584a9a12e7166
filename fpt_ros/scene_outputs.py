# SPDX-License-Identifier: MIT
"""What the node publishes of motion in space: a point cloud with scene flow, and occlusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from geometry_msgs.msg import Transform
from numpy.typing import NDArray
from rclpy.clock import JumpThreshold
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.time import Time
from sensor_msgs.msg import Image, PointCloud2, PointField
from std_msgs.msg import Header

from fpt_model.scene_flow import SceneFlow
from fpt_ros.images import array_to_image, flat_array
from fpt_ros.monitor import Monitor
from fpt_ros.pipeline import Answer, as_image

FIELDS = ("x", "y", "z", "vx", "vy", "vz", "weight", "std")
"""Of the point cloud, all float32; see docs/depth.md for what they mean."""

TF_WAIT_S = 0.05
"""A transform at the image's stamp, which may be still on its way, is waited for so long."""


class Rigid(NamedTuple):
    """From one frame to another: ``rotation @ point + translation``."""

    rotation: NDArray[np.float64]  # [3, 3]
    translation: NDArray[np.float64]  # [3] m

    @classmethod
    def of(cls, transform: Transform) -> Rigid:
        """Of a message; ValueError for a quaternion that is none."""
        q, t = transform.rotation, transform.translation
        x, y, z, w = quaternion = np.array([q.x, q.y, q.z, q.w])
        norm = float(quaternion @ quaternion)
        if not (np.isfinite(norm) and norm > 0.5):
            raise ValueError(f"expected a unit quaternion, received {quaternion.tolist()}")
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        rotation = np.eye(3) + (2 / norm) * (w * cross + cross @ cross)
        return cls(rotation, np.array([t.x, t.y, t.z]))

    def apply(self, scene: SceneFlow) -> SceneFlow:
        """Points are moved, their motion is turned."""
        return scene._replace(
            points=scene.points @ self.rotation.T + self.translation,
            flow=scene.flow @ self.rotation.T,
        )


def point_cloud(scene: SceneFlow, size: tuple[int, int], header: Header) -> PointCloud2:
    """An organised cloud of ``size = (rows, columns)`` of as many points, row by row."""
    columns = [*scene.points.T, *scene.flow.T, scene.weight, scene.std]
    values = np.stack(columns, -1).astype("<f4")
    step = 4 * len(FIELDS)
    return PointCloud2(
        header=header,
        height=size[0],
        width=size[1],
        fields=[
            PointField(name=name, offset=4 * i, datatype=PointField.FLOAT32, count=1)
            for i, name in enumerate(FIELDS)
        ],
        is_bigendian=False,
        point_step=step,
        row_step=step * size[1],
        data=flat_array("B", values),
        is_dense=bool(np.isfinite(values).all()),
    )


class Frames:
    """Transforms from tf2, where tf2_ros is installed and a target frame is asked for."""

    def __init__(self, node: Node, monitor: Monitor) -> None:
        self._node, self._monitor = node, monitor
        self._buffer: Any = None
        self._listener: Any = None
        self._jumps: Any = None

    def close(self) -> None:
        """Listen no more."""
        if self._listener is not None:
            self._listener.unregister()
            self._jumps.unregister()
        self._buffer = self._listener = self._jumps = None

    def to(self, target: str, header: Header) -> Rigid | None:
        """From the frame of a header to ``target``, at its stamp; None, reported, without one."""
        if self._buffer is None and not self._listen(target):
            return None
        try:
            found = self._buffer.lookup_transform(
                target, header.frame_id, Time.from_msg(header.stamp), Duration(seconds=TF_WAIT_S)
            )
            return Rigid.of(found.transform)
        except Exception as error:  # tf2 raises many types: unknown frames, times not covered
            self._monitor.error(
                "tf",
                f"no transform from {header.frame_id!r} to target_frame {target!r}, points stay in "
                f"the optical frame: {error}",
            )
            return None

    def _listen(self, target: str) -> bool:
        try:
            from tf2_ros import Buffer, TransformListener
        except ImportError as error:
            self._monitor.error(
                "tf",
                f"target_frame {target!r} needs tf2_ros, which cannot be imported ({error}): "
                "points stay in the optical frame",
            )
            return False
        self._buffer = Buffer()
        self._listener = TransformListener(self._buffer, self._node)
        # a bag that begins again: tf2 refuses transforms that are older than those it has
        backwards = JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1))
        clear = self._buffer.clear
        self._jumps = self._node.get_clock().create_jump_callback(
            backwards, post_callback=lambda _: clear()
        )
        return True


class SceneOutputs:
    """Makes these outputs of an answer; None while it has no depth.

    Args:
        frames: None: all stays in the optical frame.
        target_frame: the present value of the parameter of that name.

    Attributes:
        table: type and builder of each output, by its name below the node's.
    """

    def __init__(self, frames: Frames | None = None, target_frame: Callable[[], str] = str) -> None:
        self._frames, self._target_frame = frames, target_frame
        self.table: dict[str, tuple[type, Callable[[Answer, Header], Any]]] = {
            "points": (PointCloud2, self._points),
            "occlusion": (Image, self._occlusion),
        }

    def close(self) -> None:
        """Let go of what was created on the node."""
        if self._frames is not None:
            self._frames.close()

    def _points(self, answer: Answer, header: Header) -> PointCloud2 | None:
        if answer.view.depth is None:
            return None
        scene, target = answer.scene_flow, self._target_frame()
        if self._frames is not None and target and target != header.frame_id:
            change = self._frames.to(target, header)
            if change is not None:
                scene, header = change.apply(scene), Header(stamp=header.stamp, frame_id=target)
        return point_cloud(scene, answer.dense_size, header)

    def _occlusion(self, answer: Answer, header: Header) -> Image | None:
        if answer.view.depth is None:
            return None
        return array_to_image(as_image(answer.occlusion), "mono8", header)
