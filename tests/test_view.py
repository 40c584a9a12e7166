# SPDX-License-Identifier: MIT
"""``fpt view``: what is in the recordings that it writes, from bags and from a live node."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rerun
import rerun.chunk
from node_harness import Process, save_small_model, wait_until
from node_user import NO_POKES, POKE, QUERIES, User, picture, running_node
from sensor_msgs.msg import CameraInfo, Image, PointCloud2, PointField
from std_msgs.msg import Header, String
from test_bag import PERIOD_S, Entry, header, image, ns, write_bag

from fpt_model import FlowPredictor, load_model
from fpt_model.depth import Intrinsics
from fpt_model.visualize import ELLIPSE_SIGMAS, MIN_DRAWN_WEIGHT, flow_to_color
from fpt_msgs.msg import FlowDistribution, Poke, PokeArray
from fpt_ros.cli import main
from fpt_ros.environment import claim_domain_id
from fpt_ros.history import stamp_ns
from fpt_ros.images import array_to_image, flat_array
from fpt_ros.markers import Markers, display_camera
from fpt_ros.messages import distribution_to_msg, pokes_to_msg
from fpt_ros.pipeline import Answer, Settings, View
from fpt_ros.rerun_view import TIMELINE, RerunLog, read_points

HALF_PX = 0.5  # from the centre of a pixel, which is ours, to its corner, which is Rerun's


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("view") / "fpt-test.safetensors")


@pytest.fixture(scope="module")
def answer(model: Path) -> Answer:
    predictor = FlowPredictor(load_model(model))
    view = View(picture(0), predictor.encode(picture(0)))
    return Answer(predictor, view, POKE, QUERIES, Settings(dense_size=(12, 16)))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["view", *map(str, arguments)])
        return ended.value.code, *capsys.readouterr()

    return run


def logged(path: Path) -> dict[str, list[tuple[int, Any]]]:
    """Stamps in ns (0: static) and values of each ``entity Archetype:component``."""
    found: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for chunk in rerun.chunk.RrdReader(path).stream():
        batch = chunk.to_record_batch()
        stamps = [0] * batch.num_rows
        if TIMELINE in batch.schema.names:
            stamps = batch.column(TIMELINE).cast("int64").to_pylist()
        for name in batch.schema.names:
            if ":" in name:
                key = f"{chunk.entity_path} {name}".removeprefix("/")
                found[key] += zip(stamps, batch.column(name), strict=True)
    return {key: sorted(rows, key=lambda row: row[0]) for key, rows in found.items()}


def numbers(value: Any) -> np.ndarray:
    """A logged component as an array of its instances."""
    return np.array(value.as_py(), float)


def cloud() -> PointCloud2:
    """Three points, one of them invalid, in two rows with padding; the third moves."""
    names = ("x", "y", "z", "vx", "vy", "vz")
    nan = np.nan
    values = np.array(
        [[0, 0, 1, nan, nan, nan], [nan] * 6, [1, 2, 3, 0.1, 0.2, 0.3], [1, 2, 4, nan, 0, 0]], "<f4"
    )
    rows = np.zeros((2, 2 * 24 + 4), np.uint8)
    rows[:, :48] = values.view(np.uint8).reshape(2, 48)
    return PointCloud2(
        header=header(PERIOD_S),
        height=2,
        width=2,
        fields=[
            PointField(name=name, offset=4 * i, datatype=PointField.FLOAT32, count=1)
            for i, name in enumerate(names)
        ],
        point_step=24,
        row_step=52,
        data=flat_array("B", rows),
    )


def test_bags_are_shown_where_they_belong(run, answer: Answer, tmp_path: Path) -> None:
    size, head = answer.view.size, header(PERIOD_S)
    info = CameraInfo(height=48, width=64)
    info.p[0], info.p[5], info.p[2], info.p[6] = 40.0, 42.0, 31.5, 23.5
    markers = Markers()
    shown = (answer.pokes, QUERIES, answer.distribution, display_camera(info, size))
    nothing = (NO_POKES, np.zeros((0, 2)), answer.distribution[:0], display_camera(info, size))
    later = header(2 * PERIOD_S)
    mask_of_grid = answer.mask_image[::2, ::2].copy()
    inputs = [
        Entry(-1.0, "/pokes", pokes_to_msg(POKE, Header())),  # before any stamp
        Entry(0.0, "/camera_info", info),
        Entry(0.1, "/image", image(0.0, 3)),
        Entry(0.3, "/image", image(PERIOD_S, 0)),
    ]
    outputs = [
        Entry(
            0.5, "/fpt/distribution", distribution_to_msg(answer.distribution, QUERIES, size, head)
        ),
        Entry(0.5, "/fpt/mask", array_to_image(mask_of_grid, "mono8", head)),
        Entry(0.5, "/fpt/overlay", array_to_image(answer.overlay, "rgb8", head)),
        Entry(0.5, "/fpt/flow_color", array_to_image(answer.flow_color, "rgb8", head)),
        Entry(0.5, "/fpt/markers", markers.update(*shown, head, 1.0)),
        Entry(0.5, "/fpt/points", cloud()),
        Entry(0.6, "/fpt/mask", Image(header=later, encoding="mono8")),  # empty, which is refused
        Entry(0.7, "/fpt/markers", markers.update(*nothing, later, 1.0)),
    ]
    first, second = write_bag(tmp_path / "in", inputs), write_bag(tmp_path / "answers", outputs)
    out = tmp_path / "view.rrd"
    code, stdout, stderr = run(first, second, "--out", out)
    assert code == 0, stderr
    assert "/image: 2 messages" in stdout
    assert "not shown: 1; the first: /fpt/mask: image is empty" in stdout
    seen = logged(out)

    camera = "space/camera"
    images = seen[f"{camera}/image Image:buffer"]
    assert [t for t, _ in images] == [ns(0.0), ns(PERIOD_S)]
    np.testing.assert_array_equal(numbers(images[1][1]).ravel(), picture(0).ravel())
    ((stamp, matrix),) = seen[f"{camera} Pinhole:image_from_camera"]
    assert stamp == ns(0.0)
    columns = numbers(matrix).reshape(3, 3)
    np.testing.assert_allclose(columns.T, [[40, 0, 32], [0, 42, 24], [0, 0, 1]])

    ((stamp, origins),) = seen[f"{camera}/pokes Arrows2D:origins"]
    assert stamp == ns(0.0)
    np.testing.assert_allclose(numbers(origins), POKE.xy + HALF_PX)
    ((_, vectors),) = seen[f"{camera}/pokes Arrows2D:vectors"]
    np.testing.assert_allclose(numbers(vectors), POKE.flow)

    mixture = answer.distribution
    drawn = mixture.weights >= MIN_DRAWN_WEIGHT
    arrows = drawn & (np.hypot(*np.moveaxis(mixture.means, -1, 0)) >= 0.5)
    ((stamp, vectors),) = seen[f"{camera}/modes Arrows2D:vectors"]
    assert stamp == ns(PERIOD_S)
    np.testing.assert_allclose(numbers(vectors), mixture.means[arrows], atol=1e-3)
    ((_, origins),) = seen[f"{camera}/modes Arrows2D:origins"]
    np.testing.assert_allclose(numbers(origins), QUERIES[np.nonzero(arrows)[0]] + HALF_PX)
    ((_, strips),) = seen[f"{camera}/covariances LineStrips2D:strips"]
    outlines = np.array(strips.as_py())
    assert len(outlines) == drawn.sum()
    centres = QUERIES[np.nonzero(drawn)[0]] + mixture.means[drawn] + HALF_PX
    off = outlines - centres[:, None]
    inverse = np.linalg.inv(mixture.component_covariances()[drawn])
    distance = np.sqrt(np.einsum("npi,nij,npj->np", off, inverse, off))
    np.testing.assert_allclose(distance, ELLIPSE_SIGMAS, rtol=0.02)

    ((_, mask),) = seen[f"{camera}/mask SegmentationImage:buffer"]
    enlarged = (mask_of_grid > 0).repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(numbers(mask).reshape(size), enlarged)
    ((_, overlay),) = seen["overlay Image:buffer"]
    np.testing.assert_array_equal(numbers(overlay).ravel(), answer.overlay.ravel())
    ((_, flow),) = seen["flow Image:buffer"]
    np.testing.assert_array_equal(numbers(flow).ravel(), flow_to_color(answer.flow).ravel())

    ((_, starts),) = seen["space/markers/pokes Arrows3D:origins"]
    np.testing.assert_allclose(numbers(starts), [[(20 - 31.5) / 40, (10 - 23.5) / 42, 1]])
    ((_, halves),) = seen["space/markers/covariances Ellipsoids3D:half_sizes"]
    assert len(numbers(halves)) == drawn.sum()
    for name in ("pokes", "modes", "covariances"):
        ((stamp, _),) = seen[f"space/markers/{name} Clear:is_recursive"]
        assert stamp == ns(2 * PERIOD_S)
    ((_, points),) = seen["space/points Points3D:positions"]
    np.testing.assert_allclose(numbers(points), [[0, 0, 1], [1, 2, 3], [1, 2, 4]])
    ((_, motion),) = seen["space/points/motion Arrows3D:vectors"]
    np.testing.assert_allclose(numbers(motion), [[0.1, 0.2, 0.3]], rtol=1e-6)


def test_a_live_node_is_shown(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "live.rrd"
    with running_node(model) as user:
        client = user.client
        client.subscribe(FlowDistribution, "/fpt/distribution")
        client.advertise(Image, "/image")
        client.advertise(PokeArray, "/pokes")
        view = Process(
            [sys.executable, "-m", "fpt_ros.cli", "view", "--out", str(out)], user.domain
        )
        with view:
            view.wait_for("shows /image, /camera_info, /pokes, /fpt/distribution")
            sent: list[Header] = []

            def shown() -> bool:  # what was sent before the viewer had all topics is not
                sent.append(_poke_and_answer(user))
                seen = " ".join(logged(out))
                return "camera/image Image" in seen and "camera/mask SegmentationImage" in seen

            wait_until(shown)
            sent.append(_poke_and_answer(user))
            time.sleep(0.5)  # the viewer has the last answer, too
            assert view.interrupt() == 0, view.output
        assert "Traceback" not in view.output
    seen = logged(out)
    for key in ("camera/image Image", "camera/mask SegmentationImage"):
        (rows,) = [rows for name, rows in seen.items() if f"{key}:buffer" in name]
        assert stamp_ns(sent[-1]) in [t for t, _ in rows]
    last = seen["space/camera/pokes Arrows2D:origins"][-1][1]
    np.testing.assert_allclose(numbers(last), POKE.xy + HALF_PX)
    # a nominal camera: the focal length is the image's width
    ((_, matrix),) = seen["space/camera Pinhole:image_from_camera"]
    np.testing.assert_allclose(numbers(matrix).reshape(3, 3)[0], [64, 0, 0])


def _poke_and_answer(user: User) -> Header:
    """An image that was answered with POKE; time passes in which the viewer gets connected."""
    node = user.client.node
    wait_until(lambda: node.count_subscribers("/fpt/mask") and node.count_subscribers("/image") > 1)
    user.send_pokes(POKE)
    head = user.send_image(picture(5))
    user.receive("distribution", head)
    time.sleep(0.3)
    return head


def test_duration_ends_it_where_nothing_comes(tmp_path: Path) -> None:
    out = tmp_path / "silence.rrd"
    command = [sys.executable, "-m", "fpt_ros.cli", "view", "--out", str(out), "--duration", "1"]
    domain, claim = claim_domain_id()
    viewer = Process([*command, "--namespace", "left", "--output", "mask"], domain)
    with claim, viewer as view:
        assert view.process.wait(60) == 0
        wait_until(lambda: "shows" in view.output)
        assert "shows /left/image, /left/camera_info, /left/pokes, /left/fpt/mask" in view.output
    assert "space ViewCoordinates:xyz" in logged(out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{in}", "--out", "{tmp}/v.mcap"], ["v.mcap", ".rrd"]),
        (["{in}", "--out", "{tmp}/no/v.rrd"], ["no/v.rrd", "existing folder"]),
        (["{tmp}/none", "--out", "{tmp}/v.rrd"], ["none", "does not exist"]),
        (["{in}", "--out", "{tmp}/v.rrd", "--connect", "rerun+http://h"], ["received both"]),
        (["{in}", "--out", "{tmp}/v.rrd", "--duration", "1"], ["for live topics"]),
        (["{in}", "--out", "{tmp}/v.rrd"], ["none of /image,", "it has: /chatter (std_msgs/msg/S"]),
        (
            ["{in}", "--image", "/chatter", "--out", "{tmp}/v.rrd"],
            ["is of type std_msgs"],
        ),
        (["{in}", "--output", "masks"], ["one of distribution, mask", "'masks'"]),
        (["{in}", "--connect", "desk:9876"], ["--connect must be", "'desk:9876'"]),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(
    run, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    source = write_bag(tmp_path / "in", [Entry(0, "/chatter", String())])
    code, stdout, stderr = run(*(a.format(**{"in": source, "tmp": tmp_path}) for a in arguments))
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    for word in ("fpt: error: ", *words):
        assert word in stderr
    assert not (tmp_path / "v.rrd").exists()


def test_a_recording_that_is_there_stays(run, tmp_path: Path) -> None:
    source = write_bag(tmp_path / "in", [Entry(0, "/chatter", String())])
    (tmp_path / "v.rrd").write_bytes(b"mine")
    code, _, stderr = run(source, "--out", tmp_path / "v.rrd")
    assert code == 2
    assert "exists already" in stderr
    assert (tmp_path / "v.rrd").read_bytes() == b"mine"


def test_images_without_a_stamp_are_refused() -> None:
    log = RerunLog(rerun.RecordingStream("test"))
    log.log("pokes", pokes_to_msg(POKE, Header()))  # which stands, and waits for an image
    with pytest.raises(ValueError, match="its stamp is 0"):
        log.log("image", array_to_image(np.zeros((4, 6, 3), np.uint8), "rgb8", Header()))
    log.log("image", array_to_image(np.zeros((4, 6, 3), np.uint8), "rgb8", header(0.0)))


def test_what_is_wrong_before_the_first_image_is_named_and_hides_nothing() -> None:
    log = RerunLog(rerun.RecordingStream("test"))
    log.log("pokes", PokeArray(pokes=[Poke(x=np.nan)]))
    camera_info = CameraInfo(height=4, width=6, p=[5.0, 0, 2, 0, 0, 5, 1, 0, 0, 0, 1, 0])
    log.log("camera_info", camera_info)
    with pytest.raises(ValueError, match=r"pokes before the first image: .*nan"):
        log.log("image", array_to_image(np.zeros((4, 6, 3), np.uint8), "rgb8", header(0.0)))
    assert log._camera == ((4, 6), Intrinsics(5, 5, 2, 1))


def test_points_in_another_frame_than_the_image_are_refused() -> None:
    log = RerunLog(rerun.RecordingStream("test"))
    log.log("image", array_to_image(np.zeros((4, 6, 3), np.uint8), "rgb8", header(0.0)))
    moved = cloud()
    log.log("fpt/points", moved)
    moved.header.frame_id = "base_link"
    with pytest.raises(ValueError, match="in the frame 'base_link', expected the image's"):
        log.log("fpt/points", moved)


def test_standing_pokes_of_a_second_bag_are_shown_from_its_first_image(run, tmp_path: Path) -> None:
    black = np.zeros((4, 6, 3), np.uint8)
    late = write_bag(
        tmp_path / "late", [Entry(9.0, "/image", array_to_image(black, "rgb8", header(9.0)))]
    )
    early = write_bag(
        tmp_path / "early",
        [
            Entry(0.5, "/pokes", pokes_to_msg(POKE, Header())),
            Entry(1.0, "/image", array_to_image(black, "rgb8", header(1.0))),
        ],
    )
    code, _, stderr = run(late, early, "--out", tmp_path / "v.rrd")
    assert code == 0, stderr
    rows = logged(tmp_path / "v.rrd")["space/camera/pokes Arrows2D:vectors"]
    assert [stamp for stamp, _ in rows] == [stamp_ns(header(1.0))]


def test_points_that_do_not_fit_are_refused() -> None:
    assert read_points(cloud())["y"][2] == 2
    short, unknown, flat = cloud(), cloud(), cloud()
    short.data = short.data[:-1]
    unknown.fields[0].datatype = 99
    flat.fields = flat.fields[:2]
    for bad, words in ((short, "103 bytes in 2 rows of 52"), (unknown, "99"), (flat, "'x', 'y'")):
        with pytest.raises(ValueError, match=words):
            read_points(bad)
