# SPDX-License-Identifier: MIT
"""Turning knobs and wheels, and jointed arms."""

import mujoco
import numpy as np

from sim.builder import Builder, Extent, multiply, turn

Body = mujoco.MjsBody


def add_dial(b: Builder, part: Body, radius: float, index: int) -> None:
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
            add_dial(b, part, size, index)
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
