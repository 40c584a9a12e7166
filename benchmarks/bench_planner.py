# SPDX-License-Identifier: MIT
"""The planner acts in simulation: do the pokes that it chooses do what was asked for?

    python benchmarks/bench_planner.py --scenes 50 --out planner.json

In each scene a goal is drawn from what the world can do: a point of a part, and where one of the
part's true futures takes it. No poke may begin within ``KEEP_OUT`` of that point, since poking it
there by the goal's own motion would need no planner. A hand then takes the poked point along in
MuJoCo (`sim.Simulator.future_of_poke`), and the goal's point has reached its goal if it ends within
``TOLERANCE`` of the goal's length. Ways to choose the poke, all under the same rules:

* planner: :func:`fpt_ros.planning.plan`, which sees the picture alone;
* centre: the visible pixel nearest to the middle of the part, by the goal's motion;
* random: a pixel of the part, any direction, a length as the planner may choose it (log-uniform);
  the share of ``DRAWS`` draws that reach the goal.

Centre and random are given the true part. *Opening* has no motion as its goal: of pokes of one
length, does the goal's point move at least half of it? *Exploring*: does the chosen poke begin on
something that can move? Random there is any pixel.

All worlds are of seeds that no model is trained on; of the kinds, lid, lever and turntable are held
out of training altogether. Worlds where bodies lie loose are left out: where a hand takes them is
not told by a motion in the picture. Intervals are 95 %, bootstrapped over scenes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from report import where

from fpt_model import FlowPredictor, load_model
from fpt_model.allocator import keep_freed_memory
from fpt_ros.pipeline import Settings, View, answer_asks
from fpt_ros.planning import Goal, Plan, Search, Steps, default_tolerance, explore, plan
from fpt_ros.pokes import RequestError
from sim import HELD_OUT_KINDS, TRAIN_KINDS, Simulator
from sim.dataset import SEED_STRIDE, SPLITS
from sim.flow import point_flow
from training.evaluation.figures import bootstrap_interval

SIDE = 160  # px, of the pictures
KEEP_OUT = 0.1  # sides, radius about the goal's point in which no poke may begin
SHORTEST_GOAL = 0.05  # sides
TOLERANCE = 0.5  # of the goal's length: nearer to its goal than this the point has reached it
STRICT = 0.3  # the same, for a second figure
LENGTHS = (0.25, 2.0)  # of the goal's length: least and most of a poke's
OPENING = 0.1  # sides, length of all pokes that open
MIN_PART = 100  # px, visible and outside of the keep-out
DRAWS = 8  # random pokes a scene
TRIES = 20  # futures drawn before a world is given up
KINDS = (*(kind for kind in TRAIN_KINDS if kind != "body"), *HELD_OUT_KINDS)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """A world and a goal in it, px."""

    kind: str
    seed: int
    world: Simulator
    point: Array  # [2], a whole pixel
    motion: Array  # [2], of one true future
    part: NDArray[np.intp]  # [N, 2] visible pixels of what moves with it, outside of the keep-out

    @property
    def length(self) -> float:
        """Of the goal, px."""
        return float(np.linalg.norm(self.motion))

    @property
    def keep_out(self) -> Array:
        """The disc about the point."""
        return np.array([[*self.point, KEEP_OUT * SIDE]])

    @property
    def centre(self) -> NDArray[np.intp]:
        """Of the part."""
        return self.part[np.argmin(np.sum(np.square(self.part - self.part.mean(0)), -1))]

    def act(self, xy: Array, motion: Array) -> Array:
        """How the goal's point really moves ``[2]`` when a hand takes ``xy`` along, px."""
        future = self.world.future_of_poke(tuple(xy), tuple(motion))
        frame, (u, v) = self.world.render(), self.point.astype(int)
        moved = point_flow(
            np.array([[u, v]]),
            frame.depth[[v], [u]],
            frame.bodies[[v], [u]],
            frame.intrinsics,
            (SIDE, SIDE),
            frame.camera_pose,
            future.body_motion,
        )
        return SIDE * moved.flow[0].astype(float)


@dataclass(frozen=True)
class Row:
    """What came of one scene. Errors are shares of the goal's length."""

    kind: str
    seed: int
    length: float  # of the goal, px
    planner: float  # error
    expected: float  # probability of success that the planner gave
    progress: float  # that the planner expected, as a share of the goal
    progressed: float  # that came of it
    centre: float  # error
    random: list[float]  # errors
    opened: float  # motion of the goal's point as a share of the poke's length
    opened_centre: list[float]
    opened_random: list[float]
    explored: bool  # the poke begins on something that can move
    movable: float  # share of the picture that can move
    seconds: float  # for the plan to the goal


def tasks(count: int, first: int) -> Iterator[Task]:
    """``count`` tasks, the kinds in turn; worlds in which nothing suits are left out."""
    found, number = 0, first
    while found < count:
        kind = KINDS[found % len(KINDS)]
        seed = number * SEED_STRIDE + list(SPLITS).index("val")
        number += 1
        world = Simulator(kind, seed, (SIDE, SIDE))
        if world.has_free_bodies:
            continue
        task = draw_task(kind, seed, world, np.random.default_rng([seed, 1]))
        if task is not None:
            found += 1
            yield task


def draw_task(kind: str, seed: int, world: Simulator, rng: np.random.Generator) -> Task | None:
    """A goal that the world can reach, and that can be seen to be reached."""
    frame = world.render()
    for _ in range(TRIES):
        future = world.sample_future(rng)
        if future.causes != 1:
            continue
        truth = world.truth(frame, future)
        flow = SIDE * truth.flow.astype(float)
        far = np.linalg.norm(flow, axis=-1) >= SHORTEST_GOAL * SIDE
        suitable = np.argwhere(truth.moving & ~truth.occluded & far)
        if not len(suitable):
            continue
        v, u = suitable[rng.integers(len(suitable))]
        part = np.argwhere(truth.moving)[:, ::-1]
        part = part[np.linalg.norm(part - (u, v), axis=-1) > KEEP_OUT * SIDE]
        if len(part) >= MIN_PART:
            return Task(kind, seed, world, np.array([u, v], float), flow[v, u], part)
    return None


def random_motion(rng: np.random.Generator, shortest: float, longest: float) -> Array:
    """Any direction, a length that is log-uniform."""
    angle = rng.uniform(-np.pi, np.pi)
    length = np.exp(rng.uniform(np.log(shortest), np.log(longest)))
    return np.array([np.cos(angle), np.sin(angle)]) * length


def act_out(task: Task, predictor: FlowPredictor) -> Row:
    """Choose pokes in all ways, and act."""
    frame = task.world.render()
    view = View(frame.rgb, predictor.encode(frame.rgb))
    threshold = predictor.config.kl_threshold
    rng = np.random.default_rng([task.seed, 2])

    def choose(steps: Steps) -> Plan | None:
        """The best poke; None, which moves nothing, where none is expected to reach the goal."""
        try:
            return answer_asks(predictor, view, steps, Settings()).first(1)
        except RequestError:
            return None

    def error(xy: Array, motion: Array) -> float:
        return float(np.linalg.norm(task.act(xy, motion) - task.motion) / task.length)

    def opened(xy: Array, motion: Array) -> float:
        return float(np.linalg.norm(task.act(xy, motion)) / np.linalg.norm(motion))

    def anywhere(act: Callable[[Array, Array], float], lengths: tuple[float, float]) -> list[float]:
        places = task.part[rng.integers(len(task.part), size=DRAWS)]
        return [act(xy, random_motion(rng, *lengths)) for xy in places]

    shortest, longest = (share * task.length for share in LENGTHS)
    search = Search(threshold, min_length=shortest, max_length=longest)
    goal = Goal(task.point, task.motion, TOLERANCE * task.length, keep_out=task.keep_out)
    start = time.perf_counter()
    moving = choose(plan(goal, (SIDE, SIDE), search))
    seconds = time.perf_counter() - start
    moved = task.act(moving.pokes.xy[0], moving.pokes.flow[0]) if moving else np.zeros(2)

    length = OPENING * SIDE
    search = Search(threshold, min_length=length, max_length=length)
    tolerance = default_tolerance(None, (SIDE, SIDE))
    goal = Goal(task.point, None, tolerance, keep_out=task.keep_out)
    opening = choose(plan(goal, (SIDE, SIDE), search))
    exploring = choose(explore((SIDE, SIDE), search, tolerance))
    assert exploring is not None, "whatever is poked tells something"
    u, v = np.rint(exploring.pokes.xy[0]).astype(int)

    return Row(
        kind=task.kind,
        seed=task.seed,
        length=task.length,
        planner=float(np.linalg.norm(moved - task.motion) / task.length),
        expected=float(moving.success[0]) if moving else 0.0,
        progress=float(moving.progress[0]) if moving else 0.0,
        progressed=float(moved @ task.motion / task.length**2),
        centre=error(task.centre, task.motion),
        random=anywhere(error, (shortest, longest)),
        opened=opened(opening.pokes.xy[0], opening.pokes.flow[0]) if opening else 0.0,
        opened_centre=[
            opened(task.centre, random_motion(rng, length, length)) for _ in range(DRAWS)
        ],
        opened_random=anywhere(opened, (length, length)),
        explored=bool(frame.bodies[v, u] > 0),
        movable=float((frame.bodies > 0).mean()),
        seconds=seconds,
    )


def tables(rows: list[Row]) -> str:
    """Markdown tables."""
    scenes = np.array([f"{row.kind}:{row.seed}" for row in rows])

    def shares(test: Callable[[Row], object]) -> Array:
        return np.array([np.mean(test(row)) for row in rows])

    def cell(value: Array, reference: Array | None = None, unit: str = " %") -> str:
        scale = 1 if reference is not None else 100
        mean = value.mean() if reference is None else value.mean() / max(reference.mean(), 1e-9)
        if reference is not None and not reference.any():
            return "-"
        low, high = bootstrap_interval(scenes, value, reference)
        form = "{:.1f}" if reference is not None else "{:.0f}"
        unit = "" if reference is not None else unit
        numbers = [form.format(scale * x) for x in (mean, low, high)]
        return f"{numbers[0]}{unit} ({numbers[1]} to {numbers[2]})"

    def table(title: str, ways: dict[str, Array]) -> list[str]:
        planner = ways["planner"]
        lines = [f"| {title} | reached | planner reaches, times as often | planner more often |"]
        lines.append("|---|---|---|---|")
        for name, reached in ways.items():
            other = name != "planner"
            ratio = cell(planner, reached) if other else ""
            more = cell(planner - reached, unit=" points") if other else ""
            lines.append(f"| {name} | {cell(reached)} | {ratio} | {more} |")
        return [*lines, ""]

    lines = []
    for tolerance in (TOLERANCE, STRICT):
        errors = {
            "planner": [row.planner for row in rows],
            "centre": [row.centre for row in rows],
            "random": [row.random for row in rows],
        }
        ways = {
            name: np.array([np.mean(np.array(error) <= tolerance) for error in of_scenes])
            for name, of_scenes in errors.items()
        }
        lines += table(f"move: within {tolerance:.0%} of the goal's length", ways)
    ways = {
        "planner": shares(lambda row: row.opened >= 0.5),
        "centre, random direction": shares(lambda row: np.array(row.opened_centre) >= 0.5),
        "random": shares(lambda row: np.array(row.opened_random) >= 0.5),
    }
    lines += table("open: the point moves half of the poke's length", ways)
    ways = {"planner": shares(lambda row: row.explored), "random": shares(lambda row: row.movable)}
    lines += table("explore: begins on something that can move", ways)

    lines += ["| kind | scenes | planner | centre | random |", "|---|---|---|---|---|"]
    for kind in dict.fromkeys(row.kind for row in rows):
        own = [row for row in rows if row.kind == kind]
        planner = np.mean([row.planner <= TOLERANCE for row in own])
        centre = np.mean([row.centre <= TOLERANCE for row in own])
        chance = np.mean([np.array(row.random) <= TOLERANCE for row in own])
        lines.append(f"| {kind} | {len(own)} | {planner:.0%} | {centre:.0%} | {chance:.0%} |")
    expected = np.array([row.expected for row in rows])
    progress = np.array([(row.progress, row.progressed) for row in rows])
    off = np.abs(progress[:, 0] - progress[:, 1])
    reached = np.mean([row.planner <= TOLERANCE for row in rows])
    lines += [
        "",
        "Predicted and true, of the planner's pokes: probability of success "
        f"{expected.mean():.0%}, reached {reached:.0%}; progress "
        f"{progress[:, 0].mean():.2f} and {progress[:, 1].mean():.2f} of the goal, "
        f"{np.median(off):.2f} apart (median). A plan took "
        f"{np.median([row.seconds for row in rows]):.2f} s (median).",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--first", type=int, default=2_000_000, help="number of the first world")
    parser.add_argument("--model", default="fpt-tiny", help="a shipped name or a file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one scene, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    run = where(
        args.threads,
        model=args.model,
        first=str(args.first),
        torch=torch.__version__,
    )
    predictor = FlowPredictor(load_model(args.model))
    rows = []
    for task in tasks(1 if args.quick else args.scenes, args.first):
        rows.append(act_out(task, predictor))
        outcome = f"error {rows[-1].planner:.2f}, centre {rows[-1].centre:.2f}"
        print(f"{task.kind}:{task.seed} {outcome}", flush=True)
    print("\n" + ", ".join(f"{k} {v}" for k, v in run.items()) + f", {len(rows)} scenes\n")
    print(tables(rows))
    if args.out:
        content = run | {"rows": [asdict(row) for row in rows]}
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
