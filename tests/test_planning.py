# SPDX-License-Identifier: MIT
"""Planning and exploration in worlds whose motion is known in closed form, and with a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from node_harness import save_small_model

from fpt_model import FlowMixture, FlowPredictor, load_model
from fpt_model.depth import Depth, Intrinsics
from fpt_model.scene_flow import displacement, image_motion
from fpt_ros.pipeline import Settings, View, answer_asks
from fpt_ros.planning import (
    Ask,
    Goal,
    Plan,
    Search,
    Steps,
    default_tolerance,
    explore,
    motion_in_space,
    plan,
)
from fpt_ros.pokes import Pokes, RequestError

SIZE = (100, 200)  # px
STILL_STD, NOISE_STD = 0.1, 0.5  # px, of what stays and of what is moved along
SEARCH = Search(kl_threshold=1.0, cells=(20, 40))

World = Callable[[Pokes, np.ndarray], FlowMixture]
"""What such a world does: the motion of the queries under the pokes."""


def follow(steps: Steps, world: World) -> Plan:
    """What the planning comes to in a world."""
    answers = None
    while True:
        try:
            ask: Ask = next(steps) if answers is None else steps.send(answers)
        except StopIteration as end:
            return end.value
        answers = [world(pokes, ask.queries) for pokes in ask.hypotheses]


def on_part(xy: np.ndarray) -> np.ndarray:
    """The part: a square of 40 px about (60, 50)."""
    return (np.abs(xy - (60, 50)) <= 20).all(-1)


def drawer(pokes: Pokes, queries: np.ndarray) -> FlowMixture:
    """The part slides along x, by up to about 10 px; the rest stays. A poke there is followed."""
    moving = on_part(queries)
    means = np.zeros((len(queries), 3, 2))
    stds = np.full((len(queries), 3), STILL_STD)
    if len(pokes) and on_part(pokes.xy)[0]:
        means[moving] = pokes.flow[0]
        stds[moving] = NOISE_STD
    else:
        means[moving, 1:, 0] = (10.0, -10.0)
        stds[moving, 1:] = 2.0
    log_weights = np.broadcast_to(np.log([0.5, 0.25, 0.25]), stds.shape)
    return FlowMixture(log_weights, means, stds[..., None, None] * np.eye(2))


def test_probability_within_is_that_of_sampling_and_of_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    mixture = FlowMixture(
        np.log(rng.dirichlet(np.ones(4), 5)),
        rng.normal(0, 2, (5, 4, 2)),
        np.tril(rng.normal(0, 1, (5, 4, 2, 2))) + 1.5 * np.eye(2),
    )
    centre = rng.normal(0, 1, (5, 2))
    radius = np.array([0.5, 1, 2, 3, 4])
    draws = mixture.sample(200_000, rng)
    sampled = np.mean(np.linalg.norm(draws - centre, axis=-1) <= radius, 0)
    estimate = mixture.probability_within(centre, radius, 4096)
    np.testing.assert_allclose(estimate, sampled, atol=0.02)
    np.testing.assert_array_equal(estimate, mixture.probability_within(centre, radius, 4096))
    # |f| of an isotropic Gaussian is Rayleigh, in space Maxwell
    for dims, expected in ((2, 1 - np.exp(-0.5)), (3, 0.198748)):
        unit = FlowMixture(np.zeros(1), np.zeros((1, dims)), np.eye(dims)[None])
        assert unit.probability_within(np.zeros(dims), 1.0, 4096) == pytest.approx(
            expected, abs=0.02
        )
    weights = np.log(rng.dirichlet(np.ones(4), 1000))  # some add up to more than 1
    many = FlowMixture(weights, np.zeros((1000, 4, 2)), np.tile(np.eye(2), (1000, 4, 1, 1)))
    assert many.probability_within(np.zeros(2), 1e9, 2).max() <= 1
    with pytest.raises(ValueError, match="even and >= 2, received 3"):
        mixture.probability_within(centre, 1.0, samples=3)


def test_a_point_is_moved_by_a_poke_elsewhere_on_its_part() -> None:
    goal = Goal(
        np.array([60.0, 50.0]), np.array([9.0, 0.0]), 2.0, keep_out=np.array([[60.0, 50.0, 8.0]])
    )
    found = follow(plan(goal, SIZE, SEARCH), drawer)
    assert 100 < len(found) <= SEARCH.positions * SEARCH.motions
    assert np.all(np.diff(found.score) <= 0)
    assert np.all(np.linalg.norm(found.pokes.xy - (60, 50), axis=-1) > 8)
    assert not on_part(found.pokes.xy).all()  # around it was tried, too
    best = found.first(10)
    assert on_part(best.pokes.xy).all()
    np.testing.assert_allclose(best.pokes.flow, np.tile([9.0, 0.0], (10, 1)), atol=1.0)
    # exactly by the goal's motion: within 2 px of it with a standard deviation of 0.5 px
    exact = np.abs(best.pokes.flow - (9, 0)).max(-1) < 1e-9
    assert exact.any()
    np.testing.assert_allclose(best.success[exact], 1 - np.exp(-8), atol=5e-3)
    np.testing.assert_allclose(best.progress[exact], 1, atol=1e-6)
    np.testing.assert_allclose(best.progress_std[exact], NOISE_STD / 9, rtol=1e-6)
    np.testing.assert_allclose(found.score, found.success * found.plausibility, rtol=1e-12)
    # half of what the part does by itself moves it, and the goal's motion is among that
    np.testing.assert_allclose(best.plausibility[exact], 0.5, atol=0.05)


def test_ranking_is_the_same_for_a_seed_and_another_for_another() -> None:
    goal = Goal(np.array([60.0, 50.0]), np.array([9.0, 0.0]), 2.0)
    one, again = (follow(plan(goal, SIZE, SEARCH), drawer) for _ in range(2))
    other = follow(plan(goal, SIZE, Search(1.0, cells=(20, 40), seed=1)), drawer)
    for field in fields(Plan):
        if field.name != "pokes":
            np.testing.assert_array_equal(getattr(one, field.name), getattr(again, field.name))
    np.testing.assert_array_equal(one.pokes.flow, again.pokes.flow)
    assert not np.array_equal(one.pokes.xy, other.pokes.xy)


CAMERA = Intrinsics(200.0, 200.0, 99.5, 49.5)
NEAR_M, FAR_M = 1.5, 2.0


def room() -> np.ndarray:
    """Depth ``[H, W]`` in m: the part stands out of a wall."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.where(on_part(np.stack([x, y], -1)), NEAR_M, FAR_M).astype(np.float32)


def drawer_in_space(pokes: Pokes, queries: np.ndarray) -> FlowMixture:
    """The part slides along the optical axis, by about 0.2 m; a poke there is followed."""
    moving = on_part(queries)
    dz = np.zeros((len(queries), 3))
    if len(pokes) and on_part(pokes.xy)[0] and np.isfinite(pokes.dz[0]):
        dz[moving] = pokes.dz[0]
        std = NOISE_STD
    else:
        dz[moving, 1:] = (0.2, -0.2)
        std = 2.0
    z = np.where(moving, NEAR_M, FAR_M)[:, None]
    flow = np.stack([0 * dz, 0 * dz, dz], -1)
    means = image_motion(queries[:, None], z, flow, CAMERA)
    means[..., 2] *= z  # m
    stds = np.where(moving[:, None] & (np.arange(3) > 0) | (std < 1), std, STILL_STD)
    stds = np.where(moving[:, None], stds, STILL_STD)
    metres = stds * z / CAMERA.fx
    tril = np.stack([stds, stds, metres], -1)[..., None] * np.eye(3)
    log_weights = np.broadcast_to(np.log([0.5, 0.25, 0.25]), stds.shape)
    return FlowMixture(log_weights, means, tril)


def test_a_part_is_pulled_toward_the_camera() -> None:
    point, depth = np.array([60.0, 50.0]), Depth(room(), CAMERA)
    true = image_motion(point, NEAR_M, [0, 0, -0.2], CAMERA)
    motion = motion_in_space(point, true[:2], -0.2, depth)
    assert motion[2] == pytest.approx(-0.2 * 200 / NEAR_M)
    goal = Goal(point, motion, 4.0, keep_out=np.array([[60.0, 50.0, 8.0]]))
    found = follow(plan(goal, SIZE, SEARCH, depth), drawer_in_space)
    best = found.first(10)
    assert on_part(best.pokes.xy).all()
    np.testing.assert_allclose(best.pokes.dz, -0.2, atol=0.03)
    assert (best.success > 0.9).all()
    np.testing.assert_allclose(best.progress, 1, atol=0.2)
    # straight at the camera, as it was asked for
    np.testing.assert_allclose(best.motion, np.tile([0, 0, -0.2], (10, 1)), atol=0.03)
    std_m = NOISE_STD / 200 * NEAR_M
    np.testing.assert_allclose(best.motion_covariance[0, 2, 2], std_m**2, rtol=1e-6)
    ahead = follow(plan(Goal(point, -motion, 4.0), SIZE, SEARCH, depth), drawer_in_space)
    assert ahead.pokes.dz[0] > 0.1


def test_no_poke_ends_behind_the_camera() -> None:
    point, depth = np.array([60.0, 50.0]), Depth(room(), CAMERA)
    true = image_motion(point, NEAR_M, [0, 0, -1.2], CAMERA)
    goal = Goal(point, motion_in_space(point, true[:2], -1.2, depth), 40.0)
    found = follow(plan(goal, SIZE, SEARCH, depth), drawer_in_space)
    assert found.pokes.dz.min() < -1.2  # drawn longer than asked for, too
    assert (found.pokes.dz > -depth.at(found.pokes.xy)).all()
    with pytest.raises(RequestError, match=r"its point is 1.5 m away, and dz is -1.5 m"):
        motion_in_space(point, np.zeros(2), -1.5, depth)


RECEDES_M = 0.02  # by less than makes one thing be in front of another


def receding_drawer(pokes: Pokes, queries: np.ndarray) -> FlowMixture:
    """The drawer in the image; all goes a bit away from the camera, as far as depth is known."""
    assert np.isnan(pokes.dz).all()
    flat = drawer(pokes, queries)
    means = np.concatenate([flat.means, np.full((*flat.means.shape[:-1], 1), RECEDES_M)], -1)
    tril = np.tile(0.01 * np.eye(3), (*flat.means.shape[:-1], 1, 1))
    tril[..., :2, :2] = flat.scale_tril
    unknown = queries[:, 0] > 150
    means[unknown, :, 2], tril[unknown, :, 2] = np.nan, np.nan
    return FlowMixture(flat.log_weights, means, tril)


def test_exploring_is_about_the_motion_in_the_image() -> None:
    found, planar = (
        follow(explore(SIZE, SEARCH, 2.0), world) for world in (receding_drawer, drawer)
    )
    for field in fields(Plan):
        if field.name != "pokes":
            np.testing.assert_array_equal(getattr(found, field.name), getattr(planar, field.name))
    np.testing.assert_array_equal(found.pokes.flow, planar.pokes.flow)


def test_predictions_in_space_serve_a_goal_in_the_image() -> None:
    """Pokes then leave open how they move in depth, and the plan tells what is expected of it."""
    depth, point = Depth(room(), CAMERA), np.array([60.0, 50.0])
    goal = Goal(point, np.array([9.0, 0.0]), 2.0)
    found = follow(plan(goal, SIZE, SEARCH, depth), receding_drawer)
    alone = follow(plan(goal, SIZE, SEARCH), drawer)
    np.testing.assert_allclose(found.score, alone.score)
    np.testing.assert_array_equal(found.pokes.xy, alone.pokes.xy)
    best = displacement(point, NEAR_M, [*alone.pokes.flow[0], RECEDES_M / NEAR_M], CAMERA)
    np.testing.assert_allclose(found.motion[0], best, atol=1e-9)
    assert np.isnan(alone.motion).all()


def test_no_poke_begins_where_there_is_no_surface() -> None:
    metres = room()
    metres[:, 40:60] = np.nan  # half of the part
    depth = Depth(metres, CAMERA)
    goal = Goal(np.array([70.0, 50.0]), np.array([9.0, 0.0]), 2.0)
    found = follow(plan(goal, SIZE, SEARCH, depth), drawer)
    assert np.isfinite(depth.at(found.pokes.xy)).all()
    assert (follow(plan(goal, SIZE, SEARCH), drawer).pokes.xy[:, 0] < 60).any()
    with pytest.raises(RequestError, match=r"depth of its point, but none is known at x=50, y=50"):
        motion_in_space(np.array([50.0, 50.0]), np.array([9.0, 0.0]), 0.1, depth)
    space = Goal(goal.point, np.array([0.0, 0.0, 9.0]), 2.0)
    with pytest.raises(RequestError, match="needs predictions in space, received planar ones"):
        follow(plan(space, SIZE, SEARCH, depth), drawer)


@pytest.mark.parametrize("world", [drawer, receding_drawer], ids=["planar", "in space"])
def test_no_poke_goes_behind_what_is_in_front_of_it(world: World) -> None:
    metres = room()
    metres[:, 90:95] = 1.0  # a pole before the wall, beside the part
    goal = Goal(np.array([60.0, 50.0]), np.array([25.0, 0.0]), 6.0)
    found = follow(plan(goal, SIZE, SEARCH, Depth(metres, CAMERA)), world)
    right = found.pokes.flow[:, 0] > 12
    ends = found.pokes.xy + found.pokes.flow
    assert right.sum() > 20
    assert (ends[right & (found.pokes.xy[:, 0] < 89), 0] < 90).all()
    free = follow(plan(goal, SIZE, SEARCH), drawer)
    assert ((free.pokes.xy + free.pokes.flow)[free.pokes.xy[:, 0] < 89, 0] > 90).any()
    metres[:] = np.where(on_part(np.stack(np.mgrid[:100, :200][::-1], -1)), NEAR_M, 1.0)
    only = Search(kl_threshold=1.0, cells=(20, 40), positions=1, min_length=60)
    with pytest.raises(
        RequestError, match=r"all of \d+ pokes would go behind the camera or something nearer"
    ):
        follow(plan(goal, SIZE, only, Depth(metres, CAMERA)), world)


def test_what_slides_toward_the_camera_on_a_table_does_not_go_below_its_top() -> None:
    """A poke that leaves open how far away it goes is taken to go as the model expects there."""
    y = np.mgrid[: SIZE[0], : SIZE[1]][0]
    depth = Depth((FAR_M - 0.01 * y).astype(np.float32), CAMERA)  # nearer farther down

    def cup(pokes: Pokes, queries: np.ndarray) -> FlowMixture:
        """It slides on the table, down in the picture by about 20 px; a poke on it is followed."""
        moving = on_part(queries)
        flow = np.zeros((len(queries), 2, 2))
        poked = len(pokes) and on_part(pokes.xy)[0]
        flow[moving] = pokes.flow[0] if poked else [[0.0, 20.0], [0.0, 0.0]]
        means = np.concatenate([flow, -0.01 * flow[..., 1:]], -1)
        tril = np.broadcast_to([0.5, 0.5, 0.002] * np.eye(3), (*flow.shape[:-1], 3, 3))
        return FlowMixture(np.full(flow.shape[:-1], np.log(0.5)), means, tril)

    goal = Goal(np.array([60.0, 50.0]), np.array([0.0, 20.0]), 4.0)
    found, alone = (follow(plan(goal, SIZE, SEARCH, d), cup) for d in (depth, None))
    near_its_edge = on_part(found.pokes.xy) & (found.pokes.xy[:, 1] > 60)
    assert found.score[near_its_edge].max() == pytest.approx(alone.score[0], rel=0.05)
    opening = Goal(goal.point, None, 3.0)
    found, alone = (follow(plan(opening, SIZE, SEARCH, d), cup) for d in (depth, None))
    down = [np.sum(p.pokes.flow[:, 1] > 6) for p in (found, alone)]
    assert down[0] > 0.9 * down[1] > 10
    away = Goal(goal.point, np.array([0.0, -20.0]), 4.0)
    with pytest.raises(RequestError, match=r"none of \d+ pokes is expected to reach the goal"):
        follow(plan(away, SIZE, SEARCH), lambda pokes, queries: cup(Pokes(), queries))


def test_opening_needs_pokes_longer_than_what_counts_as_moving() -> None:
    goal = Goal(np.array([60.0, 50.0]), None, 3.0)
    found = follow(plan(goal, SIZE, replace(SEARCH, max_length=4.0)), drawer)
    assert found.score[0] > 0
    with pytest.raises(RequestError, match="longer than the tolerance of 3 px, received 3 px"):
        follow(plan(goal, SIZE, replace(SEARCH, max_length=3.0)), drawer)


def test_points_to_keep_decide_where_to_poke() -> None:
    """Whoever pokes the left half moves a point at the right, too."""
    kept = np.array([[150.0, 50.0], [190.0, 50.0]])

    def coupled(pokes: Pokes, queries: np.ndarray) -> FlowMixture:
        mixture = drawer(pokes, queries)
        if len(pokes) and pokes.xy[0, 0] < 60:
            means = mixture.means.copy()
            means[(queries == kept[0]).all(-1)] += (8.0, 0.0)
            mixture = FlowMixture(mixture.log_weights, means, mixture.scale_tril)
        return mixture

    point, motion = np.array([60.0, 50.0]), np.array([9.0, 0.0])
    found = follow(plan(Goal(point, motion, 2.0, keep=kept), SIZE, SEARCH), coupled)
    left = found.pokes.xy[:, 0] < 60
    np.testing.assert_allclose(found.disturbance[left], 0.5, atol=1e-3)  # one of two
    np.testing.assert_allclose(found.disturbance[~left], 0, atol=1e-3)
    assert not left[0]
    # also where they move less than the goal's tolerance
    loose = follow(plan(Goal(point, motion, 9.0, keep=kept), SIZE, SEARCH), coupled)
    assert loose.disturbance[loose.pokes.xy[:, 0] < 60].min() > 0.4
    free = follow(plan(Goal(point, motion, 2.0), SIZE, SEARCH), coupled)
    np.testing.assert_array_equal(free.disturbance, 0)


@pytest.mark.parametrize("motions", [1, 2, 3])
def test_few_motions_are_tried_in_each_place(motions: int) -> None:
    goal = Goal(np.array([60.0, 50.0]), None, 3.0)
    found = follow(plan(goal, SIZE, replace(SEARCH, motions=motions)), drawer)
    assert 0 < len(found) <= SEARCH.positions * motions


def test_a_part_is_opened_along_the_way_that_it_can_go() -> None:
    goal = Goal(np.array([60.0, 50.0]), None, 3.0)
    found = follow(plan(goal, SIZE, SEARCH), drawer)
    best = found.first(5)
    assert on_part(best.pokes.xy).all()
    angle = np.abs(best.pokes.flow[:, 1] / best.pokes.flow[:, 0])
    assert angle.max() < 0.5, best.pokes.flow
    assert best.success.min() > 0.9
    across = np.abs(found.pokes.flow[:, 1]) > 2 * np.abs(found.pokes.flow[:, 0])
    assert across.any()
    assert found.plausibility[across].max() < best.plausibility.min()
    np.testing.assert_allclose(best.progress, np.linalg.norm(best.pokes.flow, axis=-1), rtol=1e-6)


def test_lengths_are_limited() -> None:
    goal = Goal(np.array([60.0, 50.0]), np.array([9.0, 0.0]), 2.0)
    search = Search(1.0, cells=(20, 40), min_length=4.0, max_length=6.0)
    for steps in (plan(goal, SIZE, search), explore(SIZE, search, 2.0)):
        length = np.linalg.norm(follow(steps, drawer).pokes.flow, axis=-1)
        assert length.min() >= 4 - 1e-9
        assert length.max() <= 6 + 1e-9


def test_exploring_tells_the_information_of_jointly_gaussian_points() -> None:
    """All points move together but for noise: what each tells of the others has a closed form."""
    together, noise = 5.0, 0.5  # px

    def cloth(pokes: Pokes, queries: np.ndarray) -> FlowMixture:
        n = len(queries)
        mean = pokes.flow[0] if len(pokes) else np.zeros(2)
        std = noise if len(pokes) else np.hypot(together, noise)
        return FlowMixture(
            np.zeros((n, 1)), np.tile(mean, (n, 1, 1)), np.tile(std * np.eye(2), (n, 1, 1, 1))
        )

    found = follow(explore(SIZE, Search(1.0, cells=(20, 40)), 2.0), cloth)
    # in two dimensions H = log(2 pi e s^2)
    expected = np.log((together**2 + noise**2) / noise**2)
    np.testing.assert_allclose(found.information, expected, atol=0.15)
    np.testing.assert_array_equal(found.score, found.information)


def test_exploring_prefers_what_is_uncertain_and_tells_of_much() -> None:
    found = follow(explore(SIZE, SEARCH, 2.0), drawer)
    assert on_part(found.pokes.xy[0])
    assert found.success[0] == pytest.approx(0.5, abs=0.02)  # that it moves at all
    assert abs(found.pokes.flow[0, 0]) == pytest.approx(10)
    assert found.information[0] > 0.02
    kept_out = np.array([[60.0, 50.0, 40.0]])
    outside = follow(explore(SIZE, SEARCH, 0.1, kept_out), drawer)
    assert np.linalg.norm(outside.pokes.xy - (60, 50), axis=-1).min() > 40
    np.testing.assert_allclose(outside.information, 0, atol=1e-9)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"point": np.array([250.0, 50.0])}, "goal 0 of 1 at x=250, y=50 px lies outside"),
        ({"point": np.array([np.nan, 50.0])}, "point must be finite, received [nan, 50.0]"),
        ({"motion": np.zeros(2)}, "motion must not be zero, received [0.0, 0.0]"),
        ({"motion": np.array([np.inf, 0])}, "motion must be finite, received [inf, 0.0]"),
        ({"tolerance": 0.0}, "tolerance must be > 0 px, received 0"),
        ({"keep": np.array([[5.0, 120.0]])}, "point to keep 0 of 1 at x=5, y=120 px lies outside"),
        ({"keep": np.ones((65, 2))}, "keep must hold at most 64 points, received 65"),
        ({"keep_out": np.array([[5.0, 5.0, -1.0]])}, "must be > 0 px, received [-1.0]"),
        ({"keep_out": np.array([[100.0, 50.0, 1e3]])}, "keep_out leaves no place to poke"),
    ],
)
def test_senseless_goals_are_refused(values: dict[str, np.ndarray], words: str) -> None:
    goal = {"point": np.array([60.0, 50.0]), "motion": np.array([9.0, 0.0]), "tolerance": 2.0}
    with pytest.raises(RequestError, match=re.escape(words)):
        follow(plan(Goal(**{**goal, **values}), SIZE, SEARCH), drawer)


@pytest.mark.parametrize(
    ("disc", "words"),
    [
        ([1.0, 2.0, float("nan")], "keep_out must be finite, received .*nan"),
        ([1.0, 2.0, -3.0], "radii of keep_out must be > 0 px, received .*-3"),
    ],
)
def test_senseless_discs_are_refused_for_exploring_too(disc: list[float], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        follow(explore(SIZE, SEARCH, 2.0, np.array([disc])), drawer)


def test_default_tolerances() -> None:
    assert default_tolerance(np.array([30.0, 40.0]), (480, 640)) == pytest.approx(15)
    assert default_tolerance(None, (480, 640)) == pytest.approx(12.8)


def test_the_predictor_is_asked_as_the_library_answers(tmp_path: Path) -> None:
    predictor = FlowPredictor(load_model(save_small_model(tmp_path / "small.safetensors")))
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    view = View(image, predictor.encode(image))
    goal = Goal(np.array([30.0, 20.0]), np.array([6.0, 2.0]), 2.0)
    search = Search(0.05, cells=(8, 8), positions=5, motions=3)
    found = answer_asks(predictor, view, plan(goal, view.size, search), Settings())
    assert len(found) == 15
    for row in (0, 14):
        mixture = view.in_pixels(
            predictor.predict(
                view.scene,
                *view.normalised(Pokes(found.pokes.xy[[row]], found.pokes.flow[[row]])),
                (goal.point[None] + 0.5) / (64, 48),
            )
        )
        success = mixture.probability_within(goal.motion, goal.tolerance)[0]
        assert found.success[row] == pytest.approx(success, abs=1e-3)
        progress = mixture.mean()[0] @ goal.motion / (goal.motion @ goal.motion)
        assert found.progress[row] == pytest.approx(progress, abs=1e-4)
