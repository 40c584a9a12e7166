# SPDX-License-Identifier: MIT
"""The evaluation, on a few images that the simulation really made."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from node_harness import save_small_model
from safetensors.torch import load_file

from fpt_model import FlowMixture, FlowPokeTransformer, load_model, save_model
from fpt_model.checkpoint import resolve_model
from fpt_ros.cli import main
from sim.dataset import GENERATOR, Settings, write_dataset
from training.data import Shards
from training.evaluation.figures import (
    Rows,
    bootstrap_interval,
    choose_thresholds,
    curve_figures,
    flow_figures,
    poke_figures,
)
from training.evaluation.measure import (
    OCTAVE,
    THRESHOLDS,
    best_two,
    intersection_over_union,
    measure,
    probability_mass,
    rigid_fit,
    variational_kl,
)
from training.evaluation.run import Evaluation, load_predictor
from training.evaluation.scenes import (
    DISTINCT,
    MIN_POKE,
    MIN_VISIBLE_FLOW,
    Scene,
    ambiguous_scenes,
    camera_scenes,
    grid_truth,
    scenes,
)
from training.evaluation.suite import FOLDER, EvaluationError, Suite

SUITE = replace(Suite.load("procedural"), grid=32, scenes=6)
SIZE = (32, 32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    for split in ("val", "held_out"):
        write_dataset(out, split, 12, Settings(size=64, images_per_shard=12))
    return out


@pytest.fixture(scope="module")
def found(data: Path) -> list[Scene]:
    return list(scenes(Shards(data, "val"), SUITE, 0))


# ------------------------------------------------------------------------------------ scenes


def test_scenes_are_what_one_poke_can_tell(data: Path, found: list[Scene]) -> None:
    again = list(scenes(Shards(data, "val"), SUITE, 0))
    assert [s.pokes.tolist() for s in again] == [s.pokes.tolist() for s in found]
    names = [s.world for s in found]
    worlds = len(set(names))
    assert len(set(names[:worlds])) == worlds, "each world once before any twice"
    shards = Shards(data, "val")
    samples = {shards[i].rgb.tobytes(): shards[i] for i in range(len(shards))}
    for scene in found:
        sample = samples[scene.image.tobytes()]
        future = next(
            f
            for f in range(sample.futures)
            if np.array_equal(grid_truth(sample, f, SIZE).flow, scene.flow)
        )
        assert sample.causes[future] == 1
        assert sample.camera_static[future]
        lengths = np.linalg.norm(scene.flow, axis=-1)
        assert lengths[scene.pokes[0]] == lengths[scene.moving].max() >= MIN_POKE
        assert scene.moving[[scene.pokes[0], scene.drawn]].all()
        assert len(set(scene.pokes)) == SUITE.pokes[-1]
        assert lengths[~scene.moving].max() < MIN_VISIBLE_FLOW, "nothing else moves"


def test_under_a_moving_camera_the_still_world_moves(data: Path) -> None:
    cases = list(camera_scenes(Shards(data, "val")))
    assert len(cases) > 3
    for scene in cases:
        known = np.isfinite(scene.moving_flow).all(-1)
        assert (np.linalg.norm(scene.moving_flow[known], axis=-1) > 0).mean() > 0.9
        assert np.nanmax(np.abs(scene.static_flow)) == 0


def test_ambiguous_points_really_go_several_ways(data: Path) -> None:
    cases = [scene for _, _, scene in ambiguous_scenes(Shards(data, "val"))]
    assert len(cases) > 3
    for scene in cases:
        for c in range(0, len(scene.points), 7):
            kept: list[np.ndarray] = []
            for flow in scene.flow[:, c]:
                if all(np.linalg.norm(flow - k) >= DISTINCT for k in kept):
                    kept.append(flow)
            assert np.array_equal(scene.flow[scene.distinct[:, c], c], kept)
            assert len(kept) >= 2


def test_best_two_leave_the_least_weighted_distance() -> None:
    """Beside every pair, one after the other; a motion without weight pulls nowhere."""
    rng = np.random.default_rng(0)
    motions, share = rng.normal(size=(6, 5, 2)), rng.random((6, 5))
    motions[0], share[0] = 100, 0
    found = best_two(motions, share)
    assert found.shape == (2, 5, 2)

    def cost(pair: np.ndarray, c: int) -> float:
        return share[:, c] @ np.linalg.norm(motions[:, c, None] - pair, axis=-1).min(1)

    for c in range(5):
        least = min(cost(motions[[i, j], c], c) for i in range(6) for j in range(i))
        assert cost(found[:, c], c) == pytest.approx(least)
        assert np.abs(found[:, c]).max() < 100


# ----------------------------------------------------------------------------------- figures


class Oracle:
    """Knows the scene: without pokes anything may happen, with them the truth, give or take."""

    def __init__(self, scene: Scene, std: float) -> None:
        rng = np.random.default_rng(0)
        self.known = scene.flow + rng.normal(0, std, scene.flow.shape)
        self.std = std
        self.scene = scene
        self.places = {point.tobytes(): i for i, point in enumerate(scene.points)}

    def encode(self, image: Any) -> None:
        """Nothing."""

    def predict(
        self, encoded: None, pos: Any, flow: Any, queries: Any, camera_static: bool
    ) -> FlowMixture:
        assert camera_static == self.scene.camera_static
        poked = [self.places[point.tobytes()] for point in pos]
        assert np.array_equal(flow, self.scene.flow[poked])
        asked = [self.places[query.tobytes()] for query in queries]
        mean = self.known[asked] if len(pos) else np.zeros((len(queries), 2))
        scale = (self.std if len(pos) else 0.05) * np.eye(2)
        n = len(mean)
        # two components, the second one improbable and elsewhere
        means = np.stack([mean, mean + 1], 1)
        weights = np.tile(np.log([0.999, 0.001]), (n, 1))
        return FlowMixture(weights, means, np.broadcast_to(scale, (n, 2, 2, 2)))


def rows_of(found: list[Scene], std: float) -> Rows:
    suite = replace(SUITE, tracking_noise=0.0)
    rows = [
        measure(Oracle(s, std), s, suite, np.random.default_rng(1))[0]  # type: ignore[arg-type]
        for s in found
    ]
    return Rows.stack(rows, [s.kind for s in found], [s.world for s in found])


def test_figures_of_an_oracle(found: list[Scene]) -> None:
    rows = rows_of(found, 0.01)
    figures = poke_figures(rows, "largest", choose_thresholds(rows), "world")
    for cells in ("epe", "epe_moving"):
        epe = figures[cells]
        # a two-dimensional error of standard deviation s has the mean length s sqrt(pi / 2)
        assert epe["mode"] == pytest.approx(0.01 * 32 * np.sqrt(np.pi / 2), rel=0.1)
        assert epe["mean"] == pytest.approx(epe["mode"], abs=0.06)
        assert epe["no_motion"] >= epe["copy"] > 0
        assert epe["rigid"] == pytest.approx(epe["copy"]), "one poke tells a shift"
        assert epe["pck"]["mode"] > 0.98
        low, high = epe["mode_over_copy_interval"]
        assert low <= epe["mode_over_copy"] <= high
    assert figures["epe_moving"]["no_motion"] > figures["epe"]["no_motion"]
    for where in ("all", "moving"):
        held = figures["reliability"][f"{where}_exact"]
        assert held["central_50"] == pytest.approx(0.5, abs=0.05)
        assert held["central_90"] == pytest.approx(0.9, abs=0.05)
        assert held["coverage"][-1] == pytest.approx(1)
        assert np.all(np.diff(held["coverage"]) >= 0)
        modes = figures["modes"][where]
        assert modes["confidence"] == pytest.approx(0.999)
        assert modes["first"] == 1
        assert modes["diversity"] == pytest.approx(2 * 0.999 * 0.001 * 32 * np.sqrt(2))
        assert modes["closeness"] == pytest.approx(modes["best_of_two"])
    entropy = 1 + np.log(2 * np.pi * 0.01**2)  # of a Gaussian in the plane
    assert figures["nll"]["all_exact"] == pytest.approx(entropy, abs=0.1)
    for groups in (figures["by_poke_length"], figures["by_kind"].values()):
        assert sum(group["scenes"] for group in groups) == len(found)
    curve = curve_figures(rows, SUITE.pokes)
    for where, name in (("all", "epe"), ("moving", "epe_moving")):  # of all 1024 points here
        for method, value in curve["1"][where]["epe"].items():
            assert value == pytest.approx(figures[name][method], rel=0.02), method
    assert curve["100"]["all"]["epe"]["copy"] < curve["1"]["all"]["epe"]["copy"]


def test_influence_is_the_divergence_from_what_is_known_without_pokes(found: list[Scene]) -> None:
    """As the node has it: of the poked prediction from the other, not the other way round."""
    scene = found[0]
    oracle = Oracle(scene, 0.01)
    _, shown = measure(oracle, scene, SUITE, np.random.default_rng(1))  # type: ignore[arg-type]
    poked, free = (
        oracle.predict(None, scene.points[p], scene.flow[p], scene.points, True)
        for p in (scene.pokes[:1], scene.pokes[:0])
    )
    np.testing.assert_allclose(shown["kl_matched"], poked.kl(free))
    assert np.abs(free.kl(poked) - poked.kl(free)).min() > 1


def test_a_sharp_oracle_finds_the_moving_part(found: list[Scene]) -> None:
    rows = rows_of(found, 1e-4)
    chosen = choose_thresholds(rows)
    figures = poke_figures(rows, "random", chosen, "world")["iou"]
    # the improbable mode moves the mean by a constant that thresholds can be above
    assert figures["mean_flow"] > 0.75
    assert figures["mean_flow"] > figures["disc"] > 0
    # which moves the median by nothing
    assert figures["median_flow"] > 0.95
    curve = np.array(figures["mean_flow_by_threshold"])
    assert figures["mean_flow"] == curve[chosen["mean_flow"]] == curve[OCTAVE:-OCTAVE].max()
    candidates = THRESHOLDS["mean_flow"]
    for suffix, factor in (("_half_threshold", 0.5), ("_double_threshold", 2.0)):
        wanted = factor * candidates[chosen["mean_flow"]]
        other = int(np.abs(candidates - wanted).argmin())
        assert candidates[other] == pytest.approx(wanted)
        assert figures["mean_flow" + suffix] == curve[other]


def test_copying_nothing_is_among_the_baselines(found: list[Scene]) -> None:
    """Where the poke tells less than nothing, the best disc is empty."""
    misled = []
    for scene in found:
        flow = scene.flow.copy()
        flow[scene.pokes[0]] *= -50
        moving = np.arange(len(flow)) != scene.pokes[0]
        misled.append(scene._replace(flow=flow, moving=moving))
    rows = rows_of(misled, 0.01)
    figures = flow_figures(rows, "largest/", "moving", "world")
    assert figures["copy_radius"] == figures["rigid_radius"] == 0
    assert figures["copy"] == pytest.approx(figures["no_motion"])
    assert figures["rigid"] == pytest.approx(figures["no_motion"])


def test_rigid_fits_are_exact_for_rigid_motions() -> None:
    rng = np.random.default_rng(0)
    points, turn = rng.random((50, 2)), np.array([[0.8, -0.6], [0.6, 0.8]])
    after = points @ turn.T + [0.3, -0.1]
    assert np.allclose(rigid_fit(points[:3], after[:3], points), after)
    assert np.allclose(rigid_fit(points[:1], after[:1], points) - points, after[0] - points[0])
    mirrored = points * [-1, 1]
    assert not np.allclose(rigid_fit(points, mirrored, points), mirrored), "turns only"


def test_intersection_over_union() -> None:
    a, b = np.array([[1, 1, 0], [0, 0, 0]], bool), np.array([[0, 1, 1], [0, 0, 0]], bool)
    assert intersection_over_union(a, b) == pytest.approx([1 / 3, 0])


def test_intervals_are_over_clusters() -> None:
    value = np.arange(40.0)
    alone = bootstrap_interval(np.arange(40).astype(str), value)
    pairs = bootstrap_interval((np.arange(40) // 8).astype(str), value)
    assert alone[0] < value.mean() < alone[1]
    assert pairs[1] - pairs[0] > 1.5 * (alone[1] - alone[0])
    assert bootstrap_interval(np.arange(40).astype(str), value, value) == [1, 1]


def random_mixtures(rng: np.random.Generator, n: int) -> FlowMixture:
    weights = rng.dirichlet(np.ones(3), n)
    tril = np.tril(rng.normal(0, 0.1, (n, 3, 2, 2))) + 0.5 * np.eye(2)
    return FlowMixture(np.log(weights), rng.normal(0, 1, (n, 3, 2)), tril)


def test_variational_kl() -> None:
    rng = np.random.default_rng(0)
    p, q = random_mixtures(rng, 5), random_mixtures(rng, 5)
    assert np.abs(variational_kl(p, p)).max() < 1e-12
    true = p.kl(q, "monte_carlo", samples=20000)
    assert np.corrcoef(variational_kl(p, q), true)[0, 1] > 0.9
    single = [m.modes() for m in (p, q)]
    single = [FlowMixture(np.zeros((5, 1)), m.means[:, :1], m.scale_tril[:, :1]) for m in single]
    assert np.allclose(variational_kl(*single), single[0].kl(single[1])), "closed form"


def test_probability_mass_of_draws_is_uniform() -> None:
    rng = np.random.default_rng(0)
    mixture = random_mixtures(rng, 4000)
    mass = probability_mass(mixture, mixture.sample(1, rng)[0], rng)
    assert np.quantile(mass, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.03)
    far = np.full((4000, 2), 50.0)
    assert probability_mass(mixture, far, rng).min() > 0.98


# --------------------------------------------------------------------------------- the whole


def test_the_shipped_model_heeds_the_camera_flag(data: Path) -> None:
    """Without pokes: told that the camera stands still, it expects the world to."""
    evaluation = Evaluation(SUITE, data, 0)
    figures = evaluation.simulated(load_predictor("fpt-tiny"), "val")["camera"]
    assert figures["scenes"] == SUITE.scenes
    assert figures["flag_0/speed"] > 2 * figures["flag_1/speed"]
    assert figures["flag_0/nll/moving_camera"] < figures["flag_1/nll/moving_camera"] - 1
    assert figures["flag_1/nll/standing_camera"] < figures["flag_0/nll/standing_camera"] - 0.5


@pytest.mark.parametrize(("most", "for_thresholds", "measured"), [(6, 2, 2), (1, 2, 1)])
def test_thresholds_alone_take_no_more_scenes_than_they_may(
    data: Path, model: Path, most: int, for_thresholds: int, measured: int
) -> None:
    suite = replace(SUITE, scenes=most, validation_scenes=for_thresholds)
    evaluation, predictor = Evaluation(suite, data, 0), load_predictor(str(model))
    assert len(evaluation.main_rows(predictor, "val", thresholds_only=True)) == measured


class Result(NamedTuple):
    """How a run of the command ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def fpt_eval(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as ended:
            main(["eval", *map(str, arguments)])
        return Result(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "small.safetensors")


def single_gaussian(path: Path) -> Path:
    torch.manual_seed(1)
    config = replace(load_model(path).config, components=1)
    save_model(FlowPokeTransformer(config), path.with_name("single.safetensors"))
    return path.with_name("single.safetensors")


def test_from_model_to_report(fpt_eval: Any, data: Path, model: Path, tmp_path: Path) -> None:
    evaluated = tmp_path / "model.safetensors"
    shutil.copy(model, evaluated)
    out = tmp_path / "out"
    result = fpt_eval(
        *("--suite", "procedural", "--data", data, "--model", evaluated, "--out", out),
        *("--single-gaussian", single_gaussian(model), "--quick", "--scenes", 3),
        "--save-threshold",
    )
    assert result.code == 0, result.err
    figures = json.loads((out / "figures.json").read_text())
    assert figures["suite"] == "procedural"
    assert figures["seed"] == 0
    assert len(figures["model_sha256"]) == 64
    for split in ("val", "held_out"):
        found = figures["splits"][split]
        assert found["generator"] == GENERATOR
        assert 0 < found["worlds"] <= found["scenes"] <= 3
        for place in ("largest", "random"):
            single = found["single_gaussian"][place]
            assert single["modes"]["all"]["diversity"] == 0
            assert single["epe"]["no_motion"] == found[place]["epe"]["no_motion"]
        assert list(found["curve"]) == ["1", "2", "5", "10", "100"]
        several = found["ambiguity"]
        for weighting in ("futures", "distinct"):
            known = several[f"{weighting}/known_best_of_two_over_mean"]
            assert 0 < known < several[f"{weighting}/two_draws_over_mean"]
        for name in ("pokes", "reliability", "thresholds", "scenes"):
            assert cv2.imread(str(out / f"{split}-{name}.png")).std() > 5
    assert set(figures["splits"]["held_out"]["largest"]["by_kind"]) <= {"lid", "lever", "turntable"}
    report = (out / "figures.md").read_text()
    assert report in result.out
    for text in (figures["commit"] or "None", "Moving camera", "single Gaussian, poked anywhere"):
        assert text in report
    value = figures["splits"]["val"]["largest"]["epe"]["median"]
    assert f"| EPE of all points, median | {value:.3f} |" in report

    chosen = load_model(evaluated).config
    assert chosen.kl_threshold == figures["thresholds"]["kl_matched"]
    before, after = load_file(model), load_file(evaluated)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key]), key


def test_mistakes_are_named(fpt_eval: Any, data: Path, model: Path, tmp_path: Path) -> None:
    unlike = tmp_path / "unlike.yaml"
    unlike.write_text("title: t\nsplit: [val]\nmake: none\n")
    solid = tmp_path / "solid.safetensors"
    save_model(FlowPokeTransformer(replace(load_model(model).config, flow_dim=3)), solid)
    common = "--model", model, "--data", data, "--out", tmp_path / "out"
    shipped = resolve_model("fpt-tiny")
    for arguments, message in (
        (("--suite", "procedual", *common), "no suite 'procedual': expected one of ['clips', "),
        (("--suite", unlike, *common), "unknown or missing keys ['split', 'splits']"),
        (("--suite", "foreign", *common), "python -m sim.dataset --out"),
        (("--suite", "procedural", *common, "--single-gaussian", model), "has 4"),
        (("--suite", "procedural", *common, "--planar-model", solid), "received 3 and 2"),
        (("--suite", "procedural", *common, "--model", "none"), "no model 'none'"),
        (("--suite", "procedural", *common, "--precision", "fp8"), "received 'fp8'"),
        (("--suite", "procedural", *common, "--graphs", tmp_path / "none"), "none"),
        (("--suite", "procedural", "--data", tmp_path), "--split val"),
        (
            ("--suite", "procedural", "--quick", "--save-threshold", "--model", shipped),
            "needs 250 scenes or more and no --quick",
        ),
        (
            ("--suite", "procedural", "--scenes", 3, "--save-threshold", "--model", shipped),
            "received 3 scenes",
        ),
    ):
        result = fpt_eval(*arguments)
        assert result.code == 2
        assert message in result.err


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_suites(name: str) -> None:
    suite = Suite.load(name)
    assert suite.name == name
    assert suite.validation == "val", "thresholds come from our own kinds"
    assert "{data}" in suite.make
    assert "{split}" in suite.make


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": []}, "must have splits"),
        ({"pokes": [2, 1]}, "begin with 1 and grow"),
        ({"pokes": 5}, "pokes must be a list, received 5"),
        ({"tracking_noise": -1}, "tracking_noise must be >= 0, received -1"),
        ({"grid": 0}, "grid must be a whole number >= 1, received 0"),
        ({"intervals_over": "scene"}, "received 'scene'"),
    ],
)
def test_impossible_suites(change: dict, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        replace(SUITE, **change)
