# SPDX-License-Identifier: MIT
"""``fpt convert``: a checkpoint, such as the published one, as a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fpt_ros.commands.arguments import UserError

_TYPES = ("float32", "float16", "bfloat16")


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="flow_poke_open_set_base.pt as published, or a .safetensors file.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(_TYPES)}.")] = "float32",
) -> None:
    """Write a checkpoint's weights and configuration as safetensors, which loads faster.

    A converted file keeps the licence of its weights: those published with the paper are
    CC BY-NC 4.0, not for commercial use.
    """
    if dtype not in _TYPES:
        raise UserError(f"--dtype must be one of {', '.join(_TYPES)}, received {dtype!r}")
    if out.suffix != ".safetensors":
        raise UserError(f"the file to write must end with .safetensors, received {str(out)!r}")
    if not out.parent.is_dir():
        raise UserError(f"the folder of {str(out)!r} does not exist")
    if out.exists():
        raise UserError(f"{str(out)!r} exists already")

    import torch

    from fpt_model import load_model, save_model

    try:
        model = load_model(checkpoint)
        save_model(model, out, getattr(torch, dtype))
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{out}: {model.config.name}, {parameters / 1e6:.1f} M parameters as {dtype}, "
        f"{out.stat().st_size / 1e6:.0f} MB, licence of the weights {model.config.licence}"
    )
