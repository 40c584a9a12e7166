# SPDX-License-Identifier: MIT
"""Contact sheets: `python -m sim.sheet --kind drawer --out sheet.png` shows a kind's worlds.

A row holds, for two worlds: picture, true flow (colour wheel, scaled to the strongest), the
picture afterwards, and the body mask.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from fpt_model.visualize import flow_to_color
from sim.kinds import HELD_OUT_KINDS, TRAIN_KINDS
from sim.simulator import Simulator


def sheet(kind: str, seeds: range, size: int) -> NDArray[np.uint8]:
    """RGB picture of the worlds of `kind` with the given seeds."""
    palette = np.random.default_rng(1).integers(40, 256, (256, 3)).astype(np.uint8)
    palette[0] = 20
    tiles = []
    for seed in seeds:
        world = Simulator(kind, seed, (size, size))
        frame = world.render()
        future = world.sample_future(np.random.default_rng(seed), 0.1)
        truth = world.truth(frame, future)
        colours = flow_to_color(truth.flow)
        strongest = float(np.linalg.norm(truth.flow, axis=-1).max())
        cv2.putText(colours, f"{strongest:.2f}", (2, 12), 0, 0.4, (0, 0, 0))
        row = [frame.rgb, colours, truth.next.rgb, palette[frame.bodies]]
        tiles.append(np.concatenate(row, axis=1))
    if len(tiles) % 2:
        tiles.append(np.zeros_like(tiles[0]))
    rows = [np.concatenate(pair, 1) for pair in zip(tiles[::2], tiles[1::2], strict=True)]
    return np.concatenate(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=TRAIN_KINDS + HELD_OUT_KINDS, required=True)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=12, help="number of worlds")
    parser.add_argument("--size", type=int, default=160, help="tile side in pixels")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if min(args.first, args.count - 1, args.size - 1) < 0:
        parser.error("--first must not be negative, --count and --size must be positive")
    picture = sheet(args.kind, range(args.first, args.first + args.count), args.size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(args.out), picture[..., ::-1]):
        sys.exit(f"cannot write {args.out}")


if __name__ == "__main__":
    main()
