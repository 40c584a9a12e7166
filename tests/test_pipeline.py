# SPDX-License-Identifier: MIT
"""What an answer consists of, beside the same computed from the predictor alone."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from node_harness import save_small_model

from fpt_model import FlowPredictor, load_model
from fpt_model.depth import Depth, Intrinsics
from fpt_model.visualize import canvas_scale, draw_overlay
from fpt_ros.pipeline import Answer, Settings, View
from fpt_ros.pokes import Pokes

HEIGHT, WIDTH = 45, 63
CELLS = (15, 21)  # of three pixels each way: their centres are the middle pixels
SETTINGS = Settings(dense_size=CELLS, full_resolution=False)
POKE = Pokes(np.array([[40.0, 10.0]]), np.array([[12.0, 9.0]]))
QUERIES = np.array([[10.0, 5.0], [40.0, 30.0], [62.5, 44.5]])
PIXELS = np.random.default_rng(3).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> dict[int, FlowPredictor]:
    """By the number of dimensions."""
    folder = tmp_path_factory.mktemp("models")
    return {
        dims: FlowPredictor(load_model(save_small_model(folder / f"{dims}.safetensors", dims)))
        for dims in (2, 3)
    }


def answer(
    predictor: FlowPredictor,
    settings: Settings = SETTINGS,
    queries: np.ndarray | None = None,
    depth: Depth | None = None,
) -> Answer:
    view = View(PIXELS, predictor.encode(PIXELS), depth)
    return Answer(predictor, view, POKE, queries, settings)


def positions(xy: np.ndarray) -> np.ndarray:
    return (xy + 0.5) / [WIDTH, HEIGHT]


def centres() -> np.ndarray:
    """``[h * w, 2]`` of the cells, normalised."""
    rows, columns = np.mgrid[0 : CELLS[0], 0 : CELLS[1]]
    return np.stack([(columns + 0.5) / CELLS[1], (rows + 0.5) / CELLS[0]], -1).reshape(-1, 2)


@pytest.mark.parametrize("camera_static", [True, False])
def test_flow_is_in_px_at_the_middles_of_the_cells(
    predictors: dict[int, FlowPredictor], camera_static: bool
) -> None:
    predictor = predictors[2]
    settings = replace(SETTINGS, flow_reduce="mean", camera_static=camera_static)
    dense = predictor.predict(
        predictor.encode(PIXELS),
        positions(POKE.xy),
        POKE.flow / [WIDTH, HEIGHT],
        centres(),
        camera_static,
    )
    mean = (dense.weights[..., None] * dense.means).sum(1) * [WIDTH, HEIGHT]
    coarse = answer(predictor, settings).flow
    np.testing.assert_allclose(coarse, mean.reshape(*CELLS, 2), atol=1e-4)
    full = answer(predictor, replace(settings, full_resolution=True)).flow
    assert full.shape == (HEIGHT, WIDTH, 2)
    np.testing.assert_allclose(full[1::3, 1::3], coarse, atol=1e-4)


def test_each_setting_changes_what_it_says(predictors: dict[int, FlowPredictor]) -> None:
    predictor = predictors[2]
    usual = answer(predictor)
    dense = usual.view.in_pixels(usual._dense)
    for reduce in ("mean", "median", "mode"):
        found = answer(predictor, replace(SETTINGS, flow_reduce=reduce)).flow
        np.testing.assert_allclose(found.reshape(-1, 2), dense.reduce(reduce), atol=1e-4)
    assert np.abs(dense.reduce("mean") - dense.reduce("mode")).max() > 0.1
    static, may_move = usual, answer(predictor, replace(SETTINGS, camera_static=False))
    for product in ("flow", "influence"):
        difference = getattr(static, product) - getattr(may_move, product)
        assert np.abs(difference).max() > 0.01, product
    threshold = float(np.quantile(usual.influence, 0.7))
    strict = answer(predictor, replace(SETTINGS, kl_threshold_nats=threshold))
    assert strict.mask.mean() == pytest.approx(0.3, abs=0.01)
    np.testing.assert_array_equal(strict.mask, usual.influence > threshold)


def test_motion_in_depth_is_in_metres(predictors: dict[int, FlowPredictor]) -> None:
    predictor = predictors[3]
    metres = np.linspace(1, 4, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    depth = Depth(metres, Intrinsics(60.0, 60.0, WIDTH / 2, HEIGHT / 2))
    found = answer(predictor, queries=QUERIES, depth=depth).distribution
    raw = predictor.predict(
        predictor.encode(PIXELS),
        positions(POKE.xy),
        [[*(POKE.flow[0] / [WIDTH, HEIGHT]), np.nan]],  # nobody knows its motion in depth
        positions(QUERIES),
        True,
    )
    at = metres[[5, 30, 44], [10, 40, 62]]
    np.testing.assert_allclose(
        found.means[..., :2], raw.means[..., :2] * [WIDTH, HEIGHT], atol=1e-4
    )
    np.testing.assert_allclose(found.means[..., 2], raw.means[..., 2] * at[:, None], atol=1e-4)
    spread = found.component_covariances()[..., 2, 2] / raw.component_covariances()[..., 2, 2]
    np.testing.assert_allclose(spread, np.broadcast_to(at[:, None] ** 2, spread.shape), rtol=1e-4)


def test_the_overlay_shows_the_poke_where_it_is(predictors: dict[int, FlowPredictor]) -> None:
    shown = answer(predictors[2], replace(SETTINGS, full_resolution=True), queries=QUERIES)
    none = np.zeros((0, 2))
    without = draw_overlay(PIXELS, none, none, QUERIES, shown.distribution, None, shown.mask)
    drawn = np.abs(shown.overlay.astype(int) - without).max(-1) > 0
    scale = canvas_scale(HEIGHT, WIDTH)
    left, top, width, height = np.array(cv2.boundingRect(drawn.astype(np.uint8))) / scale
    # from the poked point to where it is moved, and an arrow's head or a dot's radius around
    start, end = POKE.xy[0], POKE.xy[0] + POKE.flow[0]
    np.testing.assert_allclose([left, top], start, atol=5)
    np.testing.assert_allclose([left + width, top + height], end, atol=5)
