# SPDX-License-Identifier: MIT
"""``make screenshots``: the pictures of both kinds of view in docs/images, from real nodes.

Starts the simulated camera, the FPT node and the poke publisher. ``fpt view`` records their topics,
and Rerun's viewer draws the recording into a picture, without a screen. RViz needs one: its picture
is drawn here, of what the displays of rviz/fpt.rviz receive and from where its view looks.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
import yaml
from numpy.typing import NDArray
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rerun.experimental import ViewerClient
from sensor_msgs.msg import Image
from visualization_msgs.msg import Marker, MarkerArray

from fpt_model.visualize import RGBImage, resize
from fpt_ros import environment
from fpt_ros.demo import Child, Children, DemoError
from fpt_ros.images import image_to_rgb
from fpt_ros.rerun_view import TIMELINE

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
SCENE: dict[str, str | int] = {"kind": "drawer", "seed": 4, "width": 640, "height": 480}
RECORDED_S = 15.0
TIMEOUT_S = 300.0  # of each step, on a busy machine
NOTICES_S = 20.0  # after which the viewer has taken away its notices, of a software renderer say
RERUN_WIDTH = 1400  # px
RVIZ_VIEW = (720, 720)  # (height, width) px, of the 3-D view
RVIZ_DOCK = 480  # px, width of a column of images
RVIZ_FOV = np.pi / 4  # vertical field of view of rviz's cameras (Ogre's default), rad
BACKGROUND = (48, 48, 48)
RELIABILITY = {
    "Reliable": ReliabilityPolicy.RELIABLE,
    "Best Effort": ReliabilityPolicy.BEST_EFFORT,
}


def main() -> int:
    """Make the pictures; returns the exit code."""
    domain, claim = environment.claim_domain_id()
    os.environ.update(environment.defaults())
    os.environ["ROS_DOMAIN_ID"] = str(domain)
    with (
        claim,
        tempfile.TemporaryDirectory(prefix="fpt_screenshots_") as folder,
    ):
        logs = Path(folder)
        start = partial(Child, logs=logs)
        try:
            with Children() as nodes:
                children = [
                    nodes.start(partial(start, "camera", "sim.camera_node", rate_hz=3.0, **SCENE)),
                    nodes.start(partial(start, "node", "fpt_ros.node", max_age_ms=10000.0)),
                    nodes.start(partial(start, "pokes", "fpt_ros.poke_publisher")),
                ]
                set_up = yaml.safe_load((ROOT / "rviz" / "fpt.rviz").read_text())
                messages = receive(displays(set_up), children)
                recording = record(logs / "view.rrd")
            write(IMAGES / "rviz_displays.png", draw_rviz(set_up, messages))
            write(IMAGES / "view_rerun.png", rerun_picture(recording))
        except DemoError as error:
            print(f"[screenshots] {error}", file=sys.stderr)
            return 1
    return 0


def displays(set_up: dict[str, Any]) -> list[dict[str, Any]]:
    """The enabled displays of an RViz set-up that show images or markers."""
    kinds = ("rviz_default_plugins/Image", "rviz_default_plugins/MarkerArray")
    listed = set_up["Visualization Manager"]["Displays"]
    return [d for d in listed if d["Enabled"] and d["Class"] in kinds]


def receive(wanted: list[dict[str, Any]], children: list[Child]) -> dict[str, Any]:
    """The messages of one image's stamp, by the displays' names."""
    by_stamp: dict[tuple[int, int], dict[str, Any]] = {}
    complete: list[dict[str, Any]] = []

    def take(name: str, msg: Any) -> None:
        if isinstance(msg, MarkerArray) and not any(m.ns == "pokes" for m in msg.markers):
            return  # of an image before the first poke
        stamp = (msg.markers[0] if isinstance(msg, MarkerArray) else msg).header.stamp
        together = by_stamp.setdefault((stamp.sec, stamp.nanosec), {})
        together[name] = msg
        if len(together) == len(wanted):
            complete.append(together)

    rclpy.init()
    try:
        node = rclpy.create_node("screenshots")
        for display in wanted:
            topic = display["Topic"]
            qos = QoSProfile(
                depth=topic["Depth"],
                reliability=RELIABILITY[topic["Reliability Policy"]],
            )
            kind = Image if display["Class"].endswith("/Image") else MarkerArray
            node.create_subscription(kind, topic["Value"], partial(take, display["Name"]), qos)
        end = node.get_clock().now().nanoseconds + int(1e9 * TIMEOUT_S)
        while not complete:
            rclpy.spin_once(node, timeout_sec=0.1)
            for child in children:
                child.check()
            if node.get_clock().now().nanoseconds > end:
                tails = "\n".join(child.log_tail() for child in children)
                raise DemoError(f"the displays received nothing in {TIMEOUT_S:g} s\n{tails}")
        return complete[0]
    finally:
        rclpy.shutdown()


def record(out: Path) -> Path:
    """Let ``fpt view`` record what the nodes say."""
    command = ["-m", "fpt_ros.cli", "view", "--out", str(out), "--duration", str(RECORDED_S)]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if done.returncode:
        raise DemoError(f"fpt view failed:\n{done.stderr}")
    return out


def rerun_picture(recording: Path) -> RGBImage:
    """What Rerun's viewer shows of the end of a recording; its notices have gone by then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    executable = Path(sys.executable).with_name("rerun")
    try:
        viewer = ViewerClient.spawn(headless=True, port=port, executable_path=str(executable))
    except RuntimeError as error:
        raise DemoError(
            f"Rerun cannot draw ({error}); it needs a Vulkan driver (Debian: mesa-vulkan-drivers)"
        ) from error
    try:
        with suppress(TimeoutError):  # it goes on opening
            viewer.open(str(recording))
        time.sleep(NOTICES_S)
        state = viewer.get_state()
        problems = [report.summary for view in state.views for report in view.reports]
        if state.loading or problems:
            raise DemoError(f"Rerun does not show everything: {state.loading} {problems}")
        (timeline,) = (t for t in state.recordings[0].timelines if t.name == TIMELINE)
        viewer.set_time(TIMELINE, timestamp=np.datetime64(timeline.end, "ns"), play_state="paused")
        time.sleep(1.0)
        png = viewer.take_screenshot(max_size=RERUN_WIDTH)
    finally:
        viewer.quit()
    drawn = np.asarray(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR), np.uint8)
    return drawn[..., ::-1]


def draw_rviz(set_up: dict[str, Any], messages: dict[str, Any]) -> RGBImage:
    """The displays' contents: markers in the 3-D view, images in two columns beside it."""
    view = np.full((*RVIZ_VIEW, 3), BACKGROUND, np.uint8)
    docks = []
    for display in displays(set_up):
        msg = messages[display["Name"]]
        if isinstance(msg, MarkerArray):
            draw_markers(view, msg, set_up["Visualization Manager"]["Views"]["Current"])
            title(view, display["Name"])
            continue
        pixels = image_to_rgb(msg)
        height = round(RVIZ_DOCK * pixels.shape[0] / pixels.shape[1])
        dock = resize(pixels, (height, RVIZ_DOCK))
        docks.append(title(dock, f"{display['Name']}  /{display['Topic']['Value']}"))
    columns = [np.vstack(docks[i::2]) for i in range(2)]
    height = max(view.shape[0], *(len(column) for column in columns))
    return np.hstack([_padded(part, height) for part in (*columns, view)])


def orbit(view: dict[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Axes ``[3, 3]`` (rows: right, down, ahead) and place ``[3]`` of RViz's Orbit camera."""
    yaw, pitch = view["Yaw"], view["Pitch"]
    away = np.array([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)])
    place = np.array([view["Focal Point"][axis] for axis in "XYZ"]) + view["Distance"] * away
    right = np.cross(-away, (0, 0, 1))
    right /= np.linalg.norm(right)
    return np.array([right, np.cross(-away, right), -away]), place


def draw_markers(canvas: RGBImage, msg: MarkerArray, view: dict[str, Any]) -> None:
    """Arrows as lines with a head, flat spheres as filled ellipses, in the order of the message."""
    axes, place = orbit(view)
    height, width = canvas.shape[:2]
    focal = height / 2 / np.tan(RVIZ_FOV / 2)

    def project(points: Any) -> NDArray[np.int32]:
        seen = (np.asarray(points, float) - place) @ axes.T
        xy = focal * seen[:, :2] / seen[:, 2:] + ((width - 1) / 2, (height - 1) / 2)
        return np.asarray(xy.round(), np.int32)

    turn = np.linspace(0, 2 * np.pi, 48)
    for marker in (m for m in msg.markers if m.action == Marker.ADD):
        drawn = canvas.copy()
        colour = tuple(int(255 * c) for c in (marker.color.r, marker.color.g, marker.color.b))
        if marker.type == Marker.ARROW:
            start, end = project([(p.x, p.y, p.z) for p in marker.points])
            cv2.arrowedLine(drawn, tuple(start), tuple(end), colour, 2, cv2.LINE_AA, tipLength=0.25)
        else:
            half = 2 * np.arctan2(marker.pose.orientation.z, marker.pose.orientation.w)
            x, y = np.cos(turn) * marker.scale.x / 2, np.sin(turn) * marker.scale.y / 2
            turned = [np.cos(half) * x - np.sin(half) * y, np.sin(half) * x + np.cos(half) * y]
            centre = marker.pose.position
            outline = np.stack([*turned, np.zeros_like(x)], -1)
            outline += (centre.x, centre.y, centre.z)
            cv2.fillPoly(drawn, [project(outline)], colour, cv2.LINE_AA)
        cv2.addWeighted(drawn, marker.color.a, canvas, 1 - marker.color.a, 0, canvas)


def title(picture: RGBImage, text: str) -> RGBImage:
    """A bar with text above a picture's contents, drawn into it; returns the picture."""
    picture[:24] = BACKGROUND
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(picture, text, (8, 17), font, 0.5, (230, 230, 230), 1, cv2.LINE_AA)
    return picture


def _padded(picture: RGBImage, height: int) -> RGBImage:
    below = np.full((height - len(picture), picture.shape[1], 3), BACKGROUND, np.uint8)
    return np.vstack([picture, below])


def write(path: Path, picture: RGBImage) -> None:
    """Write a picture and say so."""
    if not cv2.imwrite(str(path), picture[..., ::-1]):
        raise DemoError(f"cannot write {path}")
    print(f"[screenshots] wrote {path.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
