# SPDX-License-Identifier: MIT
"""Evaluation on stored simulation samples: one poke, dense flow and moving part on a 64 x 64 grid.

``python -m training.evaluate --model M --data DIR`` chooses thresholds on the split
``val`` of DIR and reports on its split ``held_out``. End-point errors are in cells of the grid
(1/64 of the image's side), as in the paper.

Baselines, in the same run: no motion; a disc around the poke that copies its motion, its radius the
best one *of the reported data*; the same disc as a mask; the model's own flow magnitude as a mask.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fpt_model import FlowPredictor, load_model
from fpt_model.geometry import grid
from sim.dataset import StoredSample
from training.data import Shards

log = logging.getLogger("evaluation")

SIZE = (64, 64)  # cells
MIN_MOVING_CELLS = 12  # scenes with a smaller true moving part are not reported
MIN_POKE = 0.01  # image sides; scenes whose largest true motion is smaller are not reported
RADII = np.linspace(0.02, 1.0, 50)  # image sides, candidates of the disc baselines

FloatArray = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class GridTruth:
    """The truth of one future of one sample on the grid, in normalised units."""

    flow: FloatArray  # [h, w, 2]
    moving: Mask  # [h, w]
    poke_pos: FloatArray  # [1, 2]: the cell of largest motion
    poke_flow: FloatArray  # [1, 2]


def grid_truth(sample: StoredSample, future: int, size: tuple[int, int] = SIZE) -> GridTruth:
    """Read the true flow at the pixel under each cell's centre."""
    height, width = sample.rgb.shape[:2]
    centres = grid(size)
    xy = np.minimum((centres * [width, height]).astype(int), [width - 1, height - 1])
    flow = sample.flow_at(future, xy).flow
    moving = sample.moving[future][sample.bodies[xy[:, 1], xy[:, 0]]]
    poke = int(np.argmax(np.where(moving, np.linalg.norm(flow, axis=-1), -1)))
    return GridTruth(
        flow.reshape(*size, 2),
        moving.reshape(size),
        centres[[poke]],
        flow[[poke]].astype(np.float64),
    )


def scenes(shards: Shards, limit: int) -> Iterator[tuple[StoredSample, GridTruth]]:
    """The first future with a static camera of each sample that shows enough motion."""
    found = 0
    for index in range(len(shards)):
        sample = shards[index]
        for future in np.flatnonzero(sample.camera_static):
            truth = grid_truth(sample, int(future))
            size = np.linalg.norm(truth.poke_flow)
            if truth.moving.sum() >= MIN_MOVING_CELLS and MIN_POKE <= size <= 1:
                yield sample, truth
                found += 1
                break
        if found == limit:
            return


def intersection_over_union(predicted: Mask, true: Mask) -> float:
    """IoU of two masks of equal shape."""
    return float((predicted & true).sum() / max(1, (predicted | true).sum()))


@dataclass
class Records:
    """What is needed of each scene to choose thresholds and to report; lists of equal length."""

    kind: list[str]
    truth: list[GridTruth]
    flow: list[FloatArray]  # [h, w, 2] predicted mean
    kl: list[FloatArray]  # [h, w] nats
    nll: list[float]  # nats, mean over cells

    def mean_iou(self, mask: Callable[[int], Mask]) -> float:
        """Mean over scenes of the IoU of ``mask(scene)`` with the true moving part."""
        return float(
            np.mean([intersection_over_union(mask(i), t.moving) for i, t in enumerate(self.truth)])
        )

    def best(
        self, candidates: FloatArray, mask: Callable[[int, float], Mask]
    ) -> tuple[float, float]:
        """``(candidate, mean IoU)`` of the candidate with the highest mean IoU."""
        ious = [self.mean_iou(lambda i, c=c: mask(i, c)) for c in candidates]
        return float(candidates[int(np.argmax(ious))]), float(np.max(ious))

    def kl_mask(self, i: int, threshold: float) -> Mask:
        """The moving part by influence."""
        return self.kl[i] > threshold

    def flow_mask(self, i: int, threshold: float) -> Mask:
        """The moving part by the magnitude of the predicted flow, in image sides."""
        return np.linalg.norm(self.flow[i], axis=-1) > threshold

    def disc(self, i: int, radius: float) -> Mask:
        """Cells within ``radius`` image sides of the poke."""
        truth = self.truth[i]
        distance = np.linalg.norm(grid(SIZE) - truth.poke_pos, axis=-1)
        return (distance <= radius).reshape(SIZE)


def collect(predictor: FlowPredictor, shards: Shards, limit: int) -> Records:
    """Run the model on up to ``limit`` scenes."""
    records = Records([], [], [], [], [])
    for sample, truth in tqdm(scenes(shards, limit), total=limit, unit="scene"):
        scene = predictor.encode(sample.rgb)
        mixture = predictor.predict(scene, truth.poke_pos, truth.poke_flow, grid(SIZE))
        records.kind.append(sample.kind)
        records.truth.append(truth)
        records.flow.append(mixture.mean().reshape(*SIZE, 2))
        records.kl.append(predictor.influence_of(scene, mixture, SIZE))
        records.nll.append(float(-mixture.log_prob(truth.flow.reshape(-1, 2)).mean()))
    return records


def endpoint_error(flow: FloatArray, truth: GridTruth) -> float:
    """Mean over cells, in cells."""
    return float(np.linalg.norm((flow - truth.flow) * SIZE[0], axis=-1).mean())


def report(records: Records, thresholds: dict[str, float]) -> dict[str, Any]:
    """All figures of one split."""
    truths = records.truth
    copies = [
        np.mean(
            [
                endpoint_error(np.where(records.disc(i, r)[..., None], t.poke_flow[0], 0.0), t)
                for i, t in enumerate(truths)
            ]
        )
        for r in RADII
    ]
    error = [endpoint_error(f, t) for f, t in zip(records.flow, truths, strict=True)]
    still = [endpoint_error(np.zeros((*SIZE, 2)), t) for t in truths]
    disc_radius, disc_iou = records.best(RADII, records.disc)
    kl_ious = [
        intersection_over_union(records.kl_mask(i, thresholds["kl"]), t.moving)
        for i, t in enumerate(truths)
    ]
    kinds = np.array(records.kind)
    return {
        "scenes": len(truths),
        "epe": float(np.mean(error)),
        "epe_no_motion": float(np.mean(still)),
        "epe_copy_best_radius": float(np.min(copies)),
        "copy_radius": float(RADII[int(np.argmin(copies))]),
        "epe_over_no_motion": float(np.mean(error) / np.mean(still)),
        "epe_over_copy": float(np.mean(error) / np.min(copies)),
        "nll": float(np.mean(records.nll)),
        "iou_kl": float(np.mean(kl_ious)),
        "iou_kl_half_threshold": records.mean_iou(
            lambda i: records.kl_mask(i, thresholds["kl"] / 2)
        ),
        "iou_kl_double_threshold": records.mean_iou(
            lambda i: records.kl_mask(i, thresholds["kl"] * 2)
        ),
        "iou_flow": records.mean_iou(lambda i: records.flow_mask(i, thresholds["flow"])),
        "iou_disc_best_radius": disc_iou,
        "disc_radius": disc_radius,
        "kinds": {
            kind: {
                "scenes": int((kinds == kind).sum()),
                "epe": float(np.mean(np.array(error)[kinds == kind])),
                "epe_no_motion": float(np.mean(np.array(still)[kinds == kind])),
                "iou_kl": float(np.mean(np.array(kl_ious)[kinds == kind])),
            }
            for kind in sorted(set(records.kind))
        },
    }


def evaluate(predictor: FlowPredictor, data: Path, limit: int) -> dict[str, Any]:
    """Thresholds from the split ``val``, figures of ``val`` and ``held_out``."""
    validation = collect(predictor, Shards(data, "val"), limit)
    kl, _ = validation.best(np.geomspace(0.01, 100, 81), validation.kl_mask)
    flow, _ = validation.best(np.geomspace(0.001, 0.3, 60), validation.flow_mask)
    thresholds = {"kl": kl, "flow": flow}
    held_out = collect(predictor, Shards(data, "held_out"), limit)
    return {
        "thresholds": thresholds,
        "val": report(validation, thresholds),
        "held_out": report(held_out, thresholds),
    }


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
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    figures = evaluate(
        FlowPredictor(load_model(args.model), precision=args.precision), args.data, args.scenes
    )
    text = json.dumps({"model": args.model, "precision": args.precision, **figures}, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
