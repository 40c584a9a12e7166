# SPDX-License-Identifier: MIT
"""The ROS 2 node: camera image and pokes in, motion distributions, flow and moving part out.

Callbacks only leave messages in an :class:`~fpt_ros.inbox.Inbox`; one worker thread takes the
newest image, encodes it once and publishes what somebody subscribes to.

Pokes and queries with a zero stamp stand: they apply to the newest image and to all after it, until
the next such message; an empty one clears them. With a stamp they apply to the image of that stamp
only, as long as the node holds it.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy  # of QoS profiles, which creating a topic changes
from dataclasses import dataclass
from threading import Thread
from typing import Any

import numpy as np
import torch
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState
from numpy.typing import NDArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.lifecycle import LifecycleNode, LifecyclePublisher, LifecycleState
from rclpy.lifecycle import TransitionCallbackReturn as Transition
from rclpy.parameter import Parameter
from rclpy.qos import QoSPolicyKind, QoSProfile, ReliabilityPolicy, qos_policy_name_from_kind
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription
from rclpy.timer import Timer
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from fpt_model import FlowPredictor, load_model
from fpt_msgs.msg import FlowDistribution, PokeArray, QueryArray
from fpt_ros.images import ImageError, array_to_image, image_to_rgb
from fpt_ros.inbox import Batch, Inbox, Request
from fpt_ros.messages import (
    distribution_to_msg,
    pokes_from_msg,
    queries_from_msg,
)
from fpt_ros.monitor import Monitor
from fpt_ros.parameters import FPT_PARAMETERS, declare_parameters
from fpt_ros.pipeline import Answer, Settings, View
from fpt_ros.pokes import Pokes, RequestError, check_inside

IMAGE_WAIT_S = 1.0
"""Pokes and queries that name an image not yet received wait this long for it."""

# An image that is lost is soon replaced, and a best-effort reader matches every camera.
_IMAGE_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
# A lost command is lost for good, and commanders publish reliably by default.
_COMMAND_QOS = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
_OUTPUT_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)

_OVERRIDABLE = (
    QoSPolicyKind.HISTORY,
    QoSPolicyKind.DEPTH,
    QoSPolicyKind.RELIABILITY,
    QoSPolicyKind.DURABILITY,
)
"""Policies of each topic that parameters can change."""

_FIXED = frozenset(spec.name for spec in FPT_PARAMETERS if spec.fixed)
_CHOICES = {spec.name: spec.choices for spec in FPT_PARAMETERS if spec.choices}


@dataclass
class Conditions:
    """What is asked of an image, px; None: nothing was sent."""

    pokes: Pokes | None = None
    queries: NDArray[np.float64] | None = None


@dataclass(eq=False)
class HeldImage:
    """An encoded image, and the pokes and queries that named it."""

    header: Header
    view: View
    named: Conditions


class FptNode(LifecycleNode):
    """See the module's description; docs/ lists the topics and parameters."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("fpt", **kwargs)
        self._unchecked_change_state = self._service_change_state.callback
        self._service_change_state.callback = self._change_state
        self._predictor: FlowPredictor | None = None
        self.add_on_set_parameters_callback(
            self._check_parameters
        )  # also of what is given at start
        declare_parameters(self, FPT_PARAMETERS)
        self._monitor = Monitor()
        self._outputs: list[tuple[LifecyclePublisher, Callable[[Answer, Header], Any]]] = []
        self._inputs: list[Subscription] = []
        self._inbox = Inbox()
        self._worker: Thread | None = None
        # the following belong to the worker while it runs
        self._standing = Conditions()
        self._held: deque[HeldImage] = deque()
        self._unread: Image | None = None  # the newest image, if nobody was listening
        self._waiting: list[Request] = []

        # neither may stop with a paused simulation's clock
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(
            self._value("diagnostics_period_s"), self._publish_diagnostics, clock=steady
        )
        self._autostart: Timer | None = None
        if self._value("autostart"):
            self._autostart = self.create_timer(0.0, self._start, clock=steady)

    def destroy_node(self) -> None:
        """End the worker, then destroy as usual."""
        self._stop_worker()
        super().destroy_node()

    # ------------------------------------------------------------------------------ lifecycle

    def on_configure(self, state: LifecycleState) -> Transition:
        """Load the model and create all topics; FAILURE, with a reason, when it can't be had."""
        started = time.perf_counter()
        try:
            self._predictor = self._load_predictor()
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
        self._held = deque(maxlen=self._value("scene_history"))
        config = self._predictor.config
        self.get_logger().info(
            f"model {config.name} ({config.licence}, {config.horizon_s:g} s ahead) on "
            f"{', '.join(self._active_backend().values())}; "
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
        self._inbox = Inbox()
        self._worker = Thread(target=self._work, name="fpt_worker", daemon=True)
        self._worker.start()
        return result

    def on_deactivate(self, state: LifecycleState) -> Transition:
        """Stop to answer; standing pokes and queries are kept."""
        self._stop_worker()
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
        self._stop_worker()
        for publisher, _ in self._outputs:
            self.destroy_lifecycle_publisher(publisher)
        for subscription in self._inputs:
            self.destroy_subscription(subscription)
        self._outputs, self._inputs, self._predictor = [], [], None
        self._standing, self._unread, self._waiting = Conditions(), None, []
        self._held.clear()

    def _stop_worker(self) -> None:
        self._inbox.close()
        if self._worker is not None:
            self._worker.join()
            self._worker = None

    def _load_predictor(self) -> FlowPredictor:
        if self._value("threads"):
            torch.set_num_threads(self._value("threads"))
        with self._backend_warnings():
            predictor = FlowPredictor(
                load_model(self._value("model")),
                backend=self._value("backend"),
                device=self._value("device"),
                precision=self._value("precision"),
                graphs=self._value("graphs") or None,
                providers=self._value("providers").split(","),
                strict=self._value("strict_backend"),
            )
        if predictor.config.flow_dim != 2:
            raise ValueError(
                f"expected a model of planar flow, this has {predictor.config.flow_dim}"
            )
        # The first call is slow; it must not be the first image's.
        image = np.zeros((predictor.config.image_size, predictor.config.image_size, 3), np.uint8)
        predictor.dense(predictor.encode(image), np.zeros((0, 2)), np.zeros((0, 2)), size=(8, 8))
        return predictor

    @contextmanager
    def _backend_warnings(self) -> Iterator[None]:
        """Log and count what the model library warns of: that it falls back, that it builds."""

        def warn(record: logging.LogRecord) -> bool:
            self._monitor.error("backend", record.getMessage())
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

    def _settings(self) -> Settings:
        return Settings(
            camera_static=self._value("camera_static"),
            flow_reduce=self._value("flow_reduce"),
            dense_size=(self._value("dense_height"), self._value("dense_width")),
            query_grid=(self._value("query_grid_height"), self._value("query_grid_width")),
            full_resolution=self._value("full_resolution"),
            kl_threshold_nats=self._value("kl_threshold_nats") or None,
        )

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
        def image(encoding: str, pixels: Callable[[Answer], Any]) -> Any:
            return Image, lambda answer, header: array_to_image(pixels(answer), encoding, header)

        for name, (msg_type, build) in {
            "distribution": (FlowDistribution, self._distribution),
            "flow": image("32FC2", lambda answer: answer.flow),
            "flow_color": image("rgb8", lambda answer: answer.flow_color),
            "mask": image(
                "mono8", lambda answer: np.where(answer.mask, np.uint8(255), np.uint8(0))
            ),
            "influence": image("32FC1", lambda answer: answer.influence),
            "overlay": image("rgb8", lambda answer: answer.overlay),
        }.items():
            self._outputs.append((self._create_output(msg_type, name), build))
        for msg_type, name, qos, callback in (
            (Image, "image", _IMAGE_QOS, self._on_image),
            (PokeArray, "pokes", _COMMAND_QOS, self._on_request),
            (QueryArray, "queries", _COMMAND_QOS, self._on_request),
        ):  # one by one, so that a failure leaves none behind
            self._inputs.append(self._create_input(msg_type, name, qos, callback))

    def _create_output(self, msg_type: type, name: str) -> LifecyclePublisher:
        topic = self.resolve_topic_name(f"~/{name}")
        return self.create_lifecycle_publisher(
            msg_type,
            f"~/{name}",
            copy(_OUTPUT_QOS),
            qos_overriding_options=QoSOverridingOptions(_OVERRIDABLE),
            event_callbacks=PublisherEventCallbacks(
                incompatible_qos=lambda event: self._warn_qos(topic, "publisher", event),
                matched=self._on_matched,
            ),
        )

    def _create_input(
        self, msg_type: type, name: str, qos: QoSProfile, callback: Callable[[Any], None]
    ) -> Subscription:
        topic = self.resolve_topic_name(name)
        return self.create_subscription(
            msg_type,
            name,
            callback,
            copy(qos),
            qos_overriding_options=QoSOverridingOptions(_OVERRIDABLE),
            event_callbacks=SubscriptionEventCallbacks(
                incompatible_qos=lambda event: self._warn_qos(topic, "subscription", event)
            ),
        )

    def _on_matched(self, event: Any) -> None:
        if (
            self._worker is not None and event.current_count_change > 0
        ):  # a new subscriber need not wait for the next image
            self._inbox.wake()

    def _warn_qos(self, topic: str, entity: str, event: Any) -> None:
        policy = qos_policy_name_from_kind(event.last_policy_kind)
        other = "subscriber" if entity == "publisher" else "publisher"
        self._monitor.error("qos", f"incompatible {policy} on {topic}")
        advice = "Change it there"
        parameter = f"qos_overrides.{topic}.{entity}.{policy.lower()}"
        if self.has_parameter(parameter):
            advice += f", or here by the parameter {parameter} at start"
        self.get_logger().warning(
            f"a {other} of {topic} has incompatible QoS, no message will pass: {policy}. {advice}"
        )

    def _on_image(self, msg: Image) -> None:
        if self._worker is None:
            return
        self._monitor.image_received()
        if self._inbox.put_image(msg):
            self._monitor.count("images dropped: newer came first")

    def _on_request(self, msg: PokeArray | QueryArray) -> None:
        if self._worker is None:
            return
        self._monitor.count(f"{_kind(msg)} received")
        if self._inbox.put_request(msg):
            self._report(
                _kind(msg), "more pokes and queries wait than can be kept, dropped the oldest"
            )

    # --------------------------------------------------------------------------------- worker

    def _work(self) -> None:
        while (batch := self._inbox.take(IMAGE_WAIT_S if self._waiting else None)) is not None:
            try:
                self._process(batch)
            except Exception as error:  # a defect or a device's failure; the next image may do
                if not self.context.ok():
                    return
                self._report("internal", f"{type(error).__name__}: {error}")
                self.get_logger().debug(traceback.format_exc())

    def _process(self, batch: Batch) -> None:
        # First the image: standing pokes that came with it are meant for it, not the one before.
        if batch.image is not None:
            self._unread = batch.image
        self._waiting += batch.requests  # which must outlast a failure to encode
        new = None
        if self._unread is not None and self._listened():
            image, self._unread = self._unread, None
            new = self._encode(image)

        answer_newest = batch.woken or new is not None
        named: list[HeldImage] = []
        requests, self._waiting = self._waiting, []
        for request in requests:
            if _stamp_ns(request.msg.header) == 0:
                size = self._held[-1].view.size if self._held and self._unread is None else None
                answer_newest |= self._accept(request.msg, self._standing, size)
            elif (held := self._find(request)) is not None and self._accept(
                request.msg, held.named, held.view.size
            ):
                named.append(held)

        for held in self._held:
            newest = held is self._held[-1]
            if held in named or (newest and answer_newest and not self._too_old(held.header)):
                self._answer(held)
        if new is not None and _stamp_ns(new.header):
            self._monitor.time("image to answer", self._age_ms(new.header))

    def _encode(self, msg: Image) -> HeldImage | None:
        """Read, encode and hold an image; None when it was refused."""
        if self._too_old(msg.header):
            self._monitor.count("images dropped: too old")
            if self._monitor.due("old image"):
                self.get_logger().warning(
                    f"dropped an image {self._age_ms(msg.header):.0f} ms old, max_age_ms is "
                    f"{self._value('max_age_ms'):g}; are the clocks of camera and node the same "
                    "(use_sim_time)?"
                )
            return None
        try:
            with self._monitor.stage("convert"):
                pixels = image_to_rgb(msg)
        except ImageError as error:
            self._report("image", str(error))
            return None
        with self._monitor.stage("encode"):
            scene = self._model.encode(pixels)
        held = HeldImage(msg.header, View(pixels, scene), Conditions())
        self._held.append(held)
        return held

    def _accept(
        self, msg: PokeArray | QueryArray, conditions: Conditions, size: tuple[int, int] | None
    ) -> bool:
        """Put valid pokes or queries in force; False, and nothing is changed, for others."""
        try:
            if isinstance(msg, PokeArray):
                pokes = pokes_from_msg(msg, self._value("max_pokes"))
                if size is not None:
                    check_inside("poke", pokes.xy, size)
                conditions.pokes = pokes
            else:
                queries = queries_from_msg(msg)
                if size is not None:
                    check_inside("query", queries, size)
                conditions.queries = queries if len(queries) else None
        except RequestError as error:
            self._report(_kind(msg), str(error))
            return False
        return True

    def _find(self, request: Request) -> HeldImage | None:
        """The held image that a request names; without one the request waits or is refused."""
        stamp_ns = _stamp_ns(request.msg.header)
        for held in reversed(self._held):  # a bag that loops repeats its stamps
            if _stamp_ns(held.header) == stamp_ns:
                return held
        newest_ns = _stamp_ns(self._held[-1].header) if self._held else 0
        on_its_way = stamp_ns > newest_ns
        if on_its_way and time.monotonic() - request.arrived_s < IMAGE_WAIT_S:
            self._waiting.append(request)
            return None
        have = f"{len(self._held)} are held"
        if self._held:
            have += f", from {_seconds(_stamp_ns(self._held[0].header))} to {_seconds(newest_ns)}"
        self._report(
            _kind(request.msg),
            f"the image with stamp {_seconds(stamp_ns)} that they name is not held; {have}",
        )
        return None

    def _answer(self, held: HeldImage) -> None:
        """Publish all outputs that somebody subscribes to."""
        asked = held.named
        pokes = self._standing.pokes if asked.pokes is None else asked.pokes
        try:
            answer = Answer(
                self._model,
                held.view,
                Pokes() if pokes is None else pokes,
                self._standing.queries if asked.queries is None else asked.queries,
                self._settings(),
                self._monitor.stage,
            )
        except RequestError as error:  # standing ones, when the image's size has changed
            self._report("standing", f"no answer: {error}; send new ones, or an empty array")
            return
        for publisher, build in self._outputs:
            if self._inbox.closed:  # whoever waits for the end need not wait for all outputs
                return
            if publisher.get_subscription_count():
                msg = build(answer, held.header)
                with self._monitor.stage("publish"):
                    publisher.publish(msg)
        self._monitor.count("answers")

    def _distribution(self, answer: Answer, header: Header) -> FlowDistribution:
        config = self._model.config
        return distribution_to_msg(
            answer.distribution,
            answer.queries,
            answer.view.size,
            header,
            config.name,
            config.horizon_s,
        )

    @property
    def _model(self) -> FlowPredictor:
        assert self._predictor is not None, "the worker runs only while configured"
        return self._predictor

    def _listened(self) -> bool:
        return any(publisher.get_subscription_count() for publisher, _ in self._outputs)

    def _age_ms(self, header: Header) -> float:
        return (self.get_clock().now().nanoseconds - _stamp_ns(header)) / 1e6

    def _too_old(self, header: Header) -> bool:
        limit = self._value("max_age_ms")
        unstamped = _stamp_ns(header) == 0
        return limit > 0 and not unstamped and self._age_ms(header) > limit

    # ------------------------------------------------------------------------------ reporting

    def _report(self, kind: str, text: str) -> None:
        """Count an error, and log it unless the same kind was logged just now."""
        self._monitor.error(kind, text)
        if self._monitor.due(kind):
            self.get_logger().error(f"{kind}: {text}")

    def _publish_diagnostics(self) -> None:
        facts = {"model": str(self._value("model"))}
        for what, active in self._active_backend().items():
            facts |= {f"{what} requested": str(self._value(what)), f"{what} active": active}
        name = self.get_fully_qualified_name()
        state = self._state_machine.current_state[1]
        status = self._monitor.status(f"{name.lstrip('/')}: inference", name, state, facts)
        msg = DiagnosticArray(status=[status])
        msg.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(msg)


def _stamp_ns(header: Header) -> int:
    return int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)


def _seconds(stamp_ns: int) -> str:
    """Exact, unlike a float."""
    return f"{stamp_ns // 1_000_000_000}.{stamp_ns % 1_000_000_000:09d} s"


def _kind(msg: PokeArray | QueryArray) -> str:
    return "pokes" if isinstance(msg, PokeArray) else "queries"
