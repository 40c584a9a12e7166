# SPDX-License-Identifier: MIT
"""Worlds from other people's files: from ones laid out as theirs are, which are not at hand."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sim.builder import COLLISION_ONLY_GROUP, PANE_GROUP
from sim.dataset import Settings, write_dataset
from sim.foreign import PACKAGES, ForeignSimulator, check_assets, load_world
from sim.kinds import FOREIGN_OBJECTS, HELD_OUT_KINDS, TRAIN_KINDS
from training.data import Shards

DRAWER = FOREIGN_OBJECTS["metaworld/drawer"]
ROOM = """
<mujoco>
  <asset>
    <texture name="grain" type="2d" builtin="checker" rgb1=".6 .4 .2" rgb2=".5 .3 .1"
             width="64" height="64"/>
    <material name="wood" texture="grain"/>
    <material name="glass" rgba=".9 .9 1 .1"/>
  </asset>
  <worldbody>
    <light pos="0 0 2"/>
    <camera name="theirs" pos="0 0 3"/>
    <geom name="floor" type="plane" size="3 3 .1" material="wood"/>
    <site name="goal" pos="0 .6 .2" size=".3" rgba="0 1 0 1"/>
    <body name="base"><geom name="arm" type="box" size=".2 .6 .8" pos="0 .3 .8" rgba="1 0 0 1"/>
      <body pos="0 .3 1"><joint name="arm_joint" axis="0 0 1" range="-1 1" limited="true"/>
        <geom name="hand" type="sphere" size=".3" rgba="1 0 0 1"/></body></body>
    {objects}
  </worldbody>
</mujoco>
"""
OBJECT = """
    <body name="{body}" pos="{x} 1 .2">
      <geom type="box" size=".2 .02 .2" pos="0 .2 0" rgba=".2 .3 .8 1"/>
      <geom type="box" size=".2 .2 .02" pos="0 0 -.18" rgba=".2 .3 .8 1"/>
      <body pos="0 -.02 0">
        <joint name="{joint}" type="slide" axis="0 1 0" range="-.3 0" limited="true"/>
        <geom type="box" size=".18 .18 .15" rgba=".8 .8 .2 1"/>
        <geom type="box" size=".9 .9 .9" group="4" rgba="0 0 1 1"/>
        <geom type="box" size=".18 .01 .3" pos="0 -.2 .45" material="glass"/>
        <geom type="box" size=".02 .02 .02" pos="0 0 .1" material="glass" rgba=".8 .8 .2 1"/>
      </body>
    </body>
"""


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of the catalogue; each object in them is a box that slides like a drawer."""
    out = tmp_path_factory.mktemp("assets")
    for package, version in PACKAGES.items():
        (out / f"{package}-{version}.dist-info").mkdir()
    files: dict[str, list[str]] = {}
    for thing in FOREIGN_OBJECTS.values():
        held = files.setdefault(thing.model, [])
        joint = thing.joints[0] if thing.joints else f"joint_{len(held)}"
        held.append(OBJECT.format(body=thing.body, x=len(held), joint=joint))
    for name, held in files.items():
        file = out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(ROOM.format(objects="".join(held)))
    return out


@pytest.fixture(scope="module")
def world(assets: Path) -> ForeignSimulator:
    return ForeignSimulator("metaworld/drawer", 3, (64, 64), assets=assets)


def test_only_the_object_and_its_room_are_seen(world: ForeignSimulator) -> None:
    for seed in range(6):
        world.rerandomize(np.random.default_rng(seed))
        red, green, blue = np.moveaxis(world.render().rgb.astype(int), -1, 0)
        assert not ((red > 100) & (green < 30) & (blue < 30)).any(), "no robot"
        assert not ((green > 100) & (red < 30) & (blue < 30)).any(), "no goal"
        assert not ((blue > 100) & (red < 10) & (green < 10)).any(), "no collision shape"
        assert ((red > 60) & (blue < 0.6 * red) & (green > 0.8 * red)).any(), "the yellow box"


def test_panes_tint_the_picture_and_are_no_surface(world: ForeignSimulator) -> None:
    model = world.model
    glass = model.material("glass").id
    default = (model.geom_rgba == 0.5).sum(1) == 3
    panes = (model.geom_matid == glass) & default
    painted = (model.geom_matid == glass) & ~default
    assert panes.sum() == painted.sum() > 0
    assert (model.geom_group[panes] == PANE_GROUP).all()
    assert (model.geom_group[painted] == 0).all()
    world.rerandomize(np.random.default_rng(0))
    tinted = world.render()
    model.geom_group[panes] = COLLISION_ONLY_GROUP
    try:
        world.rerandomize(np.random.default_rng(0))
        without = world.render()
    finally:
        model.geom_group[panes] = PANE_GROUP
    assert (tinted.rgb != without.rgb).any()
    assert (tinted.depth == without.depth).all()
    assert (tinted.bodies == without.bodies).all()


def test_the_camera_frames_the_object(world: ForeignSimulator) -> None:
    shares = []
    for seed in range(12):
        world.rerandomize(np.random.default_rng(seed))
        shares.append((world.render().bodies > 0).mean())
    assert min(shares) > 0.01
    assert np.median(shares) > 0.05
    extent = world._world.main_extent
    # of what is drawn, with the drawer where its makers left it
    assert (extent.x, extent.y, extent.z) == pytest.approx((0.2, 0.21, 0.4))


def test_futures_slide_the_drawer(world: ForeignSimulator) -> None:
    rng = np.random.default_rng(0)
    frame = world.render()
    moved, landed = 0, []
    for _ in range(10):
        future = world.sample_future(rng)
        truth = world.truth(frame, future)
        movers = np.flatnonzero(future.moving)
        assert len(movers) == future.causes <= 1
        if len(movers):
            assert np.allclose(future.body_motion[movers[0], :3, :3], np.eye(3))
            shift = future.body_motion[movers[0], :3, 3]
            assert np.abs(shift[[0, 2]]).max() < 1e-6 < abs(shift[1]) <= 0.3
            assert (truth.moving == (frame.bodies == movers[0])).all()
            moved += 1
            v, u = np.nonzero(truth.moving)
            ends = np.rint(np.stack([u, v], -1) + truth.flow[v, u] * 64).astype(int)
            ends = ends[((ends >= 0) & (ends < 64)).all(-1)]
            landed += list(truth.next.bodies[ends[:, 1], ends[:, 0]] == movers[0])
    assert moved >= 7
    assert np.mean(landed) > 0.8  # the others are in the cabinet


def test_worlds_of_one_object_keep_their_own_lens(assets: Path) -> None:
    one = ForeignSimulator("metaworld/drawer", 3, (64, 64), assets=assets)
    before, focal = one.render(), one.intrinsics[0, 0]
    other = ForeignSimulator("metaworld/drawer", 4, (64, 64), assets=assets)
    other.render()
    assert other.intrinsics[0, 0] != focal == one.intrinsics[0, 0]
    one._frame = None  # render again
    np.testing.assert_array_equal(one.render().depth, before.depth)


def test_a_hand_moves_the_object_alone(assets: Path, tmp_path: Path) -> None:
    """And not what else has joints in the room, which gravity would move meanwhile."""
    shutil.copytree(assets, tmp_path, dirs_exist_ok=True)
    file = tmp_path / DRAWER.model
    file.write_text(file.read_text().replace('axis="0 0 1"', 'axis="1 0 0"'))  # the arm falls
    world = ForeignSimulator("metaworld/drawer", 3, (64, 64), assets=tmp_path)
    frame = world.render()
    (drawer,) = {p.body.id for p in world._world.parts} - {0}
    led = 0
    for v, u in np.argwhere(frame.bodies == drawer)[::97]:
        future = world.future_of_poke((u, v), (9, 4))
        assert set(np.flatnonzero(future.moving)) <= {drawer}
        led += future.causes
    assert led, "no poke moved the drawer"


def test_shards_of_foreign_objects(assets: Path, tmp_path: Path) -> None:
    settings = Settings(size=48, futures=3, images_per_world=1, images_per_shard=20)
    write_dataset(tmp_path, "foreign", 20, settings, assets=assets)
    shards = Shards(tmp_path, "foreign")
    assert {kind for kind, _ in shards.worlds} == set(FOREIGN_OBJECTS)
    assert not set(FOREIGN_OBJECTS) & {*TRAIN_KINDS, *HELD_OUT_KINDS}
    assert sum(shards[i].moving.any() for i in range(20)) > 15
    with pytest.raises(ValueError, match='"foreign" alone needs assets, got None'):
        write_dataset(tmp_path, "foreign", 20, settings)
    with pytest.raises(ValueError, match="for 'val'"):
        write_dataset(tmp_path, "val", 20, settings, assets=assets)


def test_what_is_missing_is_named(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown kind 'drawer', expected one of"):
        ForeignSimulator("drawer", 0, assets=assets)
    (tmp_path / "metaworld-3.0.0.dist-info").mkdir()
    with pytest.raises(FileNotFoundError, match=r"metaworld 3.1.1 in .*found \['metaworld-3.0.0"):
        check_assets(tmp_path)
    for change, message in (({"joints": ("no",)}, "found 0 joints"), ({"body": "no"}, "body 'no'")):
        with pytest.raises(ValueError, match=message):
            load_world(replace(DRAWER, **change), assets)
