# SPDX-License-Identifier: MIT
"""Runs one node as a process that ends quietly, with code 0, on SIGINT and SIGTERM.

Imports nothing heavy: libraries that take seconds to import are imported by the caller's
``load_node_class``, while a signal already ends the process without a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from threading import Thread
from types import FrameType
from typing import TYPE_CHECKING, Any

from fpt_ros.first_thread import FirstThread

if TYPE_CHECKING:
    from rclpy.node import Node

_LOOK_UP_S = 0.2
"""At least so often a thread that spins looks whether ROS has ended."""


def run(
    load_node_class: Callable[[], Callable[[], Node]],
    args: Sequence[str] | None = None,
    first_thread: FirstThread | None = None,
) -> int:
    """Load, make and spin a node until a signal; returns the exit code of the process.

    With ``first_thread`` the node spins in another thread, and this one does what it is handed; the
    node's ``end_work()`` must then end that.

    Wrong command-line arguments and parameters are reported in one line, with exit code 1.
    """
    # Until rclpy installs its handlers there is nothing to clean up.
    for received in (signal.SIGINT, signal.SIGTERM):
        signal.signal(received, _leave)
    import rclpy
    from rclpy.exceptions import ParameterException
    from rclpy.executors import ExternalShutdownException
    from rclpy.impl.implementation_singleton import rclpy_implementation

    mistakes = (ParameterException, ValueError, rclpy_implementation.RCLError)
    node_class = load_node_class()
    node, initialised = None, False
    try:
        signal.signal(signal.SIGINT, partial(_interrupt, first_thread))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        rclpy.init(args=None if args is None else list(args))
        initialised = True
        node = node_class()
        if first_thread is None:
            rclpy.spin(node)
        else:
            _spin_apart(node, first_thread)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except Exception as error:
        if initialised and not rclpy.ok():
            pass  # a signal has ended ROS under what was running, which then failed
        elif node is None and isinstance(error, mistakes):
            print(f"cannot start: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
        else:
            raise
    finally:
        # Impatient further signals must not break the clean-up.
        for received in (signal.SIGINT, signal.SIGTERM):
            signal.signal(received, signal.SIG_IGN)
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
    return 0


def _leave(*_: Any) -> None:
    os._exit(0)


def _spin_apart(node: Any, first_thread: FirstThread) -> None:
    from rclpy.executors import SingleThreadedExecutor

    executor = SingleThreadedExecutor()
    executor.add_node(node)
    failures: list[BaseException] = []

    def spin() -> None:
        try:
            # a signal wakes the executor before it ends ROS, and not again
            while node.context.ok():
                executor.spin_once(timeout_sec=_LOOK_UP_S)
        except BaseException as error:  # ExternalShutdownException among them
            failures.append(error)
        try:
            node.end_work()
        finally:
            first_thread.end()

    spinning = Thread(target=spin, name="spin", daemon=True)
    spinning.start()
    try:
        first_thread.serve()
    finally:
        spinning.join()  # a signal ends ROS, and so this
    if failures:
        raise failures[0]


def _interrupt(first_thread: FirstThread | None, _: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt, but not where Python would print and drop it; rclpy ends the spinning."""
    if first_thread is not None and not first_thread.interruptible:
        return  # it ends when the spinning does
    if frame is None or frame.f_code.co_name != "__del__":
        raise KeyboardInterrupt
