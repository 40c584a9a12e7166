# SPDX-License-Identifier: MIT
"""The node's services and action over the wire, and what else users see of it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from action_msgs.msg import GoalStatus
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import Point
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from node_harness import ROOT, SENSOR_QOS, Client, save_small_model, wait_until
from node_user import (
    DENSE,
    HEIGHT,
    NO_POKES,
    OTHER_POKE,
    POKE,
    QUERIES,
    SETTINGS,
    TOLERANCE_PX,
    WIDTH,
    User,
    picture,
    running_node,
    values_of,
)
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Float64, Header
from visualization_msgs.msg import Marker, MarkerArray

from fpt_model import FlowMixture
from fpt_model.geometry import (
    displacement_pixels_to_normalised,
    grid,
    normalised_to_pixels,
    pixels_to_normalised,
)
from fpt_msgs.action import SampleFlow
from fpt_msgs.msg import FlowDistribution, ModelInfo, Poke, PokeArray, QueryArray
from fpt_msgs.srv import EvaluatePokes, PredictFlow, SegmentMovingPart
from fpt_ros.images import flat_array, image_to_array, image_to_rgb
from fpt_ros.messages import distribution_from_msg, pokes_to_msg, samples_from_msg
from fpt_ros.pokes import Pokes

SIZE = (HEIGHT, WIDTH)
SCALE = (WIDTH, HEIGHT)
SERVICES: dict[str, Any] = {
    "predict_flow": PredictFlow,
    "segment_moving_part": SegmentMovingPart,
    "evaluate_pokes": EvaluatePokes,
}
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "fpt-test.safetensors")


@pytest.fixture(scope="module")
def user(model: Path) -> Iterator[User]:
    """Of a node whose outputs nobody subscribes to; it has received images."""
    parameters = {
        "full_resolution": False,
        "max_queries": 400,
        "qos_overrides./image.subscription.reliability": "reliable",
    }
    with running_node(model, **parameters) as user:
        user.client.advertise(Image, "/image", 1)

        def connected() -> bool:
            user.send_image(picture())
            time.sleep(0.1)
            last = user.client.received["/diagnostics"][-1:]
            return any("images received" in values_of(m.status[0]) for m in last)

        wait_until(connected)
        yield user


def poke_list(pokes: Pokes) -> list[Poke]:
    return list(pokes_to_msg(pokes, Header()).pokes)


def flat(values: Any) -> Any:
    return flat_array("f", np.asarray(values, np.float32))


def call(user: User, service: str, client: Client | None = None, **fields: Any) -> Any:
    srv_type = SERVICES[service]
    request = srv_type.Request(**fields)
    return (client or user.client).call(srv_type, f"/fpt/{service}", request)


def library_pokes(pokes: Pokes) -> tuple[np.ndarray, np.ndarray]:
    return pixels_to_normalised(pokes.xy, SIZE), displacement_pixels_to_normalised(pokes.flow, SIZE)


def predicted(
    user: User, pixels: np.ndarray, pokes: Pokes, queries: np.ndarray = QUERIES
) -> FlowMixture:
    """By the library itself, in px."""
    scene = user.predictor.encode(pixels)
    mixture = user.predictor.predict(
        scene, *library_pokes(pokes), pixels_to_normalised(queries, SIZE)
    )
    return mixture.scaled(*SCALE)


def check_distribution(
    msg: FlowDistribution, header: Header, queries: np.ndarray, expected: FlowMixture
) -> None:
    assert msg.header == header
    assert (msg.image_height, msg.image_width, msg.model_name) == (HEIGHT, WIDTH, "fpt-test")
    found_queries, mixture = distribution_from_msg(msg)
    np.testing.assert_allclose(found_queries, queries, atol=1e-4)
    np.testing.assert_allclose(mixture.weights, expected.weights, atol=1e-3)
    np.testing.assert_allclose(mixture.means, expected.means, atol=TOLERANCE_PX)
    np.testing.assert_allclose(mixture.scale_tril, expected.scale_tril, atol=TOLERANCE_PX)


# --- services ------------------------------------------------------------------------------------


def test_predict_flow_is_the_librarys(user: User) -> None:
    pixels = picture(1)
    header = user.send_image(pixels)
    response = call(
        user, "predict_flow", header=header, pokes=poke_list(POKE), queries=flat(QUERIES.ravel())
    )
    assert (response.success, response.message) == (True, "")
    check_distribution(response.distribution, header, QUERIES, predicted(user, pixels, POKE))
    # zero stamp: the newest; no pokes: unconditional; no queries: the grid
    response = call(user, "predict_flow")
    points = normalised_to_pixels(grid(SETTINGS.query_grid), SIZE)
    expected = predicted(user, pixels, NO_POKES, points)
    check_distribution(response.distribution, header, points, expected)


def test_any_recent_image_can_be_named_though_none_was_answered(user: User) -> None:
    headers = []
    for seed in range(5):
        headers.append(user.send_image(picture(seed)))
        time.sleep(0.02)
    for seed in (4, 0, 2):
        response = call(user, "predict_flow", header=headers[seed], queries=flat(QUERIES.ravel()))
        assert response.success, response.message
        expected = predicted(user, picture(seed), NO_POKES)
        check_distribution(response.distribution, headers[seed], QUERIES, expected)
    values = values_of(user.diagnostics(lambda values: "answers" not in values))
    assert values["dense time"] == values["pipeline latency"] == "n/a"


def test_parameters_take_effect_while_the_node_runs(user: User) -> None:
    pixels = picture(12)
    header = user.send_image(pixels)
    scene = user.predictor.encode(pixels)
    named = {"header": header, "pokes": poke_list(POKE)}
    points = {"queries": flat(QUERIES.ravel())}

    def set_parameter(name: str, value: Any) -> None:
        done = user.client.set_parameter("/fpt", name, value)
        assert done.successful, done.reason

    set_parameter("camera_static", False)
    set_parameter("kl_threshold_nats", 0.125)
    try:
        expected = user.predictor.predict(
            scene, *library_pokes(POKE), pixels_to_normalised(QUERIES, SIZE), False
        ).scaled(*SCALE)
        static = predicted(user, pixels, POKE)
        assert np.abs(expected.means - static.means).max() > 100 * TOLERANCE_PX
        for service, of in (
            ("predict_flow", lambda r: r.distribution),
            ("evaluate_pokes", lambda r: r.distributions[0]),
        ):
            response = call(user, service, **named, **points)
            check_distribution(of(response), header, QUERIES, expected)
        response = call(user, "segment_moving_part", **named)
        assert response.threshold == 0.125
        influence = user.predictor.influence(
            scene, *library_pokes(POKE), size=DENSE, camera_static=False
        )
        np.testing.assert_allclose(image_to_array(response.influence), influence, atol=1e-4)
        goal = send_goal(user, [], **named, **points, samples=2, seed=3)
        drawn = samples_from_msg(wait_for_result(goal).result.samples)[1]
        sampled = user.predictor.sample(
            scene, *library_pokes(POKE), pixels_to_normalised(QUERIES, SIZE), 2, 3,
            camera_static=False,
        )  # fmt: skip
        np.testing.assert_allclose(drawn, sampled * SCALE, atol=TOLERANCE_PX)
    finally:
        set_parameter("camera_static", True)
        set_parameter("kl_threshold_nats", 0.0)


def test_an_image_is_encoded_once_for_all_requests(user: User) -> None:
    user.client.subscribe(Float64, "/fpt/debug/encode_time_ms")
    encodings = user.client.received["/fpt/debug/encode_time_ms"]

    def heard() -> bool:
        user.send_image(picture())
        return call(user, "predict_flow").success and bool(encodings)

    wait_until(heard)
    header = user.send_image(picture(11))
    assert call(user, "predict_flow", header=header).success
    time.sleep(0.3)
    encodings.clear()
    assert call(user, "segment_moving_part", header=header, pokes=[INSIDE]).success
    assert call(user, "evaluate_pokes", header=header, pokes=[INSIDE]).success
    assert call(user, "predict_flow", header=header).success
    goal = send_goal(user, [], header=header, queries=flat([1, 2]))
    assert wait_for_result(goal).status == GoalStatus.STATUS_SUCCEEDED
    time.sleep(0.3)
    assert not encodings


def test_an_image_may_come_after_the_request_that_names_it(user: User) -> None:
    pixels, header = picture(6), user.header()
    responses: list[Any] = []
    caller = threading.Thread(
        target=lambda: responses.append(
            call(user, "predict_flow", header=header, queries=flat(QUERIES.ravel()))
        )
    )
    caller.start()
    time.sleep(0.3)
    user.send_image(pixels, header)
    caller.join()
    check_distribution(
        responses[0].distribution, header, QUERIES, predicted(user, pixels, NO_POKES)
    )


def test_segment_moving_part_is_the_librarys(user: User) -> None:
    pixels = picture(2)
    header = user.send_image(pixels)
    scene = user.predictor.encode(pixels)
    influence = user.predictor.influence(scene, *library_pokes(POKE), size=DENSE)
    for threshold in (0.0, float(np.float32(np.quantile(influence, 0.8)))):
        response = call(
            user, "segment_moving_part", pokes=poke_list(POKE), threshold=threshold, header=header
        )
        assert response.success, response.message
        assert response.mask.header == response.influence.header == header
        np.testing.assert_allclose(image_to_array(response.influence), influence, atol=1e-4)
        applied = threshold or np.float32(user.predictor.config.kl_threshold)
        assert response.threshold == applied
        mask = image_to_array(response.mask)
        np.testing.assert_array_equal(mask, 255 * (image_to_array(response.influence) > applied))
        expected = user.predictor.moving_part(
            scene, *library_pokes(POKE), size=DENSE, threshold=threshold or None
        )
        assert (mask != 255 * expected).sum() <= 1  # one that equals the threshold
    assert mask.any()
    assert not mask.all()


def test_evaluate_pokes_is_the_librarys_for_each_hypothesis(user: User) -> None:
    pixels = picture(3)
    header = user.send_image(pixels)
    both = Pokes(np.array([[5.0, 40.0], [50.0, 9.0]]), np.array([[3.0, 3.0], [-8.0, 0.0]]))
    hypotheses = [POKE, both, NO_POKES, OTHER_POKE]
    response = call(
        user,
        "evaluate_pokes",
        pokes=[poke for pokes in hypotheses for poke in poke_list(pokes)],
        sizes=[len(pokes) for pokes in hypotheses],
        queries=flat(QUERIES.ravel()),
    )
    assert response.success, response.message
    for msg, pokes in zip(response.distributions, hypotheses, strict=True):
        check_distribution(msg, header, QUERIES, predicted(user, pixels, pokes))
    # without sizes each poke is a hypothesis of its own; more than go through the model at once
    many = Pokes(np.tile(POKE.xy, (80, 1)), np.linspace((-9, 5), (9, -5), 80))
    response = call(
        user, "evaluate_pokes", pokes=poke_list(many), queries=flat(QUERIES[:2].ravel())
    )
    assert len(response.distributions) == 80
    for i in (0, 63, 64, 79):
        alone = predicted(user, pixels, Pokes(many.xy[i : i + 1], many.flow[i : i + 1]))
        check_distribution(response.distributions[i], header, QUERIES[:2], alone[:2])


OUTSIDE = Poke(x=64.0, y=3.0, dx=1.0)
NOT_FINITE = Poke(x=5.0, y=3.0, dx=float("inf"))
INSIDE = Poke(x=5.0, y=3.0, dx=1.0)


@pytest.mark.parametrize(
    ("service", "fields", "words"),
    [
        ("predict_flow", {"pokes": [INSIDE, OUTSIDE]}, ("poke 1 of 2", "x=64", "64 x 48")),
        ("predict_flow", {"pokes": [NOT_FINITE]}, ("poke 0 of 1", "dx=inf")),
        ("predict_flow", {"pokes": [INSIDE] * 129}, ("129 pokes", "at most 128")),
        ("predict_flow", {"queries": flat([1, 2, 3])}, ("3 values",)),
        ("predict_flow", {"queries": flat([1, 48])}, ("query 0 of 1", "y=48")),
        ("predict_flow", {"queries": flat(np.ones(802))}, ("401 queries", "at most 400")),
        ("segment_moving_part", {"pokes": [OUTSIDE]}, ("poke 0 of 1", "x=64")),
        ("segment_moving_part", {"threshold": -1.0}, ("threshold", "-1")),
        ("segment_moving_part", {"threshold": float("nan")}, ("threshold", "nan")),
        ("evaluate_pokes", {}, ("no hypotheses",)),
        ("evaluate_pokes", {"pokes": [INSIDE] * 3, "sizes": [1, 1]}, ("add up to 2", "3 pokes")),
        (
            "evaluate_pokes",
            {"pokes": [INSIDE] * 130, "sizes": [1, 129]},
            ("hypothesis 1 of 2 has 129", "at most 128"),
        ),
        (
            "evaluate_pokes",
            {"pokes": [INSIDE] * 3, "queries": flat(np.ones(400))},
            ("200 queries times 3 make 600", "at most 400"),
        ),
    ],
)
def test_wrong_requests_are_answered_with_the_reason(
    user: User, service: str, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    user.send_image(picture())
    response = call(user, service, **fields)
    assert not response.success
    assert all(word in response.message for word in words), response.message
    user.expect_error(service, *words)
    assert call(user, "predict_flow").success


@pytest.mark.parametrize("age_s", [60.0, -60.0])
def test_an_image_that_is_not_held_is_named_in_the_answer(user: User, age_s: float) -> None:
    user.send_image(picture())
    header = user.header(age_s)
    response = call(user, "predict_flow", header=header)
    assert not response.success
    stamp = f"{header.stamp.sec}.{header.stamp.nanosec:09d}"
    assert f"the image with stamp {stamp} s is not held" in response.message
    assert " are held, from " in response.message


def test_an_unreadable_image_is_named_in_the_answer(user: User) -> None:
    msg = Image(header=user.header(), height=4, width=4, encoding="yuv9")
    user.client.publish("/image", msg)
    response = call(user, "predict_flow", header=msg.header)
    assert not response.success
    assert "the image cannot be read" in response.message
    assert "'yuv9'" in response.message
    user.send_image(picture())


def test_two_clients_of_each_service_at_once(user: User) -> None:
    pixels = picture(4)
    header = user.send_image(pixels)
    scene = user.predictor.encode(pixels)

    def use(client: Client, service: str, pokes: Pokes) -> None:
        expected = predicted(user, pixels, pokes)
        influence = user.predictor.influence(scene, *library_pokes(pokes), size=DENSE)
        points = {} if service == "segment_moving_part" else {"queries": flat(QUERIES.ravel())}
        for _ in range(4):
            response = call(user, service, client, header=header, pokes=poke_list(pokes), **points)
            assert response.success, response.message
            if service == "predict_flow":
                check_distribution(response.distribution, header, QUERIES, expected)
            elif service == "evaluate_pokes":
                check_distribution(response.distributions[0], header, QUERIES, expected)
            else:
                found = image_to_array(response.influence)
                np.testing.assert_allclose(found, influence, atol=1e-4)

    with (
        Client(user.domain, "first") as first,
        Client(user.domain, "second") as second,
        ThreadPoolExecutor() as pool,
    ):
        used = [
            pool.submit(use, client, service, pokes)
            for client, pokes in ((first, POKE), (second, OTHER_POKE))
            for service in SERVICES
        ]
        for future in used:
            future.result()


def test_a_client_that_goes_away_does_no_harm(user: User) -> None:
    user.send_image(picture())
    for _ in range(3):
        with Client(user.domain, "impatient") as client:
            service = client.node.create_client(EvaluatePokes, "/fpt/evaluate_pokes")
            assert service.wait_for_service(30.0)
            pokes = [INSIDE] * 100
            service.call_async(EvaluatePokes.Request(pokes=pokes, queries=flat(np.ones(8))))
            time.sleep(0.02)
    assert call(user, "predict_flow").success


# --- action --------------------------------------------------------------------------------------


def wait_for_result(handle: Any) -> Any:
    future = handle.get_result_async()
    wait_until(future.done, explain=lambda: "no result")
    return future.result()


def send_goal(user: User, feedback: list[Any], **fields: Any) -> Any:
    return user.client.send_goal(
        SampleFlow, "/fpt/sample_flow", SampleFlow.Goal(**fields), feedback.append
    )


def test_sample_flow_is_the_librarys_and_tells_how_far_it_is(user: User) -> None:
    pixels = picture(5)
    header = user.send_image(pixels)
    feedback: list[Any] = []
    handle = send_goal(
        user,
        feedback,
        pokes=poke_list(POKE),
        queries=flat(QUERIES.ravel()),
        samples=3,
        seed=7,
        header=header,
    )
    result = wait_for_result(handle)
    assert (result.status, result.result.message) == (GoalStatus.STATUS_SUCCEEDED, "")
    msg = result.result.samples
    assert (msg.header, msg.image_height, msg.image_width) == (header, HEIGHT, WIDTH)
    queries, flow = samples_from_msg(msg)
    np.testing.assert_allclose(queries, QUERIES, atol=1e-4)
    scene = user.predictor.encode(pixels)
    expected = user.predictor.sample(
        scene, *library_pokes(POKE), pixels_to_normalised(QUERIES, SIZE), num_samples=3, seed=7
    )
    np.testing.assert_allclose(flow, expected * SCALE, atol=5 * TOLERANCE_PX)
    wait_until(lambda: bool(feedback) and feedback[-1].done == 3)
    assert [f.done for f in feedback] == sorted(f.done for f in feedback)
    assert {f.count for f in feedback} == {3}


def test_cancel_ends_a_goal_while_images_and_other_goals_are_answered(user: User) -> None:
    user.send_image(picture())
    feedback: list[Any] = []
    many = np.tile([5.0, 5.0], (400, 1)).ravel()
    long = send_goal(user, feedback, queries=flat(many))
    short = send_goal(user, [], queries=flat(QUERIES.ravel()))
    wait_until(lambda: len(feedback) > 1)
    assert wait_for_result(short).status == GoalStatus.STATUS_SUCCEEDED
    header = user.send_image(picture(7))
    assert call(user, "predict_flow", header=header).success
    cancelled = long.cancel_goal_async()
    wait_until(cancelled.done)
    assert len(cancelled.result().goals_canceling) == 1
    result = wait_for_result(long)
    assert result.status == GoalStatus.STATUS_CANCELED
    assert result.result.message == "cancelled"
    assert max(f.done for f in feedback) < 400
    user.diagnostics(lambda values: values.get("sample_flow cancelled") == "1")


def test_a_wrong_goal_is_aborted_with_the_reason(user: User) -> None:
    user.send_image(picture())
    for fields, words in (
        ({"pokes": [OUTSIDE]}, "poke 0 of 1 at x=64"),
        ({"samples": 500, "queries": flat([1, 2])}, "1 queries times 500 make 500"),
        (
            {"samples": 300, "queries": flat([1, 2]), "pokes": [Poke(x=1.0, y=2.0)] * 2},
            "2 pokes times 300 samples make 600, expected at most 400",
        ),
    ):
        result = wait_for_result(send_goal(user, [], **fields))
        assert result.status == GoalStatus.STATUS_ABORTED
        assert words in result.result.message
        user.expect_error("sample_flow", words)


def test_requests_are_answered_in_each_state_of_the_node(user: User) -> None:
    def change(transition: int) -> None:
        request = ChangeState.Request(transition=Transition(id=transition))
        assert user.client.call(ChangeState, "/fpt/change_state", request).success

    header = user.send_image(picture())
    many = np.tile([5.0, 5.0], (400, 1)).ravel()
    feedback: list[Any] = []
    handle = send_goal(user, feedback, queries=flat(many))
    wait_until(lambda: bool(feedback))
    change(Transition.TRANSITION_DEACTIVATE)
    result = wait_for_result(handle)
    assert result.status == GoalStatus.STATUS_ABORTED
    assert "stopped before it could answer" in result.result.message
    for state, transition in (
        ("inactive", Transition.TRANSITION_CLEANUP),
        ("unconfigured", Transition.TRANSITION_CONFIGURE),
    ):
        response = call(user, "predict_flow", header=header)
        assert (response.success, response.message) == (
            False,
            f"the node is {state}, expected active",
        )
        change(transition)
    change(Transition.TRANSITION_ACTIVATE)
    response = call(user, "predict_flow")  # a new life: nothing of the old one is left
    assert (response.success, response.message) == (False, "no image was received")

    def answered() -> bool:
        user.send_image(picture())
        return bool(call(user, "predict_flow").success)

    wait_until(answered)


# --- topics for users and operators --------------------------------------------------------------


def test_info_reaches_who_comes_late(user: User) -> None:
    user.client.subscribe(ModelInfo, "/fpt/info", LATCHED)
    info = user.client.next("/fpt/info")
    config = user.predictor.config
    assert (info.model_name, info.licence) == ("fpt-test", "MIT")
    assert (info.dims, info.components, info.image_size) == (2, 4, 64)
    assert (info.horizon_s, info.kl_threshold) == (0.5, np.float32(config.kl_threshold))


@pytest.fixture(scope="module")
def compressed(model: Path) -> Iterator[User]:
    """Of a node that reads compressed images and has markers and a slow grid."""
    parameters = {
        "image_transport": "compressed",
        "stuck_after_s": 0.1,
        "marker_lifetime_s": 2.5,
        "qos_overrides./cam/compressed.subscription.reliability": "reliable",
    }
    with running_node(model, ["image:=/cam"], **parameters) as user:
        client = user.client
        client.subscribe(FlowDistribution, "/fpt/distribution")
        client.subscribe(MarkerArray, "/fpt/markers")
        client.subscribe(Float64, "/fpt/debug/encode_time_ms")
        client.subscribe(Float64, "/fpt/debug/pipeline_latency_ms")
        client.advertise(CompressedImage, "/cam/compressed", 1)
        client.advertise(PokeArray, "/pokes")
        client.advertise(QueryArray, "/queries")
        client.advertise(CameraInfo, "/camera_info", SENSOR_QOS)

        def connected() -> bool:
            send_compressed(user, picture())
            user.send_queries(np.zeros((0, 2)))
            user.send_pokes(NO_POKES)
            time.sleep(0.2)
            return all(
                client.received[f"/fpt/{topic}"]
                for topic in (
                    "distribution",
                    "markers",
                    "debug/encode_time_ms",
                    "debug/pipeline_latency_ms",
                )
            )

        wait_until(connected, 60.0)
        yield user


def send_compressed(
    user: User, pixels: np.ndarray, kind: str = "png", age_s: float = 0.0
) -> CompressedImage:
    done, data = cv2.imencode(f".{kind}", pixels[..., ::-1])
    assert done
    msg = CompressedImage(header=user.header(age_s), format=kind, data=flat_array("B", data))
    user.client.publish("/cam/compressed", msg)
    return msg


def test_compressed_images_are_answered_as_their_pixels(compressed: User) -> None:
    pixels = picture(8)
    msg = send_compressed(compressed, pixels)
    compressed.expect_distribution(msg.header, compressed.expected(pixels, NO_POKES))
    msg = send_compressed(compressed, pixels, "jpg")
    decoded = image_to_rgb(msg)
    assert np.abs(decoded.astype(int) - pixels).max() > 0
    compressed.expect_distribution(msg.header, compressed.expected(decoded, NO_POKES))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ("begins with b''", "JPEG or PNG")),
        (b"GIF89a", ("GIF89a", "JPEG or PNG")),
        (b"\xff\xd8\xff" + b"\0" * 40, ("JPEG", "43 bytes")),
    ],
)
def test_bad_compressed_images_are_named(
    compressed: User, data: bytes, words: tuple[str, ...]
) -> None:
    compressed.client.received["/diagnostics"].clear()
    msg = CompressedImage(header=compressed.header(), format="png")
    msg.data = flat_array("B", np.frombuffer(data, np.uint8))
    compressed.client.publish("/cam/compressed", msg)
    compressed.expect_error("image", *words)
    msg = send_compressed(compressed, picture(9))
    compressed.expect_distribution(msg.header, compressed.expected(picture(9), NO_POKES))


def test_latencies_are_published_and_told(compressed: User) -> None:
    send_compressed(compressed, picture())
    for name in ("encode_time", "pipeline_latency"):
        times = [m.data for m in compressed.client.received[f"/fpt/debug/{name}_ms"]]
        assert times
        assert all(value > 0 for value in times)
    # from the stamp on, not from when the image came
    compressed.client.received["/fpt/debug/pipeline_latency_ms"].clear()
    send_compressed(compressed, picture(), age_s=5.0)
    compressed.client.next("/fpt/debug/pipeline_latency_ms", lambda m: m.data >= 5000)
    values = values_of(compressed.diagnostics(lambda values: True))
    assert values["encode time"].split()[1:3] == ["ms,", "median"]
    latest = {name: float(values[f"{name} time"].split()[0]) for name in ("processing", "overhead")}
    assert 0 < latest["overhead"] < latest["processing"]
    assert values["sample time"] == "n/a"


def displayed(messages: list[MarkerArray]) -> dict[tuple[str, int], Marker]:
    """What RViz shows after these messages."""
    shown: dict[tuple[str, int], Marker] = {}
    for marker in (marker for msg in messages for marker in msg.markers):
        if marker.action == Marker.ADD:
            shown[marker.ns, marker.id] = marker
        else:
            assert marker.action == Marker.DELETE
            del shown[marker.ns, marker.id]  # only what is there
    return shown


def test_markers_have_stable_ids_and_what_is_gone_is_deleted(compressed: User) -> None:
    client = compressed.client

    def display(
        pokes: Pokes, queries: np.ndarray, info: CameraInfo | None = None
    ) -> tuple[dict[tuple[str, int], Marker], FlowMixture]:
        if info is not None:
            client.publish("/camera_info", info)
        compressed.send_pokes(pokes)
        compressed.send_queries(queries)
        time.sleep(0.3)  # three topics: what is sent on one may overtake the others
        header = send_compressed(compressed, picture(10)).header
        client.next("/fpt/markers", lambda msg: msg.markers[-1].header == header)
        shown = displayed(list(client.received["/fpt/markers"]))
        assert all(marker.header == header for marker in shown.values())
        return shown, predicted(compressed, picture(10), pokes, queries)

    first, mixture = display(POKE, QUERIES)
    visible = {4 * query + k for query, k in np.argwhere(mixture.weights >= 0.05).tolist()}
    assert {i for ns, i in first if ns == "covariances"} == visible
    assert {i for ns, i in first if ns == "pokes"} == {0}
    for marker in first.values():
        assert (marker.lifetime.sec, marker.lifetime.nanosec) == (2, 500_000_000)
    # nominal geometry: the focal length is the image's width
    centre = np.array([(WIDTH - 1) / 2, (HEIGHT - 1) / 2])
    arrow = first["pokes", 0]
    assert arrow.type == Marker.ARROW
    for point, xy in zip(arrow.points, (POKE.xy[0], POKE.xy[0] + POKE.flow[0]), strict=True):
        np.testing.assert_allclose((point.x, point.y), (xy - centre) / WIDTH, atol=1e-9)
        assert point.z == 1.0

    for (ns, i), marker in first.items():  # modes and their ellipses
        if ns == "pokes":
            continue
        query, k = divmod(i, 4)
        weight, mean = mixture.weights[query, k], mixture.means[query, k]
        tip = (QUERIES[query] + mean - centre) / WIDTH
        if ns == "modes":
            assert marker.color.a == pytest.approx(weight, abs=1e-3)
            np.testing.assert_allclose((marker.points[1].x, marker.points[1].y), tip, atol=1e-3)
            continue
        pose, scale = marker.pose, marker.scale
        np.testing.assert_allclose((pose.position.x, pose.position.y), tip, atol=1e-3)
        angle = 2 * np.arctan2(pose.orientation.z, pose.orientation.w)
        axis = np.array([np.cos(angle), np.sin(angle)])
        deviation = np.sqrt(axis @ mixture.component_covariances()[query, k] @ axis)
        # two standard deviations to either side
        np.testing.assert_allclose(scale.x, 4 * deviation / WIDTH, rtol=0.02, atol=1e-3)
        assert scale.x >= scale.y

    # fewer queries, no pokes: theirs keep their ids, the others are deleted
    second, _ = display(NO_POKES, QUERIES[:1])
    assert {ns for ns, i in second} <= {"modes", "covariances"}
    assert all(i < 4 for ns, i in second)
    assert {i for ns, i in first if ns == "covariances" and i < 4} & {i for ns, i in second}

    # with intrinsics each pixel lies on its ray
    p = [100.0, 0, 30.0, 0, 0, 120.0, 20.0, 0, 0, 0, 1.0, 0]
    third, _ = display(POKE, QUERIES, CameraInfo(height=HEIGHT, width=WIDTH, p=p))
    assert third["pokes", 0].points[0] == Point(x=(20.0 - 30) / 100, y=(10.0 - 20) / 120, z=1.0)


def test_a_stage_that_is_stuck_is_reported_while_it_is(model: Path) -> None:
    with running_node(model, stuck_after_s=0.1, dense_height=1024, dense_width=1024) as user:
        client = user.client
        client.subscribe(Image, "/fpt/flow")
        client.advertise(Image, "/image", SENSOR_QOS)

        def stuck() -> bool:
            user.send_image(picture())
            time.sleep(0.1)
            return any(
                m.status[0].level == DiagnosticStatus.ERROR
                and m.status[0].message.startswith("stuck: dense has been at work for ")
                for m in client.received["/diagnostics"]
            )

        wait_until(stuck)
        last = client.received["/diagnostics"][-1].status[0]
        assert values_of(last)["at work"].startswith("dense, for ")
        client.next("/fpt/flow", timeout_s=120.0)
        user.diagnostics(lambda values: values["at work"] == "n/a")
        # and a node that is told to end amid work, with requests unanswered, ends well
        service = client.node.create_client(PredictFlow, "/fpt/predict_flow")
        assert service.wait_for_service(30.0)
        many = np.tile([5.0, 5.0], (2000, 1)).ravel()
        send_goal(user, [], queries=flat(many))
        user.send_image(picture(1))
        for _ in range(3):
            service.call_async(PredictFlow.Request())
        user.diagnostics(lambda values: "predict_flow received" in values)


def test_random_transitions_under_traffic(model: Path, tmp_path: Path) -> None:
    """A short run of the lifecycle part of benchmarks/soak_node.py, which says what is checked."""
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "soak_node.py", "--model", model),
            *("--seconds", "0", "--transitions", "200", "--rate", "20", "--threads", "1"),
            *("--width", "64", "--height", "48", "--out", tmp_path / "soak.json"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    walked = json.loads((tmp_path / "soak.json").read_text())["lifecycle"]
    assert walked["possible"] + walked["impossible"] == 200
    assert walked["impossible"] > 20
    assert walked["memory last MB"] - walked["memory half-way MB"] < 40
