# SPDX-License-Identifier: MIT
"""Worlds with articulated objects that nobody here made, read from other people's packages.

    pip install --no-deps --target assets metaworld==3.1.1 gymnasium-robotics==1.4.2

puts Metaworld (MIT) and Gymnasium-Robotics with its Franka kitchen (MIT, kitchen Apache-2.0) into
a folder of their own: none of their code is run or imported, their MJCF files are read by path.

An object stays in the room, the materials and the light that its makers gave it. The robot, marks
of goals and collision shapes are hidden; joint state and camera are random, the camera framing the
object by its own extent as it does our own ones; futures are motions of its hinges and slides.
"""

from functools import cache
from pathlib import Path

import mujoco
import numpy as np

from sim import rendering
from sim.builder import COLLISION_ONLY_GROUP, NO_COLOUR, PANE_GROUP, Extent, Part, pane_alpha
from sim.kinds import FOREIGN_OBJECTS, ForeignObject
from sim.simulator import Simulator
from sim.world import World, add_view

PACKAGES = {"metaworld": "3.1.1", "gymnasium_robotics": "1.4.2"}
"""The versions that the "foreign" split is made of."""

INSTALL = "pip install --no-deps --target DIR metaworld==3.1.1 gymnasium-robotics==1.4.2"

_ROBOTS = {"base", "mocap", "panda0_link0"}  # bodies: the whole tree that one is in is hidden
_OPAQUE = pane_alpha(0.5)  # from here a geom hides more of what is behind it than it shows
_VISIBLE_GROUPS = 3  # MuJoCo's viewers draw the geom groups below this one
_MOVABLE = (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE)


def check_assets(assets: Path) -> None:
    """Raises FileNotFoundError naming a package that is not in `assets`, or in another version."""
    for package, version in PACKAGES.items():
        if not (assets / f"{package}-{version}.dist-info").is_dir():
            found = sorted(p.name for p in assets.glob(f"{package}-*.dist-info"))
            raise FileNotFoundError(
                f"expected {package} {version} in {assets}, found {found or 'none'}; {INSTALL}"
            )


class ForeignSimulator(Simulator):
    """A `Simulator` of one of `FOREIGN_KINDS`, whose packages are installed in `assets`.

    Raises:
        ValueError: unknown kind, negative seed or empty size.
        FileNotFoundError: `assets` lacks a package.
        RuntimeError: no OpenGL library for off-screen rendering.
    """

    def __init__(
        self, kind: str, seed: int, size: tuple[int, int] = (128, 128), *, assets: Path
    ) -> None:
        if kind not in FOREIGN_OBJECTS:
            raise ValueError(f"unknown kind {kind!r}, expected one of {tuple(FOREIGN_OBJECTS)}")
        self._assets = assets
        super().__init__(kind, seed, size)

    def _build(self, rng: np.random.Generator) -> World:
        return load_world(FOREIGN_OBJECTS[self.kind], self._assets)

    def _dress(self, rng: np.random.Generator) -> bool:
        return False

    def _studio(self) -> rendering.Studio:
        return rendering.studio(self.size, self.model)


@cache
def load_world(thing: ForeignObject, assets: Path) -> World:
    """The world of an object; the same one each time, since loading costs more than a picture."""
    check_assets(assets)
    spec = mujoco.MjSpec.from_file(str(assets / thing.model))
    add_view(spec)
    root = spec.body(thing.body)
    if root is None:
        raise ValueError(f"{assets / thing.model} has no body {thing.body!r}")
    carried = [root, *root.find_all(mujoco.mjtObj.mjOBJ_BODY)]
    parts = [
        Part(body, joint)
        for body in carried
        for joint in body.joints
        if joint.type in _MOVABLE and (not thing.joints or joint.name in thing.joints)
    ]
    model = spec.compile()
    if not parts or not model.jnt_limited[[part.joint.id for part in parts]].all():
        raise ValueError(f"expected joints with limits in {thing}, found {len(parts)} joints")
    for part in parts:
        part.home = float(model.qpos0[model.jnt_qposadr[part.joint.id]])

    tree = model.body_rootid  # [nbody] the child of the world that each body is in
    robots = {tree[i] for i in range(model.nbody) if model.body(i).name in _ROBOTS}
    hidden = np.isin(tree[model.geom_bodyid], list(robots))
    model.geom_group[hidden | (model.geom_group == PANE_GROUP)] = COLLISION_ONLY_GROUP
    painted = (model.geom_matid >= 0) & (model.geom_rgba == NO_COLOUR).all(1)
    alpha = model.geom_rgba[:, 3].copy()
    alpha[painted] = model.mat_rgba[model.geom_matid[painted], 3]
    model.geom_group[(model.geom_group < _VISIBLE_GROUPS) & (alpha < _OPAQUE)] = PANE_GROUP

    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    own = np.isin(model.geom_bodyid, [body.id for body in carried])
    own &= model.geom_group < _VISIBLE_GROUPS
    low, high = _bounds(model, data, np.flatnonzero(own))
    half = (high - low) / 2
    return World(
        model=model,
        parts=parts,
        free_bodies=[],
        looks=[],
        main_centre=(low + high) / 2,
        main_extent=Extent(half[0], half[1], 2 * half[2]),
        front=0.0,
        support_radius=0.0,
        walled=True,
    )


def _bounds(model: mujoco.MjModel, data: mujoco.MjData, geoms: np.ndarray) -> np.ndarray:
    """[2, 3] lowest and highest corner of the geoms' bounding boxes (m)."""
    signs = np.stack(np.meshgrid(*[[-1, 1]] * 3), -1).reshape(-1, 3)
    centre, half = model.geom_aabb[geoms, :3], model.geom_aabb[geoms, 3:]
    corners = centre[:, None] + signs * half[:, None]  # [G, 8, 3] in the geoms' frames
    rotation = data.geom_xmat[geoms].reshape(-1, 3, 3)
    world = np.einsum("gij,gkj->gki", rotation, corners) + data.geom_xpos[geoms, None]
    return np.stack([world.min((0, 1)), world.max((0, 1))])
