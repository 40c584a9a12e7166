# SPDX-License-Identifier: MIT
"""Which poke reaches a goal, and which poke tells most about a scene. Needs no ROS, nor torch.

Everything is in px of the image. What predicts may be anywhere: :func:`plan` and :func:`explore`
are generators that yield what they want predicted and are sent the predictions, so that a node
waits for a service meanwhile, where a program calls its own predictor
(:func:`fpt_ros.pipeline.answer_asks`). docs/planner.md says how the scores are meant.

Where a goal is one in space, motions have a third component: in px, too, those that an equally long
motion across the optical axis has in the image. So one tolerance serves all three.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from fpt_model.depth import Depth
from fpt_model.geometry import grid, normalised_to_pixels, pixels_to_normalised
from fpt_model.mixture import FlowMixture
from fpt_model.scene_flow import displacement, displacement_covariance
from fpt_ros.pokes import Pokes, RequestError, Size, check_inside

Array = NDArray[np.float64]

DEFAULT_TOLERANCE = (0.3, 0.02)
"""Of the length of the goal's motion, or where it has none of the image's longer side."""

_DIRECTIONS = 8  # in which a part without a given motion is pushed to find out what moves along
_PUSH = 4.0  # tolerances, the length of such a push
_OFF_PART = 0.1  # how seldom positions off the part are tried, compared with those on it
_CHECKS = 128  # draws behind a plausibility
MAX_KEEP = 64  # points: all hypotheses are drawn from at each, while no other plan is made
_ENTROPY_DRAWS = 128  # behind an entropy, many of which are averaged
_NEARER = 0.03  # relative difference of depth by which one thing is in front of another
_STILL_PX = 1.0  # less in the image says nothing of the direction
_ON_THE_WAY = 8  # points of a poke's way at which something may be in front


@dataclass(frozen=True)
class Goal:
    """What a poke shall achieve, in px.

    Attributes:
        point: ``[2]``, on the part that is to move.
        motion: ``[2]``, where the point is to go from there, or ``[3]``, in space as
            :func:`motion_in_space` has it; None: wherever its part goes.
        tolerance: a point that ends this near to where it should be is there; a point that moves
            less than this stays.
        keep: ``[M, 2]``, points that must stay, at most ``MAX_KEEP``.
        keep_out: ``[N, 3]``, discs (x, y, radius) in which no poke may begin.

    Raises:
        RequestError: for values that are not finite, motion or radii not positive, more points.
    """

    point: Array
    motion: Array | None
    tolerance: float
    keep: Array = field(default_factory=lambda: np.zeros((0, 2)))
    keep_out: Array = field(default_factory=lambda: np.zeros((0, 3)))

    def __post_init__(self) -> None:
        for name in ("point", "motion", "keep"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value).all():
                raise RequestError(f"{name} must be finite, received {np.asarray(value).tolist()}")
        if len(self.keep) > MAX_KEEP:
            raise RequestError(
                f"keep must hold at most {MAX_KEEP} points, received {len(self.keep)}"
            )
        if self.motion is not None and not np.linalg.norm(self.motion) > 0:
            raise RequestError(f"motion must not be zero, received {self.motion.tolist()}")
        _check_tolerance(self.tolerance)
        _check_keep_out(self.keep_out)


@dataclass(frozen=True)
class Search:
    """How widely pokes are looked for.

    Attributes:
        kl_threshold: the model's, nats: more influence makes a point part of what moves.
        cells: (rows, columns) of the grid on which the image is asked about; pokes begin at the
            centres of its cells.
        positions: places to poke that are tried, at most.
        motions: tried at each of them.
        min_length, max_length: of a poke's motion, px.
        part_points: points that stand for the part where the goal has no motion.
        outcomes: motions of a poked point that exploration reckons with.
        seed: of everything drawn.
    """

    kl_threshold: float
    cells: tuple[int, int] = (32, 32)
    positions: int = 48
    motions: int = 6
    min_length: float = 0.0
    max_length: float = np.inf
    part_points: int = 24
    outcomes: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Ask:
    """Wanted: the motion of ``queries [Q, 2]`` under each hypothesis."""

    hypotheses: list[Pokes]
    queries: Array


@dataclass(frozen=True)
class Plan:
    """Pokes ``[B]``, best first, and what speaks for and against each ``[B]``.

    Attributes:
        score: what they are ranked by: ``success * plausibility * (1 - disturbance)``, or the
            information.
        success: probability that the goal's point ends within the tolerance of its goal; without
            a motion: expected share of the part that moves; exploring: probability that the poked
            point moves at all.
        plausibility: probability that the poked point moves like this. With a motion: that it
            moves at all when left to itself, times that it then moves so if the goal is reached.
        disturbance: expected share of the points to keep that move, farther than the tolerance
            or, if that is more, than an opening's by default.
        progress, progress_std: expected displacement of the goal's point along its motion, as a
            share of it, and its standard deviation; without a motion: in px, along where it goes;
            exploring: 0.
        information: expected to be told about the motion of the other points, nats a point.
        motion: ``[B, 3]``, expected displacement of the goal's point in space, m, optical frame;
            NaN without depth.
        motion_covariance: ``[B, 3, 3]``, its covariance, m^2, to first order.
    """

    pokes: Pokes
    score: Array
    success: Array
    plausibility: Array
    disturbance: Array
    progress: Array
    progress_std: Array
    information: Array
    motion: Array
    motion_covariance: Array

    def __len__(self) -> int:
        return len(self.pokes)

    def first(self, count: int) -> Plan:
        """The best ``count`` alone."""
        return self._at(np.arange(min(count, len(self))))

    def ranked(self) -> Plan:
        """The same by falling score."""
        return self._at(np.argsort(-self.score, kind="stable"))

    def _at(self, rows: NDArray[np.intp]) -> Plan:
        return Plan(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


Steps = Generator[Ask, Sequence[FlowMixture], Plan]
"""Yields asks, is sent a mixture ``[Q]`` for each hypothesis, px; returns the plan.

In space the mixtures have a third component, m away from the camera, NaN where no depth is known.
"""


def default_tolerance(motion: Array | None, size: Size) -> float:
    """That of a goal whose user gave none, px."""
    of_motion, of_side = DEFAULT_TOLERANCE
    return float(of_side * max(size) if motion is None else of_motion * np.linalg.norm(motion))


def motion_in_space(point: Array, motion: Array, dz: float, depth: Depth) -> Array:
    """``[3]`` px: a motion ``[2]`` in px, and ``dz`` m away from the camera, of a ``point [2]``.

    Raises:
        RequestError: no depth is known there, or the point would go behind the camera.
    """
    scale = _px_per_metre(point, depth)
    if np.isnan(scale):
        raise RequestError(
            f"a goal in space needs the depth of its point, but none is known at x={point[0]:g}, "
            f"y={point[1]:g} px"
        )
    z = float(depth.at(point[None])[0])
    if dz <= -z:
        raise RequestError(
            f"a goal in space must stay before the camera: its point is {z:.3g} m away, and dz is "
            f"{dz:g} m"
        )
    return np.append(motion, dz * scale)


def plan(goal: Goal, size: Size, search: Search, depth: Depth | None = None) -> Steps:
    """The pokes that reach a goal in an image of ``size``.

    Positions are drawn where the goal would make things move, motions from what the model expects
    there, and each poke is then asked about: does it bring the goal about?

    Args:
        depth: the image's; a goal in space needs it. With depth no poke begins where there is no
            surface, nor goes behind something that does not move along.

    Raises:
        RequestError: the goal's point or one to keep lies outside, no poke is possible or expected
            to reach the goal, or the goal is one in space and what predicts has no depth.
    """
    if goal.motion is None and search.max_length <= goal.tolerance:
        raise RequestError(
            f"to open, pokes must be longer than the tolerance of {goal.tolerance:g} px, received "
            f"{search.max_length:g} px as their greatest length"
        )
    check_inside("goal", goal.point[None], size)
    check_inside("point to keep", goal.keep, size)
    rng = np.random.default_rng(search.seed)
    cells = _Cells(size, search.cells)
    space = _Space(2 if goal.motion is None else len(goal.motion), depth)
    surface = space.surface(cells.xy)

    pushes = _pushes(goal)  # [H, D]
    here = int(cells.containing(goal.point))
    pushed = _each(space.pokes(np.tile(goal.point, (len(pushes), 1)), pushes))
    answers = yield Ask([Pokes(), *pushed], cells.xy)
    when_pushed = _stack(answers[1:])
    # [G], [H, G]; a goal in space: NaN where there is no surface
    none, given = space.motion(answers[0], cells.xy), space.motion(when_pushed, cells.xy)
    likely = np.ones(len(pushes))
    if goal.motion is None:
        likely = _alike(none[np.full(len(pushes), here)], pushes, goal.tolerance)
    likely = likely / likely.sum() if likely.sum() > 0 else np.full(len(pushes), 1 / len(pushes))
    part = likely @ (given.kl(none[None]) > search.kl_threshold) >= 0.5  # [G]
    still = np.zeros(none.dims)
    moves = likely @ (1 - given.probability_within(still, goal.tolerance, _CHECKS))
    part[here] = True

    allowed = _allowed(cells.xy, goal.keep_out) & surface
    weight = allowed * cells.smooth(np.where(surface, moves, 0) * np.where(part, 1.0, _OFF_PART))
    places = _draw(weight, search.positions, rng)
    at = np.repeat(places, search.motions)
    motions = []
    for place in places:
        drawn = rng.choice(len(pushes), search.motions, p=likely)
        motions.append(_motions(goal, none[place], given[drawn, place], rng))
    at, flow = _limit(at, np.concatenate(motions), search)
    pokes = space.pokes(cells.xy[at], flow)
    hidden = space.goes_behind(pokes, _receding(when_pushed[:, at], flow), cells, part)
    if hidden.all():
        raise RequestError(
            f"all of {len(pokes)} pokes would go behind the camera or something nearer"
        )
    at, flow, pokes = at[~hidden], flow[~hidden], pokes[~hidden]

    crowd = cells.xy[rng.permutation(np.flatnonzero(part))[: search.part_points]]
    points = crowd if goal.motion is None else np.zeros((0, 2))
    queries = np.concatenate([goal.point[None], points, goal.keep])
    answers = yield Ask(_each(pokes), queries)
    predicted = _stack(answers)  # [B, Q]

    # in the image: what must stay may have no depth
    others = predicted[:, 1:].marginal(2)
    slow = default_tolerance(None, size)
    moved = 1 - others[:, : len(points)].probability_within(np.zeros(2), goal.tolerance)
    # of a goal that is far away the tolerance is large, too
    kept = others[:, len(points) :].probability_within(np.zeros(2), min(goal.tolerance, slow))
    target = space.motion(predicted[:, 0], goal.point)
    if goal.motion is None:
        success = moved.mean(1)
        plausibility = _alike(none[at], flow, goal.tolerance)
        way = target.mean()
        way /= np.maximum(np.linalg.norm(way, axis=-1, keepdims=True), 1e-9)
        unit = 1.0
    else:
        success = target.probability_within(goal.motion, goal.tolerance)
        alike = given[0][at].probability_within(flow, goal.tolerance, _CHECKS)
        plausibility = alike * (1 - none[at].probability_within(still, slow, _CHECKS))
        unit = float(np.linalg.norm(goal.motion))
        way = np.broadcast_to(goal.motion / unit, flow.shape)
    disturbance = (1 - kept).mean(1) if len(goal.keep) else np.zeros(len(flow))
    variance = np.einsum("bi,bij,bj->b", way, target.covariance(), way)
    score = success * plausibility * (1 - disturbance)
    if not score.max() > 0:
        raise RequestError(
            f"none of {len(pokes)} pokes is expected to reach the goal: success_probability is at "
            f"most {success.max():.2g}, plausibility {plausibility.max():.2g}, disturbance at "
            f"least {disturbance.min():.2g}"
        )
    return Plan(
        pokes=pokes,
        score=score,
        success=success,
        plausibility=plausibility,
        disturbance=disturbance,
        progress=np.sum(target.mean() * way, -1) / unit,
        progress_std=np.sqrt(variance) / unit,
        information=np.zeros(len(flow)),
        **space.report(predicted[:, 0], goal.point),
    ).ranked()


def explore(size: Size, search: Search, tolerance: float, keep_out: Array | None = None) -> Steps:
    """The pokes that tell most about how the scene in an image of ``size`` can move.

    The expected reduction of entropy (Lindley, "On a measure of the information provided by an
    experiment", 1956): whoever pokes a point c learns its motion f, which the model expects to be
    distributed as p(f_c). Of a point q this tells ``H[p(f_q)] - E_f H[p(f_q | f_c = f)]``, where f
    is drawn from p(f_c). The points of a coarse grid are averaged, without those near c, and as if
    they were independent. What the model contradicts itself in can make it negative.

    It is about the motion in the image, whatever else is predicted.

    Args:
        tolerance: px, what moves less stays.
        keep_out: ``[N, 3]`` discs as in :class:`Goal`.

    Raises:
        RequestError: no poke is possible, a tolerance or a radius of ``keep_out`` that is not
            positive, a disc that is not finite.
    """
    _check_tolerance(tolerance)
    keep_out = np.zeros((0, 3)) if keep_out is None else keep_out
    _check_keep_out(keep_out)
    rng = np.random.default_rng(search.seed)
    cells = _Cells(size, search.cells)
    coarse = _Cells(size, (8, 8))
    (predicted,) = yield Ask([Pokes()], cells.xy)
    none = predicted.marginal(2)  # exploring is about the motion in the image
    moves = 1 - none.probability_within(np.zeros(none.dims), tolerance)
    allowed = _allowed(cells.xy, keep_out)
    places = _draw(allowed * cells.smooth(moves), max(1, search.positions // 2), rng)
    outcomes = none[places].sample(search.outcomes, rng)  # [S, C, D]
    at = np.tile(places, search.outcomes)
    drawn = Pokes(cells.xy[at], outcomes.reshape(len(at), -1))
    answers = yield Ask([Pokes(), *_each(drawn)], coarse.xy)
    # one by one, with the same draws: what tells nothing is then told to tell exactly that
    entropy = np.stack([m.marginal(2).entropy(_ENTROPY_DRAWS) for m in answers])  # [1 + S * C, Q]
    told = entropy[0] - entropy[1:].reshape(search.outcomes, len(places), -1).mean(0)  # [C, Q]
    apart = np.linalg.norm(coarse.xy - cells.xy[places][:, None], axis=-1)
    others = apart > max(size) / (2 * coarse.shape[1])
    information = np.sum(told * others, 1) / others.sum(1)

    flow = np.stack([_likeliest_motion(none[i], tolerance) for i in places])
    longest = np.argmax(np.linalg.norm(outcomes, axis=-1), 0)
    slow = np.linalg.norm(flow, axis=-1) <= tolerance
    flow[slow] = outcomes[longest, np.arange(len(places))][slow]
    rows, flow = _limit(np.arange(len(places)), flow, search)
    places, information = places[rows], information[rows]
    zero = np.zeros(len(places))
    return Plan(
        pokes=Pokes(cells.xy[places], flow),
        score=information,
        success=moves[places],
        plausibility=_alike(none[places], flow, tolerance),
        disturbance=zero,
        progress=zero,
        progress_std=zero,
        information=information,
        **_unknown_in_space(len(places)),
    ).ranked()


class _Cells:
    """The cells of a grid over the image: ``xy [G, 2]``, their centres in px, row by row."""

    def __init__(self, size: Size, shape: tuple[int, int]) -> None:
        self.shape, self._size = shape, size
        self.xy = normalised_to_pixels(grid(shape), size)
        rows, columns = np.divmod(np.arange(len(self.xy)), shape[1])
        step = np.array([-1, 0, 1])
        near_rows = np.clip(rows[:, None] + step, 0, shape[0] - 1)
        near_columns = np.clip(columns[:, None] + step, 0, shape[1] - 1)
        near = near_rows[:, :, None] * shape[1] + near_columns[:, None, :]
        self._around = near.reshape(len(self.xy), 9)

    def smooth(self, field: Array) -> Array:
        """A field ``[G]`` averaged over each cell and its neighbours."""
        return field[self._around].mean(1)

    def containing(self, xy: Array) -> NDArray[np.intp]:
        """The cells ``[...]`` that positions ``[..., 2]`` lie in, outside the image the nearest."""
        inside = np.nan_to_num(pixels_to_normalised(xy, self._size))
        cell = np.floor(inside * self.shape[::-1]).astype(np.intp)
        column, row = np.moveaxis(np.clip(cell, 0, np.array(self.shape[::-1]) - 1), -1, 0)
        return np.asarray(row * self.shape[1] + column)


class _Space:
    """Motions of ``dims`` components as the planning has them, and as others do.

    In the image alone (2) they are the same; in space the third is in px here, in m elsewhere.
    """

    def __init__(self, dims: int, depth: Depth | None) -> None:
        self._dims, self._depth = dims, depth

    def surface(self, xy: Array) -> NDArray[np.bool_]:
        """Whether there is something to poke at ``xy [N, 2]``, as far as depth tells."""
        return np.ones(len(xy), bool) if self._depth is None else np.isfinite(self._depth.at(xy))

    def motion(self, mixture: FlowMixture, xy: Array) -> FlowMixture:
        """A prediction ``[..., N]`` for ``xy [N, 2]``, or one point, as the planning has it."""
        if self._dims == 2:
            return mixture.marginal(2)
        if mixture.dims == 2 or self._depth is None:
            raise RequestError("a goal in space needs predictions in space, received planar ones")
        return mixture.scaled_last(np.broadcast_to(_px_per_metre(xy, self._depth), mixture.shape))

    def pokes(self, xy: Array, flow: Array) -> Pokes:
        """Pokes with motions of the planning's."""
        if self._dims == 2 or self._depth is None:
            return Pokes(xy, flow)
        return Pokes(xy, flow[:, :2], flow[:, 2] / _px_per_metre(xy, self._depth))

    def goes_behind(
        self, pokes: Pokes, receding: Array, cells: _Cells, part: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Which pokes ``[N]`` lead their point behind the camera, or what is seen in front of it.

        The cells of ``part [G]`` move along. A poke whose motion in depth is unknown goes
        ``receding [N]`` m away: what is drawn toward the camera on a table goes down in the image,
        and would else be taken to go below the table's top. Nothing is in front of NaN.
        """
        if self._depth is None:
            return np.zeros(len(pokes), bool)
        camera, z = self._depth.intrinsics, self._depth.at(pokes.xy)
        start = camera.unproject(pokes.xy, z)
        dz = np.where(np.isnan(pokes.dz), receding, pokes.dz)
        end = camera.unproject(pokes.xy + pokes.flow, z + dz)
        hidden = pokes.pass_camera(z)
        for share in np.arange(1, _ON_THE_WAY + 1) / _ON_THE_WAY:
            point = start + share * (end - start)
            at = camera.project(point)  # NaN behind the camera
            in_front = self._depth.at(at) < (1 - _NEARER) * point[:, 2]
            hidden |= in_front & ~part[cells.containing(at)]
        return hidden

    def report(self, mixture: FlowMixture, point: Array) -> dict[str, Array]:
        """``motion [B, 3]`` and ``motion_covariance`` in m of predictions ``[B]`` for a point."""
        if self._depth is None or mixture.dims == 2:
            return _unknown_in_space(len(mixture))
        z, camera = self._depth.at(point), self._depth.intrinsics
        relative = mixture.scaled_last(np.full(len(mixture), 1 / z))
        mean, covariance = relative.mean(), relative.covariance()
        return {
            "motion": displacement(point, z, mean, camera),
            "motion_covariance": displacement_covariance(point, z, mean, covariance, camera),
        }


def _unknown_in_space(pokes: int) -> dict[str, Array]:
    """What :meth:`_Space.report` gives for so many where nothing is known."""
    return {
        "motion": np.full((pokes, 3), np.nan),
        "motion_covariance": np.full((pokes, 3, 3), np.nan),
    }


def _px_per_metre(xy: Array, depth: Depth) -> Array:
    """``[...]``: how many px a motion of 1 m at ``xy [..., 2]`` has across the optical axis."""
    return np.asarray(depth.intrinsics.focal.mean() / depth.at(xy))


def _check_tolerance(tolerance: float) -> None:
    if not (np.isfinite(tolerance) and tolerance > 0):
        raise RequestError(f"tolerance must be > 0 px, received {tolerance:g}")


def _stack(mixtures: Sequence[FlowMixture]) -> FlowMixture:
    return FlowMixture(
        np.stack([m.log_weights for m in mixtures]),
        np.stack([m.means for m in mixtures]),
        np.stack([m.scale_tril for m in mixtures]),
    )


def _receding(given: FlowMixture, flow: Array) -> Array:
    """``[N]``: how far away things are expected to go that move by ``flow [N, >= 2]`` in the image.

    As in that of the predictions ``given [H, N]`` which is most alike there, in proportion; m. 0 of
    planar predictions, NaN where no depth is known.
    """
    if given.dims == 2:
        return np.zeros(len(flow))
    mean = given.mean()
    alike = np.argmin(np.linalg.norm(mean[..., :2] - flow[:, :2], axis=-1), 0)
    mean = mean[alike, np.arange(len(flow))]
    length = np.linalg.norm(mean[:, :2], axis=-1)
    share = np.linalg.norm(flow[:, :2], axis=-1) / np.maximum(length, 1e-9)
    return mean[:, 2] * np.where(length > _STILL_PX, share, 1.0)


def _each(pokes: Pokes) -> list[Pokes]:
    """Pokes as hypotheses of one poke each."""
    return [pokes[i : i + 1] for i in range(len(pokes))]


def _pushes(goal: Goal) -> Array:
    """Motions ``[H, D]`` of the goal's own point that show what moves along with it."""
    if goal.motion is not None:
        return goal.motion[None]
    angles = np.arange(_DIRECTIONS) * 2 * np.pi / _DIRECTIONS
    return _PUSH * goal.tolerance * np.stack([np.cos(angles), np.sin(angles)], -1)


def _alike(mixture: FlowMixture, flow: Array, tolerance: float) -> Array:
    """Probability of moving about like ``flow``, within half its length; 0 if that is to stay."""
    length = np.linalg.norm(flow, axis=-1)
    alike = mixture.probability_within(flow, length / 2, _CHECKS)
    return np.where(length > tolerance, alike, 0.0)


def _check_keep_out(discs: Array) -> None:
    if not np.isfinite(discs).all():
        raise RequestError(f"keep_out must be finite, received {discs.tolist()}")
    if (discs[:, 2] <= 0).any():
        raise RequestError(f"radii of keep_out must be > 0 px, received {discs[:, 2].tolist()}")


def _allowed(xy: Array, keep_out: Array) -> NDArray[np.bool_]:
    distance = np.linalg.norm(xy[:, None] - keep_out[:, :2], axis=-1)
    allowed = (distance > keep_out[:, 2]).all(1)
    if not allowed.any():
        raise RequestError("keep_out leaves no place to poke")
    return np.asarray(allowed)


def _draw(weight: Array, count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """At most ``count`` different cells, those of greater weight more likely."""
    possible = int(np.count_nonzero(weight))
    if not possible:
        raise RequestError("expected a place to poke that could move, found none")
    return rng.choice(len(weight), min(count, possible), replace=False, p=weight / weight.sum())


def _motions(goal: Goal, none: FlowMixture, given: FlowMixture, rng: np.random.Generator) -> Array:
    """Motions ``[N, D]`` for one place; ``given [N]``: its motion when the goal's point is pushed.

    The goal's own and what is expected here, the rest drawn, of varied length.
    """
    drawn = given.sample(1, rng)[0]
    drawn *= np.exp(rng.uniform(-0.5, 0.5, (len(drawn), 1)))
    if goal.motion is None:
        first = np.stack([_likeliest_motion(none, goal.tolerance), given.mean()[0]])
        if len(drawn) > 2:
            drawn[2::2] = none.sample(len(drawn[2::2]), rng)
    else:
        expected = given[0]
        first = np.stack([goal.motion, expected.mean(), expected.mode(), expected.median()])
    drawn[: len(first)] = first[: len(drawn)]
    return drawn


def _likeliest_motion(none: FlowMixture, tolerance: float) -> Array:
    """``[D]``: mean of the most probable component that moves, or if none does of the fastest."""
    modes = none.modes()
    length = np.linalg.norm(modes.means, axis=-1)
    moving = np.flatnonzero(length > tolerance)
    return np.asarray(modes.means[moving[0] if len(moving) else np.argmax(length)])


def _limit(at: NDArray[np.intp], flow: Array, search: Search) -> tuple[NDArray[np.intp], Array]:
    """Cells ``[N]`` and motions ``[N, D]`` within the lengths allowed, without those of none."""
    length = np.linalg.norm(flow, axis=-1)
    real = length > 0
    if not real.any():
        raise RequestError("expected a place to poke that could move, found none")
    scale = np.clip(length[real], search.min_length, search.max_length) / length[real]
    return at[real], flow[real] * scale[:, None]
