# SPDX-License-Identifier: MIT
"""``fpt predict``: what a poke does to a picture or to every frame of a video."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fpt_ros.commands.arguments import UserError, parse_grid, parse_poke, parse_query
from fpt_ros.commands.media import Frames, FramesWriter, RGBImage

if TYPE_CHECKING:  # importing torch takes seconds, which help and error messages must not cost
    from fpt_model import FlowMixture, FlowPredictor

Size = tuple[int, int]  # (height, width) in px

DEFAULT_GRID = "4x4"
DENSE_SIZE = (64, 64)  # cells of the flow and moving part over the whole image
LEAST_LISTED_PROBABILITY = 0.01


@dataclass(frozen=True)
class Question:
    """What is asked of every image: pokes and queries in px."""

    poke_xy: NDArray[np.float64]  # [P, 2]
    poke_flow: NDArray[np.float64]  # [P, 2]
    query_xy: NDArray[np.float64]  # [Q, 2]
    camera_static: bool


@dataclass(frozen=True)
class Answer:
    """What the model says, in px: the motion of each query, the flow and the moving part."""

    modes: FlowMixture  # [Q], most probable first
    flow: NDArray[np.float64]  # [h, w, 2]
    moving: NDArray[np.bool_]  # [h, w]


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
    model: Annotated[str, typer.Option(help="A shipped model or a checkpoint file.")] = "fpt-tiny",
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
    pokes = np.array([parse_poke(text) for text in poke])
    queries = np.array([parse_query(text) for text in query or []]).reshape(-1, 2)
    cells = parse_grid(grid or DEFAULT_GRID) if grid or not query else None
    frames = Frames(image)
    if frames.is_video and not (out or as_json):
        raise UserError(f"{str(image)!r} is a video: expected --out overlay.mp4, or --json")
    writer = FramesWriter(out, frames.is_video, frames.fps) if out else None
    question = _question(pokes, queries, cells, frames.size, not moving_camera)
    predictor = _load(model)

    with writer or nullcontext(), _progress_bar(frames) as progress:
        for index, frame in enumerate(progress):
            answer = _answer(predictor, frame, question)
            label = f", frame {index}" if frames.is_video else ""
            if as_json:
                record = {"frame": index} if frames.is_video else {}
                print(json.dumps(record | _as_dict(predictor, frames.size, question, answer)))
            elif index == 0:
                _print_table(predictor, frames.size, question, answer, label)
            if writer:
                writer.write(_overlay(frame, question, answer))
    if out and not as_json:
        print(f"wrote {out}")


@contextmanager
def _progress_bar(frames: Frames) -> Iterator[Iterable[RGBImage]]:
    """The frames; those of a video with a bar on stderr."""
    columns = (
        TextColumn("predicting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("frames, left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not frames.is_video) as progress:
        yield progress.track(frames, total=frames.count)


def _question(
    pokes: NDArray[np.float64],
    queries: NDArray[np.float64],
    cells: Size | None,
    size: Size,
    camera_static: bool,
) -> Question:
    from fpt_model.geometry import grid, inside_image, normalised_to_pixels

    height, width = size
    for name, points in (("poke", pokes[:, :2]), ("query", queries)):
        for x, y in points[~inside_image(points, size)]:
            raise UserError(
                f"{name} at {x:g},{y:g} px is outside of the image, expected "
                f"-0.5 <= x <= {width - 0.5:g} and -0.5 <= y <= {height - 0.5:g}"
            )
    if cells is not None:
        queries = np.concatenate([queries, normalised_to_pixels(grid(cells), size)])
    return Question(pokes[:, :2], pokes[:, 2:], queries, camera_static)


def _load(model: str) -> FlowPredictor:
    from fpt_model import CheckpointError, FlowPredictor, load_model

    try:
        return FlowPredictor(load_model(model))
    except (FileNotFoundError, CheckpointError) as error:
        raise UserError(f"--model: {error}") from error


def _answer(predictor: FlowPredictor, picture: RGBImage, question: Question) -> Answer:
    from fpt_model.geometry import (
        displacement_normalised_to_pixels,
        displacement_pixels_to_normalised,
        grid,
        pixels_to_normalised,
    )

    size = picture.shape[:2]
    scene = predictor.encode(picture)
    pokes = (
        pixels_to_normalised(question.poke_xy, size),
        displacement_pixels_to_normalised(question.poke_flow, size),
    )
    static = question.camera_static
    queries = pixels_to_normalised(question.query_xy, size)
    modes = predictor.predict(scene, *pokes, queries, static).modes()
    dense = predictor.predict(scene, *pokes, grid(DENSE_SIZE), static)
    influence = predictor.influence_of(scene, dense, DENSE_SIZE, static)
    return Answer(
        modes.scaled(*displacement_normalised_to_pixels(np.ones(2), size)),
        displacement_normalised_to_pixels(dense.mean().reshape(*DENSE_SIZE, 2), size),
        influence > predictor.config.kl_threshold,
    )


def _overlay(picture: RGBImage, question: Question, answer: Answer) -> RGBImage:
    from fpt_model.visualize import draw_overlay

    return draw_overlay(
        picture,
        question.poke_xy,
        question.poke_flow,
        question.query_xy,
        answer.modes,
        answer.flow,
        answer.moving,
    )


def _std(modes: FlowMixture) -> NDArray[np.float64]:
    """``[Q, K, 2]``: standard deviation of each mode along x and y."""
    return np.sqrt(np.diagonal(modes.component_covariances(), axis1=-2, axis2=-1))


def _as_dict(
    predictor: FlowPredictor, size: Size, question: Question, answer: Answer
) -> dict[str, Any]:
    modes = answer.modes
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
        for xy, query_modes in zip(question.query_xy, fields, strict=True)
    ]
    return {
        "unit": "px",
        "height": size[0],
        "width": size[1],
        "model": predictor.config.name,
        "horizon_s": predictor.config.horizon_s,
        "camera_static": question.camera_static,
        "pokes": [
            {"xy": xy.tolist(), "flow": flow.tolist()}
            for xy, flow in zip(question.poke_xy, question.poke_flow, strict=True)
        ],
        "queries": queries,
        "moving_share": float(answer.moving.mean()),
    }


def _print_table(
    predictor: FlowPredictor,
    size: Size,
    question: Question,
    answer: Answer,
    label: str,
) -> None:
    config = predictor.config
    print(
        f"{size[1]} x {size[0]} px{label}; "
        f"{config.name}, {config.horizon_s:g} s ahead, "
        f"camera {'static' if question.camera_static else 'may move'}"
    )
    for (x, y), (dx, dy) in zip(question.poke_xy, question.poke_flow, strict=True):
        print(f"poke ({x:g}, {y:g}) moves by ({dx:g}, {dy:g})")

    table = Table("query (px)", box=None, pad_edge=False, header_style="bold")
    for heading in ("mode", "probability", "mean dx, dy (px)", "std dx, dy (px)"):
        table.add_column(heading, justify="right")
    modes = answer.modes
    for (x, y), weights, means, stds in zip(
        question.query_xy, modes.weights, modes.means, _std(modes), strict=True
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
    print(f"moving part: {answer.moving.mean():.1%} of the image")
