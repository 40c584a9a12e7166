# SPDX-License-Identifier: MIT
"""Real nodes as processes, and a real client over the wire, for the node's tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rclpy
import torch
from rcl_interfaces.srv import SetParameters
from rclpy.action import ActionClient, get_action_server_names_and_types_by_node
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.task import Future

from fpt_model import FlowPokeTransformer, FPTConfig, save_model
from fpt_ros import environment

# also of this process, whose part in Fast DDS begins with its first node
os.environ.update(environment.defaults())

ROOT = Path(__file__).resolve().parent.parent


def save_small_model(path: Path, flow_dim: int = 2) -> Path:
    """A small model with seeded random weights, all of them in use, as a checkpoint."""
    torch.manual_seed(5)
    model = FlowPokeTransformer(
        FPTConfig(
            name="fpt-test",
            encoder="vit_tiny_patch16_224",
            encoder_kwargs={"depth": 1, "embed_dim": 48, "num_heads": 2},
            image_size=64,
            width=32,
            depth=2,
            head_dim=16,
            horizon_s=0.5,
            kl_threshold=0.05,
            flow_dim=flow_dim,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_model(model, path)
    return path


class Topic(NamedTuple):
    """A topic as a node uses it."""

    name: str
    direction: str  # "in" or "out"
    type: str
    qos: str


def documented_topics(
    executable: str, node: str, namespace: str = "", page: str = "messages.md"
) -> set[Topic]:
    """What a page of docs/ says of a node, with full names."""
    page = (ROOT / "docs" / page).read_text()
    section = page.split(f"\n## {executable}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\S+)` \| (in|out) \| `(\S+)` \| ([^|]+) \|", section, re.MULTILINE)

    def full(name: str) -> str:
        name = name.replace("~", node)
        return name if name.startswith("/") else f"{namespace}/{name}"

    return {Topic(full(name), *others) for name, *others in rows}


def documented_services(executable: str, node: str, namespace: str = "") -> set[tuple[str, str]]:
    """Name and type of the services and actions that docs/messages.md says a node has."""
    page = (ROOT / "docs" / "messages.md").read_text()
    section = page.split(f"\n## {executable}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `~(\S+)` \| `(\S+/(?:srv|action)/\S+)` \|", section, re.MULTILINE)
    return {(f"{namespace}/{node}{name}", kind) for name, kind in rows}


class Process:
    """A program in a process group of its own, whose output is collected.

    As a context manager it kills what a failed test left running.
    """

    def __init__(self, command: Sequence[str], domain: int) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **os.environ,
                "ROS_DOMAIN_ID": str(domain),
                "OMP_NUM_THREADS": "1",
                "PYTHONUNBUFFERED": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def output(self) -> str:
        """Everything printed so far."""
        return "".join(self.lines)

    def wait_for(self, text: str, timeout_s: float = 60.0) -> None:
        """Wait until ``text`` was printed."""
        wait_until(
            lambda: text in self.output,
            timeout_s,
            lambda: f"{text!r} was not printed; output:\n{self.output}",
        )

    def interrupt(self, timeout_s: float = 30.0) -> int:
        """SIGINT to the whole group, as Ctrl-C does; returns the exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        code = self.process.wait(timeout_s)
        self._reader.join(5.0)
        return code


def python_module(module: str, *ros_args: str) -> list[str]:
    """The command that runs a node's module with ROS arguments."""
    return [sys.executable, "-m", module, "--ros-args", *ros_args]


def wait_until(
    condition: Callable[[], bool], timeout_s: float = 30.0, explain: Callable[[], str] = str
) -> None:
    """Wait for a condition, AssertionError after ``timeout_s``."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"gave up after {timeout_s} s: {explain()}"
        time.sleep(0.01)


class Client:
    """A node of this process that publishes and collects, spinning in a thread."""

    def __init__(self, domain: int, name: str = "client") -> None:
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=domain)
        self.node = rclpy.create_node(name, context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()
        self.received: dict[str, list[Any]] = {}
        self._publishers: dict[str, Any] = {}
        self._actions: dict[str, ActionClient] = {}
        self._services: dict[str, Any] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()  # nothing may be destroyed under a thread that waits on it
        self._thread.join()
        self._executor.shutdown()
        for action in self._actions.values():
            action.destroy()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)

    def _spin(self) -> None:
        while not self._closing.is_set():
            self._executor.spin_once(timeout_sec=0.1)

    def subscribe(self, msg_type: type, topic: str, qos: QoSProfile | int = 10) -> None:
        """Collect the topic's messages in ``received``."""
        messages = self.received.setdefault(topic, [])
        self.node.create_subscription(msg_type, topic, messages.append, qos)

    def advertise(self, msg_type: type, topic: str, qos: QoSProfile | int = 10) -> None:
        """Make a publisher, and wait until somebody subscribes to it."""
        publisher = self.node.create_publisher(msg_type, topic, qos)
        self._publishers[topic] = publisher
        wait_until(
            lambda: publisher.get_subscription_count() > 0,
            explain=lambda: f"nobody subscribes to {topic}",
        )

    def wait_for_publisher(self, topic: str) -> None:
        """Wait until a subscription of this client is connected to a publisher."""
        wait_until(
            lambda: self.node.count_publishers(topic) > 0,
            explain=lambda: f"nobody publishes {topic}",
        )

    def topics_of(self, node: str, namespace: str = "/") -> set[Topic]:
        """The topics of another node, as discovery shows them; without those of every node."""
        # which may tell of its topics before its name
        wait_until(
            lambda: (node, namespace) in self.node.get_node_names_and_namespaces(),
            explain=lambda: f"no node {node} in {namespace}",
        )
        found = set()
        for direction, name_all, inform in (
            (
                "in",
                self.node.get_subscriber_names_and_types_by_node,
                self.node.get_subscriptions_info_by_topic,
            ),
            (
                "out",
                self.node.get_publisher_names_and_types_by_node,
                self.node.get_publishers_info_by_topic,
            ),
        ):
            for name, _ in name_all(node, namespace):
                for info in inform(name):
                    if (info.node_name, info.node_namespace) == (node, namespace):
                        qos = info.qos_profile
                        reliable = qos.reliability == ReliabilityPolicy.RELIABLE
                        latched = qos.durability == DurabilityPolicy.TRANSIENT_LOCAL
                        words = ("reliable" if reliable else "best effort") + ", latched" * latched
                        kind = info.topic_type.replace("/msg/", "/")
                        found.add(Topic(name, direction, kind, words))
        return {
            topic
            for topic in found
            if not topic.name.endswith(_OF_EVERY_NODE) and "/_action/" not in topic.name
        }

    def call(self, srv_type: type, name: str, request: Any, timeout_s: float = 30.0) -> Any:
        """Call a service; returns its response."""
        future = self.call_async(srv_type, name, request, timeout_s)
        wait_until(future.done, timeout_s, lambda: f"{name} did not answer")
        return future.result()

    def call_async(
        self, srv_type: type, name: str, request: Any, timeout_s: float = 30.0
    ) -> Future:
        """The same without waiting for the response."""
        # kept: a response that comes before the server knows where it goes is lost
        if name not in self._services:
            self._services[name] = self.node.create_client(srv_type, name)
        client = self._services[name]
        assert client.wait_for_service(timeout_s), f"no service {name}"
        return client.call_async(request)

    def set_parameter(self, node: str, name: str, value: Any) -> Any:
        """Set a parameter of the node with this full name; returns whether, or why not."""
        request = SetParameters.Request(
            parameters=[Parameter(name, value=value).to_parameter_msg()]
        )
        return self.call(SetParameters, f"{node}/set_parameters", request).results[0]

    def send_goal(
        self,
        action_type: type,
        name: str,
        goal: Any,
        feedback: Callable[[Any], None] = lambda msg: None,
    ) -> Any:
        """Send an action's goal; returns its handle when the server has accepted it."""
        if name not in self._actions:
            self._actions[name] = ActionClient(self.node, action_type, name)
        assert self._actions[name].wait_for_server(30.0), f"no action {name}"
        future = self._actions[name].send_goal_async(goal, lambda msg: feedback(msg.feedback))
        wait_until(future.done, explain=lambda: f"{name} did not answer")
        assert future.result().accepted
        return future.result()

    def services_of(self, node: str, namespace: str = "/") -> set[tuple[str, str]]:
        """Name and type of another node's services of ours and actions."""
        services = self.node.get_service_names_and_types_by_node(node, namespace)
        actions = get_action_server_names_and_types_by_node(self.node, node, namespace)
        found = {(name, kind) for name, kinds in [*services, *actions] for kind in kinds}
        return {
            (name, kind)
            for name, kind in found
            if kind.startswith("fpt_msgs/") and "/_action/" not in name
        }

    def publish(self, topic: str, msg: Any) -> None:
        """Publish on a topic that was advertised."""
        self._publishers[topic].publish(msg)

    def next(
        self, topic: str, accept: Callable[[Any], bool] = lambda msg: True, timeout_s: float = 30.0
    ) -> Any:
        """The first collected message that is accepted; waits for it."""
        found: list[Any] = []

        def look() -> bool:
            found[:] = [msg for msg in list(self.received[topic]) if accept(msg)][:1]
            return bool(found)

        wait_until(
            look,
            timeout_s,
            lambda: f"{len(self.received[topic])} messages on {topic}, none accepted",
        )
        return found[0]


_OF_EVERY_NODE = ("/rosout", "/parameter_events", "/transition_event", "/clock")
SENSOR_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
