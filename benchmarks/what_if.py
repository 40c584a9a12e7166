# SPDX-License-Identifier: MIT
"""One thing, poked one way, the other way and not at all: a picture of the answers.

    python benchmarks/what_if.py --out what_if.png

Each row is a simulated world of a kind: the modes of one point without a poke, then flow and mask
when that point moves as it truly may, and when it moves the opposite way. Needs MuJoCo and OpenGL.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from fpt_model import FlowPredictor, load_model
from fpt_model.visualize import draw_overlay, side_by_side
from sim import Simulator

SCENES = ("drawer:1", "door:6", "knob:4", "turntable:2")
SIZE = (240, 320)  # (height, width) px
GRID = (64, 64)
NO_POINTS = np.zeros((0, 2))


def true_motion(world: Simulator, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A point and its motion, both normalised ``[1, 2]``: the farthest of a future of the world."""
    frame = world.render()
    truth = world.truth(frame, world.sample_future(np.random.default_rng(seed)))
    length = np.linalg.norm(truth.flow, axis=-1) * (truth.moving & ~truth.occluded)
    v, u = np.unravel_index(length.argmax(), length.shape)
    height, width = length.shape
    return np.array([[(u + 0.5) / width, (v + 0.5) / height]]), truth.flow[v, u][None].astype(float)


def row(predictor: FlowPredictor, scene: str) -> NDArray[np.uint8]:
    """The three pictures of a scene ``kind:seed``, side by side."""
    kind, seed = scene.split(":")
    world = Simulator(kind, int(seed), SIZE)
    image = world.render().rgb
    encoded = predictor.encode(image)
    point, motion = true_motion(world, int(seed))
    scale = np.array(SIZE[::-1])
    pictures = []
    for sign in (0, 1, -1):
        pokes = (point, sign * motion) if sign else (NO_POINTS, NO_POINTS)
        mixture = predictor.predict(encoded, *pokes, point)
        shown = (mixture.scaled(*scale),) if sign == 0 else (None,)
        flow = predictor.dense(encoded, *pokes, GRID, "median") if sign else None
        mask = predictor.moving_part(encoded, *pokes, GRID) if sign else None
        pictures.append(
            draw_overlay(
                image,
                pokes[0] * scale,
                pokes[1] * scale,
                point * scale if sign == 0 else NO_POINTS,
                shown[0],
                None if flow is None else flow * scale,
                mask,
            )
        )
    return side_by_side(pictures, ["no poke: what may happen", "poked", "poked the other way"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="fpt-tiny")
    parser.add_argument("--scenes", nargs="+", default=SCENES, metavar="KIND:SEED")
    parser.add_argument("--out", type=Path, default=Path("what_if.png"))
    options = parser.parse_args()
    predictor = FlowPredictor(load_model(options.model))
    rows = [row(predictor, scene) for scene in options.scenes]
    cv2.imwrite(str(options.out), cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
