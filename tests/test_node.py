# SPDX-License-Identifier: MIT
"""The FPT node over the wire: a node process, and this process as its camera and its user."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from node_harness import (
    SENSOR_QOS,
    Client,
    Process,
    documented_services,
    documented_topics,
    python_module,
    save_small_model,
    wait_until,
)
from node_user import (
    HEIGHT,
    NO_POKES,
    OTHER_POKE,
    POKE,
    QUERIES,
    RELIABLE,
    SETTINGS,
    TOLERANCE_PX,
    WIDTH,
    User,
    picture,
    running_node,
    values_of,
)
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from fpt_model.visualize import canvas_scale, flow_to_color
from fpt_msgs.msg import FlowDistribution, QueryArray
from fpt_ros.environment import claim_domain_id
from fpt_ros.images import array_to_image, flat_array, image_to_array
from fpt_ros.pokes import Pokes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "fpt-test.safetensors")


@pytest.fixture(scope="module")
def user(model: Path) -> Iterator[User]:
    with running_node(model, **RELIABLE) as user:
        user.node.wait_for("subscribed to /image, /pokes, /queries")
        user.connect()
        topics = {t.name: t.qos for t in user.client.topics_of("fpt")}
        assert topics["/image"] == "reliable", "the override is ignored"
        yield user


@pytest.fixture(autouse=True)
def forget(user: User) -> None:
    """Each test begins without standing pokes and queries, and with nothing received."""
    user.forget()


def test_distribution_is_the_predictors(user: User) -> None:
    pixels = picture()
    user.send_pokes(POKE)
    user.send_queries(QUERIES)
    header = user.send_image(pixels)
    expected = user.expected(pixels, POKE, QUERIES)
    msg = user.expect_distribution(header, expected)
    assert (msg.image_height, msg.image_width, msg.dims, msg.components) == (HEIGHT, WIDTH, 2, 4)
    assert (msg.model_name, msg.horizon_s) == ("fpt-test", 0.5)
    # what was sent matters
    unpoked = user.expected(pixels, NO_POKES, QUERIES).distribution
    assert np.abs(unpoked.means - expected.distribution.means).max() > 100 * TOLERANCE_PX


def test_dense_outputs_cover_the_image_pixel_by_pixel(user: User) -> None:
    pixels = picture(1)
    header = user.header()
    expected = user.expected(pixels, POKE)
    user.send_pokes(POKE, header)
    user.send_image(pixels, header)

    def close(topic: str, encoding: str, want: np.ndarray, tolerance: float) -> np.ndarray:
        def accept(msg: Image) -> bool:
            got = image_to_array(msg).astype(np.float64)
            return got.shape == want.shape and np.abs(got - want).max() <= tolerance

        msg = user.receive(topic, header, accept)
        assert msg.encoding == encoding
        return image_to_array(msg)

    assert expected.flow.shape == (HEIGHT, WIDTH, 2)
    flow = close("flow", "32FC2", expected.flow, TOLERANCE_PX)
    influence = close("influence", "32FC1", expected.influence, 1e-3)
    close("flow_color", "rgb8", flow_to_color(flow), 3)
    mask = image_to_array(user.receive("mask", header, lambda m: any(m.data)))
    np.testing.assert_array_equal(mask, 255 * (influence > user.predictor.config.kl_threshold))
    overlay = user.receive("overlay", header)
    scale = canvas_scale(HEIGHT, WIDTH)
    assert (overlay.encoding, overlay.height) == ("rgb8", scale * HEIGHT)
    difference = image_to_array(overlay).astype(np.float64) - expected.overlay
    assert np.abs(difference).mean() < 1  # a pixel at the mask's border may flip


def test_a_new_subscriber_need_not_wait_for_the_next_image(user: User) -> None:
    header = user.send_image(picture(4))
    user.expect_distribution(header, user.expected(picture(4), NO_POKES))
    with Client(user.domain, "late") as late:
        late.subscribe(Image, "/fpt/flow")
        late.next("/fpt/flow", lambda m: m.header == header)


def test_an_answer_without_pokes_and_queries(user: User) -> None:
    pixels = picture(2)
    header = user.send_image(pixels)
    msg = user.expect_distribution(header, user.expected(pixels, NO_POKES))
    assert msg.count == np.prod(SETTINGS.query_grid)
    mask = image_to_array(user.receive("mask", header))
    assert mask.shape == (HEIGHT, WIDTH)
    assert not mask.any()


def test_new_pokes_are_answered_on_the_image_at_hand_and_an_empty_array_clears(user: User) -> None:
    pixels = picture(3)
    header = user.send_image(pixels)
    user.expect_distribution(header, user.expected(pixels, NO_POKES))
    for pokes in (POKE, OTHER_POKE, NO_POKES):
        user.client.received["/fpt/distribution"].clear()
        user.send_pokes(pokes)
        user.expect_distribution(header, user.expected(pixels, pokes))
    # standing pokes go on with the next image
    user.send_pokes(POKE)
    header = user.send_image(picture(4))
    user.expect_distribution(header, user.expected(picture(4), POKE))


def test_pokes_with_a_stamp_are_for_that_image_only(user: User) -> None:
    first, second = picture(5), picture(6)
    first_header = user.send_image(first)
    user.expect_distribution(first_header, user.expected(first, NO_POKES))
    second_header = user.send_image(second)
    user.expect_distribution(second_header, user.expected(second, NO_POKES))
    user.send_pokes(POKE, first_header)
    user.expect_distribution(first_header, user.expected(first, POKE))
    third_header = user.send_image(second)
    user.expect_distribution(third_header, user.expected(second, NO_POKES))


def test_pokes_may_come_before_the_image_that_they_name(user: User) -> None:
    user.check_alive()
    pixels, header = picture(7), user.header()
    user.send_pokes(POKE, header)
    time.sleep(0.2)
    user.send_image(pixels, header)
    user.expect_distribution(header, user.expected(pixels, POKE, QUERIES))


@pytest.mark.parametrize("age_s", [60.0, -60.0])
def test_pokes_for_an_image_that_is_not_held_are_refused(user: User, age_s: float) -> None:
    user.check_alive()
    header = user.header(age_s)
    user.send_pokes(POKE, header)
    user.expect_error("pokes", f"{header.stamp.sec}.{header.stamp.nanosec:09d}", "not held")
    user.check_alive()


def malformed(**changes: Any) -> Image:
    msg = array_to_image(picture(), "rgb8", Header())
    for name, value in changes.items():
        setattr(msg, name, value)
    return msg


@pytest.mark.parametrize(
    ("msg", "words"),
    [
        (malformed(data=flat_array("B", np.zeros(100, np.uint8))), ("100 bytes", "9216")),
        (malformed(data=flat_array("B", np.zeros(0, np.uint8)), height=0), ("empty",)),
        (malformed(step=10), ("step is 10", "192")),
        (malformed(encoding="yuv9"), ("'yuv9'",)),
        (malformed(encoding="32FC1"), ("'32FC1'",)),
    ],
    ids=["wrong length", "empty", "small step", "unknown encoding", "no colour"],
)
def test_bad_images_are_named_and_survived(user: User, msg: Image, words: tuple[str, ...]) -> None:
    msg.header = user.header()
    user.client.publish("/image", msg)
    user.expect_error("image", *words)
    user.check_alive()


@pytest.mark.parametrize(
    ("poke", "words"),
    [
        (Pokes(np.array([[np.nan, 3.0]]), np.array([[1.0, 1.0]])), ("poke 0 of 1", "nan")),
        (Pokes(np.array([[5.0, 3.0]]), np.array([[np.inf, 1.0]])), ("poke 0 of 1", "inf")),
        (
            Pokes(np.array([[5.0, 3.0], [64.0, 3.0]]), np.ones((2, 2))),
            ("poke 1 of 2", "x=64", "64 x 48"),
        ),
        (Pokes(np.zeros((129, 2)), np.zeros((129, 2))), ("129 pokes", "128")),
    ],
    ids=["nan", "inf", "outside", "too many"],
)
def test_bad_pokes_are_named_and_change_nothing(
    user: User, poke: Pokes, words: tuple[str, ...]
) -> None:
    user.check_alive()
    user.send_pokes(poke)
    user.expect_error("pokes", *words)
    header = user.send_image(picture(8))
    user.expect_distribution(header, user.expected(picture(8), OTHER_POKE, QUERIES))


def test_errors_are_logged_once_a_second(user: User) -> None:
    def logged() -> list[str]:
        return [line for line in user.node.lines if "[ERROR]" in line and "x=77" in line]

    def counted(values: dict[str, str]) -> int:
        return int(values.get("errors: pokes", "0"))

    time.sleep(1.0)  # since errors of this kind in other tests
    user.send_image(picture())
    before = counted(values_of(user.diagnostics(bool)))
    outside = Pokes(np.array([[77.0, 3.0]]), np.ones((1, 2)))
    began = time.monotonic()
    for _ in range(20):
        user.send_pokes(outside)
        time.sleep(0.02)
    user.diagnostics(lambda values: counted(values) >= before + 10)
    wait_until(lambda: len(logged()) > 0)
    assert "poke 0 of 1 at x=77, y=3 px lies outside the 64 x 48 px image" in logged()[0]
    assert len(logged()) <= 2 + (time.monotonic() - began)  # on a loaded machine, more seconds


def test_bad_queries_are_named(user: User) -> None:
    user.check_alive()
    for xy, words in (
        (np.array([[3.0, np.nan]]), ("query 0 of 1", "nan")),
        (np.array([[3.0, 4.0], [3.0, 48.0]]), ("query 1 of 2", "y=48")),
    ):
        user.send_queries(xy)
        user.expect_error("queries", *words)
    user.client.publish("/queries", QueryArray(xy=flat_array("f", np.ones(3, np.float32))))
    user.expect_error("queries", "received 3 values")
    user.check_alive()


def test_ten_thousand_queries(user: User) -> None:
    pixels = picture(9)
    queries = np.random.default_rng(0).uniform(0, (WIDTH - 1, HEIGHT - 1), (10_000, 2))
    queries = queries.astype(np.float32).astype(np.float64)
    user.send_pokes(POKE)
    user.send_queries(queries)
    header = user.send_image(pixels)
    msg = user.expect_distribution(header, user.expected(pixels, POKE, queries))
    assert msg.count == 10_000


def test_the_image_may_change_its_size(user: User) -> None:
    far = Pokes(np.array([[60.0, 40.0]]), np.array([[2.0, 2.0]]))
    header = user.send_image(picture(10))
    user.send_pokes(far)
    user.expect_distribution(header, user.expected(picture(10), far))
    # the poke does not lie in the smaller image: no answer rather than another one
    small = picture(11, (24, 32))
    header = user.send_image(small)
    user.expect_error("standing", "poke 0 of 1", "32 x 24")
    assert not [m for m in user.client.received["/fpt/distribution"] if m.header == header]
    user.send_pokes(POKE)
    msg = user.expect_distribution(header, user.expected(small, POKE))
    assert (msg.image_height, msg.image_width) == (24, 32)
    assert image_to_array(user.receive("flow", header)).shape == (24, 32, 2)
    # and back again; queries and pokes that do not fit the small image come after the larger one
    header = user.send_image(picture())
    user.expect_distribution(header, user.expected(picture(), POKE))
    user.check_alive()


def test_old_images_are_dropped_and_counted(user: User) -> None:
    def dropped(values: dict[str, str]) -> int:
        return int(values.get("images dropped: too old", "0"))

    before = dropped(values_of(user.diagnostics(lambda values: True)))
    header = user.send_image(picture(12), user.header(age_s=3600.0))
    user.diagnostics(lambda values: dropped(values) == before + 1)
    user.node.wait_for("are the clocks of camera and node the same")
    assert not [m for m in user.client.received["/fpt/distribution"] if m.header == header]
    user.check_alive()


def test_only_the_newest_image_is_answered(user: User) -> None:
    headers = [user.send_image(picture(seed)) for seed in range(40)]
    user.expect_distribution(headers[-1], user.expected(picture(39), NO_POKES))
    stamps = [m.header.stamp for m in user.client.received["/fpt/distribution"]]
    order = [(s.sec, s.nanosec) for s in stamps]
    assert order == sorted(order)
    assert len(order) < len(headers)


def test_incompatible_qos_is_named(user: User) -> None:
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    user.client.subscribe(Image, "/fpt/mask", latched)
    user.node.wait_for("a subscriber of /fpt/mask has incompatible QoS")
    assert "qos_overrides./fpt/mask.publisher.durability" in user.node.output


def test_lifecycle_and_laziness(model: Path) -> None:
    """From a missing model to answers, in a node that computes only what is subscribed to."""
    domain, claim = claim_domain_id()
    node = Process(
        python_module(
            "fpt_ros.node", "-p", "autostart:=false", "-p", "model:=absent", "-p",
            "diagnostics_period_s:=0.2", "-p", "max_age_ms:=30000.0", "-p", "precision:=bf16",
            "-r", "__ns:=/left",
        ),
        domain,
    )  # fmt: skip
    with claim, node, Client(domain) as client:
        client.subscribe(DiagnosticArray, "/diagnostics")
        client.subscribe(FlowDistribution, "/left/fpt/distribution")

        def change(transition: int) -> bool:
            request = ChangeState.Request(transition=Transition(id=transition))
            return client.call(ChangeState, "/left/fpt/change_state", request).success

        def set_parameter(name: str, value: str) -> Any:
            return client.set_parameter("/left/fpt", name, value)

        assert not change(Transition.TRANSITION_CONFIGURE)
        node.wait_for("cannot configure with model 'absent'")
        failed = client.next(
            "/diagnostics", lambda m: m.status[0].level == DiagnosticStatus.ERROR
        ).status[0]
        assert "absent" in failed.message
        assert not change(Transition.TRANSITION_ACTIVATE)  # impossible yet, and survived
        node.wait_for("transition 3 is impossible in state 'unconfigured', expected one of: 1")
        assert set_parameter("model", str(model)).successful
        assert change(Transition.TRANSITION_CONFIGURE)
        documented = documented_topics("fpt_node", "fpt", "/left")
        wait_until(
            lambda: client.topics_of("fpt", "/left") == documented,
            explain=lambda: f"differing: {client.topics_of('fpt', '/left') ^ documented}",
        )
        assert client.services_of("fpt", "/left") == documented_services("fpt_node", "fpt", "/left")
        refused = set_parameter("model", str(model))
        assert not refused.successful
        assert "unconfigured" in refused.reason
        assert set_parameter("flow_reduce", "mode").successful
        refused = set_parameter("flow_reduce", "average")
        assert refused.reason == (
            "flow_reduce must be one of mean, median, mode, received 'average'"
        )
        assert change(Transition.TRANSITION_ACTIVATE)

        client.wait_for_publisher("/left/fpt/distribution")
        client.advertise(Image, "/left/image", SENSOR_QOS)
        header = Header(stamp=client.node.get_clock().now().to_msg(), frame_id="left")
        image = array_to_image(picture(), "rgb8", header)
        for _ in range(150):  # best effort: the first may come before the connection
            client.publish("/left/image", image)
            time.sleep(0.2)
            if client.received["/left/fpt/distribution"]:
                break
        client.next("/left/fpt/distribution", lambda m: m.header == header)
        answered = client.next(
            "/diagnostics", lambda m: int(values_of(m.status[0]).get("answers", "0")) > 0
        ).status[0]
        assert (answered.level, answered.name) == (DiagnosticStatus.OK, "left/fpt: inference")
        values = values_of(answered)
        assert (values["device active"], values["precision active"]) == ("cpu", "bf16")
        assert values["predict time"].endswith(tuple("0123456789"))
        assert values["dense time"] == "n/a"

        assert change(Transition.TRANSITION_DEACTIVATE)
        assert change(Transition.TRANSITION_CLEANUP)
        assert change(Transition.TRANSITION_UNCONFIGURED_SHUTDOWN)
        assert node.interrupt() == 0, node.output
    assert "Traceback" not in node.output


@pytest.mark.parametrize(
    ("module", "parameter", "named"),
    [
        ("fpt_ros.node", "max_age_ms:=soon", ("max_age_ms", "soon")),
        ("fpt_ros.poke_publisher", "rate_hz", ("rate_hz",)),
    ],
    ids=["wrong type", "no value"],
)
def test_wrong_parameters_are_named(module: str, parameter: str, named: tuple[str, ...]) -> None:
    domain, claim = claim_domain_id()
    node = Process(python_module(module, "-p", parameter), domain)
    with claim, node:
        node.wait_for("cannot start: ")
        assert node.process.wait(60) == 1
    assert all(word in node.output for word in named), node.output
    assert "Traceback" not in node.output


def test_a_camera_without_opengl_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", os.devnull)
    domain, claim = claim_domain_id()
    camera = Process(python_module("sim.camera_node"), domain)
    with claim, camera:
        camera.wait_for("cannot start: OpenGL backend 'egl' failed: ")
        assert camera.process.wait(60) == 1
    assert "apt-get install libegl1" in camera.output
    assert "Traceback" not in camera.output


BUSY_NODE = """
import sys, time
from rclpy.node import Node
from std_msgs.msg import Header
from fpt_ros.spin import run

class Busy(Node):
    def __init__(self):
        super().__init__("busy")
        {}

    def work(self):
        print("working", flush=True)
        time.sleep(1.0)
        self.create_publisher(Header, "header", 1)  # which fails without ROS

sys.exit(run(lambda: Busy))
"""


@pytest.mark.parametrize(
    "begin", ["self.work()", "self.create_timer(0.0, self.work)"],
    ids=["start", "callback"],
)  # fmt: skip
def test_sigterm_amid_work_ends_quietly(begin: str) -> None:
    domain, claim = claim_domain_id()
    node = Process([sys.executable, "-c", BUSY_NODE.format(begin)], domain)
    with claim, node:
        node.wait_for("working")
        node.process.terminate()
        assert node.process.wait(30) == 0, node.output
    assert "Traceback" not in node.output
