# SPDX-License-Identifier: MIT
"""How far two motions can come: the benchmark's bound, and its command on a few images."""

from pathlib import Path

import ambiguity
import numpy as np
import pytest

from sim.dataset import Settings, write_dataset
from training.data import Shards
from training.evaluation.measure import best_two, end_point_error
from training.evaluation.run import load_predictor
from training.evaluation.scenes import MIN_POKE, ambiguous_scenes

SETTINGS = Settings(size=64, images_per_world=1, images_per_shard=14, camera_motion_probability=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several-futures")
    for split in ("val", "held_out"):
        write_dataset(folder, split, 14, SETTINGS)
    return folder


def test_who_has_seen_the_very_futures_does_what_they_allow(data: Path) -> None:
    _, _, scene = next(ambiguous_scenes(Shards(data, "val")))
    times = ambiguity.FURTHER // len(scene.flow)
    assert times * len(scene.flow) == ambiguity.FURTHER
    row = ambiguity.known_distribution(np.tile(scene.flow, (times, 1, 1)), scene)
    for name, counted in (("futures", np.ones_like(scene.distinct)), ("distinct", scene.distinct)):
        share = counted / counted.sum(0)
        mean = (scene.flow * share[..., None]).sum(0)
        error = end_point_error(mean, scene.flow, ambiguity.GRID)[counted].mean()
        assert row[f"{name}/mean"] == pytest.approx(error, rel=1e-5)
        two = best_two(scene.flow, share)
        error = end_point_error(two[:, None], scene.flow, ambiguity.GRID).min(0)[counted].mean()
        assert row[f"{name}/two"] == pytest.approx(error, rel=1e-5)
        assert row[f"{name}/two"] < row[f"{name}/mean"]


def test_other_continuations_are_of_the_stored_picture(data: Path) -> None:
    number, sample, scene = next(ambiguous_scenes(Shards(data, "held_out")))
    further = ambiguity.further_flow("held_out", number, sample, scene, SETTINGS)
    assert further.shape == (ambiguity.SEARCHED, *scene.flow.shape[1:])
    # What moves differently in the stored futures does so in others, but not in the very same way.
    assert (np.linalg.norm(further, axis=-1) > 0).any(0).all()
    apart = np.linalg.norm(further[:, None] - scene.flow, axis=-1).max(-1)
    assert apart.min() > 0


def test_told_a_poke_who_has_seen_the_future_knows_the_rest(data: Path) -> None:
    predictor = load_predictor("fpt-tiny")
    _, _, scene = next(ambiguous_scenes(Shards(data, "val")))
    seen = np.tile(scene.flow, (ambiguity.NEAREST, 1, 1))
    rows = ambiguity.one_poke(predictor, seen, scene)
    far = np.linalg.norm(scene.flow, axis=-1).max(1) >= MIN_POKE
    assert len(rows) == far.sum() > 0
    for row, flow in zip(rows, scene.flow[far], strict=True):
        assert row["known"] == pytest.approx(0, abs=1e-3)
        still = ambiguity.GRID * np.linalg.norm(flow, axis=-1).mean()
        assert row["none"] == pytest.approx(still, rel=1e-5)
        assert row["model"] > 0
    # most say that it stays
    said = ambiguity.geometric_median(np.array([[[0.0, 0.0]], [[0.0, 0.0]], [[0.3, 0.4]]]))
    assert said == pytest.approx(0, abs=1e-3)


def test_the_command_writes_its_table(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.md"
    ambiguity.main(["--data", str(data), "--scenes", "1", "--out", str(out)])
    text = out.read_text()
    assert text in capsys.readouterr().out
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if "| 1 |" in line]
    assert [row[0] for row in cells] == ["val", "val", "held_out", "held_out", "val", "held_out"]
    for row in cells[4:]:
        futures, ours, known = map(float, row[2:])
        assert futures >= 1
        assert 0 < known < 1
        assert ours > 0
    for row in cells[:4]:
        modes, draws, known, told = map(float, row[3:])
        assert 0 <= told <= known < 1
        assert draws > 0
        assert modes > 0
