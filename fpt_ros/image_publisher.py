# SPDX-License-Identifier: MIT
"""A camera that always sees the same picture file: publishes it as ``image`` (rgb8)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rclpy.node import Node
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from fpt_ros.commands.media import read_picture
from fpt_ros.images import array_to_image
from fpt_ros.parameters import Spec, declare_parameters
from fpt_ros.spin import run

PARAMETERS = (
    Spec("file", "", "The picture, in any format that OpenCV reads.", read_only=True),
    Spec("rate_hz", 10.0, "Images a second, 1/s.", 0.1, 120.0, read_only=True),
    Spec("frame_id", "camera_optical_frame", "Frame of the images.", read_only=True),
)


class ImagePublisher(Node):
    """See the module's description. Raises ValueError for a file that is no picture."""

    def __init__(self) -> None:
        super().__init__("image_publisher")
        declare_parameters(self, PARAMETERS)
        file = self.get_parameter("file").value
        if not file:
            raise ValueError("the parameter file is empty, expected the path of a picture")
        path = Path(file)
        header = Header(frame_id=self.get_parameter("frame_id").value)
        self._msg = array_to_image(read_picture(path), "rgb8", header)
        self._publisher = self.create_publisher(Image, "image", 1)
        rate_hz = self.get_parameter("rate_hz").value
        self.create_timer(1.0 / rate_hz, self._publish)
        self.get_logger().info(
            f"publishing {path} ({self._msg.width} x {self._msg.height} px) at {rate_hz:g} Hz "
            f"on {self._publisher.topic_name}"
        )

    def _publish(self) -> None:
        self._msg.header.stamp = self.get_clock().now().to_msg()
        self._publisher.publish(self._msg)


def main(args: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT; returns the exit code."""
    return run(lambda: ImagePublisher, args)


if __name__ == "__main__":
    sys.exit(main())
