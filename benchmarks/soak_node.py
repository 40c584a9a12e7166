# SPDX-License-Identifier: MIT
"""Long runs of the real node as a process of its own, on this machine: load, then lifecycle.

    python benchmarks/soak_node.py --seconds 600 --rate 60 --transitions 1000 --out soak.json

*Load*: a camera that publishes at ``--rate``, whose images are all different, with standing pokes
and a subscriber of ``--outputs``. Told are images sent, answered and dropped, the time from an
image's stamp until its outputs are here (p50, p99), what the node adds to the library's work on an
image (converting, building and publishing messages; of the last 100 images), and its memory.

*Lifecycle*: random transitions, possible and impossible ones, while images flow and all services
and the action are called; afterwards the node must answer as before.

Ends with code 1 when the node died, logged a traceback, left a request without any answer or did
not answer at the end, or when its memory grew by more than ``--max-growth`` between the first
quarter of the load and its end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fpt_ros import environment

os.environ.update(environment.defaults())  # before Fast DDS is loaded

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from report import where
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from fpt_msgs.action import SampleFlow
from fpt_msgs.msg import FlowDistribution, Poke, PokeArray
from fpt_msgs.srv import EvaluatePokes, PredictFlow, SegmentMovingPart
from fpt_ros.images import array_to_image

SERVICES = {
    "predict_flow": PredictFlow,
    "segment_moving_part": SegmentMovingPart,
    "evaluate_pokes": EvaluatePokes,
}
TIMEOUT_S = 120.0
START = Transition.TRANSITION_CONFIGURE
WALK = {  # state: transitions, those that cost a model's loading more seldom
    State.PRIMARY_STATE_UNCONFIGURED: [Transition.TRANSITION_CONFIGURE],
    State.PRIMARY_STATE_INACTIVE: [Transition.TRANSITION_ACTIVATE] * 3
    + [Transition.TRANSITION_CLEANUP],
    State.PRIMARY_STATE_ACTIVE: [Transition.TRANSITION_DEACTIVATE],
}
IMPOSSIBLE = 0.2  # share of transitions that the state does not allow


class SoakError(Exception):
    """The node did not do what it must."""


class NodeProcess:
    """The node, its output and its memory."""

    def __init__(self, model: str, threads: int) -> None:
        parameters = {"model": model, "threads": threads, "diagnostics_period_s": 0.5}
        command = [sys.executable, "-m", "fpt_ros.node", "--ros-args"]
        for name, value in parameters.items():
            command += ["-p", f"{name}:={value}"]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def check(self) -> None:
        """SoakError when it has ended."""
        if self.process.poll() is not None:
            raise SoakError(f"the node ended with code {self.process.returncode}\n{self.log()}")

    def log(self) -> str:
        """All that it wrote."""
        self._log.seek(0)
        return self._log.read()

    def memory_mb(self) -> float:
        """Its resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def end(self) -> None:
        """By SIGINT, as from a terminal; SoakError unless it ends well."""
        os.killpg(self.process.pid, signal.SIGINT)
        code = self.process.wait(TIMEOUT_S)
        if code != 0 or "Traceback" in self.log():
            raise SoakError(f"the node ended with code {code}\n{self.log()}")


class Bench:
    """This process's side: the camera, the subscribers and the clients."""

    def __init__(self, node: NodeProcess, size: tuple[int, int]) -> None:
        self.node = node
        self.ros = rclpy.create_node("soak")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.ros)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)
        best_effort = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        self.camera = self.ros.create_publisher(Image, "image", best_effort)
        self.pokes = self.ros.create_publisher(PokeArray, "pokes", 10)
        self.status: dict[str, str] = {}
        self.ros.create_subscription(DiagnosticArray, "/diagnostics", self._on_status, 10)
        self.change = self.ros.create_client(ChangeState, "fpt/change_state")
        self.state = self.ros.create_client(GetState, "fpt/get_state")
        self.services = {
            name: self.ros.create_client(srv_type, f"fpt/{name}")
            for name, srv_type in SERVICES.items()
        }
        self.action = ActionClient(self.ros, SampleFlow, "fpt/sample_flow")
        rng = np.random.default_rng(0)
        self._images = [
            array_to_image(rng.integers(0, 256, (*size, 3), dtype=np.uint8), "rgb8", Header())
            for _ in range(8)
        ]
        self.sent = 0
        self._thread.start()

    def _spin(self) -> None:
        while not self._ending.is_set():
            self._executor.spin_once(timeout_sec=0.1)

    def _on_status(self, msg: DiagnosticArray) -> None:
        self.status = {item.key: item.value for item in msg.status[0].values}

    def close(self) -> None:
        """Stop spinning and leave."""
        self._ending.set()
        self._thread.join()
        self.action.destroy()
        self.ros.destroy_node()

    def send_image(self) -> None:
        """The next image, of now."""
        msg = self._images[self.sent % len(self._images)]
        msg.header = Header(stamp=self.ros.get_clock().now().to_msg(), frame_id="camera")
        self.camera.publish(msg)
        self.sent += 1

    def wait(self, what: str, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        """Until the condition holds, SoakError after the timeout."""
        end = time.monotonic() + timeout_s
        while not condition():
            self.node.check()
            if time.monotonic() > end:
                raise SoakError(f"{what}: not within {timeout_s} s\n{self.node.log()[-4000:]}")
            time.sleep(0.005)

    def call(self, client: Any, request: Any) -> Any:
        """A service's response."""
        self.wait(f"{client.srv_name} is there", client.service_is_ready)
        future = client.call_async(request)
        self.wait(f"{client.srv_name} answers", future.done)
        return future.result()

    @contextmanager
    def images(self, rate_hz: float) -> Iterator[None]:
        """Images at a rate, from a thread, as long as the body runs."""
        ending = threading.Event()

        def publish() -> None:
            due = time.monotonic()
            while not ending.wait(max(0.0, due - time.monotonic())):
                self.send_image()
                due += 1.0 / rate_hz

        thread = threading.Thread(target=publish, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join()

    def check_answers(self) -> None:
        """The node is active and answers a service about the image of now."""

        def answered() -> bool:
            response = self.call(self.services["predict_flow"], PredictFlow.Request())
            return bool(response.success)

        self.wait("the node answers", answered)


def load(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Images at a rate for a time; what came of them."""
    arrivals: dict[int, dict[str, float]] = {}

    def on_output(name: str, msg: Any) -> None:
        stamp_ns = msg.header.stamp.sec * 10**9 + msg.header.stamp.nanosec
        age_ms = (bench.ros.get_clock().now().nanoseconds - stamp_ns) / 1e6
        arrivals.setdefault(stamp_ns, {})[name] = age_ms

    subscriptions = [
        bench.ros.create_subscription(
            FlowDistribution if name == "distribution" else Image,
            f"fpt/{name}",
            lambda msg, name=name: on_output(name, msg),
            10,
        )
        for name in args.outputs
    ]
    poke = Poke(x=args.width / 2, y=args.height / 2, dx=20.0, dy=0.0)
    memory: list[tuple[float, float]] = []
    with bench.images(args.rate):
        bench.wait("outputs arrive", lambda: len(arrivals) > 3)
        bench.pokes.publish(PokeArray(pokes=[poke]))
        before = dict(bench.status)
        arrivals.clear()
        began, sent = time.monotonic(), bench.sent
        while (passed := time.monotonic() - began) < args.seconds:
            bench.node.check()
            memory.append((passed, bench.node.memory_mb()))
            time.sleep(min(1.0, args.seconds / 20))
        sent = bench.sent - sent
    after = dict(bench.status)
    for subscription in subscriptions:
        bench.ros.destroy_subscription(subscription)

    ages = sorted(
        max(times.values()) for times in arrivals.values() if len(times) == len(args.outputs)
    )
    if not ages:
        raise SoakError("no image was answered under load")
    growth = memory[-1][1] - max(mb for t, mb in memory if t <= args.seconds / 4)
    return {
        "images sent": sent,
        "images answered": len(ages),
        "outputs a second": len(ages) / args.seconds,
        "end to end p50 ms": statistics.median(ages),
        "end to end p99 ms": ages[min(len(ages) - 1, int(0.99 * len(ages)))],
        "processing p50 ms": median_ms(after, "processing time"),
        "node overhead p50 ms": median_ms(after, "overhead time"),
        "dropped": {
            key: int(value) - int(before.get(key, 0))
            for key, value in after.items()
            if key.startswith("images dropped")
        },
        "errors": {key: value for key, value in after.items() if key.startswith("errors")},
        "memory first MB": memory[0][1],
        "memory last MB": memory[-1][1],
        "memory growth MB": growth,
    }


def median_ms(status: dict[str, str], name: str) -> float:
    """A time's median in the diagnostics, of the last images; 0 when there is none."""
    value = status.get(name, "n/a")
    return 0.0 if value == "n/a" else float(value.split("median ")[1])


def lifecycle(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Random transitions under traffic; how many of which kind."""
    rng = random.Random(args.seed)
    counts: Counter[str] = Counter()
    pending: list[Any] = []

    def traffic() -> None:
        """A question of each kind, whose answer comes some time."""
        if len(pending) > 20:
            return
        for name, srv_type in SERVICES.items():
            pending.append(
                bench.services[name].call_async(
                    srv_type.Request(pokes=[Poke(x=5.0, y=5.0, dx=3.0)])
                )
            )
        goal = bench.action.send_goal_async(SampleFlow.Goal(samples=2))
        goal.add_done_callback(
            lambda done: (
                pending.append(done.result().get_result_async())
                if done.result().accepted
                else counts.update(["goals refused"])
            )
        )
        pending.append(goal)

    memory = [bench.node.memory_mb()]
    with bench.images(args.rate):
        bench.wait(
            "services are there", lambda: all(c.service_is_ready() for c in bench.services.values())
        )
        bench.wait("the action is there", bench.action.server_is_ready)
        for _ in range(args.transitions):
            state = bench.call(bench.state, GetState.Request()).current_state.id
            possible = WALK[state]
            if rng.random() < IMPOSSIBLE:
                wrong = sorted({t for ts in WALK.values() for t in ts} - set(possible))
                transition, expected = rng.choice(wrong), False
            else:
                transition, expected = rng.choice(possible), True
            request = ChangeState.Request(transition=Transition(id=transition))
            if bench.call(bench.change, request).success != expected:
                raise SoakError(f"transition {transition} in state {state}: not {expected}")
            counts["possible" if expected else "impossible"] += 1
            traffic()
            if rng.random() < 0.3:
                time.sleep(rng.uniform(0, 0.05))
            pending[:] = [future for future in pending if not future.done()]
            memory.append(bench.node.memory_mb())
        for transition in (START, Transition.TRANSITION_ACTIVATE):  # wherever the walk ended
            request = ChangeState.Request(transition=Transition(id=transition))
            bench.call(bench.change, request)
        bench.check_answers()
        bench.wait("all requests are answered", lambda: all(f.done() for f in list(pending)))
    return dict(counts) | {
        "memory first MB": memory[0],
        "memory half-way MB": memory[len(memory) // 2],
        "memory last MB": memory[-1],
    }


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="fpt-tiny")
    parser.add_argument("--threads", type=int, default=0, help="of the node; 0: its default")
    parser.add_argument("--seconds", type=float, default=600.0, help="of load; 0: none")
    parser.add_argument("--rate", type=float, default=60.0, help="images a second")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--outputs", nargs="+", default=["distribution", "flow", "mask"])
    parser.add_argument("--transitions", type=int, default=1000, help="0: none")
    parser.add_argument("--seed", type=int, default=0, help="of the random walk")
    parser.add_argument("--max-growth", type=float, default=50.0, help="of memory under load, MB")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    report: dict[str, Any] = where(
        os.cpu_count() or 1,
        model=args.model,
        images=f"{args.width}x{args.height} at {args.rate:g} Hz",
    )
    domain, claim = environment.claim_domain_id()
    os.environ["ROS_DOMAIN_ID"] = str(domain)
    rclpy.init()
    node = NodeProcess(args.model, args.threads)
    failure = ""
    with claim:
        bench = Bench(node, (args.height, args.width))
        try:
            with bench.images(args.rate):
                bench.check_answers()
            if args.seconds:
                report["load"] = load(bench, args)
                growth = report["load"]["memory growth MB"]
                if growth > args.max_growth:
                    raise SoakError(f"memory grew by {growth:.1f} MB under load")
            if args.transitions:
                report["lifecycle"] = lifecycle(bench, args)
            node.end()
        except SoakError as error:
            failure = str(error)
        finally:
            if node.process.poll() is None:
                node.process.kill()
            bench.close()
            rclpy.try_shutdown()
    report["failure"] = failure
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
