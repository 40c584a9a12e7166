# SPDX-License-Identifier: MIT
"""Simulated worlds: true flow against a second rendering, determinism, limits, all kinds."""

import dataclasses
import hashlib
import itertools
import subprocess
import sys

import cv2
import mujoco
import numpy as np
import pytest

from fpt_ros import environment
from sim import HELD_OUT_KINDS, TRAIN_KINDS, Simulator, opengl, rendering, sheet
from sim.assets import BUILDERS
from sim.assets.assembly import assembly, lowest_reach
from sim.builder import (
    COLLISION_ONLY_GROUP,
    MESH_SLOTS,
    NO_COLOUR,
    PANE_GROUP,
    Builder,
    pane_alpha,
)
from sim.flow import MIN_DEPTH, dense_flow, moving_bodies, point_flow
from sim.kinds import split_kinds
from sim.simulator import HORIZON_S, STILL, UnstableError
from sim.world import add_slots, build_world

ALL_KINDS = TRAIN_KINDS + HELD_OUT_KINDS
SIZE = (96, 128)


def landing_agreement(frame, truth) -> tuple[np.ndarray, np.ndarray]:
    """[H, W] masks: point lies on its body at its depth in the next frame; point must be seen.

    The four pixels round a landing point are looked at, as it falls between their centres.
    """
    height, width = frame.depth.shape
    v, u = np.mgrid[0:height, 0:width]
    u_after = u + truth.flow[..., 0] * width
    v_after = v + truth.flow[..., 1] * height
    depth_after = frame.depth + truth.scene_flow[..., 2]
    inside = (u_after >= 0) & (u_after <= width - 1) & (v_after >= 0) & (v_after <= height - 1)
    inside &= frame.depth > 0
    agrees = np.zeros_like(inside)
    hidden = np.zeros_like(inside)
    for round_u in (np.floor, np.ceil):
        for round_v in (np.floor, np.ceil):
            at = (
                np.clip(round_v(v_after).astype(int), 0, height - 1),
                np.clip(round_u(u_after).astype(int), 0, width - 1),
            )
            seen = truth.next.depth[at]
            same_depth = np.abs(seen - depth_after) < 0.02 * depth_after
            agrees |= same_depth & (truth.next.bodies[at] == frame.bodies)
            hidden |= (seen > 0) & (seen < 0.99 * depth_after)
    return agrees & inside, inside & (agrees | ~hidden)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_moved_points_are_where_the_second_rendering_shows_them(kind):
    agree = moving_agree = visible = moving_visible = flagged = 0
    for seed in range(4):
        world = Simulator(kind, seed, SIZE)
        rng = np.random.default_rng(seed)
        frame = world.render()
        for probability in (0.0, 1.0):
            truth = world.truth(frame, world.sample_future(rng, probability))
            agrees, seen = landing_agreement(frame, truth)
            agree += agrees[seen].sum()
            visible += seen.sum()
            moving_agree += agrees[seen & truth.moving].sum()
            moving_visible += (seen & truth.moving).sum()
            flagged += (agrees & truth.moving & truth.occluded).sum()
    assert visible > 4 * 8000
    assert agree / visible > 0.99, f"{agree} of {visible}"
    assert moving_visible > 0
    assert moving_agree / moving_visible > 0.98, f"{moving_agree} of {moving_visible}"
    # thin links that turn show another side
    assert flagged / moving_agree < (0.1 if kind == "arm" else 0.025), (
        f"{flagged} of {moving_agree} hidden, though they are seen"
    )


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_kind_builds(kind):
    for seed in range(20):
        world = build_world(kind, np.random.default_rng(seed))
        assert any(part.asset == 0 for part in world.parts)
        assert world.model.nbody <= 255


def test_a_cabinet_of_open_shelves_keeps_one_drawer():
    """This seed draws an open shelf for each of its three cells."""
    world = Simulator("drawer", 121572, (16, 16))
    assert world.sample_future(np.random.default_rng(0)).description != STILL


@pytest.mark.parametrize("kind", ["drawer", "body", "lid"])
def test_same_seed_gives_the_same_world_picture_and_future(kind):
    first, second = (Simulator(kind, 7, SIZE) for _ in range(2))
    a, b = first.render(), second.render()
    np.testing.assert_array_equal(a.rgb, b.rgb)
    np.testing.assert_array_equal(a.depth, b.depth)
    np.testing.assert_array_equal(a.bodies, b.bodies)
    futures = [w.sample_future(np.random.default_rng(1), 0.5) for w in (first, second)]
    np.testing.assert_array_equal(futures[0].body_motion, futures[1].body_motion)
    np.testing.assert_array_equal(futures[0].camera_motion, futures[1].camera_motion)
    assert not np.array_equal(a.rgb, Simulator(kind, 8, SIZE).render().rgb)


def test_worlds_may_take_turns():
    one = Simulator("knob", 0, SIZE)
    before = one.render()
    Simulator("door", 1, (64, 200)).render()
    one._frame = None  # render again
    np.testing.assert_array_equal(one.render().rgb, before.rgb)


def test_a_picture_that_is_too_large_spoils_no_others():
    world = Simulator("knob", 0, SIZE)
    before = world.render()
    with pytest.raises(RuntimeError, match=r"has no buffer of \d+ x \d+ px"):
        Simulator("knob", 0, (40000, 16)).render()
    world._frame = None  # render again
    np.testing.assert_array_equal(world.render().rgb, before.rgb)


def test_contact_sheets_show_worlds(tmp_path, monkeypatch):
    out = tmp_path / "new" / "sheet.png"
    options = ["--kind", "drawer", "--count", "3", "--size", "32", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["sim.sheet", *options])
    sheet.main()
    picture = cv2.imread(str(out))
    assert picture.shape == (2 * 32, 2 * 4 * 32, 3)
    assert picture[:32].std() > 10
    assert not picture[32:, 4 * 32 :].any(), "of the fourth there is none"


def test_futures_do_not_disturb_the_present_and_stay_in_limits():
    for kind in ("drawer", "arm", "body"):
        world = Simulator(kind, 3, SIZE)
        rng = np.random.default_rng(0)
        state, pose = world.data.qpos.copy(), world.camera_pose
        joints = [j for j in range(world.model.njnt) if world.model.jnt_limited[j]]
        for _ in range(10):
            future = world.sample_future(rng, 0.5)
            world.truth(world.render(), future)
            np.testing.assert_array_equal(world.data.qpos, state)
            np.testing.assert_allclose(world.camera_pose, pose, atol=1e-12)
            for j in joints:
                low, high = world.model.jnt_range[j]
                assert low - 1e-9 <= future.qpos[world.model.jnt_qposadr[j]] <= high + 1e-9
            rotation = future.body_motion[:, :3, :3].astype(float)
            product = rotation @ rotation.transpose(0, 2, 1)
            np.testing.assert_allclose(
                product, np.broadcast_to(np.eye(3), product.shape), atol=1e-5
            )
            assert future.moving.any() == (future.description != STILL)
            assert not future.moving[0]


def test_futures_of_one_picture_differ_in_part_and_direction():
    world = Simulator("drawer", 2, SIZE)
    rng = np.random.default_rng(0)
    futures = [world.sample_future(rng) for _ in range(40)]
    assert len({f.description for f in futures}) >= 3


def test_causes_count_the_parts_that_were_chosen():
    rng = np.random.default_rng(0)
    for kind in TRAIN_KINDS:
        world = Simulator(kind, 3, (64, 64))
        for _ in range(12):
            future = world.sample_future(rng, 0.3)
            still = future.description == STILL
            assert future.causes == (0 if still else len(future.description.split(", ")))
            assert future.causes <= 3
            assert (future.causes > 0) == bool(future.moving.any())


def test_shares_of_moving_cameras_several_causes_and_stillness() -> None:
    futures = []
    for kind in TRAIN_KINDS:
        world, rng = Simulator(kind, 3, (64, 64)), np.random.default_rng(1)
        futures += [world.sample_future(rng, 0.15) for _ in range(60)]
    camera = [moving_bodies(f.camera_motion) for f in futures]
    assert np.mean(camera) == pytest.approx(0.15, abs=0.05)
    assert 0.05 < np.mean([f.causes > 1 for f in futures]) < 0.16
    assert np.mean([f.causes == 0 for f in futures]) == pytest.approx(0.05, abs=0.03)


def test_a_pushed_body_takes_others_along_by_contact() -> None:
    """What it hits, or what stands on it, moves by the physics, and is no cause."""
    together = pushes = 0
    for seed in range(12):
        world, rng = Simulator("body", seed, (64, 64)), np.random.default_rng(0)
        for _ in range(8):
            future = world.sample_future(rng)
            if future.causes == 1 and future.description.endswith("is pushed"):
                pushes += 1
                together += future.moving.sum() > 1
    assert pushes > 30
    assert 0.2 < together / pushes < 0.8


def strewn(kinds: tuple[str, ...], count: int) -> list[Simulator]:
    """Worlds of jointed things where free bodies lie about."""
    seeds = itertools.count()
    worlds = (Simulator(kind, seed, (64, 64)) for seed in seeds for kind in kinds)
    return list(itertools.islice((w for w in worlds if w.has_free_bodies), count))


def test_what_lies_on_a_part_rides_and_what_stands_before_it_is_pushed() -> None:
    """A joint that moves takes free bodies along by the physics; others stay exactly there."""
    moved = rode = stayed = 0
    for world in strewn(("drawer", "door", "assembly"), 18):
        rng, model = np.random.default_rng(0), world.model
        free = [body.part.body.id for body in world._world.free_bodies]
        jointed = model.jnt_type != mujoco.mjtJoint.mjJNT_FREE
        low, high = model.jnt_range[jointed].T
        places = model.jnt_qposadr[jointed]
        state, damping = world.data.qpos.copy(), model.dof_damping.copy()
        for future in (world.sample_future(rng) for _ in range(8)):
            values = future.qpos[places]
            assert ((low <= values) & (values <= high)).all()
            np.testing.assert_array_equal(world.data.qpos, state)
            np.testing.assert_array_equal(model.dof_damping, damping)
            if future.causes != 1 or not future.description.startswith("part"):
                continue
            assert (values != state[places]).sum() == 1, "the joints that were not chosen stay"
            part = int(future.description.split()[1])
            assert future.moving[part]
            for body in free:
                motion = future.body_motion[body]
                moved += future.moving[body]
                stayed += world.data.xpos[body, 1] > -50 and (motion == np.eye(4)).all()
                # what the part does at the body's place, nearly: it rode
                origin = np.append(world.data.xpos[body], 1)
                there, with_part = motion @ origin, future.body_motion[part] @ origin
                way = np.linalg.norm(with_part - origin)
                rode += way > 1e-3 and np.linalg.norm(there - with_part) < 0.1 * way
    assert moved > rode > 3
    assert moved > 10
    assert stayed > 40


def test_parts_bodies_pushed_and_bodies_carried_may_move_at_once() -> None:
    found = set()
    for world in strewn(("drawer", "assembly"), 12):
        rng = np.random.default_rng(1)
        for future in (world.sample_future(rng) for _ in range(12)):
            assert np.isfinite(future.qpos).all()
            ways = {word for word in ("moves", "pushed", "carried") if word in future.description}
            found.add(frozenset(ways))
    assert {frozenset(("moves", "pushed")), frozenset(("moves", "carried"))} <= found


def test_strewn_bodies_rest_on_parts_and_before_them() -> None:
    """Few find no place; those that do stand on something, in nothing, and stay."""
    still, near, on_part, count = [], 0, 0, 0
    for world in strewn(tuple(k for k in TRAIN_KINDS if k != "body"), 24):
        own = {part.body.id for part in world._world.parts if part.asset == 0}
        for body in world._world.free_bodies:
            count += 1
            start = world.model.jnt_qposadr[body.part.joint.id]
            here, later = world.data.qpos[start:][:3], world._unpushed()[start:][:3]
            if here[1] < -50:
                continue
            near += 1
            assert world._overlap(body) < 0.15 * body.radius
            still.append(np.linalg.norm(later - here) < 0.02 * body.extent)
            bodies = world.model.geom_bodyid[world.data.contact.geom]
            touched = set(bodies[(bodies == body.part.body.id).any(1)].ravel())
            on_part += any(own & {b, *parents(world, b)} for b in touched)
    assert near > 0.8 * count
    assert np.mean(still) > 0.9
    assert on_part > 0.15 * count


def test_what_is_seen_through_a_pane_is_what_is_behind_it() -> None:
    """The picture has the pane's tint; depth and ids are those of the world without it."""
    seen = nearer = 0
    for seed in range(20):
        world = Simulator("slider", seed, (96, 96))
        panes = np.flatnonzero(world.model.geom_group == PANE_GROUP)
        if not len(panes):
            continue
        frames = []
        for group, alpha in ((PANE_GROUP, 0.2), (COLLISION_ONLY_GROUP, 0.2), (0, 1.0)):
            world.model.geom_group[panes] = group
            world.model.geom_rgba[panes, 3] = alpha
            world._frame = None  # what is kept of the state as it was
            frames.append(world.render())
        tinted, without, opaque = frames
        assert (tinted.bodies == without.bodies).all()
        assert (tinted.depth == without.depth).all()
        seen += (tinted.rgb != without.rgb).any()
        nearer += ((opaque.depth > 0) & (opaque.depth < tinted.depth)).any()
    assert seen >= 3
    assert nearer >= 3


def test_a_pane_may_be_clear_in_one_picture_of_a_world_and_opaque_in_the_next() -> None:
    world = Simulator("slider", 4, (48, 48))
    panes = [geom for geom, (_, look, _) in world._world.looks if look == "glass"]
    clear, shadows = [], []
    for seed in range(200):
        world.rerandomize(np.random.default_rng(seed))
        group, colour = world.model.geom_group[panes], world.model.geom_rgba[panes]
        untextured = world.model.geom_matid[panes] == -1
        assert (untextured == (group == PANE_GROUP)).all()
        assert ((colour[:, 3] < 0.3) == untextured).all()
        assert (np.all(colour == NO_COLOUR, 1) == ~untextured).all()
        clear.append(untextured.any())
        shadows.append(world._shadows)
    assert 0 < np.mean(clear) < 1
    assert np.any(shadows)
    assert not np.any(shadows, where=clear), "clear panes would cast a wall's shadow"


def test_a_pane_hides_as_much_as_it_says() -> None:
    spec = mujoco.MjSpec()
    add_slots(spec)
    while len(spec.meshes) < MESH_SLOTS:
        spec.add_mesh(name=f"mesh{len(spec.meshes)}").make_cone(3, 1)
    box = mujoco.mjtGeom.mjGEOM_BOX
    wall = {"type": box, "size": [1, 1, 0.01], "rgba": [1, 1, 1, 1]}
    spec.worldbody.add_geom(name="wall", pos=[0, 0, -1], **wall)
    spec.worldbody.add_geom(
        name="pane", pos=[0, 0, -0.5], type=box, size=[0.5, 0.5, 0.001], rgba=[0, 0, 0, 0.3]
    )
    model = spec.compile()
    model.light_active[:] = False
    model.vis.headlight.specular[:] = 0  # else the pane shines
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    studio = rendering.studio((32, 32))
    light = []
    for hidden in (0.0, 0.4):
        model.geom_group[model.geom("pane").id] = PANE_GROUP if hidden else COLLISION_ONLY_GROUP
        model.geom_rgba[model.geom("pane").id, 3] = pane_alpha(hidden)
        studio.update(model, data, False)
        light.append(float(studio.rgb((32, 32))[16, 16].mean()))
    assert light[1] / light[0] == pytest.approx(0.6, abs=0.02)


def test_assemblies_stand_high_enough_for_all_their_parts() -> None:
    """In other states of their joints, too, than the ones that were looked at."""
    stands = 0
    for seed in range(40):
        spec = mujoco.MjSpec()
        spec.compiler.degree = False
        b = Builder(spec, np.random.default_rng(seed))
        extent = assembly(b, b.root())
        assert lowest_reach(spec, seed=1 + seed) > -0.004
        model = spec.compile()
        data = mujoco.MjData(model)
        mujoco.mj_kinematics(model, data)
        still = model.body_weldid[model.geom_bodyid] == 0
        boxes = still & (model.geom_type == mujoco.mjtGeom.mjGEOM_BOX)
        bottom = data.geom_xpos[boxes, 2] - np.abs(
            data.geom_xmat[boxes, 6:] * model.geom_size[boxes]
        ).sum(1)
        assert (bottom > -1e-9).all()
        assert data.geom_xpos[still, 2].max() <= extent.z
        stands += any(np.isclose(bottom, 0)) and b.looks[-1][1][1] == "feet"
    assert stands > 5


@pytest.mark.parametrize(
    ("kind", "digest"), [("lid", "50c595d6"), ("lever", "018a2cfc"), ("turntable", "62d53112")]
)
def test_worlds_of_the_kinds_held_out_stay_what_they_were(kind: str, digest: str) -> None:
    """So that models may be compared: nothing more is drawn for them when kinds trained on change.

    The states are rounded, so that the digest is that of any machine.
    """
    world = Simulator(kind, 5, (64, 64))
    future = world.sample_future(np.random.default_rng(0))
    states = np.concatenate([world.model.geom_size.ravel(), world.data.qpos, future.qpos])
    assert hashlib.sha256(np.round(states, 6).tobytes()).hexdigest()[:8] == digest
    assert not world.has_free_bodies


@pytest.mark.parametrize("kind", ["knob", "body", "lid"])
def test_all_that_is_seen_to_move_moves_enough_and_not_too_far(kind: str) -> None:
    """Not too far also what is smaller than the distance of the pixels that tell the first."""
    moved = 0
    for seed in range(8):
        world, rng = Simulator(kind, seed, (64, 64)), np.random.default_rng(seed)
        frame = world.render()
        for future in (world.sample_future(rng, p) for p in (0.0, 0.0, 1.0)):
            on_bodies = future.moving[frame.bodies]
            assert np.abs(world.truth(frame, future).flow[on_bodies]).max(initial=0) <= 0.8
            assert (future.description == STILL) == (not on_bodies.any())
            alone = world.truth(frame, dataclasses.replace(future, camera_motion=np.eye(4)))
            if future.description != STILL:
                assert np.abs(alone.flow).max() >= 0.004
                moved += 1
    assert moved > 12


def test_futures_in_which_the_solver_diverges_are_drawn_anew() -> None:
    world = Simulator("body", 0, (64, 64))
    with pytest.raises(UnstableError, match="diverged: mjWARN_BADQVEL"):
        world._step(0.1, np.full(world.model.nv, 1e12))
    world.model.opt.gravity[:] = 1e12
    with pytest.raises(UnstableError, match="diverged"):
        world._unpushed()
    rng = np.random.default_rng(0)
    told = [world.sample_future(rng).description for _ in range(20)]
    assert not any("pushed" in words for words in told)
    assert any("carried" in words for words in told)


def test_what_a_hand_holds_does_not_fall() -> None:
    held = 0
    for seed in (2, 7, 10):
        world = Simulator("body", seed, (64, 64))
        world._step(HORIZON_S)
        for part in (body.part for body in world._world.free_bodies if body.part.held):
            start = world.model.jnt_qposadr[part.joint.id]
            fallen = (world.data.qpos - world._scratch.qpos)[start : start + 7]
            assert np.abs(fallen).max() < 1e-3
            held += 1
    assert held >= 3


def test_wide_futures_go_most_of_a_joints_way() -> None:
    """Of the room in the direction taken; without the wish, less than half in most cases."""
    shares: dict[float, list[float]] = {0.0: [], 1.0: []}
    for wide, found in shares.items():
        for seed in range(12):
            world, rng = Simulator("drawer", seed, (64, 64)), np.random.default_rng(0)
            if world.has_free_bodies:
                continue
            before = world.data.qpos.copy()
            low, high = world.model.jnt_range.T
            for _ in range(6):
                after = world.sample_future(rng, wide_probability=wide).qpos
                for j in np.flatnonzero(after != before):
                    limit = high[j] if after[j] > before[j] else low[j]
                    found.append((after[j] - before[j]) / (limit - before[j]))
        assert len(found) > 40
        assert 0 < min(found) < max(found) <= 1 + 1e-9
    assert min(shares[1.0]) >= 0.3 - 1e-9
    assert np.median(shares[0.0]) < 0.5 < np.median(shares[1.0])


def test_what_no_joint_moves_against_its_parent_is_one_body_with_it() -> None:
    """A knob on a drawer, a tool on an arm: which points belong together is trained on."""
    tied = 0
    for kind, seed in itertools.product(("arm", "assembly"), range(4)):
        world = Simulator(kind, seed, (32, 32))
        model, own = world.model, world.model.body_weldid
        for body in range(1, model.nbody):
            if model.body_dofnum[body]:
                assert own[body] == body
            else:
                assert own[body] == own[model.body_parentid[body]]
                tied += own[body] > 0
        assert set(np.unique(world.render().bodies)) <= set(own)
    assert tied


def test_what_is_carried_does_not_end_in_other_things_nor_leaves_what_it_bears() -> None:
    carried = stacked = 0
    for seed in (45, 138, 309, 3, 6, 9):
        world, rng = Simulator("body", seed, (64, 64)), np.random.default_rng(seed)
        parts = world._world.parts
        stacked += sum(world._bears(i) for i in range(len(parts)) if parts[i].free)
        for _ in range(12):
            future = world.sample_future(rng)
            for body in world._world.free_bodies:
                index = parts.index(body.part)
                if f"free body {body.part.body.id} is carried" in future.description:
                    carried += 1
                    assert not world._bears(index) or body.part.held
                    before, after = world._overlap(body), world._overlap(body, future.qpos)
                    assert after <= max(0.1 * body.radius, before) + 1e-9
    assert carried > 10
    assert stacked


def test_a_link_takes_the_links_beyond_it_along() -> None:
    moved = set()
    for seed in range(6):
        world, rng = Simulator("arm", seed, (64, 64)), np.random.default_rng(1)
        for future in (world.sample_future(rng) for _ in range(10)):
            if future.causes == 1:
                first = int(np.flatnonzero(future.moving)[0])
                bodies = range(first, world.model.nbody)
                carried = [b for b in bodies if first in (b, *parents(world, b))]
                assert np.flatnonzero(future.moving).tolist() == carried
                moved.add(len(carried))
    assert {2, 3, 4} <= moved


def parents(world: Simulator, body: int) -> set[int]:
    """All bodies that carry it."""
    found = set()
    while body := int(world.model.body_parentid[body]):
        found.add(body)
    return found


def test_free_bodies_that_no_push_reaches_stay_exactly_where_they_are():
    rng = np.random.default_rng(0)
    witnesses = 0
    for seed in range(12):
        world = Simulator("body", seed, (64, 64))
        extent = {free.part.body.id: free.extent for free in world._world.free_bodies}
        for _ in range(8):
            future = world.sample_future(rng)
            for body, size in extent.items():
                if f"body {body} " in future.description:
                    continue
                motion = future.body_motion[body]
                origin = np.append(world.data.xpos[body], 1)
                shift = np.linalg.norm((motion @ origin - origin)[:3]) / size
                angle = np.arccos(np.clip((np.trace(motion[:3, :3]) - 1) / 2, -1, 1))
                witnesses += not future.moving[body]
                assert not future.moving[body] or max(shift, angle) > 0.9e-3
    assert witnesses > 50


def test_a_quarter_of_the_doors_are_flaps_that_open_outwards():
    flaps = 0
    count = 80
    for seed in range(count):
        b = Builder(mujoco.MjSpec(), np.random.default_rng(seed))
        BUILDERS["door"](b, b.root())
        hinges = [part for part in b.parts if abs(part.joint.axis[0]) == 1]
        flaps += bool(hinges)
        for part in hinges:
            front = part.body.geoms[0].pos[2]  # of the leaf's middle from the hinge
            low, high = part.joint.range
            # Turned about x by a, a point at height z comes to y = -z sin(a): the front is -y.
            assert (low == 0 and 0.5 < high <= np.pi / 2) if front > 0 else (high == 0 > low)
    assert 0.12 < flaps / count < 0.38


def test_masks_and_frames_have_their_shapes_and_ranges():
    world = Simulator("turntable", 0, SIZE)
    frame = world.render()
    assert (frame.rgb.shape, frame.rgb.dtype) == ((*SIZE, 3), np.uint8)
    assert (frame.depth.shape, frame.depth.dtype) == (SIZE, np.float32)
    assert frame.bodies.max() < world.model.nbody
    np.testing.assert_array_equal(frame.intrinsics[:2, 2], [(128 - 1) / 2, (96 - 1) / 2])
    future = world.sample_future(np.random.default_rng(2))
    truth = world.truth(frame, future)
    np.testing.assert_array_equal(truth.moving, future.moving[frame.bodies])
    assert np.all(truth.flow[~truth.moving] == 0)


def test_movable_parts_are_in_view():
    shares = []
    for seed in range(10):
        for kind in TRAIN_KINDS:
            frame = Simulator(kind, seed, (64, 64)).render()
            shares.append((frame.bodies > 0).mean())
    assert np.mean(np.array(shares) >= 0.015) > 0.85


def test_kinds_of_the_splits_are_apart():
    assert not set(TRAIN_KINDS) & set(HELD_OUT_KINDS)
    assert split_kinds("lid") == HELD_OUT_KINDS
    with pytest.raises(ValueError, match="unknown kind 'sofa'"):
        split_kinds("sofa")
    with pytest.raises(ValueError, match="seed must be non-negative, got -1"):
        Simulator("door", -1)
    with pytest.raises(ValueError, match="size must be"):
        Simulator("door", 0, (0, 10))


# True flow without MuJoCo ------------------------------------------------------------------


def camera() -> tuple[np.ndarray, np.ndarray]:
    return np.array([[100.0, 0, 31.5], [0, 100.0, 23.5], [0, 0, 1]]), np.eye(4)


def test_flow_of_a_sideways_shift_is_focal_length_over_depth():
    K, pose = camera()
    motion = np.tile(np.eye(4), (2, 1, 1))
    motion[1, :3, 3] = (0.1, -0.2, 0)
    depth, bodies = np.full((48, 64), 2.0, np.float32), np.zeros((48, 64), np.uint8)
    bodies[10:20, 10:20] = 1
    result = dense_flow(depth, bodies, K, pose, motion)
    assert np.all(result.flow[bodies == 0] == 0)
    np.testing.assert_allclose(result.flow[15, 15], (5 / 64, -10 / 48), rtol=1e-5)
    np.testing.assert_allclose(result.scene_flow[15, 15], (0.1, -0.2, 0), atol=1e-6)
    np.testing.assert_allclose(result.depth, 2.0)


def test_points_at_infinity_see_the_cameras_rotation_only():
    K, pose = camera()
    still = np.eye(4)[None]
    xy = np.array([[31.5, 23.5]])
    zero = np.zeros(1)
    shift = np.eye(4)
    shift[:3, 3] = (0.3, 0.1, -0.4)
    none = point_flow(xy, zero, zero.astype(int), K, (48, 64), pose, still, shift)
    np.testing.assert_array_equal(none.flow, 0)
    angle = 0.05
    turn = np.eye(4)  # about y: the camera looks to the right
    turn[:3, :3] = [
        [np.cos(angle), 0, np.sin(angle)],
        [0, 1, 0],
        [-np.sin(angle), 0, np.cos(angle)],
    ]
    turned = point_flow(xy, zero, zero.astype(int), K, (48, 64), pose, still, turn)
    np.testing.assert_allclose(turned.flow[0], (-100 * np.tan(angle) / 64, 0), atol=1e-6)
    assert turned.depth[0] == 0
    assert np.all(turned.scene_flow == 0)


def test_points_behind_the_camera_stay_finite():
    K, pose = camera()
    motion = np.tile(np.eye(4), (2, 1, 1))
    motion[1, 2, 3] = -5
    result = point_flow(np.array([[3, 4]]), np.ones(1), np.ones(1, int), K, (48, 64), pose, motion)
    assert np.all(np.isfinite(result.flow))
    assert result.depth[0] == np.float32(MIN_DEPTH)


def test_moving_bodies_marks_rotations_and_shifts():
    motion = np.tile(np.eye(4), (3, 1, 1))
    motion[1, 0, 3] = 0.01
    motion[2, :2, :2] = [[0, -1], [1, 0]]
    np.testing.assert_array_equal(moving_bodies(motion), [False, True, True])


def test_flow_and_reading_need_neither_mujoco_nor_opengl():
    code = "import sys, sim.flow, sim.dataset; sys.exit('mujoco' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_opengl_names_the_packages(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(environment, "find_library", lambda name: None)
    with pytest.raises(RuntimeError, match="apt-get install libegl1"):
        opengl.make_contexts()


@pytest.mark.parametrize("kind", ["drawer", "door", "arm", "lid"])
def test_a_poke_by_a_true_motion_brings_that_future_about(kind):
    led = 0
    for seed in range(3):
        world = Simulator(kind, seed, SIZE)
        frame, rng = world.render(), np.random.default_rng(seed)
        state, damping = world.data.qpos.copy(), world.model.dof_damping.copy()
        future = world.sample_future(rng)
        truth = world.truth(frame, future)
        flow = truth.flow * (SIZE[1], SIZE[0])
        length = np.linalg.norm(flow, axis=-1)
        one_part = future.causes == 1 and future.description.startswith("part")
        if not one_part or length.max() < 4:
            continue
        part = int(future.description.split()[1])
        of_part = [b for b in range(world.model.nbody) if part in (b, *parents(world, b))]
        places = np.argwhere((length > 0.5 * length.max()) & np.isin(frame.bodies, of_part))
        v, u = places[rng.integers(len(places))]
        poked = world.future_of_poke((u, v), flow[v, u])
        again = world.future_of_poke((u, v), flow[v, u])
        np.testing.assert_array_equal(poked.qpos, again.qpos)
        reached = world.truth(frame, poked).flow * (SIZE[1], SIZE[0])
        np.testing.assert_allclose(reached[v, u], flow[v, u], atol=0.3)
        if kind != "arm":  # whose other joints give way, too
            np.testing.assert_array_equal(poked.moving, future.moving)
            error = np.linalg.norm(reached - flow, axis=-1)[truth.moving]
            assert np.median(error) < 0.1
        np.testing.assert_array_equal(world.data.qpos, state)
        np.testing.assert_array_equal(world.model.dof_damping, damping)
        led += 1
    assert led


def test_a_hand_moves_no_joint_beyond_its_limits_nor_the_static_world():
    world = Simulator("drawer", 1, SIZE)
    frame = world.render()
    joints = [j for j in range(world.model.njnt) if world.model.jnt_limited[j]]
    v, u = np.argwhere(frame.bodies > 0)[0]
    for motion in ((300.0, 0.0), (0.0, -300.0), (0.0, 300.0)):
        qpos = world.future_of_poke((u, v), motion).qpos
        for j in joints:
            low, high = world.model.jnt_range[j]
            value = qpos[world.model.jnt_qposadr[j]]
            assert low <= value <= high
    v, u = np.argwhere(frame.bodies == 0)[0]
    slipped = world.future_of_poke((u, v), (10.0, 0.0))
    assert slipped.description == STILL
    np.testing.assert_array_equal(slipped.qpos, world.data.qpos)


@pytest.mark.parametrize(
    ("xy", "motion", "words"),
    [
        ((128, 0), (1, 0), "must lie in the 128 x 96 picture"),
        ((0, -1), (1, 0), "must lie in the 128 x 96 picture"),
        ((0, 0), (np.nan, 0), "expected finite"),
        ((0, 0), (1, 0, 0), "expected finite"),
    ],
)
def test_pokes_outside_or_not_finite_are_refused(xy, motion, words):
    with pytest.raises(ValueError, match=words):
        Simulator("drawer", 1, SIZE).future_of_poke(xy, motion)
