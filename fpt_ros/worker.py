# SPDX-License-Identifier: MIT
"""The one thread that does the node's work, for all that is asked of it on any way.

The newest image comes first: it is encoded once and answered on the topics that somebody subscribes
to. Services and actions are worked off in steps, in turns; while images keep coming they get half
of the time.

Pokes and queries with a zero stamp stand: they apply to the newest image and to all after it, until
the next such message; an empty one clears them. With a stamp they apply to the image of that stamp
only, as long as it is held. Requests of services and actions bring their own pokes and queries.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Thread
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rclpy.clock import Clock
from rclpy.impl.rcutils_logger import RcutilsLogger
from rclpy.publisher import Publisher
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

from fpt_model import FlowPredictor
from fpt_model.depth import DepthError
from fpt_msgs.msg import PokeArray
from fpt_ros.depth import DepthHistory, read_depth
from fpt_ros.history import Conditions, HeldImage, ImageHistory, format_stamp, stamp_ns
from fpt_ros.images import ImageError, image_to_rgb
from fpt_ros.inbox import MAX_REQUESTS, Batch, Inbox, Request
from fpt_ros.messages import read_pokes, read_queries
from fpt_ros.monitor import Monitor
from fpt_ros.pipeline import Answer, Settings, View
from fpt_ros.pokes import Pokes, RequestError, check_inside
from fpt_ros.services import ANSWERS, Limits, Steps, Subject

IMAGE_WAIT_S = 1.0
"""Requests that mean an image not yet received wait this long for it."""


class Joinable(Protocol):
    """A thread, or what one does."""

    def join(self) -> None:
        """Wait until it has ended."""


Output = tuple[Publisher, Callable[[Answer, Header], Any]]
"""A publisher, and what makes its message; None: there is none for this answer."""


class Worker:
    """See the module's description.

    Args:
        predictor: what answers.
        outputs: what is published of each answer, if somebody subscribes to it.
        parameter: the present value of a node's parameter, by its name.
        monitor: takes counts, times and errors.
        clock: against which the age of an image is told.
        logger: of tracebacks.
        alive: False when ROS is shutting down, when failures are no news.
        now_s: the clock by which requests arrive and wait for their image.
        camera_info: the latest one, None before the first.
        with_depth: whether images are to have depth: then each waits for its own for a while, as
            long as some keeps coming, and is answered without if there is none.
        begin: runs a function in another thread and returns something to join; None: a new one.
    """

    def __init__(
        self,
        predictor: FlowPredictor,
        outputs: Sequence[Output],
        parameter: Callable[[str], Any],
        monitor: Monitor,
        clock: Clock,
        logger: RcutilsLogger,
        alive: Callable[[], bool],
        now_s: Callable[[], float] = time.monotonic,
        camera_info: Callable[[], CameraInfo | None] = lambda: None,
        with_depth: bool = False,
        begin: Callable[[Callable[[], None]], Joinable] | None = None,
    ) -> None:
        self._predictor, self._outputs, self._parameter = predictor, outputs, parameter
        self._monitor, self._clock, self._logger, self._alive = monitor, clock, logger, alive
        self._now_s = now_s
        self._history = ImageHistory(parameter("image_history"), parameter("scene_history"))
        self._camera_info = camera_info
        self._depths = DepthHistory(parameter("image_history")) if with_depth else None
        self.depth_state = "none yet" if with_depth else "not used"
        self._pending: list[HeldImage] = []  # images that may get their depth, oldest first
        self._current: HeldImage | None = None  # the newest that does not wait for its depth
        self._standing = Conditions()
        self._waiting: list[Request] = []  # for their image
        self._jobs: deque[tuple[Request, Steps]] = deque()
        self._inbox = Inbox(parameter("image_history"))
        self._begin = begin or _begin_thread
        self._running: Joinable | None = None

    # ------------------------------------------------------------ called by the node's callbacks

    def start(self) -> None:
        """Begin to answer."""
        self._inbox = Inbox(self._parameter("image_history"))
        self._running = self._begin(self._run)

    def stop(self) -> None:
        """End after the step at work and refuse what is not answered; what stands is kept."""
        self._inbox.close()
        if self._running is not None:
            self._running.join()
            self._running = None
        unanswered = [*(request for request, _ in self._jobs), *self._waiting]
        for request in [*unanswered, *self._inbox.leftover()]:
            self._refuse(request, RequestError("the node stopped before it could answer"))
        self._jobs.clear()
        self._waiting = []

    @property
    def running(self) -> bool:
        """Between start and stop."""
        return self._running is not None

    def put_image(self, msg: Image | CompressedImage) -> None:
        """Take note of a new image."""
        self._monitor.image_received()
        self._inbox.put_image(msg)

    def put_depth(self, msg: Image) -> None:
        """Take note of a new depth image."""
        self._monitor.count("depth images received")
        self._inbox.put_depth(msg)

    def put(self, request: Request) -> None:
        """Take note of a request; it will be answered, or refused, in any case."""
        displaced = self._inbox.put(request)
        if displaced is None:
            return
        if displaced.stands:  # newer ones wait
            self._monitor.count(f"{displaced.kind} dropped: newer came first")
        else:
            self._refuse(displaced, _too_many())

    def wake(self) -> None:
        """Answer the newest image again, since there is somebody new to hear it."""
        self._inbox.wake()

    # -------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        while (batch := self._inbox.take(self._patience_s())) is not None:
            began = time.monotonic()
            try:
                self.process(batch)
            except Exception as error:  # a defect or a device's failure; the next image may do
                if not self._alive():
                    return
                self._internal(error)
            self.work_off(2 * time.monotonic() - began)

    def _patience_s(self) -> float | None:
        if self._jobs:
            return 0.0
        now_s, wait_s = self._now_s(), self._depth_wait_s
        patience = [r.arrived_s + IMAGE_WAIT_S - now_s for r in self._waiting]
        for held in self._pending:
            left_s = held.arrived_s + wait_s - time.monotonic()
            patience.append(left_s if self._awaits_depth(held) else 0.0)
        return max(0.0, min(patience)) if patience else None

    def process(self, batch: Batch) -> None:
        """Answer what is new on the topics, and queue what services and actions ask."""
        began, model_ms = time.monotonic(), self._monitor.model_ms
        new = self._take_up(batch)
        newest = self._current
        heard = any(publisher.get_subscription_count() for publisher, _ in self._outputs)
        due = bool(new or batch.woken)  # whether the newest is to be answered
        # told before it is encoded, which may take longer than an image may be old
        fresh = due and heard and newest is not None and self._is_fresh(newest, new)
        if fresh and newest is not None:
            # before the requests: standing pokes that came with it are meant for it
            self._open(newest)

        named: list[HeldImage] = []
        requests = [*self._waiting, *batch.requests]
        self._waiting = []
        for request in requests:
            if self._is_cancelled(request):
                continue
            try:
                held = newest if request.stands else self._find(request)
                if request.stands:
                    self._accept(request, self._standing, held)
                    # it follows what was sent for this image alone, or one that is still to come
                    if held is not None:
                        setattr(held.named, request.kind, None)
                    self._waiting = [r for r in self._waiting if r.kind != request.kind]
                    due = True
                elif held is None:
                    self._wait(request)
                elif request.is_command:
                    if heard:
                        self._open(held)
                    self._accept(request, held.named, held)
                    if held not in named:
                        named.append(held)
                else:
                    self._begin_job(request, held)
            except RequestError as error:
                self._refuse(request, error)

        if not heard:
            return
        fresh = fresh or (due and newest is not None and self._is_fresh(newest))
        if fresh and newest is not None and newest not in named:
            named.append(newest)
        for held in named:
            if self._open(held):
                self._answer(held)
        if new and newest is not None and newest in named and newest.view is not None:
            duration_ms = 1e3 * (time.monotonic() - began)
            self._monitor.time("processing time", duration_ms)
            of_model_ms = self._monitor.model_ms - model_ms
            self._monitor.time("overhead time", duration_ms - of_model_ms)
            if stamp_ns(newest.header):
                self._monitor.time("pipeline latency", self._age_ms(newest.header))

    def _take_up(self, batch: Batch) -> bool:
        """Hold what arrived; whether there is a new image to be answered, the current one."""
        for msg in batch.depths:
            if self._depths is not None:
                self._depths.add(msg)
        for image in batch.images:
            before = self._history.add(image)
            if before is not None and self._depths is not None:
                self._depths.set_back(before, image.header)
            self._pending.append(image)
        # the newest that has its depth; if none has, the newest that need not wait for it any more
        ready = [held for held in self._pending if not self._awaits_depth(held)]
        if not ready:
            return False
        with_depth = [held for held in ready if self._depth_of(held) is not None]
        chosen = (with_depth or ready)[-1]
        index = self._pending.index(chosen)
        dropped = index + batch.superseded - max(0, len(batch.images) - 1)
        if dropped:
            self._monitor.count("images dropped: newer came first", dropped)
        del self._pending[: index + 1]
        self._current = chosen
        return True

    def _is_cancelled(self, request: Request) -> bool:
        """Whether nobody wants its answer any more; ended then."""
        if not request.cancelled():
            return False
        self._monitor.count(f"{request.kind} cancelled")
        request.done(RequestError("cancelled"))
        return True

    def work_off(self, until_s: float) -> None:
        """Services and actions in turns: one step, and more until ``until_s`` (monotonic)."""
        while self._jobs and not self._inbox.closed:
            request, steps = self._jobs.popleft()
            try:
                if self._is_cancelled(request):
                    continue
                feedback = next(steps)
                if feedback is not None:
                    request.progress(feedback)
            except StopIteration as end:
                self._monitor.count(f"{request.kind} answered")
                request.done(end.value)
            except RequestError as error:
                self._refuse(request, error)
            except Exception as error:
                self._internal(error)
                request.done(RequestError(f"internal error, {type(error).__name__}: {error}"))
            else:
                self._jobs.append((request, steps))
            if time.monotonic() >= until_s:
                return

    # -------------------------------------------------------------------------------- the images

    def _is_fresh(self, held: HeldImage, new: bool = False) -> bool:
        """Whether an image is young enough to be answered; counts and logs it if a ``new`` is not.

        One from the future may be old for all one knows; it is answered, since nothing better comes
        from such a camera. Like those without a stamp it gets old from when it arrived.
        """
        limit_ms = self._parameter("max_age_ms")
        if not limit_ms:
            return True
        fresh = self._known_age_ms(held) <= limit_ms
        age_ms = self._age_ms(held.header) if stamp_ns(held.header) else 0.0
        if new and abs(age_ms) > limit_ms:
            why = "are the clocks of camera and node the same (use_sim_time)?"
            if age_ms < 0:
                self._monitor.count("images from the future")
                what = f"answered an image stamped {-age_ms:.0f} ms ahead of this node's clock"
            else:
                self._monitor.count("images dropped: too old")
                what = f"dropped an image {age_ms:.0f} ms old"
            self._monitor.warn("image's age", f"{what}, max_age_ms is {limit_ms:g}; {why}")
        return fresh

    def _open(self, held: HeldImage) -> bool:
        """Read and encode an image unless that was done; False, and reported, if it fails."""
        known = held.view is not None or held.error
        try:
            self._history.view(held, self._encode)
        except ImageError as error:
            if not known:
                self._monitor.error("image", str(error))
        except Exception as error:  # a device's failure: whatever else came is not lost by it
            if not self._alive():
                raise
            self._internal(error)
        if held.view is not None and self._depths is not None:
            self._attach_depth(held)
        return held.view is not None

    def _depth_of(self, held: HeldImage) -> Image | None:
        """The depth image that belongs to an image, if it came; kept with it from then on."""
        if self._depths is not None:
            slop_ms = self._parameter("depth_slop_ms")
            held.depth_msg = self._depths.find(held.header, slop_ms, held.depth_msg)
        return held.depth_msg

    def _awaits_depth(self, held: HeldImage) -> bool:
        """Whether its depth, or one that is nearer to it, may still come."""
        if self._depths is None or not self._depths.alive or self._depths.settled(held.header):
            return False
        return time.monotonic() - held.arrived_s < self._depth_wait_s

    @property
    def _depth_wait_s(self) -> float:
        return float(self._parameter("depth_wait_ms")) / 1e3

    def _attach_depth(self, held: HeldImage) -> None:
        """Give an encoded image its depth; if there is none, say why, once."""
        assert held.view is not None
        assert self._depths is not None
        if held.view.depth is not None:
            return
        msg = self._depth_of(held)
        try:
            if msg is None:
                slop_ms = self._parameter("depth_slop_ms")
                raise DepthError(self._depths.describe(held.header, slop_ms))
            held.view.depth = read_depth(msg, self._camera_info(), held.header, held.view.size)
            lag_ms = (stamp_ns(msg.header) - stamp_ns(held.header)) / 1e6
            self.depth_state = f"in use, {lag_ms:+.0f} ms from its image"
        except DepthError as error:
            if held.depth_tried and msg is held.useless_depth:
                return
            held.depth_tried, held.useless_depth = True, msg
            self.depth_state = "none: answering in the image alone"
            self._monitor.error("depth", str(error))

    def _encode(self, msg: Image | CompressedImage) -> View:
        with self._monitor.stage("convert"):
            pixels = image_to_rgb(msg)
        with self._monitor.stage("encode"):
            return View(pixels, self._predictor.encode(pixels))

    def _find(self, request: Request) -> HeldImage | None:
        """The image that a request means; None while it may still come.

        Raises:
            RequestError: it is not held, or too old to be meant by "the newest".
        """
        ns = stamp_ns(request.msg.header)
        newest, late = self._current, self._now_s() - request.arrived_s >= IMAGE_WAIT_S
        if ns:
            held = self._history.find(ns)
            # one of the future is of before the clock was set back, as where a bag starts again
            may_come = (
                newest is None or ns > stamp_ns(newest.header) or self._age_ms(newest.header) < 0
            )
            if held is not None and self._awaits_depth(held) and not late:
                held, may_come = None, True
            why = f"the image with stamp {format_stamp(ns)} is not held; {self._history.describe()}"
        elif newest is None:
            held, may_come, why = None, True, "no image was received"
        else:
            held, may_come = (newest if self._is_fresh(newest) else None), True
            why = (
                f"the newest image is {self._known_age_ms(newest):.0f} ms old, max_age_ms is "
                f"{self._parameter('max_age_ms'):g}; name it by its stamp to ask about it all the "
                "same"
            )
        if held is None and (late or not may_come):
            raise RequestError(why)
        return held

    def _begin_job(self, request: Request, held: HeldImage) -> None:
        if len(self._jobs) >= MAX_REQUESTS:
            oldest = min(self._jobs, key=lambda job: job[0].arrived_s)
            self._jobs = deque(job for job in self._jobs if job is not oldest)
            self._refuse(oldest[0], _too_many())
        self._jobs.append((request, self._steps(request, held)))

    def _wait(self, request: Request) -> None:
        self._waiting.append(request)
        if len(self._waiting) > MAX_REQUESTS:
            self._refuse(self._waiting.pop(0), _too_many())

    def _known_age_ms(self, held: HeldImage) -> float:
        """By its stamp; since it came, if it has none or one of too far in the future."""
        if stamp_ns(held.header):
            age_ms = self._age_ms(held.header)
            if age_ms >= -self._parameter("max_age_ms"):
                return age_ms
        return 1e3 * (time.monotonic() - held.arrived_s)

    def _age_ms(self, header: Header) -> float:
        return (self._clock.now().nanoseconds - stamp_ns(header)) / 1e6

    # ------------------------------------------------------------------------------- the answers

    def _accept(self, request: Request, conditions: Conditions, held: HeldImage | None) -> None:
        """Put valid pokes or queries in force; RequestError, and nothing is changed, for others.

        Those for an image not yet encoded are checked to lie in it when it is answered.
        """
        size = None if held is None else held.size
        if isinstance(request.msg, PokeArray):
            pokes = read_pokes(request.msg.pokes, self._parameter("max_pokes"))
            if size is not None:
                check_inside("poke", pokes.xy, size)
            conditions.pokes = pokes
        else:
            queries = read_queries(request.msg.xy, self._parameter("max_queries"))
            if size is not None and queries is not None:
                check_inside("query", queries, size)
            conditions.queries = queries

    def _asked(self, held: HeldImage) -> tuple[Pokes, NDArray[np.float64] | None]:
        """The pokes and queries in force for an image: those that name it, or that stand."""
        asked, standing = held.named, self._standing
        pokes = standing.pokes if asked.pokes is None else asked.pokes
        queries = standing.queries if asked.queries is None else asked.queries
        return Pokes() if pokes is None else pokes, queries

    def _answer(self, held: HeldImage) -> None:
        """Publish all outputs that somebody subscribes to."""
        assert held.view is not None
        pokes, queries = self._asked(held)
        try:
            answer = Answer(
                self._predictor,
                held.view,
                pokes,
                queries,
                self._settings(),
                self._monitor.stage,
            )
        except RequestError as error:  # standing ones, when the image's size has changed
            self._monitor.error("standing", f"no answer: {error}; send new ones, or an empty array")
            return
        if self._predictor.config.flow_dim == 3:
            try:
                held.view.check_depth(answer.pokes)
            except RequestError as error:
                self._monitor.error("depth", f"{error}: taken as a poke in the image")
        for publisher, build in self._outputs:
            if self._inbox.closed:  # whoever waits for the end need not wait for all outputs
                return
            if publisher.get_subscription_count():
                msg = build(answer, held.header)
                if msg is None:
                    continue
                with self._monitor.stage("publish"):
                    publisher.publish(msg)
        self._monitor.count("answers")

    def _steps(self, request: Request, held: HeldImage) -> Steps:
        """The work on a service's or an action's request."""
        try:
            view = self._history.view(held, self._encode)
        except ImageError as error:
            self._monitor.image_failed()
            raise RequestError(f"the image cannot be read: {error}") from error
        if self._depths is not None:
            self._attach_depth(held)
        subject = Subject(
            self._predictor,
            replace(view),  # depth that comes later changes nothing between the steps
            held.header,
            self._settings(),
            Limits(self._parameter("max_pokes"), self._parameter("max_queries")),
            self._monitor.stage,
        )
        return (yield from ANSWERS[request.kind](request.msg, subject))

    def _settings(self) -> Settings:
        value = self._parameter
        return Settings(
            camera_static=value("camera_static"),
            flow_reduce=value("flow_reduce"),
            dense_size=(value("dense_height"), value("dense_width")),
            query_grid=(value("query_grid_height"), value("query_grid_width")),
            full_resolution=value("full_resolution"),
            kl_threshold_nats=value("kl_threshold_nats") or None,
        )

    # ----------------------------------------------------------------------------- the reporting

    def _refuse(self, request: Request, error: RequestError) -> None:
        self._monitor.error(request.kind, str(error))
        request.done(error)

    def _internal(self, error: Exception) -> None:
        self._monitor.error("internal", f"{type(error).__name__}: {error}")
        self._logger.debug(traceback.format_exc())


def _begin_thread(function: Callable[[], None]) -> Thread:
    thread = Thread(target=function, name="fpt_worker", daemon=True)
    thread.start()
    return thread


def _too_many() -> RequestError:
    return RequestError(f"more than {MAX_REQUESTS} requests wait, dropped the oldest")
