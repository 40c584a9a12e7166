# SPDX-License-Identifier: MIT
"""``fpt predict``: what a poke does to a picture or to every frame of a video."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fpt_model import FlowMixture, FPTConfig
from fpt_model.depth import Depth
from fpt_model.geometry import grid as grid_points
from fpt_model.geometry import normalised_to_pixels
from fpt_model.ply import write_ply
from fpt_model.visualize import draw_overlay
from fpt_ros.commands.arguments import UserError, parse_grid, parse_poke, parse_query
from fpt_ros.commands.depth import Columns, check_dz, read_depth_file, scene_columns, show
from fpt_ros.commands.media import Frames, FramesWriter, RGBImage
from fpt_ros.commands.model import (
    BackendOption,
    DeviceOption,
    GraphsOption,
    ModelOption,
    PrecisionOption,
    ProvidersOption,
    load_predictor,
)
from fpt_ros.commands.progress import progress_bar
from fpt_ros.pokes import Pokes, RequestError, check_inside

if TYPE_CHECKING:  # importing torch takes seconds, which help and error messages must not cost
    from fpt_ros.pipeline import Answer, Settings, View

DEFAULT_GRID = "4x4"
LEAST_LISTED_PROBABILITY = 0.01
_DECIMALS = (1, 1, 3)  # of dx, dy in px, dz in m


def predict(
    image: Annotated[Path, typer.Argument(help="A picture or a video.", show_default=False)],
    poke: Annotated[
        list[str],
        typer.Option(
            metavar="X,Y,DX,DY[,DZ]",
            help="The point at X,Y moves by DX,DY, in px, x right and y down; with --depth also by "
            "DZ, in m, away from the camera. Repeatable.",
            show_default=False,
        ),
    ],
    query: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y", help="Ask how this point moves. Repeatable.", show_default=False
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="COLSxROWS",
            help=f"Ask on a grid over the image; {DEFAULT_GRID} when there is no --query.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the overlay here: any picture format, or .mp4 or .avi for a video.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = "fpt-tiny",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "fp32",
    graphs: GraphsOption = None,
    providers: ProvidersOption = "cpu",
    device: DeviceOption = "cpu",
    moving_camera: Annotated[
        bool, typer.Option("--moving-camera", help="The camera may move, too.")
    ] = False,
    depth: Annotated[
        Path | None,
        typer.Option(
            help="Registered depth of the picture, for three-dimensional models: 16-bit values in "
            "mm or floats in m, a picture or .npy.",
            show_default=False,
        ),
    ] = None,
    intrinsics: Annotated[
        str | None,
        typer.Option(
            metavar="FX,FY,CX,CY",
            help="The camera of picture and depth, px; without it lengths are guesses.",
            show_default=False,
        ),
    ] = None,
    ply: Annotated[
        Path | None,
        typer.Option(
            help="Write points with their predicted motion here; needs --depth.",
            show_default=False,
        ),
    ] = None,
    ply_grid: Annotated[
        str, typer.Option(metavar="COLSxROWS", help="How many points --ply and --view have.")
    ] = "128x96",
    view: Annotated[
        bool, typer.Option("--view", help="Show these points in Open3D; needs --depth.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, one object a frame, and no table.")
    ] = False,
) -> None:
    """Predict how a scene moves when it is poked.

    For each query the possible motions (modes) are listed with their probability, mean and
    standard deviation in px of the picture. In a video the same pokes are put to every frame.
    """
    given_pokes = np.array([parse_poke(text) for text in poke])
    queries = np.array([parse_query(text) for text in query or []]).reshape(-1, 2)
    cells = parse_grid(grid or DEFAULT_GRID) if grid or not query else None
    frames = Frames(image)
    if frames.is_video and not (out or as_json):
        raise UserError(f"{str(image)!r} is a video: expected --out overlay.mp4, or --json")
    _refuse_overwriting({"--out": out, "--ply": ply}, [image, depth])
    writer = FramesWriter(out, frames.is_video, frames.fps) if out else None

    from fpt_ros.pipeline import Answer, Settings, View

    pokes = Pokes(given_pokes[:, :2], given_pokes[:, 2:4], given_pokes[:, 4])
    try:
        check_inside("poke", pokes.xy, frames.size)
        check_inside("query", queries, frames.size)
    except RequestError as error:
        raise UserError(str(error)) from error
    if cells is not None:
        on_grid = normalised_to_pixels(grid_points(cells), frames.size)
        queries = np.concatenate([queries, on_grid])
    predictor = load_predictor(model, backend, precision, graphs, providers, device)
    check_dz(pokes.dz, predictor.config)
    settings = Settings(camera_static=not moving_camera, full_resolution=False)
    measured = _depth(depth, intrinsics, ply, view, frames, predictor.config)
    shown_size = parse_grid(ply_grid)

    with (
        writer or nullcontext(),
        progress_bar("predicting", "frames", disable=not frames.is_video) as progress,
    ):
        for index, frame in enumerate(progress.track(frames, total=frames.count)):
            seen = View(frame, predictor.encode(frame), measured)
            if predictor.config.flow_dim == 3:
                _check_depth(seen, pokes)
            answer = Answer(predictor, seen, pokes, queries, settings)
            if as_json:
                number = {"frame": index} if frames.is_video else {}
                print(json.dumps(number | _as_dict(answer, predictor.config, settings)))
            elif index == 0:
                if frames.is_video:
                    print("first frame:")
                _print_table(answer, predictor.config, settings)
            if writer:
                writer.write(_overlay(answer))
            if ply or view:
                finer = replace(settings, dense_size=shown_size)
                columns = scene_columns(Answer(predictor, seen, pokes, queries, finer))
            if ply:
                _write_ply(ply, columns)
    for path in (out, ply):
        if path and not as_json:
            print(f"wrote {path}")
    if view:
        show(columns)


def _refuse_overwriting(written: dict[str, Path | None], read: list[Path | None]) -> None:
    others = [path for path in read if path is not None]
    for option, path in written.items():
        if path is None:
            continue
        for other in others:
            if path == other or (path.exists() and other.exists() and path.samefile(other)):
                raise UserError(f"{option} would overwrite {str(other)!r}, which is in use already")
        others.append(path)


def _depth(
    depth: Path | None,
    intrinsics: str | None,
    ply: Path | None,
    view: bool,
    frames: Frames,
    config: FPTConfig,
) -> Depth | None:
    """That of the picture; UserError where something is missing for it, or needs it."""
    if depth is None:
        if ply or view or intrinsics:
            raise UserError("--ply, --view and --intrinsics need --depth, received none")
        return None
    if frames.is_video:
        raise UserError("--depth is of a picture, received a video")
    if config.flow_dim != 3:
        raise UserError(
            f"--depth needs a three-dimensional model, {config.name} has flow_dim {config.flow_dim}"
        )
    if ply is not None and not ply.resolve().parent.is_dir():
        raise UserError(f"--ply must be in an existing folder, received {str(ply)!r}")
    return read_depth_file(depth, intrinsics, frames.size)


def _write_ply(path: Path, columns: Columns) -> None:
    try:
        write_ply(path, columns)
    except OSError as error:
        raise UserError(f"--ply: cannot write {str(path)!r}: {error}") from error


def _check_depth(view: View, pokes: Pokes) -> None:
    try:
        view.check_depth(pokes)
    except RequestError as error:
        raise UserError(str(error)) from error


def _overlay(answer: Answer) -> RGBImage:
    return draw_overlay(
        answer.view.image,
        answer.pokes.xy,
        answer.pokes.flow,
        answer.queries,
        answer.distribution.marginal(2),
        answer.flow,
        answer.mask,
    )


def _std(modes: FlowMixture) -> NDArray[np.float64]:
    """``[Q, K, D]``: standard deviation of each mode along the axes."""
    return np.sqrt(np.diagonal(modes.component_covariances(), axis1=-2, axis2=-1))


def _finite(values: NDArray[np.float64]) -> list[float | None]:
    """A list for JSON, which has no NaN: None for what is unknown without depth."""
    return [float(v) if np.isfinite(v) else None for v in values]


def _as_dict(answer: Answer, config: FPTConfig, settings: Settings) -> dict[str, Any]:
    modes = answer.distribution.modes()
    fields = zip(
        modes.weights, modes.means, _std(modes), modes.component_covariances(), strict=True
    )
    queries = [
        {
            "xy": xy.tolist(),
            "modes": [
                {
                    "probability": float(weight),
                    "mean": _finite(mean),
                    "std": _finite(std),
                    "covariance": [_finite(line) for line in covariance],
                }
                for weight, mean, std, covariance in zip(*query_modes, strict=True)
            ],
        }
        for xy, query_modes in zip(answer.queries, fields, strict=True)
    ]
    height, width = answer.view.size
    return {
        "unit": "px" if modes.dims == 2 else "px, px, m",
        "height": height,
        "width": width,
        "model": config.name,
        "horizon_s": config.horizon_s,
        "camera_static": settings.camera_static,
        "pokes": [
            {"xy": xy.tolist(), "flow": flow.tolist()} | ({} if np.isnan(dz) else {"dz": float(dz)})
            for xy, flow, dz in zip(
                answer.pokes.xy, answer.pokes.flow, answer.pokes.dz, strict=True
            )
        ],
        "queries": queries,
        "moving_share": float(answer.mask.mean()),
    }


def _print_table(answer: Answer, config: FPTConfig, settings: Settings) -> None:
    height, width = answer.view.size
    print(
        f"{width} x {height} px; {config.name}, {config.horizon_s:g} s ahead, "
        f"camera {'static' if settings.camera_static else 'may move'}"
    )
    pokes = answer.pokes
    for (x, y), (dx, dy), dz in zip(pokes.xy, pokes.flow, pokes.dz, strict=True):
        in_depth = "" if np.isnan(dz) else f" and {dz:g} m in depth"
        print(f"poke ({x:g}, {y:g}) moves by ({dx:g}, {dy:g}){in_depth}")

    modes = answer.distribution.modes()
    axes = "dx, dy (px)" if modes.dims == 2 else "dx, dy (px), dz (m)"
    table = Table("query (px)", box=None, pad_edge=False, header_style="bold")
    for heading in ("mode", "probability", f"mean {axes}", f"std {axes}"):
        table.add_column(heading, justify="right")
    for (x, y), weights, means, stds in zip(
        answer.queries, modes.weights, modes.means, _std(modes), strict=True
    ):
        listed = weights >= LEAST_LISTED_PROBABILITY
        rows = zip(weights[listed], means[listed], stds[listed], strict=True)
        for rank, (weight, mean, std) in enumerate(rows, start=1):
            table.add_row(
                f"{x:g}, {y:g}" if rank == 1 else "",
                str(rank),
                f"{weight:.2f}",
                ", ".join(f"{v:+.{d}f}" for v, d in zip(mean, _DECIMALS, strict=False)),
                ", ".join(f"{v:.{d}f}" for v, d in zip(std, _DECIMALS, strict=False)),
            )
    Console().print(table)
    print(f"moving part: {answer.mask.mean():.1%} of the image")
