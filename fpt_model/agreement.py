# SPDX-License-Identifier: MIT
"""How far another backend or precision departs from PyTorch in fp32, on real frames."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fpt_model.geometry import grid
from fpt_model.predictor import FlowPredictor

SIDE_PX = 448.0  # flow errors are given in pixels of an image with this side
POKES = (0, 1, 5)  # of each image; 0 is what might happen by itself
POKE_STD = 0.05  # image sides
QUERIES = 256
DENSE = (64, 64)

# what must hold: in fp32 nothing but the order of sums differs
MAX_RAW_FP32 = 1e-4
MAX_FLOW_PX = 1.0  # where staying and moving are about as likely, the median turns on little
MIN_MASK_IOU = 0.98


@dataclass(frozen=True)
class Agreement:
    """Between a candidate and the reference, over all images and pokes."""

    images: int
    raw: float  # largest absolute difference of the head's raw outputs, of QUERIES random points
    flow_px: float  # 99th percentile over the cells of all grids, of the medians' distance
    kl: float  # nats, 99th percentile of D(reference || candidate), matched bound
    mask_iou: float  # of the moving parts, all cells of all masks together; 1 when all are empty

    def violations(self, precision: str) -> list[str]:
        """What does not hold, one line each."""
        found = []
        if precision == "fp32" and not self.raw <= MAX_RAW_FP32:
            found.append(f"raw outputs differ by {self.raw:.2g}, at most {MAX_RAW_FP32:g} expected")
        if not self.flow_px <= MAX_FLOW_PX:
            found.append(f"flow differs by {self.flow_px:.2g} px, at most {MAX_FLOW_PX} expected")
        if not self.mask_iou >= MIN_MASK_IOU:
            found.append(f"mask IoU is {self.mask_iou:.4f}, at least {MIN_MASK_IOU} expected")
        return found


def agreement(
    reference: FlowPredictor,
    candidate: FlowPredictor,
    images: Iterable[NDArray[np.uint8]],
) -> Agreement:
    """Ask both the same of every image: uint8 RGB ``[H, W, 3]``. ValueError without any image."""
    raw, distances, kl, both, either, count = 0.0, [], [], 0, 0, 0
    dims = reference.config.flow_dim
    for count, image in enumerate(images, 1):
        rng = np.random.default_rng([0, count])
        scenes = [(p, p.encode(image)) for p in (reference, candidate)]
        for pokes in POKES:
            pos, flow = rng.random((pokes, 2)), rng.normal(0, POKE_STD, (pokes, dims))
            points = rng.random((QUERIES, 2))
            own, other = (
                p.raw(scene, pos[None], flow[None], points).astype(np.float64)
                for p, scene in scenes
            )
            raw = float(np.maximum(raw, np.abs(own - other).max()))  # unlike max() keeps a NaN
            answers = [p.predict(scene, pos, flow, grid(DENSE)) for p, scene in scenes]
            a, b = (mixture.median()[:, :2] * SIDE_PX for mixture in answers)
            distances.append(np.linalg.norm(a - b, axis=-1))
            kl.append(answers[0].kl(answers[1]))
            if pokes:
                moving = [
                    p.influence_of(scene, answer, DENSE) > p.config.kl_threshold
                    for (p, scene), answer in zip(scenes, answers, strict=True)
                ]
                both += int(np.sum(moving[0] & moving[1]))
                either += int(np.sum(moving[0] | moving[1]))
    if not count:
        raise ValueError("expected at least one image")
    return Agreement(
        images=count,
        raw=raw,
        flow_px=float(np.percentile(np.concatenate(distances), 99)),
        kl=float(np.percentile(np.concatenate(kl), 99)),
        mask_iou=both / either if either else 1.0,
    )
