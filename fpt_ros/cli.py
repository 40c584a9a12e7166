# SPDX-License-Identifier: MIT
"""The ``fpt`` command. Needs no ROS, except its sub-commands ``bag`` and ``view``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from fpt_model.allocator import keep_freed_memory
from fpt_ros.commands.arguments import UserError
from fpt_ros.commands.bag import bag
from fpt_ros.commands.check import check
from fpt_ros.commands.convert import convert
from fpt_ros.commands.evaluate import evaluate
from fpt_ros.commands.export import export
from fpt_ros.commands.predict import predict
from fpt_ros.commands.train import train
from fpt_ros.commands.view import view

app = typer.Typer(
    name="fpt",
    help="Flow Poke Transformer: how does a scene move when it is poked?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(bag)
app.command()(check)
app.command()(convert)
app.command()(export)
app.command("eval")(evaluate)
app.command()(predict)
app.command()(train)
app.command()(view)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 0, or with 2 and one line for a user's mistake."""
    keep_freed_memory()
    before = signal.signal(signal.SIGTERM, _end)
    try:
        app(arguments, prog_name="fpt")
    except UserError as error:
        print(f"fpt: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, _: object) -> NoReturn:
    """Ends as an interrupted command does: what is half done is taken away."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
