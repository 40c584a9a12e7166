# SPDX-License-Identifier: MIT
"""Sliding panels, windows, faders, carriages, trays, beads and buttons."""

import mujoco
import numpy as np

from sim.assets.pieces import add_feet, add_handle, add_prop, add_shell, add_trim
from sim.builder import Builder, Extent, turn

Body = mujoco.MjsBody


def _panels(b: Builder, root: Body) -> Extent:
    """Cupboard or window with panels on parallel tracks."""
    x, z, y = b.uniform(0.3, 0.6), b.uniform(0.2, 0.5), b.uniform(0.04, 0.25)
    wall, thick = b.uniform(0.015, 0.05), b.uniform(0.006, 0.015)
    feet = add_feet(b, root, x, y)
    add_shell(b, root, (x, y, z), wall, feet, back=b.chance(0.7))
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
            add_trim(b, part, width / 2, half_z, (0, -thick, 0), i)
        grip = b.pick(-1, 1) * width * 0.38
        add_handle(b, part, (grip, -thick, b.uniform(-0.3, 0.3) * z), b.uniform(0.06, 0.25), i)
    return Extent(x, y, feet + 2 * z)


def _sash(b: Builder, root: Body) -> Extent:
    """Window whose pane goes up."""
    x, z, y = b.uniform(0.2, 0.4), b.uniform(0.35, 0.55), b.uniform(0.03, 0.06)
    wall, thick = b.uniform(0.02, 0.05), 0.012
    add_shell(b, root, (x, y, z), wall, 0, back=False)
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
            b.box(pane, (border / 2, thick, half), (s * (x - wall - border / 2), 0, 0), "front", i)
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


def _button(b: Builder, root: Body) -> Extent:
    """Push buttons and plungers on a console."""
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


def _fader(b: Builder, root: Body) -> Extent:
    """Faders on a panel."""
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


def _carriage(b: Builder, root: Body) -> Extent:
    """Carriage on one or two rails."""
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
            add_prop(b, load, at, 0.6 * min(half[0], wide), item)
    return Extent(x, wide + 0.03, high + 0.1)


def _tray(b: Builder, root: Body) -> Extent:
    """A box sliding out of its sleeve: a matchbox, a keyboard tray."""
    x, y, z = b.uniform(0.2, 0.45), b.uniform(0.2, 0.4), b.uniform(0.05, 0.15)
    wall = b.uniform(0.008, 0.02)
    sideways = b.chance(0.5)
    sleeve = b.fixed(root, (0, 0, 0), turn("z", b.pick(-1, 1) * np.pi / 2 if sideways else 0.0))
    add_shell(b, sleeve, (x, y, z), wall, 0, back=b.chance(0.5))
    part = b.slide(sleeve, (0, 0, wall), (0, -1, 0), (0, 1.7 * y), rest=0.2)
    ix, iz = x - 1.5 * wall, z - 2 * wall
    b.box(part, (ix, y, wall / 2), (0, 0, wall), "tray")
    for s in (-1, 1):
        b.box(part, (wall / 2, y, iz * 0.8), (s * ix, 0, iz * 0.8 + wall), "tray")
        b.box(part, (ix, wall / 2, iz * 0.8), (0, s * (y - wall), iz * 0.8 + wall), "tray")
    for item in range(b.integer(0, 3)):
        load = b.fixed(part)
        add_prop(
            b,
            load,
            (b.uniform(-0.6, 0.6) * ix, b.uniform(-0.8, 0.6) * y, 1.5 * wall),
            0.08,
            item,
        )
    return Extent(y if sideways else x, x if sideways else y, 2 * z)


def _beads(b: Builder, root: Body) -> Extent:
    """Things strung on bars."""
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


def slider(b: Builder, root: Body) -> Extent:
    """What slides along a straight line; see the functions above."""
    styles = (_panels, _panels, _sash, _fader, _carriage, _tray, _beads, _button)
    return b.pick(*styles)(b, root)
