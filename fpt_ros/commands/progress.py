# SPDX-License-Identifier: MIT
"""The bar that shows how far a command is."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(doing: str, unit: str, disable: bool = False) -> Progress:
    """A bar on stderr: ``doing``, how many of how many ``unit`` are done, the time left."""
    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit}, left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=disable)
