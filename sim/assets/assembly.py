# SPDX-License-Identifier: MIT
"""Abstract assemblies: random solids, and parts that turn or slide on any of their faces.

No object that anybody made: joints at all places and in all directions, shapes that go with them or
not. What a model learns here is to look for edges, gaps and axes rather than for known objects.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import mujoco
import numpy as np

from sim.assets.mechanisms import add_dial
from sim.assets.pieces import add_feet, add_prop, vessel_profile
from sim.builder import Builder, Extent, multiply, turn

Body = mujoco.MjsBody


@dataclass(frozen=True)
class Site:
    """A face on which parts are mounted: its frame has z outwards, x and y in the face."""

    pos: tuple[float, float, float]
    quat: tuple[float, ...]
    half: tuple[float, float]
    round: bool = False


_SMALLEST = 0.04  # half size of a face for parts: below, they are neither seen nor have inertia
_UPRIGHT = (1.0, 0.0, 0.0, 0.0)
_FRONT = turn("x", np.pi / 2)  # outwards to -y, y of the frame upwards
_FACES = {
    "front": _FRONT,
    "left": multiply(turn("z", -np.pi / 2), _FRONT),
    "right": multiply(turn("z", np.pi / 2), _FRONT),
}


def _box_sites(x: float, y: float, z: float, bottom: float) -> list[Site]:
    """Top, front and sides of a box with these half extents."""
    middle = bottom + z
    return [
        Site((0, 0, bottom + 2 * z), _UPRIGHT, (x, y)),
        Site((0, -y, middle), _FACES["front"], (x, z)),
        Site((-x, 0, middle), _FACES["left"], (y, z)),
        Site((x, 0, middle), _FACES["right"], (y, z)),
    ]


# What stands still ----------------------------------------------------------------------------


def _base(b: Builder, root: Body) -> tuple[list[Site], Extent]:
    """A solid that stands, with the faces where parts may be mounted."""
    style = b.pick(
        *("box", "box", "box", "box", "hollow", "hollow", "stack"),
        *("round", "round", "round", "round", "post", "frame", "ell"),
    )
    x, y = b.uniform(0.15, 0.5), b.uniform(0.12, 0.4)
    z = float(np.exp(b.uniform(np.log(0.03), np.log(0.5))))
    if style == "box":
        feet = add_feet(b, root, x, y) if b.chance(0.4) else 0.0
        b.box(root, (x, y, z), (0, 0, feet + z), "shell")
        if b.chance(0.3):  # a band round it
            level = feet + 2 * z * b.uniform(0.1, 0.9)
            b.box(root, (x * 1.01, y * 1.01, 0.06 * z), (0, 0, level), "trim")
        return _box_sites(x, y, z, feet), Extent(x, y, feet + 2 * z)
    if style == "hollow":  # open at the top or the front
        wall, z = b.uniform(0.01, 0.04), max(z, 0.1)
        for s in (-1, 1):
            b.box(root, (wall / 2, y, z), (s * (x - wall / 2), 0, z), "shell")
        b.box(root, (x, wall / 2, z), (0, y - wall / 2, z), "shell")
        b.box(root, (x, y, wall / 2), (0, 0, wall / 2), "inside")
        if b.chance(0.5):
            b.box(root, (x, wall / 2, z), (0, -y + wall / 2, z), "shell")
        else:
            b.box(root, (x, y, wall / 2), (0, 0, 2 * z - wall / 2), "shell")
        for i in range(b.integer(0, 3)):
            at = (b.uniform(-0.6, 0.6) * x, b.uniform(-0.6, 0.6) * y, wall)
            add_prop(b, root, at, 0.5 * min(x, y, z), i)
        # The openings want a cover more than anything.
        sites = _box_sites(x, y, z, 0.0)
        return [*sites[:2], *sites], Extent(x, y, 2 * z)
    if style == "stack":
        low, share = b.uniform(0.2, 0.8) * z, b.uniform(0.4, 0.9)
        high = z - low
        dx, dy = (b.uniform(-1, 1) * (1 - share) * i for i in (x, y))
        b.box(root, (x, y, low), (0, 0, low), "shell")
        b.box(root, (x * share, y * share, high), (dx, dy, 2 * low + high), "base")
        upper = [
            Site((p.pos[0] + dx, p.pos[1] + dy, p.pos[2]), p.quat, p.half)
            for p in _box_sites(x * share, y * share, high, 2 * low)
        ]
        return upper + _box_sites(x, y, low, 0.0)[1:], Extent(x, y, 2 * z)
    if style == "round":
        if b.chance(0.5):
            b.cylinder(root, x, z, (0, 0, z), "z", "base")
            top, r = 2 * z, x
        else:
            profile = vessel_profile(b, x, 2 * z)
            b.lathe(root, profile, look="base", sides=b.pick(6, 8, 20, 20))
            top = max(level for _, level in profile)
            r = max(radius for radius, level in profile if level == top)
        side = min(z, 0.6 * x)
        sites = [Site((0, 0, top), _UPRIGHT, (max(r, 0.3 * x),) * 2, True)]
        sites.append(Site((0, -0.97 * x, z), _FRONT, (0.6 * x, side)))
        return sites, Extent(x, x, top)
    if style == "post":
        r, high = b.uniform(0.02, 0.07), b.uniform(0.2, 0.8)
        b.cylinder(root, 0.7 * x, 0.02, (0, 0, 0.02), "z", "base")
        b.pick(b.cylinder, b.capsule)(root, r, high / 2, (0, 0, high / 2), "z", "base")
        head = r * b.uniform(1, 2.5)
        b.box(root, (head, head, head), (0, 0, high), "joint")
        return _box_sites(head, head, head, high - head), Extent(0.7 * x, 0.7 * x, high + head)
    if style == "frame":  # two posts and a beam
        high, thick = b.uniform(0.4, 0.95), b.uniform(0.015, 0.04)
        for s in (-1, 1):
            b.box(root, (thick, thick, high / 2), (s * (x - thick), 0, high / 2), "base")
        b.box(root, (x, thick, thick), (0, 0, high), "base")
        b.box(root, (x, y * 0.6, 0.015), (0, 0, 0.015), "base")
        beam = multiply(_FRONT, turn("z", np.pi))  # y of the frame downwards: parts hang
        return [
            Site((b.uniform(-0.5, 0.5) * x, -thick, high), beam, (0.5 * x, 0.4 * high)),
            Site((0, -thick, high / 2), _FRONT, (x - 2 * thick, high / 2 - thick)),
            Site((0, 0, high + thick), _UPRIGHT, (x, max(thick, 0.2 * y))),
        ], Extent(x, y, high)
    # ell: a slab and a wall behind it
    thick, high = b.uniform(0.02, 0.08), b.uniform(0.3, 0.9)
    b.box(root, (x, y, thick), (0, 0, thick), "base")
    b.box(root, (x, thick, high / 2), (0, y - thick, high / 2 + 2 * thick), "shell")
    return [
        Site((0, 0, 2 * thick), _UPRIGHT, (x, 0.8 * y)),
        Site((0, y - 2 * thick, high / 2 + 2 * thick), _FRONT, (x, high / 2)),
        Site((0, y - thick, high + 2 * thick), _UPRIGHT, (x, thick)),
    ], Extent(x, y, high)


# What moves: shapes ---------------------------------------------------------------------------


def _slab(
    b: Builder,
    body: Body,
    half: tuple[float, float],
    thick: float,
    centre: tuple[float, float, float],
    index: int,
    round_face: bool = False,
) -> None:
    """A flat thing in the x-y plane of `body`, its lower face at the height of `centre`.

    On a round face it mostly is round as well: a disc, or as the covers of pots are.
    """
    (hx, hy), (x, y, z) = half, centre
    small = min(half)
    if round_face:
        style = b.pick("disc", "disc", "bowl", "cone", "plate")
    else:
        style = b.pick("plate", "plate", "disc", "disc", "frame", "dome", "tub")
    if style in ("bowl", "cone"):
        high = b.uniform(0.1, 0.7) * small
        rim = [(0.0, 0.0), (small, 0.0), (small, 2 * thick)]
        if style == "bowl":
            angle = np.linspace(0.15, 0.9, 4) * np.pi / 2
            rim += [(small * np.cos(a), 2 * thick + high * np.sin(a)) for a in angle]
        else:
            rim.append((b.uniform(0.1, 0.8) * small, 2 * thick + high))
        top = rim[-1][1]
        b.lathe(body, [*rim, (0.0, top)], centre, "z", "front", index, b.pick(6, 8, 20, 20))
        if b.chance(0.5):
            size = b.uniform(0.06, 0.25) * small
            b.ellipsoid(body, (size, size, 0.7 * size), (x, y, z + top), "handle", index)
        return
    if style == "disc" and max(half) < 1.6 * small:
        b.cylinder(body, small, thick, (x, y, z + thick), "z", "front", index)
    elif style == "frame" and small > 0.06:
        border = b.uniform(0.12, 0.3) * small
        for s in (-1, 1):
            at = (x + s * (hx - border), y, z + thick)
            b.box(body, (border, hy, thick), at, "front", index)
            at = (x, y + s * (hy - border), z + thick)
            b.box(body, (hx, border, thick), at, "front", index)
        if b.chance(0.6):
            inner = (hx - border, hy - border, 0.3 * thick)
            b.box(body, inner, (x, y, z + thick), "glass", index)
    elif style == "dome":
        b.box(body, (hx, hy, thick), (x, y, z + thick), "front", index)
        radii = (hx * 0.95, hy * 0.95, b.uniform(0.2, 0.6) * small)
        b.ellipsoid(body, radii, (x, y, z + thick), "front", index + b.integer(0, 1))
    elif style == "tub" and small > 0.05:  # a slab with a rim upwards, or downwards as of a box
        deep = b.uniform(0.1, 0.6) * small
        side = b.pick(-1, 1)
        b.box(body, (hx, hy, thick), (x, y, z + thick), "front", index)
        for s in (-1, 1):
            level = z + thick + side * deep
            b.box(body, (thick, hy, deep), (x + s * (hx + thick), y, level), "front", index)
            b.box(body, (hx, thick, deep), (x, y + s * (hy + thick), level), "front", index)
    else:
        b.box(body, (hx, hy, thick), (x, y, z + thick), "front", index)
    top = z + 2 * thick
    detail = b.integer(0, 6)
    if detail == 0:  # a grip near an edge
        angle = b.pick(0, 1, 2, 3) * np.pi / 2
        at = (x + 0.8 * hx * np.cos(angle), y + 0.8 * hy * np.sin(angle), top + 0.01)
        size = b.uniform(0.1, 0.35) * small
        b.box(body, (size, 0.3 * size, 0.012), at, "handle", index, turn("z", angle + np.pi / 2))
    elif detail == 1:
        b.ellipsoid(body, (b.uniform(0.08, 0.25) * small,) * 3, (x, y, top), "handle", index)
    elif detail == 2:
        inlay = (b.uniform(0.3, 0.9) * hx, b.uniform(0.3, 0.9) * hy, 0.004)
        b.box(body, inlay, (x, y, top), "mark", index)
    elif detail == 3:
        stripe = (hx * 0.95, b.uniform(0.05, 0.2) * hy, 0.004)
        b.box(body, stripe, (x, y + b.uniform(-0.6, 0.6) * hy, top), "trim", index)


def _rod(
    b: Builder, body: Body, length: float, thick: float, index: int, axis: str = "z"
) -> tuple[float, float, float]:
    """A bar from the origin of `body` along `axis`, at times with an end; returns its tip."""
    along = {"x": 0, "y": 1, "z": 2}[axis]

    def at(share: float) -> tuple[float, float, float]:
        return tuple(share * length if i == along else 0.0 for i in range(3))  # type: ignore

    shape = b.integer(0, 2)
    if shape == 0:
        half = [thick * b.uniform(0.5, 1.5) for _ in range(3)]
        half[along] = length / 2
        b.box(body, half, at(0.5), "link", index)
    else:
        (b.capsule, b.cylinder)[shape - 1](body, thick, length / 2, at(0.5), axis, "link", index)
    end = b.integer(0, 4)
    size = thick * b.uniform(1.3, 4)
    if end == 0:
        b.ellipsoid(body, (size,) * 3, at(1.0), "handle", index)
    elif end == 1:
        b.box(body, (size, size * b.uniform(0.5, 1.5), size), at(1.0), "handle", index)
    elif end == 2:
        across = b.pick(*(i for i in "xyz" if i != axis))
        b.capsule(body, thick, 2 * size, at(0.95), across, "handle", index)
    elif end == 3:
        b.cylinder(body, size, thick, at(1.0), b.pick("x", "y", "z"), "handle", index)
    return at(1.0)


def _load(b: Builder, body: Body, reach: float, z: float, index: int) -> None:
    """Things that ride on a part, within `reach` of its origin."""
    count, start = b.pick(0, 1, 2, 3, 4, 5), b.uniform(0, 2 * np.pi)
    for i in range(count):
        angle = start + 2 * np.pi * i / count
        far = reach * b.uniform(0.2, 0.75)
        size = reach * b.uniform(0.12, 0.3)
        at = (far * np.cos(angle), far * np.sin(angle), z)
        add_prop(b, b.fixed(body), at, size, 7 * index + i)


# What moves: joints ---------------------------------------------------------------------------


def _cover(b: Builder, frame: Body, face: Site, index: int) -> Body:
    """Lies on the face, often on all of it, and opens about one of its edges.

    Not about the one at +y, which on a top face is at the assembly's back before it is turned: so
    lids are made, the kind held out.
    """
    least = b.pick(0.5, 0.97)
    hx, hy = (i * b.uniform(least, 1.06) for i in face.half)
    thick = b.uniform(0.005, 0.03)
    # The axis of the hinge, and where it lies.
    edge, side = b.pick(("x", -1), ("y", -1), ("y", 1))
    limit = b.uniform(0.9, 2.3)
    low = -b.uniform(0, 0.3) if b.chance(0.2) else 0.0
    # Positive joint values lift the far side.
    if edge == "x":
        pos, axis, centre = (0, side * hy, 0), (-side, 0, 0), (0, -side * hy, 0)
    else:
        pos, axis, centre = (side * hx, 0, 0), (0, side, 0), (-side * hx, 0, 0)
    part = b.hinge(frame, pos, axis, (low, limit), rest=b.uniform(0.2, 0.6))
    _slab(b, part, (hx, hy), thick, centre, index, face.round)
    if b.chance(0.3):  # the hinge can be seen
        length = hx if edge == "x" else hy
        b.cylinder(part, 1.3 * thick, b.uniform(0.3, 1.0) * length, (0, 0, 0), edge, "joint", index)
    return part


def _cap(b: Builder, frame: Body, face: Site, index: int) -> Body:
    """Lies on all of the face and is taken off it, or pushed along it."""
    hx, hy = (i * b.uniform(0.9, 1.08) for i in face.half)
    far = b.uniform(0.3, 1.2) * max(face.half)
    axis = b.pick((0, 0, 1), (0, 0, 1), (0, 0, 1), (0, 0, 1), (1, 0, 0), (0, 1, 0))
    part = b.slide(frame, (0, 0, 0), axis, (0 if axis[2] else -far, far), rest=0.7)
    _slab(b, part, (hx, hy), b.uniform(0.005, 0.08), (0, 0, 0), index, face.round)
    if b.chance(0.2):
        _load(b, part, min(face.half), 0.03, index)
    return part


def _spinner(b: Builder, frame: Body, face: Site, index: int) -> Body:
    """Turns about the face's normal, with what stands on it."""
    radius = min(face.half) * b.uniform(0.5, 1.2)
    limit = b.uniform(0.8, 2.8)
    off = tuple(b.uniform(-0.3, 0.3) * i for i in face.half) if b.chance(0.3) else (0.0, 0.0)
    part = b.hinge(frame, (*off, 0.002), (0, 0, 1), (-limit, limit), rest=0.2)
    if b.chance(0.35):
        add_dial(b, part, radius, index)
        return part
    thick = b.uniform(0.005, 0.04)
    stretch = b.uniform(0.5, 1.0) if b.chance(0.5) else 1.0
    _slab(b, part, (radius, radius * stretch), thick, (0, 0, 0), index)
    if face.quat != _UPRIGHT:  # so turntables are made, a kind held out
        _load(b, part, radius, 2 * thick, index)
    return part


def _swing(b: Builder, frame: Body, face: Site, index: int) -> Body:
    """A bar in front of the face, turning about the normal at its end or somewhere along it."""
    length = max(face.half) * b.uniform(0.6, 2.0)
    thick = length * b.uniform(0.03, 0.1)
    at = tuple(b.uniform(-0.7, 0.7) * i for i in face.half)
    heading = turn("z", b.uniform(-np.pi, np.pi) if b.chance(0.5) else np.pi / 2)
    limit = b.uniform(0.5, 1.6)
    pos = (*at, 1.5 * thick)
    part = b.hinge(frame, pos, (0, 0, 1), (-limit, limit), heading, rest=0.15)
    if b.chance(0.6):
        b.cylinder(part, thick * b.uniform(1, 2), thick * 1.5, (0, 0, 0), "z", "joint", index)
    _rod(b, part, length, thick, index, "x")
    if b.chance(0.4):  # the other way too
        back = b.fixed(part, quat=turn("z", np.pi))
        _rod(b, back, length * b.uniform(0.3, 1), thick, index, "x")
    return part


def _stick(b: Builder, frame: Body, face: Site, index: int) -> Body:
    """A bar that stands out of the face and tips about its foot."""
    length = b.uniform(0.15, 0.7)
    thick = length * b.uniform(0.03, 0.1)
    at = tuple(b.uniform(-0.6, 0.6) * i for i in face.half)
    heading = turn("z", b.pick(0, np.pi / 2, b.uniform(0, np.pi)))
    limit = b.uniform(0.4, 1.1)
    part = b.hinge(frame, (*at, 0), (1, 0, 0), (-limit, limit), heading, rest=0.15)
    if b.chance(0.5):
        b.ellipsoid(part, (thick * b.uniform(1.2, 2.5),) * 3, (0, 0, 0), "joint", index)
    _rod(b, part, length, thick, index)
    return part


def _flag(b: Builder, frame: Body, face: Site, index: int) -> Body:
    """A plate that stands on the face; turns about its foot, or about an upright edge."""
    width, high = max(face.half) * b.uniform(0.4, 1.2), b.uniform(0.15, 0.6)
    thick = b.uniform(0.005, 0.02)
    heading = turn("z", b.pick(0, 0, np.pi / 2, b.uniform(-np.pi, np.pi)))
    at = tuple(b.uniform(-0.5, 0.5) * i for i in face.half)
    limit = b.uniform(0.6, 1.4)
    if b.chance(0.5):
        part = b.hinge(frame, (*at, 0), (1, 0, 0), (-limit, limit), heading, rest=0.3)
        x = 0.0
    else:
        part = b.hinge(frame, (*at, 0), (0, 0, 1), (-limit, limit), heading, rest=0.3)
        x = width * b.pick(0.0, 1.0, 1.0)
    upright = b.fixed(part, (x, 0, high / 2), turn("x", np.pi / 2))
    _slab(b, upright, (width, high / 2), thick, (0, 0, -thick), index)
    return part


def _rocker(b: Builder, frame: Body, face: Site, index: int) -> Body:
    """A plate on a pivot above the face, tipping to both sides."""
    hx, hy = (max(i, 0.08) * b.uniform(0.5, 1.2) for i in face.half)
    high = b.uniform(0.03, 0.2)
    b.box(frame, (0.1 * hx, 0.6 * hy, high / 2), (0, 0, high / 2), "base")
    limit = float(np.arctan2(0.9 * high, hx))
    part = b.hinge(frame, (0, 0, high), (0, 1, 0), (-limit, limit), rest=0.2)
    thick = b.uniform(0.005, 0.02)
    _slab(b, part, (hx, hy), thick, (0, 0, 0), index)
    _load(b, part, min(hx, hy), 2 * thick, index)
    return part


def _shuttle(b: Builder, frame: Body, face: Site, index: int) -> Body:
    """Slides along the face."""
    along = b.integer(0, 1)
    heading = turn("z", (0, np.pi / 2)[along] + (b.uniform(-0.8, 0.8) if b.chance(0.3) else 0))
    room, across = face.half[along], face.half[1 - along]
    hx, hy = room * b.uniform(0.15, 0.6), across * b.uniform(0.2, 1.05)
    way = max(room - hx, 0.3 * room) * b.uniform(0.6, 1.3)
    if b.chance(0.5):  # a rail or a slot
        rail = (room, across * b.uniform(0.05, 0.2), 0.004)
        b.box(frame, rail, (0, 0, 0.002), b.pick("slot", "rail"), index, heading)
    part = b.slide(frame, (0, 0, 0.004), (1, 0, 0), (-way, way), heading, rest=0.15)
    if b.chance(0.6):
        _slab(b, part, (hx, hy), b.uniform(0.005, 0.05), (0, 0, 0), index)
    else:
        high = b.uniform(0.3, 1.5) * min(hx, hy)
        b.box(part, (hx, hy, high / 2), (0, 0, high / 2), "front", index)
        if b.chance(0.4):
            add_prop(b, b.fixed(part), (0, 0, high), 0.6 * min(hx, hy), index)
    return part


def _piston(b: Builder, frame: Body, face: Site, index: int) -> Body:
    """Slides out of the face and back: a button, a plug, a drawer of any shape."""
    deep = b.uniform(0.1, 0.6)
    at = tuple(b.uniform(-0.3, 0.3) * i for i in face.half) if b.chance(0.5) else (0.0, 0.0)
    part = b.slide(frame, (*at, 0), (0, 0, 1), (0, deep * b.uniform(0.5, 0.9)), rest=0.35)
    out = b.uniform(0.005, 0.08)
    if b.chance(0.6):
        hx, hy = (i * b.uniform(0.2, 0.95) for i in face.half)
        b.box(part, (hx, hy, (deep + out) / 2), (0, 0, (out - deep) / 2), "front", index)
        if b.chance(0.6):
            _slab(b, part, (hx * 1.04, hy * 1.04), 0.008, (0, 0, out), index)
    else:
        r = min(face.half) * b.uniform(0.2, 0.95)
        b.cylinder(part, r, (deep + out) / 2, (0, 0, (out - deep) / 2), "z", "front", index)
        if b.chance(0.5):
            b.cylinder(part, r * b.uniform(0.6, 1.3), 0.01, (0, 0, out), "z", "handle", index)
    return part


_MOUNTS: tuple[Callable[[Builder, Body, Site, int], Body], ...] = (
    *(_cover, _cover, _cover, _cover, _cover, _cover, _cap, _cap, _cap, _cap, _cap),
    *(_spinner, _spinner, _spinner, _spinner, _spinner, _spinner),
    *(_swing, _swing, _stick, _stick, _stick, _flag, _rocker, _rocker),
    *(_shuttle, _piston, _piston),
)


_HIGHEST_STAND = 0.4
_GAP = 0.003  # reaching down by less is lying on the ground


def assembly(b: Builder, root: Body) -> Extent:
    """One to four parts on a random base, at times one that carries another.

    It stands as high as its parts need not to reach into the ground.
    """
    while True:
        state = b.rng.bit_generator.state
        trial = Builder(mujoco.MjSpec(), b.rng, b.scale)
        trial.spec.compiler.degree = False
        _mounted(trial, trial.root())
        stand = -lowest_reach(trial.spec) / b.scale
        if stand < _HIGHEST_STAND:
            break
    b.rng.bit_generator.state = state  # for the same once more
    stand = stand if stand > _GAP else 0.0
    body, extent, yaw = _mounted(b, b.fixed(root, (0, 0, stand)))
    if stand:
        _stand(b, body, extent, stand)
    along, across = abs(np.cos(yaw)), abs(np.sin(yaw))
    half_x = along * extent.x + across * extent.y
    half_y = across * extent.x + along * extent.y
    return Extent(1.1 * half_x, 1.1 * half_y, extent.z + stand + 0.1)


def lowest_reach(spec: mujoco.MjSpec, seed: int = 0) -> float:
    """Height of the lowest point that articulated parts get to (m); compiles the spec.

    In 64 states of the joints, the ends of each among them. Turned surfaces are as their cylinders.
    """
    model = spec.compile()
    data = mujoco.MjData(model)
    shapes = mujoco.mjtGeom
    moves = model.body_weldid[model.geom_bodyid] != 0
    geoms = np.flatnonzero(moves & (model.geom_type != shapes.mjGEOM_MESH))
    kind = model.geom_type[geoms]
    half = model.geom_aabb[geoms, 3:]
    low, high = model.jnt_range.T
    states = np.random.default_rng(seed).uniform(low, high, (64, model.njnt))
    ends = np.zeros((2 * model.njnt, model.njnt))
    ends[::2][np.diag_indices(model.njnt)] = low
    ends[1::2][np.diag_indices(model.njnt)] = high
    states[: len(ends)] = ends[: len(states)]
    lowest = np.inf
    for state in states:
        data.qpos[:] = state
        mujoco.mj_kinematics(model, data)
        along = np.abs(data.geom_xmat[geoms, 6:]) * half  # [G, 3] of the half sizes, upwards
        across = np.hypot(along[:, 0], along[:, 1])
        down = np.select(
            [kind == shapes.mjGEOM_BOX, kind == shapes.mjGEOM_ELLIPSOID],
            [along.sum(1), np.hypot(across, along[:, 2])],
            across + along[:, 2],
        )
        round_end = kind == shapes.mjGEOM_CAPSULE
        upright = np.abs(data.geom_xmat[geoms, 8])
        down[round_end] = (half[:, 0] + upright * (half[:, 2] - half[:, 0]))[round_end]
        lowest = min(lowest, float((data.geom_xpos[geoms, 2] - down).min()))
    return lowest


def _stand(b: Builder, body: Body, extent: Extent, height: float) -> None:
    """A plinth, or a plate on a column or legs, below `body`, which has this extent."""
    x, y = extent.x, extent.y
    style = b.integer(0, 2)
    plate = height if style == 0 else min(0.03, height / 2)
    b.box(body, (x, y, plate / 2), (0, 0, -plate / 2), "feet")
    half = (height - plate) / 2
    if style == 1:
        b.cylinder(body, 0.3 * min(x, y), half, (0, 0, -plate - half), "z", "feet")
    elif style == 2:
        thick = min(b.uniform(0.01, 0.03), 0.5 * min(x, y))
        for i in (-1, 1):
            for j in (-1, 1):
                at = (i * (x - thick), j * (y - thick), -plate - half)
                b.box(body, (thick, thick, half), at, "feet")


def _mounted(b: Builder, root: Body) -> tuple[Body, Extent, float]:
    """The base with its parts on z = 0, below which parts may reach.

    Returns the body of the base, its extent, and how far it is turned about z (radians).
    """
    # Seen from the front, somewhat aside, or from any side: a cover may open away from the camera.
    yaw = b.uniform(-1, 1) * b.pick(0.0, 0.7, np.pi, np.pi)
    body = b.fixed(root, quat=turn("z", yaw))
    sites, extent = _base(b, body)
    # Faces that a camera in front sees come first, and of them the one that things lie on.
    count = min(b.pick(1, 1, 1, 2, 2, 3, 4), len(sites))
    chances = np.array([2.0, 1.0, *[0.4] * len(sites)])[: len(sites)]
    chosen = b.rng.choice(len(sites), count, replace=False, p=chances / chances.sum())
    for index, number in enumerate(chosen):
        site = sites[int(number)]
        half = (max(site.half[0], _SMALLEST), max(site.half[1], _SMALLEST))
        face = replace(site, half=half)
        frame = b.fixed(body, site.pos, site.quat)
        cells = b.pick(1, 1, 1, 2, 3) if min(half) > 0.1 and not site.round else 1
        if cells > 1:  # several of the same size beside each other
            mount = b.pick(*_MOUNTS)
            width = half[0] / cells
            cell = replace(site, half=(width * 0.93, half[1]))
            for i in range(cells):
                at = b.fixed(frame, (width * (2 * i + 1 - cells), 0, 0))
                mount(b, at, cell, index)
            continue
        part = b.pick(*_MOUNTS)(b, frame, face, index)
        if b.chance(0.12):
            size = max(0.35 * min(half), _SMALLEST)
            at = b.fixed(part, (0, 0, b.uniform(0.02, 0.1)))
            b.pick(*_MOUNTS)(b, at, replace(site, half=(size, size)), index + 4)
    return body, extent, yaw
