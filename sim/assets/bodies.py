# SPDX-License-Identifier: MIT
"""Free rigid bodies, some of them held by a hand."""

import mujoco
import numpy as np

from sim.assets.pieces import vessel_profile
from sim.builder import Builder, Extent, turn

Body = mujoco.MjsBody


def free_body(b: Builder, index: int, size: float, held: float = 0.0) -> None:
    """One free rigid body of about this half size: simple shapes, vessels and composites.

    A hand holds the share `held` of the vessels and mugs.
    """
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
        b.lathe(body, vessel_profile(b, r, h), look="free", index=index)
        if b.chance(held):
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
        if b.chance(held):
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
        free_body(b, 2 * i, size * b.uniform(0.6, 1.1), held=0.3)
    radii = np.array([free.radius for free in b.free_bodies]) / b.scale
    reach = max(1.1 * float(radii.max()), 1.8 * float(np.linalg.norm(radii)))
    return Extent(reach, reach, 2 * size)
