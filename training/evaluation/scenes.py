# SPDX-License-Identifier: MIT
"""Which pictures are asked about, and what is true of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpt_model.geometry import grid, normalised_to_pixels, pixels_to_normalised
from fpt_model.visualize import RGBImage
from sim.dataset import StoredSample
from training.data import Shards
from training.evaluation.suite import Suite
from training.tracks import STILL, TrackShards

log = logging.getLogger("training")

MIN_MOVING = 12  # points; scenes with a smaller true moving part are not asked about
MIN_POKE = 0.01  # image sides; scenes whose largest true motion is smaller are not
MIN_VISIBLE_FLOW = 0.002  # image sides; bodies that nowhere move so far count as still
DISTINCT = 1 / 32  # image sides, two of 64 cells: motions that differ by more are distinct
COARSE = (32, 32)  # cells where whole pictures with several futures are compared

FloatArray = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]


class Truth(NamedTuple):
    """The truth of one future of one sample on C cells, in normalised units."""

    flow: FloatArray  # [C, 2]
    moving: Mask  # [C]


class Scene(NamedTuple):
    """A picture, and one way it went on at C points. Positions and flow are normalised."""

    image: RGBImage
    kind: str
    world: str  # scenes of one world are alike
    camera_static: bool
    points: FloatArray  # [C, 2]
    flow: FloatArray  # [C, 2]
    moving: Mask  # [C]
    pokes: NDArray[np.intp]  # [P] points: where the motion is largest, then anywhere at random
    drawn: int  # a point that moves, at random


class CameraScene(NamedTuple):
    """A picture, and what lies still in the world under a moving and a standing camera."""

    image: RGBImage
    kind: str
    world: str
    points: FloatArray  # [C, 2]
    moving_flow: FloatArray  # [C, 2]; NaN where a body moves, or too far
    static_flow: FloatArray  # [C, 2]; NaN where a body moves


class AmbiguousScene(NamedTuple):
    """A picture and the points that its F futures with a standing camera move differently."""

    image: RGBImage
    kind: str
    world: str
    points: FloatArray  # [C, 2], each with at least two distinct motions
    flow: FloatArray  # [F, C, 2]
    distinct: Mask  # [F, C]: one future for each distinct motion of a point


def grid_truth(sample: StoredSample, future: int, size: tuple[int, int]) -> Truth:
    """Read the true flow at the pixel under each cell's centre."""
    height, width = sample.bodies.shape
    xy = np.floor(normalised_to_pixels(grid(size), (height, width)) + 0.5).astype(int)
    flow = sample.flow_at(future, xy).flow
    bodies = sample.bodies[xy[:, 1], xy[:, 0]]
    farthest = np.zeros(sample.body_motion.shape[1])
    np.maximum.at(farthest, bodies, np.linalg.norm(flow, axis=-1))
    return Truth(flow, (sample.moving[future] & (farthest >= MIN_VISIBLE_FLOW))[bodies])


def in_turn(shards: Shards) -> NDArray[np.intp]:
    """The images' numbers: the first ones of all worlds before second ones."""
    seen: Counter[tuple[str, int]] = Counter()
    turn = []
    for world in shards.worlds:
        turn.append(seen[world])
        seen[world] += 1
    return np.argsort(turn, kind="stable")


def scenes(shards: Shards | TrackShards, suite: Suite, seed: int) -> Iterator[Scene]:
    """All scenes that one poke can tell of; the same ones in the same order each time.

    A simulated one is an image with the first of its futures that has a static camera, exactly one
    independent cause and enough visible motion; of a video any clip with enough motion.
    """
    if isinstance(shards, TrackShards):
        yield from _tracked(shards, suite, seed)
    else:
        yield from (scene for _, _, _, scene in simulated_scenes(shards, suite, seed))


def simulated_scenes(
    shards: Shards, suite: Suite, seed: int
) -> Iterator[tuple[int, StoredSample, int, Scene]]:
    """Number of the image, its sample and the future of each of :func:`scenes`, and the scene."""
    size = (suite.grid, suite.grid)
    for index in in_turn(shards):
        sample = shards[index]
        for future in np.flatnonzero(sample.camera_static & (sample.causes == 1)):
            truth = grid_truth(sample, int(future), size)
            pokes = _choose_pokes(*truth, suite, np.random.default_rng([seed, index]))
            if pokes is not None:
                name = f"{sample.kind} {sample.seed}"
                scene = Scene(sample.rgb, sample.kind, name, True, grid(size), *truth, *pokes)
                yield int(index), sample, int(future), scene
                break


def _tracked(shards: TrackShards, suite: Suite, seed: int) -> Iterator[Scene]:
    for index in range(len(shards)):
        clip = shards[index]
        image = clip.frame(0)
        size = (image.shape[0], image.shape[1])
        end = len(clip) - 1 if suite.horizon_frames is None else suite.horizon_frames
        if not 0 < end < len(clip):
            log.warning(
                "a clip of %s is left out: it has %d frames, expected more than %d",
                clip.source,
                len(clip),
                suite.horizon_frames or 1,
            )
            continue
        motion = clip.motion(0, end, size)
        flow = motion.flow[motion.known]
        if len(flow) <= suite.pokes[-1]:  # nothing would be left to ask about
            log.warning(
                "a clip of %s is left out: %d of its points are tracked to its end, expected more "
                "than the suite's %d pokes",
                clip.source,
                len(flow),
                suite.pokes[-1],
            )
            continue
        moving = np.linalg.norm(flow, axis=-1) >= STILL
        rng = np.random.default_rng([seed, index])
        pokes = _choose_pokes(flow, moving, suite, rng)
        if pokes is not None:
            points = pixels_to_normalised(motion.xy[motion.known], size)
            name = f"{clip.source} {index}"
            static = motion.camera_static
            yield Scene(image, clip.source, name, static, points, flow, moving, *pokes)


def _choose_pokes(
    flow: FloatArray, moving: Mask, suite: Suite, rng: np.random.Generator
) -> tuple[NDArray[np.intp], int] | None:
    """``Scene.pokes`` and ``Scene.drawn``; None where too little moves, or too far, or where too
    few points are known for so many pokes."""
    lengths = np.where(moving, np.linalg.norm(flow, axis=-1), 0)
    if moving.sum() < MIN_MOVING or not MIN_POKE <= lengths.max() <= 1:
        return None
    drawn = int(rng.choice(np.flatnonzero(moving)))
    first = int(lengths.argmax())
    told, asked = np.split(
        np.array([first, *rng.permutation(np.delete(np.arange(len(flow)), first))]),
        [suite.pokes[-1]],
    )
    if not moving[asked].any():  # nothing is left to ask about
        return None
    return told, drawn


def camera_scenes(shards: Shards) -> Iterator[CameraScene]:
    """Images with a future whose camera moves, and one whose camera stands still."""
    for index in in_turn(shards):
        sample = shards[index]
        static = sample.camera_static
        if static.all() or not static.any():
            continue
        flows = []
        for future in (np.argmin(static), np.argmax(static)):
            flow, moving = grid_truth(sample, int(future), COARSE)
            far = np.linalg.norm(flow, axis=-1) > 1
            flows.append(np.where((moving | far)[:, None], np.nan, flow))
        if np.isfinite(flows).all((0, 2)).sum() >= MIN_MOVING:
            name = f"{sample.kind} {sample.seed}"
            yield CameraScene(sample.rgb, sample.kind, name, grid(COARSE), *flows)


def ambiguous_scenes(shards: Shards) -> Iterator[tuple[int, StoredSample, AmbiguousScene]]:
    """Images that really go on in several ways, with the points where they differ: number of the
    image, its sample and the scene.
    """
    for index in in_turn(shards):
        sample = shards[index]
        scene = _ambiguous_scene(sample)
        if scene is not None:
            yield int(index), sample, scene


def coarse_flow(sample: StoredSample, futures: Iterable[int]) -> FloatArray:
    """``[F, C, 2]``: the true flow of these futures at the cells of `COARSE`."""
    return np.stack([grid_truth(sample, int(f), COARSE).flow for f in futures])


def distinct_motions(flow: FloatArray) -> Mask:
    """``[F, C]`` of ``flow [F, C, 2]``: of the futures that move a point alike (within `DISTINCT`
    of the first such one) one stands for all, staying where it is included.
    """
    apart = np.linalg.norm(flow[:, None] - flow[None], axis=-1) >= DISTINCT  # [F, F, C]
    distinct = np.ones(flow.shape[:2], bool)
    for f in range(1, len(flow)):
        distinct[f] = (apart[f, :f] | ~distinct[:f]).all(0)
    return distinct


def _ambiguous_scene(sample: StoredSample) -> AmbiguousScene | None:
    """Of an image's futures with a standing camera; None where too few points move differently."""
    futures = np.flatnonzero(sample.camera_static)
    if len(futures) < 2:
        return None
    flow = coarse_flow(sample, futures)
    distinct = distinct_motions(flow)
    usable = (distinct.sum(0) >= 2) & (np.linalg.norm(flow, axis=-1) <= 1).all(0)
    if usable.sum() * 4 < MIN_MOVING:  # of COARSE cells
        return None
    return AmbiguousScene(
        sample.rgb,
        sample.kind,
        f"{sample.kind} {sample.seed}",
        grid(COARSE)[usable],
        flow[:, usable],
        distinct[:, usable],
    )
