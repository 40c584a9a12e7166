# SPDX-License-Identifier: MIT
"""Launch files, parameters and RViz set-up; launched for real where `ros2 launch` is present."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from node_harness import (
    ROOT,
    Client,
    Process,
    documented_topics,
    python_module,
    save_small_model,
    wait_until,
)
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CameraInfo, Image

from fpt_msgs.msg import FlowDistribution, PokeArray
from fpt_ros import image_publisher, poke_planner, poke_publisher
from fpt_ros.environment import claim_domain_id
from fpt_ros.images import image_to_array
from fpt_ros.parameters import FPT_PARAMETERS, Spec
from sim import camera_node

LAUNCH_FILES = ("fpt.launch.py", "sim.launch.py")
OUTPUT_TOPICS = {
    f"fpt/{name}" for name in ("overlay", "mask", "flow_color", "influence", "markers", "points")
}
RVIZ_CLASSES = {  # those of plugins_description.xml and the built-in panels that we use
    "rviz_common/Displays",
    "rviz_common/Time",
    "rviz_default_plugins/Image",
    "rviz_default_plugins/Interact",
    "rviz_default_plugins/MarkerArray",
    "rviz_default_plugins/MoveCamera",
    "rviz_default_plugins/Orbit",
    "rviz_default_plugins/PointCloud2",
    "rviz_default_plugins/PublishPoint",
}


def test_the_parameter_file_holds_all_parameters_with_their_defaults() -> None:
    content = yaml.safe_load((ROOT / "config" / "fpt.yaml").read_text())
    values = content["/**"]["ros__parameters"]
    assert values == {spec.name: spec.default for spec in FPT_PARAMETERS}
    assert {k: type(v) for k, v in values.items()} == {
        spec.name: type(spec.default) for spec in FPT_PARAMETERS
    }


def documented(spec: Spec) -> str:
    """A parameter's row in docs/parameters.md."""
    default = str(spec.default).lower() if isinstance(spec.default, bool) else spec.default
    span = ", ".join(spec.choices)
    if spec.minimum is not None:
        span = f"{spec.minimum:,.10g} to {spec.maximum:,.10g}"
    when = "at start" if spec.read_only else "unconfigured" if spec.fixed else "any time"
    kind = type(spec.default).__name__
    return f"| `{spec.name}` | {kind} | {default} | {span} | {when} | {spec.description} |"


@pytest.mark.parametrize(
    ("executable", "specs"),
    [
        ("fpt_node", FPT_PARAMETERS),
        ("sim_camera_node", camera_node.PARAMETERS),
        ("image_publisher", image_publisher.PARAMETERS),
        ("poke_planner", poke_planner.PARAMETERS),
        ("poke_publisher", poke_publisher.PARAMETERS),
    ],
)
def test_documentation_lists_each_parameter(executable: str, specs: tuple[Spec, ...]) -> None:
    page = (ROOT / "docs" / "parameters.md").read_text()
    section = page.split(f"\n## {executable}")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert rows == [documented(spec) for spec in specs]


def test_parameters_are_described_and_bounded() -> None:
    for spec in FPT_PARAMETERS:
        assert spec.description.endswith("."), spec.name
        if type(spec.default) in (int, float):
            assert spec.minimum is not None, spec.name
            assert spec.minimum <= spec.default <= spec.maximum, spec.name


def test_rviz_set_up_shows_our_topics_with_classes_that_exist() -> None:
    content = yaml.safe_load((ROOT / "rviz" / "fpt.rviz").read_text())

    def entries(node: Any) -> list[dict]:
        if isinstance(node, dict):
            return [node] + [found for value in node.values() for found in entries(value)]
        return [found for item in node for found in entries(item)] if isinstance(node, list) else []

    classes = {entry["Class"] for entry in entries(content) if entry.get("Class")}
    assert classes <= RVIZ_CLASSES
    displays = content["Visualization Manager"]["Displays"]
    assert {display["Topic"]["Value"] for display in displays} == OUTPUT_TOPICS | {"image"}


def launch_arguments(file: str) -> dict[str, Any]:
    pytest.importorskip("launch_ros")
    description = runpy.run_path(str(ROOT / "launch" / file))["generate_launch_description"]()
    return {argument.name: argument for argument in description.get_launch_arguments()}


@pytest.mark.parametrize("file", LAUNCH_FILES)
def test_launch_arguments_are_described(file: str) -> None:
    arguments = launch_arguments(file)
    for argument in arguments.values():
        assert argument.description != "no description given", argument.name
        assert argument.description.endswith((".", "]")), argument.name  # "Valid choices are: []"
    assert arguments.keys() >= {
        "namespace",
        "image",
        "camera_info",
        "depth",
        "params_file",
        "use_sim_time",
        "log_level",
    }
    for spec in FPT_PARAMETERS:
        assert arguments[spec.name].description.startswith(spec.description)


needs_ros2 = pytest.mark.skipif(shutil.which("ros2") is None, reason="needs the ros2 command")


def launch(domain: int, file: str, *arguments: str) -> Process:
    patience = ("sigterm_timeout:=60", "sigkill_timeout:=60")  # of launch, on a loaded machine
    return Process(["ros2", "launch", str(ROOT / "launch" / file), *arguments, *patience], domain)


def end(process: Process) -> None:
    assert process.interrupt(timeout_s=90.0) == 0, process.output
    assert "Traceback" not in process.output
    assert "process has died" not in process.output


def test_the_simulated_camera_tells_how_its_scene_moves() -> None:
    truths = []
    for future in (0, 1):
        values = {
            "kind": "door", "width": 160, "height": 120, "rate_hz": 5.0, "frame_id": "eye",
            "future_seed": future,
        }  # fmt: skip
        arguments = [word for k, v in values.items() for word in ("-p", f"{k}:={v}")]
        domain, claim = claim_domain_id()
        camera = Process(python_module("sim.camera_node", *arguments), domain)
        with claim, camera, Client(domain) as client:
            latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
            client.subscribe(PokeArray, "/sim_camera/suggested_poke", latched)
            for topic in ("/image", "/sim_camera/true_flow", "/sim_camera/true_mask"):
                client.subscribe(Image, topic)
            flow = client.next("/sim_camera/true_flow", timeout_s=60.0)
            of_the_same = same_header(flow)
            mask = client.next("/sim_camera/true_mask", of_the_same)
            image = client.next("/image", of_the_same)
            suggested = client.next("/sim_camera/suggested_poke")
            documented = documented_topics("sim_camera_node", "sim_camera")
            assert client.topics_of("sim_camera") == documented
            assert camera.interrupt() == 0, camera.output
        assert flow.header.frame_id == suggested.header.frame_id == "eye"
        assert (image.width, image.height) == (flow.width, flow.height) == (160, 120)
        check_truth(flow, mask, suggested.pokes[0])
        truths.append(image_to_array(flow))
    assert np.nanmax(np.abs(truths[0] - truths[1])) > 1


@pytest.mark.parametrize("name", ["poke_publisher", "image_publisher"])
def test_publishers_have_the_documented_topics(name: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    cv2.imwrite(str(picture), np.zeros((4, 4, 3), np.uint8))
    arguments = ["-p", f"file:={picture}"] if name == "image_publisher" else []
    documented = documented_topics(name, name)
    domain, claim = claim_domain_id()
    process = Process(python_module(f"fpt_ros.{name}", *arguments), domain)
    with claim, process, Client(domain) as client:
        wait_until(lambda: name in client.node.get_node_names())
        wait_until(lambda: client.topics_of(name) == documented)
        assert process.interrupt() == 0, process.output


@needs_ros2
def test_sim_launch_answers_the_suggested_poke(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "fpt-test.safetensors")
    domain, claim = claim_domain_id()
    process = launch(
        domain, "sim.launch.py", f"model:={model}", "threads:=1", "width:=160", "height:=120",
        "rate_hz:=5.0", "max_age_ms:=30000.0",
    )  # fmt: skip
    with claim, process, Client(domain) as client:
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        client.subscribe(PokeArray, "/sim_camera/suggested_poke", latched)
        for topic in ("/image", "/depth", "/sim_camera/true_flow", "/sim_camera/true_mask"):
            client.subscribe(Image, topic)
        client.subscribe(CameraInfo, "/camera_info")
        client.subscribe(PokeArray, "/pokes")
        client.subscribe(FlowDistribution, "/fpt/distribution")
        answer = client.next("/fpt/distribution", timeout_s=120.0)
        assert (answer.header.frame_id, answer.model_name) == ("camera_optical_frame", "fpt-test")
        poke = client.next("/sim_camera/suggested_poke").pokes[0]
        assert client.next("/pokes").pokes[0].x == poke.x
        flow = client.next("/sim_camera/true_flow")
        image = client.next("/image", same_header(flow))
        info = client.next("/camera_info", same_header(flow))
        assert (image.encoding, image.width, image.height) == ("rgb8", 160, 120)
        assert (info.k[2], info.k[5]) == ((160 - 1) / 2, (120 - 1) / 2)
        assert client.next("/depth").encoding == "32FC1"
        assert client.topics_of("sim_camera") == documented_topics("sim_camera_node", "sim_camera")
        end(process)
    check_truth(flow, client.received["/sim_camera/true_mask"][0], poke)


def same_header(of: Image) -> Callable[[Any], bool]:
    return lambda msg: msg.header == of.header


def check_truth(flow: Image, mask: Image, poke: Any) -> None:
    motion, moving = image_to_array(flow), image_to_array(mask) == 255
    x, y = int(poke.x), int(poke.y)
    np.testing.assert_allclose(motion[y, x], (poke.dx, poke.dy), rtol=1e-5)
    assert moving[y, x]
    length = np.hypot(motion[..., 0], motion[..., 1])
    assert np.nanmax(np.where(moving, length, 0)) == length[y, x]
    assert np.nanmax(np.where(moving, 0, length)) < 1e-3  # a static camera


@needs_ros2
def test_fpt_launch_takes_namespace_topic_and_parameters(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "fpt-test.safetensors")
    domain, claim = claim_domain_id()
    process = launch(
        domain, "fpt.launch.py", f"model:={model}", "namespace:=left", "image:=/cam/image_raw",
        "planner:=true",
    )  # fmt: skip
    with claim, process:
        process.wait_for("planning with /left/fpt/evaluate_pokes", 120.0)
        process.wait_for("subscribed to /cam/image_raw, /left/pokes, /left/queries", 120.0)
        assert "model fpt-test (MIT, 0.5 s ahead) on torch, cpu, fp32" in process.output
        end(process)


@needs_ros2
def test_with_required_the_launch_ends_with_any_node(tmp_path: Path) -> None:
    """So that whoever started it, systemd say, starts both again."""
    model = save_small_model(tmp_path / "fpt-test.safetensors")
    domain, claim = claim_domain_id()
    process = launch(
        domain, "fpt.launch.py", f"model:={model}", "planner:=true", "required:=true"
    )  # fmt: skip
    with claim, process:
        process.wait_for("planning with /fpt/evaluate_pokes", 120.0)
        process.wait_for("subscribed to /image", 120.0)
        started = re.search(
            r"poke_planner-\d+\]: process started with pid \[(\d+)\]", process.output
        )
        assert started is not None, process.output
        os.kill(int(started[1]), signal.SIGKILL)
        process.process.wait(90.0)
        process.wait_for("was required: shutting down launched system")
