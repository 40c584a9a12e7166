# SPDX-License-Identifier: MIT
"""The node's work on a recorded bag: each of its images is answered, none is dropped.

The messages of the bag go in their order to the node's own :class:`~fpt_ros.worker.Worker`, which
so joins images, pokes and queries as it does in the node: pokes without a stamp stand for the
newest image and all after it, those with a stamp are for that image. What the worker publishes is
written with the time at which the message was recorded that called for it, as if answering took no
time.

The same bag, model and parameters give the same bytes in every message, on the same machine with
the same number of threads.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ament_index_python.packages import get_package_share_directory
from rclpy.serialization import deserialize_message, serialize_message
from rclpy.time import Time
from rosbags.interfaces import (
    Connection,
    Qos,
    QosDurability,
    QosHistory,
    QosLiveliness,
    QosReliability,
    QosTime,
)
from rosbags.rosbag2 import CompressionFormat, CompressionMode, Reader, StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

from fpt_model import FlowPredictor
from fpt_msgs.msg import ModelInfo, PokeArray, QueryArray
from fpt_ros.history import HeldImage, stamp_ns
from fpt_ros.inbox import Batch, Request
from fpt_ros.messages import pokes_to_msg
from fpt_ros.monitor import Monitor
from fpt_ros.names import full_name, type_name
from fpt_ros.outputs import Outputs
from fpt_ros.parameters import FPT_PARAMETERS, Spec
from fpt_ros.pokes import Pokes
from fpt_ros.scene_outputs import SceneOutputs
from fpt_ros.worker import IMAGE_WAIT_S, Worker

PARAMETERS: tuple[Spec, ...] = tuple(
    spec
    for spec in FPT_PARAMETERS
    if not (spec.read_only or spec.fixed) or spec.name in ("image_history", "scene_history")
    # there is nothing to be late or to wait for, and no tf2
    if spec.name not in ("max_age_ms", "stuck_after_s", "depth_wait_ms", "target_frame")
)
"""The node's parameters that mean something here."""

INPUT_TYPES: dict[str, tuple[type, ...]] = {
    "image": (Image, CompressedImage),
    "pokes": (PokeArray,),
    "queries": (QueryArray,),
    "camera_info": (CameraInfo,),
    "depth": (Image,),
}
"""The types of the node's inputs, by name."""

_FOREVER = QosTime(2**31 - 1, 0)
_STAMP_BYTES = 12  # up to the end of a serialised message's stamp


class BagError(ValueError):
    """A bag that cannot be read or written; the text says what was found and expected."""


@dataclass
class Report:
    """What happened.

    Attributes:
        images: that were read.
        written: messages, by topic.
        errors: how often, by kind: "malformed" (the bytes are no such message), "image", "pokes",
            "queries" (refused, as the node refuses them), "standing" (they do not fit an image),
            "depth" (an image has none, or unusable one, and was answered without).
        first: what was wrong at the first of each kind.
        camera_info: why the markers are made without it; empty if they are not.
    """

    images: int = 0
    written: Counter[str] = field(default_factory=Counter)
    errors: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    camera_info: str = ""


@contextmanager
def open_bag(path: Path) -> Iterator[Reader]:
    """A bag: a folder with metadata.yaml, or one file in MCAP or sqlite3 (.db3).

    Raises:
        BagError: it is not there, damaged, or something else.
    """
    try:
        reader = Reader(path)
        reader.open()
    except Exception as error:  # what is no bag can cause anything
        raise BagError(f"cannot read the bag {str(path)!r}: {error}") from error
    try:
        yield reader
    finally:
        reader.close()


class Recorded(NamedTuple):
    """A message of a bag."""

    name: str  # of its topic, in the caller's terms
    connection: Connection
    ns: int  # when it was recorded
    data: bytes
    msg: Any  # None: the data are no such message,
    problem: str  # for this reason


def find_topics(
    bag: Reader, topics: Mapping[str, str], types: Mapping[str, tuple[type, ...]]
) -> dict[str, list[Connection]]:
    """The connections (one for each publisher) of those ``topics`` that the bag has, by name.

    Raises:
        BagError: a topic is of none of its ``types``, or recorded with another definition of it.
    """
    found = {}
    for name, topic in topics.items():
        expected = [type_name(t) for t in types[name]]
        there = [c for c in bag.connections if c.topic == topic]
        usable = [c for c in there if c.msgtype in expected]
        if usable:
            _check_definition(usable)
            found[name] = usable
        elif there:
            raise BagError(
                f"topic {topic} for {name!r} is of type {there[0].msgtype}, expected "
                f"{' or '.join(expected)}; the bag has: {list_topics(bag)}"
            )
    return found


def list_topics(bag: Reader) -> str:
    """The topics of a bag with their types, for a message to a user."""
    return "; ".join(f"{c.topic} ({c.msgtype})" for c in bag.connections) or "none"


def find_inputs(
    bag: Reader, topics: Mapping[str, str | None], namespace: str = "", dims: int = 3
) -> dict[str, list[Connection]]:
    """The node's inputs that the bag has, by name in INPUT_TYPES.

    Args:
        topics: by that name; None: the topic of the input's name, which may be missing, except the
            image's.
        namespace: of topics that do not begin with a slash.
        dims: of the model's motions; one of 2 has no use for depth.

    Raises:
        BagError: as :func:`find_topics`, and when a topic is missing.
    """
    names = [name for name in INPUT_TYPES if name != "depth" or dims == 3]
    full = {name: full_name(topics.get(name) or name, namespace) for name in names}
    there = {c.topic for c in bag.connections}
    for name, topic in full.items():
        if topic not in there and (topics.get(name) or name == "image"):
            expected = " or ".join(type_name(t) for t in INPUT_TYPES[name])
            raise BagError(
                f"topic {topic} for {name!r} is not in the bag, expected one of type {expected}; "
                f"the bag has: {list_topics(bag)}"
            )
    return find_topics(bag, full, INPUT_TYPES)


def read(
    bag: Reader,
    connections: Mapping[str, Sequence[Connection]],
    types: Mapping[str, tuple[type, ...]],
    start: int | None = None,
    stop: int | None = None,
) -> Iterator[Recorded]:
    """The messages of ``connections``, as :func:`find_topics` gives them, in recorded order.

    ``start`` and ``stop`` are recording times in ns, the second exclusive.

    Raises:
        BagError: the bag is damaged.
    """
    names = {c.id: name for name, those in connections.items() for c in those}
    classes = {type_name(t): t for name in connections for t in types[name]}
    for connection, ns, data in _read_raw(bag, connections, start, stop):
        msg, problem = None, ""
        try:
            msg = deserialize_message(data, classes[connection.msgtype])
        except Exception as error:  # of a private type of rclpy's
            problem = (
                f"{len(data)} bytes on {connection.topic} at {ns} ns are no "
                f"{connection.msgtype}: {error}"
            )
        yield Recorded(names[connection.id], connection, ns, data, msg, problem)


def _read_raw(
    bag: Reader,
    connections: Mapping[str, Sequence[Connection]],
    start: int | None = None,
    stop: int | None = None,
) -> Iterator[tuple[Connection, int, bytes]]:
    messages = bag.messages([c for those in connections.values() for c in those], start, stop)
    while True:
        try:
            yield next(messages)
        except StopIteration:
            return
        except Exception as error:  # a damaged file can cause anything
            raise BagError(f"the bag {str(bag.path)!r} is damaged: {error}") from error


def _stamps(messages: Iterable[tuple[Connection, int, bytes]]) -> Iterator[tuple[int, int]]:
    """Stamped and recorded times, ns, of messages that begin with a header: images are large."""
    for _, ns, data in messages:
        if len(data) >= _STAMP_BYTES:
            order = "<" if data[1] % 2 else ">"  # CDR: 4 bytes say how the rest is encoded
            sec, nanosec = struct.unpack_from(f"{order}iI", data, 4)
            yield sec * 1_000_000_000 + nanosec, ns


def process_bag(
    bag: Reader,
    out: Path,
    predictor: FlowPredictor,
    inputs: Mapping[str, Sequence[Connection]],
    outputs: Sequence[str] | None = None,
    pokes: Pokes | None = None,
    values: Mapping[str, Any] | None = None,
    namespace: str = "",
    copy_inputs: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> Report:
    """Answer the images of a bag, and write the answers as another.

    Args:
        bag: an open one.
        out: the MCAP file to write; it is there when all is done, and nothing before.
        inputs: as :func:`find_inputs` gives them for the predictor's dimensions.
        outputs: names of the node's outputs, "mask" say; None: all.
        pokes: px, that stand until the bag brings others.
        values: of PARAMETERS, where they are not to be the defaults.
        namespace: of the outputs, which are called as the node's: /namespace/fpt/mask.
        copy_inputs: whether the messages that were read are written, too.
        advance: called after each message.

    Raises:
        BagError: ``out`` exists or cannot be written, an output is unknown, or the bag is damaged.
    """
    store = message_types()
    report, first = Report(), _FirstErrors()
    monitor = Monitor(first, lambda name, duration_ms: None)
    parameters: dict[str, Any] = {spec.name: spec.default for spec in FPT_PARAMETERS}
    parameters |= {"max_age_ms": 0.0, "depth_wait_ms": 0.0, **(values or {})}
    messages = Outputs(
        predictor.config,
        lambda: parameters["marker_lifetime_s"],
        monitor.stage,
        lambda problem: setattr(report, "camera_info", problem),
    )
    in_space = SceneOutputs().table
    table = messages.table | (in_space if inputs.get("depth") else {})
    names = list(table) if outputs is None else list(outputs)
    unknown = [name for name in names if name not in table]
    if unknown and unknown[0] in in_space:
        raise BagError(
            f"the output {unknown[0]!r} needs a three-dimensional model, and depth (--depth)"
        )
    if unknown:
        raise BagError(f"expected outputs of {[*table]}, received {unknown[0]!r}")

    clock = _Clock(bag.start_time if bag.message_count else 0)
    with ExitStack() as stack:
        writer = stack.enter_context(_writing(out))
        depths = None
        if inputs.get("depth"):
            # not the one that is being read: of MCAP without an index it would lose its place
            depths = _Depths(
                stack.enter_context(open_bag(Path(str(bag.path)))), inputs["depth"][0].topic
            )

        def recorder(name: str, msg_type: type, latched: bool = False) -> _Recorder:
            topic = full_name(f"fpt/{name}", namespace)
            return _Recorder(writer, store, clock, report, topic, type_name(msg_type), latched)

        copies = _copies(writer, store, inputs) if copy_inputs else {}
        recorder("info", ModelInfo, latched=True).publish(messages.model_info())
        worker = Worker(
            predictor,
            [(recorder(name, table[name][0]), table[name][1]) for name in dict.fromkeys(names)],
            parameters.__getitem__,
            monitor,
            clock,
            first,
            lambda: True,
            now_s=clock.seconds,
            camera_info=lambda: messages.camera_info,
            with_depth=depths is not None,
        )

        def process(image: Image | CompressedImage | None = None, *requests: Request) -> None:
            images = [] if image is None else [HeldImage(image)]
            near = depths.nearest(image.header) if depths and image is not None else []
            worker.process(Batch(images, 0, [*requests], woken=False, depths=near))

        if pokes is not None:
            msg = pokes_to_msg(pokes, Header())
            process(None, Request("pokes", msg, arrived_s=clock.seconds()))
        for name, connection, recorded_ns, data, msg, problem in read(bag, inputs, INPUT_TYPES):
            clock.ns = recorded_ns
            if connection.id in copies:
                writer.write(copies[connection.id], clock.ns, data)
                report.written[connection.topic] += 1
            if problem:
                monitor.error("malformed", problem)
            elif name == "image":
                report.images += 1
                process(msg)
            elif name == "camera_info":
                messages.camera_info = msg
            elif name != "depth":  # which its image takes, whenever it was recorded
                process(None, Request(name, msg, arrived_s=clock.seconds()))
            advance()
        clock.ns += int(2e9 * IMAGE_WAIT_S)
        process()  # what still waits for its image is refused
    counts = {kind: n for kind, n in monitor.counts.items() if kind.startswith("errors: ")}
    report.errors = {kind.removeprefix("errors: "): n for kind, n in sorted(counts.items())}
    report.first = first.texts
    return report


def _copies(
    writer: Writer, store: Typestore, inputs: Mapping[str, Sequence[Connection]]
) -> dict[int, Connection]:
    """The connections to write the messages to, by the id of the one that they were read from."""
    alike: dict[Any, Connection] = {}  # those of several publishers may be
    copies = {}
    for connection in (c for those in inputs.values() for c in those):
        profiles = tuple(getattr(connection.ext, "offered_qos_profiles", ()))
        key = connection.topic, connection.msgtype, repr(profiles)
        if key not in alike:
            alike[key] = writer.add_connection(
                connection.topic,
                connection.msgtype,
                typestore=store,
                offered_qos_profiles=profiles,
            )
        copies[connection.id] = alike[key]
    return copies


class _Depths:
    """Finds the depth image whose stamp is nearest to that of an image.

    A camera's depth may be recorded before its image or after it.
    """

    def __init__(self, bag: Reader, topic: str) -> None:
        self._bag, self._inputs = bag, find_topics(bag, {"depth": topic}, INPUT_TYPES)
        self._times = sorted(_stamps(_read_raw(bag, self._inputs)))

    def nearest(self, header: Header) -> list[Image]:
        """It alone; nothing where the bag has no depth."""
        wanted = stamp_ns(header)
        after = bisect_left(self._times, (wanted, 0))
        near = self._times[max(0, after - 2) : after + 2]  # the nearest may be malformed
        for stamp, recorded in sorted(near, key=lambda times: abs(times[0] - wanted)):
            found = (m.msg for m in self._read(recorded, recorded + 1) if m.msg is not None)
            for msg in found:
                if stamp_ns(msg.header) == stamp:
                    return [msg]
        return []

    def _read(self, start: int, stop: int) -> Iterator[Recorded]:
        return read(self._bag, self._inputs, INPUT_TYPES, start, stop)


class _Clock:
    """The time at which the present message was recorded."""

    def __init__(self, ns: int) -> None:
        self.ns = ns

    def now(self) -> Time:
        return Time(nanoseconds=self.ns)

    def seconds(self) -> float:
        return self.ns / 1e9


class _FirstErrors:
    """A logger that keeps the first error of each kind, which a monitor names before a colon."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def error(self, text: str) -> None:
        kind, _, reason = text.partition(": ")
        self.texts.setdefault(kind, reason)

    def warning(self, text: str) -> None:
        """Of no interest."""

    def debug(self, text: str) -> None:
        """Of no interest."""


class _Recorder:
    """Stands for a publisher that somebody subscribes to, and writes its messages."""

    def __init__(
        self,
        writer: Writer,
        store: Typestore,
        clock: _Clock,
        report: Report,
        topic: str,
        msg_type: str,
        latched: bool,
    ) -> None:
        self._writer, self._store, self._clock, self._report = writer, store, clock, report
        self._connection = writer.add_connection(
            topic, msg_type, typestore=store, offered_qos_profiles=[_qos(latched)]
        )

    def get_subscription_count(self) -> int:
        return 1

    def publish(self, msg: Any) -> None:
        kind = self._connection.msgtype
        # Fast CDR leaves whatever lay in memory between the fields; rosbags writes zeros there
        data = self._store.serialize_cdr(
            self._store.deserialize_cdr(serialize_message(msg), kind), kind
        )
        self._writer.write(self._connection, self._clock.ns, data)
        self._report.written[self._connection.topic] += 1


def _check_definition(connections: Sequence[Connection]) -> None:
    store = message_types()
    for c in connections:
        expected = store.hash_rihs01(c.msgtype)
        if c.digest and c.digest != expected:
            raise BagError(
                f"topic {c.topic} was recorded with another definition of {c.msgtype}: "
                f"{c.digest}, expected {expected}"
            )


@cache
def message_types() -> Typestore:
    """The definitions of ROS's messages and of ours."""
    store = get_typestore(Stores.ROS2_JAZZY)
    try:
        share = get_package_share_directory("fpt_msgs")
    except (OSError, LookupError) as error:  # a shell without ROS's environment, or none of ours
        raise BagError(
            f"fpt_msgs is not found: {error}; source install/setup.bash or, with the wheels, "
            'eval "$(python -m fpt_ros.environment)"'
        ) from error
    folder = Path(share, "msg")
    for file in sorted(folder.glob("*.msg")):
        store.register(get_types_from_msg(file.read_text(), f"fpt_msgs/msg/{file.stem}"))
    return store


def _qos(latched: bool) -> Qos:
    """Reliable; depth 1 and transient local when ``latched``. `ros2 bag play` publishes so."""
    return Qos(
        QosHistory.KEEP_LAST,
        1 if latched else 10,
        QosReliability.RELIABLE,
        QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE,
        deadline=_FOREVER,
        lifespan=_FOREVER,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=_FOREVER,
        avoid_ros_namespace_conventions=False,
    )


@contextmanager
def _writing(out: Path) -> Iterator[Writer]:
    """A writer of one file, which is moved to its place when all went well."""
    if out.suffix != ".mcap" or not out.resolve().parent.is_dir():
        raise BagError(f"expected a .mcap file in an existing folder, received {str(out)!r}")
    if out.exists():
        raise BagError(f"{str(out)!r} exists already")
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.stem}-", dir=out.parent))
        writer = Writer(folder / "bag", version=9, storage_plugin=StoragePlugin.MCAP)
        writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        with writer:
            yield writer
        os.replace(folder / "bag" / "bag.mcap", out)
    except OSError as error:
        raise BagError(f"cannot write {str(out)!r}: {error}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
