# SPDX-License-Identifier: MIT
"""Publishes pokes again and again: those of its parameter, or those that a topic suggests.

Publishes ``pokes`` with a zero stamp (they hold for the newest image and all after it), as soon as
somebody subscribes. Without pokes of its own it relays the latest of ``suggested_poke``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from rclpy.node import Node
from std_msgs.msg import Header

from fpt_msgs.msg import PokeArray
from fpt_ros import qos
from fpt_ros.commands.arguments import parse_poke
from fpt_ros.messages import pokes_to_msg
from fpt_ros.parameters import Spec, declare_parameters
from fpt_ros.pokes import Pokes
from fpt_ros.spin import run

PARAMETERS = (
    Spec(
        "pokes",
        "",
        "What to publish: x,y,dx,dy in px and maybe ,dz in m, several separated by spaces; empty: "
        "relay.",
        read_only=True,
    ),
    Spec("rate_hz", 1.0, "Repetitions a second, 1/s.", 0.1, 100.0, read_only=True),
)


class PokePublisher(Node):
    """See the module's description. Raises ValueError for malformed pokes."""

    def __init__(self) -> None:
        super().__init__("poke_publisher")
        declare_parameters(self, PARAMETERS)
        self._msg: PokeArray | None = None
        own = self.get_parameter("pokes").value.split()
        if own:
            values = np.array([parse_poke(text) for text in own])
            self._msg = pokes_to_msg(Pokes(values[:, :2], values[:, 2:4], values[:, 4]), Header())
        else:
            self.create_subscription(
                PokeArray, "suggested_poke", self._on_suggestion, qos.latched()
            )
        self._publisher = self.create_publisher(PokeArray, "pokes", 10)
        self._state = ""
        self.create_timer(1.0 / self.get_parameter("rate_hz").value, self._publish)

    def _on_suggestion(self, msg: PokeArray) -> None:
        self._msg = PokeArray(pokes=msg.pokes)  # without the stamp
        self._publish()

    def _publish(self) -> None:
        if self._msg is None:
            self._tell("waiting for a suggested poke")
        elif self._publisher.get_subscription_count() == 0:
            self._tell(f"waiting for a subscriber of {self._publisher.topic_name}")
        else:
            self._publisher.publish(self._msg)
            pokes = ", ".join(
                f"({p.x:g}, {p.y:g}) by ({p.dx:g}, {p.dy:g}) px" for p in self._msg.pokes
            )
            self._tell(f"publishing {pokes or 'no pokes'} on {self._publisher.topic_name}")

    def _tell(self, state: str) -> None:
        """Log a state when it begins."""
        if state != self._state:
            self.get_logger().info(state)
        self._state = state


def main(args: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT; returns the exit code."""
    return run(lambda: PokePublisher, args)


if __name__ == "__main__":
    sys.exit(main())
