# SPDX-License-Identifier: MIT
"""Figures of motion in depth, on a few images that the simulation really made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from node_harness import save_small_model

from fpt_model import load_model, save_model
from fpt_model.depth import Intrinsics
from fpt_model.lift import lift
from fpt_model.scene_flow import displacement
from fpt_ros.cli import main
from sim.dataset import Settings, replay, write_dataset
from training.data import Shards
from training.evaluation.depth import (
    depth_figures,
    depth_scenes,
    measure_depth,
    relative_to_color,
)
from training.evaluation.figures import Rows
from training.evaluation.measure import RADII
from training.evaluation.run import Evaluation, load_predictor
from training.evaluation.suite import EvaluationError, Suite

SETTINGS = Settings(size=64, images_per_shard=12, images_per_world=2)
SUITE = replace(Suite.load("procedural"), grid=32, scenes=6)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    for split in ("val", "held_out"):
        write_dataset(out, split, 12, SETTINGS)
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A planar model, and one that goes on from it."""
    folder = tmp_path_factory.mktemp("models")
    planar = save_small_model(folder / "planar.safetensors")
    save_model(lift(load_model(planar), "solid"), folder / "solid.safetensors")
    return planar, folder / "solid.safetensors"


def test_what_is_drawn_again_is_what_is_stored(data: Path) -> None:
    shards = Shards(data, "val")
    for number in (0, 3, 11):
        drawn, stored = replay("val", number, SETTINGS), shards[number]
        assert (drawn.number, drawn.world.kind) == (number, stored.kind)
        assert np.abs(drawn.frame.depth - stored.depth).max() < stored.depth.max() / 65535
        motions = np.stack([future.body_motion for future in drawn.futures])
        np.testing.assert_array_equal(motions, stored.body_motion)


def test_scenes_hold_the_truth_in_space(data: Path) -> None:
    scenes = list(depth_scenes(Shards(data, "val"), "val", SUITE, 0))
    assert len(scenes) >= 4
    for scene in scenes:
        motion = np.column_stack([scene.scene.flow * 64, scene.relative])[scene.known]
        camera = scene.depth.intrinsics
        assert isinstance(camera, Intrinsics)
        np.testing.assert_allclose(
            displacement(scene.xy, scene.z, motion, camera), scene.flow, atol=1e-4
        )
        assert scene.hidden.shape == (64, 64)
        assert not (scene.hidden & np.isnan(scene.depth.metres)).any()
    assert sum(scene.hidden.sum() for scene in scenes) > 50


def test_worlds_that_cannot_be_drawn_again_are_refused_at_once(
    data: Path, models: tuple[Path, Path]
) -> None:
    _, solid = (load_predictor(str(path)) for path in models)
    evaluation = Evaluation(SUITE, data, 0)
    shards = evaluation.shards["val"]
    assert isinstance(shards, Shards)
    shards.manifest["complete"] = False
    with pytest.raises(EvaluationError, match="needs a complete manifest-val"):
        evaluation.figures(solid)


def test_other_shards_than_the_simulation_makes_are_refused(data: Path) -> None:
    shards = Shards(data, "val")
    shards.manifest["settings"] = {**shards.manifest["settings"], "images_per_world": 1}
    with pytest.raises(EvaluationError, match="make the shards anew"):
        list(depth_scenes(shards, "val", SUITE, 0))


def test_figures_in_space(data: Path, models: tuple[Path, Path]) -> None:
    planar, solid = (load_predictor(str(path)) for path in models)
    scenes = list(depth_scenes(Shards(data, "val"), "val", SUITE, 0))
    rows, shown = zip(
        *(measure_depth(solid, planar, scene, SUITE.grid) for scene in scenes), strict=True
    )
    for row, scene, picture in zip(rows, scenes, shown, strict=True):
        np.testing.assert_allclose(picture.relative, 0, atol=1e-9)
        if scene.hidden.sum() >= 50:
            assert row["occlusion/true"] > row["occlusion/solid/no_depth"] - 0.05
        prefix = "largest/solid/epe/all/"
        still = np.linalg.norm(scene.flow, axis=-1).mean()
        np.testing.assert_allclose(row[f"{prefix}no_motion"], still)
        np.testing.assert_allclose(row[f"{prefix}copy"][0], still)
        assert row[f"{prefix}copy"].shape == RADII.shape
        # this model knows nothing of depth: its median in depth is 0
        np.testing.assert_allclose(row[f"{prefix}median"], row[f"{prefix}no_depth"], rtol=1e-6)
        np.testing.assert_allclose(
            row["largest/solid/z/all/median"], np.abs(scene.flow[:, 2]).mean(), rtol=1e-5
        )
        for how in ("mean", "median"):
            np.testing.assert_allclose(
                row[f"largest/image/all/{how}"], row[f"largest/planar_model/all/{how}"], rtol=1e-3
            )
    figures = depth_figures(
        Rows.stack(rows, [s.kind for s in scenes], [s.world for s in scenes]), "world"
    )
    assert figures["largest"]["solid"]["epe_all"]["median_over_no_depth"] == pytest.approx(1)
    assert figures["random"]["image"]["all/median_over_planar_model"] == pytest.approx(1, abs=1e-3)
    best = np.mean([row["largest/solid/epe/all/copy"] for row in rows], 0).min()
    assert figures["largest"]["solid"]["epe_all"]["copy"] == pytest.approx(best)
    hidden = figures["occlusion"]
    assert hidden["scenes"] == sum(scene.hidden.sum() >= 50 for scene in scenes)
    assert hidden["solid/gain"] == pytest.approx(0, abs=1e-6)  # that model has no motion in depth


def test_colours_of_motion_in_depth() -> None:
    colours = relative_to_color(np.array([[-0.2, 0.0, 0.1, 0.4]]), 0.2)
    expected = [[[255, 0, 0], [255, 255, 255], [128, 128, 255], [0, 0, 255]]]
    np.testing.assert_array_equal(colours, expected)


def test_fpt_eval_measures_depth(
    data: Path, models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planar, solid = models
    arguments = ["eval", "--suite", "procedural", "--quick", "--data", data, "--out", tmp_path]
    arguments += ["--model", solid, "--planar-model", planar]
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    assert not end.value.code
    figures = json.loads((tmp_path / "figures.json").read_text())
    for split in ("val", "held_out"):
        assert figures["splits"][split]["depth"]["scenes"] == figures["splits"][split]["scenes"]
        assert figures["splits"][split]["camera"]["scenes"] > 0
        assert cv2.imread(str(tmp_path / f"{split}-depth.png")).std() > 5
    report = capsys.readouterr().out
    value = 100 * figures["splits"]["val"]["depth"]["largest"]["planar"]["z_all"]["median"]
    line = next(
        line for line in report.splitlines() if "z error of all points (cm), median" in line
    )
    assert f"{value:.3f}" in line
    assert "median over that of the planar model" in report
