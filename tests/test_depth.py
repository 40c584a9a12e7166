# SPDX-License-Identifier: MIT
"""Motion in depth without ROS: units, occlusion, lifted models, training, point clouds."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fpt_model import (
    FlowMixture,
    FlowPokeTransformer,
    FlowPredictor,
    FPTConfig,
    load_model,
    save_model,
)
from fpt_model.depth import DEPTH_FORMATS, Depth, DepthError, Intrinsics
from fpt_model.geometry import grid
from fpt_model.lift import DEPTH_STD, lift, lifted_state
from fpt_model.occlusion import occluded, turned_away
from fpt_model.ply import write_ply
from fpt_model.scene_flow import (
    displacement,
    displacement_covariance,
    image_motion,
    reduce_motion,
    scene_flow,
    upsample_motion,
)
from fpt_ros.cli import main
from fpt_ros.commands.depth import view_geometries
from sim import Simulator
from sim.dataset import Settings, write_dataset
from sim.flow import dense_flow
from training.config import DataConfig, RunConfig
from training.data import Shards, make_example, random_crop
from training.train import Trainer, start_from

CAMERA = Intrinsics(400.0, 420.0, 310.5, 250.0)
SMALL = FPTConfig(
    name="small",
    encoder="vit_tiny_patch16_224",
    encoder_kwargs={"depth": 1, "embed_dim": 48, "num_heads": 2},
    image_size=64,
    width=32,
    depth=2,
    head_dim=16,
    position_bands=2,
)


def seeded(config: FPTConfig) -> FlowPokeTransformer:
    """A model with random weights, all of them in use."""
    torch.manual_seed(3)
    model = FlowPokeTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# --- units -----------------------------------------------------------------------------------


def test_pixels_and_points_round_trip() -> None:
    rng = np.random.default_rng(0)
    xy, z = rng.uniform(0, 640, (50, 2)), rng.uniform(0.3, 9, 50)
    points = CAMERA.unproject(xy, z)
    np.testing.assert_allclose(CAMERA.project(points), xy, atol=1e-9)
    np.testing.assert_array_equal(points[:, 2], z)
    np.testing.assert_allclose(CAMERA.unproject(CAMERA.centre, 2.0), [0, 0, 2])
    assert np.isnan(CAMERA.project([0.1, 0.2, -1.0])).all()


def test_motion_in_the_image_and_in_space_round_trip() -> None:
    rng = np.random.default_rng(1)
    xy, z = rng.uniform(0, 640, (50, 2)), rng.uniform(0.3, 9, 50)
    motion = np.column_stack([rng.normal(0, 50, (50, 2)), rng.uniform(-0.6, 1, 50)])
    flow = displacement(xy, z, motion, CAMERA)
    np.testing.assert_allclose(flow[:, 2], z * motion[:, 2])
    np.testing.assert_allclose(image_motion(xy, z, flow, CAMERA), motion, atol=1e-9)
    assert not displacement(xy, z, np.zeros((50, 3)), CAMERA).any(), "still is exactly still"
    assert np.isnan(displacement(xy[0], np.nan, motion[0], CAMERA)).all()
    # a point on the optical axis that comes 10 cm nearer
    towards = displacement(CAMERA.centre, 2.0, [0, 0, -0.05], CAMERA)
    np.testing.assert_allclose(towards, [0, 0, -0.1])
    # nothing passes the camera
    assert displacement(CAMERA.centre, 2.0, [0, 0, -3], CAMERA)[2] > -2


def test_uncertainty_in_space_is_that_of_draws() -> None:
    rng = np.random.default_rng(2)
    xy, z, motion = np.array([500.0, 100.0]), 2.0, np.array([20.0, -10.0, 0.1])
    tril = np.array([[4.0, 0, 0], [1.0, 3.0, 0], [0.002, -0.004, 0.01]])
    draws = motion + rng.standard_normal((200_000, 3)) @ tril.T
    expected = np.cov(displacement(xy, z, draws, CAMERA).T)
    found = displacement_covariance(xy, z, motion, tril @ tril.T, CAMERA)
    np.testing.assert_allclose(found, expected, rtol=0.03, atol=2e-6)


def test_the_simulation_says_the_same_in_both_ways() -> None:
    """Flow with relative depth, with the depth image, is the true scene flow in metres."""
    world = Simulator("door", 2, (60, 80))
    frame, rng = world.render(), np.random.default_rng(0)
    moved = 0.0
    for camera_moves in (0.0, 1.0):
        future = world.sample_future(rng, camera_moves)
        truth = dense_flow(
            frame.depth,
            frame.bodies,
            frame.intrinsics,
            frame.camera_pose,
            future.body_motion,
            future.camera_motion,
        )
        rows, columns = np.mgrid[0:60, 0:80]
        xy, z = np.stack([columns, rows], -1), np.where(frame.depth > 0, frame.depth, np.nan)
        camera = Intrinsics.from_matrix(frame.intrinsics)
        found = displacement(xy, z, truth.motion * [80, 60, 1], camera)
        seen = frame.depth > 0
        np.testing.assert_allclose(found[seen], truth.scene_flow[seen], atol=1e-4)
        moved = max(moved, float(np.abs(truth.scene_flow[..., 2]).max()))
        back = image_motion(xy, z, truth.scene_flow, camera)[seen]
        np.testing.assert_allclose(back, (truth.motion * [80, 60, 1])[seen], atol=2e-2)
    assert moved > 0.02, "something moves in depth"


@pytest.mark.parametrize(
    ("encoding", "values", "expected"),
    [
        ("32FC1", [0.5, 0.0, -1.0, np.nan, np.inf, -np.inf], [0.5] + [np.nan] * 5),
        ("16UC1", [500, 0, 1, 65535], [0.5, np.nan, 0.001, 65.535]),
    ],
)
def test_depth_is_metres_and_nan(encoding: str, values: list, expected: list) -> None:
    layout = DEPTH_FORMATS[encoding]
    found = layout.read(np.array([values], layout.dtype))
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)
    with pytest.raises(DepthError, match="received float64"):
        layout.read(np.zeros((2, 2)))


def test_depth_is_read_at_the_pixel_and_never_between_two() -> None:
    metres = np.array([[1.0, 2.0], [np.nan, 4.0]], np.float32)
    depth = Depth(metres, CAMERA)
    xy = [[0, 0], [0.4, 0.4], [0.6, 0], [1.5, 1.5], [0, 1], [-0.5, -0.5], [1.6, 0], [0, np.nan]]
    np.testing.assert_array_equal(depth.at(xy), [1, 1, 2, 4, np.nan, 1, np.nan, np.nan])
    with pytest.raises(DepthError, match="none of the 6 px"):
        Depth(np.full((2, 3), np.nan, np.float32), CAMERA)
    with pytest.raises(DepthError, match=r"above 0 m, and NaN .*, received -0\.5 m"):
        Depth(np.array([[1.0, -0.5, np.nan]], np.float32), CAMERA)


@pytest.mark.parametrize("wrong", [(0, 1, 1, 1), (1, -1, 1, 1), (1, 1, np.nan, 1)])
def test_wrong_intrinsics_are_named(wrong: tuple[float, ...]) -> None:
    with pytest.raises(DepthError, match=f"fx={wrong[0]:g}, fy={wrong[1]:g}"):
        Intrinsics(*wrong)


def test_scene_flow_of_a_distribution() -> None:
    """What is reduced is what moves, in metres; a point without depth is NaN and no other."""
    metres = np.full((40, 60), 2.0, np.float32)
    metres[10, 20] = np.nan
    depth = Depth(metres, Intrinsics(50, 50, 29.5, 19.5))
    xy = np.array([[29.5, 19.5], [40.0, 30.0], [20.0, 10.0]])
    means = np.array([[[5.0, 0, -0.1], [0, 0, 0.0]]] * 3)
    tril = np.broadcast_to(np.diag([0.5, 0.5, 0.01]), (3, 2, 3, 3))
    mixture = FlowMixture(np.log([[0.8, 0.2]] * 3), means, tril)
    found = scene_flow(mixture, reduce_motion(mixture, "mode", depth.intrinsics), xy, depth)
    np.testing.assert_allclose(found.points[0], [0, 0, 2], atol=0.03)
    np.testing.assert_allclose(found.flow[0], [5 / 50 * 1.8, 0, -0.2], atol=1e-6)
    np.testing.assert_allclose(found.weight[:2], 0.8)
    assert np.isnan(found.points[2]).all()
    assert np.isnan([*found.flow[2], found.weight[2], found.std[2]]).all()
    assert np.isfinite(found.flow[:2]).all()
    # the modes are 0.27 m apart with weights 0.8 and 0.2: std about 0.4 * 0.27
    assert 0.08 < found.std[0] < 0.15
    np.testing.assert_allclose(
        reduce_motion(mixture, "mean", depth.intrinsics)[0], [4, 0, -0.08], atol=1e-9
    )


def test_motion_does_not_bleed_over_the_edge_of_what_moves() -> None:
    """From an 8 x 8 grid to 64 x 64 px: a smooth motion stays smooth, an edge stays where it is."""
    rows, columns = np.mgrid[0:64, 0:64]
    xy = np.stack([columns, rows], -1)
    near = (rows >= 25) & (rows < 39) & (columns >= 25)
    depth = np.where(near, 1.0, 2.0)

    def motion(xy: np.ndarray, near: np.ndarray) -> np.ndarray:
        moving = np.concatenate([0.1 * xy + [3, 0], np.full((*near.shape, 1), -0.1)], -1)
        return np.where(near[..., None], moving, 0.0)

    cells = np.arange(8) * 8 + 3.5
    middle = np.stack(np.meshgrid(cells, cells), -1)
    field = motion(middle, near[4::8, 4::8])
    found, expected = upsample_motion(field, depth), motion(xy, near)
    assert np.abs(found - expected)[~near].max() < 1e-3
    inner = np.abs(found - expected)[28:36, 28:60]  # between the middles of cells
    assert inner.max() < 1e-6, "linear within the surface"
    blended = upsample_motion(field, np.full((64, 64), np.nan))
    assert np.abs(blended - expected)[~near].max() > 1, "without depth it is bilinear"
    np.testing.assert_allclose(blended[30, 30], found[30, 30], atol=1e-6)


# --- occlusion -------------------------------------------------------------------------------


def board(shift: float, relative: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A square of 10 px at 1 m before a wall at 2 m, and its motion."""
    depth = np.full((40, 40), 2.0)
    motion = np.zeros((40, 40, 3))
    depth[15:25, 10:20] = 1.0
    motion[15:25, 10:20] = [shift, 0, relative]
    return depth, motion


def test_a_board_hides_what_it_moves_before() -> None:
    depth, motion = board(6)
    expected = np.zeros((40, 40), bool)
    expected[15:25, 20:26] = True
    np.testing.assert_array_equal(occluded(depth, motion), expected)
    # behind the wall it is hidden itself, by the wall that is seen: that behind it is not known
    depth, motion = board(6, 1.5)
    expected[15:25] = False
    expected[15:25, 14:20] = True
    np.testing.assert_array_equal(occluded(depth, motion), expected)


@pytest.mark.parametrize("shift", [-1.5, 1.5, -2.0])
def test_of_the_nearest_nothing_is_hidden_not_even_its_edge(shift: float) -> None:
    """The wall beside the leading edge goes the other way, seen from the board."""
    depth, motion = board(shift)
    assert not occluded(depth, motion)[depth == 1].any()


@pytest.mark.parametrize("noise", [0.0, 0.002])
@pytest.mark.parametrize("side", [0, 1])
def test_of_two_flush_surfaces_the_one_that_slides_hides_no_edge_of_its_own(
    noise: float, side: int
) -> None:
    """Depth does not tell them apart, also with a camera's noise and steps of 1 mm."""
    rng = np.random.default_rng(0)
    depth = np.round(2.0 + noise * rng.standard_normal((40, 40)), 3)
    motion = np.zeros((40, 40, 3))
    moving = np.s_[:, 20:] if side else np.s_[:, :20]
    motion[moving] = [-3 if side else 3, 0, 0]
    assert not occluded(depth, motion)[moving].any()
    # a flush drawer's front comes nearer by 30 %: it covers the frame and is covered by nothing
    motion[:] = 0
    rows, columns = np.mgrid[0:40, 0:40]
    front = np.s_[10:30, 10:30]
    grow = 1 / 0.7 - 1
    growth = np.stack([(columns - 19.5) * grow, (rows - 19.5) * grow, np.full((40, 40), -0.3)], -1)
    motion[front] = growth[front]
    hidden = occluded(depth, motion)
    assert not hidden[front].any()
    assert hidden.sum() > 200


def test_what_comes_near_hides_without_holes() -> None:
    depth, motion = board(0, -0.5)  # twice as large
    rows, columns = np.mgrid[0:40, 0:40]
    on = depth == 1
    motion[on, 0], motion[on, 1] = (columns - 14.5)[on], (rows - 19.5)[on]
    hidden = occluded(depth, motion)
    ring = (np.abs(rows - 19.5) < 9) & (np.abs(columns - 14.5) < 9) & ~on
    assert hidden[ring].all()
    assert not hidden[on].any()
    assert hidden.sum() <= 20 * 20 - 100


def test_nothing_is_hidden_when_nothing_moves_or_all_leaves() -> None:
    frame = Simulator("drawer", 1, (60, 80)).render()
    depth = np.where(frame.depth > 0, frame.depth, np.nan)
    assert not occluded(depth, np.zeros((60, 80, 3))).any()
    assert not occluded(depth, np.full((60, 80, 3), [100.0, 0, 0])).any()
    assert not occluded(np.full((4, 4), np.nan), np.full((4, 4, 3), np.nan)).any()
    with pytest.raises(ValueError, match="received shapes"):
        occluded(depth, np.zeros((60, 80, 2)))


@pytest.mark.parametrize(("degrees", "away"), [(60, False), (120, True)])
def test_a_leaf_turned_past_its_edge_shows_its_back(degrees: float, away: bool) -> None:
    """What then covers a point is nearer by the leaf's thickness alone."""
    size, depth = (40, 40), np.full((40, 40), 2.0)
    K = np.array([[100, 0, 19.5], [0, 100, 19.5], [0, 0, 1]])
    motion = np.tile(np.eye(4), (2, 1, 1))  # about the vertical axis through its middle
    motion[1, :3, :3] = cv2.Rodrigues(np.array([0, np.deg2rad(degrees), 0]))[0]
    motion[1, :3, 3] = [0, 0, 2] - motion[1, :3, :3] @ [0, 0, 2]
    bodies = np.ones(size, np.uint8)
    bodies[:, :3] = 0
    flow = dense_flow(depth, bodies, K, np.eye(4), motion).flow * 40
    rows, columns = np.mgrid[0:40, 0:40]
    found = turned_away(columns + flow[..., 0], rows + flow[..., 1], depth, bodies)
    assert (found[:, 3:] == away).all()
    assert not found[:, :3].any()


def test_a_moving_camera_turns_nothing_away_at_edges() -> None:
    """Where a body's own parts lie one before the other, and before nothing at all."""
    seen = flagged = 0
    for kind, seed in (("drawer", 1), ("door", 3)):
        world, rng = Simulator(kind, seed, (96, 96)), np.random.default_rng(0)
        frame = world.render()
        v, u = np.mgrid[0:96, 0:96]
        for _ in range(6):
            truth = world.truth(frame, world._still(world._draw_camera_motion(rng)))
            end_u, end_v = u + truth.flow[..., 0] * 96, v + truth.flow[..., 1] * 96
            away = turned_away(end_u, end_v, frame.depth, frame.bodies)
            row, column = (np.clip(np.rint(a), 0, 95).astype(int) for a in (end_v, end_u))
            later = frame.depth + truth.scene_flow[..., 2]
            there = np.abs(truth.next.depth[row, column] - later) < 0.01 * later
            there &= (frame.depth > 0) & (truth.next.bodies[row, column] == frame.bodies)
            seen, flagged = seen + there.sum(), flagged + (there & away).sum()
    assert flagged < 2e-4 * seen


@pytest.mark.parametrize(("kind", "seed", "least"), [("drawer", 20, 0.85), ("slider", 3, 0.85)])
def test_occlusion_is_that_of_the_second_rendering(kind: str, seed: int, least: float) -> None:
    """Where what comes to hide something was seen before, unlike the inside of a drawer."""
    world = Simulator(kind, seed, (160, 160))
    frame = world.render()
    future = world.sample_future(np.random.default_rng(0))
    truth = world.truth(frame, future)
    moved = dense_flow(
        frame.depth, frame.bodies, frame.intrinsics, frame.camera_pose, future.body_motion
    )
    rows, columns = np.mgrid[0:160, 0:160]
    after = np.rint(np.stack([columns, rows], -1) + moved.flow * 160)
    hidden = truth.occluded & ((after >= 0) & (after < 160)).all(-1)
    found = occluded(np.where(frame.depth > 0, frame.depth, np.nan), moved.motion * [160, 160, 1])
    assert hidden.sum() > 1000
    assert (found & hidden).sum() / (found | hidden).sum() > least


# --- models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["scaled", "reference"])
def test_a_lifted_model_is_the_planar_one_and_knows_nothing_of_depth(head: str) -> None:
    planar = seeded(replace(SMALL, head=head))  # type: ignore[arg-type]
    solid = lift(planar, "small-3d")
    assert (solid.config.name, solid.config.flow_dim) == ("small-3d", 3)
    predictors = [FlowPredictor(model) for model in (planar, solid)]
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
    scenes = [p.encode(image) for p in predictors]
    pos, flow, queries = rng.random((3, 2)), rng.normal(0, 0.1, (3, 2)), rng.random((20, 2))
    expected = predictors[0].predict(scenes[0], pos, flow, queries)
    for dz in ([np.nan] * 3, [0.0, 0.2, -0.3], [np.nan, 0.1, np.nan]):
        found = predictors[1].predict(scenes[1], pos, np.column_stack([flow, dz]), queries)
        marginal = found.marginal(2)
        np.testing.assert_allclose(marginal.log_weights, expected.log_weights, atol=2e-5)
        np.testing.assert_allclose(marginal.means, expected.means, atol=2e-6)
        np.testing.assert_allclose(marginal.scale_tril, expected.scale_tril, atol=2e-6)
        np.testing.assert_allclose(found.means[..., 2], 0, atol=1e-12)
        np.testing.assert_allclose(found.scale_tril[..., 2, :2], 0, atol=1e-12)
        np.testing.assert_allclose(found.scale_tril[..., 2, 2], DEPTH_STD, atol=1e-6)
    with pytest.raises(ValueError, match="received 3"):
        lifted_state(solid)


def test_a_poke_in_the_image_leaves_its_depth_open() -> None:
    predictor = FlowPredictor(seeded(replace(SMALL, flow_dim=3)))
    rng = np.random.default_rng(0)
    scene = predictor.encode(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    pos, flow, queries = rng.random((2, 2)), rng.normal(0, 0.1, (2, 2)), rng.random((5, 2))

    def means(*dz: float) -> np.ndarray:
        return predictor.predict(scene, pos, np.column_stack([flow, dz]), queries).means

    unknown = predictor.predict(scene, pos, flow, queries).means
    assert unknown.shape == (5, 4, 3)
    np.testing.assert_allclose(means(np.nan, np.nan), unknown, atol=1e-6)
    assert np.isfinite(unknown).all()
    for known in (means(0.0, 0.0), means(np.nan, 0.0), means(0.3, np.nan)):
        assert np.abs(known - unknown).max() > 1e-4
    assert predictor.sample(scene, pos, flow, queries, 2).shape == (2, 5, 3)
    with pytest.raises(ValueError, match=r"poke_flow must be finite, at most .*, received .*inf"):
        means(np.inf, 0.0)
    with pytest.raises(ValueError, match="poke_flow must be finite"):
        predictor.predict(scene, pos, flow * np.nan, queries)


@pytest.mark.parametrize("seed", [1, 4, 10])
def test_the_shipped_model_of_depth_follows_pokes_in_depth(seed: int) -> None:
    """A free body poked sideways, which in the picture alone may come nearer or go away."""
    predictor = FlowPredictor.load("fpt-tiny-3d")
    assert predictor.config.flow_dim == 3
    world = Simulator("body", seed, (160, 160))
    frame, future = world.render(), world.sample_future(np.random.default_rng(0))
    truth = dense_flow(
        frame.depth, frame.bodies, frame.intrinsics, frame.camera_pose, future.body_motion
    )
    lengths = np.linalg.norm(truth.flow, axis=-1)
    row, column = np.unravel_index(np.nanargmax(lengths), lengths.shape)
    poked, scene = (np.array([[column, row]]) + 0.5) / 160, predictor.encode(frame.rgb)

    def depth(dz: float) -> float:
        return float(predictor.predict(scene, poked, [[0.1, 0, dz]], poked).mean()[0, 2])

    assert depth(-0.1) < -0.005
    assert depth(0.1) > 0.02


# --- training --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    settings = Settings(size=64, futures=3, images_per_world=2, images_per_shard=6)
    for split in ("train", "val"):
        write_dataset(folder, split, 6, settings)
    return folder


def test_relative_depth_is_the_same_in_every_view(data: Path) -> None:
    """Under crops, mirroring and turns: that of the stored pixel; the rest as without it."""
    shards = Shards(data, "train")
    config = DataConfig(
        target_noise=0, poke_noise=0, planar_pokes=0, queries_per_group=4, quarter_turn=0.5
    )
    turned, changes = set(), []
    for index in range(len(shards)):
        sample = shards[index]
        solid, planar = (
            make_example(sample, 32, config, np.random.default_rng(index), dims) for dims in (3, 2)
        )
        size = sample.depth.shape
        rng = np.random.default_rng(index)
        crop = random_crop(size, config, rng)
        future = int(rng.choice(sample.futures, 1)[0])
        turned.add((crop.flip, crop.turns))
        rows, columns = np.mgrid[0 : size[0], 0 : size[1]][:, crop.box[0], crop.box[1]]
        pixels = np.stack([columns.ravel(), rows.ravel()], -1)
        places = torch.from_numpy(crop.positions(pixels))
        for name in ("poke", "query"):
            pos, flow = (
                getattr(solid, f"{name}_{what}").flatten(0, -2) for what in ("pos", "flow")
            )
            assert torch.equal(getattr(planar, f"{name}_pos").flatten(0, -2), pos)
            known = ~flow.isnan().any(-1)
            torch.testing.assert_close(
                getattr(planar, f"{name}_flow").flatten(0, -2)[known], flow[known][:, :2]
            )
            pixel = pixels[torch.cdist(pos.double(), places).argmin(1)]
            expected = sample.flow_at(future, pixel).depth_change.clip(-1, 1)
            np.testing.assert_allclose(flow[known][:, 2], expected[known], atol=1e-6)
            changes.append(np.abs(expected).max())
    assert len(turned) > 2
    assert max(changes) > 0.01, "something moves in depth"


def test_pokes_come_with_and_without_depth(data: Path) -> None:
    sample, config = Shards(data, "train")[0], DataConfig(planar_pokes=0.5, futures_per_image=3)
    known = []
    for seed in range(30):
        example = make_example(sample, 32, config, np.random.default_rng(seed), 3)
        assert example.poke_flow[..., :2].isfinite().all()
        known += [~z.isnan().numpy() for z in example.poke_flow[..., 2]]
    first = np.array([k[0] for k in known])
    assert 0.35 < first.mean() < 0.65
    for k in known:
        assert (np.diff(k.astype(int)) >= 0).all(), "unknown ones come first"
    assert any(k[-1] and not k[0] for k in known)
    assert any(not k.any() for k in known)


def test_a_planar_model_goes_on_in_three_dimensions(data: Path, tmp_path: Path) -> None:
    """A few steps from a lifted model: the loss is finite, depth is learned, a file comes out."""
    planar = seeded(SMALL)
    save_model(planar, tmp_path / "planar.safetensors")
    model = replace(SMALL, name="small-3d", flow_dim=3, position_bands=2)
    start = FlowPokeTransformer(model)
    start_from(start, str(tmp_path / "planar.safetensors"))
    for key, value in lifted_state(planar).items():
        torch.testing.assert_close(start.state_dict()[key], value)
    config = RunConfig.from_dict(
        {
            "model": model.to_dict(),
            "data": {"visible_pokes": [0, 1, 2], "queries_per_group": 4},
            "optim": {
                "batch_size": 4,
                "steps": 3,
                "warmup_steps": 1,
                "precision": "fp32",
                "start_from": str(tmp_path / "planar.safetensors"),
                "validate_every": 3,
            },
        }
    )
    trainer = Trainer(config, data, tmp_path / "run")
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.run()
    after = trainer.model.state_dict()
    w = SMALL.width
    depth_columns = after["embed.project.weight"][:, 2 * w : 3 * w]
    assert depth_columns.abs().max() > 0, "it looks at what pokes do in depth"
    k = SMALL.components
    row = k + 2  # the first component's mean in depth
    key = f"head.{len(trainer.model.head) - 1}.weight"
    assert (after[key][row] - before[key][row]).abs().max() > 0
    assert load_model(tmp_path / "run" / "model.safetensors").config.flow_dim == 3


def test_the_shipped_recipe_goes_on_from_the_shipped_planar_one() -> None:
    folder = Path(__file__).parents[1] / "training" / "configs"
    planar, config = (RunConfig.load(folder / f"{n}.yaml") for n in ("tiny", "tiny-3d"))
    assert config.model == replace(planar.model, name="fpt-tiny-3d", flow_dim=3)
    assert config.data == replace(planar.data, planar_pokes=0.5)
    assert config.optim.start_from == "fpt-tiny"


def test_tracked_videos_show_no_depth() -> None:
    from training.tracks import TrackShards

    with pytest.raises(ValueError, match="flow_dim = 3"):
        TrackShards.example(  # type: ignore[arg-type]
            object(), 0, FPTConfig(flow_dim=3), DataConfig(), np.random.default_rng(0)
        )


# --- files -----------------------------------------------------------------------------------


def test_ply_holds_what_was_written(tmp_path: Path) -> None:
    x, red = np.array([0.5, -1.0, np.pi]), np.array([0, 128, 255], np.uint8)
    write_ply(tmp_path / "a.ply", {"x": x, "red": red, "vx": 2 * x})
    header, _, body = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")
    assert header.decode().splitlines() == [
        "ply",
        "format binary_little_endian 1.0",
        "element vertex 3",
        "property float x",
        "property uchar red",
        "property float vx",
    ]
    rows = np.frombuffer(body, [("x", "<f4"), ("red", "u1"), ("vx", "<f4")])
    np.testing.assert_array_equal(rows["red"], red)
    np.testing.assert_allclose(rows["vx"], 2 * x, rtol=1e-6)
    with pytest.raises(ValueError, match=r"\[2\]"):
        write_ply(tmp_path / "b.ply", {"x": x, "y": x[:2]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture with its depth, in m and in mm, and a model of each kind."""
    out = tmp_path_factory.mktemp("files")
    frame = Simulator("drawer", 1, (48, 64)).render()
    cv2.imwrite(str(out / "photo.png"), frame.rgb[..., ::-1])
    np.save(out / "depth.npy", frame.depth)
    (out / "empty.npy").touch()
    with (out / "several.npy").open("wb") as file:
        np.savez(file, one=frame.depth, two=frame.depth)
    cv2.imwrite(str(out / "depth.png"), (frame.depth * 1000).round().astype(np.uint16))
    cv2.imwrite(str(out / "small.png"), np.ones((24, 32), np.uint16))
    save_model(seeded(replace(SMALL, flow_dim=3)), out / "solid.safetensors")
    save_model(seeded(SMALL), out / "planar.safetensors")
    return out


def fpt_predict(folder: Path, *arguments: object, model: str = "solid") -> int:
    words = "predict", folder / "photo.png", "--model", folder / f"{model}.safetensors", *arguments
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


CAMERA_OPTION = "--intrinsics", "70,70,31.5,23.5"


def test_fpt_predict_writes_scene_flow(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clouds = {}
    for name in ("depth.npy", "depth.png"):
        ply = tmp_path / f"{name}.ply"
        depth = "--depth", folder / name, *CAMERA_OPTION, "--ply", ply, "--ply-grid", "16x12"
        assert fpt_predict(folder, "--poke", "30,20,5,0,-0.1", "--query", "40,30", *depth) == 0
        out = capsys.readouterr().out
        assert "moves by (5, 0) and -0.1 m in depth" in out
        assert "dz (m)" in out
        header, _, body = ply.read_bytes().partition(b"end_header\n")
        names = [line.split()[-1] for line in header.decode().splitlines() if "property" in line]
        position, colour, rest = "x y z", "red green blue", "vx vy vz weight std"
        assert names == f"{position} {colour} {rest}".split()
        types = ["u1" if n in colour.split() else "<f4" for n in names]
        clouds[name] = np.frombuffer(body, list(zip(names, types, strict=True)))
    metres, millimetres = clouds.values()
    known = np.load(folder / "depth.npy")[2::4, 2::4] > 0
    assert len(metres) == known.sum()
    for field in ("x", "z", "vz", "std"):
        np.testing.assert_allclose(millimetres[field], metres[field], atol=3e-3)
    # it is the library's answer
    predictor = FlowPredictor(load_model(folder / "solid.safetensors"))
    image = cv2.imread(str(folder / "photo.png"))[..., ::-1].copy()
    stored = np.load(folder / "depth.npy")
    depth = Depth(np.where(stored > 0, stored, np.float32(np.nan)), Intrinsics(70, 70, 31.5, 23.5))
    poke = np.array([[30.0, 20.0]])
    cells = grid((12, 16))
    mixture = predictor.predict(
        predictor.encode(image),
        (poke + 0.5) / [64, 48],
        np.column_stack([[[5 / 64, 0]], -0.1 / depth.at(poke)]),
        cells,
    )
    mixture = mixture.scaled(64, 48, 1)
    motion = reduce_motion(mixture, "median", depth.intrinsics)
    found = scene_flow(mixture, motion, cells * [64, 48] - 0.5, depth)
    seen = np.isfinite(found.points[:, 2])
    flow = np.stack([metres[name] for name in ("vx", "vy", "vz")], -1)
    np.testing.assert_allclose(flow, found.flow[seen], atol=1e-4)
    np.testing.assert_allclose(metres["std"], found.std[seen], rtol=1e-2)


def test_fpt_predict_tells_metres_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    depth = "--depth", folder / "depth.npy", *CAMERA_OPTION
    assert fpt_predict(folder, "--poke", "30,20,5,0", "--query", "40,30", "--json", *depth) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["unit"] == "px, px, m"
    assert "dz" not in answer["pokes"][0]
    assert len(answer["queries"][0]["modes"][0]["mean"]) == 3
    assert fpt_predict(folder, "--poke", "30,20,5,0", "--query", "40,30", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["unit"] == "px"
    assert len(answer["queries"][0]["modes"][0]["mean"]) == 2


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        ("planar", ("--depth", "depth.npy"), "small has flow_dim 2"),
        ("solid", ("--ply", "out.ply"), "need --depth"),
        ("solid", ("--depth", "none.npy"), "no such file"),
        ("solid", ("--depth", "empty.npy"), "cannot read"),
        ("solid", ("--depth", "several.npy"), "expected a picture or .npy"),
        ("solid", ("--depth", "depth.npy", "--ply", "."), "--ply: cannot write"),
        ("solid", ("--depth", "small.png"), "picture's size 64 x 48"),
        ("solid", ("--depth", "photo.png"), "received uint8 of shape (48, 64, 3)"),
        ("solid", ("--depth", "depth.npy", "--intrinsics", "0,1,2,3"), "fx=0"),
        ("solid", ("--depth", "depth.npy", "--ply", "none/out.ply"), "existing folder"),
        ("solid", ("--poke", "3,3,1,1,0.5"), "no depth is known at x=3, y=3"),
    ],
)
def test_mistakes_with_depth_are_named(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(folder)
    assert fpt_predict(folder, "--poke", "30,20,5,0", *arguments, model=model) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(importlib.util.find_spec("open3d") is not None, reason="Open3D is there")
def test_a_view_needs_open3d(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    depth = "--depth", folder / "depth.npy", "--ply-grid", "8x6", "--view"
    assert fpt_predict(folder, "--poke", "30,20,5,0", *depth) == 2
    assert "pip install open3d" in " ".join(capsys.readouterr().err.split())


def test_open3d_reads_and_shows_what_is_written(tmp_path: Path) -> None:
    open3d = pytest.importorskip("open3d", exc_type=ImportError)
    rng = np.random.default_rng(0)
    columns = {name: rng.random(20).astype(np.float32) for name in ("x", "y", "z")}
    columns |= {n: rng.integers(0, 255, 20, dtype=np.uint8) for n in ("red", "green", "blue")}
    columns |= {n: np.linspace(0, 1, 20) for n in ("vx", "vy", "vz", "weight", "std")}
    write_ply(tmp_path / "a.ply", columns)
    cloud = open3d.t.io.read_point_cloud(str(tmp_path / "a.ply"))
    np.testing.assert_allclose(cloud.point.positions.numpy()[:, 0], columns["x"])
    np.testing.assert_allclose(cloud.point.vx.numpy()[:, 0], columns["vx"], rtol=1e-6)
    shown, lines = view_geometries(open3d, columns)
    assert len(shown.points) == 20
    assert len(lines.lines) == 19, "what does not move has no line"
