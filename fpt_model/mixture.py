# SPDX-License-Identifier: MIT
"""Gaussian mixtures over motion, in float64 numpy, outside of any exported graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Reduce = Literal["mean", "median", "mode"]

_MEDIAN_FLOOR = 1e-2  # of the common spread is kept, so that the expected distance is smooth
_DRAWS = 2**16  # motions drawn at a time where their number is the caller's: bounds the memory
_MEDIAN_STEPS, _MEDIAN_GAIN = 40, 1e-9  # at most; the relative gain below which it has converged


def _logsumexp(x: Array, axis: int) -> Array:
    top = np.max(x, axis=axis, keepdims=True)
    return np.squeeze(top, axis) + np.log(np.sum(np.exp(x - top), axis=axis))


def _solve_lower(tril: Array, b: Array) -> Array:
    """``inv(tril) @ b``, lower triangular ``[..., D, D]`` and ``b [..., D]``, by substitution."""
    out = np.empty(np.broadcast_shapes(tril.shape[:-1], b.shape))
    for i in range(tril.shape[-1]):
        known = sum((tril[..., i, j] * out[..., j] for j in range(i)), start=np.zeros(()))
        out[..., i] = (b[..., i] - known) / tril[..., i, i]
    return out


def _solve_positive(matrix: Array, b: Array) -> Array:
    """``[D, N]``: each ``inv(matrix [D, D, N]) @ b [D, N]``, of positive definite matrices.

    By elimination over all points at once; ``np.linalg.solve`` calls LAPACK for each.
    """
    matrix, out = matrix.copy(), b.copy()
    for i in range(len(b)):
        for j in range(i + 1, len(b)):
            factor = matrix[j, i] / matrix[i, i]
            matrix[j] -= factor * matrix[i]
            out[j] -= factor * out[i]
    for i in reversed(range(len(b))):
        out[i] /= matrix[i, i]
        out[:i] -= matrix[:i, i] * out[i]
    return out


def _cost(x: Array, weights: Array, means: Array, spread: Array) -> Array:
    """``[N]``: of :meth:`FlowMixture.median`, the expected distance of ``x [D, N]``."""
    squares = spread.copy()
    for mean, axis in zip(means, x, strict=True):
        squares += np.square(mean - axis)
    return np.sum(weights * np.sqrt(squares, out=squares), 0)


def _median_step(
    x: Array, cost: Array, weights: Array, means: Array, spread: Array
) -> tuple[Array, Array]:
    """Newton's step from ``x [D, N]`` with ``cost [N]``; where that gains less than half of what it
    should the best of it, shortened, and Weiszfeld's. And what it gains, ``[N]``."""
    away = means - x[:, None]  # [D, K, N]
    squares = spread + np.square(away).sum(0)
    pull = weights / np.sqrt(squares)
    total = pull.sum(0)
    pulled = pull * away
    slope = pulled.sum(1)  # [D, N], minus the gradient
    bend = pulled / squares
    # [D, D, N]; sums of two factors by einsum are not slow, of three they are
    curve = -np.einsum("ikn,jkn->ijn", bend, away)
    for i in range(len(x)):
        curve[i, i] += total
    newton = _solve_positive(curve, slope)
    found = x + newton
    least = _cost(found, weights, means, spread)
    expected = np.maximum(0.5 * (slope * newton).sum(0), 0)  # rounding may spoil the curve
    short = np.flatnonzero(~(cost - least >= 0.5 * expected))
    if len(short):
        x, weights, means, spread = (
            x[:, short],
            weights[:, short],
            means[..., short],
            spread[:, short],
        )
        newton, weiszfeld = newton[:, short], slope[:, short] / total[short]
        best, lowest = x, cost[short]
        for step in (weiszfeld, newton, 0.3 * newton, 0.1 * newton):
            new = _cost(x + step, weights, means, spread)
            better = new < lowest
            best, lowest = np.where(better, x + step, best), np.where(better, new, lowest)
        found[:, short], least[short] = best, lowest
    return found, cost - least


@dataclass(frozen=True)
class FlowMixture:
    """Mixtures of K full-covariance Gaussians over D-dimensional motion, for ``[...]`` points.

    Attributes:
        log_weights: ``[..., K]`` normalised log weights.
        means: ``[..., K, D]``, in whatever unit the maker states (the predictor: fractions of the
            image's width and height).
        scale_tril: ``[..., K, D, D]`` lower Cholesky factors of the covariances, same unit.
    """

    log_weights: Array
    means: Array
    scale_tril: Array

    def __post_init__(self) -> None:
        for name in ("log_weights", "means", "scale_tril"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        k_shape, m_shape, l_shape = self.log_weights.shape, self.means.shape, self.scale_tril.shape
        if m_shape[:-1] != k_shape or l_shape != (*m_shape, m_shape[-1]):
            raise ValueError(
                "expected log_weights [..., K], means [..., K, D], scale_tril [..., K, D, D], "
                f"received shapes {k_shape}, {m_shape}, {l_shape}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The batch shape ``[...]``."""
        return self.log_weights.shape[:-1]

    @property
    def components(self) -> int:
        """K."""
        return int(self.means.shape[-2])

    @property
    def dims(self) -> int:
        """D."""
        return int(self.means.shape[-1])

    @property
    def weights(self) -> Array:
        """``[..., K]`` probabilities of the components."""
        return np.exp(self.log_weights)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> FlowMixture:
        """Index the batch shape (an Ellipsis is not supported)."""
        return FlowMixture(self.log_weights[index], self.means[index], self.scale_tril[index])

    def scaled(self, *scale: float) -> FlowMixture:
        """The mixture of ``motion * scale``, one factor an axis (ValueError otherwise)."""
        s = np.asarray(scale, dtype=np.float64)
        if s.shape != (self.dims,) or not np.all(s > 0):
            raise ValueError(f"expected {self.dims} positive factors, received {scale}")
        # diag(s) @ L stays lower triangular with a positive diagonal
        return FlowMixture(self.log_weights, self.means * s, self.scale_tril * s[:, None])

    def scaled_last(self, scale: Array) -> FlowMixture:
        """The mixture with the last axis of each point in another unit, by ``scale [...]``.

        Where the factor is NaN, so is that axis, and no other.
        """
        means, tril = self.means.copy(), self.scale_tril.copy()
        means[..., -1] *= scale[..., None]
        tril[..., -1, :] *= scale[..., None, None]
        return FlowMixture(self.log_weights, means, tril)

    def marginal(self, dims: int) -> FlowMixture:
        """The mixture of the first ``dims`` components of the motion; ValueError if there are less.

        A leading block of a Cholesky factor is that of the covariance's leading block: this is
        exact.
        """
        if not 1 <= dims <= self.dims:
            raise ValueError(f"expected 1 to {self.dims} dimensions, received {dims}")
        return FlowMixture(
            self.log_weights, self.means[..., :dims], self.scale_tril[..., :dims, :dims]
        )

    def mean(self) -> Array:
        """``[..., D]``."""
        return np.einsum("...k,...kd->...d", self.weights, self.means)

    def component_covariances(self) -> Array:
        """``[..., K, D, D]``."""
        return self.scale_tril @ np.swapaxes(self.scale_tril, -1, -2)

    def covariance(self) -> Array:
        """``[..., D, D]`` by the law of total variance."""
        centred = self.means - self.mean()[..., None, :]
        spread = np.einsum("...k,...ki,...kj->...ij", self.weights, centred, centred)
        return np.einsum("...k,...kij->...ij", self.weights, self.component_covariances()) + spread

    def std(self) -> Array:
        """``[..., D]``: the standard deviation of each axis."""
        return np.sqrt(np.diagonal(self.covariance(), axis1=-2, axis2=-1))

    def modes(self) -> FlowMixture:
        """The components ordered from most to least probable."""
        order = np.argsort(-self.log_weights, axis=-1, kind="stable")
        return FlowMixture(
            np.take_along_axis(self.log_weights, order, -1),
            np.take_along_axis(self.means, order[..., None], -2),
            np.take_along_axis(self.scale_tril, order[..., None, None], -3),
        )

    def mode(self) -> Array:
        """``[..., D]``: the mean of the most probable component."""
        best = np.argmax(self.log_weights, axis=-1)[..., None, None]
        return np.take_along_axis(self.means, best, -2)[..., 0, :]

    def median(self) -> Array:
        """``[..., D]``: the motion with the least expected end-point error (geometric median).

        Where a point either stays or moves it says the likelier of the two, where the mean says
        something between that never happens. The spread that even the narrowest component has is
        taken for noise of what was learned from, a tracker's, and left out: with it, what most
        probably stays would creep toward where it might go. The expected distance to a component
        is taken as ``sqrt(|mu - x|^2 + tr Sigma)`` with the rest of its covariance, its bound by
        Jensen's inequality. The sum is smooth and convex; Newton's method finds its minimum, with
        Weiszfeld's (1937) step, which never fails, where Newton's gains little. Where the last axis
        is NaN (:meth:`scaled_last`) so is the median's, and the others are as without it.
        """
        unknown = np.isnan(self.means[..., -1]).any(-1)
        if self.dims > 1 and unknown.any():
            out = np.full((*self.shape, self.dims), np.nan)
            out[~unknown] = self[~unknown].median()
            out[unknown, :-1] = self[unknown].marginal(self.dims - 1).median()
            return out
        k, d = self.components, self.dims
        # components first: numpy is slow along short last axes
        weights = np.ascontiguousarray(self.weights.reshape(-1, k).T)  # [K, N]
        means = np.ascontiguousarray(self.means.reshape(-1, k, d).T)  # [D, K, N]
        tril = self.scale_tril.reshape(-1, k, d * d)
        spread = np.ascontiguousarray(np.einsum("nki,nki->kn", tril, tril))
        spread -= (1 - _MEDIAN_FLOOR) * spread.min(0)

        at_means = [_cost(means[:, j], weights, means, spread) for j in range(k)]
        best = np.argmin(at_means, 0)
        found = np.take_along_axis(means, best[None, None], 1)[:, 0]  # [D, N]
        cost = np.min(at_means, 0)
        left = np.arange(len(best))  # points where the last step still gained
        for _ in range(_MEDIAN_STEPS):
            if not len(left):
                break
            x, gained = _median_step(found[:, left], cost[left], weights, means, spread)
            found[:, left] = x
            on = gained > _MEDIAN_GAIN * cost[left]
            cost[left] -= gained
            left, weights, means, spread = left[on], weights[:, on], means[..., on], spread[:, on]
        return np.ascontiguousarray(found.T).reshape(*self.shape, d)

    def reduce(self, how: Reduce) -> Array:
        """``[..., D]``: one motion a point, by the method of that name; ValueError for others."""
        if how not in get_args(Reduce):
            raise ValueError(f"reduce must be one of {get_args(Reduce)}, received {how!r}")
        return np.asarray(getattr(self, how)())

    def log_prob(self, motion: ArrayLike) -> Array:
        """``[...]``: log density (per unit^D) of ``motion [..., D]``."""
        motion = np.asarray(motion, dtype=np.float64)
        if motion.shape[-1:] != (self.dims,):
            raise ValueError(f"motion must be [..., {self.dims}], received {motion.shape}")
        return _logsumexp(self.log_weights + self._component_log_prob(motion[..., None, :]), -1)

    def _component_log_prob(self, motion: Array) -> Array:
        """``[..., K]`` from ``motion`` broadcastable to ``[..., K, D]``."""
        z = _solve_lower(self.scale_tril, motion - self.means)
        return -0.5 * np.sum(z * z, -1) - self._log_det() - 0.5 * self.dims * np.log(2 * np.pi)

    def _log_det(self) -> Array:
        """``[..., K]``: log determinants of the Cholesky factors."""
        return np.sum(np.log(np.diagonal(self.scale_tril, axis1=-2, axis2=-1)), -1)

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """``[n, ..., D]`` independent draws."""
        if n < 1:
            raise ValueError(f"the number of samples must be >= 1, received {n}")
        u = rng.random((n, *self.shape, 1))
        # clip: the cumulative sum may end a rounding error below 1
        pick = np.sum(u > np.cumsum(self.weights, -1), -1).clip(max=self.components - 1)
        index = pick[..., None, None]
        mean = np.take_along_axis(self.means[None], index, -2)[..., 0, :]
        tril = np.take_along_axis(self.scale_tril[None], index[..., None], -3)[..., 0, :, :]
        return mean + np.einsum("...ij,...j->...i", tril, rng.standard_normal(mean.shape))

    def probability_within(
        self, centre: ArrayLike, radius: ArrayLike, samples: int = 512, seed: int = 0
    ) -> Array:
        """``[...]``: Monte Carlo estimate of the mass in a disc, or a ball, of motions.

        ``radius [...]`` about ``centre [..., D]``. Each component is sampled by the same draws and
        their negatives, and weighted exactly: the standard error is about ``0.5 / sqrt(samples)``
        at most, and differences between similar mixtures hardly feel it.

        Raises ValueError for a number of samples that is not positive and even.
        """
        if samples < 2 or samples % 2:
            raise ValueError(f"samples must be even and >= 2, received {samples}")
        half = np.random.default_rng(seed).standard_normal((samples // 2, self.dims))
        offset = self.means - np.asarray(centre, np.float64)[..., None, :]
        limit = np.square(np.asarray(radius, np.float64))[..., None]
        inside = np.zeros(np.broadcast_shapes(offset.shape[:-1], limit.shape))
        for draw in np.concatenate([half, -half]):  # one by one: bounds the memory
            inside += np.sum(np.square(offset + self.scale_tril @ draw), -1) <= limit
        # the weights may add up to a rounding error above 1
        return np.minimum(1.0, np.sum(self.weights * inside, -1) / samples)

    def entropy(self, samples: int = 256, seed: int = 0) -> Array:
        """``[...]``: Monte Carlo estimate of the differential entropy in nats."""
        return -np.mean(self.log_prob(self.sample(samples, np.random.default_rng(seed))), 0)

    def kl(
        self,
        other: FlowMixture,
        method: Literal["matched", "monte_carlo"] = "matched",
        samples: int = 4096,
        seed: int = 0,
    ) -> Array:
        """``[...]``: Kullback-Leibler divergence ``D(self || other)`` in nats.

        ``matched`` is the approximation of Goldberger, Gordon & Greenspan, "An efficient image
        similarity measure based on approximations of KL-divergence between two Gaussian mixtures"
        (ICCV 2003), which the FPT paper uses. It is an upper bound where no two components match
        the same one of ``other``, and can even be negative where some do. ``monte_carlo``
        estimates the true value from so many ``samples`` of each point. The batch shapes are
        broadcast. ValueError for another method, or fewer than one sample.
        """
        if method == "monte_carlo":
            return self._sampled_kl(other, samples, np.random.default_rng(seed))
        if method != "matched":
            raise ValueError(f'method must be "matched" or "monte_carlo", received {method!r}')
        pair = self.component_kl(other)  # [..., K, K']
        cost = pair - other.log_weights[..., None, :]
        best = np.min(cost, axis=-1)
        # a component of weight 0, whose logarithm is infinite, adds nothing
        terms = np.where(self.weights > 0, best + self.log_weights, 0.0)
        return np.sum(self.weights * terms, -1)

    def _sampled_kl(self, other: FlowMixture, samples: int, rng: np.random.Generator) -> Array:
        if samples < 1:
            raise ValueError(f"samples must be >= 1, received {samples}")
        shape = np.broadcast_shapes(self.shape, other.shape)
        arrays = self.log_weights, self.means, self.scale_tril
        drawn_from = FlowMixture(
            *(np.broadcast_to(a, shape + a.shape[len(self.shape) :]) for a in arrays)
        )
        at_once, total = max(1, _DRAWS // max(1, math.prod(shape))), np.zeros(shape)
        for left in range(samples, 0, -at_once):
            draws = drawn_from.sample(min(left, at_once), rng)
            total += np.sum(self.log_prob(draws) - other.log_prob(draws), 0)
        return total / samples

    def component_kl(self, other: FlowMixture) -> Array:
        """``[..., K, K']``: closed-form KL between each pair of Gaussian components, in nats.

        With ``M = L1^-1 L0`` and ``d = L1^-1 (mu1 - mu0)``:
        ``0.5 (|M|_F^2 + |d|^2 - D) + ln det L1 - ln det L0``.
        """
        if self.dims != other.dims:
            raise ValueError(
                f"both mixtures must be of motion in as many dimensions, received {self.dims} and "
                f"{other.dims}: see marginal"
            )
        # pairs first, points last: numpy is slow along short last axes
        rank = max(len(self.shape), len(other.shape))
        (mean0, tril0, det0), (mean1, tril1, det1) = (
            _points_last(rank, axis, m.means, m.scale_tril, m._log_det()[..., None])
            for m, axis in ((self, 1), (other, 0))
        )
        squares = np.zeros(())
        for column in (None, *range(self.dims)):  # of M; None: d
            solved: list[Array] = []
            for i in range(self.dims):
                if column is not None and i < column:
                    solved.append(np.zeros(()))  # M is lower triangular
                    continue
                right = mean1[i] - mean0[i] if column is None else tril0[i, column]
                for j, known in enumerate(solved):
                    right = right - tril1[i, j] * known
                solved.append(right / tril1[i, i])
                squares = squares + np.square(solved[-1])
        divergence = 0.5 * (squares - self.dims) + det1[0] - det0[0]  # [K, K', ...]
        return np.moveaxis(divergence, (0, 1), (-2, -1))


def _points_last(rank: int, axis: int, *arrays: Array) -> list[Array]:
    """``[..., K, *D]`` each to contiguous ``[*D, K, 1, ...]`` (``axis`` 1) or ``[*D, 1, K, ...]``.

    ``rank`` is the number of axes ``...`` of the result, so that those of two mixtures broadcast.
    """
    count = arrays[0].ndim - 2  # means come first
    out = []
    for array in arrays:
        padded = array.reshape((1,) * (rank - count) + array.shape)
        own = tuple(range(rank + 1, padded.ndim))
        moved = padded.transpose(*own, rank, *range(rank))
        out.append(np.expand_dims(np.ascontiguousarray(moved), len(own) + axis))
    return out
