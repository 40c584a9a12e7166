# SPDX-License-Identifier: MIT
"""``fpt train``: train a model, or go on where a run stopped."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from fpt_ros.commands.arguments import UserError

QUICK = (
    *("optim.steps=4", "optim.warmup_steps=2", "optim.decay_steps=2", "optim.batch_size=4"),
    *("optim.checkpoint_every=4", "optim.validate_every=4", "optim.compile=false"),
)
"""What ``--quick`` overrides."""


def train(
    config: Annotated[
        Path, typer.Option(help="YAML file, see training/configs.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(help="Folder with shards of sim.dataset or training.tracks: train, val."),
    ] = Path("data"),
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SECTION.KEY=VALUE", help="Such as optim.steps=100.", show_default=False
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps, to see that all runs.")
    ] = False,
) -> None:
    """Train a model; if the folder of the run holds a checkpoint, go on from there."""
    import yaml

    from training.config import RunConfig
    from training.train import Trainer

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        chosen = RunConfig.load(config, [*(QUICK if quick else ()), *(overrides or [])])
        trainer = Trainer(chosen, data, out)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(str(error)) from error
    trainer.run()
    print(f"{out / 'model.safetensors'}: {chosen.model.name} after {trainer.step} steps")
