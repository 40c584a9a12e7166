# SPDX-License-Identifier: MIT
"""Evaluation on stored simulation samples: one poke, dense flow and moving part on a 64 x 64 grid.

``python -m training.evaluate --model M --data DIR`` chooses thresholds on the split ``val`` of DIR
and reports on it and on the split ``held_out``.

A scene is an image with the first of its futures that has a static camera, exactly one independent
cause (one poke can tell of no more) and enough visible motion. The first images of all worlds come
before second ones. Each scene is poked twice, one poke at a time: where the true motion is largest,
as in the paper, and at a random cell that truly moves, for users do not know where the largest is.

End-point errors (EPE) are in cells of the grid (1/64 of the image's side), as in the paper, the
mean over scenes of the mean over all cells, or over those that truly move; "beats" is the share of
scenes. The dense flow is the mixture's mean, its median, or its most probable component's mean.

Baselines, in the same run: no motion; a disc around the poke that copies its motion, its radius the
best one *of the reported figure's own data*; the same disc as a mask; the model's own flow
magnitude as a mask. Intervals are 95 % bootstrap intervals over worlds.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from tqdm import tqdm

from fpt_model import FlowMixture, FlowPredictor, load_model, save_model
from fpt_model.checkpoint import resolve_model
from fpt_model.geometry import (
    displacement_normalised_to_pixels,
    grid,
    normalised_to_pixels,
)
from fpt_model.mixture import Reduce
from fpt_model.visualize import RGBImage, draw_overlay, flow_to_color, side_by_side
from sim.dataset import StoredSample
from training.data import Shards

log = logging.getLogger("evaluation")

SIZE = (64, 64)  # cells
MIN_MOVING_CELLS = 12  # scenes with a smaller true moving part are not reported
MIN_POKE = 0.01  # image sides; scenes whose largest true motion is smaller are not reported
MIN_VISIBLE_FLOW = 0.002  # image sides; bodies that nowhere move so far count as still
RADII = np.linspace(0, 1, 51)  # image sides, candidates of the disc baselines; 0 copies nothing
KL_THRESHOLDS = np.geomspace(0.01, 100, 81)  # nats, candidates
FLOW_THRESHOLDS = np.geomspace(0.001, 0.3, 60)  # image sides, candidates
REDUCTIONS: tuple[Reduce, ...] = ("mean", "median", "mode")  # how mixtures become dense flow
POKES = ("largest", "random")  # where a scene is poked

FloatArray = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]


# ------------------------------------------------------------------------------------ scenes


class Truth(NamedTuple):
    """The truth of one future of one sample on C cells, in normalised units."""

    flow: FloatArray  # [C, 2]
    moving: Mask  # [C]


class Scene(NamedTuple):
    """What is asked of the model, and the answer."""

    sample: StoredSample
    truth: Truth
    pokes: NDArray[np.intp]  # the poked cell of each of POKES


def grid_truth(sample: StoredSample, future: int, size: tuple[int, int] = SIZE) -> Truth:
    """Read the true flow at the pixel under each cell's centre."""
    height, width = sample.bodies.shape
    xy = np.floor(normalised_to_pixels(grid(size), (height, width)) + 0.5).astype(int)
    flow = sample.flow_at(future, xy).flow
    bodies = sample.bodies[xy[:, 1], xy[:, 0]]
    farthest = np.zeros(sample.body_motion.shape[1])
    np.maximum.at(farthest, bodies, np.linalg.norm(flow, axis=-1))
    return Truth(flow, (sample.moving[future] & (farthest >= MIN_VISIBLE_FLOW))[bodies])


def scenes(shards: Shards, limit: int) -> Iterator[Scene]:
    """Up to ``limit`` scenes, as the module's text says; always the same ones."""
    seen: Counter[tuple[str, int]] = Counter()
    turn = []  # how many images of the same world come before
    for world in shards.worlds:
        turn.append(seen[world])
        seen[world] += 1
    found = 0
    for index in np.argsort(turn, kind="stable"):
        if found == limit:
            return
        sample = shards[index]
        for future in np.flatnonzero(sample.camera_static & (sample.causes == 1)):
            truth = grid_truth(sample, int(future))
            lengths = np.where(truth.moving, np.linalg.norm(truth.flow, axis=-1), 0)
            if truth.moving.sum() >= MIN_MOVING_CELLS and MIN_POKE <= lengths.max() <= 1:
                drawn = np.random.default_rng(index).choice(np.flatnonzero(truth.moving))
                yield Scene(sample, truth, np.array([lengths.argmax(), drawn]))
                found += 1
                break


# ----------------------------------------------------------------------------------- answers


@dataclass
class Answers:
    """Truth and predictions of N scenes on C cells, all poked in the same way."""

    world: NDArray[np.intp]  # [N] distinct numbers for distinct worlds
    kind: NDArray[np.str_]  # [N]
    flow: FloatArray  # [N, C, 2] true
    moving: Mask  # [N, C] true
    poke: NDArray[np.intp]  # [N] cell
    mean: FloatArray  # [N, C, 2] predicted
    median: FloatArray  # [N, C, 2] predicted
    mode: FloatArray  # [N, C, 2] predicted
    kl_matched: FloatArray  # [N, C] nats, the predictor's influence
    kl_variational: FloatArray  # [N, C] nats, see variational_kl
    log_prob: FloatArray  # [N, C] nats, log density of the true flow

    def __len__(self) -> int:
        return len(self.poke)

    def __getitem__(self, index: Any) -> Answers:
        """Some of the scenes."""
        return Answers(**{name: value[index] for name, value in vars(self).items()})

    @property
    def poke_flow(self) -> FloatArray:
        """``[N, 2]``."""
        return self.flow[np.arange(len(self)), self.poke]

    @property
    def speed(self) -> FloatArray:
        """``[N, C]``: length of the predicted mean flow, in image sides."""
        return np.linalg.norm(self.mean, axis=-1)

    @property
    def distance(self) -> FloatArray:
        """``[N, C]`` to the poke, in image sides."""
        centres = grid(SIZE)
        return np.linalg.norm(centres - centres[self.poke][:, None], axis=-1)


def variational_kl(p: FlowMixture, q: FlowMixture) -> FloatArray:
    """``[...]``: the variational approximation of ``D(p || q)`` in nats.

    Hershey & Olsen, "Approximating the Kullback Leibler divergence between Gaussian mixture
    models" (ICASSP 2007). Unlike the matched one it is zero for equal mixtures, also where their
    components overlap.
    """

    def log_overlap(other: FlowMixture) -> FloatArray:
        return np.logaddexp.reduce(other.log_weights[..., None, :] - p.component_kl(other), -1)

    return np.sum(p.weights * (log_overlap(p) - log_overlap(q)), -1)


def collect(
    predictor: FlowPredictor, shards: Shards, limit: int
) -> tuple[dict[str, Answers], list[RGBImage]]:
    """Run the model on up to ``limit`` scenes: answers for each of POKES, and the images."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in POKES}
    images = []
    worlds: dict[tuple[str, int], int] = {}
    centres = grid(SIZE)
    for sample, truth, pokes in tqdm(scenes(shards, limit), total=limit, unit="scene"):
        images.append(sample.rgb)
        scene = predictor.encode(sample.rgb)
        unconditional = predictor.unconditional(scene, SIZE)
        mixtures = predictor.predict_batch(
            scene, centres[pokes][:, None], truth.flow[pokes][:, None], centres
        )
        for i, (name, poke) in enumerate(zip(POKES, pokes, strict=True)):
            mixture = mixtures[i]
            values = {
                **{how: mixture.reduce(how) for how in REDUCTIONS},
                "kl_matched": mixture.kl(unconditional),
                "kl_variational": variational_kl(mixture, unconditional),
                "log_prob": mixture.log_prob(truth.flow),
            }
            rows[name].append(
                {
                    "world": worlds.setdefault((sample.kind, sample.seed), len(worlds)),
                    "kind": sample.kind,
                    "flow": truth.flow,
                    "moving": truth.moving,
                    "poke": poke,
                    **{key: value.astype(np.float32) for key, value in values.items()},
                }
            )
    if not images:
        raise ValueError(f"none of the {len(shards)} samples beside {shards.files[0]} is a scene")
    answers = {
        name: Answers(**{key: np.stack([row[key] for row in of_poke]) for key in of_poke[0]})
        for name, of_poke in rows.items()
    }
    return answers, images


# ----------------------------------------------------------------------------------- figures


def intersection_over_union(predicted: Mask, true: Mask) -> FloatArray:
    """``[...]``: IoU of two masks ``[..., C]``."""
    return (predicted & true).sum(-1) / np.maximum(1, (predicted | true).sum(-1))


def endpoint_error(flow: FloatArray, true: FloatArray) -> FloatArray:
    """``[..., C]``: distances of ``[..., C, 2]`` in cells."""
    return np.linalg.norm((flow - true) * np.array([SIZE[1], SIZE[0]], np.float32), axis=-1)


def best_threshold(scores: FloatArray, moving: Mask, candidates: FloatArray) -> float:
    """The candidate for which ``scores > candidate`` has the highest mean IoU with ``moving``."""
    ious = [intersection_over_union(scores > c, moving).mean() for c in candidates]
    return float(candidates[int(np.argmax(ious))])


def bootstrap_interval(
    world: NDArray[np.intp], value: FloatArray, reference: FloatArray | None = None
) -> list[float]:
    """95 % interval of the mean of ``value [N]``, or of its ratio to that of ``reference [N]``.

    Whole worlds are drawn, since scenes of the same world are alike.
    """
    _, member = np.unique(world, return_inverse=True)
    count = member.max() + 1
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), 2000)
    weights = draws[:, member]
    below = weights.sum(-1) if reference is None else weights @ reference
    return np.quantile(weights @ value / below, [0.025, 0.975]).tolist()


def flow_figures(answers: Answers, where: Mask) -> dict[str, Any]:
    """EPE of both reductions and of the baselines over the cells ``where [N, C]``."""

    def scene_means(error: FloatArray) -> FloatArray:
        return (error * where).sum(-1) / where.sum(-1)

    still = endpoint_error(np.zeros_like(answers.flow), answers.flow)
    copied = endpoint_error(answers.poke_flow[:, None], answers.flow)
    distance = answers.distance
    discs = [scene_means(np.where(distance < radius, copied, still)) for radius in RADII]
    best = int(np.argmin([disc.mean() for disc in discs]))
    baselines = {"no_motion": scene_means(still), "copy": discs[best]}
    figures: dict[str, Any] = {name: float(error.mean()) for name, error in baselines.items()}
    figures["copy_radius"] = float(RADII[best])
    for name in REDUCTIONS:
        error = scene_means(endpoint_error(getattr(answers, name), answers.flow))
        figures[name] = float(error.mean())
        for baseline, reference in baselines.items():
            ratio = f"{name}_over_{baseline}"
            figures[ratio] = float(error.mean() / reference.mean())
            figures[f"{ratio}_interval"] = bootstrap_interval(answers.world, error, reference)
            # a few scenes of large motion dominate the means
            figures[f"{name}_beats_{baseline}"] = float((error < reference).mean())
    return figures


def mask_figures(answers: Answers, thresholds: dict[str, float]) -> dict[str, Any]:
    """IoU of the moving part by each score, with half and double its threshold, and by a disc."""
    figures: dict[str, Any] = {}
    for name, threshold in thresholds.items():
        for suffix, factor in (("", 1.0), ("_half_threshold", 0.5), ("_double_threshold", 2.0)):
            mask = getattr(answers, name) > factor * threshold
            iou = intersection_over_union(mask, answers.moving)
            figures[name + suffix] = float(iou.mean())
            if factor == 1:
                figures[name + "_interval"] = bootstrap_interval(answers.world, iou)
    distance = answers.distance
    discs = [intersection_over_union(distance < r, answers.moving).mean() for r in RADII]
    figures["disc"] = float(np.max(discs))
    figures["disc_radius"] = float(RADII[int(np.argmax(discs))])
    return figures


def group_figures(answers: Answers, thresholds: dict[str, float]) -> dict[str, Any]:
    """The main figures, for some of the scenes."""
    epe = flow_figures(answers, np.ones_like(answers.moving))
    iou = mask_figures(answers, thresholds)
    ratios = [f"{name}_over_{base}" for name in REDUCTIONS for base in ("no_motion", "copy")]
    chosen = (*REDUCTIONS, "no_motion", "copy", *ratios)
    return {
        "scenes": len(answers),
        "worlds": len(np.unique(answers.world)),
        "epe": {name: epe[name] for name in chosen},
        "iou": {name: iou[name] for name in (*thresholds, "disc")},
    }


def report(answers: Answers, thresholds: dict[str, float]) -> dict[str, Any]:
    """All figures of one split and one way to poke."""
    length = np.linalg.norm(answers.poke_flow, axis=-1)
    bounds = np.quantile(length, [0, 1 / 3, 2 / 3, 1])
    third = np.searchsorted(bounds[1:3], length, side="right")
    return {
        "epe": flow_figures(answers, np.ones_like(answers.moving)),
        "epe_moving_cells": flow_figures(answers, answers.moving),
        "nll": float(-answers.log_prob.mean()),
        "nll_moving_cells": float(-answers.log_prob[answers.moving].mean()),
        "iou": mask_figures(answers, thresholds),
        "by_poke_size": [
            {
                "from": float(bounds[i]),
                "to": float(bounds[i + 1]),
                **group_figures(answers[third == i], thresholds),
            }
            for i in range(3)
            if (third == i).any()
        ],
        "by_kind": {
            str(kind): group_figures(answers[answers.kind == kind], thresholds)
            for kind in np.unique(answers.kind)
        },
    }


def choose_thresholds(answers: dict[str, Answers]) -> dict[str, float]:
    """One threshold a score, best over all ways to poke together."""
    moving = np.concatenate([a.moving for a in answers.values()])
    candidates = {
        "kl_matched": KL_THRESHOLDS,
        "kl_variational": KL_THRESHOLDS,
        "speed": FLOW_THRESHOLDS,
    }
    return {
        name: best_threshold(
            np.concatenate([getattr(a, name) for a in answers.values()]), moving, values
        )
        for name, values in candidates.items()
    }


# ---------------------------------------------------------------------------------- pictures


def contact_sheet(
    answers: Answers, images: list[RGBImage], threshold: float, count: int = 24
) -> RGBImage:
    """``count`` evenly chosen scenes in two columns: image, flows and masks, true and predicted."""
    captions = ["poke", "true flow", "mean", "median", "true part", "KL above threshold"]
    chosen = np.unique(np.linspace(0, len(answers) - 1, count).round().astype(int))
    rows = []
    for i in chosen:
        size = images[i].shape[:2]
        centre = grid(SIZE)[answers.poke[[i]]]
        poke = answers.poke_flow[[i]]
        pixels = (normalised_to_pixels(centre, size), displacement_normalised_to_pixels(poke, size))
        largest = 1.2 * float(np.linalg.norm(answers.flow[i], axis=-1).max())
        flows = [
            flow_to_color(f[i].reshape(*SIZE, 2), largest)
            for f in (answers.flow, answers.mean, answers.median)
        ]
        nothing = np.zeros((0, 2))
        mask = answers.kl_matched[i] > threshold
        masks = [
            draw_overlay(images[i], nothing, nothing, nothing, None, mask=m.reshape(SIZE))
            for m in (answers.moving[i], mask)
        ]
        panels = [draw_overlay(images[i], *pixels, nothing, None), *flows, *masks]
        errors = [
            endpoint_error(f, answers.flow[i]).mean()
            for f in (np.zeros_like(answers.flow[i]), answers.mean[i], answers.median[i])
        ]
        iou = float(intersection_over_union(mask, answers.moving[i]))
        title = "{}: EPE still {:.2f}, mean {:.2f}, median {:.2f} cells; IoU {:.2f}".format(
            answers.kind[i], *errors, iou
        )
        rows.append(side_by_side(panels, captions, title, panel_height=160))
    if len(rows) % 2:
        rows.append(np.full_like(rows[0], 255))
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return np.vstack([np.hstack(pair) for pair in pairs])


# -------------------------------------------------------------------------------------- main


def evaluate(
    predictor: FlowPredictor, data: Path, limit: int, pictures: Path | None = None
) -> dict[str, Any]:
    """Thresholds from the split ``val``, figures of ``val`` and ``held_out``."""
    figures: dict[str, Any] = {}
    for split in ("val", "held_out"):
        shards = Shards(data, split)
        answers, images = collect(predictor, shards, limit)
        first = answers[POKES[0]]
        if split == "val":
            figures["thresholds"] = choose_thresholds(answers)
        figures[split] = {
            "generator": shards.generator,
            "scenes": len(first),
            "worlds": len(np.unique(first.world)),
            **{f"poke_{k}": report(a, figures["thresholds"]) for k, a in answers.items()},
        }
        if pictures:
            sheet = contact_sheet(first, images, figures["thresholds"]["kl_matched"])
            pictures.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(pictures / f"{split}.png"), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
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


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="shipped name or file")
    parser.add_argument("--data", type=Path, required=True, help="folder with the shards")
    parser.add_argument("--scenes", type=int, default=500, help="at most this many of each split")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--pictures", type=Path, help="folder for a contact sheet of each split")
    parser.add_argument(
        "--save-threshold", action="store_true", help="write the KL threshold into the model's file"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    predictor = FlowPredictor(load_model(args.model), precision=args.precision)
    figures = evaluate(predictor, args.data, args.scenes, args.pictures)
    header = {
        "model": args.model,
        "precision": args.precision,
        "commit": code_version(),
        "protocol": "static camera, exactly one independent cause, one poke",
    }
    text = json.dumps({**header, **figures}, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)
    if args.save_threshold:
        save_threshold(resolve_model(args.model), figures["thresholds"]["kl_matched"])


if __name__ == "__main__":
    main()
