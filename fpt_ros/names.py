# SPDX-License-Identifier: MIT
"""Names of topics and of message types, as ROS and its bags have them."""

from __future__ import annotations


def full_name(name: str, namespace: str = "") -> str:
    """A topic's full name, as ROS resolves it for a node in ``namespace``."""
    return name if name.startswith("/") else "/".join(["", *namespace.strip("/").split(), name])


def type_name(msg_type: type) -> str:
    """The name of a message's type: sensor_msgs/msg/Image."""
    return f"{msg_type.__module__.split('.')[0]}/msg/{msg_type.__name__}"
