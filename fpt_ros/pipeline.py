# SPDX-License-Identifier: MIT
"""What the node answers, without ROS: everything about one image, in pixels.

:class:`Answer` is about one set of pokes. Each of its products is computed on first use and then
kept, so that a caller pays for what it publishes and products share their common parts (flow and
influence come from one dense prediction). What takes long is a generator, between whose steps the
caller can do something else: many hypothetical pokes, and joint samples.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from fpt_model.depth import Depth
from fpt_model.geometry import (
    displacement_normalised_to_pixels,
    displacement_pixels_to_normalised,
    grid,
    normalised_to_pixels,
    pixels_to_normalised,
)
from fpt_model.mixture import FlowMixture, Reduce
from fpt_model.occlusion import occluded
from fpt_model.predictor import FlowPredictor, Scene
from fpt_model.scene_flow import SceneFlow, reduce_motion, scene_flow, upsample_motion
from fpt_model.visualize import draw_overlay, evenly, flow_to_color
from fpt_ros.planning import Ask
from fpt_ros.pokes import Pokes, RequestError, check_inside

Outcome = TypeVar("Outcome")

MAX_OVERLAID_QUERIES = 32
"""The overlay draws at most this many queries, evenly picked: drawing costs 5 ms a query."""

HYPOTHESES_AT_ONCE = 64
"""Of hypothetical pokes this many go through the model together: bounds the memory."""

Stage = Callable[[str], AbstractContextManager[None]]
"""Called with a stage's name, gives the context in which the stage runs (for timing)."""


@dataclass(frozen=True)
class Settings:
    """How answers are made; the node's parameters of the same names describe them."""

    camera_static: bool = True
    flow_reduce: Reduce = "median"
    dense_size: tuple[int, int] = (64, 64)  # (height, width) of the dense grid, cells
    query_grid: tuple[int, int] = (8, 8)  # (height, width) of the queries when nobody sent any
    full_resolution: bool = True
    kl_threshold_nats: float | None = None  # None: the model's own


@dataclass(eq=False)
class View:
    """An image with its encoding: what answers refer to."""

    image: NDArray[np.uint8]  # [H, W, 3] RGB
    scene: Scene
    depth: Depth | None = None  # None: unknown, or of no use since the model is planar

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in px."""
        return self.scene.height, self.scene.width

    def query_grid(self, settings: Settings) -> NDArray[np.float64]:
        """The points ``[Q, 2]`` in px that are asked for when nobody named any."""
        return normalised_to_pixels(grid(settings.query_grid), self.size)

    def normalised(
        self, pokes: Pokes, dims: int = 2
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Positions and displacements of pokes as a predictor of ``dims`` dimensions takes them.

        Relative depth is unknown (NaN) where ``dz`` or, unless ``dz`` is 0, the depth is, and where
        ``dz`` leads through the camera.
        """
        flow = displacement_pixels_to_normalised(pokes.flow, self.size)
        if dims == 3:
            depth = self._depth_at(pokes.xy)
            relative = np.where(pokes.dz == 0, 0.0, pokes.dz / depth)
            relative[pokes.pass_camera(depth)] = np.nan
            flow = np.column_stack([flow, relative])
        return pixels_to_normalised(pokes.xy, self.size), flow

    def check_depth(self, pokes: Pokes) -> None:
        """RequestError for a poke in depth (``dz`` neither NaN nor 0) where there is no depth, or
        that would end behind the camera."""
        depth = self._depth_at(pokes.xy)
        lost = np.isfinite(pokes.dz) & (pokes.dz != 0) & np.isnan(depth)
        for i in np.flatnonzero(lost)[:1]:
            x, y = pokes.xy[i]
            raise RequestError(
                f"poke {i} of {len(pokes)} has dz={pokes.dz[i]:g} m, but no depth is known at "
                f"x={x:g}, y={y:g} px; expected dz NaN (unknown) or 0"
            )
        for i in np.flatnonzero(pokes.pass_camera(depth))[:1]:
            raise RequestError(
                f"poke {i} of {len(pokes)} has dz={pokes.dz[i]:g} m at a depth of {depth[i]:g} m; "
                "expected more than minus the depth: nothing passes the camera"
            )

    def _depth_at(self, xy: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.full(len(xy), np.nan) if self.depth is None else self.depth.at(xy)

    def in_pixels(
        self, mixture: FlowMixture, queries: NDArray[np.float64] | None = None
    ) -> FlowMixture:
        """A prediction as the predictor gives it, in px: the motion in the image.

        With ``queries [Q, 2]`` (px) it keeps, where there is depth, its third component, in m; NaN
        at queries without depth.
        """
        planar = displacement_normalised_to_pixels((1.0, 1.0), self.size)
        if queries is None or self.depth is None:
            return mixture.marginal(2).scaled(*planar)
        return mixture.scaled(*planar, 1.0).scaled_last(self.depth.at(queries))


class Answer:
    """All products for one image, one set of pokes and one set of queries.

    Args:
        pokes: in px; none gives what might happen by itself.
        queries: ``[Q, 2]`` px; None takes the grid of the settings.
        stage: context of each stage.

    Raises:
        RequestError: when a poke or a query lies outside the image.
    """

    def __init__(
        self,
        predictor: FlowPredictor,
        view: View,
        pokes: Pokes,
        queries: NDArray[np.float64] | None,
        settings: Settings,
        stage: Stage = lambda name: nullcontext(),
    ) -> None:
        self._drawn = evenly(0 if queries is None else len(queries), MAX_OVERLAID_QUERIES)
        if queries is None:
            queries = view.query_grid(settings)
        check_inside("poke", pokes.xy, view.size)
        check_inside("query", queries, view.size)
        self.view, self.pokes, self.queries = view, pokes, queries
        self._predictor, self._settings, self._stage = predictor, settings, stage

    @cached_property
    def distribution(self) -> FlowMixture:
        """The motion ``[Q]`` of each query, px; with depth its third component, m."""
        with self._stage("predict"):
            positions = pixels_to_normalised(self.queries, self.view.size)
            return self.view.in_pixels(self._predict(positions), self.queries)

    @cached_property
    def flow(self) -> NDArray[np.float32]:
        """One motion a point ``[h, w, 2]``, px."""
        dense = self._dense  # a stage of its own
        with self._stage("flow"):
            # in px before it is reduced: the least expected error depends on the unit of the axes
            flow = self.view.in_pixels(dense).reduce(self._settings.flow_reduce)
        return self._resized(flow.reshape(*self._settings.dense_size, 2))

    @cached_property
    def scene_flow(self) -> SceneFlow:
        """Motion in space ``[h * w]`` of the points on the dense grid; needs depth."""
        mixture, motion, depth = *self._motion_in_depth, self._depth
        with self._stage("flow"):
            return scene_flow(mixture, motion, self._cells, depth)

    @cached_property
    def occlusion(self) -> NDArray[np.bool_]:
        """What ``[h, w]`` is seen in the image and hidden after the motion; needs depth."""
        (_, motion), depth = self._motion_in_depth, self._depth
        with self._stage("flow"):
            field = motion.reshape(*self.dense_size, 3)
            if self._settings.full_resolution:
                return occluded(depth.metres, upsample_motion(field, depth.metres))
            (rows, columns), (height, width) = self.dense_size, self.view.size
            # from px of the image to those of the grid
            scale = [columns / width, rows / height, 1.0]
            return occluded(depth.at(self._cells).reshape(rows, columns), field * scale)

    @cached_property
    def influence(self) -> NDArray[np.float32]:
        """How much the pokes change what is known of each point's motion ``[h, w]``, nats."""
        dense = self._dense  # a stage of its own
        with self._stage("influence"):
            return self._resized(
                self._predictor.influence_of(
                    self.view.scene,
                    dense,
                    self._settings.dense_size,
                    self._settings.camera_static,
                )
            )

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """The part ``[h, w]`` that moves with the pokes: influence above the threshold."""
        return self.influence > self.kl_threshold

    @property
    def dense_size(self) -> tuple[int, int]:
        """(rows, columns) of the dense grid."""
        return self._settings.dense_size

    @property
    def kl_threshold(self) -> float:
        """That of the mask, nats."""
        threshold = self._settings.kl_threshold_nats
        return self._predictor.config.kl_threshold if threshold is None else threshold

    @property
    def mask_image(self) -> NDArray[np.uint8]:
        """The mask as 255 and 0."""
        return as_image(self.mask)

    @cached_property
    def flow_color(self) -> NDArray[np.uint8]:
        """The flow as colours ``[h, w, 3]``, its largest vector fully saturated."""
        flow = self.flow  # computed in stages of its own
        with self._stage("draw"):
            return flow_to_color(flow)

    @cached_property
    def overlay(self) -> NDArray[np.uint8]:
        """The image with pokes and moving part drawn in, RGB; a whole multiple of its size.

        With the modes at the queries that were asked for; with the flow's colours when none were.
        """
        drawn = self._drawn
        distribution = self.distribution[drawn].marginal(2) if len(drawn) else None
        flow = None if len(drawn) else self.flow
        mask = self.mask
        with self._stage("draw"):
            return draw_overlay(
                self.view.image,
                self.pokes.xy,
                self.pokes.flow,
                self.queries[drawn],
                distribution,
                flow,
                mask,
            )

    @cached_property
    def _dense(self) -> FlowMixture:
        with self._stage("dense"):
            if not len(self.pokes):  # the influence needs it, too
                return self._predictor.unconditional(
                    self.view.scene, self.dense_size, self._settings.camera_static
                )
            return self._predict(grid(self.dense_size))

    def _predict(self, positions: NDArray[np.float64]) -> FlowMixture:
        return self._predictor.predict(
            self.view.scene,
            *self.view.normalised(self.pokes, self._predictor.config.flow_dim),
            positions,
            self._settings.camera_static,
        )

    @property
    def _depth(self) -> Depth:
        if self.view.depth is None:
            raise ValueError("motion in space needs the depth of the image, there is none")
        return self.view.depth

    @cached_property
    def _motion_in_depth(self) -> tuple[FlowMixture, NDArray[np.float64]]:
        """On the dense grid, in px and relative depth: the distribution, and what it reduces to."""
        dense, camera = self._dense, self._depth.intrinsics
        with self._stage("flow"):
            to_px = displacement_normalised_to_pixels((1.0, 1.0), self.view.size)
            mixture = dense.scaled(*to_px, 1.0)
            return mixture, reduce_motion(mixture, self._settings.flow_reduce, camera)

    @property
    def _cells(self) -> NDArray[np.float64]:
        """The middles ``[h * w, 2]`` of the dense grid's cells, px."""
        return normalised_to_pixels(grid(self.dense_size), self.view.size)

    def _resized(self, field: NDArray[Any]) -> NDArray[np.float32]:
        """A field on the dense grid at the resolution that is published."""
        field = np.ascontiguousarray(field, np.float32)
        if not self._settings.full_resolution:
            return field
        height, width = self.view.size
        # both are sampled at cell centres over the whole image, which is cv2.resize's convention
        return np.asarray(cv2.resize(field, (width, height), interpolation=cv2.INTER_LINEAR))


def as_image(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """True as 255, False as 0."""
    return np.where(mask, np.uint8(255), np.uint8(0))


def predict_hypotheses(
    predictor: FlowPredictor,
    view: View,
    hypotheses: Sequence[Pokes],
    queries: NDArray[np.float64],
    settings: Settings,
    stage: Stage = lambda name: nullcontext(),
) -> Generator[int, None, list[FlowMixture]]:
    """The motion ``[Q]`` of ``queries [Q, 2]`` under each of many sets of pokes, all in px.

    Yields how many hypotheses are done. Positions are not checked to lie in the image.
    """
    positions = pixels_to_normalised(queries, view.size)
    mixtures: dict[int, FlowMixture] = {}
    for count in sorted({len(pokes) for pokes in hypotheses}):  # the model takes one number at once
        same = [i for i, pokes in enumerate(hypotheses) if len(pokes) == count]
        for first in range(0, len(same), HYPOTHESES_AT_ONCE):
            chunk = same[first : first + HYPOTHESES_AT_ONCE]
            with stage("evaluate"):
                dims = predictor.config.flow_dim
                pos, flow = zip(*(view.normalised(hypotheses[i], dims) for i in chunk), strict=True)
                predicted = predictor.predict_batch(
                    view.scene, np.stack(pos), np.stack(flow), positions, settings.camera_static
                )
            mixtures.update(
                (i, view.in_pixels(predicted[row], queries)) for row, i in enumerate(chunk)
            )
            yield len(mixtures)
    return [mixtures[i] for i in range(len(hypotheses))]


def answer_asks(
    predictor: FlowPredictor,
    view: View,
    steps: Generator[Ask, Sequence[FlowMixture], Outcome],
    settings: Settings,
) -> Outcome:
    """What steps such as :func:`fpt_ros.planning.plan` return, their asks predicted here."""
    ask = next(steps)
    while True:
        work = predict_hypotheses(predictor, view, ask.hypotheses, ask.queries, settings)
        try:
            while True:
                next(work)
        except StopIteration as end:
            predicted = end.value
        try:
            ask = steps.send(predicted)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome


def sample_jointly(
    predictor: FlowPredictor,
    view: View,
    pokes: Pokes,
    queries: NDArray[np.float64],
    samples: int,
    seed: int,
    settings: Settings,
    stage: Stage = lambda name: nullcontext(),
) -> Generator[int, None, NDArray[np.float64]]:
    """Coherent futures ``[S, Q, D]`` of ``queries [Q, 2]``, all in px; with depth D is 3, m.

    Yields how many queries are drawn. Positions are not checked to lie in the image.
    """
    steps = predictor.sample_stepwise(
        view.scene,
        *view.normalised(pokes, predictor.config.flow_dim),
        pixels_to_normalised(queries, view.size),
        samples,
        seed,
        camera_static=settings.camera_static,
    )
    while True:
        try:
            with stage("sample"):
                done = next(steps)
        except StopIteration as end:
            drawn = displacement_normalised_to_pixels(end.value[..., :2], view.size)
            if view.depth is None:
                return drawn
            dz = end.value[..., 2:] * view.depth.at(queries)[:, None]
            return np.concatenate([drawn, dz], -1)
        yield done
