# SPDX-License-Identifier: MIT
"""``fpt predict``: what a poke does to a picture or to every frame of a video."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fpt_model import FlowMixture, FPTConfig
from fpt_model.geometry import grid as grid_points
from fpt_model.geometry import normalised_to_pixels
from fpt_model.visualize import draw_overlay
from fpt_ros.commands.arguments import UserError, parse_grid, parse_poke, parse_query
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
    from fpt_ros.pipeline import Answer, Settings

DEFAULT_GRID = "4x4"
LEAST_LISTED_PROBABILITY = 0.01


def predict(
    image: Annotated[Path, typer.Argument(help="A picture or a video.", show_default=False)],
    poke: Annotated[
        list[str],
        typer.Option(
            metavar="X,Y,DX,DY",
            help="The point at X,Y moves by DX,DY, in px, x right and y down. Repeatable.",
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
    backend: BackendOption = "torch",
    precision: PrecisionOption = "fp32",
    graphs: GraphsOption = None,
    providers: ProvidersOption = "cpu",
    device: DeviceOption = "cpu",
    moving_camera: Annotated[
        bool, typer.Option("--moving-camera", help="The camera may move, too.")
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
    writer = FramesWriter(out, frames.is_video, frames.fps) if out else None

    from fpt_ros.pipeline import Answer, Settings, View

    pokes = Pokes(given_pokes[:, :2], given_pokes[:, 2:])
    try:
        check_inside("poke", pokes.xy, frames.size)
        check_inside("query", queries, frames.size)
    except RequestError as error:
        raise UserError(str(error)) from error
    if cells is not None:
        on_grid = normalised_to_pixels(grid_points(cells), frames.size)
        queries = np.concatenate([queries, on_grid])
    predictor = load_predictor(model, backend, precision, graphs, providers, device)
    settings = Settings(camera_static=not moving_camera, full_resolution=False)

    with (
        writer or nullcontext(),
        progress_bar("predicting", "frames", disable=not frames.is_video) as progress,
    ):
        for index, frame in enumerate(progress.track(frames, total=frames.count)):
            view = View(frame, predictor.encode(frame))
            answer = Answer(predictor, view, pokes, queries, settings)
            if as_json:
                number = {"frame": index} if frames.is_video else {}
                print(json.dumps(number | _as_dict(answer, predictor.config, settings)))
            elif index == 0:
                if frames.is_video:
                    print("first frame:")
                _print_table(answer, predictor.config, settings)
            if writer:
                writer.write(_overlay(answer))
    if out and not as_json:
        print(f"wrote {out}")


def _overlay(answer: Answer) -> RGBImage:
    return draw_overlay(
        answer.view.image,
        answer.pokes.xy,
        answer.pokes.flow,
        answer.queries,
        answer.distribution,
        answer.flow,
        answer.mask,
    )


def _std(modes: FlowMixture) -> NDArray[np.float64]:
    """``[Q, K, 2]``: standard deviation of each mode along x and y."""
    return np.sqrt(np.diagonal(modes.component_covariances(), axis1=-2, axis2=-1))


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
                    "mean": mean.tolist(),
                    "std": std.tolist(),
                    "covariance": covariance.tolist(),
                }
                for weight, mean, std, covariance in zip(*query_modes, strict=True)
            ],
        }
        for xy, query_modes in zip(answer.queries, fields, strict=True)
    ]
    height, width = answer.view.size
    return {
        "unit": "px",
        "height": height,
        "width": width,
        "model": config.name,
        "horizon_s": config.horizon_s,
        "camera_static": settings.camera_static,
        "pokes": [
            {"xy": xy.tolist(), "flow": flow.tolist()}
            for xy, flow in zip(answer.pokes.xy, answer.pokes.flow, strict=True)
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
    for (x, y), (dx, dy) in zip(answer.pokes.xy, answer.pokes.flow, strict=True):
        print(f"poke ({x:g}, {y:g}) moves by ({dx:g}, {dy:g})")

    table = Table("query (px)", box=None, pad_edge=False, header_style="bold")
    for heading in ("mode", "probability", "mean dx, dy (px)", "std dx, dy (px)"):
        table.add_column(heading, justify="right")
    modes = answer.distribution.modes()
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
                f"{mean[0]:+.1f}, {mean[1]:+.1f}",
                f"{std[0]:.1f}, {std[1]:.1f}",
            )
    Console().print(table)
    print(f"moving part: {answer.mask.mean():.1%} of the image")
