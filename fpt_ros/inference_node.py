# SPDX-License-Identifier: MIT
"""The ROS 2 node: camera image and pokes in, motion distributions, flow and moving part out.

Callbacks only pass on what arrived to the one :class:`~fpt_ros.worker.Worker`, which answers the
topics, services and the action alike; here is what has to do with ROS: lifecycle, parameters,
topics, services, the action and diagnostics. None of it waits for the model, except transitions.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy  # of QoS profiles, which creating a topic changes
from functools import partial
from threading import Event, Thread
from typing import Any

import torch
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import SetParametersResult
from rclpy.action import ActionServer, CancelResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.lifecycle import LifecycleNode, LifecyclePublisher, LifecycleState
from rclpy.lifecycle import TransitionCallbackReturn as Transition
from rclpy.parameter import Parameter
from rclpy.publisher import Publisher
from rclpy.qos import (
    QoSPolicyKind,
    QoSProfile,
    ReliabilityPolicy,
    qos_policy_name_from_kind,
)
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription
from rclpy.task import Future
from rclpy.timer import Timer
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Float64
from visualization_msgs.msg import MarkerArray

from fpt_model import FlowPredictor
from fpt_model.allocator import return_freed_memory
from fpt_msgs.action import SampleFlow
from fpt_msgs.msg import ModelInfo, PokeArray, QueryArray
from fpt_ros import qos
from fpt_ros.first_thread import FirstThread
from fpt_ros.inbox import Request
from fpt_ros.monitor import TIMES, Monitor
from fpt_ros.outputs import Outputs
from fpt_ros.parameters import FPT_PARAMETERS, declare_parameters
from fpt_ros.pokes import RequestError
from fpt_ros.scene_outputs import Frames, SceneOutputs
from fpt_ros.services import ACTION, SERVICES
from fpt_ros.worker import Output, Worker

FEEDBACK_PERIOD_S = 0.1
"""The action's feedback comes no more often than this."""

RESULT_TIMEOUT_S = 30
"""The action's results can be fetched for this long."""

# A lost command is lost for good, and commanders publish reliably by default.
_COMMAND_QOS = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
_OUTPUT_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
_MARKER_QOS = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)  # deletions come once

_OVERRIDABLE = (
    QoSPolicyKind.HISTORY,
    QoSPolicyKind.DEPTH,
    QoSPolicyKind.RELIABILITY,
    QoSPolicyKind.DURABILITY,
)
"""Policies of each topic that parameters can change."""

_FIXED = frozenset(spec.name for spec in FPT_PARAMETERS if spec.fixed)
_CHOICES = {spec.name: spec.choices for spec in FPT_PARAMETERS if spec.choices}


class FptNode(LifecycleNode):
    """See the module's description; docs/ lists topics, services, the action and parameters.

    Services and action are there in every state: when the node is not active they say so, and a
    client need not wonder whether there is a node at all.

    Args:
        first_thread: loads and runs the model if it is given, else a thread of the node's own.
    """

    def __init__(self, first_thread: FirstThread | None = None, **kwargs: Any) -> None:
        super().__init__("fpt", **kwargs)
        self._first_thread = first_thread
        self._unchecked_change_state = self._service_change_state.callback
        self._service_change_state.callback = self._change_state
        self._predictor: FlowPredictor | None = None
        self.add_on_set_parameters_callback(
            self._check_parameters
        )  # also of what is given at start
        declare_parameters(self, FPT_PARAMETERS)
        self._latencies: dict[str, LifecyclePublisher] = {}
        self._monitor = Monitor(self.get_logger(), self._publish_latency)
        self._outputs: list[Output] = []
        self._info: Publisher | None = None
        self._inputs: list[Subscription] = []
        self._messages: Outputs | None = None
        self._scene: SceneOutputs | None = None
        self._worker: Worker | None = None
        self._default_threads = torch.get_num_threads()

        # their callbacks wait for the worker without holding up each other or anything else
        group = ReentrantCallbackGroup()
        for name, srv_type in SERVICES.items():
            callback = partial(self._serve, name)
            self.create_service(srv_type, f"~/{name}", callback, callback_group=group)
        self._action = ActionServer(
            self,
            SampleFlow,
            f"~/{ACTION}",
            self._sample_flow,
            callback_group=group,
            cancel_callback=lambda goal: CancelResponse.ACCEPT,
            result_timeout=RESULT_TIMEOUT_S,
        )

        # In a thread of its own, the diagnostics tell when all others are stuck.
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._ending = Event()
        self._watchdog = Thread(target=self._watch, name="fpt_watchdog", daemon=True)
        self._watchdog.start()
        self._autostart: Timer | None = None
        if self._value("autostart"):
            # which may not wait for a paused simulation's clock
            steady = Clock(clock_type=ClockType.STEADY_TIME)
            self._autostart = self.create_timer(0.0, self._start, clock=steady)

    def end_work(self) -> None:
        """Answer no more."""
        if self._worker is not None:
            self._worker.stop()

    def destroy_node(self) -> None:
        """End the threads, then destroy as usual."""
        self.end_work()
        self._ending.set()
        self._watchdog.join()
        self._action.destroy()
        super().destroy_node()

    # ------------------------------------------------------------------------------ lifecycle

    def on_configure(self, state: LifecycleState) -> Transition:
        """Load the model and create all topics; FAILURE, with a reason, when it can't be had."""
        started = time.perf_counter()
        try:
            first = self._first_thread
            self._predictor = first.call(self._load_predictor) if first else self._load_predictor()
            self._create_topics()
        except Exception as error:  # whatever a file, a device or a name can cause
            self._release()
            if not self.context.ok():  # told to end meanwhile, which is no mistake
                return Transition.FAILURE
            text = (
                f"cannot configure with model {self._value('model')!r}: "
                f"{type(error).__name__}: {error}"
            )
            self._monitor.fail(text)
            self.get_logger().error(
                f"{text}. Set the parameters and configure again "
                f"(ros2 lifecycle set {self.get_fully_qualified_name()} configure)"
            )
            return Transition.FAILURE
        self._monitor.fail("")
        self._worker = Worker(
            self._predictor,
            self._outputs,
            self._value,
            self._monitor,
            self.get_clock(),
            self.get_logger(),
            self.context.ok,
            camera_info=lambda: self._messages.camera_info if self._messages else None,
            with_depth=self._with_depth,
            begin=self._first_thread.begin if self._first_thread else None,
        )
        config = self._predictor.config
        self.get_logger().info(
            f"model {config.name} ({config.licence}, {config.horizon_s:g} s ahead) on "
            f"{', '.join(v for v in self._active_backend().values() if v != 'none')}; "
            f"ready in {time.perf_counter() - started:.1f} s"
        )
        self.get_logger().info(
            f"subscribed to {', '.join(s.topic_name for s in self._inputs)}; "
            f"publishing below {self.get_fully_qualified_name()} what is subscribed to"
        )
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> Transition:
        """Start to answer."""
        result = super().on_activate(state)
        assert self._worker is not None
        self._worker.start()
        return result

    def on_deactivate(self, state: LifecycleState) -> Transition:
        """Stop to answer; standing pokes and queries are kept."""
        assert self._worker is not None
        self._worker.stop()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> Transition:
        """Let go of the model, the topics and everything received."""
        self._release()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> Transition:
        """As deactivate and clean-up."""
        self._release()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> Transition:
        """Back to unconfigured."""
        self._release()
        return super().on_error(state)

    def _change_state(
        self, request: ChangeState.Request, response: ChangeState.Response
    ) -> ChangeState.Response:
        """Refuse an impossible transition, which rclpy answers by ending the node.

        rclpy itself refuses an impossible label; a label goes before the id.
        """
        possible = {t[0]: t[1] for t in self._state_machine.available_transitions}
        if request.transition.label or request.transition.id in possible:
            return self._unchecked_change_state(request, response)
        expected = ", ".join(f"{number} ({label})" for number, label in possible.items())
        self.get_logger().error(
            f"transition {request.transition.id} is impossible in state "
            f"{self._state_machine.current_state[1]!r}, expected one of: {expected or 'none'}"
        )
        response.success = False
        return response

    def _start(self) -> None:
        assert self._autostart is not None
        self.destroy_timer(self._autostart)
        if self.trigger_configure() == Transition.SUCCESS:
            self.trigger_activate()

    def _release(self) -> None:
        if self._worker is not None:
            self._worker.stop()
        if self._scene is not None:
            self._scene.close()
            self._scene = None
        for publisher in (
            *(publisher for publisher, _ in self._outputs),
            *self._latencies.values(),
        ):
            self.destroy_lifecycle_publisher(publisher)
        if self._info is not None:
            self.destroy_publisher(self._info)
        for subscription in self._inputs:
            self.destroy_subscription(subscription)
        self._outputs, self._latencies, self._info, self._inputs = [], {}, None, []
        self._worker, self._predictor, self._messages = None, None, None
        gc.collect()  # a compiled model is part of cycles; before another one is loaded
        return_freed_memory()

    def _load_predictor(self) -> FlowPredictor:
        torch.set_num_threads(self._value("threads") or self._default_threads)
        with self._backend_warnings():
            predictor = FlowPredictor.load(
                self._value("model"),
                backend=self._value("backend"),
                device=self._value("device"),
                precision=self._value("precision"),
                graphs=self._value("graphs") or None,
                providers=self._value("providers").split(","),
                strict=self._value("strict_backend"),
                compile=self._value("compile"),
            )
        predictor.warm_up()  # the first calls are slow, and must not be the first image's
        return predictor

    @contextmanager
    def _backend_warnings(self) -> Iterator[None]:
        """Log and count what the model library warns of: that it falls back, that it builds."""

        def warn(record: logging.LogRecord) -> bool:
            self._monitor.remember_error("backend", record.getMessage())
            self.get_logger().warning(record.getMessage())
            return False  # said once is enough

        library = logging.getLogger("fpt_model")
        library.addFilter(warn)
        try:
            yield
        finally:
            library.removeFilter(warn)

    def _active_backend(self) -> dict[str, str]:
        """What really runs the model, by what it is of."""
        if (predictor := self._predictor) is None:
            return dict.fromkeys(("backend", "providers", "device", "precision"), "none")
        return {
            "backend": predictor.backend,
            "providers": ",".join(predictor.providers) or "none",
            "device": predictor.device,
            "precision": predictor.precision,
        }

    # ----------------------------------------------------------------------------- parameters

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _check_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        fixed = sorted(p.name for p in parameters if p.name in _FIXED)
        if fixed and self._predictor is not None:
            return SetParametersResult(
                successful=False,
                reason=f"{', '.join(fixed)} can be changed only while the node is unconfigured",
            )
        for p in parameters:
            if p.value not in (choices := _CHOICES.get(p.name, (p.value,))):
                return SetParametersResult(
                    successful=False,
                    reason=f"{p.name} must be one of {', '.join(choices)}, received {p.value!r}",
                )
        return SetParametersResult(successful=True)

    # --------------------------------------------------------------------------------- topics

    def _create_topics(self) -> None:
        self._messages = Outputs(
            self._model.config,
            lambda: self._value("marker_lifetime_s"),
            self._monitor.stage,
            lambda problem: self._monitor.warn("camera_info", problem),
        )
        outputs = self._messages.table
        if self._with_depth:
            self._scene = SceneOutputs(
                Frames(self, self._monitor), lambda: self._value("target_frame")
            )
            outputs = outputs | self._scene.table
        for name, (msg_type, build) in outputs.items():
            profile = _MARKER_QOS if msg_type is MarkerArray else _OUTPUT_QOS
            self._outputs.append((self._create_output(msg_type, name, profile), build))
        for name in TIMES:
            topic = f"debug/{name.replace(' ', '_')}_ms"
            self._latencies[name] = self._create_output(Float64, topic, _OUTPUT_QOS)
        self._info = self.create_publisher(ModelInfo, "~/info", qos.latched())
        self._info.publish(self._messages.model_info())
        camera: tuple[type, str] = (Image, "image")
        if self._value("image_transport") == "compressed":
            # below the camera's topic, also when that is remapped, as image_transport has it
            camera = (CompressedImage, f"{self.resolve_topic_name('image')}/compressed")
        depth: tuple[Any, ...] = (Image, "depth", qos.camera(), self._on_depth)
        for msg_type, name, profile, callback in (
            (*camera, qos.camera(), self._on_image),
            (PokeArray, "pokes", _COMMAND_QOS, partial(self._on_command, "pokes")),
            (QueryArray, "queries", _COMMAND_QOS, partial(self._on_command, "queries")),
            (CameraInfo, "camera_info", qos.camera(), self._on_camera_info),
            *([depth] if self._with_depth else []),
        ):  # one by one, so that a failure leaves none behind
            self._inputs.append(self._create_input(msg_type, name, profile, callback))

    def _create_output(self, msg_type: type, name: str, profile: QoSProfile) -> LifecyclePublisher:
        topic = self.resolve_topic_name(f"~/{name}")
        return self.create_lifecycle_publisher(
            msg_type,
            f"~/{name}",
            copy(profile),
            qos_overriding_options=QoSOverridingOptions(_OVERRIDABLE),
            event_callbacks=PublisherEventCallbacks(
                incompatible_qos=lambda event: self._warn_qos(topic, "publisher", event),
                matched=self._on_matched,
            ),
        )

    def _create_input(
        self, msg_type: type, name: str, profile: QoSProfile, callback: Callable[[Any], None]
    ) -> Subscription:
        topic = self.resolve_topic_name(name)
        return self.create_subscription(
            msg_type,
            name,
            callback,
            copy(profile),
            qos_overriding_options=QoSOverridingOptions(_OVERRIDABLE),
            event_callbacks=SubscriptionEventCallbacks(
                incompatible_qos=lambda event: self._warn_qos(topic, "subscription", event)
            ),
        )

    def _on_matched(self, event: Any) -> None:
        if self._worker is not None and self._worker.running and event.current_count_change > 0:
            self._worker.wake()  # a new subscriber need not wait for the next image

    def _warn_qos(self, topic: str, entity: str, event: Any) -> None:
        policy = qos_policy_name_from_kind(event.last_policy_kind)
        other = "subscriber" if entity == "publisher" else "publisher"
        self._monitor.remember_error("qos", f"incompatible {policy} on {topic}")
        advice = "Change it there"
        parameter = f"qos_overrides.{topic}.{entity}.{policy.lower()}"
        if self.has_parameter(parameter):
            advice += f", or here by the parameter {parameter} at start"
        self.get_logger().warning(
            f"a {other} of {topic} has incompatible QoS, no message will pass: {policy}. {advice}"
        )

    def _on_image(self, msg: Image | CompressedImage) -> None:
        if self._worker is not None and self._worker.running:
            self._worker.put_image(msg)

    def _on_depth(self, msg: Image) -> None:
        if self._worker is not None and self._worker.running:
            self._worker.put_depth(msg)

    def _on_command(self, kind: str, msg: PokeArray | QueryArray) -> None:
        self._monitor.count(f"{kind} received")
        if self._worker is not None and self._worker.running:
            self._worker.put(Request(kind, msg))
        else:
            self._monitor.error(kind, self._inactive)

    def _on_camera_info(self, msg: CameraInfo) -> None:
        if self._messages is not None:
            self._messages.camera_info = msg

    @property
    def _with_depth(self) -> bool:
        """Whether images get depth."""
        return self._model.config.flow_dim == 3 and bool(self._value("use_depth"))

    @property
    def _model(self) -> FlowPredictor:
        assert self._predictor is not None, "there are topics only while configured"
        return self._predictor

    # ---------------------------------------------------------------------- services and action

    async def _serve(self, kind: str, request: Any, response: Any) -> Any:
        answer = await self._ask(Request(kind, request))
        if isinstance(answer, RequestError):
            response.message = str(answer)
            return response
        answer.success = True
        return answer

    async def _sample_flow(self, goal: ServerGoalHandle) -> SampleFlow.Result:
        told_s = float("-inf")

        def tell(feedback: SampleFlow.Feedback) -> None:
            nonlocal told_s
            if time.monotonic() - told_s >= FEEDBACK_PERIOD_S or feedback.done == feedback.count:
                told_s = time.monotonic()
                goal.publish_feedback(feedback)

        answer = await self._ask(
            Request(ACTION, goal.request, progress=tell, cancelled=lambda: goal.is_cancel_requested)
        )
        if not isinstance(answer, RequestError):
            goal.succeed()
            return answer
        if goal.is_cancel_requested:
            goal.canceled()
        else:
            goal.abort()
        return SampleFlow.Result(message=str(answer))

    async def _ask(self, request: Request) -> Any | RequestError:
        """The worker's response to a request, or the reason why there is none."""
        self._monitor.count(f"{request.kind} received")
        if self._worker is None or not self._worker.running:
            reason = RequestError(self._inactive)
            self._monitor.error(request.kind, str(reason))
            return reason
        future = Future()

        def done(answer: Any) -> None:
            future.set_result(answer)
            if self.executor is not None:
                self.executor.wake()  # it looks at what awaits only when something happens

        request.done = done
        self._worker.put(request)
        return await future

    # ------------------------------------------------------------------------------ reporting

    @property
    def _inactive(self) -> str:
        """Why something is refused by a node that does not run."""
        return f"the node is {self._state}, expected active"

    @property
    def _state(self) -> str:
        return str(self._state_machine.current_state[1])

    def _publish_latency(self, name: str, duration_ms: float) -> None:
        publisher = self._latencies.get(name)
        if publisher is not None and publisher.get_subscription_count():
            publisher.publish(Float64(data=duration_ms))

    def _watch(self) -> None:
        while not self._ending.wait(self._value("diagnostics_period_s")):
            try:
                self._publish_diagnostics()
            except Exception:
                if self.context.ok():  # else ROS has ended in between
                    raise

    def _publish_diagnostics(self) -> None:
        facts = {"model": str(self._value("model"))}
        for what, active in self._active_backend().items():
            facts |= {f"{what} requested": str(self._value(what)), f"{what} active": active}
        if (worker := self._worker) is not None:
            facts["depth"] = worker.depth_state
        name = self.get_fully_qualified_name()
        status = self._monitor.status(
            f"{name.lstrip('/')}: inference", name, self._state, facts, self._value("stuck_after_s")
        )
        msg = DiagnosticArray(status=[status])
        msg.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(msg)
