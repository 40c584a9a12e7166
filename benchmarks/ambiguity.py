# SPDX-License-Identifier: MIT
"""How far two motions, or one poke, can come at all, where a picture goes on in several ways.

    python benchmarks/ambiguity.py --data data --scenes 150

draws each picture of `fpt eval`'s "several futures" again, and further continuations of it. Who
has seen these knows the distribution of what may happen in this very scene, as no picture can tell
it: his mean is that of 64 of them, and his two motions are those two of them to the nearer of which
they are closest on the average. On the stored futures, which he has not seen, his two are compared
with his mean: about what a model that predicts without error would come to. It is no strict bound:
his motions are among those 64, and each one's error is over that of his own mean.

Told one poke, that of a stored future's largest motion, he answers the geometric median of those 8
of 512 continuations that move the poked point most nearly so. With more of them he would err less,
so what a model without error would do is somewhat below. The shipped model is measured on the same
scenes. `benchmarks/ambiguity.md` is written. Needs MuJoCo and OpenGL.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from report import where
from tqdm import tqdm

from fpt_model import FlowMixture, FlowPredictor
from fpt_model.checkpoint import resolve_model
from sim.dataset import GENERATOR, Settings, StoredSample, replay, sha256
from training.data import Shards
from training.evaluation.depth import check_drawn_again
from training.evaluation.measure import (
    FloatArray,
    Row,
    best_two,
    end_point_error,
    measure_ambiguity,
)
from training.evaluation.report import table
from training.evaluation.run import load_predictor
from training.evaluation.scenes import (
    COARSE,
    MIN_POKE,
    AmbiguousScene,
    ambiguous_scenes,
    coarse_flow,
    distinct_motions,
)
from training.tracks import open_shards

HERE = Path(__file__).parent
GRID = 64  # cells that errors are told in
FURTHER = 64  # continuations of each picture, for two motions
SEARCHED = 512  # of which the nearest are sought, told a poke
NEAREST = 8
WEIGHTINGS = {"futures": "all futures", "distinct": "each distinct motion once"}


def further_flow(
    split: str, number: int, sample: StoredSample, scene: AmbiguousScene, settings: Settings
) -> FloatArray:
    """``[S, C, 2]``: other continuations of the picture at the points of `scene`."""
    world = replay(split, number, settings).world
    rng = np.random.default_rng([1, number])
    futures = [
        world.sample_future(rng, wide_probability=settings.wide_probability)
        for _ in range(SEARCHED)
    ]
    other = replace(
        sample,
        body_motion=np.stack([f.body_motion for f in futures]),
        camera_motion=np.stack([f.camera_motion for f in futures]),
    )
    side = COARSE[0]
    cells = np.floor(scene.points * side).astype(int)
    return coarse_flow(other, range(SEARCHED))[:, cells[:, 1] * side + cells[:, 0]]


def known_distribution(further: FloatArray, scene: AmbiguousScene) -> Row:
    """Errors of who knows the distribution, by what is counted, as `measure_ambiguity` has them."""
    further = further[:FURTHER]
    group = len(scene.flow)
    groups = [further[i : i + group] for i in range(0, FURTHER - group + 1, group)]
    once = np.concatenate([mask / mask.sum(0) for mask in map(distinct_motions, groups)])
    shares = {
        "futures": (further, np.full(further.shape[:2], 1 / FURTHER), np.ones_like(scene.distinct)),
        "distinct": (further[: len(once)], once / len(groups), scene.distinct),
    }
    row: Row = {}
    for name, (motions, share, counted) in shares.items():
        mean = end_point_error((motions * share[..., None]).sum(0), scene.flow, GRID)
        two = end_point_error(best_two(motions, share)[:, None], scene.flow, GRID).min(0)
        row |= {f"{name}/mean": mean[counted].mean(), f"{name}/two": two[counted].mean()}
    return row


def one_poke(predictor: FlowPredictor, further: FloatArray, scene: AmbiguousScene) -> list[Row]:
    """Errors in cells of each stored future that moves far enough, told its largest motion."""
    encoded = predictor.encode(scene.image)
    rows: list[Row] = []
    for flow in scene.flow:
        lengths = np.linalg.norm(flow, axis=-1)
        poke = int(lengths.argmax())
        if lengths[poke] < MIN_POKE:
            continue
        near = np.argsort(np.linalg.norm(further[:, poke] - flow[poke], axis=-1))[:NEAREST]
        answers = {
            "none": np.zeros_like(flow),
            "known": geometric_median(further[near]),
            "model": predictor.predict(
                encoded, scene.points[[poke]], flow[[poke]], scene.points
            ).median(),
        }
        rows.append({n: end_point_error(f, flow, GRID).mean() for n, f in answers.items()})
    return rows


def geometric_median(motions: FloatArray) -> FloatArray:
    """Of ``motions [S, C, 2]``, alike probable: ``[C, 2]``."""
    means = np.moveaxis(motions, 0, 1)
    alike = np.full(means.shape[:-1], -np.log(len(motions)))
    exact = np.broadcast_to(1e-6 * np.eye(2), (*means.shape, 2))
    return FlowMixture(alike, means.astype(float), exact).median()


def measured(
    data: Path, split: str, count: int, predictor: FlowPredictor
) -> tuple[list[list[object]], list[object]]:
    """Of a split the rows of the first table, and that of the second."""
    shards = open_shards(data, split)
    if not isinstance(shards, Shards):
        raise ValueError(f"{data} has clips for {split!r}, expected simulated shards")
    check_drawn_again(shards, split)
    settings = Settings(**shards.manifest["settings"])
    ours: list[Row] = []
    bounds: list[Row] = []
    poked: list[Row] = []
    found = islice(ambiguous_scenes(shards), count)
    for number, sample, scene in tqdm(found, total=count, unit="scene", desc=split):
        ours.append(measure_ambiguity(predictor, scene, GRID, np.random.default_rng([0, number])))
        further = further_flow(split, number, sample, scene, settings)
        bounds.append(known_distribution(further, scene))
        poked += one_poke(predictor, further, scene)

    def ratio(rows: list[Row], above: str, below: str) -> float:
        return float(sum(row[above] for row in rows) / sum(row[below] for row in rows))

    two = [
        [
            split,
            len(ours),
            what,
            ratio(ours, f"{name}/best_of_two", f"{name}/mean"),
            ratio(ours, f"{name}/two_draws", f"{name}/mean"),
            ratio(bounds, f"{name}/two", f"{name}/mean"),
            ratio(ours, f"{name}/known_best_of_two", f"{name}/known_mean"),
        ]
        for name, what in WEIGHTINGS.items()
    ]
    shares = [ratio(poked, name, "none") for name in ("model", "known")]
    return two, [split, len(ours), len(poked), *shares]


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="shards of val, held_out")
    parser.add_argument("--model", default="fpt-tiny")
    parser.add_argument("--scenes", type=int, default=150, help="of each split")
    parser.add_argument("--out", type=Path, default=HERE / "ambiguity.md")
    args = parser.parse_args(argv)
    predictor = load_predictor(args.model)
    splits = [measured(args.data, split, args.scenes, predictor) for split in ("val", "held_out")]
    about = where(torch.get_num_threads()) | {
        "model": f"model `{args.model}` (sha256 `{sha256(resolve_model(args.model))[:16]}`)",
        "data": f"images of generator {GENERATOR}",
    }
    header = ["split", "scenes", "error over", "two most probable modes", "best two of its draws"]
    header += ["who knows the distribution", "who knows these futures"]
    args.out.write_text(
        "# Several futures: how far two motions, and one poke, can come\n\n"
        f"By `benchmarks/ambiguity.py`, {', '.join(about.values())}. Error of "
        "the nearer of two motions over that of the mean, without pokes. The first two columns are "
        f"the model's, the next is of one who has seen {FURTHER} other continuations of the very "
        "scene, the last of one who has seen the very futures that he is asked about.\n\n"
        + table(header, [row for two, _ in splits for row in two])
        + "\nTold the largest motion of one of the stored futures: error over that of no motion. "
        f"Who knows the distribution answers the geometric median of the {NEAREST} of {SEARCHED} "
        "other continuations that move the poked point most nearly so; with more of them he would "
        "err less.\n\n"
        + table(
            ["split", "scenes", "futures", args.model, "who knows the distribution"],
            [poked for _, poked in splits],
        )
    )
    print(args.out.read_text())


if __name__ == "__main__":
    main()
