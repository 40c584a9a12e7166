# SPDX-License-Identifier: MIT
"""What a three-dimensional model says of motion in depth and of what will be hidden."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fpt_model import FlowMixture, FlowPredictor
from fpt_model.depth import Depth, Intrinsics
from fpt_model.geometry import displacement_normalised_to_pixels, normalised_to_pixels
from fpt_model.occlusion import occluded, turned_away
from fpt_model.predictor import Scene as EncodedScene
from fpt_model.scene_flow import displacement, image_motion, reduce_motion, upsample_motion
from fpt_model.visualize import RGBImage, draw_overlay, side_by_side
from sim.dataset import GENERATOR, Settings, StoredSample, replay
from training.data import Shards
from training.evaluation.figures import Figures, Rows, bootstrap_interval
from training.evaluation.measure import (
    PLACES,
    RADII,
    Row,
    end_point_error,
    intersection_over_union,
)
from training.evaluation.report import in_two_columns
from training.evaluation.scenes import FloatArray, Mask, Scene, simulated_scenes
from training.evaluation.suite import EvaluationError, Suite

MIN_HIDDEN = 50  # px; scenes in which less is hidden afterwards do not count for its IoU
NEARER = 0.01  # relative depth; what is nearer by less is the same surface
MIN_SIGNED = 0.01  # relative depth; points that truly move less in depth have no sign
POKED = ("solid", "planar")  # whether the poke tells its motion in depth
MODEL = ("mean", "median")
BASELINES = ("no_motion", "no_depth", "copy")
_OCCLUSION_RADII = RADII[::5]


class DepthScene(NamedTuple):
    """A scene with its depth, at the C of its points that have any, and what is hidden later."""

    scene: Scene
    kind: str
    world: str
    depth: Depth
    known: Mask  # [points of the scene] those with depth
    xy: FloatArray  # [C, 2] px
    z: FloatArray  # [C] m
    flow: FloatArray  # [C, 3] m, true
    relative: FloatArray  # [points of the scene] true relative depth
    motion: FloatArray  # [H, W, 3] true, px and relative depth
    hidden: Mask  # [H, W]: seen now, in the picture but hidden afterwards; with depth alone

    @property
    def image(self) -> RGBImage:
        """The picture."""
        return self.scene.image


def check_drawn_again(shards: Shards, split: str) -> None:
    """Raises EvaluationError for shards whose scenes the simulation does not draw again as stored.

    Before hours of work, of which the first scene would tell, too.
    """
    if not shards.manifest.get("complete"):
        raise EvaluationError(
            "what is not stored is found by drawing scenes again, which needs a complete "
            f"manifest-{split}.json beside {shards.files[0]}"
        )
    if shards.generator != GENERATOR:
        raise EvaluationError(
            "what is not stored is found by drawing scenes again, which needs shards of generator "
            f"{GENERATOR}, received {shards.files[0]} of {shards.generator}: make them anew"
        )


def depth_scenes(shards: Shards, split: str, suite: Suite, seed: int) -> Iterator[DepthScene]:
    """The scenes of the suite, with what a second rendering shows, for which they are drawn again.

    Raises EvaluationError if the simulation draws something else than what is stored.
    """
    check_drawn_again(shards, split)
    settings = Settings(**shards.manifest["settings"])
    for index, sample, future, scene in simulated_scenes(shards, suite, seed):
        yield _with_depth(sample, future, scene, _hidden(sample, split, index, future, settings))


def _hidden(sample: StoredSample, split: str, index: int, future: int, settings: Settings) -> Mask:
    """``[H, W]``: where the second rendering shows something nearer than what went there, or its
    back."""
    drawn = replay(split, index, settings)
    step = sample.depth.max() / 65535
    continued = drawn.futures[future]
    alike = np.abs(drawn.frame.depth - sample.depth).max() <= 2 * step and all(
        np.allclose(a, b, atol=1e-4)
        for a, b in (
            (continued.body_motion, sample.body_motion[future]),
            (continued.camera_motion, sample.camera_motion[future]),
        )
    )
    if not alike:
        raise EvaluationError(
            f"image {index} of {split} ({sample.kind} {sample.seed}) is not what the simulation "
            "draws here; make the shards anew on this machine"
        )
    seen_later = drawn.world.after(continued).depth
    size = height, width = sample.depth.shape
    pixel = np.indices(size)[::-1].reshape(2, -1).T
    moved = sample.flow_at(future, pixel)
    end = pixel + displacement_normalised_to_pixels(moved.flow, size)
    after = np.floor(end + 0.5).astype(int)
    inside = ((after >= 0) & (after < [width, height])).all(-1)
    u, v = np.clip(after, 0, [width - 1, height - 1]).T
    nearer = (seen_later[v, u] > 0) & (seen_later[v, u] < moved.depth * (1 - NEARER))
    nearer |= turned_away(*end.T.reshape(2, *size), sample.depth, sample.bodies).ravel()
    hidden: Mask = (inside & nearer & (sample.depth.ravel() > 0)).reshape(size)
    return hidden


def _with_depth(sample: StoredSample, future: int, scene: Scene, hidden: Mask) -> DepthScene:
    metres = np.where(sample.depth > 0, sample.depth, np.float32(np.nan))
    depth = Depth(metres, Intrinsics.from_matrix(sample.intrinsics))
    pixels = np.floor(normalised_to_pixels(scene.points, depth.size) + 0.5)
    z = depth.at(pixels)
    true = sample.flow_at(future, pixels.astype(int))
    known = np.isfinite(z)
    (height, width), pixel = depth.size, np.indices(depth.size)[::-1].reshape(2, -1).T
    motion = sample.flow_at(future, pixel).motion * [width, height, 1]
    return DepthScene(
        scene,
        scene.kind,
        scene.world,
        depth,
        known,
        pixels[known],
        z[known],
        true.scene_flow[known].astype(np.float64),
        true.depth_change.astype(np.float64),
        motion.reshape(height, width, 3),
        hidden,
    )


# ------------------------------------------------------------------------------------- measuring


class ShownDepth(NamedTuple):
    """A scene and what the model says when it is poked in depth at its largest motion."""

    scene: DepthScene
    relative: FloatArray  # [points of the scene] median
    hidden: Mask  # [H, W]


def measure_depth(
    predictor: FlowPredictor, planar: FlowPredictor | None, scene: DepthScene, grid: int
) -> tuple[Row, ShownDepth]:
    """Errors in space by place and kind of poke, IoU of what is hidden; in the image also those of
    a ``planar`` model. And what is worth a picture."""
    base, camera = scene.scene, scene.depth.intrinsics
    encoded = predictor.encode(base.image)
    beside = planar.encode(base.image) if planar is not None else None
    row: Row = {
        "hidden": float(scene.hidden.sum()),
        "occlusion/true": _iou(occluded(scene.depth.metres, scene.motion), scene),
    }
    for place, poke in zip(PLACES, (int(base.pokes[0]), base.drawn), strict=True):
        copied = _copied(scene, poke)
        for poked in POKED:
            mixture = _predict(predictor, encoded, base, scene.relative, poke, poked == "solid")
            pixels = mixture.scaled(*displacement_normalised_to_pixels((1, 1), scene.depth.size), 1)
            motions = {how: reduce_motion(pixels, how, camera) for how in MODEL}
            _put_space(row, f"{place}/{poked}/", scene, motions, copied)
            if place == "largest":
                hidden = _put_occlusion(row, f"{poked}/", scene, motions["median"], grid)
            if (place, poked) == ("largest", "solid"):
                shown = ShownDepth(scene, motions["median"][:, 2], hidden)
        if place == "largest":
            row["occlusion/copy"] = _copied_occlusion(scene, poke)
        _put_image(row, f"{place}/image/", predictor, encoded, base, scene.relative, poke, grid)
        if planar is not None:
            prefix = f"{place}/planar_model/"
            _put_image(row, prefix, planar, beside, base, scene.relative, poke, grid)
    return row, shown


def _predict(
    predictor: FlowPredictor,
    encoded: EncodedScene,
    scene: Scene,
    relative: FloatArray,
    poke: int,
    solid: bool,
) -> FlowMixture:
    flow = scene.flow[[poke]]
    if solid:
        flow = np.column_stack([flow, relative[[poke]]])
    return predictor.predict(encoded, scene.points[[poke]], flow, scene.points, True)


def _where(scene: DepthScene) -> dict[str, Mask | slice]:
    return {"all": slice(None), "moving": scene.scene.moving[scene.known]}


def _copied(scene: DepthScene, poke: int) -> FloatArray:
    """``[R, C, 3]`` m: near the poke (in the image) everything moves as it does, in space."""
    points = scene.scene.points[scene.known]
    within = np.linalg.norm(points - scene.scene.points[poke], axis=-1) < RADII[:, None]
    return within[..., None] * _poke_flow(scene, poke)


def _poke_flow(scene: DepthScene, poke: int) -> FloatArray:
    """``[3]`` m; 0 where it has no depth."""
    size = scene.depth.size
    at = normalised_to_pixels(scene.scene.points[poke], size)
    moved = displacement_normalised_to_pixels(scene.scene.flow[poke], size)
    motion = [*moved, scene.relative[poke]]
    return np.nan_to_num(displacement(at, scene.depth.at(at), motion, scene.depth.intrinsics))


def _put_space(
    row: Row,
    prefix: str,
    scene: DepthScene,
    motions: dict[str, FloatArray],
    copied: FloatArray,
) -> None:
    camera = scene.depth.intrinsics
    flows = {
        how: displacement(scene.xy, scene.z, motion[scene.known], camera)
        for how, motion in motions.items()
    }
    flat = motions["median"][scene.known] * [1, 1, 0]
    flows |= {
        "no_depth": displacement(scene.xy, scene.z, flat, camera),
        "no_motion": np.zeros_like(scene.flow),
        "copy": copied,
    }
    for name, flow in flows.items():
        difference = flow - scene.flow
        for part, index in _where(scene).items():
            some = difference[..., index, :]
            row[f"{prefix}epe/{part}/{name}"] = np.linalg.norm(some, axis=-1).mean(-1)
            row[f"{prefix}z/{part}/{name}"] = np.abs(some[..., 2]).mean(-1)
    true = scene.relative[scene.known]
    signed = np.abs(true) >= MIN_SIGNED
    right = np.sign(motions["median"][scene.known, 2]) == np.sign(true)
    row[f"{prefix}sign"] = np.array([right[signed].sum(), signed.sum()], float)


def _occlusion(scene: DepthScene, motion: FloatArray, grid: int) -> Mask:
    """``motion [grid * grid, 3]`` in px and relative depth, as the node does it."""
    metres = scene.depth.metres
    return occluded(metres, upsample_motion(motion.reshape(grid, grid, 3), metres))


def _iou(predicted: Mask, scene: DepthScene) -> float:
    return float(intersection_over_union(predicted.ravel(), scene.hidden.ravel()))


def _put_occlusion(row: Row, poked: str, scene: DepthScene, motion: FloatArray, grid: int) -> Mask:
    """Returns the mask ``[H, W]``."""
    hidden = _occlusion(scene, motion, grid)
    row[f"occlusion/{poked}median"] = _iou(hidden, scene)
    row[f"occlusion/{poked}no_depth"] = _iou(_occlusion(scene, motion * [1, 1, 0], grid), scene)
    return hidden


def _copied_occlusion(scene: DepthScene, poke: int) -> FloatArray:
    """``[R]``: IoU where all within a radius moves as the poke does, in space, pixel by pixel."""
    size = height, width = scene.depth.size
    rows, columns = np.mgrid[0:height, 0:width]
    xy = np.stack([columns, rows], -1)
    at = normalised_to_pixels(scene.scene.points[poke], size)
    flow, metres = _poke_flow(scene, poke), scene.depth.metres
    moved = np.nan_to_num(image_motion(xy, metres, flow, scene.depth.intrinsics))
    distance = np.linalg.norm((xy - at) / [width, height], axis=-1)
    return np.array(
        [
            _iou(occluded(metres, moved * (distance < radius)[..., None]), scene)
            for radius in _OCCLUSION_RADII
        ]
    )


def _put_image(
    row: Row,
    prefix: str,
    predictor: FlowPredictor,
    encoded: EncodedScene | None,
    scene: Scene,
    relative: FloatArray,
    poke: int,
    grid: int,
) -> None:
    assert encoded is not None
    mixture = _predict(predictor, encoded, scene, relative, poke, False).marginal(2)
    for how in MODEL:
        error = end_point_error(mixture.reduce(how), scene.flow, grid)  # type: ignore[arg-type]
        row[f"{prefix}all/{how}"] = error.mean()
        row[f"{prefix}moving/{how}"] = error[scene.moving].mean()


# --------------------------------------------------------------------------------------- figures


def depth_figures(rows: Rows, over: str) -> Figures:
    """Means in m (errors) and cells (in the image), ratios to the baselines with intervals."""
    figures: Figures = {"scenes": len(rows), "worlds": len(np.unique(rows.worlds))}
    cluster = rows.clusters(over)
    for place in PLACES:
        figures[place] = {}
        for poked in POKED:
            prefix = f"{place}/{poked}/"
            right, count = rows[f"{prefix}sign"].sum(0)
            found: Figures = {"sign": float(right / count) if count else float("nan")}
            for what in ("epe", "z"):
                for part in ("all", "moving"):
                    key = f"{prefix}{what}/{part}/"
                    errors = {name: rows[key + name] for name in (*MODEL, *BASELINES)}
                    errors["copy"] = errors["copy"][:, errors["copy"].mean(0).argmin()]
                    group: Figures = {name: float(e.mean()) for name, e in errors.items()}
                    for name in BASELINES:
                        below = errors[name]
                        if below.mean() > 0:
                            group[f"median_over_{name}"] = float(
                                errors["median"].mean() / below.mean()
                            )
                            group[f"median_over_{name}_interval"] = bootstrap_interval(
                                cluster, errors["median"], below
                            )
                    found[f"{what}_{part}"] = group
            figures[place][poked] = found
        for who in ("image", "planar_model"):
            if f"{place}/{who}/all/mean" in rows.columns:
                figures[place][who] = {
                    f"{part}/{how}": rows.mean(f"{place}/{who}/{part}/{how}")
                    for part in ("all", "moving")
                    for how in MODEL
                }
        if "planar_model" in figures[place]:
            for part in ("all", "moving"):
                own, other = (
                    rows[f"{place}/{who}/{part}/median"] for who in ("image", "planar_model")
                )
                name = f"{part}/median_over_planar_model"
                figures[place]["image"][name] = float(own.mean() / other.mean())
                figures[place]["image"][f"{name}_interval"] = bootstrap_interval(
                    cluster, own, other
                )
    figures["occlusion"] = _occlusion_figures(rows, over)
    return figures


def _occlusion_figures(rows: Rows, over: str) -> Figures:
    """Mean IoU over the scenes in which something is hidden."""
    chosen = rows.select(rows["hidden"] >= MIN_HIDDEN)
    figures: Figures = {"scenes": len(chosen)}
    if not len(chosen):
        return figures
    values = {
        f"{poked}/{name}": chosen[f"occlusion/{poked}/{name}"]
        for poked in POKED
        for name in ("median", "no_depth")
    }
    for poked in POKED:  # scene by scene, since scenes differ far more than the two do
        with_depth, without = (values[f"{poked}/{name}"] for name in ("median", "no_depth"))
        values[f"{poked}/gain"] = with_depth - without
    values["true"] = chosen["occlusion/true"]
    copied = chosen["occlusion/copy"]
    values["copy"] = copied[:, copied.mean(0).argmax()]
    for name, iou in values.items():
        figures[name] = float(iou.mean())
        figures[f"{name}_interval"] = bootstrap_interval(chosen.clusters(over), iou)
    return figures


# -------------------------------------------------------------------------------------- pictures


def depth_sheet(shown: Sequence[ShownDepth], grid: int) -> RGBImage:
    """Scenes in two columns: picture with the poke, motion in depth and what it hides, true and
    predicted. Red comes nearer, blue goes away."""
    captions = ["poke", "true depth motion", "median", "true hidden", "predicted"]
    rows, none = [], np.zeros((0, 2))
    for scene, relative, hidden in shown:
        base, size = scene.scene, scene.depth.size
        poke = base.pokes[:1]
        xy = normalised_to_pixels(base.points[poke], size)
        flow = displacement_normalised_to_pixels(base.flow[poke], size)
        largest = max(MIN_SIGNED, float(np.abs(scene.relative).max()))
        fields = [
            relative_to_color(field.reshape(grid, grid), largest)
            for field in (scene.relative, relative)
        ]
        masks = [
            draw_overlay(base.image, none, none, none, None, mask=mask.astype(np.float32))
            for mask in (scene.hidden, hidden)
        ]
        panels = [draw_overlay(base.image, xy, flow, none, None), *fields, *masks]
        title = (
            f"{scene.kind}: relative depth of the poke {scene.relative[poke[0]]:+.3f}, there "
            f"predicted {relative[poke[0]]:+.3f}; IoU of what is hidden {_iou(hidden, scene):.2f}"
        )
        rows.append(side_by_side(panels, captions, title, panel_height=160))
    return in_two_columns(rows)


def relative_to_color(field: FloatArray, largest: float) -> RGBImage:
    """``[h, w]`` to RGB: white is 0, red comes nearer, blue goes away, both full at ``largest``."""
    share = np.clip(field / largest, -1, 1)[..., None]
    colour = np.where(share < 0, [255.0, 0.0, 0.0], [0.0, 0.0, 255.0])
    blended = 255 * (1 - np.abs(share)) + colour * np.abs(share)
    return np.asarray(blended.round(), np.uint8)
