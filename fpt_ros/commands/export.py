# SPDX-License-Identifier: MIT
"""``fpt export``: a model as ONNX graphs, and TensorRT engines of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fpt_ros.commands.arguments import UserError


def export(
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    model: Annotated[str, typer.Option(help="A shipped model or a checkpoint file.")] = "fpt-tiny",
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32, fp16 or int8 (weights in 8 bits). Repeatable. None: fp32.",
            show_default=False,
        ),
    ] = None,
    build_engine: Annotated[
        bool,
        typer.Option(
            "--build-engine", help="Build the TensorRT engines now, too, rather than at first use."
        ),
    ] = False,
    gpu: Annotated[int, typer.Option(help="Number of the GPU that engines are built for.")] = 0,
) -> None:
    """Write a model as the two ONNX graphs that --backend onnxruntime runs.

    The graphs hold the weights and keep their licence.
    """
    from fpt_model import BackendError, CheckpointError, load_model
    from fpt_model.graphs import HALVES
    from fpt_model.tensorrt import build_engine as build

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task("exporting", total=None)
        try:
            from fpt_model.export import export as write

            manifest = write(load_model(model), out, precision or ["fp32"])
            for name in manifest.graphs if build_engine else ():
                for half in HALVES:
                    what = manifest.graph(name, half).file
                    progress.update(task, description=f"building the TensorRT engine of {what}")
                    progress.print(f"building the TensorRT engine of {what}: minutes")
                    build(manifest, name, half, gpu)
        except ImportError as error:
            raise UserError(
                f"exporting needs onnx, onnxscript and onnxruntime (pip install): {error}"
            ) from error
        except (BackendError, CheckpointError, OSError, ValueError) as error:
            raise UserError(str(error)) from error
    for halves in manifest.graphs.values():
        for graph in halves.values():
            size = (out / graph.file).stat().st_size / 1e6
            print(f"{out / graph.file}: {size:.1f} MB, sha256 {graph.sha256}")
    first = next(iter(manifest.graphs))
    as_precision = "" if "fp32" in manifest.graphs else f" --precision {first}"
    print(
        f"{manifest.model}, opset {manifest.opset}, licence of the weights {manifest.licence}; "
        f"compare with PyTorch: fpt check --model {model} --backend onnxruntime --graphs {out}"
        f"{as_precision}"
    )
