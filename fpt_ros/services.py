# SPDX-License-Identifier: MIT
"""What the services and the action answer: a request in, its response out.

Each is a generator. Its first step checks the whole request and raises RequestError, the others do
a part of the work each, so that the worker can see to new images in between, or stop. A step may
yield feedback; the end returns the response.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from std_msgs.msg import Header

from fpt_model.mixture import FlowMixture
from fpt_model.predictor import FlowPredictor
from fpt_msgs.action import SampleFlow
from fpt_msgs.msg import FlowDistribution, Poke
from fpt_msgs.srv import EvaluatePokes, PredictFlow, SegmentMovingPart
from fpt_ros.images import array_to_image
from fpt_ros.messages import distribution_to_msg, read_pokes, read_queries, samples_to_msg
from fpt_ros.pipeline import (
    Answer,
    Settings,
    Stage,
    View,
    predict_hypotheses,
    sample_jointly,
)
from fpt_ros.pokes import Pokes, RequestError, check_inside

Steps = Generator[Any, None, Any]


@dataclass(frozen=True)
class Limits:
    """What is refused; the node's parameters of the same names describe them."""

    max_pokes: int
    max_queries: int


@dataclass(frozen=True)
class Subject:
    """The image that a request is about, and how it is answered."""

    predictor: FlowPredictor
    view: View
    header: Header
    settings: Settings
    limits: Limits
    stage: Stage

    def pokes(self, pokes: Sequence[Poke], max_pokes: int | None = None) -> Pokes:
        """Those of a request, at most ``max_pokes`` (the limit); RequestError for bad ones."""
        found = read_pokes(pokes, self.limits.max_pokes if max_pokes is None else max_pokes)
        check_inside("poke", found.xy, self.view.size)
        if self.predictor.config.flow_dim == 3:
            self.view.check_depth(found)
        return found

    def queries(self, values: Sequence[float], times: int = 1) -> NDArray[np.float64]:
        """Those of a request, or the grid; RequestError for bad ones.

        ``times``: how often all of them are answered in one response.
        """
        queries = read_queries(values, self.limits.max_queries)
        if queries is None:
            queries = self.view.query_grid(self.settings)
        if len(queries) * times > self.limits.max_queries and times > 1:
            raise RequestError(
                f"{len(queries)} queries times {times} make {len(queries) * times}, expected at "
                f"most {self.limits.max_queries}"
            )
        check_inside("query", queries, self.view.size)
        return queries

    def distribution(self, mixture: FlowMixture, queries: NDArray[np.float64]) -> FlowDistribution:
        """The message of a prediction."""
        config = self.predictor.config
        return distribution_to_msg(
            mixture, queries, self.view.size, self.header, config.name, config.horizon_s
        )


def predict_flow(request: PredictFlow.Request, subject: Subject) -> Steps:
    """The motion of each query."""
    pokes, queries = subject.pokes(request.pokes), subject.queries(request.queries)
    yield
    answer = _answer(subject, pokes, queries)
    return PredictFlow.Response(distribution=subject.distribution(answer.distribution, queries))


def segment_moving_part(request: SegmentMovingPart.Request, subject: Subject) -> Steps:
    """The part that moves with the pokes."""
    pokes = subject.pokes(request.pokes)
    if not (math.isfinite(request.threshold) and request.threshold >= 0):
        raise RequestError(f"threshold must be >= 0 nats, received {request.threshold:g}")
    yield
    settings = subject.settings
    if request.threshold > 0:
        settings = replace(settings, kl_threshold_nats=request.threshold)
    answer = _answer(replace(subject, settings=settings), pokes)
    return SegmentMovingPart.Response(
        mask=array_to_image(answer.mask_image, "mono8", subject.header),
        influence=array_to_image(answer.influence, "32FC1", subject.header),
        threshold=answer.kl_threshold,
    )


def evaluate_pokes(request: EvaluatePokes.Request, subject: Subject) -> Steps:
    """The motion of each query under each hypothesis."""
    sizes = np.array(request.sizes, np.int64)
    if not len(sizes):
        sizes = np.ones(len(request.pokes), np.int64)
    if not len(sizes):
        raise RequestError("received no hypotheses, expected at least one")
    if sizes.sum() != len(request.pokes):
        raise RequestError(
            f"the sizes of {len(sizes)} hypotheses add up to {sizes.sum()}, "
            f"received {len(request.pokes)} pokes"
        )
    if sizes.max() > subject.limits.max_pokes:
        raise RequestError(
            f"hypothesis {sizes.argmax()} of {len(sizes)} has {sizes.max()} pokes, expected at "
            f"most {subject.limits.max_pokes}"
        )
    pokes = subject.pokes(request.pokes, max_pokes=len(request.pokes))
    queries = subject.queries(request.queries, times=len(sizes))
    yield
    ends = np.cumsum(sizes)
    hypotheses = [pokes[a:b] for a, b in zip(ends - sizes, ends, strict=True)]
    mixtures = yield from predict_hypotheses(
        subject.predictor, subject.view, hypotheses, queries, subject.settings, subject.stage
    )
    return EvaluatePokes.Response(
        distributions=[subject.distribution(mixture, queries) for mixture in mixtures]
    )


def sample_flow(goal: SampleFlow.Goal, subject: Subject) -> Steps:
    """Joint samples; its feedback says how many queries are drawn."""
    samples = max(1, goal.samples)
    pokes, queries = subject.pokes(goal.pokes), subject.queries(goal.queries, times=samples)
    if len(pokes) * samples > subject.limits.max_queries:  # each sample has its own copy of them
        raise RequestError(
            f"{len(pokes)} pokes times {samples} samples make {len(pokes) * samples}, expected at "
            f"most {subject.limits.max_queries} (max_queries)"
        )
    yield SampleFlow.Feedback(done=0, count=len(queries))
    drawing = sample_jointly(
        subject.predictor,
        subject.view,
        pokes,
        queries,
        samples,
        goal.seed,
        subject.settings,
        subject.stage,
    )
    while True:
        try:
            done = next(drawing)
        except StopIteration as end:
            flow = end.value
            break
        yield SampleFlow.Feedback(done=done, count=len(queries))
    config = subject.predictor.config
    return SampleFlow.Result(
        samples=samples_to_msg(
            flow, queries, subject.view.size, subject.header, config.name, config.horizon_s
        )
    )


SERVICES: dict[str, Any] = {
    "predict_flow": PredictFlow,
    "segment_moving_part": SegmentMovingPart,
    "evaluate_pokes": EvaluatePokes,
}
"""Names and types of the services."""

ACTION = "sample_flow"
"""Name of the action, of type SampleFlow."""

ANSWERS: dict[str, Callable[[Any, Subject], Steps]] = {
    "predict_flow": predict_flow,
    "segment_moving_part": segment_moving_part,
    "evaluate_pokes": evaluate_pokes,
    ACTION: sample_flow,
}
"""What answers each of them."""


def _answer(subject: Subject, pokes: Pokes, queries: NDArray[np.float64] | None = None) -> Answer:
    return Answer(subject.predictor, subject.view, pokes, queries, subject.settings, subject.stage)
