# SPDX-License-Identifier: MIT
"""Cabinets with drawers, and cupboards, refrigerators and rooms with hinged doors."""

import mujoco
import numpy as np

from sim.assets.pieces import add_feet, add_handle, add_prop, add_shell, add_trim
from sim.builder import Builder, Extent

Body = mujoco.MjsBody


def drawer(b: Builder, root: Body) -> Extent:
    rows, columns = b.pick(
        (1, 1), (1, 2), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (1, 3), (5, 1), (2, 3)
    )
    x = b.uniform(0.22, 0.5) if columns == 1 else b.uniform(0.35, 0.6)
    cell = b.uniform(0.09, 0.36) if rows > 1 else b.uniform(0.1, 0.5)
    z = min(rows * cell, 1.0) / 2
    y = b.uniform(0.15, 0.4)
    wall = min(b.uniform(0.012, 0.04), 0.2 * z)
    feet = add_feet(b, root, x, y)
    add_shell(b, root, (x, y, z), wall, feet, back=True)
    top = feet + 2 * z
    if b.chance(0.4):  # counter top
        over, thick = b.uniform(0, 0.05), b.uniform(0.01, 0.03)
        b.box(root, (x + over, y + over, thick), (0, 0, top + thick), "counter")
        top += 2 * thick
    heights = b.rng.dirichlet(np.full(rows, b.pick(3.0, 30.0, 500.0))) * 0.5 + 0.5 / rows
    heights *= 2 * (z - wall)
    gap = b.uniform(0.002, 0.012)
    overlay = b.chance(0.5)
    front = b.uniform(0.008, 0.03)
    handle_seed = int(b.rng.integers(2**31))
    same_handles = b.chance(0.85)
    handle_size = b.uniform(0.3, 0.9) * min(2 * (x - wall) / columns, 0.45)
    handle_size = min(handle_size, 1.3 * float(heights.min()))
    low = feet + wall
    width = 2 * (x - wall) / columns
    index = 0
    for row in range(rows):
        height = float(heights[row])
        middle = low + height / 2
        low += height
        if row:
            b.box(root, (x - wall, y * 0.97, wall / 4), (0, 0, low - height), "inside")
        for column in range(columns):
            centre = -x + wall + width * (column + 0.5)
            if column and row == 0:
                b.box(
                    root,
                    (wall / 4, y * 0.97, z - wall),
                    (centre - width / 2, 0, feet + z),
                    "inside",
                )
            shelf = rows * columns > 2 and b.chance(0.08)
            last = row == rows - 1 and column == columns - 1
            if shelf and (index or not last):
                continue  # open; but one drawer there is
            reach = 2 * (y - wall)
            part = b.slide(
                root, (centre, 0, middle), (0, -1, 0), (0, b.uniform(0.55, 0.9) * reach), rest=0.6
            )
            fx, fz = width / 2 - gap, height / 2 - gap
            if overlay:
                fx += wall * 0.3
                face = -y - 2 * front
                b.box(part, (fx, front, fz), (0, -y - front, 0), "front", index)
            else:
                face = -y + b.uniform(-0.005, 0.005)
                b.box(part, (fx, front, fz), (0, face + front, 0), "front", index)
            add_trim(b, part, fx, fz, (0, face, 0), index)
            tray = min(b.uniform(0.4, 0.95), 1.0) * fz
            tx, ty, floor = fx - wall * 0.6 - gap, reach / 2, -fz * 0.85
            for side in (-1, 1):
                b.box(part, (wall / 4, ty, tray * 0.8), (side * tx, 0, floor + tray * 0.8), "tray")
            b.box(part, (tx, wall / 4, tray * 0.8), (0, ty - wall, floor + tray * 0.8), "tray")
            b.box(part, (tx, ty, wall / 4), (0, 0, floor), "tray")
            if b.chance(0.4):  # something in the drawer
                for item in range(b.integer(1, 3)):
                    inside = b.fixed(part)
                    size = b.uniform(0.25, 0.6) * min(tx, fz)
                    at = (b.uniform(-0.6, 0.6) * tx, b.uniform(-0.8, 0.4) * ty, floor + wall / 4)
                    add_prop(b, inside, at, size, index * 3 + item)
            here = b.rng
            if same_handles:  # the same random choices for each drawer
                b.rng = np.random.default_rng(handle_seed)
            places = (-0.5, 0.5) if width > 0.7 and b.chance(0.5) else (0.0,)
            for place in places:
                up = b.pick(0.0, 0.0, 0.5)
                add_handle(b, part, (place * fx, face, up * fz), min(handle_size, 1.6 * fx), index)
            b.rng = here
            index += 1
    if b.chance(0.35):  # things standing on top
        for item in range(b.integer(1, 3)):
            add_prop(
                b, root, (b.uniform(-0.8, 0.8) * x, b.uniform(-0.5, 0.5) * y, top), 0.1, 20 + item
            )
    return Extent(x, y, top)


def _leaf(
    b: Builder,
    hinge: Body,
    centre: tuple[float, float],
    width: float,
    height: float,
    thick: float,
    index: int,
) -> None:
    """A door leaf round (x, z) = `centre` of its hinge body, its inner face at y = 0."""
    cx, cz = centre
    style = b.integer(0, 4)
    if style == 0 and width > 0.2:  # open frame with bars
        border = b.uniform(0.1, 0.2) * min(width, height)
        for offset in (-1, 1):
            b.box(
                hinge,
                (border / 2, thick, height / 2),
                (cx + offset * (width - border) / 2, -thick, cz),
                "front",
                index,
            )
        for offset in (-1, 1):
            at = (cx, -thick, cz + offset * (height - border) / 2)
            b.box(hinge, (width / 2, thick, border / 2), at, "front", index)
        if b.chance(0.7):
            b.box(
                hinge,
                (width / 2 - border, thick * 0.3, height / 2 - border),
                (cx, -thick, cz),
                "glass",
                index,
            )
        for i in range(b.integer(1, 4)):
            b.box(
                hinge,
                (border / 6, thick * 0.7, height / 2),
                (cx + width * (0.2 * i - 0.3), -thick, cz),
                "trim",
                index,
            )
    else:
        b.box(hinge, (width / 2, thick, height / 2), (cx, -thick, cz), "front", index)
        add_trim(b, hinge, width / 2, height / 2, (cx, -2 * thick, cz), index)


def _side_leaf(
    b: Builder,
    hinge: Body,
    side: int,
    width: float,
    height: float,
    thick: float,
    index: int,
    handle: float,
) -> None:
    """A leaf at z 0..height of its hinge body, reaching `width` towards -side * x."""
    _leaf(b, hinge, (-side * width / 2, height / 2), width, height, thick, index)
    at = (-side * width * b.uniform(0.8, 0.92), -2 * thick, height * handle)
    add_handle(b, hinge, at, b.uniform(0.2, 0.7) * min(width, height, 0.4), index)


def _flap(
    b: Builder,
    root: Body,
    edge: int,
    bottom: tuple[float, float, float],
    width: float,
    height: float,
    thick: float,
    index: int,
) -> None:
    """A leaf over `bottom`, the middle of its lower edge, hung there (edge -1) or on top (1)."""
    x, y, z = bottom
    reach = height * b.uniform(0.78, 0.9)  # of the handle from the hinge
    size = b.uniform(0.3, 0.85) * min(width, 1.5 * height, 0.5)
    if edge < 0:
        # Down to the horizontal, or until the handle meets the ground.
        low = max(2 * thick + 0.3 * size - z, 0.0)
        limits = (0.0, b.uniform(1.3, np.pi / 2) - float(np.arctan2(low, reach)))
    else:
        z += height
        limits = (-b.uniform(1.2, 1.7), 0.0)
    hinge = b.hinge(root, (x, y, z), (1, 0, 0), limits, rest=0.55)
    _leaf(b, hinge, (0, -edge * height / 2), width, height, thick, index)
    add_handle(b, hinge, (0, -2 * thick, -edge * reach), size, index, along="x")


def door(b: Builder, root: Body) -> Extent:
    """Cupboards, refrigerators, ovens, cabinets with flaps, room doors and gates."""
    limit = b.uniform(1.2, 2.6)
    if b.chance(0.25):  # a room door or gate in its frame
        width, height = b.uniform(0.35, 0.6), b.uniform(0.6, 1.0)
        post, thick = b.uniform(0.02, 0.06), b.uniform(0.008, 0.02)
        for sx in (-1, 1):
            b.box(
                root,
                (post / 2, post / 2, height / 2 + post),
                (sx * (width + post) / 2, 0, height / 2 + post),
                "frame",
            )
        if b.chance(0.75):
            b.box(
                root, (width / 2 + post, post / 2, post / 2), (0, 0, height + 1.5 * post), "frame"
            )
        if b.chance(0.6):  # the wall round it
            for sx in (-1, 1):
                b.box(
                    root,
                    (0.4, post / 3, height / 2 + post),
                    (sx * (width / 2 + post + 0.4), 0, height / 2 + post),
                    "wall",
                )
        count = b.pick(1, 1, 2)
        inward = b.pick(-1, 1)
        for i in range(count):
            side = b.pick(-1, 1) if count == 1 else (-1, 1)[i]
            lo, hi = sorted((0.0, side * limit * inward * 0.8))
            hinge = b.hinge(
                root, (side * width / 2, 0, b.uniform(0.0, 0.02)), (0, 0, 1), (lo, hi), rest=0.4
            )
            _side_leaf(b, hinge, side, width / count * 0.98, height, thick, i, 0.5)
        return Extent(width / 2 + post, 0.1, height + 2 * post)
    x, y, z = b.uniform(0.2, 0.5), b.uniform(0.12, 0.35), b.uniform(0.2, 0.5)
    wall, thick = b.uniform(0.012, 0.04), b.uniform(0.006, 0.02)
    feet = add_feet(b, root, x, y)
    add_shell(b, root, (x, y, z), wall, feet)
    for i in range(b.integer(0, 3)):  # shelves, with things on them
        level = feet + 2 * z * (i + 1) / 4
        b.box(root, (x - wall, y * 0.85, wall / 3), (0, 0.1 * y, level), "inside")
        for item in range(b.integer(0, 2)):
            at = (b.uniform(-0.7, 0.7) * x, b.uniform(-0.3, 0.4) * y, level + wall / 3)
            add_prop(b, root, at, b.uniform(0.04, 0.09), 3 * i + item)
    flaps = b.chance(1 / 3)  # a quarter of all, since room doors have none
    side_by_side = () if flaps else ("double", "row")
    layout = b.pick("single", "single", "stacked", *side_by_side)
    gap = b.uniform(0.003, 0.01)
    edge = b.pick(-1, 1)
    inset = not flaps and b.chance(0.3)  # a flap in the carcass would turn into it
    y_front = -y + 2 * thick if inset else -y - 0.002
    inner_x, inner_z = (x - wall, z - wall) if inset else (x, z)
    low = feet + (z - inner_z)
    cells: list[tuple[int, float, float, float, float]] = []  # side, hinge x, low z, width, height
    side = b.pick(-1, 1)
    if layout == "single":
        cells = [(side, side * inner_x, low, 2 * inner_x, 2 * inner_z)]
    elif layout == "double":
        cells = [(s, s * inner_x, low, inner_x - gap, 2 * inner_z) for s in (-1, 1)]
    elif layout == "stacked":
        share = b.uniform(0.25, 0.7) * 2 * inner_z
        cells = [
            (side, side * inner_x, low, 2 * inner_x, share - gap),
            (side, side * inner_x, low + share, 2 * inner_x, 2 * inner_z - share),
        ]
    else:
        count = b.integer(2, 3)
        width = 2 * inner_x / count
        for i in range(count):
            s = b.pick(-1, 1)
            at = -inner_x + width * (i + (s + 1) / 2)
            cells.append((s, at, low, width - gap, 2 * inner_z))
    handle = b.uniform(0.3, 0.7)
    for i, (s, at, bottom, width, height) in enumerate(cells):
        if flaps:
            middle = (at - s * width / 2, y_front, bottom)
            _flap(b, root, edge, middle, width, height, thick, i)
            continue
        lo, hi = sorted((0.0, s * limit))
        hinge = b.hinge(root, (at, y_front, bottom), (0, 0, 1), (lo, hi), rest=0.55)
        _side_leaf(b, hinge, s, width, height, thick, i, handle)
        if b.chance(0.15):  # rack on the inside of the door
            rack = b.fixed(hinge)
            b.box(rack, (width * 0.35, 0.03, 0.03), (-s * width / 2, 0.03, height * 0.4), "tray", i)
    if b.chance(0.35):
        for item in range(b.integer(1, 3)):
            at = (b.uniform(-0.8, 0.8) * x, b.uniform(-0.5, 0.5) * y, feet + 2 * z)
            add_prop(b, root, at, b.uniform(0.05, 0.12), 20 + item)
    return Extent(x, y, feet + 2 * z)
