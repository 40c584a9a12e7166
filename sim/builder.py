# SPDX-License-Identifier: MIT
"""A small layer over `mujoco.MjSpec` in which the assets are written.

An asset is built around the origin of its root body: it stands on z = 0, its front faces -y and its
largest extent is about 1. `Builder.scale` turns that unit into metres.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partialmethod

import mujoco
import numpy as np

MESH_SLOTS = 8
"""Meshes of one world; the render context is made once for this number."""

COLLISION_ONLY_GROUP = 3
"""Geom group that is never drawn: simple collision shapes below detailed surfaces."""

PANE_GROUP = 4
"""Geom group of what is seen through: drawn in pictures, neither in depth nor in ids."""


def pane_alpha(hidden: float) -> float:
    """The alpha of a pane that hides this share of what is behind it.

    MuJoCo draws each geom that is not opaque twice, so that an alpha hides 1 - (1 - alpha)^2.
    """
    return 1 - float(np.sqrt(1 - hidden))


NO_COLOUR = np.array([0.5, 0.5, 0.5, 1], np.float32)
"""MuJoCo's default of geoms: of one with another colour it ignores the material's."""

Vector = Sequence[float]

_AXIS_QUAT = {  # turns the z axis of a cylinder or capsule into the named axis
    "x": (np.sqrt(0.5), 0.0, np.sqrt(0.5), 0.0),
    "y": (np.sqrt(0.5), np.sqrt(0.5), 0.0, 0.0),
    "z": (1.0, 0.0, 0.0, 0.0),
}

# Free bodies meet everything; articulated parts and static things meet free bodies only, since
# neighbouring parts of one asset touch by construction.
_FREE_CONTACT = {"contype": 1, "conaffinity": 3}
_FIXED_CONTACT = {"contype": 2, "conaffinity": 0}
_NO_CONTACT = {"contype": 0, "conaffinity": 0}


def turn(axis: str, angle: float) -> tuple[float, float, float, float]:
    """Quaternion (w, x, y, z) of a turn by `angle` radians about "x", "y" or "z"."""
    half = angle / 2
    vector = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1)}[axis]
    return (float(np.cos(half)), *(float(np.sin(half) * i) for i in vector))


def multiply(a: Vector, b: Vector) -> tuple[float, ...]:
    """Product of two quaternions (w, x, y, z): the turn b, then the turn a."""
    result = np.empty(4)
    mujoco.mju_mulQuat(result, np.asarray(a, float), np.asarray(b, float))
    return tuple(result)


@dataclass(frozen=True)
class Extent:
    """Half width (x), half depth (y) and full height (z) of an asset, in its unit."""

    x: float
    y: float
    z: float


@dataclass
class Part:
    """A body that can move. `rest` is the probability that its joint stands near `home`."""

    body: mujoco.MjsBody
    joint: mujoco.MjsJoint
    home: float = 0.0
    rest: float = 0.5
    asset: int = 0
    held: bool = False  # by a hand: is carried, does not fall

    @property
    def free(self) -> bool:
        return self.joint.type == mujoco.mjtJoint.mjJNT_FREE


@dataclass(frozen=True)
class RestPose:
    """A way a free body can stand: orientation, and height of its origin over the support (m)."""

    quat: tuple[float, ...]
    height: float


@dataclass
class FreeBody:
    """What the layout of free bodies needs to know of one: sizes in metres."""

    part: Part
    radius: float  # of the footprint
    height: float  # of the top over the support in the first rest pose
    poses: list[RestPose]
    flat_top: bool

    @property
    def extent(self) -> float:
        """The largest dimension in the first rest pose (m)."""
        return max(2 * self.radius, self.height)


@dataclass
class Builder:
    """Adds bodies and geoms to `spec`; lengths are in the asset's unit, looks are names."""

    spec: mujoco.MjSpec
    rng: np.random.Generator
    scale: float = 1.0
    asset: int = 0
    parts: list[Part] = field(default_factory=list)
    looks: list[tuple[mujoco.MjsGeom, tuple[int, str, int]]] = field(default_factory=list)
    free_bodies: list[FreeBody] = field(default_factory=list)
    _contact: dict = field(default_factory=lambda: _FIXED_CONTACT)

    # Random numbers -------------------------------------------------------------------------

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def integer(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, *options):
        return options[int(self.rng.integers(len(options)))]

    # Bodies ---------------------------------------------------------------------------------

    def root(self, quat: Vector = (1, 0, 0, 0)) -> mujoco.MjsBody:
        """The static root of an asset, at the origin."""
        return self.spec.worldbody.add_body(quat=quat)

    def fixed(
        self, parent: mujoco.MjsBody, pos: Vector = (0, 0, 0), quat: Vector = (1, 0, 0, 0)
    ) -> mujoco.MjsBody:
        """A body that is rigidly tied to `parent` and moves with it."""
        return parent.add_body(pos=np.multiply(pos, self.scale), quat=quat)

    def hinge(
        self,
        parent: mujoco.MjsBody,
        pos: Vector,
        axis: Vector,
        limits: tuple[float, float],
        quat: Vector = (1, 0, 0, 0),
        home: float = 0.0,
        rest: float = 0.5,
    ) -> mujoco.MjsBody:
        """A body turning about `axis` through `pos`; limits in radians."""
        body = self.fixed(parent, pos, quat)
        return self._part(body, mujoco.mjtJoint.mjJNT_HINGE, axis, limits, home, rest)

    def slide(
        self,
        parent: mujoco.MjsBody,
        pos: Vector,
        axis: Vector,
        limits: tuple[float, float],
        quat: Vector = (1, 0, 0, 0),
        rest: float = 0.5,
    ) -> mujoco.MjsBody:
        """A body sliding along `axis`; limits in the asset's unit."""
        body = self.fixed(parent, pos, quat)
        limits = (limits[0] * self.scale, limits[1] * self.scale)
        return self._part(body, mujoco.mjtJoint.mjJNT_SLIDE, axis, limits, 0.0, rest)

    def _part(self, body, kind, axis, limits, home, rest) -> mujoco.MjsBody:
        # The damping holds articulated parts still while pushed free bodies are stepped.
        joint = body.add_joint(
            type=kind, axis=axis, range=limits, limited=True, damping=[1e5, 0, 0], armature=10
        )
        self.parts.append(Part(body, joint, home, rest, self.asset))
        return body

    def free(self) -> mujoco.MjsBody:
        """A free body in the world; call `place_free` once its geoms are there."""
        body = self.spec.worldbody.add_body()
        joint = body.add_freejoint()
        self.parts.append(Part(body, joint, asset=self.asset))
        self._contact = _FREE_CONTACT
        return body

    def hold(self) -> None:
        """Puts the free body begun last into a hand, whose geoms follow and touch nothing."""
        self.parts[-1].held = True
        self._contact = _NO_CONTACT

    def place_free(
        self, radius: float, height: float, poses: Sequence[tuple[Vector, float]], flat_top: bool
    ) -> None:
        """Ends the free body begun last; lengths in the asset's unit."""
        rests = [RestPose(tuple(quat), z * self.scale) for quat, z in poses]
        self.free_bodies.append(
            FreeBody(self.parts[-1], radius * self.scale, height * self.scale, rests, flat_top)
        )
        self._contact = _FIXED_CONTACT

    # Geoms ----------------------------------------------------------------------------------

    def _geom(self, body, kind, size, pos, quat, look, index, **options) -> mujoco.MjsGeom:
        settings: dict = {**self._contact, **options}
        geom = body.add_geom(
            type=kind,
            size=np.multiply(size, self.scale),
            pos=np.multiply(pos, self.scale),
            quat=quat,
            **settings,
        )
        self.looks.append((geom, (self.asset, look, index)))
        return geom

    def box(
        self,
        body,
        half: Vector,
        pos: Vector = (0, 0, 0),
        look="body",
        index=0,
        quat: Vector = (1, 0, 0, 0),
    ):
        return self._geom(body, mujoco.mjtGeom.mjGEOM_BOX, half, pos, quat, look, index)

    def _rod(
        self,
        kind: mujoco.mjtGeom,
        body,
        radius: float,
        half: float,
        pos: Vector = (0, 0, 0),
        axis="z",
        look="body",
        index=0,
        quat: Vector | None = None,
    ):
        """Lies along `axis`, or along z turned by `quat`; `half` is half the straight part."""
        quat = _AXIS_QUAT[axis] if quat is None else quat
        return self._geom(body, kind, (radius, half, 0), pos, quat, look, index)

    cylinder = partialmethod(_rod, mujoco.mjtGeom.mjGEOM_CYLINDER)
    capsule = partialmethod(_rod, mujoco.mjtGeom.mjGEOM_CAPSULE)

    def ellipsoid(
        self,
        body,
        radii: Vector,
        pos: Vector = (0, 0, 0),
        look="body",
        index=0,
        quat: Vector = (1, 0, 0, 0),
    ):
        kind = mujoco.mjtGeom.mjGEOM_ELLIPSOID
        return self._geom(body, kind, radii, pos, quat, look, index)

    def lathe(
        self,
        body,
        profile: Sequence[tuple[float, float]],
        pos: Vector = (0, 0, 0),
        axis="z",
        look="body",
        index=0,
        sides: int = 20,
    ):
        """A surface of revolution about z through the (radius, z) points of `profile`.

        The profile runs from the bottom's middle round the outside to the top's middle; a vessel's
        goes on down the inside. Where all mesh slots are used, its bounding cylinder instead.
        """
        radius = max(r for r, _ in profile)
        low, high = min(z for _, z in profile), max(z for _, z in profile)
        middle, half = (low + high) / 2, (high - low) / 2
        offset = {"x": (middle, 0, 0), "y": (0, -middle, 0), "z": (0, 0, middle)}[axis]
        centre = np.add(pos, offset)
        if len(self.spec.meshes) >= MESH_SLOTS:
            return self.cylinder(body, radius, half, centre, axis, look, index)
        angle = np.arange(sides) * 2 * np.pi / sides
        ring = np.stack([np.cos(angle), np.sin(angle)], -1)
        points = np.array(profile, float) * self.scale
        points[:, 0] = np.maximum(points[:, 0], 1e-4 * radius * self.scale)
        r, z = points[:, 0], points[:, 1]
        vertices = np.concatenate(
            [r[:, None, None] * ring, np.broadcast_to(z[:, None, None], (len(r), sides, 1))], -1
        )
        here = np.arange(len(r) - 1)[:, None] * sides + np.arange(sides)
        side = np.arange(len(r) - 1)[:, None] * sides + (np.arange(sides) + 1) % sides
        faces = np.stack(
            [
                np.stack([here, side, side + sides], -1),
                np.stack([here, side + sides, here + sides], -1),
            ]
        )
        mesh = self.spec.add_mesh(name=f"mesh{len(self.spec.meshes)}")
        mesh.uservert = vertices.ravel()
        mesh.userface = faces.ravel()
        mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL
        visual = body.add_geom(
            type=mujoco.mjtGeom.mjGEOM_MESH,
            meshname=mesh.name,
            pos=np.multiply(pos, self.scale),
            quat=_AXIS_QUAT[axis],
            mass=0,
            **_NO_CONTACT,
        )
        self.looks.append((visual, (self.asset, look, index)))
        shape = self.cylinder(body, radius, half, centre, axis, look, index)
        shape.group = COLLISION_ONLY_GROUP
        return visual
