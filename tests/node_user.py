# SPDX-License-Identifier: MIT
"""A user of the FPT node over the wire, who knows what the node must answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time as Stamp
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from node_harness import Client, Process, python_module, wait_until
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from fpt_model import FlowPredictor, load_model
from fpt_msgs.msg import FlowDistribution, PokeArray, QueryArray
from fpt_ros.environment import claim_domain_id
from fpt_ros.images import array_to_image
from fpt_ros.messages import distribution_from_msg, pokes_to_msg, queries_to_msg
from fpt_ros.pipeline import Answer, Settings, View
from fpt_ros.pokes import Pokes

HEIGHT, WIDTH = 48, 64
DENSE = (12, 16)
SETTINGS = Settings(dense_size=DENSE, query_grid=(3, 4))
TOLERANCE_PX = 2e-3

POKE = Pokes(np.array([[20.0, 10.0]]), np.array([[9.0, -4.0]]))
OTHER_POKE = Pokes(np.array([[20.0, 10.0]]), np.array([[-9.0, 6.0]]))
NO_POKES = Pokes()
QUERIES = np.array([[10.0, 5.0], [40.0, 30.0], [63.5, 47.5]])
# of the node's image subscription, where each image counts; best effort is what it has otherwise
RELIABLE = {"qos_overrides./image.subscription.reliability": "reliable"}
OUTPUTS = ("flow", "flow_color", "mask", "influence", "overlay")


def picture(seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


class User:
    """Sends images, pokes and queries to the node, and knows what the answer must be."""

    def __init__(self, client: Client, node: Process, model: Path, domain: int) -> None:
        self.client, self.node, self.domain = client, node, domain
        self.predictor = FlowPredictor(load_model(model))

    def connect(self) -> None:
        """Subscribe to distribution and outputs, publish what the node takes, until all arrives."""
        self.client.subscribe(FlowDistribution, "/fpt/distribution")
        for name in OUTPUTS:
            self.client.subscribe(Image, f"/fpt/{name}")
        self.client.advertise(Image, "/image", 1)
        self.client.advertise(PokeArray, "/pokes")
        self.client.advertise(QueryArray, "/queries")
        self.shake_hands()

    def forget(self) -> None:
        """Clear standing pokes and queries, and what was received."""
        self.send_pokes(NO_POKES)
        self.send_queries(np.zeros((0, 2)))
        for messages in self.client.received.values():
            messages.clear()

    def expected(
        self, pixels: np.ndarray, pokes: Pokes, queries: np.ndarray | None = None
    ) -> Answer:
        view = View(pixels, self.predictor.encode(pixels))
        return Answer(self.predictor, view, pokes, queries, SETTINGS)

    def header(self, age_s: float = 0.0) -> Header:
        ns = self.client.node.get_clock().now().nanoseconds - int(age_s * 1e9)
        return Header(
            stamp=Stamp(sec=ns // 10**9, nanosec=ns % 10**9), frame_id="camera_optical_frame"
        )

    def send_image(self, pixels: np.ndarray, header: Header | None = None) -> Header:
        header = header or self.header()
        self.client.publish("/image", array_to_image(pixels, "rgb8", header))
        return header

    def send_pokes(self, pokes: Pokes, header: Header | None = None) -> None:
        self.client.publish("/pokes", pokes_to_msg(pokes, header or Header()))

    def send_queries(self, xy: np.ndarray, header: Header | None = None) -> None:
        self.client.publish("/queries", queries_to_msg(xy, header or Header()))

    def receive(self, topic: str, header: Header, accept: Callable[[Any], bool] = bool) -> Any:
        """The message of an output with exactly this header."""
        return self.client.next(f"/fpt/{topic}", lambda m: m.header == header and accept(m))

    def expect_distribution(self, header: Header, expected: Answer) -> FlowDistribution:
        """Wait for the distribution that the predictor itself gives."""

        def same(msg: FlowDistribution) -> bool:
            queries, mixture = distribution_from_msg(msg)
            return (
                queries.shape == expected.queries.shape
                and np.allclose(queries, expected.queries, atol=1e-4)
                and np.allclose(mixture.weights, expected.distribution.weights, atol=1e-3)
                and np.allclose(mixture.means, expected.distribution.means, atol=TOLERANCE_PX)
                and np.allclose(
                    mixture.scale_tril, expected.distribution.scale_tril, atol=TOLERANCE_PX
                )
            )

        return self.receive("distribution", header, same)

    def shake_hands(self) -> None:
        """Send until everything arrives: a connection is first known at one of its ends only."""
        received = ("images received", "pokes received", "queries received", "answers")

        def connected() -> bool:
            self.send_pokes(NO_POKES)
            self.send_queries(np.zeros((0, 2)))
            self.send_image(picture())
            time.sleep(0.2)
            last = [values_of(m.status[0]) for m in self.client.received["/diagnostics"][-1:]]
            topics = ("distribution", *OUTPUTS)
            return all(self.client.received[f"/fpt/{topic}"] for topic in topics) and all(
                what in values for values in last for what in received
            )

        wait_until(connected, 60.0, lambda: f"no connection:\n{self.node.output}")

    def check_alive(self) -> None:
        """The node gives a right answer for a new image with standing pokes and queries."""
        pixels = picture(99)
        self.send_queries(QUERIES)
        self.send_pokes(OTHER_POKE)
        header = self.send_image(pixels)
        self.expect_distribution(header, self.expected(pixels, OTHER_POKE, QUERIES))

    def diagnostics(self, accept: Callable[[dict[str, str]], bool]) -> DiagnosticStatus:
        """The first status from now on whose values are accepted."""
        messages = self.client.received["/diagnostics"]
        messages.clear()
        msg = self.client.next("/diagnostics", lambda m: accept(values_of(m.status[0])))
        return msg.status[0]

    def expect_error(self, kind: str, *words: str) -> None:
        """Wait for a warning about an error of this kind in the diagnostics of this test."""

        def accept(msg: DiagnosticArray) -> bool:
            error = values_of(msg.status[0])["last error"]
            return (
                msg.status[0].level == DiagnosticStatus.WARN
                and error.startswith(kind)
                and all(word in error for word in words)
            )

        self.client.next("/diagnostics", accept)


def values_of(status: DiagnosticStatus) -> dict[str, str]:
    return {item.key: item.value for item in status.values}


def node_command(model: Path, remap: Sequence[str] = (), **parameters: Any) -> list[str]:
    """What starts a node with small grids."""
    parameters = {
        "model": model,
        "threads": 1,
        "max_age_ms": 30000.0,  # a loaded machine must not fail the tests
        "dense_height": DENSE[0],
        "dense_width": DENSE[1],
        "query_grid_height": SETTINGS.query_grid[0],
        "query_grid_width": SETTINGS.query_grid[1],
        "diagnostics_period_s": 0.2,
        **parameters,
    }
    arguments = [word for k, v in parameters.items() for word in ("-p", f"{k}:={v}")]
    arguments += [word for rule in remap for word in ("-r", rule)]
    return python_module("fpt_ros.node", *arguments)


@contextmanager
def running_node(model: Path, remap: Sequence[str] = (), **parameters: Any) -> Iterator[User]:
    """A node process with small grids and a user of it; it must end well."""
    domain, claim = claim_domain_id()
    node = Process(node_command(model, remap, **parameters), domain)
    with claim, node, Client(domain) as client:
        client.subscribe(DiagnosticArray, "/diagnostics")
        node.wait_for("subscribed to /")
        yield User(client, node, model, domain)
        code = node.interrupt()
    assert code == 0, node.output
    assert "Traceback" not in node.output
