# SPDX-License-Identifier: MIT
"""benchmarks/what_if.py: the shipped model, poked both ways, on real worlds."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import what_if

from fpt_model import FlowPredictor
from fpt_model.geometry import grid
from sim import Simulator


@pytest.fixture(scope="module")
def predictor() -> FlowPredictor:
    return FlowPredictor.load("fpt-tiny")


@pytest.mark.parametrize("scene", what_if.SCENES)
def test_opposite_pokes_move_a_part_in_opposite_ways(predictor: FlowPredictor, scene: str) -> None:
    kind, seed = scene.split(":")
    world = Simulator(kind, int(seed), what_if.SIZE)
    encoded = predictor.encode(world.render().rgb)
    point, motion = what_if.true_motion(world, int(seed))
    there, back = (
        predictor.predict(encoded, point, sign * motion, grid(what_if.GRID)) for sign in (1, -1)
    )
    one, other = there.median(), back.median()
    lengths = np.linalg.norm(one, axis=-1), np.linalg.norm(other, axis=-1)
    both = np.minimum(*lengths) > 0.01
    assert both.mean() > 0.005, "a part moves both times"
    cosine = np.sum(one * other, -1)[both] / (lengths[0] * lengths[1])[both]
    assert np.median(cosine) < -0.9
    # Beside it a point is as likely to move along as to stay, and the answer says both.
    assert there[what_if.undecided(there)].modes().weights[1] > 0.25


def test_the_picture_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "picture.png"
    monkeypatch.setattr("sys.argv", ["what_if.py", "--scenes", "drawer:1", "--out", str(out)])
    what_if.main()
    assert cv2.imread(str(out)).std() > 20
    assert capsys.readouterr().out.count("drawer:1, poked by") == 2
