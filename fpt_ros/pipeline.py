# SPDX-License-Identifier: MIT
"""What the node answers, without ROS: everything about one image under one set of pokes, in pixels.

Each product is computed on first use and then kept, so that a caller pays for what it publishes and
products share their common parts (flow and influence come from one dense prediction).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fpt_model.geometry import (
    displacement_normalised_to_pixels,
    displacement_pixels_to_normalised,
    grid,
    normalised_to_pixels,
    pixels_to_normalised,
)
from fpt_model.mixture import FlowMixture, Reduce
from fpt_model.predictor import FlowPredictor, Scene
from fpt_model.visualize import draw_overlay, flow_to_color
from fpt_ros.pokes import Pokes, check_inside

MAX_DRAWN_QUERIES = 32
"""The overlay draws at most this many queries, evenly picked: drawing costs 5 ms a query."""

Stage = Callable[[str], AbstractContextManager[None]]


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

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in px."""
        return self.scene.height, self.scene.width


class Answer:
    """All products for one image, one set of pokes and one set of queries.

    Args:
        pokes: in px; none gives what might happen by itself.
        queries: ``[Q, 2]`` px; None takes the grid of the settings.
        stage: called with a stage's name, gives the context in which the stage runs (for timing).

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
        self._drawn = 0 if queries is None else min(len(queries), MAX_DRAWN_QUERIES)
        if queries is None:
            queries = normalised_to_pixels(grid(settings.query_grid), view.size)
        check_inside("poke", pokes.xy, view.size)
        check_inside("query", queries, view.size)
        self.view, self.pokes, self.queries = view, pokes, queries
        self._predictor, self._settings, self._stage = predictor, settings, stage

    @cached_property
    def distribution(self) -> FlowMixture:
        """The motion ``[Q]`` of each query, px."""
        with self._stage("predict"):
            positions = pixels_to_normalised(self.queries, self.view.size)
            return self._in_pixels(self._predict(positions))

    @cached_property
    def flow(self) -> NDArray[np.float32]:
        """One motion a point ``[h, w, 2]``, px."""
        dense = self._dense  # a stage of its own
        with self._stage("flow"):
            # in px before it is reduced: the least expected error depends on the unit of the axes
            flow = self._in_pixels(dense).reduce(self._settings.flow_reduce)
        return self._resized(flow.reshape(*self._settings.dense_size, 2))

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
        threshold = self._settings.kl_threshold_nats
        return self.influence > (
            self._predictor.config.kl_threshold if threshold is None else threshold
        )

    @cached_property
    def flow_color(self) -> NDArray[np.uint8]:
        """The flow as colours ``[h, w, 3]``, its largest vector fully saturated."""
        with self._stage("draw"):
            return flow_to_color(self.flow)

    @cached_property
    def overlay(self) -> NDArray[np.uint8]:
        """The image with pokes and moving part drawn in, RGB; a whole multiple of its size.

        With the modes at the queries that were asked for; with the flow's colours when none were.
        """
        drawn = np.linspace(0, len(self.queries) - 1, self._drawn).round().astype(np.intp)
        distribution = self.distribution[drawn] if self._drawn else None
        flow = None if self._drawn else self.flow
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
            return self._predict(grid(self._settings.dense_size))

    def _in_pixels(self, mixture: FlowMixture) -> FlowMixture:
        return mixture.scaled(*displacement_normalised_to_pixels((1.0, 1.0), self.view.size))

    def _predict(self, positions: NDArray[np.float64]) -> FlowMixture:
        return self._predictor.predict(
            self.view.scene,
            pixels_to_normalised(self.pokes.xy, self.view.size),
            displacement_pixels_to_normalised(self.pokes.flow, self.view.size),
            positions,
            self._settings.camera_static,
        )

    def _resized(self, field: NDArray[Any]) -> NDArray[np.float32]:
        """A field on the dense grid at the resolution that is published."""
        field = np.ascontiguousarray(field, np.float32)
        if not self._settings.full_resolution:
            return field
        height, width = self.view.size
        # both are sampled at cell centres over the whole image, which is cv2.resize's convention
        return np.asarray(cv2.resize(field, (width, height), interpolation=cv2.INTER_LINEAR))
