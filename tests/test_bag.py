# SPDX-License-Identifier: MIT
"""``fpt bag`` on real bags, and the node on a bag that is played in a loop."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
from ament_index_python.packages import get_package_share_directory
from builtin_interfaces.msg import Time as Stamp
from node_harness import ROOT, Client, Process, python_module, save_small_model, wait_until
from node_user import DENSE, HEIGHT, NO_POKES, OTHER_POKE, POKE, QUERIES, SETTINGS, WIDTH, picture
from rclpy.serialization import deserialize_message, serialize_message
from rosbags.interfaces import Qos, QosDurability
from rosbags.rosbag2 import CompressionFormat, CompressionMode, Reader, StoragePlugin, Writer
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from std_msgs.msg import Header, String
from visualization_msgs.msg import Marker, MarkerArray

from fpt_model import FlowPredictor, load_model
from fpt_model.depth import Depth, Intrinsics
from fpt_msgs.msg import FlowDistribution, ModelInfo, PokeArray
from fpt_ros.bag import BagError, find_inputs, message_types, open_bag
from fpt_ros.cli import main
from fpt_ros.environment import claim_domain_id
from fpt_ros.history import stamp_ns
from fpt_ros.images import array_to_image, image_to_array
from fpt_ros.messages import distribution_from_msg, pokes_to_msg, queries_to_msg
from fpt_ros.names import full_name, type_name
from fpt_ros.outputs import Outputs
from fpt_ros.pipeline import Answer, View
from fpt_ros.pokes import Pokes
from fpt_ros.scene_outputs import FIELDS

START_S, PERIOD_S = 1000, 0.25
SMALL = [
    *("--param", f"dense_height:={DENSE[0]}", "--param", f"dense_width:={DENSE[1]}"),
    *("--param", "query_grid_height:=3", "--param", "query_grid_width:=4"),
]


def ns(seconds: float) -> int:
    return round((START_S + seconds) * 1e9)


def header(seconds: float | None) -> Header:
    """That of an image, or of pokes for the image, taken then; None: no stamp."""
    t = 0 if seconds is None else ns(seconds)
    return Header(stamp=Stamp(sec=t // 10**9, nanosec=t % 10**9), frame_id="camera")


def image(seconds: float, seed: int) -> Image:
    return array_to_image(picture(seed), "rgb8", header(seconds))


def jpeg(seconds: float, seed: int) -> CompressedImage:
    _, data = cv2.imencode(".png", picture(seed)[..., ::-1])
    return CompressedImage(header=header(seconds), format="png", data=data.tobytes())


class Entry(NamedTuple):
    """A message of a bag; bytes stand for a damaged one of the type named."""

    seconds: float
    topic: str
    message: Any
    type: str = ""


def write_bag(path: Path, entries: Sequence[Entry], storage: str = "mcap") -> Path:
    """A bag folder as `ros2 bag record` writes."""
    store = message_types()
    plugin = StoragePlugin.MCAP if storage == "mcap" else StoragePlugin.SQLITE3
    writer = Writer(path, version=9, storage_plugin=plugin)
    if storage == "mcap":
        writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
    with writer:
        connections = {}
        for entry in entries:
            kind = entry.type or type_name(type(entry.message))
            if entry.topic not in connections:
                connections[entry.topic] = writer.add_connection(entry.topic, kind, typestore=store)
            data = entry.message
            if not isinstance(data, bytes):
                data = serialize_message(data)
            writer.write(connections[entry.topic], ns(entry.seconds), data)
    return path


def read_bag(path: Path) -> list[tuple[str, int, bytes]]:
    with Reader(path) as reader:
        return [(c.topic, t, bytes(data)) for c, t, data in reader.messages()]


def of_topic(messages: list[tuple[str, int, bytes]], topic: str, kind: type) -> list[Any]:
    return [deserialize_message(data, kind) for name, _, data in messages if name == topic]


# Recorded at, stamped, what. Images at 0, 1, 2 ... periods; a recorder gets each a little later.
LATE = 0.01
ENTRIES = [
    Entry(-0.1, "/pokes", pokes_to_msg(POKE, header(None))),  # stands before any image
    Entry(0 * PERIOD_S + LATE, "/image", image(0 * PERIOD_S, 0)),
    Entry(1 * PERIOD_S + LATE, "/image", image(1 * PERIOD_S, 1)),
    # names an image that is still to come
    Entry(1.5 * PERIOD_S, "/pokes", pokes_to_msg(OTHER_POKE, header(2 * PERIOD_S))),
    Entry(2 * PERIOD_S + LATE, "/image", image(2 * PERIOD_S, 2)),
    Entry(3 * PERIOD_S + LATE, "/image", image(3 * PERIOD_S, 3)),
    # names an image that was answered with what stood
    Entry(3.2 * PERIOD_S, "/pokes", pokes_to_msg(OTHER_POKE, header(1 * PERIOD_S))),
    Entry(3.4 * PERIOD_S, "/queries", queries_to_msg(QUERIES, header(None))),  # from image 3 on
    Entry(4 * PERIOD_S + LATE, "/image", image(4 * PERIOD_S, 4)),
    Entry(4.5 * PERIOD_S, "/pokes", PokeArray()),  # forget; image 4 is answered again
    Entry(5 * PERIOD_S + LATE, "/image", image(5 * PERIOD_S, 5)),
]
# By that: number of the image, pokes, queries; in the order of the answers.
ANSWERS: list[tuple[int, Pokes, np.ndarray | None]] = [
    (0, POKE, None),
    (1, POKE, None),
    (2, OTHER_POKE, None),
    (3, POKE, None),
    (1, OTHER_POKE, None),
    (3, POKE, QUERIES),
    (4, POKE, QUERIES),
    (4, NO_POKES, QUERIES),
    (5, NO_POKES, QUERIES),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("bag") / "fpt-test.safetensors")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[tuple[Header, Answer]]:
    """The predictor's own answers to ENTRIES, by the rule of docs/messages.md."""
    predictor = FlowPredictor(load_model(model))
    views = {i: View(picture(i), predictor.encode(picture(i))) for i in range(6)}
    return [
        (header(i * PERIOD_S), Answer(predictor, views[i], pokes, queries, SETTINGS))
        for i, pokes, queries in ANSWERS
    ]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["bag", *map(str, arguments)])
        return ended.value.code, *capsys.readouterr()

    return run


def check_answers(messages: list[tuple[str, int, bytes]], expected, namespace: str = "") -> None:
    distributions = of_topic(messages, f"{namespace}/fpt/distribution", FlowDistribution)
    assert [stamp_ns(m.header) for m in distributions] == [stamp_ns(h) for h, _ in expected]
    masks = of_topic(messages, f"{namespace}/fpt/mask", Image)
    flows = of_topic(messages, f"{namespace}/fpt/flow", Image)
    for (its_header, answer), distribution, mask, flow in zip(
        expected, distributions, masks, flows, strict=True
    ):
        assert distribution.header == mask.header == flow.header == its_header
        queries, mixture = distribution_from_msg(distribution)
        np.testing.assert_allclose(queries, answer.queries, atol=1e-4)
        np.testing.assert_allclose(mixture.weights, answer.distribution.weights, atol=1e-4)
        np.testing.assert_allclose(mixture.means, answer.distribution.means, atol=1e-3)
        np.testing.assert_allclose(image_to_array(flow), answer.flow, atol=1e-3)
        assert (image_to_array(mask) == answer.mask_image).mean() > 0.999


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_images_and_pokes_are_joined_as_in_the_node(
    run, model: Path, expected, tmp_path: Path, storage: str
) -> None:
    source, out = write_bag(tmp_path / "in", ENTRIES, storage), tmp_path / "out.mcap"
    code, stdout, stderr = run(source, "--out", out, "--model", model, *SMALL)
    assert code == 0, stderr
    assert "6 images read" in stdout
    assert "refused" not in stdout
    assert f"{len(ENTRIES)}/{len(ENTRIES)} messages" in stderr
    messages = read_bag(out)
    check_answers(messages, expected)
    # all outputs of the node, recorded when that was which called for them
    names = Outputs(load_model(model).config, float, None, print).table.keys()  # type: ignore[arg-type]
    assert {topic for topic, _, _ in messages} == {f"/fpt/{name}" for name in (*names, "info")}
    times = [t for topic, t, _ in messages if topic == "/fpt/mask"]
    called = [0 * PERIOD_S + LATE, 1 * PERIOD_S + LATE, 2 * PERIOD_S + LATE, 3 * PERIOD_S + LATE]
    called += [3.2 * PERIOD_S, 3.4 * PERIOD_S, 4 * PERIOD_S + LATE, 4.5 * PERIOD_S]
    assert times == [ns(t) for t in [*called, 5 * PERIOD_S + LATE]]
    (info,) = of_topic(messages, "/fpt/info", ModelInfo)
    assert (info.model_name, info.licence) == ("fpt-test", "MIT")
    assert not list(tmp_path.glob(".*")), "what was written meanwhile is left"


def test_the_same_bag_gives_the_same_bytes_in_another_process(
    run, model: Path, tmp_path: Path
) -> None:
    source = write_bag(tmp_path / "in", ENTRIES)
    first, second = tmp_path / "first.mcap", tmp_path / "second.mcap"
    single_file = source / "in.mcap"
    assert run(single_file, "--out", first, "--model", model, *SMALL)[0] == 0
    arguments = ["bag", source, "--out", second, "--model", model, *SMALL]
    subprocess.run(
        [sys.executable, "-m", "fpt_ros.cli", *map(str, arguments)], cwd=ROOT, check=True
    )
    messages = read_bag(first)
    assert len(messages) > 9 * 7
    assert messages == read_bag(second)


def test_compressed_images_namespace_and_what_is_written(
    run, model: Path, expected, tmp_path: Path
) -> None:
    """The same answers, of lossless compressed images under names of one's own."""
    names = {"/image": "/left/cam/compressed", "/pokes": "/left/pokes", "/queries": "/ask"}
    entries = [
        e._replace(
            topic=names[e.topic],
            message=jpeg(round((e.seconds - LATE) / PERIOD_S) * PERIOD_S, i)
            if (i := round((e.seconds - LATE) / PERIOD_S)) >= 0 and e.topic == "/image"
            else e.message,
        )
        for e in ENTRIES
    ]
    source, out = write_bag(tmp_path / "in", entries), tmp_path / "out.mcap"
    code, _, stderr = run(
        source, "--out", out, "--model", model, *SMALL, "--namespace", "left",
        "--image", "cam/compressed", "--queries", "/ask", "--copy-inputs",
        *("--output", "flow", "--output", "mask", "--output", "distribution"),
    )  # fmt: skip
    assert code == 0, stderr
    messages = read_bag(out)
    check_answers(messages, expected, "/left")
    copied = [m for m in messages if m[0] in names.values()]
    assert sorted(copied) == sorted(read_bag(source))
    assert {topic for topic, _, _ in messages} == {
        *("/left/fpt/flow", "/left/fpt/mask", "/left/fpt/distribution", "/left/fpt/info"),
        *names.values(),
    }
    with Reader(out) as reader:
        qos: dict[str, Qos] = {
            c.topic: c.ext.offered_qos_profiles[0] for c in reader.connections if "/fpt/" in c.topic
        }
    assert qos["/left/fpt/info"].durability == QosDurability.TRANSIENT_LOCAL
    assert qos["/left/fpt/mask"].durability == QosDurability.VOLATILE


def test_a_poke_of_the_command_line_and_intrinsics(run, model: Path, tmp_path: Path) -> None:
    info = CameraInfo(height=48, width=64)
    info.p[0], info.p[5], info.p[2], info.p[6] = 32.0, 32.0, 31.5, 23.5
    entries = [
        Entry(0.0, "/camera_info", info),
        Entry(0.1, "/image", image(0.0, 0)),
        Entry(0.2, "/other", String(data="is none of ours")),
    ]
    out = tmp_path / "out.mcap"
    arguments = ("--model", model, "--output", "markers", "--poke", "20,10,9,-4")
    code, _, stderr = run(write_bag(tmp_path / "in", entries), "--out", out, *arguments)
    assert code == 0, stderr
    (array,) = of_topic(read_bag(out), "/fpt/markers", MarkerArray)
    (poke,) = (m for m in array.markers if (m.ns, m.action) == ("pokes", Marker.ADD))
    start, end = poke.points
    got = [start.x, start.y, end.x - start.x, end.y - start.y]
    np.testing.assert_allclose(got, np.array([20 - 31.5, 10 - 23.5, 9, -4]) / 32)


def test_an_image_takes_its_depth_whenever_that_was_recorded(run, tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "fpt-test-3d.safetensors", flow_dim=3)
    camera = Intrinsics(60.0, 62.0, 31.0, 24.5)
    info = CameraInfo(header=header(None), height=HEIGHT, width=WIDTH)
    info.p[0], info.p[5], info.p[2], info.p[6], info.p[10] = 60.0, 62.0, 31.0, 24.5, 1.0

    def metres(i: int) -> np.ndarray:
        return np.linspace(1 + i, 2 + i, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)

    def depth(i: int, late_s: float = 0.0) -> Image:
        return array_to_image(metres(i), "32FC1", header(i + late_s))

    entries = [
        Entry(0.0, "/camera_info", info),
        Entry(0.0, "/pokes", pokes_to_msg(POKE, header(None))),
        Entry(0.1, "/image", image(0, 0)),
        Entry(0.2, "/depth", depth(0, 0.01)),  # after its image
        Entry(0.9, "/depth", depth(1, -0.01)),  # before it
        Entry(1.1, "/image", image(1, 1)),
        Entry(1.2, "/depth", serialize_message(depth(1))[:99], "sensor_msgs/msg/Image"),
        Entry(2.1, "/image", image(2, 2)),  # has none
        Entry(4.0, "/image", image(3, 3)),
        Entry(5.0, "/depth", depth(3)),  # after a later image than its own
    ]
    out = tmp_path / "out.mcap"
    code, stdout, stderr = run(
        write_bag(tmp_path / "in", entries), "--out", out, "--model", model, *SMALL,
        *("--output", "points", "--output", "occlusion", "--output", "mask", "--copy-inputs"),
    )  # fmt: skip
    assert code == 0, stderr
    messages = read_bag(out)
    assert sorted(m for m in messages if not m[0].startswith("/fpt/")) == sorted(
        read_bag(tmp_path / "in")
    )
    masks = of_topic(messages, "/fpt/mask", Image)
    assert [stamp_ns(m.header) for m in masks] == [ns(i) for i in range(4)]
    clouds = of_topic(messages, "/fpt/points", PointCloud2)
    assert [stamp_ns(m.header) for m in clouds] == [ns(0), ns(1), ns(3)]
    assert len(of_topic(messages, "/fpt/occlusion", Image)) == 3
    predictor = FlowPredictor(load_model(model))
    for i, cloud in zip((0, 1, 3), clouds, strict=True):
        view = View(picture(i), predictor.encode(picture(i)), Depth(metres(i), camera))
        expected = Answer(predictor, view, POKE, None, SETTINGS).scene_flow
        found = np.frombuffer(cloud.data, np.float32).reshape(-1, len(FIELDS))
        np.testing.assert_allclose(found[:, :3], expected.points, rtol=1e-5)
        np.testing.assert_allclose(found[:, 3:6], expected.flow, atol=1e-4)
    assert "refused, depth: 1; the first: no depth within 20 ms of the image's stamp" in stdout
    assert "refused, malformed: 1" in stdout


def without_index(source: Path, to: Path) -> Path:
    """A bag as one MCAP file without chunks and summary, as a fast recorder leaves it."""

    def record(opcode: int, content: bytes) -> bytes:
        return struct.pack("<BQ", opcode, len(content)) + content

    def text(value: str) -> bytes:
        return struct.pack("<I", len(value.encode())) + value.encode()

    magic = b"\x89MCAP0\r\n"
    parts = [magic, record(1, text("ros2") + text("test"))]
    with Reader(source) as bag:
        channels = {}
        for number, connection in enumerate(bag.connections, start=1):
            channels[connection.id] = number
            definition = connection.msgdef.data.encode()
            schema = struct.pack("<H", number) + text(connection.msgtype) + text("ros2msg")
            parts.append(record(3, schema + struct.pack("<I", len(definition)) + definition))
            channel = struct.pack("<HH", number, number) + text(connection.topic) + text("cdr")
            parts.append(record(4, channel + struct.pack("<I", 0)))
        for order, (connection, at, data) in enumerate(bag.messages()):
            head = struct.pack("<HIQQ", channels[connection.id], order, at, at)
            parts.append(record(5, head + data))
    parts += [record(15, bytes(4)), record(2, bytes(20)), magic]
    to.write_bytes(b"".join(parts))
    return to


def test_depth_is_found_in_a_bag_without_an_index(run, tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "fpt-test-3d.safetensors", flow_dim=3)
    depth = np.ones((HEIGHT, WIDTH), np.float32)
    info = CameraInfo(header=header(None), height=HEIGHT, width=WIDTH)
    info.p[0], info.p[5], info.p[2], info.p[6], info.p[10] = 60.0, 62.0, 31.0, 24.5, 1.0
    entries = [Entry(0, "/camera_info", info)]
    entries += [
        entry
        for i in range(3)
        for entry in (
            Entry(i, "/image", image(i, i)),
            Entry(i + 0.1, "/depth", array_to_image(depth, "32FC1", header(i))),
        )
    ]
    source = without_index(write_bag(tmp_path / "in", entries), tmp_path / "plain.mcap")
    out = tmp_path / "out.mcap"
    code, stdout, stderr = run(
        source, "--out", out, "--model", model, *SMALL, "--output", "occlusion"
    )
    assert code == 0, stderr
    assert "3 images read" in stdout
    found = of_topic(read_bag(out), "/fpt/occlusion", Image)
    assert [stamp_ns(m.header) for m in found] == [ns(i) for i in range(3)]


def test_a_planar_model_leaves_alone_what_is_called_depth(run, model: Path, tmp_path: Path) -> None:
    entries = [Entry(0.0, "/image", image(0, 0)), Entry(0.0, "/depth", String(data="of the sea"))]
    source, out = write_bag(tmp_path / "in", entries), tmp_path / "out.mcap"
    arguments = ("--model", model, "--output", "mask", "--copy-inputs")
    code, _, stderr = run(source, "--out", out, *arguments)
    assert code == 0, stderr
    assert {topic for topic, _, _ in read_bag(out)} == {"/image", "/fpt/info", "/fpt/mask"}


def test_depth_needs_a_model_that_takes_it(run, model: Path, tmp_path: Path) -> None:
    entries = [
        Entry(0.0, "/image", image(0, 0)),
        Entry(0.0, "/d", array_to_image(np.ones((48, 64), np.float32), "32FC1", header(0))),
    ]
    source, out = write_bag(tmp_path / "in", entries), tmp_path / "out.mcap"
    code, _, stderr = run(source, "--out", out, "--model", model, "--depth", "/d")
    assert code == 2
    assert "--depth needs a three-dimensional model, received fpt-test" in stderr
    assert not out.exists()


def test_what_cannot_be_read_is_counted_and_the_rest_answered(
    run, model: Path, tmp_path: Path
) -> None:
    good = serialize_message(image(0.0, 0))
    wrong_step = image(0.2, 1)
    wrong_step.step = 1
    entries = [
        Entry(0.0, "/image", image(0.0, 0)),
        Entry(0.1, "/image", good[: len(good) // 2]),
        Entry(0.15, "/image", b""),
        Entry(0.2, "/image", wrong_step),
        Entry(0.3, "/pokes", b"\x00\x01\x00\x00\xff\xff\xff\xff", "fpt_msgs/msg/PokeArray"),
        Entry(0.4, "/pokes", pokes_to_msg(Pokes(np.array([[99, 9]]), np.ones((1, 2))), header(0))),
        Entry(0.5, "/pokes", pokes_to_msg(POKE, header(0.9))),  # its image never comes
        Entry(0.6, "/image", image(0.6, 2)),
    ]
    entries = [
        e._replace(type="sensor_msgs/msg/Image") if e.topic == "/image" else e for e in entries
    ]
    source, out = write_bag(tmp_path / "in", entries), tmp_path / "out.mcap"
    code, stdout, stderr = run(source, "--out", out, "--model", model, "--output", "mask")
    assert code == 0, stderr
    masks = of_topic(read_bag(out), "/fpt/mask", Image)
    assert [stamp_ns(m.header) for m in masks] == [ns(0.0), ns(0.6)]
    refused = [line for line in stdout.splitlines() if line.startswith("refused")]
    assert len(refused) == 3, stdout
    assert "refused, image: 1; the first: image step is 1 bytes, expected at least 192" in stdout
    first = f"{len(good) // 2} bytes on /image at {ns(0.1)} ns are no sensor_msgs/msg/Image"
    assert f"refused, malformed: 3; the first: {first}" in stdout
    assert "refused, pokes: 2; the first: poke 0 of 1 at x=99, y=9 px lies outside" in stdout


TOPICS_OF_BAG = "the bag has: /image (sensor_msgs/msg/Image); /pokes (std_msgs/msg/String)"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["{in}", "--image", "/cam"],
            ["/cam for 'image' is not in the bag", "/msg/CompressedImage"],
        ),
        (["{in}", "--pokes", "/asked"], ["/asked for 'pokes' is not in the bag"]),
        (["{in}"], ["/pokes for 'pokes' is of type std_msgs/msg/String, expected fpt_msgs"]),
        (["{in}", "--image", "/pokes"], ["is of type std_msgs/msg/String"]),
        (["{in}", "--namespace", "left"], ["/left/image for 'image' is not in the bag"]),
    ],
)
def test_topics_that_do_not_fit_are_named_with_those_there_are(
    run, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    entries = [Entry(0, "/image", image(0, 0)), Entry(1, "/pokes", String())]
    source = str(write_bag(tmp_path / "in", entries))
    code, stdout, stderr = run(
        *(a.replace("{in}", source) for a in arguments), "--out", tmp_path / "out.mcap"
    )
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    for word in (*words, TOPICS_OF_BAG):
        assert word in stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/none"], ["none", "does not exist"]),
        (["{tmp}"], ["metadata"]),
        (["{tmp}/text.mcap"], ["cannot read the bag", "text.mcap"]),
        (["{tmp}/text.db3"], ["cannot read the bag", "text.db3"]),
        (["{tmp}/text.txt"], [".txt"]),
        (["{tmp}/cut.mcap"], ["cannot read the bag", "cut.mcap"]),
        (["{in}", "--out", "{tmp}/there.mcap"], ["there.mcap", "exists already"]),
        (["{in}", "--out", "{tmp}/no/o.mcap"], ["no/o.mcap", "existing folder"]),
        (["{in}", "--out", "{tmp}/o.bag"], ["o.bag", ".mcap file"]),
        (["{in}", "--output", "masks"], ["'masks'", "'mask'", "'overlay'"]),
        (["{in}", "--output", "points"], ["'points' needs a three-dimensional model", "--depth"]),
        (["{in}", "--poke", "1,2"], ["'1,2'", "x,y,dx,dy"]),
        (["{in}", "--poke", "9,9,1,0,-0.3"], ["needs a three-dimensional model", "dz=-0.3"]),
        (["{in}", "--param", "dense_width=3"], ["NAME:=VALUE", "'dense_width=3'"]),
        (["{in}", "--param", "model:=x"], ["NAME:=VALUE", "dense_width", "'model:=x'"]),
        (["{in}", "--param", "dense_width:=x"], ["dense_width must be of type int", "'x'"]),
        (["{in}", "--param", "dense_width:=0"], ["dense_width must be from 1 to 1024", "'0'"]),
        (["{in}", "--param", "flow_reduce:=x"], ["flow_reduce must be one of mean, median"]),
        (["{in}", "--param", "camera_static:=x"], ["camera_static must be of type bool", "'x'"]),
        (["{in}", "--model", "no-model"], ["no-model", "neither a file"]),
        (
            ["{in}", "--backend", "tflite"],
            ["backend must be one of auto, torch, onnxruntime", "'tflite'"],
        ),
        (["{in}", "--backend", "onnxruntime"], ["no folder of exported graphs was given"]),
        (["{in}", "--graphs", "{tmp}"], ["no exported graphs in"]),
        (
            ["{in}", "--graphs", "{tmp}", "--backend", "torch"],
            ["needs --backend onnxruntime"],
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(
    run, model: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    source = write_bag(tmp_path / "in", [Entry(0, "/image", image(0, 0))])
    for name in ("text.mcap", "text.db3", "text.txt"):
        (tmp_path / name).write_text("no bag")
    whole = (source / "in.mcap").read_bytes()
    (tmp_path / "cut.mcap").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "there.mcap").touch()
    given = [a.format(**{"in": source, "tmp": tmp_path}) for a in arguments]
    if "--out" not in given:
        given += ["--out", tmp_path / "out.mcap"]
    if "--model" not in given:
        given += ["--model", model]
    before = sorted(tmp_path.iterdir())
    code, stdout, stderr = run(*given)
    assert (code, stdout) == (2, "")
    error = next(line for line in stderr.splitlines() if line.startswith("fpt: error: "))
    for word in words:
        assert word in error
    assert "Traceback" not in stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_shell_without_ros_is_told_what_to_set(
    run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_bag(tmp_path / "in", ENTRIES)
    message_types.cache_clear()
    monkeypatch.delenv("AMENT_PREFIX_PATH")
    code, _, stderr = run(source, "--out", tmp_path / "out.mcap", "--model", model)
    assert code == 2
    assert "fpt: error: fpt_msgs is not found" in stderr
    assert "fpt_ros.environment" in stderr


def test_a_full_disk_is_told_and_leaves_nothing(run, model: Path, tmp_path: Path) -> None:
    source = write_bag(tmp_path / "in", ENTRIES)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # bytes, of any file
    try:
        code, _, stderr = run(source, "--out", tmp_path / "out.mcap", "--model", model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert f"fpt: error: cannot write '{tmp_path / 'out.mcap'}': [Errno 27]" in stderr
    assert list(tmp_path.iterdir()) == [source]


def test_damage_inside_a_bag_is_told(run, model: Path, tmp_path: Path) -> None:
    file = write_bag(tmp_path / "in", ENTRIES) / "in.mcap"
    data = bytearray(file.read_bytes())
    chunk = data.index(b"\x28\xb5\x2f\xfd")  # with which Zstandard's frames begin
    data[chunk : chunk + 20] = bytes(20)
    file.write_bytes(data)
    code, _, stderr = run(file, "--out", tmp_path / "out.mcap", "--model", model)
    assert code == 2
    assert f"the bag '{file}' is damaged: " in stderr
    assert not (tmp_path / "out.mcap").exists()


def test_another_definition_of_a_message_is_refused(tmp_path: Path) -> None:
    path = write_bag(tmp_path / "in", [Entry(0, "/image", image(0, 0))])
    metadata = path / "metadata.yaml"
    digest = message_types().hash_rihs01("sensor_msgs/msg/Image")
    assert digest in metadata.read_text()
    metadata.write_text(metadata.read_text().replace(digest, f"RIHS01_{'0' * 64}"))
    words = f"another definition of sensor_msgs/msg/Image.*{digest}"
    with open_bag(path) as bag, pytest.raises(BagError, match=words):
        find_inputs(bag, {})


def test_type_hashes_are_those_of_ros() -> None:
    store = message_types()
    for package, name in (("fpt_msgs", "FlowDistribution"), ("sensor_msgs", "Image")):
        file = Path(get_package_share_directory(package), "msg", f"{name}.json")
        hashes = json.loads(file.read_text())["type_hashes"]
        assert store.hash_rihs01(f"{package}/msg/{name}") == hashes[0]["hash_string"]


@pytest.mark.parametrize(
    ("name", "namespace", "full"),
    [
        ("image", "", "/image"),
        ("image", "left", "/left/image"),
        ("image", "/a/b/", "/a/b/image"),
        ("/image", "left", "/image"),
    ],
)
def test_names_are_resolved_as_ros_does(name: str, namespace: str, full: str) -> None:
    assert full_name(name, namespace) == full


def test_the_node_answers_a_looped_bag_by_its_clock(model: Path, expected, tmp_path: Path) -> None:
    """Three rounds of a bag whose time is long past: /clock goes, and jumps back twice.

    With use_sim_time the images are young, so that max_age_ms can be strict. The node's answers are
    recorded, and are those that `fpt bag` gives offline.
    """
    rounds = 3
    source = write_bag(tmp_path / "in", ENTRIES)
    domain, claim = claim_domain_id()
    parameters = {
        "model": model, "threads": 1, "use_sim_time": True, "max_age_ms": 2000.0,
        "dense_height": DENSE[0], "dense_width": DENSE[1],
        "query_grid_height": 3, "query_grid_width": 4,
    }  # fmt: skip
    arguments = [word for k, v in parameters.items() for word in ("-p", f"{k}:={v}")]
    node = Process(python_module("fpt_ros.node", *arguments), domain)
    with claim, node, Client(domain) as client:
        client.subscribe(FlowDistribution, "/fpt/distribution", 100)
        node.wait_for("subscribed to /")
        client.wait_for_publisher("/fpt/distribution")
        player = Process(
            [sys.executable, str(ROOT / "tests" / "bag_player.py"), str(source), str(rounds)],
            domain,
        )
        with player:
            wait_until(
                lambda: player.output.count("played") == rounds or player.process.poll(),
                120.0,
                lambda: player.output,
            )
            assert player.process.wait(30.0) == 0, player.output
        got = list(client.received["/fpt/distribution"])
        assert node.interrupt() == 0, node.output
    assert "too old" not in node.output
    assert "Traceback" not in node.output

    # what stood at the end of a round stands in the next: queries, until the bag's pokes come
    def key(its_header: Header, means: np.ndarray) -> tuple[int, int]:
        return stamp_ns(its_header), len(means)

    answered = {key(m.header, distribution_from_msg(m)[1].means) for m in got}
    assert answered >= {key(h, a.distribution.means) for h, a in expected}
    last_image = stamp_ns(expected[-1][0])
    assert sum(stamp_ns(m.header) == last_image for m in got) >= rounds
    recorded = write_bag(
        tmp_path / "answers", [Entry(i, "/fpt/distribution", m) for i, m in enumerate(got)]
    )
    assert of_topic(read_bag(recorded), "/fpt/distribution", FlowDistribution) == got

    # the first round, where nothing stood before, is the offline answer, one for one
    first_round = got[: len(expected)]
    for msg, (its_header, answer) in zip(first_round, expected, strict=True):
        assert msg.header == its_header
        np.testing.assert_allclose(
            distribution_from_msg(msg)[1].means, answer.distribution.means, atol=2e-3
        )
