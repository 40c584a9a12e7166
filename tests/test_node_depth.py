# SPDX-License-Identifier: MIT
"""The node with a three-dimensional model over the wire: depth in, motion in space out."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builtin_interfaces.msg import Time as Stamp
from geometry_msgs.msg import Quaternion, Transform, TransformStamped, Vector3
from node_harness import (
    SENSOR_QOS,
    Process,
    documented_topics,
    python_module,
    save_small_model,
    wait_until,
)
from node_user import DENSE, HEIGHT, NO_POKES, QUERIES, SETTINGS, WIDTH, User, picture, running_node
from sensor_msgs.msg import CameraInfo, Image, PointCloud2, PointField, RegionOfInterest
from std_msgs.msg import Header
from visualization_msgs.msg import Marker, MarkerArray

from fpt_model import FlowMixture, FlowPredictor, load_model
from fpt_model.depth import Depth, DepthError, Intrinsics
from fpt_model.scene_flow import SceneFlow
from fpt_msgs.msg import FlowDistribution, Poke, PokeArray, QueryArray
from fpt_msgs.srv import PlanPoke, PredictFlow
from fpt_ros.depth import DepthHistory, camera_intrinsics, read_depth
from fpt_ros.history import stamp_ns
from fpt_ros.images import array_to_image, image_to_array
from fpt_ros.messages import distribution_from_msg
from fpt_ros.pipeline import Answer, View, answer_asks, predict_hypotheses, sample_jointly
from fpt_ros.planning import Goal, Search, default_tolerance, motion_in_space, plan
from fpt_ros.pokes import Pokes, RequestError
from fpt_ros.scene_outputs import FIELDS, Rigid, point_cloud
from sim.camera_node import _truth_messages
from sim.simulator import Simulator

FRAME = "camera_optical_frame"
CAMERA = Intrinsics(60.0, 62.0, 31.0, 24.5)
PUSH = Pokes(np.array([[20.0, 10.0]]), np.array([[9.0, -4.0]]), np.array([0.25]))
SIZE = (HEIGHT, WIDTH)


def metres() -> np.ndarray:
    """A slanted wall, with a hole and a zero."""
    depth = np.linspace(1.0, 3.0, HEIGHT * WIDTH, dtype=np.float32).reshape(SIZE)
    depth[20:30, 30:40] = np.nan
    depth[0, 0] = 0
    return depth


def camera_info(**changes: Any) -> CameraInfo:
    p = np.zeros((3, 4))
    p[0, 0], p[1, 1], p[0, 2], p[1, 2], p[2, 2] = *CAMERA.focal, *CAMERA.centre, 1
    info = CameraInfo(header=Header(frame_id=FRAME), height=HEIGHT, width=WIDTH, p=p.ravel())
    for name, value in changes.items():
        setattr(info, name, value)
    return info


def projection(fx: float) -> np.ndarray:
    p = camera_info().p.copy()
    p[0] = fx
    return p


def second_camera() -> np.ndarray:
    p = camera_info().p.copy()
    p[3] = -50
    return p


class DepthUser(User):
    """A user who has a depth camera."""

    def send(
        self,
        pixels: np.ndarray,
        depth: np.ndarray | None = None,
        encoding: str = "32FC1",
        info: CameraInfo | None = None,
        lag_ms: float = 0.0,
        frame_id: str = FRAME,
    ) -> Header:
        """An image after its depth and camera_info."""
        header = self.header()
        info = info or camera_info()
        self.client.publish("/camera_info", info)
        self.wait_for_info(info)
        values = metres() if depth is None else depth
        depth_header = shifted(header, lag_ms)
        depth_header.frame_id = frame_id
        self.client.publish("/depth", array_to_image(values, encoding, depth_header))
        return self.send_image(pixels, header)

    def wait_for_info(self, info: CameraInfo) -> None:
        """It comes on a topic of its own: give it a head start."""
        time.sleep(0.05)

    def solid(self, pixels: np.ndarray, pokes: Pokes, queries: np.ndarray | None = None) -> Answer:
        """What the node must answer with depth."""
        depth = np.where(metres() > 0, metres(), np.float32(np.nan))
        view = View(pixels, self.predictor.encode(pixels), Depth(depth, CAMERA))
        return Answer(self.predictor, view, pokes, queries, SETTINGS)

    def set(self, **values: Any) -> None:
        """Parameters of the node."""
        for name, value in values.items():
            assert self.client.set_parameter("/fpt", name, value).successful


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "fpt-test-3d.safetensors"
    return save_small_model(path, flow_dim=3)


@pytest.fixture(scope="module")
def user(model: Path) -> Iterator[DepthUser]:
    topics = ("image", "depth", "camera_info")
    reliable = {f"qos_overrides./{name}.subscription.reliability": "reliable" for name in topics}
    with running_node(model, depth_wait_ms=1000.0, **reliable) as plain:
        user = DepthUser(plain.client, plain.node, model, plain.domain)
        client = user.client
        client.subscribe(FlowDistribution, "/fpt/distribution")
        client.subscribe(PointCloud2, "/fpt/points")
        for name in ("occlusion", "flow", "mask"):
            client.subscribe(Image, f"/fpt/{name}")
        for kind, topic in (
            (Image, "/image"),
            (Image, "/depth"),
            (CameraInfo, "/camera_info"),
            (PokeArray, "/pokes"),
            (QueryArray, "/queries"),
        ):
            client.advertise(kind, topic)

        def connected() -> bool:
            user.send_pokes(NO_POKES)
            user.send_queries(np.zeros((0, 2)))
            user.send(picture())
            time.sleep(0.2)
            topics = ("distribution", "points", "occlusion", "flow", "mask")
            return all(client.received[f"/fpt/{topic}"] for topic in topics)

        wait_until(connected, 60.0, lambda: f"no connection:\n{user.node.output}")
        yield user


@pytest.fixture(autouse=True)
def forget(request: pytest.FixtureRequest) -> None:
    if "user" in request.fixturenames:
        request.getfixturevalue("user").forget()


def table(msg: PointCloud2) -> np.ndarray:
    """``[rows, columns, 8]``."""
    return np.frombuffer(msg.data, np.float32).reshape(msg.height, msg.width, -1)


# --- over the wire ---------------------------------------------------------------------------


def test_points_are_the_scene_flow_on_the_grid(user: DepthUser) -> None:
    pixels = picture(1)
    user.send_pokes(PUSH)
    header = user.send(pixels)
    expected = user.solid(pixels, PUSH).scene_flow

    def same(msg: PointCloud2) -> bool:
        return np.allclose(table(msg)[..., 3:6].reshape(-1, 3), expected.flow, 0, 1e-4, True)

    msg = user.receive("points", header, same)
    assert msg.header.frame_id == FRAME
    assert [(f.name, f.offset, f.datatype, f.count) for f in msg.fields] == [
        (name, 4 * i, PointField.FLOAT32, 1) for i, name in enumerate(FIELDS)
    ]
    assert FIELDS == ("x", "y", "z", "vx", "vy", "vz", "weight", "std")
    assert (msg.height, msg.width, msg.point_step, msg.row_step) == (*DENSE, 32, 32 * DENSE[1])
    assert (msg.is_bigendian, msg.is_dense) == (False, False)
    found = table(msg).reshape(-1, 8)
    np.testing.assert_allclose(found[:, :3], expected.points, rtol=1e-5)
    np.testing.assert_allclose(found[:, 6], expected.weight, atol=1e-3)
    np.testing.assert_allclose(found[:, 7], expected.std, rtol=1e-2)
    # the cells whose middle is in the hole, and no other, are NaN altogether
    hole = np.isnan(expected.points[:, 2])
    assert 0 < hole.sum() < len(hole) / 4
    np.testing.assert_array_equal(np.isnan(found).all(1), hole)
    np.testing.assert_array_equal(np.isnan(found).any(1), hole)
    assert (found[~hole, 2] > 0.9).all()
    assert ((found[~hole, 6] > 0) & (found[~hole, 6] <= 1)).all()
    assert (found[~hole, 7] > 0).all()
    # a push in depth is another one than in the image alone
    planar = user.solid(pixels, replace(PUSH, dz=np.array([np.nan]))).scene_flow
    assert np.nanmax(np.abs(planar.flow - expected.flow)) > 1e-3


def test_distribution_has_metres_in_depth_where_depth_is(user: DepthUser) -> None:
    pixels = picture(2)
    queries = np.vstack([QUERIES, [[35.0, 25.0]]])  # the last one in the hole
    user.send_pokes(PUSH)
    user.send_queries(queries)
    header = user.send(pixels)
    expected = user.solid(pixels, PUSH, queries).distribution

    def same(msg: FlowDistribution) -> bool:
        means = distribution_from_msg(msg)[1].means
        return means.shape == expected.means.shape and np.allclose(
            means, expected.means, atol=2e-3, equal_nan=True
        )

    msg = user.receive("distribution", header, same)
    assert msg.dims == 3
    mixture = distribution_from_msg(msg)[1]
    assert np.isfinite(mixture.means[:3]).all()
    assert np.isnan(mixture.means[3, :, 2]).all()
    assert np.isnan(mixture.scale_tril[3, :, 2]).all()
    assert np.isfinite(mixture.marginal(2).scale_tril).all()
    np.testing.assert_allclose(mixture.scale_tril[:3], expected.scale_tril[:3], atol=2e-3)


def test_occlusion_covers_the_image(user: DepthUser) -> None:
    pixels = picture(3)
    user.send_pokes(PUSH)
    header = user.send(pixels)
    expected = user.solid(pixels, PUSH).occlusion

    def close(msg: Image) -> bool:
        return float(np.mean((image_to_array(msg) > 0) != expected)) < 0.01

    msg = user.receive("occlusion", header, close)
    assert (msg.encoding, msg.height, msg.width) == ("mono8", HEIGHT, WIDTH)
    assert set(np.unique(image_to_array(msg))) <= {0, 255}
    assert not image_to_array(msg)[20:30, 30:40].any(), "without depth nothing is said"


def test_millimetres_are_metres(user: DepthUser) -> None:
    pixels = picture(4)
    header = user.send(pixels, np.nan_to_num(metres() * 1000).round().astype(np.uint16), "16UC1")
    msg = user.receive("points", header)
    expected = user.solid(pixels, NO_POKES).scene_flow.points
    np.testing.assert_allclose(table(msg)[..., :3].reshape(-1, 3), expected, atol=1e-3)


def test_depth_may_come_a_little_later(user: DepthUser) -> None:
    """An image waits for its depth, while depth keeps coming; then all of it is answered."""
    user.send(picture(5))
    header = user.send_image(picture(6))
    time.sleep(0.3)
    assert not any(m.header == header for m in user.client.received["/fpt/flow"])
    user.client.publish("/depth", array_to_image(metres(), "32FC1", header))
    user.receive("points", header)
    assert user.receive("distribution", header).dims == 3
    status = user.diagnostics(lambda values: values["depth"].startswith("in use"))
    assert {v.key: v.value for v in status.values}["depth"] == "in use, +0 ms from its image"


def test_depth_within_the_slop_is_taken(user: DepthUser) -> None:
    header = user.send(picture(7), lag_ms=-15)
    user.receive("points", header)
    user.diagnostics(lambda values: values["depth"] == "in use, -15 ms from its image")


def shifted(header: Header, lag_ms: float) -> Header:
    ns = stamp_ns(header) + int(lag_ms * 1e6)
    return Header(stamp=Stamp(sec=ns // 10**9, nanosec=ns % 10**9), frame_id=FRAME)


def test_the_nearest_depth_is_taken_though_another_came_first(user: DepthUser) -> None:
    user.send(picture(7))
    header = user.send_image(picture(8))
    for lag_ms in (-15, 0):
        time.sleep(0.1)
        user.client.publish("/depth", array_to_image(metres(), "32FC1", shifted(header, lag_ms)))
    user.receive("points", header)
    user.diagnostics(lambda values: values["depth"] == "in use, +0 ms from its image")


def test_of_images_faster_than_depth_those_with_depth_are_answered(user: DepthUser) -> None:
    """Images at 10 Hz, every second one has depth, that comes 240 ms later."""
    user.send(picture(7))
    user.set(depth_wait_ms=300.0)
    try:
        headers: list[Header] = []
        for i in range(24):
            headers.append(user.send_image(picture(i)))
            time.sleep(0.04)
            if i % 2 == 0 and i > 1:
                user.client.publish("/depth", array_to_image(metres(), "32FC1", headers[i - 2]))
            time.sleep(0.06)
    finally:
        user.set(depth_wait_ms=1000.0)
    answers = [m for m in user.client.received["/fpt/distribution"] if m.header in headers[2:]]
    dims = [m.dims for m in answers]
    assert dims.count(3) >= 8, dims  # of 10


def test_depth_that_always_lags_starves_nothing(user: DepthUser) -> None:
    """At 20 Hz, each depth image comes two images after its own."""
    headers: list[Header] = []
    user.send(picture(7))
    for i in range(30):
        headers.append(user.send_image(picture(i)))
        if i >= 2:
            user.client.publish("/depth", array_to_image(metres(), "32FC1", headers[i - 2]))
        time.sleep(0.05)

    def with_depth() -> int:
        stamps = [h.stamp for h in headers]
        return sum(m.header.stamp in stamps for m in user.client.received["/fpt/points"])

    wait_until(lambda: with_depth() >= 3)
    solid = [m for m in user.client.received["/fpt/distribution"] if m.header in headers[2:25]]
    assert all(m.dims == 3 for m in solid), "none was answered before its depth came"


def expect_two_dimensions(user: DepthUser, header: Header, *words: str) -> None:
    """Without usable depth: an error that says why, and everything in the image as ever."""
    user.expect_error("depth", *words)
    msg = user.receive("distribution", header)
    assert msg.dims == 2
    assert np.isfinite(np.frombuffer(msg.means, np.float32)).all()
    user.receive("flow", header)
    user.receive("mask", header)
    user.diagnostics(lambda values: values["depth"] == "none: answering in the image alone")
    assert not any(m.header == header for m in user.client.received["/fpt/points"])
    assert not any(m.header == header for m in user.client.received["/fpt/occlusion"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"info": camera_info(p=projection(0.0))}, ("projection matrix", "fx=0")),
        ({"info": camera_info(p=projection(np.nan))}, ("projection matrix", "fx=nan")),
        ({"info": camera_info(p=second_camera())}, ("baseline", "P[3] = -50")),
        ({"info": camera_info(width=640)}, ("640 x 48 px", "64 x 48 px")),
        ({"info": camera_info(header=Header(frame_id="lidar"))}, ("camera_info", "'lidar'")),
        ({"depth": np.ones((24, 32), np.float32)}, ("32 x 24 px", "registered")),
        ({"frame_id": "depth_frame"}, ("'depth_frame'", f"'{FRAME}'")),
        ({"depth": np.ones(SIZE, np.uint8), "encoding": "mono8"}, ("'mono8'", "16UC1")),
        ({"depth": np.zeros(SIZE, np.float32)}, ("none of the 3072 px",)),
        ({"lag_ms": 400}, ("within 20 ms", "the nearest is")),
    ],
    ids=[
        *(
            "zero intrinsics",
            "NaN intrinsics",
            "second camera",
            "camera_info of another size",
            "another camera",
        ),
        *("not registered", "rotated frame", "encoding", "empty", "not synchronised"),
    ],
)
def test_bad_depth_is_named_and_two_dimensions_go_on(
    user: DepthUser, wrong: dict[str, Any], words: tuple[str, ...]
) -> None:
    header = user.send(picture(8), **wrong)
    expect_two_dimensions(user, header, *words)


def test_missing_depth_is_named_and_two_dimensions_go_on(user: DepthUser) -> None:
    time.sleep(1.1)  # depth is not waited for any more
    header = user.send_image(picture(9))
    expect_two_dimensions(user, header, "within 20 ms", "the last came")


def test_late_depth_is_not_waited_for_longer_than_told(user: DepthUser) -> None:
    user.set(depth_wait_ms=50.0)
    try:
        user.send(picture(10))
        header = user.send_image(picture(11))
        expect_two_dimensions(user, header, "within 20 ms")
    finally:
        user.set(depth_wait_ms=1000.0)


def test_a_poke_in_depth_needs_depth(user: DepthUser) -> None:
    in_the_hole = Pokes(np.array([[35.0, 25.0]]), np.array([[3.0, 0.0]]), np.array([0.1]))
    user.send_pokes(in_the_hole)
    pixels = picture(12)
    header = user.send(pixels)
    user.expect_error("depth", "poke 0 of 1 has dz=0.1 m", "x=35, y=25", "in the image")
    expected = user.solid(pixels, replace(in_the_hole, dz=np.array([np.nan]))).scene_flow
    msg = user.receive("points", header)
    np.testing.assert_allclose(table(msg)[..., 3:6].reshape(-1, 3), expected.flow, atol=1e-4)


def test_services_speak_metres_and_refuse_pokes_into_nothing(user: DepthUser) -> None:
    pixels = picture(13)
    header = user.send(pixels)
    user.receive("points", header)
    request = PredictFlow.Request(
        header=header,
        pokes=[Poke(x=20.0, y=10.0, dx=9.0, dy=-4.0, dz=0.25)],
        queries=QUERIES.astype(np.float32).ravel(),
    )
    response = user.client.call(PredictFlow, "/fpt/predict_flow", request)
    assert response.success, response.message
    found = distribution_from_msg(response.distribution)[1]
    expected = user.solid(pixels, PUSH, QUERIES).distribution
    np.testing.assert_allclose(found.means, expected.means, atol=2e-3)
    request.pokes = [Poke(x=35.0, y=25.0, dx=9.0, dy=-4.0, dz=-0.25)]
    response = user.client.call(PredictFlow, "/fpt/predict_flow", request)
    assert not response.success
    assert "dz=-0.25 m, but no depth is known at x=35, y=25 px" in response.message


@pytest.mark.skipif(importlib.util.find_spec("tf2_ros") is not None, reason="tf2_ros is installed")
def test_a_target_frame_without_tf2_is_named(user: DepthUser) -> None:
    user.set(target_frame="base_link")
    try:
        header = user.send(picture(14))
        user.expect_error("tf", "'base_link'", "tf2_ros", "optical frame")
        assert user.receive("points", header).header.frame_id == FRAME
    finally:
        user.set(target_frame="")


def test_points_come_in_the_target_frame(user: DepthUser) -> None:
    """A camera that looks along base_link's x axis from 0.5 m above it; real tf2."""
    tf2_ros = pytest.importorskip("tf2_ros")
    transform = TransformStamped(
        header=Header(frame_id="base_link"),
        child_frame_id=FRAME,
        transform=Transform(
            rotation=Quaternion(x=-0.5, y=0.5, z=-0.5, w=0.5),
            translation=Vector3(x=1.0, y=0.0, z=0.5),
        ),
    )
    user.set(target_frame="base_link")
    try:
        header = user.send(picture(15))
        user.expect_error("tf", "'base_link'", "optical frame")
        assert user.receive("points", header).header.frame_id == FRAME
        broadcaster = tf2_ros.StaticTransformBroadcaster(user.client.node)
        broadcaster.sendTransform(transform)

        def transformed() -> bool:
            user.send_pokes(PUSH)
            user.send(picture(16))
            time.sleep(0.2)
            last = user.client.received["/fpt/points"][-1:]
            return bool(last) and last[0].header.frame_id == "base_link"

        wait_until(transformed)
        msg = user.client.received["/fpt/points"][-1]
        expected = Rigid.of(transform.transform).apply(user.solid(picture(16), PUSH).scene_flow)
        found = table(msg).reshape(-1, 8)
        np.testing.assert_allclose(found[:, :3], expected.points, atol=1e-5)
        np.testing.assert_allclose(found[:, 3:6], expected.flow, atol=1e-4)
        assert np.nanmin(found[:, 0]) > 1.9, "ahead of the camera, at x = 1 m"
    finally:
        user.set(target_frame="")


def test_the_planner_takes_goals_in_space(user: DepthUser) -> None:
    client, search = user.client, Search(kl_threshold=0.05, positions=6, motions=4, seed=7)
    arguments = ("positions:=6", "motions:=4", "kl_threshold_nats:=0.05", "timeout_s:=5.0")
    module = python_module("fpt_ros.poke_planner", *(w for a in arguments for w in ("-p", a)))
    client.subscribe(MarkerArray, "/poke_planner/markers")

    def ask(header: Header, **fields: float) -> PlanPoke.Response:
        request = PlanPoke.Request(header=header, seed=7, **fields)
        return client.call(PlanPoke, "/poke_planner/plan_poke", request, 20.0)

    with Process(module, user.domain) as planner:

        def known() -> bool:
            topics = ("/depth", "/camera_info")
            return all(client.node.count_subscribers(topic) > 1 for topic in topics)

        wait_until(known, 60.0, lambda: planner.output)
        pixels, goal = picture(1), {"x": 50.0, "y": 10.0, "dx": 3.0, "dy": 1.0, "dz": 0.3}

        def planned() -> PlanPoke.Response | None:
            answer = ask(user.send(pixels), **goal)
            return answer if answer.success else None  # without the depth, which may get lost

        def connected() -> bool:
            with suppress(AssertionError):  # the first response, too
                return planned() is not None
            return False

        wait_until(connected, 60.0, lambda: planner.output)
        answer = planned()
        assert answer is not None
        depth = Depth(np.where(metres() > 0, metres(), np.float32(np.nan)), CAMERA)
        point = np.array([50.0, 10.0])
        motion = motion_in_space(point, np.array([3.0, 1.0]), 0.3, depth)
        tolerance = default_tolerance(motion, SIZE)
        view = View(pixels, user.predictor.encode(pixels), depth)
        steps = plan(Goal(point, motion, tolerance), SIZE, search, depth)
        expected = answer_asks(user.predictor, view, steps, SETTINGS)
        assert len(answer.pokes) == min(len(expected), 16)
        for i, ranked in enumerate(answer.pokes):
            poke = ranked.poke
            assert (poke.x, poke.y) == pytest.approx(tuple(expected.pokes.xy[i]), abs=1e-3)
            assert (poke.dx, poke.dy) == pytest.approx(tuple(expected.pokes.flow[i]), abs=2e-2)
            assert poke.dz == pytest.approx(expected.pokes.dz[i], abs=1e-3)
            assert ranked.success_probability == pytest.approx(expected.success[i], abs=2e-2)
            np.testing.assert_allclose(ranked.motion, expected.motion[i], atol=1e-3)
            covariance = np.reshape(ranked.motion_covariance, (3, 3))
            np.testing.assert_allclose(covariance, expected.motion_covariance[i], rtol=1e-2)
        shown = [m for m in client.next("/poke_planner/markers").markers if m.ns == "motion"]
        assert [m.type for m in shown] == [Marker.ARROW, Marker.SPHERE]
        start, end = shown[0].points
        np.testing.assert_allclose(
            [end.x - start.x, end.y - start.y, end.z - start.z], expected.motion[0], atol=1e-3
        )
        assert start.z == pytest.approx(depth.at(point), abs=1e-4)

        explored = ask(user.send(pixels), goal=PlanPoke.Request.EXPLORE)
        assert explored.success, explored.message
        assert len(explored.pokes) == 3
        assert np.isnan(explored.pokes[0].poke.dz)

        refused = ask(user.send(pixels), **{**goal, "x": 35.0, "y": 25.0})
        assert "none is known at x=35, y=25 px" in refused.message
        late = user.send(pixels, lag_ms=500.0)
        refused = ask(late, **goal)
        assert "a goal with dz=0.3 m needs depth: no depth within 20 ms" in refused.message
        planar = ask(late, **{**goal, "dz": 0.0})
        assert planar.success, planar.message
        assert np.isnan(planar.pokes[0].motion).all()
        assert np.isnan(planar.pokes[0].poke.dz)
        documented = documented_topics("poke_planner", "poke_planner", page="depth.md")
        assert documented < client.topics_of("poke_planner")
        assert planner.interrupt() == 0, planner.output


def test_without_depth_a_solid_model_answers_in_the_image(model: Path) -> None:
    with running_node(model, use_depth=False) as user:
        client = user.client
        client.subscribe(FlowDistribution, "/fpt/distribution")
        client.advertise(Image, "/image", SENSOR_QOS)
        client.wait_for_publisher("/fpt/distribution")
        pixels = picture()
        expected = user.expected(pixels, NO_POKES)
        wait_until(
            lambda: user.send_image(pixels) is None or bool(client.received["/fpt/distribution"])
        )
        msg = client.received["/fpt/distribution"][0]
        assert msg.dims == 2
        np.testing.assert_allclose(
            distribution_from_msg(msg)[1].means, expected.distribution.means, atol=2e-3
        )
        assert not {"/depth", "/fpt/points"} & {t.name for t in client.topics_of("fpt")}
        user.diagnostics(lambda values: values["depth"] == "not used")


def test_true_flow_is_told_of_what_stays_in_sight() -> None:
    world = Simulator("drawer", 1, (48, 64))
    frame = world.render()
    truth = world.truth(frame, world.sample_future(np.random.default_rng(0)))
    flow, mask = (image_to_array(msg) for msg in _truth_messages(truth))
    assert 0 < truth.occluded.sum() < truth.occluded.size
    np.testing.assert_array_equal(np.isnan(flow).any(-1), truth.occluded)
    np.testing.assert_allclose(
        flow[~truth.occluded], truth.flow[~truth.occluded] * [64, 48], atol=1e-4
    )
    np.testing.assert_array_equal(mask, np.where(truth.moving, 255, 0))


def test_the_simulated_camera_gives_depth(model: Path) -> None:
    with running_node(model, depth_wait_ms=1000.0) as user:
        arguments = [
            word
            for k, v in {"width": 80, "height": 60, "rate_hz": 4.0, "kind": "drawer"}.items()
            for word in ("-p", f"{k}:={v}")
        ]
        user.client.subscribe(PointCloud2, "/fpt/points")
        with Process(python_module("sim.camera_node", *arguments), user.domain) as camera:
            msg = user.client.next("/fpt/points", timeout_s=60.0)
            assert msg.header.frame_id == FRAME
            found = table(msg)
            assert np.isfinite(found).all(-1).mean() > 0.5
            assert (found[np.isfinite(found[..., 2]), 2] > 0).all()
            documented = documented_topics("fpt_node", "fpt", page="depth.md")
            assert documented <= user.client.topics_of("fpt")
            assert camera.interrupt() == 0


# --- without a node --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predictor(model: Path) -> FlowPredictor:
    return FlowPredictor(load_model(model))


def view(predictor: FlowPredictor, depth: bool = True) -> View:
    values = np.where(metres() > 0, metres(), np.float32(np.nan))
    pixels = picture(20)
    return View(pixels, predictor.encode(pixels), Depth(values, CAMERA) if depth else None)


def test_hypotheses_and_samples_are_in_metres(predictor: FlowPredictor) -> None:
    seen, flat = view(predictor), view(predictor, depth=False)
    many = Pokes(PUSH.xy.repeat(3, 0), PUSH.flow.repeat(3, 0), np.array([0.25, 0.0, np.nan]))
    hypotheses = [many[i : i + 1] for i in range(3)]

    def predicted(view: View) -> list[FlowMixture]:
        return end_of(predict_hypotheses(predictor, view, hypotheses, QUERIES, SETTINGS))

    for mixture, pokes in zip(predicted(seen), hypotheses, strict=True):
        alone = Answer(predictor, seen, pokes, QUERIES, SETTINGS).distribution
        np.testing.assert_allclose(mixture.means, alone.means, atol=1e-4)
        assert mixture.dims == 3
    assert [mixture.dims for mixture in predicted(flat)] == [2, 2, 2]
    asked = predictor, seen, PUSH, QUERIES, 3, 0, SETTINGS
    samples = end_of(sample_jointly(*asked))
    assert samples.shape == (3, 3, 3)
    assert end_of(sample_jointly(predictor, flat, *asked[2:])).shape == (3, 3, 2)
    pos, flow = seen.normalised(PUSH, 3)
    np.testing.assert_allclose(flow[0, 2], 0.25 / metres()[10, 20])
    points = (QUERIES + 0.5) / [WIDTH, HEIGHT]
    raw = predictor.sample(seen.scene, pos, flow, points, 3, 0)
    at = np.array([metres()[int(np.ceil(y - 0.5)), int(np.ceil(x - 0.5))] for x, y in QUERIES])
    np.testing.assert_allclose(samples[..., 2], raw[..., 2] * at, rtol=1e-5)


def end_of(steps: Generator[int, None, Any]) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def test_a_poke_without_depth_has_the_depth_it_says(predictor: FlowPredictor) -> None:
    """dz = 0 is 0 everywhere; else it is unknown where the depth is."""
    pokes = Pokes(np.full((3, 2), [35.0, 25.0]), np.zeros((3, 2)), np.array([0.0, 0.2, np.nan]))
    for found in (view(predictor), view(predictor, depth=False)):
        np.testing.assert_array_equal(found.normalised(pokes, 3)[1][:, 2], [0, np.nan, np.nan])
        with pytest.raises(RequestError, match=r"poke 1 of 3 has dz=0.2 m"):
            found.check_depth(pokes)
        found.check_depth(pokes[::2])
    assert view(predictor).normalised(pokes)[1].shape == (3, 2)


def test_no_poke_leads_through_the_camera(predictor: FlowPredictor) -> None:
    at = np.array([[5.0, 5.0]])
    depth = float(metres()[5, 5])
    near, through = (Pokes(at, np.zeros((1, 2)), np.array([-k * depth])) for k in (0.9, 1.0))
    seen = view(predictor)
    seen.check_depth(near)
    assert seen.normalised(near, 3)[1][0, 2] == pytest.approx(-0.9)
    with pytest.raises(RequestError, match=rf"dz=-{depth:g} m at a depth of {depth:g} m"):
        seen.check_depth(through)
    assert np.isnan(seen.normalised(through, 3)[1][0, 2])


def test_occlusion_on_the_grid_is_that_of_the_image(predictor: FlowPredictor) -> None:
    """Of a near square that moves 12 px to the right over what is far."""
    far = np.full(SIZE, 3, np.float32)
    far[12:32, 16:32] = 1
    seen = replace(view(predictor), depth=Depth(far, CAMERA))
    step = HEIGHT // DENSE[0]
    middles = slice(step // 2, None, step)
    motion = (far[middles, middles] == 1)[..., None] * [12.0, 0.0, 0.0]
    fine, coarse = (
        Answer(predictor, seen, PUSH, None, replace(SETTINGS, full_resolution=full))
        for full in (True, False)
    )
    for answer in (fine, coarse):  # in place of what is predicted
        vars(answer)["_motion_in_depth"] = None, motion.reshape(-1, 3)
    assert coarse.occlusion.shape == DENSE
    assert 12 * 20 * 0.7 < fine.occlusion.sum() < 12 * 20 * 1.3
    assert (coarse.occlusion == fine.occlusion[middles, middles]).mean() > 0.95
    assert coarse.occlusion[3:8, 8:11].mean() > 0.7
    with pytest.raises(ValueError, match="needs the depth"):
        _ = Answer(predictor, view(predictor, depth=False), PUSH, None, SETTINGS).occlusion


def test_quaternions_turn_as_they_should() -> None:
    half = np.sqrt(0.5)
    # optical to a frame with x ahead, y left, z up: REP-103
    change = Rigid.of(
        Transform(
            rotation=Quaternion(x=-0.5, y=0.5, z=-0.5, w=0.5),
            translation=Vector3(x=1.0, y=0.0, z=0.5),
        )
    )
    scene = SceneFlow(
        np.array([[0.0, 0.0, 2.0]]), np.array([[0.1, 0.2, -0.3]]), np.ones(1), np.full(1, 0.2)
    )
    moved = change.apply(scene)
    np.testing.assert_allclose(moved.points, [[3.0, 0.0, 0.5]], atol=1e-12)
    np.testing.assert_allclose(moved.flow, [[-0.3, -0.1, -0.2]], atol=1e-12)
    np.testing.assert_array_equal(moved.std, scene.std)
    quarter = Rigid.of(Transform(rotation=Quaternion(z=half, w=half)))
    np.testing.assert_allclose(quarter.rotation @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    with pytest.raises(ValueError, match="unit quaternion"):
        Rigid.of(Transform(rotation=Quaternion(w=0.0)))


def test_a_cloud_without_holes_is_dense() -> None:
    scene = SceneFlow(np.ones((6, 3)), np.zeros((6, 3)), np.ones(6), np.ones(6))
    msg = point_cloud(scene, (2, 3), Header(frame_id="here"))
    assert (msg.height, msg.width, msg.is_dense, len(msg.data)) == (2, 3, True, 6 * 32)


def test_the_nearest_stamp_counts() -> None:
    def header(ms: int) -> Header:
        return Header(stamp=Stamp(sec=5, nanosec=ms * 10**6))

    history = DepthHistory(3)
    assert not history.alive
    assert history.find(header(0), 1e4) is None
    assert "none was received" in history.describe(header(0), 20.0)
    depths = [Image(header=header(ms)) for ms in (0, 30, 60, 90)]
    for msg in depths:
        history.add(msg)
    assert history.alive
    assert history.find(header(50), 20.0) is depths[2]
    assert history.find(header(60), 0.0) is depths[2]
    assert history.find(header(61), 0.0) is None
    assert history.find(header(0), 20.0) is None, "it made room"
    assert history.find(header(0), 20.0, depths[0]) is depths[0], "an image may keep its own"
    assert history.find(header(60), 20.0, depths[1]) is depths[2], "what is nearer replaces it"
    assert "the nearest is 30 ms away" in history.describe(header(0), 20.0)


def test_depth_of_before_the_clock_was_set_back_is_no_image_s() -> None:
    """A bag or a simulation that starts again has the same stamps for other pictures."""

    def header(ms: int) -> Header:
        return Header(stamp=Stamp(sec=ms // 1000, nanosec=ms % 1000 * 10**6))

    early, late = header(1000), header(9000)
    held = DepthHistory(30)
    for ms in (1000, 1030, 8970, 9000):
        held.add(Image(header=header(ms)))
    # the image is the first to tell: neither is the old one found, nor the new one not waited for
    held.set_back(late, early)
    assert not held.settled(early)
    assert held.find(early, 20.0) is None
    # depth is: only what is new is held, also when the image comes after it
    again = Image(header=early)
    held.add(Image(header=late))
    held.add(again)
    held.set_back(late, early)
    assert held.find(early, 20.0) is again
    assert held.find(header(1030), 20.0) is None
    # disorder on the way is no other time
    held.add(Image(header=header(1100)))
    held.add(Image(header=header(1030)))
    assert held.find(header(1100), 0.0) is not None


def test_intrinsics_are_those_of_the_rectified_camera() -> None:
    assert camera_intrinsics(camera_info(), SIZE) == CAMERA


def test_intrinsics_of_a_binned_region_see_what_the_whole_image_sees() -> None:
    region = RegionOfInterest(x_offset=12, y_offset=6, width=40, height=24)
    info = camera_info(roi=region, binning_x=2, binning_y=3)
    before = info.p.copy()
    cut = camera_intrinsics(info, (8, 20))
    point = np.array([0.2, -0.1, 1.5])
    whole = CAMERA.project(point)
    np.testing.assert_allclose(cut.project(point), (whole - (12, 6)) / (2, 3))
    np.testing.assert_array_equal(info.p, before)
    assert camera_intrinsics(camera_info(binning_x=3, binning_y=1), (HEIGHT, 22))  # 64 / 3
    with pytest.raises(
        DepthError, match=r"40 x 24 px \(roi of 64 x 48 px\), binned 2 x 3, .*64 x 48"
    ):
        camera_intrinsics(info, SIZE)


def test_depth_needs_intrinsics() -> None:
    with pytest.raises(DepthError, match="no camera_info"):
        read_depth(Image(), None, Header(), SIZE)
