# SPDX-License-Identifier: MIT
"""Reading what a user types: pokes, points and grids in px of the source image."""

from __future__ import annotations

import math


class UserError(ValueError):
    """The user gave something unusable; the text names it and what was expected, in one line."""


def _numbers(text: str, names: str, what: str) -> list[float]:
    fields = text.split(",")
    try:
        values = [float(field) for field in fields]
    except ValueError:
        values = []
    if len(values) != len(names.split(",")) or not all(map(math.isfinite, values)):
        unit = ", dz in m or left out," if "dz" in names else ""
        raise UserError(f"{what} must be {names} as finite numbers in px{unit} received {text!r}")
    return values


def parse_poke(text: str) -> tuple[float, float, float, float, float]:
    """``"x,y,dx,dy"`` in px, or ``"x,y,dx,dy,dz"`` with dz in m, else NaN; UserError otherwise."""
    if text.count(",") == 4:
        x, y, dx, dy, dz = _numbers(text, "x,y,dx,dy,dz", "a poke")
        return x, y, dx, dy, dz
    x, y, dx, dy = _numbers(text, "x,y,dx,dy", "a poke")
    return x, y, dx, dy, math.nan


def parse_intrinsics(text: str) -> tuple[float, float, float, float]:
    """``"fx,fy,cx,cy"`` in px; UserError otherwise."""
    fx, fy, cx, cy = _numbers(text, "fx,fy,cx,cy", "intrinsics")
    return fx, fy, cx, cy


def parse_query(text: str) -> tuple[float, float]:
    """``"x,y"`` in px; UserError otherwise."""
    x, y = _numbers(text, "x,y", "a query")
    return x, y


def parse_grid(text: str) -> tuple[int, int]:
    """``"COLUMNSxROWS"`` to ``(rows, columns)``; UserError otherwise."""
    columns, _, rows = text.lower().partition("x")
    if not (columns.isdecimal() and rows.isdecimal() and int(columns) and int(rows)):
        raise UserError(f"a grid must be COLUMNSxROWS such as 8x8, received {text!r}")
    return int(rows), int(columns)
