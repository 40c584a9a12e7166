# SPDX-License-Identifier: MIT
"""One thing, poked one way, the other way and not at all: a picture of the answers.

    python benchmarks/what_if.py --out what_if.png

Each row is a simulated world of a kind: the modes of one point without a poke; flow and mask when
that point moves as it truly may, and when it moves the opposite way, with the modes of the point
that is least decided: it moves along, or it stays. Needs MuJoCo and OpenGL.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from fpt_model import FlowMixture, FlowPredictor
from fpt_model.geometry import grid
from fpt_model.visualize import RGBImage, draw_overlay, side_by_side
from sim import Simulator

SCENES = ("drawer:1", "door:6", "turntable:2", "lid:6")
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


def undecided(mixture: FlowMixture) -> int:
    """The query ``[Q]`` whose two likeliest motions are both likely and farthest apart.

    ValueError if there is none whose two are further apart than twice their deviations.
    """
    modes = mixture.modes()
    apart = np.linalg.norm(modes.means[:, 0] - modes.means[:, 1], axis=-1)
    spread = np.linalg.norm(modes.scale_tril[:, :2], axis=(-2, -1)).sum(-1)
    distinct = apart > 2 * spread
    if not distinct.any():
        raise ValueError(f"none of {len(distinct)} queries has two distinct motions")
    return int(np.argmax(modes.weights[:, 1] * np.where(distinct, apart, 0)))


def row(predictor: FlowPredictor, scene: str) -> RGBImage:
    """The three pictures of a scene ``kind:seed``, side by side; prints two motions of a point."""
    kind, seed = scene.split(":")
    world = Simulator(kind, int(seed), SIZE)
    image = world.render().rgb
    encoded = predictor.encode(image)
    point, motion = true_motion(world, int(seed))
    scale = np.array(SIZE[::-1], float)
    free = predictor.predict(encoded, NO_POINTS, NO_POINTS, point)
    pictures = [draw_overlay(image, NO_POINTS, NO_POINTS, point * scale, free.scaled(*scale))]
    for sign in (1, -1):
        mixture = predictor.predict(encoded, point, sign * motion, grid(GRID))
        query = undecided(mixture)
        modes = mixture[query].scaled(*scale).modes()
        at = grid(GRID)[query] * scale
        text = "; ".join(
            f"{weight:.2f} ({dx:.1f}, {dy:.1f})"
            for weight, (dx, dy) in zip(modes.weights, modes.means, strict=True)
        )
        print(f"{scene}, poked by {sign:+d}: ({at[0]:.0f}, {at[1]:.0f}) moves by {text} px")
        pictures.append(
            draw_overlay(
                image,
                point * scale,
                sign * motion * scale,
                at[None],
                mixture[query : query + 1].scaled(*scale),
                mixture.median().reshape(*GRID, 2) * scale,
                predictor.influence_of(encoded, mixture, GRID) > predictor.config.kl_threshold,
            )
        )
    return side_by_side(pictures, ["no poke: what may happen", "poked", "poked the other way"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="fpt-tiny")
    parser.add_argument("--scenes", nargs="+", default=SCENES, metavar="KIND:SEED")
    parser.add_argument("--out", type=Path, default=Path("what_if.png"))
    options = parser.parse_args()
    predictor = FlowPredictor.load(options.model)
    picture = np.vstack([row(predictor, scene) for scene in options.scenes])
    half = cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(options.out), cv2.cvtColor(half, cv2.COLOR_RGB2BGR))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
