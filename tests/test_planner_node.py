# SPDX-License-Identifier: MIT
"""The poke planner over the wire, beside a real FPT node with a small model."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from node_harness import (
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
    RELIABLE,
    SETTINGS,
    WIDTH,
    User,
    picture,
    running_node,
    values_of,
)
from rclpy.task import Future
from sensor_msgs.msg import Image
from std_msgs.msg import Header
from visualization_msgs.msg import Marker, MarkerArray

from fpt_msgs.msg import PokeArray, RankedPoke
from fpt_msgs.srv import PlanPoke
from fpt_ros.environment import claim_domain_id
from fpt_ros.images import array_to_image, flat_array
from fpt_ros.pipeline import View, answer_asks
from fpt_ros.planning import Goal, Plan, Search, Steps, explore, plan

SIZE = (HEIGHT, WIDTH)
MOVE, OPEN, EXPLORE = PlanPoke.Request.MOVE, PlanPoke.Request.OPEN, PlanPoke.Request.EXPLORE
GOAL = {"goal": MOVE, "x": 30.0, "y": 20.0, "dx": 6.0, "dy": 2.0}
POSITIONS, MOTIONS = 6, 4
SEARCH = Search(kl_threshold=0.05, positions=POSITIONS, motions=MOTIONS, seed=7)
SCORES = {  # fields of the message and the plan
    "score": "score",
    "success_probability": "success",
    "plausibility": "plausibility",
    "disturbance": "disturbance",
    "progress": "progress",
    "progress_std": "progress_std",
    "information": "information",
}


class Set(NamedTuple):
    """Both nodes, a user of them, and the image that the FPT node has."""

    user: User
    planner: Process
    pixels: np.ndarray
    header: Header

    def ask(self, **fields: Any) -> PlanPoke.Response:
        response = self.ask_async(**fields)
        wait_until(response.done, 60.0)
        return response.result()

    def ask_async(self, **fields: Any) -> Future:
        for name in ("keep", "keep_out"):
            fields[name] = flat_array("f", np.array(fields.get(name, []), np.float32))
        request = PlanPoke.Request(**{"header": self.header, **fields})
        return self.user.client.call_async(PlanPoke, "/poke_planner/plan_poke", request)

    def set_parameter(self, name: str, value: float) -> None:
        """Of the planner."""
        done = self.user.client.set_parameter("/poke_planner", name, value)
        assert done.successful, done.reason

    def planned(self, steps: Steps) -> Plan:
        """By the library itself."""
        view = View(self.pixels, self.user.predictor.encode(self.pixels))
        return answer_asks(self.user.predictor, view, steps, SETTINGS)


def start_planner(domain: int, **parameters: Any) -> Process:
    arguments = [word for k, v in parameters.items() for word in ("-p", f"{k}:={v}")]
    return Process(python_module("fpt_ros.poke_planner", *arguments), domain)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "fpt-test.safetensors")


@pytest.fixture(scope="module")
def nodes(model: Path) -> Iterator[Set]:
    # a grid of 32 x 32 points for nine hypotheses is more than is allowed at once
    with running_node(
        model, max_queries=2100, **{"qos_overrides./image.subscription.reliability": "reliable"}
    ) as user:
        user.client.advertise(Image, "/image", 1)
        planner = start_planner(
            user.domain,
            positions=POSITIONS,
            motions=MOTIONS,
            max_queries=2100,
            max_count=5,
            timeout_s=60.0,
            plan_lifetime_s=20.0,
        )
        with planner:
            user.client.subscribe(PokeArray, "/pokes")
            user.client.subscribe(MarkerArray, "/poke_planner/markers")
            pixels, header = picture(), user.header()

            def ready() -> bool:
                user.send_image(pixels, header)
                time.sleep(0.1)
                last = user.client.received["/diagnostics"][-1:]
                seen = any("images received" in values_of(m.status[0]) for m in last)
                return seen and user.client.node.count_subscribers("/fpt/info") > 0

            wait_until(ready, 60.0)
            planner.wait_for("planning with /fpt/evaluate_pokes")
            yield Set(user, planner, pixels, header)
            assert planner.interrupt() == 0, planner.output
            assert "Traceback" not in planner.output, planner.output


def check(found: list[RankedPoke], expected: Plan) -> None:
    """The same pokes and scores, but for float32 on the wire."""
    assert len(found) == len(expected)
    for i, ranked in enumerate(found):
        poke = ranked.poke
        assert (poke.x, poke.y) == pytest.approx(tuple(expected.pokes.xy[i]), abs=1e-3)
        assert (poke.dx, poke.dy) == pytest.approx(tuple(expected.pokes.flow[i]), abs=2e-2)
        assert np.isnan(poke.dz)
        assert np.isnan([*ranked.motion, *ranked.motion_covariance]).all()
        for field, name in SCORES.items():
            value = getattr(expected, name)[i]
            assert getattr(ranked, field) == pytest.approx(value, abs=2e-2), (i, field)


def test_a_motion_is_planned_as_the_library_does(nodes: Set) -> None:
    keep, keep_out = [[50.0, 40.0], [5.0, 5.0]], [[30.0, 20.0, 6.0]]
    answer = nodes.ask(**GOAL, keep=keep, keep_out=keep_out, seed=7, tolerance=3.0, count=4)
    assert (answer.success, answer.message) == (True, "")
    assert answer.header == nodes.header
    goal = Goal(
        np.array([30.0, 20.0]), np.array([6.0, 2.0]), 3.0, np.array(keep), np.array(keep_out)
    )
    expected = nodes.planned(plan(goal, SIZE, SEARCH))
    check(answer.pokes, expected.first(4))
    assert answer.pokes[0].score > 0
    again = nodes.ask(**GOAL, keep=keep, keep_out=keep_out, seed=7, tolerance=3.0, count=4)
    assert again.pokes[0].poke.x == answer.pokes[0].poke.x


def test_opening_and_exploring_are_planned_as_the_library_does(nodes: Set) -> None:
    answer = nodes.ask(goal=OPEN, x=30.0, y=20.0, seed=7, tolerance=2.0)
    assert (answer.success, answer.message) == (True, "")
    goal = Goal(np.array([30.0, 20.0]), None, 2.0)
    check(answer.pokes, nodes.planned(plan(goal, SIZE, SEARCH)).first(5))  # max_count
    answer = nodes.ask(goal=EXPLORE, x=np.nan, seed=7, tolerance=2.0, count=100)
    assert (answer.success, answer.message) == (True, "")
    expected = nodes.planned(explore(SIZE, SEARCH, 2.0))
    assert len(answer.pokes) == POSITIONS // 2
    check(answer.pokes, expected)


def test_the_best_poke_is_sent_to_the_fpt_node_as_the_goal_was_meant(nodes: Set) -> None:
    received = nodes.user.client.received["/pokes"]
    received.clear()
    nodes.ask(**GOAL)
    answer = nodes.ask(**GOAL, publish=True)
    sent = nodes.user.client.next("/pokes")
    assert sent.header == nodes.header
    (poke,) = sent.pokes
    assert (poke.x, poke.dx) == (answer.pokes[0].poke.x, answer.pokes[0].poke.dx)
    assert len(received) == 1
    newest = nodes.user.send_image(nodes.pixels)
    answer = nodes.ask(**GOAL, header=Header(), publish=True)  # the newest image, and onward
    assert answer.header == newest, answer.message
    standing = nodes.user.client.next("/pokes", lambda m: not m.header.stamp.sec)
    assert standing.pokes[0].x == poke.x


def test_of_plans_that_overlap_the_one_asked_for_last_stands(nodes: Set) -> None:
    received = nodes.user.client.received["/pokes"]
    received.clear()
    asked = [
        nodes.ask_async(**GOAL, publish=True),
        nodes.ask_async(**{**GOAL, "seed": 8}, publish=True),
        nodes.ask_async(**{**GOAL, "seed": 9}),
        nodes.ask_async(**{**GOAL, "x": 1000.0}, publish=True),
    ]
    wait_until(lambda: all(response.done() for response in asked), 60.0)
    assert [response.result().success for response in asked] == [True, True, True, False]
    first, last = (response.result().pokes[0].poke for response in asked[:2])
    assert (first.x, first.dx) != (last.x, last.dx)
    nodes.user.client.next("/pokes", lambda m: (m.pokes[0].x, m.pokes[0].dx) == (last.x, last.dx))
    time.sleep(0.5)
    assert (received[-1].pokes[0].x, received[-1].pokes[0].dx) == (last.x, last.dx)


def test_markers_show_the_ranked_pokes(nodes: Set) -> None:
    received = nodes.user.client.received["/poke_planner/markers"]
    received.clear()
    answer = nodes.ask(**GOAL, count=3)
    first = nodes.user.client.next("/poke_planner/markers").markers
    arrows = [m for m in first if m.action == Marker.ADD]
    assert [(m.ns, m.id, m.type) for m in arrows] == [("plan", i, Marker.ARROW) for i in range(3)]
    assert all(m.header == nodes.header and m.lifetime.sec == 20 for m in arrows)
    assert arrows[0].color.a == 1
    scores = np.array([ranked.score for ranked in answer.pokes])
    expected = np.clip(scores / scores[0], 0.1, 1)
    np.testing.assert_allclose([m.color.a for m in arrows], expected, atol=1e-3)
    poke = answer.pokes[0].poke  # a nominal camera's: focal length = width
    start, end = arrows[0].points
    assert (start.x, start.z) == pytest.approx(((poke.x - (WIDTH - 1) / 2) / WIDTH, 1), abs=1e-4)
    assert end.y - start.y == pytest.approx(poke.dy / WIDTH, abs=1e-4)
    received.clear()
    nodes.ask(**GOAL, count=1)
    second = nodes.user.client.next("/poke_planner/markers").markers
    gone = {(m.ns, m.id) for m in second if m.action == Marker.DELETE}
    assert gone == {("plan", 1), ("plan", 2)}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"goal": 9}, r"goal must be one of 0 \(MOVE\), 1 \(OPEN\), 2 \(EXPLORE\), received 9"),
        ({"x": 64.0}, "query 0 of 1 at x=64, y=20 px lies outside the 64 x 48 px image"),
        ({"y": float("nan")}, "query 0 of 1 must be finite"),
        ({"dx": float("inf")}, "motion must be finite"),
        ({"dx": 0.0, "dy": 0.0}, "motion must not be zero"),
        ({"dz": 0.1}, "a goal with dz=0.1 m needs depth: the FPT node's model is planar"),
        ({"tolerance": -1.0}, "tolerance must be > 0 px, received -1"),
        ({"keep": [1.0]}, "keep must be rows of 2, received 1 values"),
        ({"keep": [[1.0, float("nan")]]}, "keep must be finite"),
        ({"keep": [[70.0, 0.0]]}, "point to keep 0 of 1 at x=70"),
        ({"keep_out": [1.0, 2.0]}, "keep_out must be rows of 3, received 2 values"),
        ({"keep_out": [[1.0, 2.0, float("nan")]]}, "keep_out must be finite"),
        ({"keep_out": [[30.0, 20.0, 500.0]]}, "keep_out leaves no place to poke"),
    ],
)
def test_senseless_requests_are_refused(nodes: Set, fields: dict[str, Any], words: str) -> None:
    answer = nodes.ask(**{**GOAL, **fields})
    assert not answer.success
    assert re.search(words, answer.message), answer.message
    assert not answer.pokes


def test_an_image_that_is_not_held_is_named(nodes: Set) -> None:
    header = nodes.user.header(age_s=3600)
    answer = nodes.ask(**GOAL, header=header)
    assert not answer.success
    assert "/fpt/predict_flow: the image with stamp" in answer.message


def test_an_fpt_node_that_hangs_is_given_up(nodes: Set) -> None:
    nodes.set_parameter("timeout_s", 1.0)
    pid = nodes.user.node.process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        answer = nodes.ask(**GOAL)
    finally:
        os.kill(pid, signal.SIGCONT)
        nodes.set_parameter("timeout_s", 60.0)
    assert answer.message == "/fpt/predict_flow has not answered for 1 s (timeout_s)"
    assert nodes.ask(**GOAL).success


def test_contradicting_limits_are_named(nodes: Set) -> None:
    nodes.set_parameter("min_length_px", 50.0)
    nodes.set_parameter("max_length_px", 20.0)
    try:
        answer = nodes.ask(**GOAL)
    finally:
        nodes.set_parameter("min_length_px", 0.0)
        nodes.set_parameter("max_length_px", 0.0)
    expected = "min_length_px must not be above max_length_px, received 50 and 20"
    assert answer.message == expected
    assert nodes.ask(**GOAL).success


def test_an_image_without_a_stamp_cannot_be_planned_on(model: Path) -> None:
    with running_node(model, **RELIABLE) as user, start_planner(user.domain) as planner:
        user.client.advertise(Image, "/image", 1)
        planner.wait_for("planning with /fpt/evaluate_pokes")
        image = array_to_image(picture(), "rgb8", Header())

        def ask() -> str:
            user.client.publish("/image", image)
            request = PlanPoke.Request(**GOAL)
            return user.client.call(PlanPoke, "/poke_planner/plan_poke", request, 60.0).message

        wait_until(lambda: "received an image with stamp 0" in ask(), 60.0)
        assert planner.interrupt() == 0, planner.output


def test_two_plans_at_once(nodes: Set) -> None:
    with Client(nodes.user.domain, "other") as other:
        goal = {**GOAL, "dx": -6.0}
        request = PlanPoke.Request(header=nodes.header, **goal)
        service = other.node.create_client(PlanPoke, "/poke_planner/plan_poke")
        assert service.wait_for_service(30.0)
        future = service.call_async(request)
        mine = nodes.ask(**GOAL)
        wait_until(future.done, 60.0)
    its = future.result()
    assert its.pokes[0].score == nodes.ask(**goal).pokes[0].score
    assert mine.pokes[0].score == nodes.ask(**GOAL).pokes[0].score
    assert its.pokes[0].score != mine.pokes[0].score


def test_topics_and_services_are_those_documented(nodes: Set) -> None:
    client = nodes.user.client
    wait_until(lambda: "poke_planner" in client.node.get_node_names())
    assert client.topics_of("poke_planner") == documented_topics("poke_planner", "poke_planner")
    documented = documented_services("poke_planner", "poke_planner")
    assert client.services_of("poke_planner") == documented


def test_without_an_fpt_node_that_is_the_answer() -> None:
    domain, claim = claim_domain_id()
    planner = start_planner(domain)
    with claim, planner, Client(domain) as client:
        request = PlanPoke.Request(**GOAL)
        answer = client.call(PlanPoke, "/poke_planner/plan_poke", request, 60.0)
        assert not answer.success
        expected = "there is no service /fpt/predict_flow; is the FPT node running there?"
        assert answer.message == expected
        assert planner.interrupt() == 0, planner.output
        assert "Traceback" not in planner.output
