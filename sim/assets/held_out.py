# SPDX-License-Identifier: MIT
"""Kinds that no model is trained on: lids, levers and turntables."""

import mujoco
import numpy as np

from sim.assets.pieces import add_feet, add_prop
from sim.builder import Builder, Extent

Body = mujoco.MjsBody


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
        b.box(screen, (x * 0.92, y * 0.88, 0.003), (0, -y, 0), "screen")
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
    feet = add_feet(b, root, x, y) if style == "pedal" else 0.0
    for s in (-1, 1):
        b.box(root, (wall / 2, y, z), (s * (x - wall / 2), 0, feet + z), "shell")
        b.box(root, (x, wall / 2, z), (0, s * (y - wall / 2), feet + z), "shell")
    b.box(root, (x, y, wall / 2), (0, 0, feet + wall / 2), "inside")
    for item in range(b.integer(0, 3)):
        add_prop(
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
            add_prop(b, b.fixed(part), (s * long * 0.8, 0, 0.035), 0.09, s + 1)
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
        add_prop(b, load, at, radius * b.uniform(0.15, 0.35), i)
    if b.chance(0.4):
        b.box(plate, (radius * 0.9, 0.02, 0.003), (0, 0, 2 * thick), "mark")
    return Extent(radius, radius, base + 0.3)
