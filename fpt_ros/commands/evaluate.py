# SPDX-License-Identifier: MIT
"""``fpt eval``: a model's figures on a suite."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Annotated

import typer

from fpt_ros.commands.arguments import UserError


def evaluate(
    suite: Annotated[
        str,
        typer.Option(
            help="procedural, foreign, clips, or a YAML file; see docs/evaluation.md.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path, typer.Option(help="Folder with the shards of the suite's splits and of val.")
    ] = Path("data"),
    model: Annotated[str, typer.Option(help="A shipped model or a checkpoint file.")] = "fpt-tiny",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for figures and plots; evaluation/SUITE.", show_default=False),
    ] = None,
    single_gaussian: Annotated[
        str | None,
        typer.Option(
            help="A model with one component, measured beside the other.", show_default=False
        ),
    ] = None,
    planar_model: Annotated[
        str | None,
        typer.Option(
            help="A planar model, measured in the image beside a three-dimensional one.",
            show_default=False,
        ),
    ] = None,
    scenes: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many of each split.", show_default=False),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32 or bf16; of exported graphs fp32, fp16 or int8.")
    ] = "fp32",
    graphs: Annotated[
        Path | None,
        typer.Option(
            help="Folder written by fpt export: ONNX Runtime runs the model.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of pokes and draws.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few scenes, to see that all runs.")
    ] = False,
    save_threshold: Annotated[
        bool,
        typer.Option(
            "--save-threshold",
            help="Write the KL threshold chosen on the validation split into the model's file.",
        ),
    ] = False,
) -> None:
    """Measure a model on a suite, beside baselines; write tables, plots and pictures.

    Thresholds are chosen on the split val alone, whatever the suite.
    """
    from fpt_model import CheckpointError
    from fpt_model.checkpoint import resolve_model, shipped_model_folders
    from fpt_model.engine import BackendError

    try:
        from sim.dataset import sha256
        from training.evaluation import run
        from training.evaluation.suite import EvaluationError, Suite
    except ImportError as error:
        raise UserError(f"evaluation needs matplotlib and tqdm (pip install): {error}") from error

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        chosen = Suite.load(suite)
        if quick:
            chosen = chosen.quick()
        if scenes:
            chosen = dataclasses.replace(chosen, scenes=scenes)
        folder = out or Path("evaluation") / chosen.name
        path = resolve_model(model)
        shipped = path.resolve().parent in [f.resolve() for f in shipped_model_folders()]
        few = chosen.scenes < chosen.validation_scenes
        if save_threshold and (quick or few) and shipped:
            raise UserError(
                f"--save-threshold for the shipped {model!r} needs {chosen.validation_scenes} "
                f"scenes or more and no --quick, received {chosen.scenes} scenes"
            )
        if save_threshold and path.suffix != ".safetensors":
            raise UserError(
                f"--save-threshold needs a .safetensors model, received {str(model)!r}; "
                "fpt convert makes one"
            )
        figures = run.run(
            chosen, model, data, folder, single_gaussian, precision, seed, graphs, planar_model
        )
        if save_threshold:
            run.save_threshold(path, figures["thresholds"]["kl_matched"])
            print(f"{path}: sha256 {sha256(path)}, with the threshold")  # another than before
    except (BackendError, CheckpointError, EvaluationError, OSError, ValueError) as error:
        raise UserError(str(error)) from error
    print((folder / "figures.md").read_text())
    print(f"wrote {folder}")
