# SPDX-License-Identifier: MIT
"""The demo as a user runs it: all nodes as processes over DDS, with a small random model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from node_harness import ROOT, save_small_model

from fpt_model import FlowMixture
from fpt_ros.demo import (
    DEFAULT_SCENES,
    MAX_QUERIES_INSIDE,
    MAX_QUERIES_OUTSIDE,
    Shot,
    agreement,
    choose_queries,
    main,
    spread_points,
)
from fpt_ros.pokes import Pokes
from sim.dataset import SEED_STRIDE, SPLITS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("demo") / "small.safetensors")


def processes_that_log_below(folder: Path) -> list[str]:
    """Ids of running processes whose standard output is a file there, by Linux's /proc."""
    found = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            below = output.readlink().is_relative_to(folder)
        except OSError:  # ended meanwhile, or another user's
            continue
        if below:
            found.append(output.parts[2])
    return found


@contextmanager
def demo(out: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The demo as a process; killed with its nodes if it still runs at the end of the context."""
    environment = {k: v for k, v in os.environ.items() if k != "ROS_DOMAIN_ID"}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "fpt_ros.demo", *map(str, arguments), "--out", str(out)],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
            # in process groups of their own
            for node in processes_that_log_below(out.parent / "logs"):
                with suppress(ProcessLookupError):
                    os.kill(int(node), signal.SIGKILL)


def run(out: Path, *arguments: object) -> tuple[int, str, str]:
    with demo(out, *arguments) as process:
        try:
            output, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.terminate()
            output, errors = process.communicate(timeout=60)
            pytest.fail(f"the demo did not end:\n{output}{errors}")
    return process.returncode, output, errors


def test_simulated_scene(tmp_path):
    """With the shipped model, whose answer is near the simulation's truth."""
    out = tmp_path / "overlay.png"
    code, output, errors = run(out, "--scene", "door:31", "--model", "fpt-tiny")
    assert code == 0, output + errors
    assert "scene 1 of 1: door" in output
    summary = re.search(
        r"door: flow error ([\d.]+) px, of no motion ([\d.]+) px; "
        r"IoU of the moving part ([\d.]+); latency \d+ ms \(median of \d+\)",
        output,
    )
    assert summary, output
    error, still_error, iou = map(float, summary.groups())
    assert still_error > 0.5  # the simulation's truth does move
    assert error < still_error
    assert iou > 0.4
    picture = cv2.imread(str(out))
    assert picture.shape[1] > 3 * 480  # three panels of 480 x 360 px
    assert all(panel.std() > 20 for panel in np.array_split(picture, 3, axis=1))
    assert not processes_that_log_below(tmp_path / "logs")
    for name in ("fpt", "sim_camera", "poke_publisher"):
        log = (tmp_path / "logs" / f"{name}.log").read_text()
        assert "Traceback" not in log, log


def test_own_large_picture(model, tmp_path):
    picture = np.full((900, 1600, 3), 200, np.uint8)
    cv2.rectangle(picture, (500, 300), (1100, 700), (60, 90, 180), -1)
    path = tmp_path / "my picture.png"
    cv2.imwrite(str(path), picture)
    out = tmp_path / "overlay.png"
    code, output, errors = run(
        out, "--image", path, "--poke", "800,450,100,0 600,400,100,0", "--model", model
    )
    assert code == 0, output + errors
    assert "reduced to 1280 x 720 px" in output
    assert re.search(r"my picture.png: \d+% of the picture moves with the poke", output), output
    log = (tmp_path / "logs" / "poke_publisher.log").read_text()
    assert "(639.9, 359.9) by (80, 0) px, (479.9, 319.9) by (80, 0) px" in log
    assert cv2.imread(str(out)).shape[1] > 2 * 640


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_demo_ends_its_nodes(model, tmp_path, number):
    with demo(tmp_path / "overlay.png", "--scene", "drawer:6", "--model", model) as process:
        deadline = time.monotonic() + 60
        while len(processes_that_log_below(tmp_path / "logs")) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert not processes_that_log_below(tmp_path / "logs")


def test_node_that_dies_is_named_with_its_log(model, tmp_path):
    code, _, errors = run(tmp_path / "o.png", "--scene", "teapot:1", "--model", model)
    assert code == 1
    assert "sim_camera ended with code" in errors
    assert "teapot" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--scene", "drawer"], "'drawer'"),
        (["--scene", "drawer:-1"], "'drawer:-1'"),
        (["--poke", "1,2,3,4"], "IMAGE=file"),
        (["--image", "{}/box.png"], "POKE=x,y,dx,dy"),
        (["--image", "{}/box.png", "--poke", "1,2,3"], "'1,2,3'"),
        (["--image", "{}/box.png", "--poke", "40,2,3,4"], "32 x 24 px"),
        (["--image", "{}/none.png", "--poke", "1,2,3,4"], "none.png"),
        (["--model", "no-model"], "no-model"),
        (["--model", "{}/box.png"], "checkpoint"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(model, tmp_path, capsys, arguments, named):
    cv2.imwrite(str(tmp_path / "box.png"), np.zeros((24, 32, 3), np.uint8))
    given = [argument.format(tmp_path) for argument in arguments]
    with_model = [] if "--model" in given else ["--model", model]
    out = tmp_path / "demo" / "o.png"
    assert main([*given, *map(str, with_model), "--out", str(out)]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.count("\n") == 1, errors
    assert named in errors


def test_spread_points_lie_inside_and_apart():
    mask = np.zeros((60, 80), bool)
    mask[10:50, 10:70] = True
    points = spread_points(mask, 5)
    columns, rows = points.astype(int).T
    assert mask[rows, columns].all()
    apart = np.linalg.norm(points[:, None] - points, axis=2)[~np.eye(5, dtype=bool)]
    assert apart.min() > 10


@pytest.mark.parametrize(
    ("moving", "count"), [(True, MAX_QUERIES_INSIDE), (False, MAX_QUERIES_OUTSIDE)]
)
def test_there_is_always_something_to_ask(moving, count):
    assert choose_queries(np.full((48, 64), moving)).shape == (count, 2)
    assert spread_points(np.zeros((48, 64), bool), 5).shape == (0, 2)


def shot(flow, mask, true_flow, true_mask):
    """Fields of one row of pixels, given as lists."""
    return Shot(
        image=np.zeros((1, len(mask), 3), np.uint8),
        pokes=Pokes(),
        queries=np.zeros((0, 2)),
        mixture=FlowMixture(np.zeros((0, 1)), np.zeros((0, 1, 2)), np.zeros((0, 1, 2, 2))),
        flow=np.array([flow], np.float32),
        mask=np.array([mask], bool),
        true_flow=None if true_flow is None else np.array([true_flow], np.float32),
        true_mask=None if true_mask is None else np.array([true_mask], bool),
        latencies_ms=[1.0],
    )


def test_agreement_counts_what_stays_visible():
    hidden = (np.nan, np.nan)
    found = agreement(
        shot(
            flow=[(3, 4), (0, 0), (6, 8), (9, 9)],
            mask=[True, False, True, False],
            true_flow=[(3, 4), (3, 4), (0, 0), hidden],
            true_mask=[True, True, False, False],
        )
    )
    assert found is not None
    assert (found.error_px, found.still_error_px) == pytest.approx((5.0, 10 / 3))
    assert found.mask_iou == pytest.approx(1 / 3)
    assert agreement(shot([(0, 0)], [False], None, None)) is None


def test_default_scenes_are_not_training_data():
    for scene in DEFAULT_SCENES:
        kind, seed = scene.split(":")
        assert kind in SPLITS["val"]
        assert int(seed) % SEED_STRIDE == list(SPLITS).index("val")
