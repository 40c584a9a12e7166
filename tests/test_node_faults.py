# SPDX-License-Identifier: MIT
"""What goes wrong around a running node: cameras, clocks, disks, models, kills."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from node_harness import Client, Process, save_small_model, wait_until
from node_user import (
    NO_POKES,
    QUERIES,
    RELIABLE,
    User,
    node_command,
    picture,
    running_node,
    values_of,
)
from safetensors.torch import save_file
from sensor_msgs.msg import Image

from fpt_msgs.msg import FlowDistribution
from fpt_ros.environment import claim_domain_id
from fpt_ros.images import array_to_image


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "fpt-test.safetensors")


@pytest.fixture(scope="module")
def user(model: Path) -> Iterator[User]:
    with running_node(model, **RELIABLE) as user:
        user.connect()
        yield user


@pytest.fixture(autouse=True)
def forget(request: pytest.FixtureRequest) -> None:
    if "user" in request.fixturenames:
        request.getfixturevalue("user").forget()


def test_a_camera_that_vanishes_is_reported_and_one_that_returns_answered(user: User) -> None:
    with Client(user.domain, "camera") as camera:
        camera.advertise(Image, "/image", 1)
    user.client.next(
        "/diagnostics", lambda m: m.status[0].message.startswith("no image for "), 30.0
    )
    with Client(user.domain, "camera") as camera:
        camera.advertise(Image, "/image", 1)
        pixels, header = picture(3), user.header()
        camera.publish("/image", array_to_image(pixels, "rgb8", header))
        user.expect_distribution(header, user.expected(pixels, NO_POKES))
    user.check_alive()


def test_the_encoding_may_change(user: User) -> None:
    pixels = picture(4)
    grey = np.repeat(pixels[..., :1], 3, -1)
    opaque = np.full_like(pixels[..., :1], 255)
    for encoding, sent, meant in (
        ("bgr8", pixels[..., ::-1], pixels),
        ("mono8", pixels[..., 0], grey),
        ("rgba8", np.concatenate([pixels, opaque], -1), pixels),
        ("rgb8", pixels, pixels),
    ):
        header = user.header()
        user.client.publish("/image", array_to_image(np.ascontiguousarray(sent), encoding, header))
        user.expect_distribution(header, user.expected(meant, NO_POKES))


def test_images_from_the_future_are_answered_and_reported(user: User) -> None:
    pixels, header = picture(5), user.header(age_s=-3600.0)
    user.send_image(pixels, header)
    user.expect_distribution(header, user.expected(pixels, NO_POKES))
    user.client.next(
        "/diagnostics",
        lambda m: (
            m.status[0].level == DiagnosticStatus.WARN
            and "stamped ahead of the clock" in m.status[0].message
            and int(values_of(m.status[0])["images from the future"]) == 1
        ),
    )
    user.node.wait_for("answered an image stamped 3")
    user.check_alive()  # an image with an earlier stamp is the newest again


def test_images_that_all_fail_become_an_error_in_the_end(user: User) -> None:
    user.check_alive()
    assert user.client.set_parameter("/fpt", "stuck_after_s", 1.0).successful
    levels: list[bytes] = []

    def failing() -> bool:
        unknown = array_to_image(picture(), "rgb8", user.header())
        unknown.encoding = "rgb9"
        user.client.publish("/image", unknown)
        time.sleep(0.1)
        levels.extend(m.status[0].level for m in user.client.received["/diagnostics"])
        status = user.client.received["/diagnostics"][-1].status[0]
        return status.level == DiagnosticStatus.ERROR and status.message.startswith("no answer for")

    user.client.next("/diagnostics")
    wait_until(failing)
    assert DiagnosticStatus.WARN in levels  # a few that fail are the camera's
    assert user.client.set_parameter("/fpt", "stuck_after_s", 5.0).successful
    user.check_alive()
    user.client.received["/diagnostics"].clear()
    user.client.next("/diagnostics", lambda m: m.status[0].level == DiagnosticStatus.OK)


def test_a_hundred_thousand_queries_are_refused(user: User) -> None:
    user.check_alive()
    user.send_queries(np.full((100_000, 2), 5.0))
    user.expect_error("queries", "100000", "16384")
    header = user.send_image(picture(6))  # the standing queries are those before
    assert user.receive("distribution", header).count == len(QUERIES)


def test_huge_and_negative_numbers(user: User) -> None:
    user.check_alive()
    for x in (1e38, -1e38, -1.0):
        user.send_queries(np.array([[x, 3.0]]))
        user.expect_error("queries", "query 0 of 1", f"x={x:g}", "lies outside")
    user.check_alive()


def test_killed_and_started_again(model: Path) -> None:
    """Whoever was connected gets answers from the next process, without doing anything."""
    domain, claim = claim_domain_id()
    command = node_command(model, **RELIABLE)
    with claim, Client(domain) as client:
        client.subscribe(DiagnosticArray, "/diagnostics")
        with Process(command, domain) as node:
            node.wait_for("subscribed to /")
            user = User(client, node, model, domain)
            user.connect()
            os.killpg(node.process.pid, signal.SIGKILL)
        for messages in client.received.values():
            messages.clear()
        with Process(command, domain) as node:
            user.node = node
            node.wait_for("subscribed to /")
            user.shake_hands()
            user.check_alive()
            assert node.interrupt() == 0, node.output
    assert "Traceback" not in node.output


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("truncated", "not a readable safetensors file"),
        ("another", "has no 'fpt_config' in its metadata, is it an FPT model?"),
    ],
    ids=["truncated", "another architecture"],
)
def test_models_that_cannot_be_used(model: Path, tmp_path: Path, content: str, reason: str) -> None:
    """The node says why, stays, and takes a good one."""
    bad = tmp_path / "bad.safetensors"
    if content == "truncated":
        bad.write_bytes(model.read_bytes()[:-1000])
    else:
        save_file({"fc.weight": torch.ones(10, 512)}, bad)
    domain, claim = claim_domain_id()
    with claim, Process(node_command(bad), domain) as node, Client(domain) as client:
        client.subscribe(DiagnosticArray, "/diagnostics")
        node.wait_for("cannot configure with model")
        assert reason in node.output
        failed = client.next(
            "/diagnostics", lambda m: m.status[0].level == DiagnosticStatus.ERROR
        ).status[0]
        assert reason in failed.message
        assert client.set_parameter("/fpt", "model", str(model)).successful
        for transition in (
            Transition.TRANSITION_CONFIGURE,
            Transition.TRANSITION_ACTIVATE,
        ):
            change = ChangeState.Request(transition=Transition(id=transition))
            assert client.call(ChangeState, "/fpt/change_state", change).success
        assert node.interrupt() == 0, node.output
    assert "Traceback" not in node.output


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A file system without room mounted on the folder, where that may be done (as root)."""
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)], check=False
        ).returncode
    )
    try:
        if mounted:
            (folder / "fill").write_bytes(bytes(4096))
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_no_room_for_logs(model: Path, tmp_path: Path) -> None:
    """Neither where the terminal's output goes nor, where it can be tried, in the log's folder."""
    silent = ["env", f"ROS_LOG_DIR={tmp_path}", "sh", "-c", 'exec "$@" >/dev/full 2>&1', "sh"]
    domain, claim = claim_domain_id()
    command = [*silent, *node_command(model, **RELIABLE)]
    with full_disk(tmp_path), claim, Process(command, domain) as node, Client(domain) as client:
        client.subscribe(DiagnosticArray, "/diagnostics")
        client.subscribe(FlowDistribution, "/fpt/distribution")
        client.advertise(Image, "/image", 1)
        client.next("/diagnostics", lambda m: values_of(m.status[0])["state"] == "active")
        user = User(client, node, model, domain)

        def answered() -> bool:
            header = user.send_image(picture(7))
            wrong = array_to_image(picture(7), "rgb8", user.header())
            wrong.encoding = "yuv9"  # which is logged
            client.publish("/image", wrong)
            time.sleep(0.2)
            return any(m.header == header for m in client.received["/fpt/distribution"])

        wait_until(answered)
        client.next("/diagnostics", lambda m: "yuv9" in values_of(m.status[0])["last error"])
        assert node.interrupt() == 0
