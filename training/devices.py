# SPDX-License-Identifier: MIT
"""On how many devices of how many machines a run trains: `Fabric` processes, one a device."""

from __future__ import annotations

import os

from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
"""Fabric's names of a configuration's ``optim.precision``."""

STRATEGIES = ("auto", "ddp")
"""The whole model is on each device; "auto" is DDP where there are several."""


def started_processes() -> tuple[int, int] | None:
    """(processes a machine, machines) that torchrun or srun has started; None: neither has."""
    if TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    if SLURMEnvironment.detect():
        nodes = int(os.environ["SLURM_NNODES"])
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return None


def launch(
    precision: str,
    accelerator: str = "auto",
    devices: int | None = None,
    nodes: int | None = None,
    strategy: str = "auto",
) -> Fabric:
    """This process as one of a run's; without torchrun or srun, starts the others.

    Args:
        precision: "fp32" or "bf16".
        accelerator: "cpu", "cuda", ...; "auto" takes a GPU where there is one.
        devices, nodes: of each machine; machines. None: as torchrun or srun started them, else all
            GPUs (or the CPU as one device) of this machine.
        strategy: one of `STRATEGIES`.

    Raises ValueError for what cannot be had, and for numbers that contradict torchrun's or srun's.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, received {strategy!r}")
    started = started_processes() or ("auto", 1)
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=started[0] if devices is None else devices,
            num_nodes=started[1] if nodes is None else nodes,
            strategy=strategy,
            precision=PRECISIONS[precision],  # type: ignore[arg-type]
        )
    # such as an accelerator that is not there, or more GPUs than there are
    except (RuntimeError, MisconfigurationException) as error:
        raise ValueError(str(error)) from error
    fabric.launch()
    return fabric
