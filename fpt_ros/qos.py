# SPDX-License-Identifier: MIT
"""Qualities of service that several nodes share.

Each call makes a new profile, since creating a topic changes the one it is given.
"""

from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy


def camera() -> QoSProfile:
    """For what cameras publish: an image that is lost is soon replaced, and a best-effort reader
    matches every camera. The depth (that of ROS's sensor data profile) lets all images be named
    while a callback is late."""
    return QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)


def latched() -> QoSProfile:
    """For what holds until the next message: late subscribers get the last one."""
    return QoSProfile(
        depth=1,
        reliability=ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL,
    )
