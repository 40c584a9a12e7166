# SPDX-License-Identifier: MIT
"""``fpt check``: does another backend or precision answer as PyTorch in fp32 does?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fpt_ros.commands.arguments import UserError
from fpt_ros.commands.media import Frames, RGBImage
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

FRAMES = 8
SIMULATED_SIZE = (480, 640)  # (height, width) px


def check(
    model: ModelOption = "fpt-tiny",
    backend: BackendOption = "onnxruntime",
    precision: PrecisionOption = "fp32",
    graphs: GraphsOption = None,
    providers: ProvidersOption = "cpu",
    device: DeviceOption = "cpu",
    compile: CompileOption = False,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help=f"A picture or a video of your scenes ({FRAMES} of its frames are taken). "
            f"Repeatable. None: {FRAMES} simulated pictures.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare a backend and precision with PyTorch in fp32 on this machine.

    Exits with 1 when they differ more than they may.
    """
    from fpt_model.agreement import (
        DENSE,
        MAX_FLOW_PX,
        MAX_RAW_FP32,
        MIN_MASK_IOU,
        SIDE_PX,
        agreement,
    )

    candidate = load_predictor(model, backend, precision, graphs, providers, device, compile)
    exact = load_predictor(model)
    found = agreement(exact, candidate, _files(image) if image else _simulated())

    where = f" on {', '.join(candidate.providers)}" if candidate.providers else ""
    where += ", compiled," if compile else ""
    print(
        f"{exact.config.name}, {candidate.backend}{where} in {precision}, against PyTorch in fp32; "
        f"{found.images} pictures"
    )
    table = Table()
    for column in ("", "measured", "must hold"):
        table.add_column(column)
    limit = f"at most {MAX_RAW_FP32:g}" if precision == "fp32" else ""
    table.add_row("raw outputs, largest difference", f"{found.raw:.2g}", limit)
    table.add_row(
        f"flow, px of {SIDE_PX:g}, 99th percentile",
        f"{found.flow_px:.2g}",
        f"at most {MAX_FLOW_PX}",
    )
    table.add_row("KL, nats, 99th percentile", f"{found.kl:.2g}", "")
    cells = f"{DENSE[1]}x{DENSE[0]}"
    table.add_row(
        f"moving part on {cells} cells, IoU", f"{found.mask_iou:.4f}", f"at least {MIN_MASK_IOU}"
    )
    Console().print(table)
    violations = found.violations(precision)
    print("\n".join(violations) or "holds")
    if violations:
        raise typer.Exit(1)


def _files(paths: list[Path]) -> Iterator[RGBImage]:
    for path in paths:
        frames = Frames(path)
        step = max(1, (frames.count or 1) // FRAMES)
        yield from islice(frames, 0, FRAMES * step, step)


def _simulated() -> Iterator[RGBImage]:
    try:
        from sim import HELD_OUT_KINDS, TRAIN_KINDS, Simulator

        for seed, kind in enumerate((TRAIN_KINDS + HELD_OUT_KINDS)[:FRAMES]):
            yield Simulator(kind, seed, SIMULATED_SIZE).render().rgb
    except (ImportError, RuntimeError) as error:
        raise UserError(f"cannot simulate pictures, give some by --image: {error}") from error
