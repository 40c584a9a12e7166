# SPDX-License-Identifier: MIT
"""``make demo``: real nodes as processes, and a picture of what they said over ROS.

Starts the FPT node, and for each scene the simulated camera (or a camera that shows the user's own
picture) and the poke publisher. Collects the answers as any subscriber would, draws them beside the
simulation's truth, and prints latency and agreement. Every process is ended again, always.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
from numpy.typing import NDArray
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.time import Time
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from fpt_model.checkpoint import CheckpointError, load_model
from fpt_model.geometry import (
    displacement_normalised_to_pixels,
    displacement_pixels_to_normalised,
    normalised_to_pixels,
    pixels_to_normalised,
)
from fpt_model.mixture import FlowMixture
from fpt_model.visualize import RGBImage, draw_overlay, legend, side_by_side
from fpt_msgs.msg import FlowDistribution, PokeArray, QueryArray
from fpt_ros import environment
from fpt_ros.commands.arguments import UserError, parse_poke
from fpt_ros.commands.media import read_picture
from fpt_ros.images import image_to_array
from fpt_ros.messages import distribution_from_msg, queries_to_msg, read_pokes
from fpt_ros.pokes import Pokes, RequestError, check_inside

DEFAULT_SCENES = ("drawer:1", "door:31", "body:13")  # never trained on: seeds of the "val" split
SCENE_SIZE = (480, 640)  # (height, width) of simulated images, px
MAX_PICTURE_SIDE = (
    1280  # px; larger pictures of the user's are reduced, to pass through DDS fluently
)
TIMED_ANSWERS = 20  # of which the latency's median is taken, ...
TIMED_S = 10.0  # ... or those of this time on a slow machine
TIMEOUT_S = 120.0  # of each step; loading PyTorch and a model takes long on a busy machine
STOP_TIMEOUT_S = 10.0
MAX_QUERIES_INSIDE = 5  # points asked for on the moving part ...
MAX_QUERIES_OUTSIDE = 3  # ... and off it
MAX_INCOMPLETE = 128  # images held until all that is of them has come: 13 s, where cores are busy
PANEL_HEIGHT = 360  # px
NO_POINTS = np.zeros((0, 2))


class DemoError(Exception):
    """The demo cannot go on; the text says why and shows where to look."""


def say(text: str) -> None:
    print(f"[demo] {text}", flush=True)


# ---------------------------------------------------------------------------------- processes


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Signals that would end the demo are acted on after the body.

    By handlers of ours and not by a mask, which child processes would inherit.
    """
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for late in received:
            signal.raise_signal(late)


class Child:
    """A node in a process group of its own, which logs to a file; a context manager."""

    def __init__(self, name: str, module: str, logs: Path, **parameters: str | int) -> None:
        self.name = name
        self.log = logs / f"{name}.log"
        command = [sys.executable, "-m", module, "--ros-args"]
        for key, value in parameters.items():
            command += ["-p", f"{key}:={json.dumps(value)}"]  # quoted as YAML wants it
        command += ["-r", "suggested_poke:=sim_camera/suggested_poke"]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGINT)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def check(self) -> None:
        """DemoError, with the end of its log, when the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise DemoError(f"{self.name} ended with code {code}\n{self.log_tail()}")

    def log_tail(self, lines: int = 15) -> str:
        """The end of what the process wrote."""
        tail = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join([f"--- {self.log}", *tail])


class Children(ExitStack):
    """Child processes of which none is forgotten, whenever a signal comes."""

    def start(self, make: Callable[[], Child]) -> Child:
        """Start a child, which ends with this context."""
        with signals_deferred():
            return self.enter_context(make())

    def __exit__(self, *details: Any) -> bool | None:
        with signals_deferred():
            return super().__exit__(*details)


# ---------------------------------------------------------------------------------- collector


@dataclass
class Shot:
    """One image with everything that was said about it."""

    image: RGBImage
    pokes: Pokes
    queries: NDArray[np.float64]  # [Q, 2] px
    mixture: FlowMixture  # [Q] px
    flow: NDArray[np.float32]  # [H, W, 2] px
    mask: NDArray[np.bool_]  # [H, W]
    true_flow: NDArray[np.float32] | None  # [H, W, 2] px, NaN where hidden; None: not known
    true_mask: NDArray[np.bool_] | None  # [H, W]
    latencies_ms: list[float]  # of the timed answers


class Collector:
    """A node of this process that puts together what belongs to the same image, by its stamp."""

    ANSWERS = ("fpt/distribution", "fpt/flow", "fpt/mask")
    TRUTHS = ("sim_camera/true_flow", "sim_camera/true_mask")

    def __init__(self, context: Context, with_truth: bool) -> None:
        self.node = rclpy.create_node("demo_collector", context=context)
        self._executor = SingleThreadedExecutor(context=context)
        self._executor.add_node(self.node)
        self._topics = ("image", *self.ANSWERS, *(self.TRUTHS if with_truth else ()))
        for topic in self._topics:
            kind = FlowDistribution if topic == "fpt/distribution" else Image
            self.node.create_subscription(kind, topic, partial(self._on_message, topic), 5)
        self.node.create_subscription(PokeArray, "pokes", lambda msg: self.pokes.append(msg), 5)
        self._publisher = self.node.create_publisher(QueryArray, "queries", 1)
        self.start_over()

    def start_over(self) -> None:
        """Forget everything received."""
        self.counts = Counter[str]()
        self.pokes: list[PokeArray] = []
        self.accept_from_now()

    def accept_from_now(self, queries: NDArray[np.float64] | None = None) -> None:
        """Only images from now on count; with ``queries`` [Q, 2] px, which are sent to the node,
        only answers to these."""
        self._since_ns = self._now_ns()
        self._queries = None if queries is None else np.asarray(queries, np.float32).ravel()
        self._incomplete: dict[int, dict[str, Any]] = {}
        self.latest: dict[str, Any] = {}  # by topic, of the newest image that is complete
        self.latencies_ms: list[float] = []  # of complete images, from stamp to last answer
        if queries is not None:
            self._publisher.publish(queries_to_msg(queries, Header()))

    def node_hears_pokes(self) -> bool:
        """Whether somebody besides this collector subscribes to the pokes."""
        return self.node.count_subscribers("pokes") >= 2

    def has_timed_enough(self) -> bool:
        """Whether TIMED_ANSWERS have come, or as many as TIMED_S allows."""
        late = self._now_ns() - self._since_ns > TIMED_S * 1e9
        return len(self.latencies_ms) >= (1 if late else TIMED_ANSWERS)

    def close(self) -> None:
        """Leave ROS."""
        self._executor.shutdown()
        self.node.destroy_node()

    def wait(
        self,
        what: str,
        condition: Callable[[], bool],
        children: Sequence[Child],
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Receive until ``condition`` holds; DemoError when a child ends or time runs out."""
        started = time.monotonic()
        told = started
        while not condition():
            self._executor.spin_once(timeout_sec=0.1)
            for child in children:
                child.check()
            now = time.monotonic()
            if now - started > timeout_s:
                logs = "\n".join(child.log_tail(8) for child in children)
                raise DemoError(
                    f"gave up waiting for {what} after {timeout_s:.0f} s; {self._state()}\n{logs}"
                )
            if now - told > 5.0:
                told = now
                say(f"  still waiting for {what} ({now - started:.0f} s)")

    def _state(self) -> str:
        counts = ", ".join(f"{topic} {self.counts[topic]}" for topic in self._topics)
        return f"messages received: {counts}, pokes {len(self.pokes)}"

    def _is_asked_for(self, msg: FlowDistribution) -> bool:
        return self._queries is None or np.array_equal(msg.queries, self._queries)

    def _now_ns(self) -> int:
        return int(self.node.get_clock().now().nanoseconds)

    def _on_message(self, topic: str, msg: Any) -> None:
        self.counts[topic] += 1
        stamp_ns = Time.from_msg(msg.header.stamp).nanoseconds
        if stamp_ns < self._since_ns:
            return
        if topic == "fpt/distribution" and not self._is_asked_for(msg):
            return
        messages = self._incomplete.setdefault(stamp_ns, {})
        messages[topic] = msg
        if topic in self.ANSWERS:
            messages["answered_ns"] = self._now_ns()
        if messages.keys() >= set(self._topics):
            self.latest = self._incomplete.pop(stamp_ns)
            self.latencies_ms.append((self.latest["answered_ns"] - stamp_ns) / 1e6)
        while len(self._incomplete) > MAX_INCOMPLETE:  # the node answers the newest images only
            del self._incomplete[min(self._incomplete)]


def spread_points(mask: NDArray[np.bool_], count: int) -> NDArray[np.float64]:
    """Up to ``count`` pixels ``[n, 2]`` of a mask, far from each other and from its border."""
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    chosen: list[tuple[int, int]] = []
    room = depth.copy()
    rows, columns = np.indices(mask.shape)
    while len(chosen) < count and room.max() > 2:
        row, column = (int(i) for i in np.unravel_index(np.argmax(room), room.shape))
        chosen.append((column, row))
        room = np.minimum(room, 0.35 * np.hypot(rows - row, columns - column))
    return np.array(chosen, np.float64).reshape(-1, 2)


def choose_queries(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Points ``[Q, 2]`` in px worth asking for: on the predicted moving part, and some off it."""
    return np.concatenate(
        [spread_points(mask, MAX_QUERIES_INSIDE), spread_points(~mask, MAX_QUERIES_OUTSIDE)]
    )


# ------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    """Something to look at: a simulated scene, or a picture with pokes of the user's."""

    title: str
    camera: Callable[[Path], Child]  # starts it, given the folder of logs
    pokes: str  # for the poke publisher; empty: what the simulation suggests
    with_truth: bool


def simulated_scene(text: str) -> Scene:
    """A scene from ``KIND:SEED`` or ``KIND:SEED:FUTURE_SEED``; UserError otherwise."""
    kind, *seeds = text.split(":")
    if len(seeds) not in (1, 2) or not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"a scene must be KIND:SEED or KIND:SEED:FUTURE_SEED, received {text!r}")
    height, width = SCENE_SIZE
    camera = partial(
        Child,
        "sim_camera",
        "sim.camera_node",
        kind=kind,
        seed=int(seeds[0]),
        future_seed=int(seeds[1]) if len(seeds) == 2 else 0,
        height=height,
        width=width,
    )
    return Scene(kind, camera, "", with_truth=True)


def picture_scene(path: Path, pokes: Sequence[str], folder: Path) -> Scene:
    """The user's own picture, reduced into ``folder`` if it is large. UserError for bad input."""
    if not pokes:
        raise UserError("a picture needs a poke, expected POKE=x,y,dx,dy in px")
    picture = read_picture(path)
    height, width = picture.shape[:2]
    values = np.array([parse_poke(text)[:4] for text in pokes])  # a picture has no depth
    try:
        check_inside("poke", values[:, :2], (height, width))
    except RequestError as error:
        raise UserError(f"{path}: {error}") from error
    shrink = min(1.0, MAX_PICTURE_SIDE / max(height, width))
    if shrink < 1:
        size = (round(shrink * width), round(shrink * height))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        say(f"the picture is reduced to {size[0]} x {size[1]} px, and the poke with it")
        values[:, :2] = normalised_to_pixels(
            pixels_to_normalised(values[:, :2], (height, width)), size[::-1]
        )
        values[:, 2:] = displacement_normalised_to_pixels(
            displacement_pixels_to_normalised(values[:, 2:], (height, width)), size[::-1]
        )
    copy = folder / "picture.png"
    cv2.imwrite(str(copy), picture[..., ::-1])
    camera = partial(Child, "image_publisher", "fpt_ros.image_publisher", file=str(copy))
    text = " ".join(",".join(f"{v:.3f}" for v in poke) for poke in values)
    return Scene(path.name, camera, text, with_truth=False)


def observe(scene: Scene, collector: Collector, fpt: Child, logs: Path) -> Shot:
    """Start the scene's camera and poke publisher, and collect what the FPT node answers."""
    collector.start_over()
    with Children() as children:
        say("  starting the camera and the poke publisher")
        camera = children.start(partial(scene.camera, logs))
        publisher = children.start(
            partial(Child, "poke_publisher", "fpt_ros.poke_publisher", logs, pokes=scene.pokes)
        )
        wait = partial(collector.wait, children=[camera, publisher, fpt])
        wait("an image", lambda: collector.counts["image"] > 0)
        wait("the node to subscribe", collector.node_hears_pokes)
        # The publisher may get to know the node later than we do; it repeats the pokes, though.
        collector.pokes.clear()
        wait("the poke", lambda: len(collector.pokes) >= 3)
        collector.accept_from_now()
        say("  poked; waiting for the answer")
        wait("the answer about an image", lambda: bool(collector.latest))
        queries = choose_queries(image_to_array(collector.latest["fpt/mask"]) > 0)
        say(f"  asking how {len(queries)} points move, and timing the answers")
        collector.accept_from_now(queries)
        wait("timed answers", collector.has_timed_enough)
    return _shot(collector, scene.with_truth)


def _shot(collector: Collector, with_truth: bool) -> Shot:
    messages = collector.latest
    queries, mixture = distribution_from_msg(messages["fpt/distribution"])
    true_flow, true_mask = (
        image_to_array(messages[topic]) if with_truth else None for topic in Collector.TRUTHS
    )
    return Shot(
        image=image_to_array(messages["image"]),
        pokes=read_pokes(collector.pokes[-1].pokes),
        queries=queries,
        mixture=mixture,
        flow=image_to_array(messages["fpt/flow"]),
        mask=image_to_array(messages["fpt/mask"]) > 0,
        true_flow=true_flow,
        true_mask=None if true_mask is None else true_mask > 0,
        latencies_ms=collector.latencies_ms,
    )


# ------------------------------------------------------------------------- agreement, pictures


@dataclass(frozen=True)
class Agreement:
    """How near a prediction comes to the simulation's truth."""

    error_px: float  # mean endpoint error over all pixels that stay visible
    still_error_px: float  # the same of predicting no motion
    mask_iou: float


def agreement(shot: Shot) -> Agreement | None:
    """Compare with the truth, where there is one."""
    if shot.true_flow is None or shot.true_mask is None:
        return None
    return Agreement(
        float(np.nanmean(np.linalg.norm(shot.flow - shot.true_flow, axis=2))),
        float(np.nanmean(np.linalg.norm(shot.true_flow, axis=2))),
        float((shot.mask & shot.true_mask).sum() / max(1, (shot.mask | shot.true_mask).sum())),
    )


def draw_row(title: str, shot: Shot, with_captions: bool) -> RGBImage:
    """One scene: the picture with the answers at the queries, then all of it, then the truth."""
    fields = {"predicted flow and moving part": (shot.flow, shot.mask)}
    if shot.true_flow is not None and shot.true_mask is not None:
        fields["true flow and moving part"] = (shot.true_flow, shot.true_mask)
    longest = max(float(np.nanmax(np.linalg.norm(flow, axis=2))) for flow, _ in fields.values())
    faded = cv2.cvtColor(cv2.cvtColor(shot.image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    faded = np.asarray(96 + 0.6 * faded, np.uint8)

    nothing = (NO_POINTS, NO_POINTS, NO_POINTS, None)
    panels = {
        "poke, and how points will move": draw_overlay(
            shot.image, shot.pokes.xy, shot.pokes.flow, shot.queries, shot.mixture
        )
    } | {
        caption: draw_overlay(faded, *nothing, flow, mask, longest)
        for caption, (flow, mask) in fields.items()
    }
    captions = list(panels) if with_captions else [""] * len(panels)
    return side_by_side(list(panels.values()), captions, title, PANEL_HEIGHT)


def row_title(scene: Scene, shot: Shot) -> str:
    """A line on what the row shows."""
    found = agreement(shot)
    if found is None:
        return f"{scene.title}: {shot.mask.mean():.0%} of the picture moves with the poke"
    return (
        f"{scene.title}: flow error {found.error_px:.2f} px, of no motion "
        f"{found.still_error_px:.2f} px; IoU of the moving part {found.mask_iou:.2f}"
    )


def print_summary(scenes: Sequence[Scene], shots: Sequence[Shot]) -> None:
    """Latency and agreement, a line a scene."""
    for scene, shot in zip(scenes, shots, strict=True):
        say(
            f"{row_title(scene, shot)}; latency {np.median(shot.latencies_ms):.0f} ms "
            f"(median of {len(shot.latencies_ms)})"
        )
    say("latency: from an image's stamp until its distribution, flow and moving part are here")


# ---------------------------------------------------------------------------------------- main


def run_demo(scenes: Sequence[Scene], model: str, out: Path, logs: Path) -> None:
    """Observe all scenes and write the picture. Raises DemoError."""
    with Children() as children:
        context = Context()
        rclpy.init(context=context)
        children.callback(rclpy.try_shutdown, context=context)
        collector = Collector(context, all(scene.with_truth for scene in scenes))
        children.callback(collector.close)
        say(f"starting the FPT node with the model {model}")
        fpt = children.start(partial(Child, "fpt", "fpt_ros.node", logs, model=model))
        shots = []
        for number, scene in enumerate(scenes, start=1):
            say(f"scene {number} of {len(scenes)}: {scene.title}")
            shots.append(observe(scene, collector, fpt, logs))
        say("stopping the nodes")
    rows = [
        draw_row(row_title(scene, shot), shot, with_captions=number == 0)
        for number, (scene, shot) in enumerate(zip(scenes, shots, strict=True))
    ]
    if not cv2.imwrite(str(out), stack_rows(rows)[..., ::-1]):
        raise DemoError(f"cannot write {out}")
    print_summary(scenes, shots)
    say(f"wrote {out}")


def stack_rows(rows: Sequence[RGBImage]) -> RGBImage:
    """The rows, of the same or different width, and a legend below."""
    width = max(row.shape[1] for row in rows)
    pads = [((0, 0), (0, width - row.shape[1]), (0, 0)) for row in rows]
    padded = [np.pad(row, pad, constant_values=255) for row, pad in zip(rows, pads, strict=True)]
    return np.concatenate([*padded, legend(width)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0, 1 when it failed, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--image", type=Path, help="a picture of yours, instead of the simulation")
    parser.add_argument(
        "--poke", action="append", default=[], help="x,y,dx,dy in px of the picture; repeatable"
    )
    parser.add_argument(
        "--scene", action="append", help=f"KIND:SEED[:FUTURE_SEED], repeatable; {DEFAULT_SCENES}"
    )
    parser.add_argument("--model", default="fpt-tiny", help="a shipped model or checkpoint file")
    parser.add_argument("--out", type=Path, default=Path("demo/overlay.png"))
    options = parser.parse_args(arguments)

    os.environ.update(environment.defaults())
    logs = options.out.parent / "logs"
    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                before = signal.signal(number, lambda number, _: sys.exit(128 + number))
                stack.callback(signal.signal, number, before)
        if "ROS_DOMAIN_ID" not in os.environ:
            domain, claim = environment.claim_domain_id()
            stack.callback(claim.close)
            os.environ["ROS_DOMAIN_ID"] = str(domain)
        try:
            if not cv2.haveImageWriter(str(options.out)):
                raise UserError(
                    f"--out must end in a picture format such as .png, received {options.out}"
                )
            load_model(options.model)  # only to refuse a bad one before anything is started
            if options.image:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                pokes = [poke for text in options.poke for poke in text.split()]
                scenes = [picture_scene(options.image, pokes, folder)]
            elif options.poke:
                raise UserError("a poke needs a picture, expected IMAGE=file")
            else:
                scenes = [simulated_scene(text) for text in options.scene or DEFAULT_SCENES]
            logs.mkdir(parents=True, exist_ok=True)
            say(f"ROS domain {os.environ['ROS_DOMAIN_ID']}; the nodes' logs are in {logs}")
            run_demo(scenes, options.model, options.out, logs)
        except (UserError, FileNotFoundError, CheckpointError) as error:
            print(f"demo: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except DemoError as error:
            print(f"demo: failed: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
