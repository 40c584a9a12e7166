# SPDX-License-Identifier: MIT
"""A ROS camera that looks at one simulated scene, and says how that scene could truly move.

Publishes `image` (rgb8), `depth` (32FC1, m, NaN = no surface) and `camera_info` in the namespace of
the node, and for checks of what is predicted from the image:

* `~/true_flow` (32FC2, px) and `~/true_mask` (mono8) of one future, with the header of the image
  that they belong to; the flow is NaN where the surface is hidden or out of the picture afterwards.
* `~/suggested_poke` (`fpt_msgs/PokeArray`, latched): the visible point that moves farthest in that
  future, and its motion.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

from fpt_model.geometry import displacement_normalised_to_pixels
from fpt_msgs.msg import PokeArray
from fpt_ros import qos
from fpt_ros.images import array_to_image
from fpt_ros.messages import pokes_to_msg
from fpt_ros.parameters import Spec, declare_parameters
from fpt_ros.pokes import Pokes
from fpt_ros.spin import run
from sim import HELD_OUT_KINDS, TRAIN_KINDS
from sim.opengl import make_contexts

if TYPE_CHECKING:
    from sim import Frame, Future, Simulator, Truth

PARAMETERS = tuple(
    replace(spec, read_only=True)
    for spec in (
        Spec("kind", "drawer", f"What stands there: {', '.join(TRAIN_KINDS + HELD_OUT_KINDS)}."),
        Spec("seed", 0, "Seed of the scene.", 0, 2**31 - 1),
        Spec("future_seed", 0, "Seed of the future published as the truth.", 0, 2**31 - 1),
        Spec("width", 640, "Width of the image, px.", 16, 4096),
        Spec("height", 480, "Height of the image, px.", 16, 4096),
        Spec("rate_hz", 10.0, "Images a second, 1/s.", 0.1, 120.0),
        Spec(
            "animate",
            False,
            "Show the present and the future in turn, a horizon each; no poke is suggested.",
        ),
        Spec("frame_id", "camera_optical_frame", "Frame of the images: x right, y down, z ahead."),
    )
)
_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
_MAX_DRAWS = 100  # of futures, until something visible moves in one


class SimCameraNode(Node):
    """See the module's description. All parameters are read once, at start.

    Raises:
        ValueError: for an unknown kind, a scene in which nothing visible can move, or OpenGL that
            is missing or cannot draw images so large.
    """

    def __init__(self) -> None:
        super().__init__("sim_camera")
        declare_parameters(self, PARAMETERS)
        self._frame_id: str = self._value("frame_id")
        size = (self._value("height"), self._value("width"))
        try:
            make_contexts()  # without OpenGL importing MuJoCo may fail, and not say what is missing
            # loads MuJoCo and an OpenGL library
            from sim.simulator import HORIZON_S, Simulator

            simulator = Simulator(self._value("kind"), self._value("seed"), size)
            frame = simulator.render()
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        future, truth = _moving_future(simulator, frame, self._value("future_seed"))

        self._present = _camera_messages(frame)
        self._future = _camera_messages(truth.next)
        self._truth = _truth_messages(truth)
        self._cameras = [
            self.create_publisher(type(msg), topic, _QOS)
            for topic, msg in zip(("image", "depth", "camera_info"), self._present, strict=True)
        ]
        self._truths = [
            self.create_publisher(Image, topic, _QOS) for topic in ("~/true_flow", "~/true_mask")
        ]
        suggested = self.create_publisher(PokeArray, "~/suggested_poke", qos.latched())
        poke = _suggested_poke(truth)
        if not self._value("animate"):
            # a zero stamp: the scene does not change, so the poke holds for the newest image
            suggested.publish(pokes_to_msg(poke, Header(frame_id=self._frame_id)))

        rate_hz = self._value("rate_hz")
        self._images_a_phase = max(1, round(HORIZON_S * rate_hz)) if self._value("animate") else 0
        self._published = 0
        self.create_timer(1.0 / rate_hz, self._publish)
        (x, y), (dx, dy) = poke.xy[0], poke.flow[0]
        told = f"suggested poke at ({x:.0f}, {y:.0f}) by ({dx:.1f}, {dy:.1f}) px"
        self.get_logger().info(
            f"{self._value('kind')} scene {self._value('seed')}, {size[1]} x {size[0]} px at "
            f"{rate_hz:g} Hz on {self._cameras[0].topic_name}; truth {self._value('future_seed')}: "
            f"{future.description}; {'animated' if self._value('animate') else told}"
        )

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _publish(self) -> None:
        header = Header(stamp=self.get_clock().now().to_msg(), frame_id=self._frame_id)
        phase = self._published // self._images_a_phase if self._images_a_phase else 0
        self._published += 1
        present = phase % 2 == 0
        for publisher, msg in zip(
            self._cameras, self._present if present else self._future, strict=True
        ):
            msg.header = header
            publisher.publish(msg)
        if not present:
            return  # the truth is about the present
        for publisher, msg in zip(self._truths, self._truth, strict=True):
            if publisher.get_subscription_count():
                msg.header = header
                publisher.publish(msg)


def _moving_future(simulator: Simulator, frame: Frame, seed: int) -> tuple[Future, Truth]:
    """The first future, in the order of ``seed``, in which something moves and stays visible."""
    rng = np.random.default_rng(seed)
    for _ in range(_MAX_DRAWS):
        future = simulator.sample_future(rng)
        truth = simulator.truth(frame, future)
        if np.any(truth.moving & ~truth.occluded):
            return future, truth
    raise ValueError(
        f"nothing visible moved in {_MAX_DRAWS} futures of this {simulator.kind} scene, "
        "choose another seed"
    )


def _flow_px(truth: Truth) -> NDArray[np.float64]:
    """True flow ``[H, W, 2]`` in px."""
    return displacement_normalised_to_pixels(truth.flow, truth.flow.shape[:2])


def _suggested_poke(truth: Truth) -> Pokes:
    flow = _flow_px(truth)
    length = np.where(truth.moving & ~truth.occluded, np.hypot(flow[..., 0], flow[..., 1]), -1.0)
    row, column = np.unravel_index(np.argmax(length), length.shape)
    return Pokes(np.array([[column, row]], np.float64), flow[row, column][None])


def _truth_messages(truth: Truth) -> tuple[Image, Image]:
    flow = np.where(truth.occluded[..., None], np.nan, _flow_px(truth)).astype(np.float32)
    mask = np.where(truth.moving, np.uint8(255), np.uint8(0))
    return array_to_image(flow, "32FC2", Header()), array_to_image(mask, "mono8", Header())


def _camera_messages(frame: Frame) -> tuple[Image, Image, CameraInfo]:
    height, width = frame.depth.shape
    depth = np.where(frame.depth > 0, frame.depth, np.float32(np.nan))
    projection = np.hstack([frame.intrinsics, np.zeros((3, 1))])
    info = CameraInfo(
        height=height,
        width=width,
        distortion_model="plumb_bob",
        d=array("d", [0.0] * 5),
        k=frame.intrinsics.ravel(),
        r=np.eye(3).ravel(),
        p=projection.ravel(),
    )
    return (
        array_to_image(frame.rgb, "rgb8", Header()),
        array_to_image(depth, "32FC1", Header()),
        info,
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT; returns the exit code."""
    return run(lambda: SimCameraNode, args)


if __name__ == "__main__":
    sys.exit(main())
