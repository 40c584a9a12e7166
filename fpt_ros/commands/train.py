# SPDX-License-Identifier: MIT
"""``fpt train``: train a model, or go on where a run stopped."""

from __future__ import annotations

from dataclasses import replace
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
    accelerator: Annotated[
        str, typer.Option(help="cpu, cuda, ...; auto: a GPU where there is one.")
    ] = "auto",
    devices: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes of a machine, one a device; as torchrun or srun started them, else "
            "all GPUs.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Machines; as torchrun or srun started them, else 1.", show_default=False
        ),
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="ddp; auto: ddp where there are several devices.")
    ] = "auto",
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that make examples, for each device.")
    ] = 1,
) -> None:
    """Train a model; if the folder of the run holds a checkpoint, go on from there.

    Started by torchrun or srun, it is one process of many: see docs/training.md.
    """
    import yaml

    try:
        from training.config import RunConfig
        from training.devices import launch
        from training.train import Trainer, log_from_first
    except ImportError as error:
        raise UserError(
            "training needs lightning-fabric, matplotlib, tensorboard and tqdm "
            f"(pip install): {error}"
        ) from error

    try:
        chosen = RunConfig.load(config, [*(QUICK if quick else ()), *(overrides or [])])
        fabric = launch(chosen.optim.precision, accelerator, devices, nodes, strategy)
        log_from_first(fabric)
        if quick:  # a share for each process
            least = -(-chosen.optim.batch_size // fabric.world_size) * fabric.world_size
            chosen = replace(chosen, optim=replace(chosen.optim, batch_size=least))
        trainer = Trainer(chosen, data, out, fabric, workers)
    except (OSError, ValueError, ModuleNotFoundError, yaml.YAMLError) as error:
        raise UserError(str(error)) from error
    trainer.run()
    if fabric.is_global_zero:
        print(f"{out / 'model.safetensors'}: {chosen.model.name} after {trainer.step} steps")
