# SPDX-License-Identifier: MIT
"""What the node keeps: of arrivals until there is time, of images for requests that name them, and
of what failed."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from threading import Thread
from weakref import ref

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from node_harness import save_small_model, wait_until
from rclpy.logging import get_logger
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from fpt_model import FlowPredictor, load_model
from fpt_msgs.msg import PokeArray, QueryArray
from fpt_msgs.srv import PredictFlow
from fpt_ros.first_thread import FirstThread
from fpt_ros.history import HeldImage, ImageHistory
from fpt_ros.images import ImageError, array_to_image, image_to_rgb
from fpt_ros.inbox import MAX_REQUESTS, Inbox, Request
from fpt_ros.monitor import Monitor
from fpt_ros.pipeline import View


def image(sec: int) -> Image:
    header = Header()
    header.stamp.sec = sec
    return array_to_image(np.full((4, 6, 3), sec, np.uint8), "rgb8", header)


def test_the_inbox_keeps_the_newest_images_and_counts_the_others() -> None:
    inbox = Inbox(max_images=3)
    for sec in range(1, 6):
        inbox.put_image(image(sec))
    came_s = time.monotonic()
    batch = inbox.take()
    assert batch is not None
    assert all(held.arrived_s <= came_s for held in batch.images), "they get old while they wait"
    assert [msg.header.stamp.sec for msg in batch.images] == [3, 4, 5]
    assert batch.superseded == 4
    inbox.put_image(image(6))
    batch = inbox.take()
    assert batch is not None
    assert (len(batch.images), batch.superseded) == (1, 0)
    empty = inbox.take(timeout_s=0.0)
    assert empty is not None
    assert (empty.images, empty.requests, empty.woken) == ([], [], False)


def test_the_oldest_request_makes_room_and_none_is_lost() -> None:
    inbox = Inbox(max_images=1)
    requests = [Request("pokes", PokeArray()) for _ in range(MAX_REQUESTS + 2)]
    displaced = [request for request in requests if inbox.put(request) is not None]
    assert displaced == requests[-2:]
    assert inbox.put(requests[0]) is requests[2]
    batch = inbox.take()
    assert batch is not None
    assert batch.requests == [*requests[3:], requests[0]]
    inbox.put(requests[0])
    inbox.close()
    assert inbox.take() is None
    assert inbox.leftover() == [requests[0]]


def test_pokes_that_newer_ones_replace_make_room_before_what_needs_an_answer() -> None:
    inbox = Inbox(max_images=1)
    service, queries = (
        Request("predict_flow", PredictFlow.Request()),
        Request("queries", QueryArray()),
    )
    pokes = [Request("pokes", PokeArray()) for _ in range(MAX_REQUESTS)]
    for request in (service, queries, *pokes[:-2]):
        assert inbox.put(request) is None
    assert [inbox.put(request) for request in pokes[-2:]] == pokes[:2]
    others = [Request("predict_flow", PredictFlow.Request()) for _ in range(MAX_REQUESTS)]
    dropped = [inbox.put(request) for request in others]
    # the last pokes and the queries stay in force
    assert dropped == [*pokes[2:-1], service, *others[:2]]
    batch = inbox.take()
    assert batch is not None
    assert batch.requests == [queries, pokes[-1], *others[2:]]


def test_the_first_thread_lets_go_of_what_it_has_run() -> None:
    first = FirstThread()
    serving = Thread(target=first.serve)
    serving.start()

    class Model:
        pass

    model = Model()
    alive = ref(model)
    first.call(partial(setattr, model, "used", True))
    del model
    wait_until(lambda: alive() is None)
    first.end()
    serving.join()


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> FlowPredictor:
    path: Path = tmp_path_factory.mktemp("model") / "fpt-test.safetensors"
    return FlowPredictor(load_model(save_small_model(path)))


def test_images_are_encoded_once_and_scenes_outlast_images(predictor: FlowPredictor) -> None:
    encoded: list[int] = []

    def encode(msg: Image) -> View:
        encoded.append(msg.header.stamp.sec)
        pixels = image_to_rgb(msg)
        return View(pixels, predictor.encode(pixels))

    history = ImageHistory(images=3, scenes=2)
    assert history.describe() == "none is held"
    held = [HeldImage(image(sec)) for sec in range(1, 4)]
    for one in held:
        history.add(one)
    first = history.view(held[0], encode)
    assert history.view(held[0], encode) is first
    assert encoded == [1]
    for sec in range(4, 8):
        history.add(HeldImage(image(sec)))
    # 1 is held for its encoding, 2 and 3 not any more
    assert history.find(10**9) is held[0]
    assert history.find(2 * 10**9) is None
    assert history.describe() == "4 are held, from 1.000000000 s to 7.000000000 s"
    for sec in (5, 6):
        found = history.find(sec * 10**9)
        assert found is not None
        history.view(found, encode)
    assert encoded == [1, 5, 6]
    assert held[0].view is None
    assert history.find(10**9) is None
    # of the same stamp the newest
    again = HeldImage(image(7))
    assert history.add(again) is None
    assert history.find(7 * 10**9) is again
    # a bag that starts again: what its stamps would name is of another time
    start = HeldImage(image(3))
    assert history.add(start) == again.header
    assert history.find(3 * 10**9) is start
    assert [history.find(sec * 10**9) for sec in (5, 6, 7)] == [None] * 3
    history.view(again, encode)  # whoever still has it
    assert history.find(7 * 10**9) is None
    # a simulation's first image
    assert history.add(HeldImage(Image())) == start.header


def test_who_keeps_asking_about_an_image_keeps_its_encoding(predictor: FlowPredictor) -> None:
    def encode(msg: Image) -> View:
        pixels = image_to_rgb(msg)
        return View(pixels, predictor.encode(pixels))

    history = ImageHistory(images=1, scenes=2)
    planned, *others = (HeldImage(image(sec)) for sec in range(1, 5))
    history.add(planned)
    view = history.view(planned, encode)
    for other in others:
        history.add(other)
        history.view(other, encode)
        assert history.view(planned, encode) is view
    assert [other.view is None for other in others] == [True, True, False]
    assert history.find(10**9) is planned


def test_an_image_that_cannot_be_read_is_tried_once(predictor: FlowPredictor) -> None:
    tries: list[Image] = []

    def encode(msg: Image) -> View:
        tries.append(msg)
        pixels = image_to_rgb(msg)
        return View(pixels, predictor.encode(pixels))

    history = ImageHistory(images=3, scenes=2)
    held = HeldImage(Image(height=2, width=2, encoding="rgb8"))
    history.add(held)
    for _ in range(2):
        with pytest.raises(ImageError, match="step is 0 bytes"):
            history.view(held, encode)
    assert len(tries) == 1


def test_only_failures_that_go_on_without_an_answer_are_an_error() -> None:
    monitor = Monitor(get_logger("test"), lambda name, ms: None)

    def level(stuck_after_s: float = 0.2) -> bytes:
        return monitor.status("fpt", "fpt", "active", {}, stuck_after_s).level

    monitor.image_received()
    monitor.error("image", "no colour")
    assert level() == DiagnosticStatus.WARN
    time.sleep(0.3)
    assert level() == DiagnosticStatus.ERROR  # also where no other came in this period
    monitor.error("predict_flow", "lies outside")  # an asker's
    assert level() == DiagnosticStatus.ERROR
    monitor.count("predict_flow answered")
    assert level() == DiagnosticStatus.OK
    for _ in range(3):  # what a request meets
        monitor.image_failed()
        time.sleep(0.15)
    assert level() == DiagnosticStatus.ERROR
    time.sleep(2.1)  # nothing is tried any more
    assert level() == DiagnosticStatus.WARN  # no image
    monitor.image_failed()
    assert level() == DiagnosticStatus.WARN
