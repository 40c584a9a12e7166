# SPDX-License-Identifier: MIT
"""Pieces that several assets share: handles, carcasses, feet, relief, vessels, small props."""

import mujoco
import numpy as np

from sim.builder import Builder, turn

Body = mujoco.MjsBody


def add_handle(
    b: Builder,
    body: Body,
    at: tuple[float, float, float],
    size: float,
    index: int,
    along: str | None = None,
) -> None:
    """A handle on a front whose outer face is the plane y = at[1]; `size` about its length.

    Long ones lie along "x" or "z", by chance if not given.
    """
    x, y, z = at
    thick = size * b.uniform(0.05, 0.12)
    reach = size * b.uniform(0.12, 0.3)
    style = b.integer(0, 5)
    along = along or b.pick("x", "z")
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


def add_shell(
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


def add_feet(b: Builder, body: Body, x: float, y: float) -> float:
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


def add_trim(
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


def vessel_profile(b: Builder, radius: float, height: float) -> list[tuple[float, float]]:
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


def add_prop(
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
        b.lathe(body, vessel_profile(b, size * b.uniform(0.4, 0.8), height), at, "z", "prop", index)
    return height
