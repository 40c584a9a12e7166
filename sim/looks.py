# SPDX-License-Identifier: MIT
"""Random materials and lights of a world that is compiled already."""

import mujoco
import numpy as np

from sim.builder import NO_COLOUR, PANE_GROUP, pane_alpha
from sim.textures import random_colour
from sim.world import BACKDROP, CUBE_TEXTURES, LIGHTS, PLAIN_MATERIALS, PLANE_TEXTURES, World

_CLEAR = 0.8
"""Share of the assets with panes whose panes are seen through; the others' are opaque."""


def randomize_materials(world: World, rng: np.random.Generator) -> None:
    """Draws the materials' colours and shine, and which surface has which material."""
    model = world.model
    textured = CUBE_TEXTURES + PLANE_TEXTURES
    count = textured + PLAIN_MATERIALS
    colours = np.stack([random_colour(rng) for _ in range(count)])
    if rng.random() < 0.12:  # neighbours of almost the same colour
        colours[textured:] = colours[textured] + rng.normal(0, 0.04, (PLAIN_MATERIALS, 3))
    # Textures keep their own colours, with a light tint.
    tint = 1 - rng.uniform(0, 0.5, (textured, 1)) * rng.random((textured, 3))
    model.mat_rgba[:textured, :3] = tint
    model.mat_rgba[textured:, :3] = np.clip(colours[textured:], 0.02, 1)
    shine = rng.random((count, 2)) * (rng.random((count, 1)) < 0.5)
    model.mat_specular[:], model.mat_shininess[:] = shine[:, 0], shine[:, 1]

    cubes = np.arange(CUBE_TEXTURES)
    planes = np.arange(CUBE_TEXTURES, textured)
    plains = np.arange(textured, count)
    plain_share = rng.uniform(0.1, 0.9)
    uniform = rng.random(16) < 0.12  # assets of one material throughout
    chosen: dict[tuple, int] = {}
    for geom, (asset, look, index) in world.looks:
        key: tuple = (asset, look, index)
        if asset != BACKDROP and uniform[asset]:
            key = (asset,)
        elif look not in ("prop", "free", "picture"):
            # Fronts, handles... of an asset are mostly alike.
            alike = chosen.setdefault((asset, look, "alike"), int(rng.random() < 0.7))
            key = (asset, look) if alike else key
        if key not in chosen:
            flat = look in ("floor", "wall", "sidewall") and asset == BACKDROP
            pool = plains if rng.random() < plain_share else planes if flat else cubes
            chosen[key] = int(rng.choice(pool))
        model.geom_matid[geom] = chosen[key]

    panes = [(geom, asset) for geom, (asset, look, _) in world.looks if look == "glass"]
    glass: dict[int, tuple] = {}  # group and colour in an asset
    for geom, asset in panes:
        if asset not in glass:
            clear = rng.random() < _CLEAR
            tint = (*(1 - 0.5 * rng.random(3)), pane_alpha(rng.uniform(0.05, 0.5)))
            glass[asset] = (PANE_GROUP, tint) if clear else (0, NO_COLOUR)
        # Both are set either way: in the world's last picture the pane may have been another.
        model.geom_group[geom], model.geom_rgba[geom] = glass[asset]
        if model.geom_group[geom] == PANE_GROUP:
            model.geom_matid[geom] = -1


def randomize_lights(world: World, data: mujoco.MjData, rng: np.random.Generator) -> bool:
    """Draws number, colours and directions of the lights; returns whether shadows are cast."""
    model = world.model
    count = int(rng.integers(1, LIGHTS + 1))
    strength = rng.dirichlet(np.ones(count)) * rng.uniform(0.5, 1.1)
    # MuJoCo's shadow of a pane is as dark as a wall's.
    shadows = bool(rng.random() < 0.12) and not (model.geom_group == PANE_GROUP).any()
    for i in range(LIGHTS):
        active = i < count
        model.light_active[i] = active
        if not active:
            continue
        colour = 1 - rng.uniform(0, 0.35) * rng.random(3)
        model.light_diffuse[i] = strength[i] * colour
        model.light_specular[i] = rng.uniform(0, 0.5) * colour
        model.light_ambient[i] = 0
        model.light_castshadow[i] = shadows and i == 0
        azimuth, elevation = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 1.5)
        if world.walled:  # from the room's side
            azimuth = rng.uniform(np.pi, 2 * np.pi)
        towards = np.array(
            [
                np.cos(elevation) * np.cos(azimuth),
                np.cos(elevation) * np.sin(azimuth),
                np.sin(elevation),
            ]
        )
        distance = 4 * max(world.main_extent.x, world.main_extent.z)
        data.light_xpos[i] = world.main_centre + distance * towards
        data.light_xdir[i] = -towards
    headlight = model.vis.headlight
    headlight.ambient[:] = rng.uniform(0.15, 0.55)
    headlight.diffuse[:] = rng.uniform(0, 0.5)
    headlight.specular[:] = rng.uniform(0, 0.3)
    return shadows
