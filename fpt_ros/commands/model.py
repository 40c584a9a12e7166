# SPDX-License-Identifier: MIT
"""The options that choose a model and what runs it, the same for all commands."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpt_ros.commands.arguments import UserError

if TYPE_CHECKING:  # importing torch takes seconds, which help and error messages must not cost
    from fpt_model import FlowPredictor

ModelOption = Annotated[str, typer.Option("--model", help="A shipped model or a checkpoint file.")]
BackendOption = Annotated[
    str,
    typer.Option(
        "--backend", help="torch; onnxruntime, which needs --graphs; auto: that if given."
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option("--precision", help="fp32; bf16 with torch; fp16 or int8 with onnxruntime."),
]
GraphsOption = Annotated[
    Path | None,
    typer.Option("--graphs", help="The folder that fpt export wrote.", show_default=False),
]
ProvidersOption = Annotated[
    str,
    typer.Option(
        "--providers", help="What ONNX Runtime may use, the first preferred: tensorrt,cuda,cpu."
    ),
]
CompileOption = Annotated[
    bool,
    typer.Option("--compile", help="Compile the model, with torch; needs a C++ compiler."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="As torch names it: cpu, cuda:1.")]


def load_predictor(
    model: str,
    backend: str = "auto",
    precision: str = "fp32",
    graphs: Path | None = None,
    providers: str = "cpu",
    device: str = "cpu",
    compile: bool = False,
) -> FlowPredictor:
    """What answers; UserError where exactly this cannot be had, never something else instead.

    The licence of its weights is told on the standard error, where it is not this project's.
    """
    from fpt_model import BackendError, CheckpointError, FlowPredictor, FPTConfig

    if graphs and backend == "torch":
        raise UserError(f"--graphs {graphs} needs --backend onnxruntime")
    try:
        predictor = FlowPredictor.load(
            model,
            backend,  # type: ignore[arg-type]  # the predictor checks both
            device,
            precision,  # type: ignore[arg-type]
            graphs,
            providers=providers.split(","),
            strict=True,
            compile=compile,
        )
    except (CheckpointError, FileNotFoundError) as error:
        raise UserError(f"--model: {error}") from error
    except (BackendError, OSError, RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    if predictor.config.licence != FPTConfig.licence:
        _tell(f"weights of {predictor.config.name}: licence {predictor.config.licence}")
    return predictor


@cache
def _tell(text: str) -> None:
    """Once, however often a command loads the model."""
    typer.echo(text, err=True)
