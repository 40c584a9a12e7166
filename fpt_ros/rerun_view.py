# SPDX-License-Identifier: MIT
"""The node's inputs and outputs in the Rerun viewer, from topics or from bags.

Beside each other: the camera image with pokes, moving part and the modes at the queries; the flow;
the overlay; and in space markers and points, in the optical frame, with the image on the plane at
1 m on which the markers lie.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import cv2
import numpy as np
import rerun as rr
import rerun.blueprint as rrb
from numpy.typing import NDArray
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2, PointField
from visualization_msgs.msg import Marker, MarkerArray

from fpt_model.visualize import (
    ELLIPSE_SIGMAS,
    MASK_COLOUR,
    MAX_DRAWN_QUERIES,
    MIN_DRAWN_WEIGHT,
    MODE_COLOUR,
    POKE_COLOUR,
    evenly,
)
from fpt_msgs.msg import FlowDistribution, PokeArray
from fpt_ros import qos
from fpt_ros.history import stamp_ns
from fpt_ros.images import image_to_array, image_to_rgb
from fpt_ros.markers import DEPTH_M, MIN_ARROW_PX, display_camera
from fpt_ros.messages import distribution_from_msg, read_pokes
from fpt_ros.pokes import Size

FLUSH_S = 5.0
"""So long a viewer may take for what is left at the end."""

TIMELINE = "stamp"
"""Rerun's timeline: the stamp of the image that a message is about."""

_TIMELESS = ("pokes", "camera_info", "fpt/markers")  # may come without a stamp

TYPES: dict[str, tuple[type, ...]] = {
    "image": (Image, CompressedImage),
    "camera_info": (CameraInfo,),
    "pokes": (PokeArray,),
    "fpt/distribution": (FlowDistribution,),
    "fpt/mask": (Image,),
    "fpt/flow_color": (Image,),
    "fpt/overlay": (Image,),
    "fpt/markers": (MarkerArray,),
    "fpt/points": (PointCloud2,),
}
"""What can be shown: name below the namespace, and types."""

_CAMERA = "space/camera"
_CORNER_PX = 0.5  # Rerun's (0, 0) is the corner of the first pixel, ours its centre
_BEHIND = 1.005  # the image in space lies as much farther than the markers, or it would hide them
_NUMPY_TYPES = {  # of a point's fields
    PointField.INT8: "i1",
    PointField.UINT8: "u1",
    PointField.INT16: "i2",
    PointField.UINT16: "u2",
    PointField.INT32: "i4",
    PointField.UINT32: "u4",
    PointField.FLOAT32: "f4",
    PointField.FLOAT64: "f8",
}


def blueprint() -> rrb.Blueprint:
    """The layout."""
    return rrb.Blueprint(
        rrb.Grid(
            rrb.Spatial2DView(origin=_CAMERA, name="Camera, pokes, moving part, modes"),
            rrb.Spatial2DView(origin="overlay", name="Overlay"),
            rrb.Spatial2DView(origin="flow", name="Flow (hue is direction)"),
            rrb.Spatial3DView(
                origin="space",
                name="Markers and points",
                eye_controls=rrb.EyeControls3D(
                    position=(0.5, -0.35, -0.2), look_target=(0, 0, DEPTH_M), eye_up=(0, -1, 0)
                ),
                contents=[
                    *("+ /space/**", f"- /{_CAMERA}/pokes", f"- /{_CAMERA}/modes"),
                    *(f"- /{_CAMERA}/covariances", f"- /{_CAMERA}/mask"),
                ],
            ),
            grid_columns=2,
        ),
        collapse_panels=True,
    )


class RerunLog:
    """Logs messages of TYPES to a Rerun recording.

    Messages without a stamp (pokes that stand) are shown from the latest stamp on; those before all
    stamps from the first.
    """

    def __init__(self, recording: rr.RecordingStream) -> None:
        self._recording = recording
        self._latest_ns = 0
        self._early: dict[str, Any] = {}  # the latest by name, before the first stamp
        self._info: CameraInfo | None = None
        self._camera: tuple[Any, ...] = ()  # the one logged last
        self._size: Size | None = None
        self._frame = ""  # in which space is shown: the image's
        self._namespaces: set[str] = set()  # of markers on display
        self._handlers: dict[str, Callable[[Any], None]] = {
            "image": self._log_image,
            "camera_info": self._log_info,
            "pokes": self._log_pokes,
            "fpt/distribution": self._log_distribution,
            "fpt/mask": self._log_mask,
            "fpt/flow_color": partial(self._log_picture, "flow"),
            "fpt/overlay": partial(self._log_picture, "overlay"),
            "fpt/markers": self._log_markers,
            "fpt/points": self._log_points,
        }
        recording.send_blueprint(blueprint())
        self._log("space", rr.ViewCoordinates.RDF, static=True)
        classes = [(0, "", (0, 0, 0, 0)), (1, "moves along", (*MASK_COLOUR, 255))]
        self._log("/", rr.AnnotationContext(classes), static=True)

    def begin(self) -> None:
        """Another bag begins: messages without a stamp wait for its first stamp."""
        self._latest_ns = 0

    def log(self, name: str, msg: Any) -> None:
        """Show a message of the topic called ``name`` in TYPES.

        Raises:
            ValueError: it cannot be read, or does not say of when it is; the text says why.
        """
        markers = getattr(msg, "markers", None)
        header = markers[0].header if markers else getattr(msg, "header", None)
        ns = stamp_ns(header) if header is not None else 0
        if not ns and name not in _TIMELESS:
            raise ValueError("its stamp is 0, expected the time of its image")
        self._latest_ns = ns or self._latest_ns
        if not self._latest_ns:
            self._early[name] = msg
            return
        self._recording.set_time(TIMELINE, timestamp=np.datetime64(self._latest_ns, "ns"))
        early, self._early = self._early, {}
        problem = ""
        for which, what in early.items():
            try:
                self._handlers[which](what)
            except ValueError as error:  # the others are shown all the same
                problem = f"{which} before the first image: {error}"
        self._handlers[name](msg)
        if problem:
            raise ValueError(problem)

    def _log(self, entity: str, *what: Any, static: bool = False) -> None:
        self._recording.log(entity, *what, static=static)

    # ---------------------------------------------------------------------------------- images

    def _log_image(self, msg: Image | CompressedImage) -> None:
        pixels = image_to_rgb(msg)
        self._size, self._frame = (pixels.shape[0], pixels.shape[1]), msg.header.frame_id
        self._log_camera()
        self._log(f"{_CAMERA}/image", rr.Image(pixels))

    def _log_picture(self, entity: str, msg: Image) -> None:
        self._log(entity, rr.Image(image_to_rgb(msg)))

    def _log_mask(self, msg: Image) -> None:
        mask = (image_to_array(msg) > 0).astype(np.uint8)
        if self._size not in (None, mask.shape):  # a grid, with full_resolution false
            height, width = self._size
            mask = np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST))
        self._log(f"{_CAMERA}/mask", rr.SegmentationImage(mask, opacity=0.4))

    def _log_info(self, msg: CameraInfo) -> None:
        self._info = msg

    def _log_camera(self) -> None:
        """The pinhole that the markers are made with."""
        assert self._size is not None
        camera = display_camera(self._info, self._size)
        if (self._size, camera) == self._camera:
            return
        self._camera = self._size, camera
        self._log(
            _CAMERA,
            rr.Pinhole(
                focal_length=camera.focal,
                principal_point=camera.centre + _CORNER_PX,
                width=self._size[1],
                height=self._size[0],
                camera_xyz=rr.ViewCoordinates.RDF,
                image_plane_distance=_BEHIND * DEPTH_M,
            ),
        )

    # ----------------------------------------------------------------------------- in the image

    def _log_pokes(self, msg: PokeArray) -> None:
        pokes = read_pokes(msg.pokes)
        self._log(
            f"{_CAMERA}/pokes",
            rr.Arrows2D(
                origins=pokes.xy + _CORNER_PX,
                vectors=pokes.flow,
                colors=[POKE_COLOUR],
                radii=[-2.0],  # of the screen's points
                draw_order=30.0,
            ),
        )

    def _log_distribution(self, msg: FlowDistribution) -> None:
        queries, mixture = distribution_from_msg(msg)
        shown = evenly(len(queries), MAX_DRAWN_QUERIES)
        queries, mixture = queries[shown] + _CORNER_PX, mixture[shown]
        rows, components = np.nonzero(mixture.weights >= MIN_DRAWN_WEIGHT)
        weights, means = mixture.weights[rows, components], mixture.means[rows, components, :2]
        factors = mixture.scale_tril[rows, components, :2, :2]  # of the (x, y) marginal
        starts = queries[rows]
        # Rerun's ellipses are not turned, so they are drawn as lines
        turn = np.linspace(0, 2 * np.pi, 33)
        circle = np.stack([np.cos(turn), np.sin(turn)])  # [2, 33]
        outlines = ELLIPSE_SIGMAS * factors @ circle
        ellipses = (starts + means)[:, None] + outlines.swapaxes(-1, -2)
        long = np.hypot(means[:, 0], means[:, 1]) >= MIN_ARROW_PX
        self._log(
            f"{_CAMERA}/modes",
            rr.Arrows2D(
                origins=starts[long],
                vectors=means[long],
                colors=[MODE_COLOUR],
                radii=_radii(weights[long]),
                draw_order=20.0,
            ),
        )
        self._log(
            f"{_CAMERA}/covariances",
            rr.LineStrips2D(
                ellipses,
                colors=[MODE_COLOUR],
                radii=_radii(weights) / 2,
                draw_order=10.0,
            ),
        )

    # --------------------------------------------------------------------------------- in space

    def _log_markers(self, msg: MarkerArray) -> None:
        """All that is on display: each array of the node's holds the whole of its namespaces."""
        drawn = [m for m in msg.markers if m.action == Marker.ADD]
        namespaces = {m.ns for m in drawn}
        for gone in self._namespaces - namespaces:
            self._log(f"space/markers/{gone}", rr.Clear(recursive=False))
        self._namespaces = namespaces
        for ns in sorted(namespaces):
            of_ns = [m for m in drawn if m.ns == ns]
            arrows = [m for m in of_ns if m.type == Marker.ARROW and len(m.points) == 2]
            spheres = [m for m in of_ns if m.type == Marker.SPHERE]
            if arrows:
                ends = np.array([[(p.x, p.y, p.z) for p in m.points] for m in arrows])
                what: Any = rr.Arrows3D(
                    origins=ends[:, 0],
                    vectors=ends[:, 1] - ends[:, 0],
                    radii=[-1.5],  # points of the screen: the markers are thin
                    colors=_marker_colours(arrows),
                )
            elif spheres:
                poses = [m.pose for m in spheres]
                orientations = [p.orientation for p in poses]
                what = rr.Ellipsoids3D(
                    half_sizes=[(m.scale.x / 2, m.scale.y / 2, m.scale.z / 2) for m in spheres],
                    centers=[(p.position.x, p.position.y, p.position.z) for p in poses],
                    quaternions=[rr.Quaternion(xyzw=[q.x, q.y, q.z, q.w]) for q in orientations],
                    colors=_marker_colours(spheres),
                    fill_mode="solid",
                )
            else:
                continue
            self._log(f"space/markers/{ns}", what)

    def _log_points(self, msg: PointCloud2) -> None:
        if self._size is not None and msg.header.frame_id != self._frame:
            raise ValueError(
                f"its points are in the frame {msg.header.frame_id!r}, expected the image's, "
                f"{self._frame!r}: without the node's target_frame"
            )
        points = read_points(msg)
        xyz = np.stack([points[axis] for axis in "xyz"], -1)
        seen = np.isfinite(xyz).all(-1)
        self._log("space/points", rr.Points3D(xyz[seen], radii=[-1.5]))
        if {"vx", "vy", "vz"} <= {*(points.dtype.names or ())}:
            motion = np.stack([points[axis] for axis in ("vx", "vy", "vz")], -1)
            moving = seen & np.isfinite(motion).all(-1)
            self._log(
                "space/points/motion",
                rr.Arrows3D(
                    origins=xyz[moving], vectors=motion[moving], colors=[MODE_COLOUR], radii=[-0.5]
                ),
            )


def read_points(msg: PointCloud2) -> NDArray[np.void]:
    """The points ``[N]`` of a cloud as a structured array with the fields' names.

    Raises:
        ValueError: x, y or z is missing, a field has an unknown type, or the data do not fit.
    """
    names = [field.name for field in msg.fields]
    if not {"x", "y", "z"} <= {*names}:
        raise ValueError(f"points have the fields {names}, expected x, y and z among them")
    unknown = [field.datatype for field in msg.fields if field.datatype not in _NUMPY_TYPES]
    order = ">" if msg.is_bigendian else "<"
    if unknown or len(msg.data) != msg.row_step * msg.height:
        raise ValueError(
            f"points have {len(msg.data)} bytes in {msg.height} rows of {msg.row_step}, and fields "
            f"of the types {[field.datatype for field in msg.fields]}"
        )
    dtype = np.dtype(
        {
            "names": names,
            "formats": [order + _NUMPY_TYPES[field.datatype] for field in msg.fields],
            "offsets": [field.offset for field in msg.fields],
            "itemsize": msg.point_step,
        }
    )
    rows = np.frombuffer(msg.data, np.uint8).reshape(msg.height, msg.row_step)
    used = np.ascontiguousarray(rows[:, : msg.width * msg.point_step])
    return used.view(dtype).reshape(-1)


class ViewNode(Node):
    """Shows what topics bring, until it is ended.

    Args:
        recording: where it is logged.
        topics: by name in TYPES, the topics to subscribe to.
        compressed: whether the image is a CompressedImage.
        duration_s: after which it ends by itself; None: never.
    """

    def __init__(
        self,
        recording: rr.RecordingStream,
        topics: Mapping[str, str],
        compressed: bool = False,
        duration_s: float | None = None,
    ) -> None:
        super().__init__("fpt_view")
        self._recording, self._log = recording, RerunLog(recording)
        self._end_s = None if duration_s is None else time.monotonic() + duration_s
        for name, topic in topics.items():
            msg_type = CompressedImage if name == "image" and compressed else TYPES[name][0]
            self.create_subscription(
                msg_type, topic, partial(self._show, name, topic), qos.camera()
            )
        self.create_timer(0.1, self._look_at_the_clock)
        self.get_logger().info(f"shows {', '.join(topics.values())}")

    def _show(self, name: str, topic: str, msg: Any) -> None:
        try:
            self._log.log(name, msg)
        except ValueError as error:
            self.get_logger().warning(f"{topic}: {error}", throttle_duration_sec=1.0)

    def _look_at_the_clock(self) -> None:
        if self._end_s is not None and time.monotonic() > self._end_s:
            raise KeyboardInterrupt

    def destroy_node(self) -> None:
        """Write out what is logged, then destroy as usual."""
        try:
            self._recording.flush(timeout_sec=FLUSH_S)
        except RuntimeError as error:  # the viewer is not there, or no longer
            self.get_logger().warning(f"not all is shown: {error}")
        super().destroy_node()


def _radii(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of lines, which Rerun draws opaque: what is more probable is thicker. Points of the screen,
    which Rerun takes as negative radii."""
    return -(0.5 + 1.5 * weights)


def _marker_colours(markers: list[Marker]) -> list[tuple[int, ...]]:
    return [
        tuple(int(255 * c) for c in (m.color.r, m.color.g, m.color.b, m.color.a)) for m in markers
    ]
