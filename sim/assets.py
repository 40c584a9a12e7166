# SPDX-License-Identifier: MIT
"""Procedural assets, a function a kind: `BUILDERS[kind](builder, root) -> Extent`.

Unit and frame are those of `sim.builder`: about 1 in the largest extent, on z = 0, front to -y.
"""

from collections.abc import Callable

import mujoco
import numpy as np

from sim.builder import Builder, Extent, multiply, turn

Body = mujoco.MjsBody


# Shared pieces ------------------------------------------------------------------------------


def _handle(
    b: Builder, body: Body, at: tuple[float, float, float], size: float, index: int
) -> None:
    """A handle on a front whose outer face is the plane y = at[1]; `size` about its length."""
    x, y, z = at
    thick = size * b.uniform(0.05, 0.12)
    reach = size * b.uniform(0.12, 0.3)
    style = b.integer(0, 5)
    along = b.pick("x", "z")
    if style == 0:  # bar on two posts
        half = size * b.uniform(0.3, 0.5)
        shape = b.pick(b.capsule, b.cylinder)
        shape(body, thick, half, (x, y - reach, z), along, "handle", index)
        for side in (-0.8, 0.8):
            offset = (side * half, 0, 0) if along == "x" else (0, 0, side * half)
            post = (x + offset[0], y - reach / 2, z + offset[2])
            b.cylinder(body, thick * 0.8, reach / 2, post, "y", "handle", index)
    elif style == 1:  # round knob
        radius = size * b.uniform(0.12, 0.25)
        b.cylinder(body, radius * 0.5, reach / 2, (x, y - reach / 2, z), "y", "handle", index)
        b.ellipsoid(
            body, (radius, radius * b.uniform(0.4, 1), radius), (x, y - reach, z), "handle", index
        )
    elif style == 2:  # plate
        half = size * b.uniform(0.25, 0.5)
        width = size * b.uniform(0.08, 0.2)
        extents = (half, reach / 2, width) if along == "x" else (width, reach / 2, half)
        b.box(body, extents, (x, y - reach / 2, z), "handle", index)
    elif style == 3:  # disc
        radius = size * b.uniform(0.12, 0.28)
        b.cylinder(body, radius, reach / 3, (x, y - reach / 3, z), "y", "handle", index)
    elif style == 4:  # lip along the edge
        b.box(body, (size * 0.5, reach * 0.6, thick), (x, y - reach * 0.6, z), "handle", index)
    # style 5: no handle


def _shell(
    b: Builder,
    body: Body,
    half: tuple[float, float, float],
    wall: float,
    z: float,
    back: bool = True,
) -> None:
    """A box open at its front (-y), bottom at `z`; `half` are its outer half extents."""
    x, y, h = half
    b.box(body, (wall / 2, y, h), (-x + wall / 2, 0, z + h), "shell")
    b.box(body, (wall / 2, y, h), (x - wall / 2, 0, z + h), "shell")
    b.box(body, (x, y, wall / 2), (0, 0, z + wall / 2), "shell")
    b.box(body, (x, y, wall / 2), (0, 0, z + 2 * h - wall / 2), "shell")
    if back:
        b.box(body, (x, wall / 2, h), (0, y - wall / 2, z + h), "inside")


def _feet(b: Builder, body: Body, x: float, y: float) -> float:
    """Feet, a plinth or nothing below a piece of furniture; returns their height."""
    style = b.integer(0, 3)
    if style == 0:
        return 0.0
    height = b.uniform(0.03, 0.2)
    if style == 1:
        b.box(body, (x * 0.92, y * 0.9, height / 2), (0, 0, height / 2), "feet")
        return height
    radius = b.uniform(0.015, 0.04)
    for sx in (-1, 1):
        for sy in (-1, 1):
            at = (sx * (x - 1.5 * radius), sy * (y - 1.5 * radius), height / 2)
            if style == 2:
                b.box(body, (radius, radius, height / 2), at, "feet")
            else:
                b.cylinder(body, radius, height / 2, at, "z", "feet")
    return height


def _trim(
    b: Builder,
    body: Body,
    half_x: float,
    half_z: float,
    centre: tuple[float, float, float],
    index: int,
) -> None:
    """Relief on a front whose outer face is at centre[1]: a frame, an inlay, bars or nothing."""
    x, y, z = centre
    style = b.integer(0, 4)
    border = b.uniform(0.08, 0.25) * min(half_x, half_z)
    depth = b.uniform(0.004, 0.012)
    if style == 0:
        for sx in (-1, 1):
            b.box(
                body,
                (border / 2, depth, half_z),
                (x + sx * (half_x - border / 2), y, z),
                "trim",
                index,
            )
        for sz in (-1, 1):
            b.box(
                body,
                (half_x, depth, border / 2),
                (x, y, z + sz * (half_z - border / 2)),
                "trim",
                index,
            )
    elif style == 1:
        b.box(body, (half_x - border, depth, half_z - border), (x, y, z), "trim", index)
    elif style == 2:
        count = b.integer(2, 5)
        for i in range(count):
            at = x + half_x * (2 * (i + 0.5) / count - 1)
            b.box(body, (half_x / count * 0.35, depth, half_z * 0.92), (at, y, z), "trim", index)


def _vessel(b: Builder, radius: float, height: float) -> list[tuple[float, float]]:
    """A lathe profile: cup, bowl, bottle, vase, jar or disc-like solid."""
    style = b.integer(0, 4)
    wall = 0.12 * radius
    r, h = radius, height
    if style == 0:  # cup or bowl
        base = b.uniform(0.5, 1.0)
        belly = b.uniform(0.8, 1.0)
        outer = [(0, 0), (base * r, 0), (belly * r, 0.45 * h), (r, h)]
        inner = [
            (r - wall, h),
            (belly * r - wall, 0.45 * h),
            (base * r - wall, 0.1 * h),
            (0, 0.1 * h),
        ]
        return outer + inner
    if style == 1:  # bottle
        neck = b.uniform(0.2, 0.5)
        shoulder = b.uniform(0.5, 0.75)
        return [
            (0, 0),
            (r, 0),
            (r, shoulder * h),
            (neck * r, (shoulder + 0.15) * h),
            (neck * r, h),
            (0, h),
        ]
    if style == 2:  # smooth vase
        z = np.linspace(0, 1, 8)
        phase = b.uniform(0, 2 * np.pi)
        radii = r * (0.65 + 0.33 * np.sin(b.uniform(2, 6) * z + phase))
        return [(0, 0), *zip(radii, z * h, strict=True), (0, h)]
    if style == 3:  # jar with a cap
        cap = b.uniform(0.7, 1.0)
        return [
            (0, 0),
            (r, 0),
            (r, 0.72 * h),
            (cap * r * 0.9, 0.76 * h),
            (cap * r, 0.78 * h),
            (cap * r, h),
            (0, h),
        ]
    taper = b.uniform(0.3, 1.0)
    return [(0, 0), (r, 0), (r * taper, h), (0, h)]


def prop(
    b: Builder, body: Body, at: tuple[float, float, float], size: float, index: int = 0
) -> float:
    """A small thing standing at `at` with about the half extent `size`; returns its height."""
    x, y, z = at
    style = b.integer(0, 5)
    height = size * b.uniform(0.5, 2.2)
    quat = turn("z", b.uniform(-np.pi, np.pi))
    if style in (0, 1):
        half = (size * b.uniform(0.4, 0.8), size * b.uniform(0.2, 0.7), height / 2)
        b.box(body, half, (x, y, z + height / 2), "prop", index, quat)
    elif style == 2:
        b.cylinder(
            body, size * b.uniform(0.3, 0.8), height / 2, (x, y, z + height / 2), "z", "prop", index
        )
    elif style == 3:
        radius = size * b.uniform(0.3, 0.7)
        height = 2 * radius
        b.ellipsoid(body, (radius,) * 3, (x, y, z + radius), "prop", index)
    else:
        b.lathe(body, _vessel(b, size * b.uniform(0.4, 0.8), height), at, "z", "prop", index)
    return height


# Training kinds -----------------------------------------------------------------------------


def drawer(b: Builder, root: Body) -> Extent:
    rows, columns = b.pick(
        (1, 1), (1, 2), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (1, 3), (5, 1), (2, 3)
    )
    x = b.uniform(0.22, 0.5) if columns == 1 else b.uniform(0.35, 0.6)
    cell = b.uniform(0.09, 0.36) if rows > 1 else b.uniform(0.1, 0.5)
    z = min(rows * cell, 1.0) / 2
    y = b.uniform(0.15, 0.4)
    wall = min(b.uniform(0.012, 0.04), 0.2 * z)
    feet = _feet(b, root, x, y)
    _shell(b, root, (x, y, z), wall, feet, back=True)
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
            if rows * columns > 2 and b.chance(0.08):
                continue  # an open shelf
            reach = 2 * (y - wall)
            part = b.slide(
                root, (centre, 0, middle), (0, -1, 0), (0, b.uniform(0.55, 0.9) * reach), rest=0.6
            )
            fx, fz = width / 2 - gap, height / 2 - gap
            if overlay:
                fx, fz = fx + wall * 0.3, fz
                face = -y - 2 * front
                b.box(part, (fx, front, fz), (0, -y - front, 0), "front", index)
            else:
                face = -y + b.uniform(-0.005, 0.005)
                b.box(part, (fx, front, fz), (0, face + front, 0), "front", index)
            _trim(b, part, fx, fz, (0, face, 0), index)
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
                    prop(b, inside, at, size, index * 3 + item)
            here = b.rng
            if same_handles:  # the same random choices for each drawer
                b.rng = np.random.default_rng(handle_seed)
            places = (-0.5, 0.5) if width > 0.7 and b.chance(0.5) else (0.0,)
            for place in places:
                up = b.pick(0.0, 0.0, 0.5)
                _handle(b, part, (place * fx, face, up * fz), min(handle_size, 1.6 * fx), index)
            b.rng = here
            index += 1
    if b.chance(0.35):  # things standing on top
        for item in range(b.integer(1, 3)):
            prop(b, root, (b.uniform(-0.8, 0.8) * x, b.uniform(-0.5, 0.5) * y, top), 0.1, 20 + item)
    return Extent(x, y, top)


def _leaf(
    b: Builder,
    hinge: Body,
    side: int,
    width: float,
    height: float,
    thick: float,
    index: int,
    handle: float,
) -> None:
    """A door leaf at z 0..height of its hinge body, reaching `width` towards -side * x."""
    cx = -side * width / 2
    style = b.integer(0, 4)
    if style == 0 and width > 0.2:  # open frame with bars
        border = b.uniform(0.1, 0.2) * min(width, height)
        for offset in (-1, 1):
            b.box(
                hinge,
                (border / 2, thick, height / 2),
                (cx + offset * (width - border) / 2, -thick, height / 2),
                "front",
                index,
            )
        for low in (border / 2, height - border / 2):
            b.box(hinge, (width / 2, thick, border / 2), (cx, -thick, low), "front", index)
        if b.chance(0.7):
            b.box(
                hinge,
                (width / 2 - border, thick * 0.3, height / 2 - border),
                (cx, -thick, height / 2),
                "glass",
                index,
            )
        for i in range(b.integer(1, 4)):
            b.box(
                hinge,
                (border / 6, thick * 0.7, height / 2),
                (cx + width * (0.2 * i - 0.3), -thick, height / 2),
                "trim",
                index,
            )
    else:
        b.box(hinge, (width / 2, thick, height / 2), (cx, -thick, height / 2), "front", index)
        _trim(b, hinge, width / 2, height / 2, (cx, -2 * thick, height / 2), index)
    at = (-side * width * b.uniform(0.8, 0.92), -2 * thick, height * handle)
    _handle(b, hinge, at, b.uniform(0.2, 0.7) * min(width, height, 0.4), index)


def door(b: Builder, root: Body) -> Extent:
    """Cupboards, refrigerators, ovens with side hinge, room doors and gates."""
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
            _leaf(b, hinge, side, width / count * 0.98, height, thick, i, 0.5)
        return Extent(width / 2 + post, 0.1, height + 2 * post)
    x, y, z = b.uniform(0.2, 0.5), b.uniform(0.12, 0.35), b.uniform(0.2, 0.5)
    wall, thick = b.uniform(0.012, 0.04), b.uniform(0.006, 0.02)
    feet = _feet(b, root, x, y)
    _shell(b, root, (x, y, z), wall, feet)
    for i in range(b.integer(0, 3)):  # shelves, with things on them
        level = feet + 2 * z * (i + 1) / 4
        b.box(root, (x - wall, y * 0.85, wall / 3), (0, 0.1 * y, level), "inside")
        for item in range(b.integer(0, 2)):
            at = (b.uniform(-0.7, 0.7) * x, b.uniform(-0.3, 0.4) * y, level + wall / 3)
            prop(b, root, at, b.uniform(0.04, 0.09), 3 * i + item)
    layout = b.pick("single", "single", "double", "stacked", "row")
    gap = b.uniform(0.003, 0.01)
    inset = b.chance(0.3)
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
        lo, hi = sorted((0.0, s * limit))
        hinge = b.hinge(root, (at, y_front, bottom), (0, 0, 1), (lo, hi), rest=0.55)
        _leaf(b, hinge, s, width, height, thick, i, handle)
        if b.chance(0.15):  # rack on the inside of the door
            rack = b.fixed(hinge)
            b.box(rack, (width * 0.35, 0.03, 0.03), (-s * width / 2, 0.03, height * 0.4), "tray", i)
    if b.chance(0.35):
        for item in range(b.integer(1, 3)):
            at = (b.uniform(-0.8, 0.8) * x, b.uniform(-0.5, 0.5) * y, feet + 2 * z)
            prop(b, root, at, b.uniform(0.05, 0.12), 20 + item)
    return Extent(x, y, feet + 2 * z)


def slider(b: Builder, root: Body) -> Extent:
    style = b.pick("panels", "panels", "sash", "fader", "carriage", "tray", "beads", "button")
    if style == "panels":  # cupboard or window with panels on parallel tracks
        x, z, y = b.uniform(0.3, 0.6), b.uniform(0.2, 0.5), b.uniform(0.04, 0.25)
        wall, thick = b.uniform(0.015, 0.05), b.uniform(0.006, 0.015)
        feet = _feet(b, root, x, y)
        _shell(b, root, (x, y, z), wall, feet, back=b.chance(0.7))
        count = b.integer(1, 3)
        inner = x - wall
        width = 2 * inner / max(count, 2) * b.uniform(1.0, 1.1)
        for i in range(count):
            home = -inner + width / 2 + (2 * inner - width) * (i / max(count - 1, 1))
            track = -y + thick * 1.2 + i * 2.4 * thick
            part = b.slide(
                root,
                (home, track, feet + z),
                (1, 0, 0),
                (-inner + width / 2 - home, inner - width / 2 - home),
                rest=0.5,
            )
            half_z = z - wall
            if b.chance(0.35):
                border = b.uniform(0.1, 0.2) * min(width, half_z)
                for s in (-1, 1):
                    b.box(
                        part,
                        (border / 2, thick, half_z),
                        (s * (width - border) / 2, 0, 0),
                        "front",
                        i,
                    )
                    b.box(
                        part,
                        (width / 2, thick, border / 2),
                        (0, 0, s * (half_z - border / 2)),
                        "front",
                        i,
                    )
                b.box(part, (width / 2 - border, thick / 4, half_z - border), (0, 0, 0), "glass", i)
            else:
                b.box(part, (width / 2, thick, half_z), (0, 0, 0), "front", i)
                _trim(b, part, width / 2, half_z, (0, -thick, 0), i)
            grip = b.pick(-1, 1) * width * 0.38
            _handle(b, part, (grip, -thick, b.uniform(-0.3, 0.3) * z), b.uniform(0.06, 0.25), i)
        return Extent(x, y, feet + 2 * z)
    if style == "sash":  # window whose pane goes up
        x, z, y = b.uniform(0.2, 0.4), b.uniform(0.35, 0.55), b.uniform(0.03, 0.06)
        wall, thick = b.uniform(0.02, 0.05), 0.012
        _shell(b, root, (x, y, z), wall, 0, back=False)
        if b.chance(0.5):
            b.box(root, (0.3, y / 2, z), (-x - 0.3, y / 2, z), "wall")
            b.box(root, (0.3, y / 2, z), (x + 0.3, y / 2, z), "wall")
        half = (z - wall) / 2
        for i in range(2):
            at = (0, -y / 2 + i * 2.5 * thick, wall + half + 2 * half * i)
            if i == 0 or b.chance(0.5):  # the upper pane is fixed in half of the windows
                limits = (0, 2 * half) if i == 0 else (-2 * half, 0)
                pane = b.slide(root, at, (0, 0, 1), limits, rest=0.4)
            else:
                pane = b.fixed(root, at)
            border = b.uniform(0.02, 0.05)
            for s in (-1, 1):
                b.box(
                    pane, (border / 2, thick, half), (s * (x - wall - border / 2), 0, 0), "front", i
                )
                b.box(
                    pane,
                    (x - wall - border, thick, border / 2),
                    (0, 0, s * (half - border / 2)),
                    "front",
                    i,
                )
            b.box(pane, (x - wall, thick / 4, half), (0, 0, 0), "glass", i)
            if b.chance(0.6):
                b.box(pane, (0.05, 0.02, 0.01), (0, -thick - 0.02, -half + border), "handle", i)
        return Extent(x, y, 2 * z)
    if style == "button":  # push buttons and plungers on a console
        tilt = b.pick(0.0, b.uniform(0, np.pi / 2), np.pi / 2)
        count = b.integer(1, 4)
        x, half, thick = b.uniform(0.2, 0.5), b.uniform(0.15, 0.3), b.uniform(0.03, 0.12)
        lift = half * np.sin(tilt) + thick
        plate = b.fixed(root, (0, 0, lift), turn("x", tilt))
        b.box(plate, (x, half, thick), (0, 0, 0), "panel")
        radius = min(x / count, half) * b.uniform(0.4, 0.8)
        for i in range(count):
            at = ((2 * (i + 0.5) / count - 1) * x, 0, thick)
            travel = radius * b.uniform(0.2, 1.0)
            part = b.slide(plate, at, (0, 0, 1), (-travel, 0), rest=0.6)
            size = radius * b.uniform(0.5, 0.8)
            stem = travel + 0.02
            b.cylinder(part, size * 0.7, stem / 2, (0, 0, stem / 2), "z", "stem", i)
            cap = b.integer(0, 2)
            if cap == 0:
                b.cylinder(part, size, size * 0.3, (0, 0, stem + size * 0.3), "z", "cap", i)
            elif cap == 1:
                b.ellipsoid(part, (size, size, size * 0.6), (0, 0, stem), "cap", i)
            else:
                b.box(part, (size, size, size * 0.3), (0, 0, stem + size * 0.3), "cap", i)
        depth = half * np.cos(tilt) + thick
        return Extent(x, depth + 0.1, lift + half * np.sin(tilt) + thick)
    if style == "fader":  # faders on a panel
        tilt = b.uniform(0, 1.57)
        count = b.integer(1, 6)
        x, length, thick = b.uniform(0.2, 0.5), b.uniform(0.25, 0.5), b.uniform(0.02, 0.08)
        up = length * np.sin(tilt) + thick
        plate = b.fixed(root, (0, 0, up), turn("x", tilt))
        b.box(plate, (x, length, thick), (0, 0, 0), "panel")
        vertical = b.chance(0.7)
        for i in range(count):
            at = (2 * (i + 0.5) / count - 1) * 0.85
            travel = (length if vertical else x) * 0.75
            pos = (at * x, 0, thick) if vertical else (0, at * length, thick)
            axis = (0, 1, 0) if vertical else (1, 0, 0)
            slot = (0.012, travel, 0.003) if vertical else (travel, 0.012, 0.003)
            b.box(plate, slot, pos, "slot")
            room = (x if vertical else length) / count * 0.75
            cap = b.slide(plate, pos, axis, (-travel * 0.85, travel * 0.85), rest=0.0)
            rise = b.uniform(0.02, 0.09)
            long = min(b.uniform(0.04, 0.12), travel * 0.3)
            half = (room, long, rise) if vertical else (long, room, rise)
            shape = b.integer(0, 2)
            if shape == 0:
                b.box(cap, half, (0, 0, rise), "cap", i)
            elif shape == 1:
                b.cylinder(cap, min(room, long), rise, (0, 0, rise), "z", "cap", i)
            else:
                b.box(cap, half, (0, 0, rise), "cap", i)
                b.box(
                    cap,
                    (
                        half[0] * (0.9 if vertical else 0.15),
                        half[1] * (0.15 if vertical else 0.9),
                        0.006,
                    ),
                    (0, 0, 2 * rise),
                    "trim",
                    i,
                )
        return Extent(x, length * np.cos(tilt) + thick, up + length * np.sin(tilt) + thick)
    if style == "carriage":  # carriage on one or two rails
        x, high = b.uniform(0.35, 0.55), b.uniform(0.05, 0.5)
        radius = b.uniform(0.012, 0.03)
        wide = b.uniform(0.06, 0.18)
        for s in (-1, 1):
            b.box(root, (0.03, wide + 0.03, high / 2), (s * x, 0, high / 2), "frame")
            b.capsule(root, radius, x, (0, s * wide * 0.8, high), "x", "rail")
        if b.chance(0.5):
            b.box(root, (x, wide + 0.05, 0.01), (0, 0, 0.01), "frame")
        carriages = b.pick(1, 1, 2)
        for i in range(carriages):
            half = (b.uniform(0.05, 0.14), wide, b.uniform(0.03, 0.1))
            span = (x - 0.03) / carriages - half[0]
            centre = (2 * i - carriages + 1) * (x - 0.03) / 2
            part = b.slide(root, (centre, 0, high), (1, 0, 0), (-span, span), rest=0.0)
            b.box(part, half, (0, 0, half[2] * 0.3), "carriage", i)
            for item in range(b.integer(0, 2)):
                load = b.fixed(part)
                at = (b.uniform(-0.4, 0.4) * half[0], b.uniform(-0.4, 0.4) * wide, half[2] * 1.3)
                prop(b, load, at, 0.6 * min(half[0], wide), item)
        return Extent(x, wide + 0.03, high + 0.1)
    if style == "tray":  # a box sliding out of its sleeve: a matchbox, a keyboard tray
        x, y, z = b.uniform(0.2, 0.45), b.uniform(0.2, 0.4), b.uniform(0.05, 0.15)
        wall = b.uniform(0.008, 0.02)
        sideways = b.chance(0.5)
        sleeve = b.fixed(root, (0, 0, 0), turn("z", b.pick(-1, 1) * np.pi / 2 if sideways else 0.0))
        _shell(b, sleeve, (x, y, z), wall, 0, back=b.chance(0.5))
        part = b.slide(sleeve, (0, 0, wall), (0, -1, 0), (0, 1.7 * y), rest=0.2)
        ix, iz = x - 1.5 * wall, z - 2 * wall
        b.box(part, (ix, y, wall / 2), (0, 0, wall), "tray")
        for s in (-1, 1):
            b.box(part, (wall / 2, y, iz * 0.8), (s * ix, 0, iz * 0.8 + wall), "tray")
            b.box(part, (ix, wall / 2, iz * 0.8), (0, s * (y - wall), iz * 0.8 + wall), "tray")
        for item in range(b.integer(0, 3)):
            load = b.fixed(part)
            prop(
                b,
                load,
                (b.uniform(-0.6, 0.6) * ix, b.uniform(-0.8, 0.6) * y, 1.5 * wall),
                0.08,
                item,
            )
        return Extent(y if sideways else x, x if sideways else y, 2 * z)
    # beads: things strung on bars
    x, z = b.uniform(0.3, 0.5), b.uniform(0.2, 0.45)
    post = b.uniform(0.015, 0.035)
    rows = b.integer(1, 4)
    for s in (-1, 1):
        b.box(root, (post, post * 1.5, z), (s * x, 0, z), "frame")
        b.box(root, (x, post * 1.5, post), (0, 0, post if s < 0 else 2 * z - post), "frame")
    radius = min(z / rows * 0.7, b.uniform(0.06, 0.14))
    index = 0
    for row in range(rows):
        level = 2 * z * (row + 0.5) / rows
        b.cylinder(root, 0.012, x, (0, 0, level), "x", "rail")
        count = b.integer(1, 2 if rows > 1 else 3)
        radius = min(radius, 0.6 * (x - post) / count)
        free = 2 * (x - post) - 2 * radius * count
        for i in range(count):
            low = -x + post + radius * (2 * i + 1)
            share = free * i / count
            limits = (0, free / count)
            part = b.slide(root, (low + share, 0, level), (1, 0, 0), limits, rest=0.0)
            if b.chance(0.6):
                b.ellipsoid(part, (radius * 0.9, radius, radius), (0, 0, 0), "bead", index)
            else:
                b.cylinder(part, radius, radius * 0.9, (0, 0, 0), "x", "bead", index)
            index += 1
    return Extent(x, radius, 2 * z)


def _dial(b: Builder, part: Body, radius: float, index: int) -> None:
    """A knob around the z axis of `part`, standing on z = 0; never fully symmetric."""
    depth = radius * b.uniform(0.25, 0.9)
    style = b.integer(0, 6)
    if style == 0:  # cylinder with a grip bar
        b.cylinder(part, radius, depth * 0.3, (0, 0, depth * 0.3), "z", "dial", index)
        b.box(
            part,
            (radius * b.uniform(0.12, 0.3), radius, depth * 0.5),
            (0, 0, depth * 0.8),
            "grip",
            index,
        )
    elif style == 1:  # lobes
        lobes = b.integer(3, 7)
        b.cylinder(part, radius * 0.72, depth / 2, (0, 0, depth / 2), "z", "dial", index)
        for i in range(lobes):
            angle = 2 * np.pi * i / lobes
            at = (0.7 * radius * np.cos(angle), 0.7 * radius * np.sin(angle), depth / 2)
            b.cylinder(part, radius * 0.3, depth / 2 * 0.98, at, "z", "dial", index)
    elif style == 2:  # hand wheel with spokes
        count = 14
        rim = radius * b.uniform(0.08, 0.18)
        for i in range(count):
            angle = 2 * np.pi * i / count
            at = (radius * np.cos(angle), radius * np.sin(angle), depth)
            quat = multiply(turn("z", angle), turn("x", np.pi / 2))
            b.capsule(part, rim, radius * np.pi / count, at, "z", "dial", index, quat)
        spokes = b.integer(2, 5)
        for i in range(spokes):
            angle = 2 * np.pi * i / spokes
            at = (radius / 2 * np.cos(angle), radius / 2 * np.sin(angle), depth)
            b.box(part, (radius / 2, rim * 0.6, rim * 0.6), at, "grip", index, turn("z", angle))
        b.cylinder(part, radius * 0.2, depth * 0.6, (0, 0, depth * 0.6), "z", "grip", index)
    elif style == 3:  # turned profile
        shape = [
            (0, 0),
            (radius, 0),
            (radius * b.uniform(0.7, 1), depth * 0.3),
            (radius * b.uniform(0.4, 0.9), depth),
            (0, depth),
        ]
        b.lathe(part, shape, (0, 0, 0), "z", "dial", index, sides=b.pick(6, 8, 12, 24))
    elif style == 4:  # bar handle
        b.cylinder(part, radius * 0.35, depth / 2, (0, 0, depth / 2), "z", "dial", index)
        b.box(part, (radius * 0.22, radius, depth * 0.25), (0, 0, depth), "grip", index)
    elif style == 5:  # polygonal prism
        b.box(part, (radius * 0.8, radius * 0.8, depth / 2), (0, 0, depth / 2), "dial", index)
    else:  # cross
        for angle in (0.0, np.pi / 2):
            b.box(
                part,
                (radius, radius * 0.22, depth * 0.3),
                (0, 0, depth * 0.7),
                "grip",
                index,
                turn("z", angle),
            )
        b.cylinder(part, radius * 0.4, depth / 2, (0, 0, depth / 2), "z", "dial", index)
    if b.chance(0.75):  # pointer
        length = radius * b.uniform(0.15, 0.45)
        at = (0, radius - length, depth * (1.3 if style == 0 else 1.0))
        b.box(
            part, (radius * b.uniform(0.05, 0.15), length, depth * 0.06 + 0.004), at, "mark", index
        )


def knob(b: Builder, root: Body) -> Extent:
    """Dials, hand wheels and valves on an upright, sloping or lying panel."""
    rows, columns = b.pick((1, 1), (1, 1), (1, 2), (2, 1), (1, 3), (2, 2), (1, 4), (2, 3))
    cell = b.uniform(0.8, 1.0) / max(rows, columns, 1.4)
    x, half = cell * columns / 2 + b.uniform(0, 0.15), cell * rows / 2 + b.uniform(0, 0.15)
    thick = b.uniform(0.01, 0.15)
    tilt = b.pick(0.0, np.pi / 2, np.pi / 2, b.uniform(0.2, 1.4))
    lift = half * np.sin(tilt) + thick
    panel = b.fixed(root, (0, 0, lift), turn("x", tilt))  # its outer face is +z of the panel
    if b.chance(0.25):
        b.cylinder(panel, max(x, half), thick, (0, 0, 0), "z", "panel")
    else:
        b.box(panel, (x, half, thick), (0, 0, 0), "panel")
    radius = cell * b.uniform(0.22, 0.44)
    for row in range(rows):
        for column in range(columns):
            index = row * columns + column
            at = (cell * (column - (columns - 1) / 2), cell * (row - (rows - 1) / 2), thick)
            limit = b.uniform(1.0, 3.0)
            size = radius * (b.uniform(0.6, 1) if b.chance(0.3) else 1.0)
            part = b.hinge(panel, at, (0, 0, 1), (-limit, limit), rest=0.3)
            _dial(b, part, size, index)
            if b.chance(0.4):  # scale around it
                marks = b.integer(3, 9)
                for i in range(marks):
                    angle = np.pi / 2 + 4.5 * (i / (marks - 1) - 0.5)
                    place = np.add(
                        at, (1.18 * size * np.cos(angle), 1.18 * size * np.sin(angle), 0)
                    )
                    b.box(
                        panel,
                        (size * 0.07, size * 0.02, 0.004),
                        place,
                        "scale",
                        0,
                        turn("z", angle),
                    )
    return Extent(x, half * np.cos(tilt) + thick + 0.1, lift + half * np.sin(tilt) + thick)


def _link(b: Builder, body: Body, length: float, width: float, index: int) -> None:
    """A link along +z of its body, with a joint housing at its origin."""
    style = b.integer(0, 3)
    middle = (0, 0, length / 2)
    if style == 0:
        b.box(body, (width, width * b.uniform(0.4, 1), length / 2), middle, "link", index)
    elif style == 1:
        b.capsule(body, width * 0.8, length / 2, middle, "z", "link", index)
    elif style == 2:
        b.cylinder(body, width * 0.7, length / 2, middle, "z", "link", index)
    else:  # two parallel bars
        for s in (-1, 1):
            b.box(
                body,
                (width * 0.25, width * 0.3, length / 2),
                (s * width * 0.7, 0, length / 2),
                "link",
                index,
            )
    if b.chance(0.8):
        b.cylinder(
            body,
            width * b.uniform(0.9, 1.4),
            width * b.uniform(0.8, 1.3),
            (0, 0, 0),
            b.pick("x", "y"),
            "joint",
            index,
        )


def arm(b: Builder, root: Body) -> Extent:
    """Chains of 2 to 4 links: lamps, robot arms, diggers, wall brackets, scissors-like levers."""
    count = b.integer(2, 4)
    lengths = b.rng.uniform(0.6, 1.3, count)
    lengths *= b.uniform(0.75, 0.95) / lengths.sum()
    width = b.uniform(0.025, 0.07)
    planar = b.chance(0.6)
    base_style = b.integer(0, 3)
    high = b.uniform(0.05, 0.3)
    if base_style == 0:
        b.cylinder(root, b.uniform(0.08, 0.2), 0.02, (0, 0, 0.02), "z", "base")
        b.cylinder(root, width, high / 2, (0, 0, high / 2), "z", "base")
    elif base_style == 1:
        b.box(
            root, (b.uniform(0.08, 0.2), b.uniform(0.08, 0.2), high / 2), (0, 0, high / 2), "base"
        )
    elif base_style == 2:
        wide = b.uniform(0.1, 0.2)
        b.lathe(
            root,
            [(0, 0), (wide, 0), (wide, high * 0.3), (width * 1.3, high), (0, high)],
            look="base",
        )
    else:  # hangs from a gallows
        high = b.uniform(0.75, 0.95)
        b.box(root, (0.03, 0.03, high / 2), (-0.2, 0.15, high / 2), "base")
        b.box(root, (0.12, 0.03, 0.03), (-0.1, 0.15, high), "base")
        b.box(root, (0.03, 0.1, 0.03), (0, 0.07, high), "base")
        b.box(root, (0.2, 0.2, 0.02), (-0.15, 0.1, 0.02), "base")
    hanging = base_style == 3
    # The plane of a planar arm: mostly seen from the front (axis y), also fore and aft or lying.
    axis = b.pick((0, 1, 0), (0, 1, 0), (1, 0, 0))
    body = root
    pos: tuple[float, float, float] = (0, 0, high + width)
    quat = turn("y", np.pi) if hanging else turn("y", b.uniform(-0.6, 0.6))
    lying = not hanging and b.chance(0.2)  # a bracket that swings in the horizontal plane
    if lying:
        quat = turn("y", np.pi / 2 + b.pick(0, np.pi))
        axis = (1, 0, 0)
    if not planar and not hanging:  # a yaw joint first
        body = b.hinge(body, pos, (0, 0, 1), (-2.5, 2.5), rest=0.2)
        b.cylinder(body, width * 1.5, width, (0, 0, 0), "z", "joint")
        pos = (0, 0, width)
    for i in range(count):
        length = float(lengths[i])
        turn_axis = axis if planar or b.chance(0.7) else b.pick((1, 0, 0), (0, 1, 0), (0, 0, 1))
        limit = b.uniform(0.7, 1.3) if i == 0 else b.uniform(1.2, 2.3)
        if i and not planar and b.chance(0.15):
            body = b.slide(body, pos, (0, 0, 1), (-0.4 * length, 0.1 * length), quat, rest=0.2)
        else:
            body = b.hinge(body, pos, turn_axis, (-limit, limit), quat, rest=0.15)
        _link(b, body, length, width, i)
        pos, quat = (0, 0, length), (1, 0, 0, 0)
        width *= b.uniform(0.75, 1.0)
    tool = b.integer(0, 5)
    end = b.fixed(body, pos)
    if tool == 0:  # gripper
        b.box(end, (width * 2, width, width * 0.6), (0, 0, width * 0.5), "tool")
        for s in (-1, 1):
            b.box(
                end,
                (width * 0.35, width * 0.8, width * 1.5),
                (s * width * 1.6, 0, width * 2),
                "tool",
            )
        if b.chance(0.4):
            b.box(end, (width * 1.2, width * 1.2, width * 1.2), (0, 0, width * 3), "prop")
    elif tool == 1:  # lamp head
        wide = width * b.uniform(2, 4)
        b.lathe(
            end,
            [(0, 0), (wide * 0.4, 0), (wide, wide), (wide * 0.9, wide), (0, wide * 0.3)],
            look="tool",
        )
    elif tool == 2:
        b.ellipsoid(end, (width * b.uniform(1.2, 3),) * 3, look="tool")
    elif tool == 3:  # plate or screen
        b.box(end, (b.uniform(0.06, 0.2), 0.01, b.uniform(0.05, 0.12)), look="tool")
    elif tool == 4:  # bucket
        b.box(end, (width * 2.5, width * 1.5, width * 0.4), (width, 0, width), "tool")
        b.box(end, (width * 0.4, width * 1.5, width * 1.5), (width * 3, 0, width * 2), "tool")
    reach = float(lengths.sum())
    return Extent(reach * 0.6, 0.25, min(high + reach, 1.3))


def _free_body(b: Builder, index: int, size: float) -> None:
    """One free rigid body: simple shapes, vessels and composites."""
    upright = (1.0, 0.0, 0.0, 0.0)
    on_side = turn("x", np.pi / 2)
    body = b.free()
    style = b.pick(
        "box",
        "box",
        "cylinder",
        "capsule",
        "ball",
        "vessel",
        "vessel",
        "mug",
        "tee",
        "ell",
        "car",
        "hammer",
        "stool",
        "book",
        "cross",
    )
    s = size
    if style == "box":
        x, y, z = (s * b.uniform(0.3, 1) for _ in range(3))
        b.box(body, (x, y, z), look="free", index=index)
        if b.chance(0.3):
            b.box(body, (x * 0.7, y * 0.7, 0.01 * s), (0, 0, z), "mark", index)
        poses = [(upright, z), (on_side, y), (turn("y", np.pi / 2), x)]
        b.place_free(float(np.hypot(x, y)), 2 * z, poses, True)
    elif style == "book":
        x, y, z = s * b.uniform(0.5, 0.9), s * b.uniform(0.6, 1.1), s * b.uniform(0.05, 0.2)
        b.box(body, (x, y, z), look="free", index=index)
        b.box(body, (x * 0.96, y * 0.96, z * 0.8), (0.06 * x, 0, 0), "mark", index)
        b.place_free(float(np.hypot(x, y)), 2 * z, [(upright, z), (on_side, y)], True)
    elif style == "cylinder":
        r, h = s * b.uniform(0.3, 0.8), s * b.uniform(0.15, 1)
        b.cylinder(body, r, h, look="free", index=index)
        if b.chance(0.4):
            b.cylinder(
                body, r * 1.02, h * 0.2, (0, 0, h * b.uniform(-0.6, 0.6)), "z", "mark", index
            )
        b.place_free(
            r, 2 * h, [(upright, h), (on_side, r)] if b.chance(0.6) else [(upright, h)], True
        )
    elif style == "capsule":
        r, h = s * b.uniform(0.2, 0.5), s * b.uniform(0.3, 0.8)
        b.capsule(body, r, h, look="free", index=index)
        b.place_free(r + h, 2 * r, [(on_side, r)], False)
    elif style == "ball":
        r = s * b.uniform(0.3, 0.7)
        b.ellipsoid(body, (r, r, r), look="free", index=index)
        if b.chance(0.5):
            b.cylinder(body, r * 1.005, r * 0.15, look="mark", index=index)
        b.place_free(r, 2 * r, [(upright, r), (on_side, r)], False)
    elif style == "vessel":
        r, h = s * b.uniform(0.35, 0.7), s * b.uniform(0.6, 2)
        b.lathe(body, _vessel(b, r, h), look="free", index=index)
        if b.chance(0.3):
            _hand(b, body, r, h)
        b.place_free(r, h, [(upright, 0.0)], False)
    elif style == "mug":
        r, h = s * b.uniform(0.45, 0.7), s * b.uniform(0.9, 1.6)
        wall = r * 0.12
        top = r * b.uniform(0.8, 1.2)
        shape = [(0, 0), (r, 0), (top, h), (top - wall, h), (r - wall, 0.1 * h), (0, 0.1 * h)]
        b.lathe(body, shape, look="free", index=index)
        reach, thick = r * b.uniform(0.4, 0.8), r * b.uniform(0.08, 0.16)
        b.capsule(body, thick, h * 0.25, (r + reach, 0, h * 0.5), "z", "grip", index)
        for z in (0.25, 0.75):
            b.capsule(body, thick, reach / 2, (r + reach / 2, 0, h * z), "x", "grip", index)
        if b.chance(0.3):
            _hand(b, body, r, h)
        b.place_free(r + reach, h, [(upright, 0.0)], False)
    elif style == "tee":
        x, y, z = s * b.uniform(0.5, 1), s * b.uniform(0.15, 0.4), s * b.uniform(0.15, 0.4)
        b.box(body, (x, y, z), look="free", index=index)
        b.box(body, (y, x * 0.6, z), (0, -y - x * 0.6, 0), "free", index + 1)
        b.place_free(1.4 * x, 2 * z, [(upright, z)], True)
    elif style == "ell":
        x, y, z = s * b.uniform(0.4, 0.9), s * b.uniform(0.3, 0.7), s * b.uniform(0.1, 0.25)
        high = s * b.uniform(0.3, 1)
        b.box(body, (x, y, z), (0, 0, z), "free", index)
        b.box(body, (z, y, high), (x - z, 0, 2 * z + high), "free", index + b.integer(0, 1))
        b.place_free(float(np.hypot(x, y)), 2 * (z + high), [(upright, 0.0)], False)
    elif style == "car":
        x, y, z = s * b.uniform(0.6, 1), s * b.uniform(0.3, 0.5), s * b.uniform(0.12, 0.25)
        r = z * b.uniform(0.9, 1.3)
        b.box(body, (x, y, z), (0, 0, r + z * 0.6), "free", index)
        b.box(body, (x * 0.5, y * 0.85, z * 0.8), (-x * 0.15, 0, r + z * 2.3), "free", index + 1)
        for sx in (-0.65, 0.65):
            for sy in (-1, 1):
                b.cylinder(body, r, y * 0.15, (sx * x, sy * y, r), "y", "mark", index)
        b.place_free(float(np.hypot(x, y)), r + 3.1 * z, [(upright, 0.0)], True)
    elif style == "hammer":
        r, length = s * b.uniform(0.06, 0.12), s * b.uniform(0.7, 1)
        head = s * b.uniform(0.15, 0.3)
        b.capsule(body, r, length, axis="x", look="free", index=index)
        b.box(body, (head * 0.6, head * 1.2, head * 0.6), (length, 0, 0), "mark", index)
        tilt = float(np.arcsin((head * 0.6 - r) / (2 * length + r)))
        middle = head * 0.6 * float(np.cos(tilt)) - length * float(np.sin(tilt))
        b.place_free(length + head, head, [(turn("y", -tilt), middle)], False)
    elif style == "stool":
        x, z, leg = s * b.uniform(0.4, 0.7), s * b.uniform(0.5, 1), s * b.uniform(0.05, 0.1)
        thick = s * b.uniform(0.04, 0.1)
        b.box(body, (x, x, thick), (0, 0, 2 * z), "free", index)
        for sx in (-1, 1):
            for sy in (-1, 1):
                b.box(body, (leg, leg, z), (sx * (x - leg), sy * (x - leg), z), "mark", index)
        if b.chance(0.4):
            b.box(body, (x, leg, z * 0.8), (0, x - leg, 2.8 * z), "free", index)
        b.place_free(1.4 * x, 2 * z + thick, [(upright, 0.0)], False)
    else:  # cross
        x, t = s * b.uniform(0.5, 1), s * b.uniform(0.1, 0.25)
        b.box(body, (x, t, t), look="free", index=index)
        b.box(body, (t, x, t), look="free", index=index + 1)
        b.place_free(x, 2 * t, [(upright, t)], True)


def _hand(b: Builder, body: Body, radius: float, height: float) -> None:
    """A hand that holds a body about the z axis from its +x side: palm, fingers, forearm."""
    b.hold()
    thick = b.uniform(0.12, 0.2) * radius
    level = height * b.uniform(0.35, 0.65)
    fingers = b.integer(3, 4)
    for i in range(fingers):
        at = (0.55 * radius, -radius, level + (i - fingers / 2) * 1.9 * thick)
        b.capsule(body, thick, 0.55 * radius, at, "x", "hand")
    b.capsule(body, thick * 1.2, 0.4 * radius, (0.7 * radius, radius, level + thick), "x", "hand")
    b.ellipsoid(body, (2 * thick, 1.1 * radius, 3.2 * thick), (1.15 * radius, 0, level), "hand")
    rise = b.uniform(-0.3, 0.9)
    reach = b.uniform(2, 4) * radius
    direction = np.array([np.cos(rise), 0, np.sin(rise)])
    start = np.array([1.2 * radius, 0, level])
    quat = turn("y", np.pi / 2 - rise)
    b.capsule(body, 2 * thick, reach / 2, start + direction * reach / 2, quat=quat, look="sleeve")


def body(b: Builder, root: Body) -> Extent:
    """One to six free bodies, at times one in a hand; `Simulator` lays them out."""
    count = b.pick(1, 1, 2, 2, 3, 4, 6)
    size = {1: 0.5, 2: 0.33, 3: 0.28, 4: 0.25, 6: 0.2}[count]
    for i in range(count):
        _free_body(b, 2 * i, size * b.uniform(0.6, 1.1))
    radii = np.array([free.radius for free in b.free_bodies]) / b.scale
    reach = max(1.1 * float(radii.max()), 1.8 * float(np.linalg.norm(radii)))
    return Extent(reach, reach, 2 * size)


# Held-out kinds -----------------------------------------------------------------------------


def lid(b: Builder, root: Body) -> Extent:
    """Chests, bins, laptops, toilets, pianos: what opens about a horizontal hinge at its back."""
    style = b.pick("chest", "bin", "clam", "pedal")
    limit = b.uniform(1.2, 2.2)
    if style == "clam":
        x, y, thick = b.uniform(0.35, 0.5), b.uniform(0.22, 0.38), b.uniform(0.008, 0.03)
        b.box(root, (x, y, thick), (0, 0, thick), "shell")
        b.box(root, (x * 0.85, y * 0.4, 0.003), (0, y * 0.25, 2 * thick), "inside")
        if b.chance(0.6):
            b.box(root, (x * 0.25, y * 0.22, 0.003), (0, -y * 0.6, 2 * thick), "trim")
        screen = b.hinge(root, (0, y, 2 * thick), (1, 0, 0), (-2.3, 0), home=-1.8, rest=0.3)
        b.box(screen, (x, y, thick * 0.5), (0, -y, thick * 0.5), "front")
        b.box(screen, (x * 0.92, y * 0.88, 0.003), (0, -y, 0), "glass")
        return Extent(x, y, 1.6 * y)
    if style == "bin":
        r, h = b.uniform(0.18, 0.32), b.uniform(0.4, 0.8)
        base, wall = b.uniform(0.7, 1.0), 0.08 * r
        b.lathe(
            root,
            [(0, 0), (base * r, 0), (r, h), (r - wall, h), (base * r - wall, 0.05), (0, 0.05)],
            look="shell",
        )
        top = b.hinge(root, (0, r, h), (1, 0, 0), (-limit, 0), rest=0.4)
        if b.chance(0.5):
            b.lathe(
                top,
                [(0, 0.005), (r * 1.04, 0.005), (r * 1.04, 0.03), (r * 0.6, 0.12), (0, 0.14)],
                (0, -r, 0),
                look="front",
            )
        else:
            b.cylinder(top, r * 1.04, 0.02, (0, -r, 0.02), "z", "front")
        if b.chance(0.5):
            b.ellipsoid(top, (0.05, 0.05, 0.03), (0, -r, 0.13 if b.chance(0.5) else 0.05), "handle")
        return Extent(r, r, h + 0.15)
    x, y, z = b.uniform(0.3, 0.5), b.uniform(0.2, 0.35), b.uniform(0.1, 0.3)
    wall = b.uniform(0.012, 0.03)
    feet = _feet(b, root, x, y) if style == "pedal" else 0.0
    for s in (-1, 1):
        b.box(root, (wall / 2, y, z), (s * (x - wall / 2), 0, feet + z), "shell")
        b.box(root, (x, wall / 2, z), (0, s * (y - wall / 2), feet + z), "shell")
    b.box(root, (x, y, wall / 2), (0, 0, feet + wall / 2), "inside")
    for item in range(b.integer(0, 3)):
        prop(
            b,
            root,
            (b.uniform(-0.6, 0.6) * x, b.uniform(-0.6, 0.6) * y, feet + wall),
            0.5 * z,
            item,
        )
    high = feet + 2 * z
    top = b.hinge(root, (0, y, high), (1, 0, 0), (-limit, 0), rest=0.5)
    if style == "chest" and b.chance(0.5):  # vaulted
        b.box(top, (x, y, wall / 2), (0, -y, wall / 2), "front")
        b.ellipsoid(top, (x * 0.98, y * 0.98, b.uniform(0.06, 0.15)), (0, -y, wall / 2), "front", 1)
    else:
        b.box(top, (x, y, wall), (0, -y, wall), "front")
        if b.chance(0.5):
            b.box(top, (x * 0.8, y * 0.8, wall), (0, -y, 1.6 * wall), "trim")
    if b.chance(0.6):  # clasp
        b.box(top, (0.04, 0.012, 0.05), (0, -2 * y - 0.01, 0), "handle")
    return Extent(x, y, high + 0.1)


def lever(b: Builder, root: Body) -> Extent:
    """Toggle levers, brakes, faucets, pendulums and see-saws on stands."""
    style = b.pick("toggle", "faucet", "pendulum", "crank", "seesaw")
    if style in ("toggle", "crank"):
        x, y, z = b.uniform(0.12, 0.3), b.uniform(0.12, 0.3), b.uniform(0.08, 0.3)
        if b.chance(0.5):
            b.box(root, (x, y, z), (0, 0, z), "base")
        else:
            b.lathe(root, [(0, 0), (x, 0), (x * 0.8, 2 * z), (0, 2 * z)], look="base")
        b.box(root, (0.02, y * 0.6, 0.004), (0, 0, 2 * z), "slot")
        long, r = b.uniform(0.35, 0.7), b.uniform(0.015, 0.04)
        axis = b.pick((1, 0, 0), (0, 1, 0)) if style == "toggle" else (0, 0, 1)
        part = b.hinge(
            root, (0, 0, 2 * z), axis, (-b.uniform(0.5, 1.1), b.uniform(0.5, 1.1)), rest=0.1
        )
        if style == "crank":
            b.cylinder(part, 2 * r, 0.05, (0, 0, 0.05), "z", "link")
            b.box(part, (long / 2, r, r), (long / 2, 0, 0.1), "link")
            b.cylinder(part, 1.5 * r, 0.1, (long, 0, 0.18), "z", "handle")
        else:
            b.pick(b.capsule, b.cylinder)(part, r, long / 2, (0, 0, long / 2), "z", "link")
            knob_radius = b.uniform(1.5, 3) * r
            b.ellipsoid(part, (knob_radius,) * 3, (0, 0, long), "handle")
        return Extent(max(x, long * 0.5), y, 2 * z + long)
    if style == "faucet":
        r, h = b.uniform(0.05, 0.1), b.uniform(0.25, 0.5)
        b.lathe(root, [(0, 0), (1.8 * r, 0), (r, 0.1), (r, h), (0, h)], look="base")
        b.capsule(root, r * 0.6, 0.2, (0, -0.2, h * 0.75), "y", "base")
        b.capsule(root, r * 0.5, 0.05, (0, -0.4, h * 0.75 - 0.05), "z", "base")
        upright = b.chance(0.5)
        axis = (0, 0, 1) if upright else (1, 0, 0)
        part = b.hinge(
            root, (0, 0, h + 0.02), axis, (-1.2, 1.2) if upright else (-0.2, 0.9), rest=0.3
        )
        b.cylinder(part, r * 1.1, 0.04, (0, 0, 0.04), "z", "handle")
        long = b.uniform(0.2, 0.4)
        b.capsule(part, r * 0.35, long / 2, (0, -long / 2, 0.1), "y", "handle")
        if b.chance(0.4):
            b.capsule(part, r * 0.35, long / 2, (0, long / 2, 0.1), "y", "handle")
        return Extent(0.3, 0.4, h + 0.2)
    high = b.uniform(0.6, 0.95) if style == "pendulum" else b.uniform(0.15, 0.5)
    half = b.uniform(0.15, 0.4)
    b.box(root, (half, 0.15, 0.02), (0, 0, 0.02), "base")
    if style == "pendulum":
        for s in (-1, 1):
            b.cylinder(root, 0.02, high / 2, (s * half * 0.9, 0.08, high / 2), "z", "base")
        b.cylinder(root, 0.025, half, (0, 0.08, high), "x", "base")
        for i in range(b.pick(1, 1, 2)):
            at = 0.0 if i == 0 else half * 0.5
            long = b.uniform(0.4, 0.75) * high
            part = b.hinge(root, (at, 0, high), (0, 1, 0), (-0.9, 0.9), rest=0.3)
            b.cylinder(part, 0.012, long / 2, (0, 0, -long / 2), "z", "link", i)
            r = b.uniform(0.06, 0.13)
            if b.chance(0.5):
                b.ellipsoid(part, (r, r, r), (0, 0, -long), "handle", i)
            else:
                b.cylinder(part, r, 0.03, (0, 0, -long), "y", "handle", i)
        return Extent(half + 0.2, 0.2, high)
    b.box(root, (0.03, 0.06, high / 2), (0, 0, high / 2), "base")
    long = b.uniform(0.35, 0.5)
    tilt = min(0.5, float(np.arcsin(min(1.0, (high - 0.05) / long))))
    part = b.hinge(root, (0, 0, high), (0, 1, 0), (-tilt, tilt), rest=0.1)
    b.box(part, (long, b.uniform(0.05, 0.12), 0.015), (0, 0, 0.02), "link")
    for s in (-1, 1):
        if b.chance(0.7):
            prop(b, b.fixed(part), (s * long * 0.8, 0, 0.035), 0.09, s + 1)
    return Extent(long, 0.15, high + 0.2)


def turntable(b: Builder, root: Body) -> Extent:
    """A turning plate on a stand, with things that ride on it."""
    radius, base = b.uniform(0.3, 0.5), b.uniform(0.02, 0.4)
    if b.chance(0.5):
        b.cylinder(root, radius * b.uniform(0.3, 0.9), base / 2, (0, 0, base / 2), "z", "base")
    else:
        b.box(root, (radius * 1.05, radius * 1.05, base / 2), (0, 0, base / 2), "base")
    thick = b.uniform(0.008, 0.03)
    plate = b.hinge(root, (0, 0, base), (0, 0, 1), (-2.5, 2.5), rest=0.0)
    if b.chance(0.7):
        b.cylinder(plate, radius, thick, (0, 0, thick), "z", "plate")
    else:
        b.lathe(
            plate,
            [(0, 0), (radius, 0), (radius, 2 * thick), (0, 2 * thick)],
            look="plate",
            sides=b.pick(6, 8),
        )
    count = b.integer(1, 6)
    start = b.uniform(0, 2 * np.pi)
    for i in range(count):
        load = b.fixed(plate)
        angle = start + 2 * np.pi * i / count
        far = radius * (b.uniform(0.45, 0.75) if count > 1 else b.uniform(0.0, 0.6))
        at = (far * np.cos(angle), far * np.sin(angle), 2 * thick)
        prop(b, load, at, radius * b.uniform(0.15, 0.35), i)
    if b.chance(0.4):
        b.box(plate, (radius * 0.9, 0.02, 0.003), (0, 0, 2 * thick), "mark")
    return Extent(radius, radius, base + 0.3)


BUILDERS: dict[str, Callable[[Builder, Body], Extent]] = {
    "drawer": drawer,
    "door": door,
    "slider": slider,
    "knob": knob,
    "arm": arm,
    "body": body,
    "lid": lid,
    "lever": lever,
    "turntable": turntable,
}
