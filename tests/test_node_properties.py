# SPDX-License-Identifier: MIT
"""Whatever a message holds, it is converted or refused with a reason, and the node lives on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import cv2
import numpy as np
import pytest
import rclpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from node_harness import save_small_model, wait_until
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header
from visualization_msgs.msg import MarkerArray

from fpt_msgs.action import SampleFlow
from fpt_msgs.msg import FlowDistribution, FlowSamples, Poke, PokeArray, QueryArray
from fpt_msgs.srv import EvaluatePokes, PredictFlow, SegmentMovingPart
from fpt_ros.environment import claim_domain_id
from fpt_ros.history import HeldImage
from fpt_ros.images import (
    ENCODINGS,
    ImageError,
    array_to_image,
    flat_array,
    image_to_array,
    image_to_rgb,
)
from fpt_ros.inbox import MAX_REQUESTS, Batch, Request
from fpt_ros.inference_node import FptNode
from fpt_ros.messages import (
    distribution_from_msg,
    pokes_to_msg,
    queries_to_msg,
    read_pokes,
    read_queries,
    samples_from_msg,
)
from fpt_ros.pipeline import Settings
from fpt_ros.pokes import Pokes, RequestError

# the same examples on each run: a failure must be the change's that is tested
settings.register_profile(
    "fpt",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fpt")

HEIGHT, WIDTH = 12, 16

any_float = st.floats(width=32)
float_in_image = st.floats(-0.5, 11.5, width=32)
any_coordinate = float_in_image | any_float
any_poke = st.builds(Poke, x=any_coordinate, y=any_coordinate, dx=any_float, dy=any_float)
good_poke = st.builds(
    Poke,
    x=float_in_image,
    y=float_in_image,
    dx=st.floats(width=32, allow_nan=False, allow_infinity=False),
    dy=st.floats(-50, 50, width=32),
)
any_pokes = st.lists(good_poke, max_size=5) | st.lists(any_poke, max_size=10)
any_floats = (
    st.lists(st.tuples(float_in_image, float_in_image), max_size=4).map(lambda p: np.ravel(p))
    | st.lists(float_in_image, max_size=8)
    | st.lists(any_coordinate, max_size=24)
)
any_queries = any_floats.map(lambda values: flat_array("f", np.array(values, np.float32)))
byte_array = st.binary(max_size=400).map(lambda b: flat_array("B", np.frombuffer(b, np.uint8)))
any_image = st.builds(
    Image,
    height=st.integers(0, 12) | st.integers(0, 2**32 - 1),
    width=st.integers(0, 12) | st.integers(0, 2**32 - 1),
    step=st.integers(0, 40) | st.integers(0, 2**32 - 1),
    encoding=st.sampled_from([*ENCODINGS, "bayer_rggb8", "yuv422"]) | st.text(max_size=8),
    is_bigendian=st.integers(0, 255),
    data=byte_array,
)


@st.composite
def damaged_files(draw: st.DrawFn) -> CompressedImage:
    """Real JPEG or PNG data with some bytes changed and the end cut off."""
    kind = draw(st.sampled_from(["jpg", "png"]))
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    data = bytearray(cv2.imencode(f".{kind}", pixels)[1].tobytes())
    for place in draw(st.lists(st.integers(0, len(data) - 1), max_size=4)):
        if not 16 <= place < 24:  # a PNG's width and height: gigabytes are no property of ours
            data[place] = draw(st.integers(0, 255))
    data = data[: draw(st.integers(0, len(data)))]
    return CompressedImage(
        format=draw(st.text(max_size=8)), data=flat_array("B", np.frombuffer(data, np.uint8))
    )


any_compressed = damaged_files() | st.builds(CompressedImage, format=st.text(), data=byte_array)


# --- conversion ----------------------------------------------------------------------------------


@given(any_image | any_compressed)
def test_an_image_becomes_pixels_or_an_error(msg: Image | CompressedImage) -> None:
    try:
        pixels = image_to_rgb(msg)
    except ImageError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    if isinstance(msg, Image):
        assert pixels.shape[:2] == (msg.height, msg.width)


@given(any_pokes)
def test_pokes_come_back_or_are_refused(pokes: list[Poke]) -> None:
    values = np.array([(p.x, p.y, p.dx, p.dy) for p in pokes]).reshape(-1, 4)
    try:
        read = read_pokes(pokes)
    except RequestError:
        assert not np.isfinite(values).all()
        return
    np.testing.assert_array_equal(np.hstack([read.xy, read.flow]), values)
    again = read_pokes(pokes_to_msg(Pokes(read.xy, read.flow), Header()).pokes)
    np.testing.assert_array_equal(again.flow, read.flow)


@given(any_queries)
def test_queries_come_back_or_are_refused(values: Any) -> None:
    try:
        read = read_queries(values)
    except RequestError:
        assert len(values) % 2 or not np.isfinite(values).all()
        return
    if read is None:
        assert len(values) == 0
    else:
        assert queries_to_msg(read, Header()).xy == values


small = st.integers(0, 4) | st.integers(0, 255)
large = st.integers(0, 4) | st.integers(0, 2**32 - 1)


@given(
    st.builds(
        FlowDistribution,
        count=large,
        components=small,
        dims=small,
        queries=any_queries,
        weights=any_queries,
        means=any_queries,
        scale_tril=any_queries,
    )
)
def test_a_distribution_is_read_or_refused(msg: FlowDistribution) -> None:
    try:
        queries, mixture = distribution_from_msg(msg)
    except RequestError:
        return
    assert queries.shape == (msg.count, 2)
    assert mixture.means.shape == (msg.count, msg.components, msg.dims)


@given(
    st.builds(
        FlowSamples,
        samples=large,
        count=large,
        dims=small,
        queries=any_queries,
        flow=any_queries,
    )
)
def test_samples_are_read_or_refused(msg: FlowSamples) -> None:
    try:
        _, flow = samples_from_msg(msg)
    except RequestError:
        return
    assert flow.shape == (msg.samples, msg.count, msg.dims)


# --- the node in this process --------------------------------------------------------------------


class Running:
    """A real node and a subscriber of all of its outputs; what is put in takes the node's way."""

    def __init__(self, node: FptNode) -> None:
        self.node = node

    def send_image(self, msg: Image | CompressedImage) -> None:
        self.node._on_image(msg)

    def send(self, kind: str, msg: PokeArray | QueryArray) -> None:
        self.node._on_command(kind, msg)

    def ask(self, kind: str, msg: Any) -> Any:
        """The response, or the reason why there is none."""
        answers: Queue = Queue()
        worker = self.node._worker
        assert worker is not None
        worker.put(Request(kind, msg, done=answers.put))
        return answers.get(timeout=60)

    def check(self) -> None:
        """It answers, and no error was one that nobody thought of."""
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        self.send_image(array_to_image(pixels, "rgb8", header(1)))
        response = self.ask("predict_flow", PredictFlow.Request(header=header(1)))
        assert isinstance(response, PredictFlow.Response), response
        assert "internal" not in self.node._monitor._last_error
        assert self.node._monitor._counts["errors: internal"] == 0, self.node._monitor._last_error


def header(sec: int) -> Header:
    result = Header(frame_id="camera")
    result.stamp.sec = sec
    return result


@contextmanager
def configured(folder: Path) -> Iterator[FptNode]:
    """A node that is not active yet, and a subscriber of its outputs."""
    model = save_small_model(folder / "fpt-test.safetensors")
    domain, claim = claim_domain_id()
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain)
    values: dict[str, Any] = {
        "autostart": False,
        "model": str(model),
        "threads": 1,
        "max_age_ms": 0.0,
        "max_queries": 60,
        "dense_height": 3,
        "dense_width": 4,
        "query_grid_height": 2,
        "query_grid_width": 2,
    }
    overrides = [Parameter(name, value=value) for name, value in values.items()]
    node = FptNode(context=context, parameter_overrides=overrides)
    listener = rclpy.create_node("listener", context=context)
    with claim:
        try:
            assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
            for name in ("flow", "flow_color", "mask", "influence", "overlay"):
                listener.create_subscription(Image, f"/fpt/{name}", print, 1)
            listener.create_subscription(FlowDistribution, "/fpt/distribution", print, 1)
            listener.create_subscription(MarkerArray, "/fpt/markers", print, 1)
            wait_until(lambda: all(p.get_subscription_count() for p, _ in node._outputs))
            yield node
        finally:
            node.destroy_node()
            listener.destroy_node()
            rclpy.shutdown(context=context)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with configured(tmp_path_factory.mktemp("model")) as node:
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        running = Running(node)
        yield running
        running.check()
        assert node._monitor._counts["answers"] > 100


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[FptNode]:
    """A node whose worker has no thread: what is put in is processed when a test says so."""
    with configured(tmp_path) as node:
        yield node


def floats_of(answer: Any) -> Iterator[np.ndarray]:
    """All numbers of a response that the model has made."""
    if isinstance(answer, PredictFlow.Response):
        yield np.array(answer.distribution.means)
        yield np.array(answer.distribution.scale_tril)
    elif isinstance(answer, EvaluatePokes.Response):
        yield from (np.array(distribution.means) for distribution in answer.distributions)
    elif isinstance(answer, SegmentMovingPart.Response):
        yield image_to_array(answer.influence)
    elif isinstance(answer, SampleFlow.Result):
        yield np.array(answer.samples.flow)


any_header = st.sampled_from([header(0), header(1)])


@given(st.data())
def test_no_message_stops_the_node(running: Running, data: st.DataObject) -> None:
    image = data.draw(any_image | any_compressed)
    image.header = header(data.draw(st.integers(2, 9)))
    running.send_image(image)
    running.send("pokes", PokeArray(header=data.draw(any_header), pokes=data.draw(any_pokes)))
    running.send("queries", QueryArray(header=data.draw(any_header), xy=data.draw(any_queries)))
    running.check()


any_request = (
    st.builds(PredictFlow.Request, header=any_header, pokes=any_pokes, queries=any_queries).map(
        lambda msg: ("predict_flow", msg, PredictFlow.Response)
    )
    | st.builds(
        SegmentMovingPart.Request,
        header=any_header,
        pokes=any_pokes,
        threshold=any_float | st.floats(0, 1, width=32),
    ).map(lambda msg: ("segment_moving_part", msg, SegmentMovingPart.Response))
    | st.builds(
        EvaluatePokes.Request,
        header=any_header,
        pokes=any_pokes,
        sizes=st.just([])
        | st.just([1])
        | st.lists(st.integers(0, 3), max_size=4)
        | st.lists(st.integers(0, 2**32 - 1), max_size=4),
        queries=any_queries,
    ).map(lambda msg: ("evaluate_pokes", msg, EvaluatePokes.Response))
    | st.builds(
        SampleFlow.Goal,
        header=any_header,
        pokes=any_pokes,
        queries=any_queries,
        samples=st.integers(0, 3) | st.integers(0, 2**32 - 1),
        seed=st.integers(0, 2**64 - 1),
    ).map(lambda msg: ("sample_flow", msg, SampleFlow.Result))
)


@settings(max_examples=120)
@given(any_request)
def test_each_request_is_answered_or_refused(
    running: Running, request_of_a_kind: tuple[str, Any, type]
) -> None:
    kind, msg, response_type = request_of_a_kind
    running.check()
    answer = running.ask(kind, msg)
    assert isinstance(answer, RequestError | response_type)
    assert "internal error" not in str(answer)
    assert all(np.isfinite(values).all() for values in floats_of(answer))
    running.check()


# --- the worker, step by step --------------------------------------------------------------------


def black(head: Header) -> Image:
    return array_to_image(np.zeros((HEIGHT, WIDTH, 3), np.uint8), "rgb8", head)


def test_an_image_that_came_young_is_answered_however_long_its_encoding_takes(
    idle: FptNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle.set_parameters([Parameter("max_age_ms", value=1000.0)])
    worker, predictor = idle._worker, idle._predictor
    assert worker is not None
    assert predictor is not None
    encode = predictor.encode

    def slowly(pixels: np.ndarray) -> Any:
        time.sleep(1.2)
        return encode(pixels)

    monkeypatch.setattr(predictor, "encode", slowly)
    now = Header(stamp=idle.get_clock().now().to_msg(), frame_id="camera")
    worker.process(Batch([HeldImage(black(now))], 0, [], woken=False))
    assert idle._monitor.counts["answers"] == 1
    worker.process(Batch([], 0, [], woken=True))  # by now it is too old
    assert idle._monitor.counts["answers"] == 1


def test_an_image_without_a_stamp_gets_old_from_when_it_came(idle: FptNode) -> None:
    idle.set_parameters([Parameter("max_age_ms", value=1000.0)])
    worker = idle._worker
    assert worker is not None
    worker.process(Batch([HeldImage(black(Header()))], 0, [], woken=False))
    assert idle._monitor.counts["answers"] == 1
    time.sleep(1.1)
    worker.process(Batch([], 0, [], woken=True))
    assert idle._monitor.counts["answers"] == 1


def test_pokes_outside_a_picture_not_yet_read_replace_none(idle: FptNode) -> None:
    idle.set_parameters([Parameter("max_age_ms", value=1000.0)])
    worker = idle._worker
    assert worker is not None
    inside, outside = (PokeArray(pokes=[Poke(x=x, y=1.0, dx=1.0)]) for x in (1.0, 5000.0))
    old = Header()
    old.stamp.sec = 1  # too old to be read
    requests = [Request("pokes", msg) for msg in (inside, outside)]
    worker.process(Batch([HeldImage(black(old))], 0, requests, woken=False))
    assert worker._standing.pokes is not None
    assert worker._standing.pokes.xy[0, 0] == 1
    assert "x=5000" in idle._monitor._last_error

    worker.process(
        Batch([HeldImage(Image(header=old))], 0, [Request("pokes", inside)], woken=False)
    )
    assert idle._monitor.counts["errors: pokes"] == 1  # the picture has no size to be outside of
    assert "errors: internal" not in idle._monitor.counts


def test_the_latest_of_named_and_standing_pokes_holds_and_images_are_answered_once(
    idle: FptNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = idle._worker
    assert worker is not None
    asked: list[list[float]] = []
    monkeypatch.setattr(
        worker, "_answer", lambda held: asked.append(worker._asked(held)[0].flow[:, 0].tolist())
    )

    def push(dx: float, of: Header) -> Request:
        return Request("pokes", PokeArray(header=of, pokes=[Poke(x=3.0, y=4.0, dx=dx)]))

    now = Header(stamp=idle.get_clock().now().to_msg())
    queries = Request("queries", QueryArray(header=now))
    worker.process(Batch([HeldImage(black(now))], 0, [push(3.0, now), queries], woken=False))
    worker.process(Batch([], 0, [push(7.0, Header())], woken=False))
    worker.process(Batch([], 0, [push(5.0, now)], woken=False))
    worker.process(Batch([], 0, [Request("pokes", PokeArray())], woken=False))
    assert asked == [[3.0], [7.0], [5.0], []]


def test_the_newest_image_is_not_meant_when_it_is_too_old(idle: FptNode) -> None:
    """Unless it is named: then it is answered however old it is."""
    idle.set_parameters([Parameter("max_age_ms", value=1000.0)])
    worker = idle._worker
    assert worker is not None
    answers: dict[str, Any] = {}
    requests = [
        Request(
            "predict_flow",
            PredictFlow.Request(header=of),
            done=partial(answers.__setitem__, name),
            arrived_s=time.monotonic() - 2,  # so they wait for no newer one
        )
        for name, of in (("newest", Header()), ("named", header(1)))
    ]
    worker.process(Batch([HeldImage(black(header(1)))], 0, requests, woken=False))
    worker.work_off(time.monotonic() + 60)
    assert "max_age_ms is 1000; name it by its stamp" in str(answers["newest"])
    assert isinstance(answers["named"], PredictFlow.Response), answers["named"]


def test_answers_are_made_as_the_parameters_say(idle: FptNode) -> None:
    values = {
        "camera_static": False,
        "flow_reduce": "mode",
        "dense_height": 6,
        "dense_width": 8,
        "query_grid_height": 2,
        "query_grid_width": 3,
        "full_resolution": False,
        "kl_threshold_nats": 0.25,
    }
    results = idle.set_parameters([Parameter(name, value=v) for name, v in values.items()])
    assert all(result.successful for result in results)
    assert idle._worker is not None
    assert idle._worker._settings() == Settings(False, "mode", (6, 8), (2, 3), False, 0.25)


def test_images_that_a_newer_one_supersedes_are_counted_once(idle: FptNode) -> None:
    worker = idle._worker
    assert worker is not None
    for superseded, dropped in ((2, 2), (4, 6)):  # those that the inbox let go are among them
        images = [HeldImage(black(header(i))) for i in (1, 2, 3)]
        worker.process(Batch(images, superseded, [], woken=False))
        assert idle._monitor.counts["images dropped: newer came first"] == dropped


def test_a_goal_cancelled_before_its_image_came_ends_as_cancelled(idle: FptNode) -> None:
    worker = idle._worker
    assert worker is not None
    answers: list[Any] = []
    wanted = [True]
    asked = Request(
        "sample_flow",
        SampleFlow.Goal(),
        done=answers.append,
        cancelled=lambda: not wanted[0],
        arrived_s=time.monotonic(),
    )
    worker.process(Batch([], 0, [asked], woken=False))
    assert not answers, "no image yet"
    wanted[0] = False
    worker.process(Batch([], 0, [], woken=True))
    assert [str(answer) for answer in answers] == ["cancelled"]
    assert idle._monitor.counts["sample_flow cancelled"] == 1
    assert "errors: sample_flow" not in idle._monitor.counts


def test_a_failure_inside_loses_no_request(idle: FptNode, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, predictor = idle._worker, idle._predictor
    assert worker is not None
    assert predictor is not None
    encode, failures = predictor.encode, ["out of memory"]

    def failing(pixels: np.ndarray) -> Any:
        if failures:
            raise RuntimeError(failures.pop())
        return encode(pixels)

    monkeypatch.setattr(predictor, "encode", failing)
    answers: list[Any] = []
    asked = Request("predict_flow", PredictFlow.Request(header=header(1)), done=answers.append)
    poke = PokeArray(pokes=[Poke(x=3.0, y=4.0, dx=2.0, dy=0.0)])
    worker.process(
        Batch([HeldImage(black(header(1)))], 0, [Request("pokes", poke), asked], woken=False)
    )
    assert "RuntimeError: out of memory" in idle._monitor._last_error
    assert idle._monitor.counts["answers"] == 1, "with the poke that came with the image"
    worker.work_off(time.monotonic() + 60)
    (answer,) = answers
    assert isinstance(answer, PredictFlow.Response), answer


def test_of_too_many_requests_the_oldest_are_refused(idle: FptNode) -> None:
    worker = idle._worker
    assert worker is not None
    answers: dict[int, Any] = {}
    for first in (0, 40):
        requests = [
            Request(
                "predict_flow",
                PredictFlow.Request(header=header(1)),
                done=partial(answers.__setitem__, number),
                arrived_s=time.monotonic(),
            )
            for number in range(first, first + 40)
        ]
        images = [] if first else [black(header(1))]
        worker.process(Batch([HeldImage(image) for image in images], 0, requests, woken=False))
    assert sorted(answers) == list(range(80 - MAX_REQUESTS))
    assert all("more than 64 requests wait" in str(error) for error in answers.values())
    worker.work_off(time.monotonic() + 60)
    assert len(answers) == 80
    assert isinstance(answers[79], PredictFlow.Response)
