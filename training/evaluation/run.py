# SPDX-License-Identifier: MIT
"""A suite from model file and shards to OUT/figures.json, figures.md, plots and pictures."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from safetensors import safe_open
from tqdm import tqdm

from fpt_model import FlowPredictor, load_model, save_model
from fpt_model.checkpoint import resolve_model
from sim.dataset import SPLITS, sha256
from training.data import Shards
from training.evaluation import report
from training.evaluation.depth import (
    DepthScene,
    ShownDepth,
    check_drawn_again,
    depth_figures,
    depth_scenes,
    depth_sheet,
    measure_depth,
)
from training.evaluation.figures import (
    Figures,
    Rows,
    choose_thresholds,
    curve_figures,
    plain_figures,
    poke_figures,
)
from training.evaluation.measure import (
    PLACES,
    THRESHOLDS,
    Row,
    measure,
    measure_ambiguity,
    measure_camera,
)
from training.evaluation.scenes import ambiguous_scenes, camera_scenes, scenes
from training.evaluation.suite import EvaluationError, Suite
from training.tracks import TrackShards, open_shards

log = logging.getLogger("evaluation")

AnyScene = TypeVar("AnyScene", bound=NamedTuple)

_PLAIN_RATIOS = {
    "camera": {"speed_flag_0_over_1": ("flag_0/speed", "flag_1/speed")},
    "ambiguity": {
        f"{weighting}/{two}_over_mean": (f"{weighting}/{two}", f"{weighting}/{mean}")
        for weighting in ("futures", "distinct")
        for two, mean in (
            ("best_of_two", "mean"),
            ("two_draws", "mean"),
            ("known_best_of_two", "known_mean"),
        )
    },
}


def load_predictor(
    model: str, precision: str = "fp32", graphs: Path | None = None
) -> FlowPredictor:
    """The model by PyTorch, or by ONNX Runtime from exported ``graphs``, and by nothing else.

    Raises ValueError for a precision that they have not; FileNotFoundError, CheckpointError and
    BackendError.
    """
    return FlowPredictor.load(
        model,
        precision=precision,  # type: ignore[arg-type]  # checked there
        graphs=graphs,
        strict=True,
    )


def load_single_gaussian(model: str) -> FlowPredictor:
    """EvaluationError unless the model predicts one Gaussian."""
    predictor = load_predictor(model)
    if predictor.config.components != 1:
        raise EvaluationError(
            f"the single-Gaussian baseline must have components = 1, {model} has "
            f"{predictor.config.components}"
        )
    return predictor


class Evaluation:
    """One suite, on the shards in ``data``, for any number of models.

    ``planar`` is a model of motion in the image, measured beside three-dimensional ones. Raises
    EvaluationError with the command that makes them where shards are missing.
    """

    def __init__(
        self, suite: Suite, data: Path, seed: int, planar: FlowPredictor | None = None
    ) -> None:
        self.suite, self.seed, self.planar = suite, seed, planar
        self.shards = {
            split: self._open(suite, data, split) for split in (*suite.splits, suite.validation)
        }

    @staticmethod
    def _open(suite: Suite, data: Path, split: str) -> Shards | TrackShards:
        try:
            return open_shards(data, split)
        except FileNotFoundError as error:
            owner = suite if split in suite.splits else Suite.load("procedural")
            command = owner.make.format(data=data, split=split)
            raise EvaluationError(f"{error}; they are made by: {command}") from error

    def _rows(
        self,
        what: str,
        found: Iterable[AnyScene],
        call: Callable[[AnyScene, np.random.Generator], Row],
        limit: int | None = None,
    ) -> Rows | None:
        """The rows of up to ``limit`` scenes, None: ``suite.scenes``; None if there are none."""
        rows: list[Row] = []
        kinds, worlds = [], []
        limit = limit or self.suite.scenes
        for scene in tqdm(islice(found, limit), total=limit, unit="scene", desc=what):
            # of the scene's number: the same draws whatever else is measured
            rows.append(call(scene, np.random.default_rng([self.seed, len(rows)])))
            kinds.append(scene.kind)
            worlds.append(scene.world)
        return Rows.stack(rows, kinds, worlds) if rows else None

    def main_rows(
        self,
        predictor: FlowPredictor,
        split: str,
        thresholds_only: bool = False,
        shown: list[report.Shown] | None = None,
    ) -> Rows:
        """Those of :func:`measure`; ``shown`` gets scenes for a picture.

        Raises EvaluationError if the split has no scene.
        """
        shards, on_sheet = self.shards[split], self._on_sheet()

        def call(scene: Any, rng: np.random.Generator) -> Row:
            row, flows = measure(predictor, scene, self.suite, rng, thresholds_only)
            if next(on_sheet) and shown is not None:
                shown.append(report.Shown(scene, flows))
            return row

        limit = self.suite.scenes
        if thresholds_only:
            limit = min(limit, self.suite.validation_scenes)
        rows = self._rows(split, scenes(shards, self.suite, self.seed), call, limit)
        if rows is None:
            raise EvaluationError(
                f"none of the {len(shards)} samples beside {shards.files[0]} is a scene"
            )
        return rows

    def figures(
        self, predictor: FlowPredictor, out: Path | None = None
    ) -> tuple[dict[str, float], dict[str, Figures]]:
        """The thresholds, by score; and figures, by split. Plots and pictures go to ``out``."""
        suite = self.suite
        for split in suite.splits:  # what would fail, before hours of work
            self._drawn_again(predictor, split)
        chosen: dict[str, int] = {}
        if suite.validation not in suite.splits:
            rows = self.main_rows(predictor, suite.validation, thresholds_only=True)
            chosen = choose_thresholds(rows)
        shown: dict[str, list[report.Shown]] = {split: [] for split in suite.splits}
        found: dict[str, Figures] = {}
        # the validation split first, where it is one of those reported
        for split in sorted(suite.splits, key=lambda s: s != suite.validation):
            rows = self.main_rows(predictor, split, shown=shown[split])
            if not chosen:
                some = np.arange(len(rows)) < suite.validation_scenes
                chosen = choose_thresholds(rows.select(some))
            over = suite.intervals_over
            found[split] = {
                "generator": getattr(self.shards[split], "generator", None),
                "scenes": len(rows),
                "worlds": len(np.unique(rows.worlds)),
                **{place: poke_figures(rows, place, chosen, over) for place in PLACES},
                "curve": curve_figures(rows, suite.pokes),
                **self.simulated(predictor, split),
                **self.in_depth(predictor, split, out),
            }
        thresholds = {name: float(THRESHOLDS[name][i]) for name, i in chosen.items()}
        if out is not None:
            for split in suite.splits:
                self._draw(found[split], thresholds, shown[split], out, split)
        return thresholds, {split: found[split] for split in suite.splits}

    def simulated(self, predictor: FlowPredictor, split: str) -> Figures:
        """What needs several futures of a picture, which videos do not have."""
        shards = self.shards[split]
        if isinstance(shards, TrackShards):
            return {}
        grid = self.suite.grid
        found = {
            "camera": self._rows(
                f"{split}, moving camera",
                camera_scenes(shards),
                lambda scene, rng: measure_camera(predictor, scene, grid, rng),
            ),
            "ambiguity": self._rows(
                f"{split}, several futures",
                (scene for _, _, scene in ambiguous_scenes(shards)),
                lambda scene, rng: measure_ambiguity(predictor, scene, grid, rng),
            ),
        }
        return {
            name: plain_figures(rows, _PLAIN_RATIOS[name], self.suite.intervals_over)
            for name, rows in found.items()
            if rows is not None
        }

    def in_depth(self, predictor: FlowPredictor, split: str, out: Path | None) -> Figures:
        """Of three-dimensional models on our own worlds, see :mod:`training.evaluation.depth`.

        A picture goes to ``out``.
        """
        suite, shards = self.suite, self._drawn_again(predictor, split)
        if shards is None:
            return {}
        shown: list[ShownDepth] = []
        on_sheet = self._on_sheet()

        def call(scene: DepthScene, rng: np.random.Generator) -> Row:
            row, picture = measure_depth(predictor, self.planar, scene, suite.grid)
            if next(on_sheet):
                shown.append(picture)
            return row

        found = depth_scenes(shards, split, suite, self.seed)
        rows = self._rows(f"{split}, depth", found, call)
        assert rows is not None, "the main figures found scenes"
        if out is not None:
            report.write_picture(depth_sheet(shown, suite.grid), out / f"{split}-depth.png")
        return {"depth": depth_figures(rows, suite.intervals_over)}

    def _drawn_again(self, predictor: FlowPredictor, split: str) -> Shards | None:
        """The split's shards, if the model predicts depth and the worlds are ours.

        Raises EvaluationError where they cannot be drawn again.
        """
        shards = self.shards[split]
        if predictor.config.flow_dim != 3 or not self.drawn_by_us(split):
            return None
        assert isinstance(shards, Shards)
        check_drawn_again(shards, split)
        return shards

    def drawn_by_us(self, split: str) -> bool:
        """Whether its worlds are our own: of these motion in depth is measured."""
        ours = split in SPLITS and split != "foreign"
        return ours and isinstance(self.shards[split], Shards)

    def _on_sheet(self) -> Iterator[bool]:
        """Whether the next scene is for the picture: the first, then one at random of each so many
        in a row. Kinds of scenes come in turns, and in even steps some might be skipped."""
        rng, every = np.random.default_rng(self.seed), max(1, self.suite.scenes // report.SHEET)
        for part in range(report.SHEET):
            chosen = rng.integers(every) if part else 0
            yield from (i == chosen for i in range(every))
        yield from repeat(False)

    def _draw(
        self,
        found: Figures,
        thresholds: dict[str, float],
        shown: list[report.Shown],
        out: Path,
        split: str,
    ) -> None:
        title = f"{self.suite.title}: {split}"
        report.plot_curve(found["curve"], out / f"{split}-pokes.png", title)
        report.plot_reliability(found, out / f"{split}-reliability.png", title)
        report.plot_thresholds(found, thresholds, out / f"{split}-thresholds.png", title)
        sheet = report.contact_sheet(shown, thresholds["kl_matched"], self.suite.grid)
        report.write_picture(sheet, out / f"{split}-scenes.png")


def run(
    suite: Suite,
    model: str,
    data: Path,
    out: Path,
    single_gaussian: str | None = None,
    precision: str = "fp32",
    seed: int = 0,
    graphs: Path | None = None,
    planar_model: str | None = None,
) -> Figures:
    """Evaluate and write everything to ``out`` (made at need); returns what figures.json holds.

    Args:
        model, single_gaussian: shipped names or files; the second, optional one predicts a single
            Gaussian and is measured in the same way, in fp32.
        graphs: folder of ``fpt export``, for the model by ONNX Runtime.
        planar_model: for a three-dimensional model, a planar one beside which it is measured.

    Raises what :func:`load_predictor` does, and EvaluationError for missing shards.
    """
    predictor = load_predictor(model, precision, graphs)
    single = load_single_gaussian(single_gaussian) if single_gaussian else None
    planar = load_predictor(planar_model) if planar_model else None
    if planar is not None and (planar.config.flow_dim, predictor.config.flow_dim) != (2, 3):
        raise EvaluationError(
            "a planar model is measured beside a three-dimensional one: expected flow_dim 2 and 3, "
            f"received {planar.config.flow_dim} and {predictor.config.flow_dim}"
        )
    # of what is evaluated, though a run that still trains may replace the file meanwhile
    names = {"model": model, "single_gaussian": single_gaussian, "planar_model": planar_model}
    origin = {
        **{f"{what}_sha256": sha256(resolve_model(name)) for what, name in names.items() if name},
        "commit": code_version(),
    }
    evaluation = Evaluation(suite, data, seed, planar)
    if planar is not None and not any(map(evaluation.drawn_by_us, suite.splits)):
        raise EvaluationError(
            f"a planar model is measured on our own worlds, suite {suite.name!r} has none"
        )
    out.mkdir(parents=True, exist_ok=True)
    thresholds, splits = evaluation.figures(predictor, out)
    figures: Figures = {
        "suite": suite.name,
        "title": suite.title,
        **names,
        "backend": predictor.backend,
        "precision": predictor.precision,
        **origin,
        "seed": seed,
        "grid": suite.grid,
        "intervals_over": suite.intervals_over,
        "validation": suite.validation,
        "thresholds": thresholds,
        "splits": splits,
    }
    if single is not None:
        _, its = evaluation.figures(single)
        for split, found in its.items():
            figures["splits"][split]["single_gaussian"] = found
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (out / "figures.md").write_text(report.markdown(figures))
    return figures


def save_threshold(path: Path, kl_threshold: float) -> None:
    """Write ``kl_threshold`` (nats) into a model file, whose tensors stay bit by bit the same.

    Raises ValueError if its tensors have several floating point types.
    """
    with safe_open(path, framework="pt") as file:
        types = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    floating = {t for t in types if t.is_floating_point}
    if len(floating) != 1:
        raise ValueError(
            f"expected one floating point type in {path}, found {sorted(map(str, floating))}"
        )
    model = load_model(path)
    model.config = replace(model.config, kl_threshold=kl_threshold)
    save_model(model, path, dtype=floating.pop())


def code_version() -> str | None:
    """The commit of this file's repository, with "-dirty" if files were changed since; or None."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
