# SPDX-License-Identifier: MIT
"""Composition of one world: assets, what they stand on, walls, clutter, textures, materials."""

from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from sim.assets import BUILDERS
from sim.assets.bodies import free_body
from sim.assets.pieces import add_prop
from sim.builder import (
    COLLISION_ONLY_GROUP,
    MESH_SLOTS,
    Builder,
    Extent,
    FreeBody,
    Part,
    turn,
)
from sim.kinds import TRAIN_KINDS, split_kinds
from sim.textures import PATTERN_SIZE, cube_faces, pattern_bank, sky, surface

# Each world has the same texture, material and mesh slots: the render context, which is expensive,
# is then made once in a process and only the contents are uploaded again.
SKY_TEXTURE = 0  # its id
SKY_SIZE = 16
CUBE_SIZE = 64
CUBE_TEXTURES = 8
PLANE_TEXTURES = 3
PLAIN_MATERIALS = 16
LIGHTS = 3
PLANE_SLOTS = 3  # floor, back wall, side wall
PLANE_SIZE = (20.0, 20.0, 5.0)  # half sizes in metres, grid step
NEAR, FAR = 0.02, 60.0  # clipping planes in metres


def add_view(spec: mujoco.MjSpec) -> None:
    """Adds the view camera, as the first one, and sets the optics that `sim.rendering` expects."""
    spec.stat.extent = 1.0  # the unit of the clipping planes
    spec.visual.map.znear = NEAR
    spec.visual.map.zfar = FAR
    spec.visual.quality.offsamples = 0
    spec.visual.quality.shadowsize = 512
    for camera in list(spec.cameras):
        spec.delete(camera)
    spec.worldbody.add_camera(name="view")


def add_slots(spec: mujoco.MjSpec) -> None:
    """Adds the fixed textures, materials, lights and the view camera; pictures come later."""
    spec.compiler.degree = False
    add_view(spec)
    # Coarser curved surfaces than MuJoCo's default still look round at these sizes.
    spec.visual.quality.numslices = 20
    spec.visual.quality.numstacks = 12

    def texture(name: str, kind: mujoco.mjtTexture, size: int) -> None:
        cube = kind != mujoco.mjtTexture.mjTEXTURE_2D
        slot = spec.add_texture(name=name, type=kind, width=size, nchannel=3)
        slot.height = 6 * size if cube else size
        slot.data = bytes(slot.height * size * 3)

    texture("sky", mujoco.mjtTexture.mjTEXTURE_SKYBOX, SKY_SIZE)
    for i in range(CUBE_TEXTURES):
        texture(f"cube{i}", mujoco.mjtTexture.mjTEXTURE_CUBE, CUBE_SIZE)
    for i in range(PLANE_TEXTURES):
        texture(f"plane{i}", mujoco.mjtTexture.mjTEXTURE_2D, PATTERN_SIZE)
    role = mujoco.mjtTextureRole.mjTEXROLE_RGB
    for name in [t.name for t in spec.textures if t.name != "sky"]:
        material = spec.add_material(name=name)
        material.textures[role] = name
        # A plane's picture is about a metre wide, whatever the plane's size.
        material.texuniform = name.startswith("plane")
    for i in range(PLAIN_MATERIALS):
        spec.add_material(name=f"plain{i}")
    for i in range(LIGHTS):
        spec.worldbody.add_light(
            name=f"light{i}", type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, castshadow=False
        )


@dataclass
class World:
    """A compiled world and what is known about it."""

    model: mujoco.MjModel
    parts: list[Part]
    free_bodies: list[FreeBody]
    looks: list[tuple[int, tuple[int, str, int]]]  # (geom id, (asset, look, index))
    main_centre: NDArray[np.float64]  # [3] metres
    main_extent: Extent  # metres
    front: float  # heading of the main asset's front: 0 looks along -y, radians about z
    support_radius: float  # those of kind "body" stand within this distance of `main_centre`
    walled: bool


LOOSE_SHARE = 0.25
"""Of the training kinds' worlds without free bodies of their own: those where some lie about."""

BACKDROP = -1
"""Asset number of floor, walls and clutter in the looks."""


def _backdrop(
    b: Builder, kind: str, extents: list[tuple[float, float, float, float]], scale: float
) -> tuple[float, bool]:
    """Floor, table, walls and clutter round the assets' (x, y, half x, half y) in metres.

    Returns the radius about the origin that is supported, and whether a back wall stands.
    """
    world = b.spec.worldbody
    low_x = min(x - hx for x, _, hx, _ in extents)
    high_x = max(x + hx for x, _, hx, _ in extents)
    high_y = max(y + hy for _, y, _, hy in extents)
    low_y = min(y - hy for _, y, _, hy in extents)
    floor, radius = 0.0, 4 * scale
    plane = mujoco.mjtGeom.mjGEOM_PLANE

    def flat(pos, quat, look: str) -> None:
        geom = world.add_geom(
            type=plane, pos=pos, quat=quat, size=PLANE_SIZE, contype=2, conaffinity=0
        )
        b.looks.append((geom, (BACKDROP, look, 0)))

    table = b.chance(0.45)
    if table:
        margin = scale * b.uniform(0.1, 0.8)
        half_x, half_y = (high_x - low_x) / 2 + margin, (high_y - low_y) / 2 + margin
        centre = ((high_x + low_x) / 2, (high_y + low_y) / 2)
        thick = scale * b.uniform(0.02, 0.06)
        floor = -scale * b.uniform(0.4, 1.2)
        here = Builder(b.spec, b.rng, asset=BACKDROP, looks=b.looks)
        if b.chance(0.8):
            here.box(world, (half_x, half_y, thick), (*centre, -thick), "table")
        else:
            half_x = half_y = float(np.hypot(half_x, half_y))
            here.cylinder(world, half_x, thick, (*centre, -thick), "z", "table")
        leg = scale * b.uniform(0.02, 0.05)
        for sx in (-1, 1):
            for sy in (-1, 1):
                low, high = floor, -thick
                at = (centre[0] + sx * half_x * 0.65, centre[1] + sy * half_y * 0.65)
                here.box(world, (leg, leg, (high - low) / 2), (*at, (high + low) / 2), "legs")
        radius = min(half_x, half_y)
    flat((0, 0, floor), (1, 0, 0, 0), "floor")
    walled = b.chance(0.7)
    if walled:
        y = high_y + scale * b.pick(0.02, b.uniform(0.02, 2.5))
        if table:
            y = max(y, high_y + margin + 0.01)
        flat((0, y, 0), turn("x", np.pi / 2), "wall")
        if b.chance(0.25):
            side = b.pick(-1, 1)
            at = (high_x if side > 0 else low_x) + side * scale * b.uniform(0.3, 2)
            flat((at, 0, 0), turn("y", -side * np.pi / 2), "sidewall")
        here = Builder(b.spec, b.rng, scale, asset=BACKDROP, looks=b.looks)
        for i in range(b.pick(0, 0, 1, 2, 3)):  # pictures, switches, shelves on the wall
            at = (b.uniform(-1.5, 1.5), y / scale - 0.01, b.uniform(0.2, 1.8))
            size = (b.uniform(0.05, 0.35), 0.012, b.uniform(0.05, 0.35))
            here.box(world, size, at, "picture", i)
            if b.chance(0.3):
                here.box(world, (0.3, 0.1, 0.012), (at[0], at[1] - 0.1, at[2] - 0.4), "shelf", i)
    # Clutter stands beside and behind the assets, seldom in front, so that parts can move freely.
    here = Builder(b.spec, b.rng, scale, asset=BACKDROP, looks=b.looks)
    for i in range(b.pick(0, 0, 1, 2, 3, 5)):
        size = b.uniform(0.05, 0.3)
        side = b.pick(-1, 1)
        x = (high_x if side > 0 else -low_x) / scale + size * 1.2 + b.uniform(0, 0.8)
        y = b.uniform(low_y, high_y) / scale
        z = floor / scale if table and (x * scale > half_x or b.chance(0.2)) else 0.0
        if kind == "body" or b.chance(0.85):
            add_prop(here, world, (side * x, y, z), size, 10 + i)
        else:
            y = low_y / scale - b.uniform(0.7, 1.2)
            add_prop(here, world, (side * x * 0.6, y, floor / scale), 0.1, 10 + i)
    return radius, walled


def build_world(kind: str, rng: np.random.Generator) -> World:
    """A random world whose main asset is of `kind`; companions come from the same split's kinds."""
    kinds = split_kinds(kind)
    spec = mujoco.MjSpec()
    add_slots(spec)
    option = spec.option
    option.timestep = 0.01
    option.iterations = 8
    option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.default.geom.friction = [float(rng.uniform(0.25, 0.9)), 0.005, 0.0002]

    scale = float(np.exp(rng.uniform(np.log(0.25), np.log(1.3))))
    names = [kind]
    while len(names) < 3 and rng.random() < 0.3:
        # Free bodies come as one group only: they share one layout.
        names.append(str(rng.choice([k for k in kinds if k != "body"])))
    b = Builder(spec, rng, scale)
    extents: list[tuple[float, float, float, float]] = []
    placed: list[tuple[NDArray[np.float64], Extent]] = []
    left = right = 0.0
    front = 0.0
    lift = float(rng.uniform(0.2, 0.9)) if kind in ("door", "slider", "knob") else 0.0
    lift *= rng.random() < 0.2  # some hang on the wall
    for number, name in enumerate(names):
        b.asset = number
        b.scale = scale if number == 0 else scale * float(rng.uniform(0.4, 1.0))
        yaw = float(rng.normal(0, 0.12)) if number == 0 else float(rng.normal(0, 0.4))
        root = b.root(quat=turn("z", yaw))
        unit = BUILDERS[name](b, root)
        half_x, half_y, high = (i * b.scale for i in (unit.x, unit.y, unit.z))
        gap = scale * float(rng.uniform(0.03, 0.4))
        if number == 0:
            x, y, front = 0.0, 0.0, yaw
            left, right = -half_x, half_x
        else:
            y = float(rng.uniform(-0.2, 0.6)) * extents[0][3]
            if rng.random() < 0.5:
                x = left - gap - half_x
                left = x - half_x
            else:
                x = right + gap + half_x
                right = x + half_x
        root.pos = (x, y, lift * scale if number == 0 else 0.0)
        extents.append((x, y, half_x, half_y))
        placed.append((np.array([x, y, root.pos[2] + high / 2]), Extent(half_x, half_y, high)))
    # The chance comes last: nothing is drawn for kinds held out, whose worlds stay what they are.
    if kind != "body" and kinds == TRAIN_KINDS and b.chance(LOOSE_SHARE):
        b.asset, b.scale = len(names), scale
        for i in range(b.pick(1, 1, 2, 3, 4)):
            free_body(b, 2 * i, float(np.exp(b.uniform(np.log(0.04), np.log(0.2)))))
    radius, walled = _backdrop(b, kind, extents, scale)
    while len(spec.meshes) < MESH_SLOTS:  # the context expects all slots
        spec.add_mesh(name=f"mesh{len(spec.meshes)}").make_cone(3, 1)

    _paint(spec, rng, 0 if kinds == TRAIN_KINDS else 1)
    model = spec.compile()
    if model.nbody > 255:
        raise RuntimeError(f"world has {model.nbody} bodies, masks hold at most 255")
    return World(
        model=model,
        parts=b.parts,
        free_bodies=b.free_bodies,
        looks=[(geom.id, look) for geom, look in b.looks if geom.group != COLLISION_ONLY_GROUP],
        main_centre=placed[0][0],
        main_extent=placed[0][1],
        front=front,
        support_radius=min(radius, extents[0][2]),
        walled=walled,
    )


def _paint(spec: mujoco.MjSpec, rng: np.random.Generator, bank_number: int) -> None:
    bank = pattern_bank(bank_number)
    for texture in spec.textures:
        if texture.name == "sky":
            texture.data = sky(rng, SKY_SIZE).tobytes()
        elif texture.name.startswith("cube"):
            texture.data = cube_faces(surface(rng, bank), CUBE_SIZE, rng).tobytes()
        else:
            texture.data = surface(rng, bank).tobytes()
