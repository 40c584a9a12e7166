# SPDX-License-Identifier: MIT
"""``fpt bag``: what the node would have answered to a recorded bag. Needs ROS's messages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from fpt_ros.commands.arguments import UserError, parse_poke
from fpt_ros.commands.depth import check_dz
from fpt_ros.commands.model import (
    BackendOption,
    CompileOption,
    DeviceOption,
    GraphsOption,
    ModelOption,
    PrecisionOption,
    ProvidersOption,
    load_predictor,
)
from fpt_ros.commands.progress import progress_bar
from fpt_ros.pokes import Pokes

if TYPE_CHECKING:
    from fpt_ros.bag import Report


def bag(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="A bag: a folder, or a .mcap or .db3 file.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The .mcap file to write.", show_default=False)],
    image: Annotated[
        str, typer.Option(metavar="TOPIC", help="Images, raw or compressed.")
    ] = "image",
    pokes: Annotated[
        str | None,
        typer.Option(metavar="TOPIC", help="Pokes; pokes if there.", show_default=False),
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(metavar="TOPIC", help="Queries; queries if there.", show_default=False),
    ] = None,
    camera_info: Annotated[
        str | None,
        typer.Option(
            metavar="TOPIC",
            help="Intrinsics, for markers and depth; camera_info if there.",
            show_default=False,
        ),
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(
            metavar="TOPIC",
            help="Registered depth, for a three-dimensional model; depth if there.",
            show_default=False,
        ),
    ] = None,
    namespace: Annotated[
        str, typer.Option(help="Namespace of all topics that do not begin with a slash.")
    ] = "",
    poke: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y,DX,DY[,DZ]",
            help="Poke every image here, in px (dz in m), until the bag has other pokes. "
            "Repeatable.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Write this output of the node: mask, say. Repeatable. None: all.",
            show_default=False,
        ),
    ] = None,
    copy_inputs: Annotated[
        bool, typer.Option("--copy-inputs", help="Write the messages that were read, too.")
    ] = False,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:=VALUE", help="A parameter of the node. Repeatable.", show_default=False
        ),
    ] = None,
    model: ModelOption = "fpt-tiny",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "fp32",
    graphs: GraphsOption = None,
    providers: ProvidersOption = "cpu",
    device: DeviceOption = "cpu",
    compile: CompileOption = False,
) -> None:
    """Answer every image of a recorded bag as the node does, and write the answers as a bag.

    Each answer has the header of its image, and the recording time of the message that called for
    it. Messages that cannot be read are counted and reported.
    """
    given = np.array([parse_poke(text) for text in poke or []]).reshape(-1, 5)
    try:
        from fpt_ros import bag as bags
    except ImportError as error:
        raise UserError(
            f"bags need ROS 2 with fpt_msgs, and rosbags (pip install rosbags): {error}"
        ) from error
    topics = {
        "image": image,
        "pokes": pokes,
        "queries": queries,
        "camera_info": camera_info,
        "depth": depth,
    }
    values = _values(param or [])
    try:
        with bags.open_bag(source) as opened:
            predictor = load_predictor(
                model, backend, precision, graphs, providers, device, compile
            )
            config = predictor.config
            if depth and config.flow_dim != 3:
                raise UserError(f"--depth needs a three-dimensional model, received {config.name}")
            check_dz(given[:, 4], config)
            inputs = bags.find_inputs(opened, topics, namespace, config.flow_dim)
            total = sum(c.msgcount for connections in inputs.values() for c in connections)
            with progress_bar("answering", "messages") as progress:
                task = progress.add_task("", total=total)
                report = bags.process_bag(
                    opened,
                    out,
                    predictor,
                    inputs,
                    output,
                    Pokes(given[:, :2], given[:, 2:4], given[:, 4]) if poke else None,
                    values,
                    namespace,
                    copy_inputs,
                    lambda: progress.advance(task),
                )
    except bags.BagError as error:
        raise UserError(str(error)) from error
    _print(report, out)


def _values(texts: list[str]) -> dict[str, Any]:
    from fpt_ros.bag import PARAMETERS
    from fpt_ros.parameters import parse_value

    specs = {spec.name: spec for spec in PARAMETERS}
    values = {}
    for text in texts:
        name, separator, value = text.partition(":=")
        if not separator or name not in specs:
            raise UserError(
                f"--param must be NAME:=VALUE with a NAME of {', '.join(specs)}; received {text!r}"
            )
        try:
            values[name] = parse_value(specs[name], value)
        except ValueError as error:
            raise UserError(f"--param: {error}") from error
    return values


def _print(report: Report, out: Path) -> None:
    print(f"{out}: {report.images} images read")
    for topic, count in report.written.items():
        print(f"{topic}: {count} messages")
    for kind, count in report.errors.items():
        print(f"refused, {kind}: {count}; the first: {report.first[kind]}")
    if report.camera_info:
        print(f"camera_info is not used: {report.camera_info}")
