# SPDX-License-Identifier: MIT
"""From the rows of many scenes to figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.evaluation.measure import (
    LEVELS,
    OCTAVE,
    PLACES,
    RADII,
    REDUCTIONS,
    THRESHOLDS,
    Row,
)
from training.evaluation.scenes import FloatArray, Mask

Figures = dict[str, Any]

BASELINES = ("no_motion", "copy", "rigid")


@dataclass(frozen=True)
class Rows:
    """The rows of N >= 1 scenes, column by column."""

    columns: dict[str, NDArray[Any]]  # [N, ...]
    kinds: NDArray[np.str_]  # [N]
    worlds: NDArray[np.str_]  # [N]

    @classmethod
    def stack(cls, rows: Sequence[Row], kinds: Sequence[str], worlds: Sequence[str]) -> Rows:
        """Of rows that have the same names."""
        columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return cls(columns, np.array(kinds), np.array(worlds))

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A column ``[N, ...]``."""
        return self.columns[name]

    def select(self, chosen: Mask) -> Rows:
        """Some of the scenes."""
        columns = {name: column[chosen] for name, column in self.columns.items()}
        return Rows(columns, self.kinds[chosen], self.worlds[chosen])

    def clusters(self, over: str) -> NDArray[np.str_]:
        """``[N]``: which scenes are alike, for intervals over "world" or "kind"."""
        return self.kinds if over == "kind" else self.worlds

    def mean(self, name: str) -> float:
        """Of a column of numbers."""
        return float(self[name].mean())


def bootstrap_interval(
    cluster: NDArray[np.str_], value: FloatArray, reference: FloatArray | None = None
) -> list[float]:
    """95 % interval of the mean of ``value [N]``, or of its ratio to that of ``reference [N]``.

    Whole clusters are drawn, since the scenes of one are alike.
    """
    _, member = np.unique(cluster, return_inverse=True)
    count = member.max() + 1
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), 2000)
    weights = draws[:, member]
    below = weights.sum(-1) if reference is None else weights @ reference
    return np.quantile(weights @ value / below, [0.025, 0.975]).tolist()


# --------------------------------------------------------------------------------- thresholds


def choose_thresholds(rows: Rows) -> dict[str, int]:
    """For each score the index of the threshold with the best mean IoU over all ways to poke."""
    chosen = {}
    for name in THRESHOLDS:
        iou = np.mean([rows[f"{place}/iou/{name}"].mean(0) for place in PLACES], 0)
        chosen[name] = OCTAVE + int(iou[OCTAVE:-OCTAVE].argmax())
    return chosen


# -------------------------------------------------------------------------------------- flow


def _scene_errors(rows: Rows, prefix: str) -> tuple[dict[str, FloatArray], dict[str, int]]:
    """The scenes' errors ``[N]`` by method, baselines at the radius that is best on these scenes;
    and the indices of these radii."""
    errors = {name: rows[prefix + name] for name in (*REDUCTIONS, *BASELINES)}
    radii = {}
    for name, error in errors.items():
        if error.ndim == 2:
            radii[name] = int(error.mean(0).argmin())
            errors[name] = error[:, radii[name]]
    return errors, radii


def _pck(rows: Rows, prefix: str) -> dict[str, float]:
    """Share of errors below one cell by method, for baselines at the radius that is best at it."""
    return {name: float(rows[prefix + name].mean(0).max()) for name in (*REDUCTIONS, *BASELINES)}


def flow_figures(rows: Rows, prefix: str, where: str, over: str) -> Figures:
    """End-point errors and PCK over the points ``where`` of a scene, of the model and baselines."""
    errors, radii = _scene_errors(rows, f"{prefix}epe/{where}/")
    figures: Figures = {name: float(error.mean()) for name, error in errors.items()}
    figures |= {f"{name}_radius": float(RADII[i]) for name, i in radii.items()}
    for name in REDUCTIONS:
        for baseline in ("no_motion", "copy"):
            error, reference = errors[name], errors[baseline]
            ratio = f"{name}_over_{baseline}"
            figures[ratio] = float(error.mean() / reference.mean())
            cluster = rows.clusters(over)
            figures[f"{ratio}_interval"] = bootstrap_interval(cluster, error, reference)
            # a few scenes of large motion dominate the means
            figures[f"{name}_beats_{baseline}"] = float((error < reference).mean())
    figures["pck"] = _pck(rows, f"{prefix}pck/{where}/")
    return figures


def curve_figures(rows: Rows, counts: Iterable[int]) -> Figures:
    """Errors and PCK by the number of pokes, over all points and over those that move."""
    figures: Figures = {}
    for count in counts:
        prefix = f"curve/{count}/"
        figures[str(count)] = {"nll": rows.mean(f"{prefix}nll")}
        for where in ("all", "moving"):
            errors, _ = _scene_errors(rows, f"{prefix}epe/{where}/")
            figures[str(count)][where] = {
                "epe": {name: float(error.mean()) for name, error in errors.items()},
                "pck": _pck(rows, f"{prefix}pck/{where}/"),
            }
    return figures


# --------------------------------------------------------------------------- masks and the rest


def mask_figures(rows: Rows, prefix: str, chosen: dict[str, int], over: str) -> Figures:
    """IoU of the moving part by each score, with half and double its threshold, and by a disc."""
    figures: Figures = {}
    for name, index in chosen.items():
        iou = rows[f"{prefix}iou/{name}"]
        figures[name] = float(iou[:, index].mean())
        figures[f"{name}_half_threshold"] = float(iou[:, index - OCTAVE].mean())
        figures[f"{name}_double_threshold"] = float(iou[:, index + OCTAVE].mean())
        figures[f"{name}_interval"] = bootstrap_interval(rows.clusters(over), iou[:, index])
        figures[f"{name}_by_threshold"] = iou.mean(0).tolist()
    disc = rows[f"{prefix}iou/disc"].mean(0)
    figures["disc"], figures["disc_radius"] = float(disc.max()), float(RADII[disc.argmax()])
    return figures


def pearson(moments: FloatArray) -> float:
    """Correlation over the points of all scenes, of moments ``[N, 6]``; NaN if one is constant."""
    n, x, y, xx, yy, xy = moments.sum(0)
    spread = (n * xx - x * x) * (n * yy - y * y)
    return float((n * xy - x * y) / np.sqrt(spread)) if spread > 0 else float("nan")


def calibration_figures(rows: Rows, prefix: str) -> Figures:
    """Likelihood, correlation of error with predicted standard deviation, reliability.

    ``coverage``: the share of truths in the central region of the probability ``mass``.
    """
    figures: Figures = {
        "nll": {
            f"{where}_{truth}": rows.mean(f"{prefix}nll/{where}/{truth}")
            for where in ("all", "moving")
            for truth in ("exact", "tracked")
        },
        "pearson": {
            name: pearson(rows[f"{prefix}moments/{name}"]) for name in ("sample", *REDUCTIONS)
        },
        "reliability": {"mass": (np.arange(1, LEVELS + 1) / LEVELS).tolist()},
    }
    for where in ("all", "moving"):
        for truth in ("exact", "tracked"):
            coverage = rows[f"{prefix}mass/{where}/{truth}"].mean(0).cumsum()
            figures["reliability"][f"{where}_{truth}"] = {
                "coverage": coverage.tolist(),
                "central_50": float(coverage[LEVELS // 2 - 1]),
                "central_90": float(coverage[LEVELS * 9 // 10 - 1]),
            }
    return figures


def mode_figures(rows: Rows, prefix: str) -> Figures:
    """See :func:`training.evaluation.measure._put_modes`."""
    names = ("confidence", "closeness", "best_of_two", "diversity", "first")
    return {
        where: {name: rows.mean(f"{prefix}modes/{where}/{name}") for name in names}
        for where in ("all", "moving")
    }


def group_figures(rows: Rows, prefix: str, chosen: dict[str, int]) -> Figures:
    """The main figures, for some of the scenes."""
    errors, _ = _scene_errors(rows, f"{prefix}epe/all/")
    iou = {name: float(rows[f"{prefix}iou/{name}"][:, i].mean()) for name, i in chosen.items()}
    return {
        "scenes": len(rows),
        "worlds": len(np.unique(rows.worlds)),
        "epe": {name: float(error.mean()) for name, error in errors.items()},
        "iou": iou,
    }


def poke_figures(rows: Rows, place: str, chosen: dict[str, int], over: str) -> Figures:
    """All figures of one way to poke once."""
    prefix = f"{place}/"
    length = rows[f"{prefix}poke_length"]
    bounds = np.quantile(length, [0, 1 / 3, 2 / 3, 1])
    third = np.searchsorted(bounds[1:3], length, side="right")
    return {
        "epe": flow_figures(rows, prefix, "all", over),
        "epe_moving": flow_figures(rows, prefix, "moving", over),
        "iou": mask_figures(rows, prefix, chosen, over),
        **calibration_figures(rows, prefix),
        "modes": mode_figures(rows, prefix),
        "by_poke_length": [
            {
                "from": float(bounds[i]),
                "to": float(bounds[i + 1]),
                **group_figures(rows.select(third == i), prefix, chosen),
            }
            for i in range(3)
            if (third == i).any()
        ],
        "by_kind": {
            str(kind): group_figures(rows.select(rows.kinds == kind), prefix, chosen)
            for kind in np.unique(rows.kinds)
        },
    }


def plain_figures(rows: Rows, ratios: dict[str, tuple[str, str]], over: str) -> Figures:
    """Means of all columns; and by name the ratios of two of them, with intervals."""
    figures: Figures = {
        "scenes": len(rows),
        "worlds": len(np.unique(rows.worlds)),
        **{name: rows.mean(name) for name in rows.columns},
    }
    for name, (above, below) in ratios.items():
        figures[name] = figures[above] / figures[below]
        interval = bootstrap_interval(rows.clusters(over), rows[above], rows[below])
        figures[f"{name}_interval"] = interval
    return figures
