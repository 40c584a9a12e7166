# SPDX-License-Identifier: MIT
"""The ROS 2 node that chooses pokes: a goal in, ranked pokes out.

It asks the FPT node's services, and has no model of its own: there is one model in memory, one
encoding of each image, and what is planned on is what the FPT node sees and publishes about.
:mod:`fpt_ros.planning` says what is asked and how the answers are ranked; here is what has to do
with ROS.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.client import Client
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.node import Node
from rclpy.subscription import Subscription
from rclpy.task import Future
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header
from visualization_msgs.msg import MarkerArray

from fpt_model.depth import Depth, DepthError
from fpt_model.mixture import FlowMixture
from fpt_msgs.msg import ModelInfo, PokeArray, RankedPoke
from fpt_msgs.srv import EvaluatePokes, PlanPoke, PredictFlow
from fpt_ros import qos
from fpt_ros.depth import DepthHistory, read_depth
from fpt_ros.history import stamp_ns
from fpt_ros.images import flat_array
from fpt_ros.markers import Display, display_camera, motion_in_space_markers, poke_arrow
from fpt_ros.messages import distribution_from_msg, pokes_to_msg
from fpt_ros.parameters import FPT_PARAMETERS, Spec, declare_parameters
from fpt_ros.planning import (
    Ask,
    Goal,
    Plan,
    Search,
    Steps,
    default_tolerance,
    explore,
    motion_in_space,
    plan,
)
from fpt_ros.pokes import RequestError, Size
from fpt_ros.spin import run

_FPT = {spec.name: spec for spec in FPT_PARAMETERS}

PARAMETERS = (
    Spec("max_count", 16, "Pokes in the response to a request that names no count.", 1, 1000),
    Spec("positions", Search.positions, "Places to poke that are tried; exploring tries half.",
         2, 1000),
    Spec("motions", Search.motions, "Motions that are tried at each place; first the goal's, "
         "if it has one, and the expected ones, the rest drawn.", 1, 100),
    Spec("min_length_px", Search.min_length, "Shorter motions are lengthened to this, px.",
         0.0, 1e5),
    Spec("max_length_px", 0.0, "Longer motions are shortened to this, px; 0: no limit.", 0.0, 1e5),
    Spec("kl_threshold_nats", 0.0, "Influence above which a point belongs to the part that moves "
         "along, nats; 0: the model's own.", 0.0, 1e6),
    # a plan asks about all cells of its grid at once
    Spec("max_queries", _FPT["max_queries"].default,
         "The FPT node's parameter of that name; more is asked in parts.",
         math.prod(Search.cells), 1000000),
    Spec("timeout_s", 10.0, "The FPT node is given up when it has not answered for this long, s.",
         0.1, 3600.0),
    Spec("image_history", _FPT["image_history"].default, "The FPT node's parameter of that name: "
         "depth images kept for plans on images that it still holds.", 1, 1000, read_only=True),
    _FPT["depth_slop_ms"],
    Spec("plan_lifetime_s", 10.0, "Time after which RViz removes the markers of a plan, s; "
         "0: never.", 0.0, 3600.0),
)  # fmt: skip
"""Of this node."""

DISCOVERY_S = 2.0
"""The FPT node's services and model may be missing for this long."""

_LOOK_S = 0.1  # how often it is looked for them meanwhile


class PokePlanner(Node):
    """See the module's description. docs/planner.md and docs/messages.md list what it offers."""

    def __init__(self) -> None:
        super().__init__("poke_planner")
        declare_parameters(self, PARAMETERS)
        self._info: ModelInfo | None = None
        self._camera_info: CameraInfo | None = None
        self._depths: DepthHistory | None = None  # None: the model has no use for depth
        self._of_depth: Subscription | None = None  # the same
        self._display = Display()
        self._asked = self._sent = 0  # requests so far, and which of them was published last
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._pokes = self.create_publisher(PokeArray, "pokes", 10)
        self._markers = self.create_publisher(MarkerArray, "~/markers", 10)
        self.create_subscription(ModelInfo, "fpt/info", self._on_info, qos.latched())
        self.create_subscription(CameraInfo, "camera_info", self._on_camera_info, qos.camera())
        # a plan waits for responses, which must not wait for the plan
        self._group = ReentrantCallbackGroup()
        self._predict = self._client(PredictFlow, "fpt/predict_flow")
        self._evaluate = self._client(EvaluatePokes, "fpt/evaluate_pokes")
        self.create_service(PlanPoke, "~/plan_poke", self._serve, callback_group=self._group)
        self.get_logger().info(f"planning with {self._evaluate.service_name}")

    def _client(self, srv_type: type, name: str) -> Client:
        return self.create_client(srv_type, name, callback_group=self._group)

    def _on_info(self, msg: ModelInfo) -> None:
        self._info = msg
        if msg.dims == 3 and self._depths is None:
            self._depths = DepthHistory(self._value("image_history"))
            self._of_depth = self.create_subscription(
                Image, "depth", self._depths.add, qos.camera()
            )
        elif msg.dims != 3 and self._of_depth is not None:  # the FPT node has another model now
            self.destroy_subscription(self._of_depth)
            self._of_depth = self._depths = None

    def _on_camera_info(self, msg: CameraInfo) -> None:
        self._camera_info = msg

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value

    async def _serve(
        self, request: PlanPoke.Request, response: PlanPoke.Response
    ) -> PlanPoke.Response:
        self._asked += 1
        number = self._asked
        try:
            header, size = await self._look(request)
            if not await self._comes(lambda: self._info is not None):
                raise RequestError("received no fpt/info yet, which says what the model can do")
            depth = self._depth(request, header, size)
            chosen = await self._follow(self._steps(request, size, depth), header)
            chosen = chosen.first(request.count or self._value("max_count"))
            response.header, response.pokes = header, ranked_pokes(chosen)
            if self._markers.get_subscription_count():
                self._mark(chosen, header, size, depth, np.array([request.x, request.y]))
            if request.publish and number > self._sent:  # what was asked for later is not undone
                self._sent = number
                # as the goal was meant: for the image it names, or for the newest and all after it
                self._pokes.publish(pokes_to_msg(chosen.first(1).pokes, request.header))
            response.success = True
        except RequestError as error:
            self.get_logger().warning(str(error))
            response.message = str(error)
        except Exception as error:  # a defect: the next plan may do
            response.message = f"internal error, {type(error).__name__}: {error}"
            self.get_logger().error(response.message)
            self.get_logger().debug(traceback.format_exc())
        return response

    async def _look(self, request: PlanPoke.Request) -> tuple[Header, Size]:
        """Header and size of the image that is meant; RequestError for a point outside of it."""
        exploring = request.goal == PlanPoke.Request.EXPLORE
        points = np.array([] if exploring else [request.x, request.y], np.float32)
        ask = PredictFlow.Request(header=request.header, queries=flat_array("f", points))
        found = (await self._call(self._predict, ask)).distribution
        if not stamp_ns(found.header):
            raise RequestError(
                "a plan asks several times about one image, which it names by its stamp; received "
                "an image with stamp 0, expected the camera's driver to stamp its images"
            )
        return found.header, (found.image_height, found.image_width)

    def _depth(self, request: PlanPoke.Request, header: Header, size: Size) -> Depth | None:
        """That of the image planned on; RequestError if a goal needs it and there is none.

        Exploring does without.
        """
        problem = "the FPT node's model is planar"
        if self._depths is not None and request.goal != PlanPoke.Request.EXPLORE:
            slop_ms = self._value("depth_slop_ms")
            msg = self._depths.find(header, slop_ms)
            try:
                if msg is None:
                    raise DepthError(self._depths.describe(header, slop_ms))
                return read_depth(msg, self._camera_info, header, size)
            except DepthError as error:
                problem = str(error)
                if not _in_space(request):
                    self.get_logger().warning(f"planning without depth: {problem}")
        if _in_space(request):
            raise RequestError(f"a goal with dz={request.dz:g} m needs depth: {problem}")
        return None

    def _steps(self, request: PlanPoke.Request, size: Size, depth: Depth | None) -> Steps:
        """The planning that a request asks for; RequestError for one that makes no sense."""
        assert self._info is not None, "see _serve"
        kinds = {PlanPoke.Request.MOVE: "MOVE", PlanPoke.Request.OPEN: "OPEN"}
        kinds[PlanPoke.Request.EXPLORE] = "EXPLORE"
        if request.goal not in kinds:
            expected = ", ".join(f"{number} ({name})" for number, name in kinds.items())
            raise RequestError(f"goal must be one of {expected}, received {request.goal}")
        shortest, longest = self._value("min_length_px"), self._value("max_length_px") or np.inf
        if shortest > longest:
            raise RequestError(
                "min_length_px must not be above max_length_px, received "
                f"{shortest:g} and {longest:g}"
            )
        search = Search(
            kl_threshold=self._value("kl_threshold_nats") or self._info.kl_threshold,
            positions=self._value("positions"),
            motions=self._value("motions"),
            min_length=shortest,
            max_length=longest,
            seed=request.seed,
        )
        moving = request.goal == PlanPoke.Request.MOVE
        point = np.array([request.x, request.y], np.float64)
        motion = np.array([request.dx, request.dy], np.float64) if moving else None
        if motion is not None and depth is not None and _in_space(request):
            motion = motion_in_space(point, motion, request.dz, depth)
        tolerance = request.tolerance or default_tolerance(motion, size)
        discs = _rows("keep_out", request.keep_out, 3)
        if request.goal == PlanPoke.Request.EXPLORE:
            return explore(size, search, tolerance, discs)
        goal = Goal(
            point=point,
            motion=motion,
            tolerance=tolerance,
            keep=_rows("keep", request.keep, 2),
            keep_out=discs,
        )
        return plan(goal, size, search, depth)

    async def _follow(self, steps: Steps, header: Header) -> Plan:
        """Have predicted what the planning asks for, until it has its plan."""
        predicted: list[FlowMixture] | None = None
        while True:
            try:
                ask = next(steps) if predicted is None else steps.send(predicted)
            except StopIteration as end:
                chosen: Plan = end.value
                return chosen
            predicted = await self._predicted(ask, header)

    async def _predicted(self, ask: Ask, header: Header) -> list[FlowMixture]:
        at_once = max(1, self._value("max_queries") // len(ask.queries))
        queries = flat_array("f", ask.queries.astype(np.float32))
        mixtures: list[FlowMixture] = []
        for first in range(0, len(ask.hypotheses), at_once):
            part = ask.hypotheses[first : first + at_once]
            request = EvaluatePokes.Request(
                header=header,
                pokes=[poke for pokes in part for poke in pokes_to_msg(pokes, header).pokes],
                sizes=flat_array("I", np.array([len(pokes) for pokes in part], np.uint32)),
                queries=queries,
            )
            answer = await self._call(self._evaluate, request)
            mixtures += [distribution_from_msg(msg)[1] for msg in answer.distributions]
        if len(dims := {mixture.dims for mixture in mixtures}) > 1:
            raise RequestError(
                f"received predictions of {' and '.join(map(str, sorted(dims)))} dimensions for "
                "one image: its depth came or went while it was planned; ask again"
            )
        return mixtures

    async def _call(self, client: Client, request: Any) -> Any:
        """A service's response; RequestError when there is none, or it says no."""
        name = client.service_name
        if not await self._comes(client.service_is_ready):
            raise RequestError(f"there is no service {name}; is the FPT node running there?")
        future = client.call_async(request)
        timeout_s = self._value("timeout_s")
        timer = self.create_timer(
            timeout_s, future.cancel, callback_group=self._group, clock=self._steady
        )
        try:
            response = await future
        finally:
            self.destroy_timer(timer)
        if response is None:
            raise RequestError(f"{name} has not answered for {timeout_s:g} s (timeout_s)")
        if not response.success:
            raise RequestError(f"{name}: {response.message}")
        return response

    async def _comes(self, condition: Callable[[], bool]) -> bool:
        """Whether a condition holds, or comes to hold soon: nodes that start find each other."""
        for _ in range(round(DISCOVERY_S / _LOOK_S)):
            if condition():
                return True
            pause = Future()
            timer = self.create_timer(
                _LOOK_S,
                partial(pause.set_result, None),
                callback_group=self._group,
                clock=self._steady,
            )
            try:
                await pause
            finally:
                self.destroy_timer(timer)
        return condition()

    def _mark(
        self,
        chosen: Plan,
        header: Header,
        size: Size,
        depth: Depth | None,
        point: NDArray[np.float64],
    ) -> None:
        """An arrow for each poke, namespace "plan", id = rank; the best is opaque.

        With depth also how the goal's ``point [2]`` would move in space under the best.
        """
        camera = display_camera(self._camera_info, size, self.get_logger().warning)
        best = max(float(chosen.score[0]), 1e-9)
        opacity = np.clip(chosen.score / best, 0.1, 1.0)
        opacity[0] = 1.0  # be its score 0 or less
        arrows = [
            poke_arrow("plan", rank, camera, xy, flow, float(opacity[rank]))
            for rank, (xy, flow) in enumerate(zip(chosen.pokes.xy, chosen.pokes.flow, strict=True))
        ]
        if depth is not None and np.isfinite(chosen.motion[0]).all():
            start = depth.intrinsics.unproject(point, depth.at(point))
            arrows += motion_in_space_markers(start, chosen.motion[0], chosen.motion_covariance[0])
        self._markers.publish(self._display.renew(arrows, header, self._value("plan_lifetime_s")))


def ranked_pokes(chosen: Plan) -> list[RankedPoke]:
    """A plan as messages, in its order."""
    return [
        RankedPoke(
            poke=poke,
            score=chosen.score[i],
            success_probability=chosen.success[i],
            plausibility=chosen.plausibility[i],
            disturbance=chosen.disturbance[i],
            progress=chosen.progress[i],
            progress_std=chosen.progress_std[i],
            information=chosen.information[i],
            motion=chosen.motion[i].astype(np.float32),
            motion_covariance=chosen.motion_covariance[i].astype(np.float32).ravel(),
        )
        for i, poke in enumerate(pokes_to_msg(chosen.pokes, Header()).pokes)
    ]


def _in_space(request: PlanPoke.Request) -> bool:
    """Whether a goal says how its point is to move in depth."""
    return request.goal == PlanPoke.Request.MOVE and request.dz != 0 and not np.isnan(request.dz)


def _rows(name: str, values: Sequence[float], width: int) -> NDArray[np.float64]:
    """A flat float32 field as rows; RequestError when it does not fill them."""
    flat = np.frombuffer(values, np.float32).astype(np.float64)  # type: ignore[call-overload]
    if len(flat) % width:
        raise RequestError(f"{name} must be rows of {width}, received {len(flat)} values")
    return flat.reshape(-1, width)


def main(args: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT; returns the exit code."""
    return run(lambda: PokePlanner, args)


if __name__ == "__main__":
    sys.exit(main())
