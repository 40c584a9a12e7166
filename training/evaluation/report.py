# SPDX-License-Identifier: MIT
"""Figures as Markdown tables, plots and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpt_model.geometry import displacement_normalised_to_pixels, normalised_to_pixels
from fpt_model.visualize import RGBImage, draw_overlay, flow_to_color, side_by_side
from training.evaluation.figures import BASELINES, Figures
from training.evaluation.measure import (
    PLACES,
    REDUCTIONS,
    THRESHOLDS,
    end_point_error,
    intersection_over_union,
)
from training.evaluation.scenes import FloatArray, Mask, Scene

METHODS = {
    "mean": "mean",
    "median": "median",
    "mode": "most probable mode",
    "no_motion": "no motion",
    "copy": "nearest poke copied",
    "rigid": "rigid fit of the pokes",
}
SCORES = {
    "kl_matched": "KL (matched)",
    "kl_variational": "KL (variational)",
    "median_flow": "length of the median",
    "mean_flow": "length of the mean",
}
POKED = {"largest": "poked at the largest motion", "random": "poked anywhere that moves"}
SHEET = 24  # scenes of a picture


# ------------------------------------------------------------------------------------ tables


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown; floats with three decimals."""

    def text(value: object) -> str:
        if isinstance(value, list):
            return f"{value[0]:.2f} to {value[1]:.2f}"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(text, line)) + " |" for line in lines) + "\n"


def _ratio(figures: Figures, name: str) -> str:
    low, high = figures[f"{name}_interval"]
    return f"{figures[name]:.2f} ({low:.2f} to {high:.2f})"


def _one_poke(columns: Mapping[str, Figures]) -> str:
    """Rows for figures, a column for each way to poke and model."""
    rows: list[list[object]] = []
    for key, cells in (("epe", "all points"), ("epe_moving", "points that move")):
        for name, label in METHODS.items():
            values = [c[key][name] for c in columns.values()]
            rows.append([f"EPE of {cells}, {label}", *values])
        for name in REDUCTIONS:
            for baseline in ("no_motion", "copy"):
                values = [_ratio(c[key], f"{name}_over_{baseline}") for c in columns.values()]
                rows.append([f"... {METHODS[name]} over {METHODS[baseline]}", *values])
        for name in ("mean", "median", "no_motion", "copy"):
            values = [c[key]["pck"][name] for c in columns.values()]
            rows.append([f"PCK (1 cell) of {cells}, {METHODS[name]}", *values])
    for name, label in SCORES.items():
        for suffix, what in (
            ("", f"IoU of the moving part, {label}"),
            ("_half_threshold", "... at half its threshold"),
            ("_double_threshold", "... at double"),
        ):
            rows.append([what, *(c["iou"][name + suffix] for c in columns.values())])
    rows.append(["IoU, disc of the best radius", *(c["iou"]["disc"] for c in columns.values())])
    for name in ("sample", *REDUCTIONS):
        values = [c["pearson"][name] for c in columns.values()]
        rows.append([f"Pearson of predicted std and error of the {name}", *values])
    for where, cells in (("all", "all points"), ("moving", "points that move")):
        for truth, kind in (("exact", "truth"), ("tracked", "truth as tracked")):
            for level in ("central_50", "central_90"):
                values = [c["reliability"][f"{where}_{truth}"][level] for c in columns.values()]
                rows.append([f"{kind} in the {level[8:]} % region, {cells}", *values])
            values = [c["nll"][f"{where}_{truth}"] for c in columns.values()]
            rows.append([f"NLL of the {kind} (nats), {cells}", *values])
    for name, label in (
        ("confidence", "probability of the mode nearest the truth"),
        ("first", "share where that is the most probable one"),
        ("closeness", "EPE of the nearest mode"),
        ("best_of_two", "EPE of the nearer of the two most probable"),
        ("diversity", "expected distance of two modes (cells)"),
    ):
        values = [c["modes"]["moving"][name] for c in columns.values()]
        rows.append([f"modes, points that move: {label}", *values])
    return table(["", *columns], rows)


def _curve(curve: Figures) -> str:
    rows: list[list[object]] = []
    for where, cells in (("all", "all points"), ("moving", "points that move")):
        for name, label in METHODS.items():
            values = [figures[where]["epe"][name] for figures in curve.values()]
            rows.append([f"EPE of {cells}, {label}", *values])
        for name in ("mean", "median", *BASELINES):
            values = [figures[where]["pck"][name] for figures in curve.values()]
            rows.append([f"PCK (1 cell) of {cells}, {METHODS[name]}", *values])
    rows.append(["NLL (nats), all points", *(figures["nll"] for figures in curve.values())])
    return table(["pokes", *curve], rows)


def _by_kind(figures: Figures) -> str:
    errors, scores = ("median", "mean", "no_motion", "copy"), ("kl_matched", "median_flow")
    rows = [
        [kind, f["scenes"], *(f["epe"][e] for e in errors), *(f["iou"][s] for s in scores)]
        for kind, f in figures.items()
    ]
    header = *(f"EPE, {METHODS[e]}" for e in errors), *(f"IoU, {SCORES[s]}" for s in scores)
    return table(["kind", "scenes", *header], rows)


def _camera(figures: Figures) -> str:
    rows: list[list[object]] = []
    for name, label in (
        ("nll/moving_camera", "NLL under a moving camera (nats)"),
        ("nll/standing_camera", "NLL under a standing camera (nats)"),
        ("speed", "expected speed (cells)"),
        ("epe/poked", "EPE under a moving camera, one poke on it"),
    ):
        rows.append([label, *(figures[f"flag_{flag}/{name}"] for flag in (0, 1))])
    return (
        f"What lies still in the world, {figures['scenes']} images; the moving camera shifts it by "
        f"{figures['true_speed']:.3f} cells.\n\n"
        + table(["without pokes", "camera_static = 0", "camera_static = 1"], rows)
    )


def _ambiguity(columns: Mapping[str, Figures]) -> str:
    first = next(iter(columns.values()))
    rows: list[list[object]] = []
    for weighting, what in (("futures", "all futures"), ("distinct", "each distinct motion once")):
        for name, label in (
            ("best_of_two", "nearer of the two most probable modes"),
            ("best_of_all", "nearest of all modes"),
            ("mean", "mean"),
            ("median", "median"),
            ("mode", "most probable mode"),
        ):
            values = [c[f"{weighting}/{name}"] for c in columns.values()]
            rows.append([f"EPE, {what}: {label}", *values])
        for name, label in (
            ("best_of_two", "nearer of the two over mean"),
            ("two_draws", "nearer of the best two of its draws"),
            ("known_best_of_two", "of who knows these futures"),
        ):
            values = [_ratio(c, f"{weighting}/{name}_over_mean") for c in columns.values()]
            rows.append([f"... {label}", *values])
    rows.append(["NLL (nats), all futures", *(c["nll"] for c in columns.values())])
    return (
        f"Without pokes, where the stored futures differ: {first['scenes']} images, "
        f"{first['motions']:.1f} distinct motions a point.\n\n" + table(["", *columns], rows)
    )


def _depth(figures: Figures) -> str:
    """Tables of :func:`training.evaluation.depth.depth_figures`."""
    labels = {
        "mean": "mean",
        "median": "median",
        "no_depth": "median without its motion in depth (z = 0)",
        "copy": "poke copied in space",
        "no_motion": "no motion",
    }
    columns = {
        f"{POKED[place]}, {text}": figures[place][poked]
        for place in PLACES
        for poked, text in (("solid", "in depth"), ("planar", "in the image"))
    }
    rows: list[list[object]] = []
    for what, error in (("epe", "3-D EPE"), ("z", "z error")):
        for part, points in (("all", "all points"), ("moving", "points that move")):
            for name, label in labels.items():
                values = [100 * c[f"{what}_{part}"][name] for c in columns.values()]
                rows.append([f"{error} of {points} (cm), {label}", *values])
            for name in ("no_depth", "copy", "no_motion"):
                ratios = [
                    _ratio(c[f"{what}_{part}"], f"median_over_{name}") for c in columns.values()
                ]
                rows.append([f"... median over {labels[name]}", *ratios])
    rows.append(["sign of the motion in depth right", *(c["sign"] for c in columns.values())])
    parts = [table([f"{figures['scenes']} scenes", *columns], rows)]

    hidden = figures["occlusion"]
    if hidden["scenes"]:
        rows = [
            [label, f"{hidden[name]:.4f}", hidden[f"{name}_interval"]]
            for name, label in (
                ("solid/median", "poked in depth"),
                ("solid/no_depth", "... with z = 0"),
                ("solid/gain", "... difference"),
                ("planar/median", "poked in the image"),
                ("planar/no_depth", "... with z = 0"),
                ("planar/gain", "... difference"),
                ("copy", "poke copied in space, best radius"),
                ("true", "the true motion itself"),
            )
        ]
        header = [f"what will be hidden, {hidden['scenes']} scenes", "IoU", "95 % interval"]
        parts.append(table(header, rows))

    rows = []
    for part, points in (("all", "all points"), ("moving", "points that move")):
        for name in ("mean", "median"):
            for who, text in (("image", ""), ("planar_model", ", planar model")):
                if who in figures["largest"]:
                    values = [figures[place][who][f"{part}/{name}"] for place in PLACES]
                    rows.append([f"EPE of {points}, {name}{text}", *values])
        ratio = f"{part}/median_over_planar_model"
        if ratio in figures["largest"]["image"]:
            ratios = [_ratio(figures[place]["image"], ratio) for place in PLACES]
            rows.append(["... median over that of the planar model", *ratios])
    parts.append(table(["in the image (cells)", *(POKED[place] for place in PLACES)], rows))
    return "\n".join(parts)


def markdown(figures: Figures) -> str:
    """The whole report."""
    chosen = ", ".join(
        f"{label} {figures['thresholds'][name]:.4g}" for name, label in SCORES.items()
    )
    parts = [
        f"# {figures['title']}\n",
        f"Model `{figures['model']}` (sha256 `{figures['model_sha256'][:16]}`, "
        f"{figures['backend']}, {figures['precision']}), commit `{figures['commit']}`, "
        f"seed {figures['seed']}. "
        f"Errors in cells of a {figures['grid']} x {figures['grid']} grid, in brackets 95 % "
        f"bootstrap intervals over {figures['intervals_over']}s. Thresholds, chosen on the split "
        f"`{figures['validation']}`: {chosen} (nats, image sides). Definitions: "
        "`docs/evaluation.md`.\n",
    ]
    for split, found in figures["splits"].items():
        parts.append(f"## {split}: {found['scenes']} scenes of {found['worlds']} worlds\n")
        models = {"": found, "single Gaussian, ": found.get("single_gaussian")}
        columns = {
            f"{prefix}{POKED[place]}": f[place]
            for prefix, f in models.items()
            if f
            for place in PLACES
        }
        parts += ["### One poke\n", _one_poke(columns)]
        for prefix, f in models.items():
            if f:
                parts += [f"### {prefix or 'model, '}by the number of pokes\n", _curve(f["curve"])]
        parts += ["### By kind\n", _by_kind(found["largest"]["by_kind"])]
        if "depth" in found:
            parts += ["### Motion in depth\n", _depth(found["depth"])]
        if "camera" in found:
            parts += ["### Moving camera\n", _camera(found["camera"])]
        if "ambiguity" in found:
            several = {prefix or "model": f["ambiguity"] for prefix, f in models.items() if f}
            parts += ["### Several futures\n", _ambiguity(several)]
    return "\n".join(parts)


# ------------------------------------------------------------------------------------- plots


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _axes(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.0 * columns, 4.0))
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for a in axes:
        a.grid(alpha=0.3)
    return figure, list(axes)


def plot_curve(curve: Figures, path: Path, title: str) -> None:
    """EPE and PCK by the number of pokes."""
    figure, (left, right) = _axes(2)
    counts = [int(count) for count in curve]
    for axes, key, label in ((left, "epe", "EPE (cells)"), (right, "pck", "PCK at 1 cell")):
        for name in ("mean", "median", *BASELINES):
            values = [f["all"][key][name] for f in curve.values()]
            style = ":" if name in BASELINES else "-"
            axes.plot(counts, values, style, marker="o", label=METHODS[name])
        axes.set(xscale="log", xlabel="pokes", ylabel=label, xticks=counts)
        axes.set_xticklabels(map(str, counts))
        axes.minorticks_off()
    left.legend()
    figure.suptitle(title)
    _save(figure, path)


def plot_reliability(found: Figures, path: Path, title: str) -> None:
    """Share of truths within the central regions of the mixtures, by the regions' mass."""
    figure, axes = _axes(2)
    for ax, place in zip(axes, PLACES, strict=True):
        reliability = found[place]["reliability"]
        mass = [0, *reliability["mass"]]
        ax.plot([0, 1], [0, 1], color="grey", linewidth=1)
        for where in ("all", "moving"):
            for truth, style in (("exact", "-"), ("tracked", "--")):
                coverage = [0, *reliability[f"{where}_{truth}"]["coverage"]]
                ax.plot(mass, coverage, style, label=f"{where} points, {truth} truth")
        ax.set(
            xlabel="probability mass of the region", ylabel="share of truths", title=POKED[place]
        )
    axes[0].legend()
    figure.suptitle(title)
    _save(figure, path)


def plot_thresholds(found: Figures, chosen: Mapping[str, float], path: Path, title: str) -> None:
    """Mean IoU by threshold, over the one chosen on the validation split."""
    figure, axes = _axes(2)
    for ax, place in zip(axes, PLACES, strict=True):
        for name, label in SCORES.items():
            relative = THRESHOLDS[name] / chosen[name]
            ax.plot(relative, found[place]["iou"][f"{name}_by_threshold"], label=label)
        ax.axhline(found[place]["iou"]["disc"], color="grey", linestyle=":", label="disc")
        ax.axvline(1, color="grey", linewidth=1)
        ax.set(xscale="log", xlabel="threshold / chosen one", ylabel="mean IoU", xlim=(1 / 16, 16))
        ax.set_title(POKED[place])
    axes[0].legend()
    figure.suptitle(title)
    _save(figure, path)


# ---------------------------------------------------------------------------------- pictures


class Shown(NamedTuple):
    """A scene and what the model said of it."""

    scene: Scene
    flows: dict[str, FloatArray]  # as the second result of measure.measure


def _on_grid(values: FloatArray | Mask, points: FloatArray, side: int, empty: float) -> FloatArray:
    """``[side, side, ...]``: values ``[C, ...]`` at scattered points, ``empty`` where is none."""
    cell = np.clip((points * side).astype(int), 0, side - 1)
    out = np.full((side, side, *values.shape[1:]), empty, np.float32)
    out[cell[:, 1], cell[:, 0]] = values
    return out


def contact_sheet(shown: Sequence[Shown], threshold: float, grid: int) -> RGBImage:
    """Scenes in two columns: picture, flows and moving parts, true and predicted."""
    captions = ["poke", "true flow", "mean", "median", "true part", "KL above threshold"]
    rows = []
    for scene, flows in shown:
        size = (scene.image.shape[0], scene.image.shape[1])
        poke = scene.pokes[:1]
        pixels = (
            normalised_to_pixels(scene.points[poke], size),
            displacement_normalised_to_pixels(scene.flow[poke], size),
        )
        largest = 1.2 * float(np.linalg.norm(scene.flow, axis=-1).max())
        coloured = [
            flow_to_color(_on_grid(flow, scene.points, grid, np.nan), largest)
            for flow in (scene.flow, flows["mean"], flows["median"])
        ]
        none = np.zeros((0, 2))
        part = flows["kl_matched"] > threshold
        masks = [
            draw_overlay(
                scene.image, none, none, none, None, mask=_on_grid(m, scene.points, grid, 0)
            )
            for m in (scene.moving, part)
        ]
        panels = [draw_overlay(scene.image, *pixels, none, None), *coloured, *masks]
        errors = [
            end_point_error(flow, scene.flow, grid).mean()
            for flow in (np.zeros_like(scene.flow), flows["mean"], flows["median"])
        ]
        title = "{}: EPE still {:.2f}, mean {:.2f}, median {:.2f} cells; IoU {:.2f}".format(
            scene.kind, *errors, float(intersection_over_union(part, scene.moving))
        )
        rows.append(side_by_side(panels, captions, title, panel_height=160))
    return in_two_columns(rows)


def in_two_columns(rows: Sequence[RGBImage]) -> RGBImage:
    """Pictures of equal height, two beside each other."""
    width = max(row.shape[1] for row in rows)
    full = [np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0)), constant_values=255) for r in rows]
    if len(full) % 2:
        full.append(np.full_like(full[0], 255))
    pairs = zip(full[::2], full[1::2], strict=True)
    return np.vstack([np.hstack(pair) for pair in pairs])


def write_picture(picture: RGBImage, path: Path) -> None:
    """As PNG."""
    if not cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)):
        raise OSError(f"cannot write {path}")
