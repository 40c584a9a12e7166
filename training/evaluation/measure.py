# SPDX-License-Identifier: MIT
"""All that is measured on one scene: a row of numbers and short arrays, of which `figures` makes
means. Rows are small, so any number of scenes fits in memory.

Errors are end-point errors in cells of the suite's grid. "all" is the mean over all points of a
scene, "moving" over those that truly move.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpt_model import FlowMixture, FlowPredictor
from fpt_model.geometry import displacement_pixels_to_normalised, normalised_to_pixels
from fpt_model.mixture import Reduce
from fpt_model.predictor import Scene as EncodedScene
from training.evaluation.scenes import (
    MIN_VISIBLE_FLOW,
    AmbiguousScene,
    CameraScene,
    FloatArray,
    Mask,
    Scene,
)
from training.evaluation.suite import Suite

Row = dict[str, Any]
Index = NDArray[np.intp] | Mask | slice  # of a scene's points
Where = dict[str, Index]  # by part of a scene, see the module's text

REDUCTIONS: tuple[Reduce, ...] = ("mean", "median", "mode")  # how mixtures become flow
PLACES = ("largest", "random")  # where a scene is poked
# image sides, candidates of the disc baselines: 0 copies nothing, the last one to every corner
RADII = np.linspace(0, 1.42, 72)
LEVELS = 20  # bins of the reliability curve
OCTAVE = 6  # candidate thresholds in a factor of two

_EVERYWHERE = slice(None)
_ON_CURVE = (1024, 256)  # points of a scene for the curve by pokes: of all, of those that move
_CALIBRATED = 512  # points of a scene whose probability mass is estimated,
_DRAWS = 64  # by so many draws each


def _candidates(low: float, high: float) -> FloatArray:
    """Geometric, with a further octave at both ends for half and double the best one."""
    steps = int(np.ceil(OCTAVE * np.log2(high / low)))
    return low * 2.0 ** (np.arange(-OCTAVE, steps + OCTAVE + 1) / OCTAVE)


THRESHOLDS = {
    "kl_matched": _candidates(0.01, 100),  # nats, the predictor's influence
    "kl_variational": _candidates(0.01, 100),  # nats, see variational_kl
    "median_flow": _candidates(0.0001, 0.3),  # image sides, length of the flow that is published,
    "mean_flow": _candidates(0.001, 0.3),  # and of the mixture's mean
}


# ------------------------------------------------------------------------------------- parts


def end_point_error(flow: FloatArray, true: FloatArray, grid: int) -> FloatArray:
    """``[...]``: distances of normalised ``[..., 2]`` in cells of a ``grid x grid``."""
    return np.linalg.norm(flow - true, axis=-1) * grid


def intersection_over_union(predicted: Mask, true: Mask) -> FloatArray:
    """``[...]``: IoU of two masks ``[..., C]``."""
    return (predicted & true).sum(-1) / np.maximum(1, (predicted | true).sum(-1))


def variational_kl(p: FlowMixture, q: FlowMixture) -> FloatArray:
    """``[...]``: the variational approximation of ``D(p || q)`` in nats.

    Hershey & Olsen, "Approximating the Kullback Leibler divergence between Gaussian mixture
    models" (ICASSP 2007). Unlike the matched one it is zero for equal mixtures, also where their
    components overlap.
    """

    def log_overlap(other: FlowMixture) -> FloatArray:
        return np.logaddexp.reduce(other.log_weights[..., None, :] - p.component_kl(other), -1)

    return np.sum(p.weights * (log_overlap(p) - log_overlap(q)), -1)


def rigid_fit(start: FloatArray, end: FloatArray, points: FloatArray) -> FloatArray:
    """Where ``points [C, 2]`` go under the least-squares rigid motion of the plane that takes
    ``start [P, 2]`` to ``end [P, 2]`` (Umeyama 1991, without scale); a shift if P is 1."""
    a, b = start - start.mean(0), end - end.mean(0)
    u, _, vt = np.linalg.svd(a.T @ b)
    turn = u @ np.diag([1, np.linalg.det(u @ vt)]) @ vt
    return (points - start.mean(0)) @ turn + end.mean(0)


def probability_mass(mixture: FlowMixture, motion: FloatArray, rng: np.random.Generator) -> Any:
    """``[...]`` in (0, 1): the mass of the smallest region around the modes that holds ``motion``.

    That is the probability that a draw is denser than ``motion [..., D]``; uniform for motions that
    are drawn from the mixture themselves.
    """
    denser = mixture.log_prob(mixture.sample(_DRAWS, rng)) > mixture.log_prob(motion)
    rank = denser.sum(0)
    # anywhere between two draws: halfway would leave steps that do not fall on the bins' edges
    return (rank + rng.random(rank.shape)) / (_DRAWS + 1)


def _moments(x: FloatArray, y: FloatArray) -> FloatArray:
    """Sums from which the correlation over many scenes is found."""
    return np.array([len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])


def _means(values: FloatArray, where: Where) -> dict[str, FloatArray]:
    """Over parts of the last axis, of ``[..., C]``; NaN where a part is empty."""
    parts = {name: values[..., index] for name, index in where.items()}
    return {
        name: part.mean(-1) if part.shape[-1] else np.full(part.shape[:-1], np.nan)
        for name, part in parts.items()
    }


def _parts(scene: Scene) -> Where:
    return {"all": _EVERYWHERE, "moving": scene.moving}


# -------------------------------------------------------------------------------- one scene


def _baselines(
    scene: Scene, pokes: NDArray[np.intp], asked: Index, grid: int
) -> dict[str, FloatArray]:
    """Errors ``[C]`` of no motion, ``[R, C]`` of copying the nearest poke and of moving with the
    pokes rigidly, both within each of ``RADII`` of a poke.

    The rigid motion is fitted, in px, to the pokes that move, and taken where the nearest one does.
    """
    points, flow = scene.points[asked], scene.flow[asked]
    poke_pos, poke_flow = scene.points[pokes], scene.flow[pokes]
    still = end_point_error(np.zeros_like(flow), flow, grid)
    distances = np.linalg.norm(points[:, None] - poke_pos, axis=-1)  # [C, P]
    nearest = distances.argmin(1)
    within = distances.min(1) < RADII[:, None]
    copied = end_point_error(poke_flow[nearest], flow, grid)

    size = (scene.image.shape[0], scene.image.shape[1])
    moves = np.linalg.norm(poke_flow, axis=-1) >= MIN_VISIBLE_FLOW
    start, end, at = (
        normalised_to_pixels(x, size)
        for x in (poke_pos[moves], (poke_pos + poke_flow)[moves], points)
    )
    moved = rigid_fit(start, end, at) if moves.any() else at
    rigid = end_point_error(displacement_pixels_to_normalised(moved - at, size), flow, grid)
    return {
        "no_motion": still,
        "copy": np.where(within, copied, still),
        "rigid": np.where(within & moves[nearest], rigid, still),
    }


def _reduced(mixture: FlowMixture) -> dict[str, FloatArray]:
    """By method, the mixture's one motion ``[..., 2]`` in the image."""
    return {how: mixture.marginal(2).reduce(how) for how in REDUCTIONS}


def _errors(
    flows: dict[str, FloatArray],
    scene: Scene,
    pokes: NDArray[np.intp],
    grid: int,
    asked: Index = _EVERYWHERE,
) -> dict[str, FloatArray]:
    """By method, of the model's ``flows [C, 2]`` and of the baselines: ``[C]`` or ``[R, C]``."""
    true = scene.flow[asked]
    own = {name: end_point_error(flow, true, grid) for name, flow in flows.items()}
    return own | _baselines(scene, pokes, asked, grid)


def _put_errors(row: Row, prefix: str, errors: dict[str, FloatArray], where: Where) -> None:
    for name, error in errors.items():
        for part, value in _means(error, where).items():
            row[f"{prefix}epe/{part}/{name}"] = value
        for part, value in _means((error < 1).astype(np.float32), where).items():
            row[f"{prefix}pck/{part}/{name}"] = value


def _put_masks(
    row: Row,
    prefix: str,
    mixture: FlowMixture,
    flows: dict[str, FloatArray],
    unconditional: FlowMixture,
    scene: Scene,
    poke: int,
) -> dict[str, FloatArray]:
    """Returns the scores ``[C]``."""
    scores = {  # of all the motion that the model knows, also in depth
        "kl_matched": mixture.kl(unconditional),
        "kl_variational": variational_kl(mixture, unconditional),
        "median_flow": np.linalg.norm(flows["median"], axis=-1),
        "mean_flow": np.linalg.norm(flows["mean"], axis=-1),
    }
    for name, score in scores.items():
        row[f"{prefix}iou/{name}"] = intersection_over_union(
            score > THRESHOLDS[name][:, None], scene.moving
        )
    distance = np.linalg.norm(scene.points - scene.points[poke], axis=-1)
    row[f"{prefix}iou/disc"] = intersection_over_union(distance < RADII[:, None], scene.moving)
    return scores


def _put_calibration(
    row: Row,
    prefix: str,
    mixture: FlowMixture,
    errors: dict[str, FloatArray],
    scene: Scene,
    suite: Suite,
    rng: np.random.Generator,
) -> None:
    """Likelihood, correlation of error and standard deviation, reliability."""
    std = np.sqrt(np.trace(mixture.covariance(), axis1=-2, axis2=-1)) * suite.grid
    drawn = end_point_error(mixture.sample(1, rng)[0], scene.flow, suite.grid)
    row[f"{prefix}moments/sample"] = _moments(drawn, std)
    for how in REDUCTIONS:
        row[f"{prefix}moments/{how}"] = _moments(errors[how], std)
    tracked = scene.flow + rng.normal(0, suite.tracking_noise, scene.flow.shape)
    for truth, flow in {"exact": scene.flow, "tracked": tracked}.items():
        for part, value in _means(-mixture.log_prob(flow), _parts(scene)).items():
            row[f"{prefix}nll/{part}/{truth}"] = value
        for part, index in _parts(scene).items():
            some = rng.choice(np.arange(len(flow))[index], _CALIBRATED)
            mass = probability_mass(mixture[some], flow[some], rng)
            counts, _ = np.histogram(mass, LEVELS, (0, 1))
            row[f"{prefix}mass/{part}/{truth}"] = counts / len(some)


def _put_modes(row: Row, prefix: str, mixture: FlowMixture, scene: Scene, grid: int) -> None:
    """How sure, how near and how different the modes are.

    confidence: the probability of the mode that comes nearest the truth; closeness: its error;
    diversity: the expected distance of two modes drawn at random; first: how often the most
    probable mode is the nearest.
    """
    modes = mixture.modes()
    error = end_point_error(modes.means, scene.flow[:, None], grid)  # [C, K]
    nearest = error.argmin(-1)
    apart = end_point_error(modes.means[:, :, None], modes.means[:, None], grid)
    values = {
        "confidence": np.take_along_axis(modes.weights, nearest[:, None], -1)[:, 0],
        "closeness": error.min(-1),
        "best_of_two": error[:, :2].min(-1),
        "diversity": np.einsum("ci,cj,cij->c", modes.weights, modes.weights, apart),
        "first": (nearest == 0).astype(np.float32),
    }
    for name, value in values.items():
        for part, mean in _means(value, _parts(scene)).items():
            row[f"{prefix}modes/{part}/{name}"] = mean


def measure(
    predictor: FlowPredictor,
    scene: Scene,
    suite: Suite,
    rng: np.random.Generator,
    thresholds_only: bool = False,
) -> tuple[Row, dict[str, FloatArray]]:
    """The row of a scene; and for pictures, when poked at its largest motion, flow and scores.

    ``thresholds_only`` leaves out what thresholds are not chosen by.
    """
    encoded = predictor.encode(scene.image)
    unconditional = _predict(predictor, encoded, scene, scene.pokes[:0])
    row: Row = {}

    def put_place(
        place: str, poke: int, mixture: FlowMixture
    ) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
        """The flows and the masks' scores."""
        prefix = f"{place}/"
        flows = _reduced(mixture)
        if not thresholds_only:
            planar = mixture.marginal(2)
            errors = _errors(flows, scene, np.array([poke]), suite.grid)
            _put_errors(row, prefix, errors, _parts(scene))
            _put_calibration(row, prefix, planar, errors, scene, suite, rng)
            _put_modes(row, prefix, planar, scene, suite.grid)
            row[f"{prefix}poke_length"] = np.linalg.norm(scene.flow[poke])
        return flows, _put_masks(row, prefix, mixture, flows, unconditional, scene, poke)

    mixture = _predict(predictor, encoded, scene, scene.pokes[:1])
    flows, scores = put_place("largest", int(scene.pokes[0]), mixture)
    if not thresholds_only:
        _put_curve(row, predictor, encoded, scene, mixture, suite, rng)
    mixture = _predict(predictor, encoded, scene, np.array([scene.drawn]))
    put_place("random", scene.drawn, mixture)
    return row, flows | scores


def _put_curve(
    row: Row,
    predictor: FlowPredictor,
    encoded: EncodedScene,
    scene: Scene,
    one_poke: FlowMixture,
    suite: Suite,
    rng: np.random.Generator,
) -> None:
    """By the number of pokes, at some of the points that none of them pokes: errors and likelihood.

    The predictor keeps the pokes that it has run already, each count only adds some.
    """
    told = scene.pokes[: suite.pokes[-1]]
    some = rng.permutation(np.setdiff1d(np.arange(len(scene.points)), told))[: _ON_CURVE[0]]
    movers = rng.permutation(np.setdiff1d(np.flatnonzero(scene.moving), told))[: _ON_CURVE[1]]
    asked = np.concatenate([some, movers])
    where: Where = {"all": slice(len(some)), "moving": slice(len(some), None)}
    for count in suite.pokes:
        pokes = scene.pokes[:count]
        if count == 1:
            mixture = one_poke[asked]
        else:
            mixture = _predict(predictor, encoded, scene, pokes, asked)
        errors = _errors(_reduced(mixture), scene, pokes, suite.grid, asked)
        _put_errors(row, f"curve/{count}/", errors, where)
        likelihood = mixture.marginal(2).log_prob(scene.flow[asked])
        row[f"curve/{count}/nll"] = -likelihood[where["all"]].mean()


def _predict(
    predictor: FlowPredictor,
    encoded: EncodedScene,
    scene: Scene,
    pokes: NDArray[np.intp],
    asked: Index = _EVERYWHERE,
) -> FlowMixture:
    """The motion of points given that of some of them in the image."""
    return predictor.predict(
        encoded, scene.points[pokes], scene.flow[pokes], scene.points[asked], scene.camera_static
    )


def measure_camera(
    predictor: FlowPredictor, scene: CameraScene, grid: int, rng: np.random.Generator
) -> Row:
    """What the flag ``camera_static`` changes for what lies still in the world.

    Without pokes, for each flag: likelihood of the motion under the moving and the standing camera,
    and the expected speed in cells. With one poke on it, under the moving camera: error.
    """
    encoded = predictor.encode(scene.image)
    nothing = np.empty((0, 2))
    known = {
        name: np.isfinite(flow).all(-1)
        for name, flow in (("moving", scene.moving_flow), ("standing", scene.static_flow))
    }
    poke = rng.choice(np.flatnonzero(known["moving"]), 1)
    row: Row = {}
    for flag in (False, True):
        prefix = f"flag_{int(flag)}/"
        free = predictor.predict(encoded, nothing, nothing, scene.points, flag).marginal(2)
        speed = np.linalg.norm(free.sample(_DRAWS, rng), axis=-1).mean(0) * grid
        row[f"{prefix}speed"] = speed[known["moving"]].mean()
        for name, flow in (("moving", scene.moving_flow), ("standing", scene.static_flow)):
            where = known[name]
            row[f"{prefix}nll/{name}_camera"] = -free[where].log_prob(flow[where]).mean()
        poked = predictor.predict(
            encoded, scene.points[poke], scene.moving_flow[poke], scene.points, flag
        )
        error = end_point_error(poked.mean()[:, :2], scene.moving_flow, grid)
        row[f"{prefix}epe/poked"] = error[known["moving"]].mean()
    lengths = np.linalg.norm(scene.moving_flow[known["moving"]], axis=-1)
    row["true_speed"] = row["epe/no_motion"] = lengths.mean() * grid
    return row


def measure_ambiguity(
    predictor: FlowPredictor, scene: AmbiguousScene, grid: int, rng: np.random.Generator
) -> Row:
    """Whether the two most probable modes hold what may happen by itself, without any poke.

    Errors are means over points, and over all futures, or over distinct motions, each once; the
    likelihood is over all futures. Besides the two most probable modes, the two of the mixture's
    own draws that leave the others the least error ("two_draws"): a mixture may spend its most
    probable components on one motion and its sizes. "known" is who has seen these futures: his mean
    is theirs, his two motions those two of them that leave the least error.
    """
    encoded = predictor.encode(scene.image)
    nothing = np.empty((0, 2))
    mixture = predictor.predict(encoded, nothing, nothing, scene.points, True).marginal(2)
    means = mixture.modes().means  # [C, K, 2]
    modes = end_point_error(means, scene.flow[:, :, None], grid)  # [F, C, K]
    draws = mixture.sample(_DRAWS, rng)
    two = best_two(draws, np.full(draws.shape[:2], 1 / _DRAWS))
    errors = {
        "best_of_two": modes[..., :2].min(-1),
        "two_draws": end_point_error(two[:, None], scene.flow, grid).min(0),
        "best_of_all": modes.min(-1),
        **{name: end_point_error(f, scene.flow, grid) for name, f in _reduced(mixture).items()},
    }
    row: Row = {}
    for weighting, counted in (
        ("futures", np.ones_like(scene.distinct)),
        ("distinct", scene.distinct),
    ):
        own = errors | _known_futures(scene.flow, counted, grid)
        row |= {f"{weighting}/{name}": error[counted].mean() for name, error in own.items()}
    row["nll"] = -mixture.log_prob(scene.flow).mean()
    row["motions"] = scene.distinct.sum(0).mean()
    return row


def _known_futures(flow: FloatArray, counted: Mask, grid: int) -> dict[str, FloatArray]:
    """Errors ``[F, C]`` of the best one knowing the counted motions ``flow [F, C, 2]`` can do."""
    share = counted / counted.sum(0)  # [F, C]
    mean = end_point_error((flow * share[..., None]).sum(0), flow, grid)
    two = end_point_error(best_two(flow, share)[:, None], flow, grid).min(0)
    return {"known_mean": mean, "known_best_of_two": two}


def best_two(motions: FloatArray, share: FloatArray) -> FloatArray:
    """The two ``[2, C, 2]`` of each point's ``motions [S, C, 2]`` to the nearer of which the mean
    distance of all, weighted by ``share [S, C]``, is least.
    """
    pairs = np.stack(np.triu_indices(len(motions), 1))  # [2, P]
    # Point by point: all pairs of all points would take gigabytes.
    chosen = np.empty((2, motions.shape[1]), np.intp)
    for point in range(motions.shape[1]):
        here = motions[:, point]
        apart = np.linalg.norm(here[:, None] - here, axis=-1)  # [S, S]
        cost = share[:, point] @ np.minimum(apart[:, pairs[0]], apart[:, pairs[1]])
        chosen[:, point] = pairs[:, cost.argmin()]
    return np.take_along_axis(motions, chosen[..., None], 0)
