# SPDX-License-Identifier: MIT
"""Publishes a bag's messages and the time /clock, again and again: `ros2 bag play --clock --loop`.

python bag_player.py BAG TIMES
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import rclpy
from builtin_interfaces.msg import Time as Stamp
from rosbags.rosbag2 import Reader
from rosgraph_msgs.msg import Clock

from fpt_ros.bag import INPUT_TYPES
from fpt_ros.names import type_name

CLASSES = {type_name(t): t for types in INPUT_TYPES.values() for t in types}
SETTLE_S = 1.0  # after discovery, of which the ends learn one after the other


def main(bag: Path, times: int) -> None:
    rclpy.init()
    node = rclpy.create_node("bag_player")
    clock = node.create_publisher(Clock, "/clock", 10)
    with Reader(bag) as reader:
        publishers = {
            c.id: node.create_publisher(CLASSES[c.msgtype], c.topic, 10) for c in reader.connections
        }
        while not all(p.get_subscription_count() for p in (clock, *publishers.values())):
            time.sleep(0.05)
        time.sleep(SETTLE_S)
        for _ in range(times):
            before_ns = reader.start_time
            for connection, ns, data in reader.messages():
                time.sleep((ns - before_ns) / 1e9)
                before_ns = ns
                stamp = Stamp(sec=ns // 10**9, nanosec=ns % 10**9)
                clock.publish(Clock(clock=stamp))
                publishers[connection.id].publish(data)
            print("played", flush=True)
            time.sleep(SETTLE_S)  # the last answers
    rclpy.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
