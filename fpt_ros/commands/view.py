# SPDX-License-Identifier: MIT
"""``fpt view``: the node's topics, or bags, in the Rerun viewer. Needs ROS's messages and Rerun."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpt_ros.commands.arguments import UserError
from fpt_ros.commands.progress import progress_bar

if TYPE_CHECKING:
    import rerun as rr

LIVE_OUTPUTS = ("distribution", "mask", "flow_color", "overlay", "markers", "points")


def view(
    source: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[BAG]...",
            help="Bags to show together: folders, .mcap or .db3 files. None: live topics.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write a .rrd file, for the command rerun, rather than open the viewer.",
            show_default=False,
        ),
    ] = None,
    connect: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Show in a viewer that runs already: rerun+http://HOST:9876/proxy.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[str, typer.Option(metavar="TOPIC", help="The camera's images.")] = "image",
    camera_info: Annotated[
        str, typer.Option(metavar="TOPIC", help="That camera's intrinsics.")
    ] = "camera_info",
    compressed: Annotated[
        bool, typer.Option("--compressed", help="Live, the topic of images is a compressed one.")
    ] = False,
    namespace: Annotated[
        str, typer.Option(help="Namespace of all topics that do not begin with a slash.")
    ] = "",
    output: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Show this output of the node: mask, say. Repeatable. "
            f"None: {', '.join(LIVE_OUTPUTS)}.",
            show_default=False,
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Live, end after this time.", show_default=False),
    ] = None,
) -> None:
    """Show camera image, pokes and the node's outputs in the Rerun viewer.

    Live, the node computes what is shown, since it is subscribed to.
    """
    names = {f"fpt/{name}" for name in output or LIVE_OUTPUTS}
    try:
        import rerun as rr

        from fpt_ros.rerun_view import FLUSH_S, TYPES, ViewNode
    except ImportError as error:
        raise UserError(
            f"the view needs ROS 2 with fpt_msgs, and Rerun (docs/viewing.md tells how): {error}"
        ) from error
    from fpt_ros.names import full_name

    unknown = sorted(names - TYPES.keys())
    if unknown:
        raise UserError(
            f"--output must be one of {', '.join(LIVE_OUTPUTS)}; "
            f"received {unknown[0].removeprefix('fpt/')!r}"
        )
    chosen = {"image": image, "camera_info": camera_info, "pokes": "pokes"}
    chosen |= {name: name for name in TYPES if name in names}
    topics = {name: full_name(topic, namespace) for name, topic in chosen.items()}
    if out is not None and connect is not None:
        raise UserError("expected --out or --connect, received both")
    if source and (compressed or duration is not None):
        raise UserError("--compressed and --duration are for live topics, received bags, too")
    if out is not None and out.exists():
        raise UserError(f"--out {str(out)!r} exists already; move it away first")
    if source:
        recording = _recording(out, connect)
        try:
            _show_bags(source, topics, recording)
            try:
                recording.flush(timeout_sec=FLUSH_S)
            except RuntimeError as error:
                raise UserError(f"the viewer did not take it: {error}") from error
        except BaseException:  # also an interrupt: half a recording is none
            rr.disconnect(recording)
            if out is not None:
                out.unlink(missing_ok=True)
            raise
        rr.disconnect(recording)
        return

    from fpt_ros.spin import run

    recording = _recording(out, connect)
    code = run(lambda: partial(ViewNode, recording, topics, compressed, duration), [])
    rr.disconnect(recording)
    raise typer.Exit(code)


def _recording(out: Path | None, connect: str | None) -> rr.RecordingStream:
    import rerun as rr

    recording = rr.RecordingStream("fpt")
    if out is not None:
        if out.suffix != ".rrd" or not out.resolve().parent.is_dir():
            raise UserError(
                f"--out must be a .rrd file in an existing folder, received {str(out)!r}"
            )
        recording.save(out)
    elif connect is not None:
        try:
            recording.connect_grpc(connect)
        except RuntimeError as error:
            raise UserError(
                f"--connect must be a viewer's address such as rerun+http://HOST:9876/proxy, "
                f"received {connect!r}: {error}"
            ) from error
    else:
        recording.spawn()
    return recording


def _show_bags(source: list[Path], topics: dict[str, str], recording: rr.RecordingStream) -> None:
    try:
        from fpt_ros import bag as bags
    except ImportError as error:
        raise UserError(f"bags need rosbags (pip install rosbags): {error}") from error
    from fpt_ros.rerun_view import TYPES, RerunLog

    log, shown, bad = RerunLog(recording), Counter[str](), list[str]()
    for path in source:
        log.begin()
        try:
            with bags.open_bag(path) as bag:
                found = bags.find_topics(bag, topics, TYPES)
                if not found:
                    raise UserError(
                        f"{str(path)!r} has none of {', '.join(topics.values())}; "
                        f"it has: {bags.list_topics(bag)}"
                    )
                total = sum(c.msgcount for connections in found.values() for c in connections)
                with progress_bar("reading", "messages") as progress:
                    for message in progress.track(bags.read(bag, found, TYPES), total=total):
                        try:
                            if message.problem:
                                raise ValueError(message.problem)
                            log.log(message.name, message.msg)
                            shown[message.connection.topic] += 1
                        except ValueError as error:
                            bad.append(f"{message.connection.topic}: {error}")
        except bags.BagError as error:
            raise UserError(str(error)) from error
    for topic, count in shown.items():
        print(f"{topic}: {count} messages")
    if bad:
        print(f"not shown: {len(bad)}; the first: {bad[0]}")
