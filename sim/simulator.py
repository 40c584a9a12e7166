# SPDX-License-Identifier: MIT
"""`Simulator`: one random world, its pictures, its possible futures and their true flow."""

from dataclasses import dataclass
from itertools import product

import mujoco
import numpy as np
from numpy.typing import NDArray

from fpt_model.geometry import inside_image
from fpt_model.occlusion import turned_away
from sim import rendering
from sim.builder import FreeBody
from sim.flow import dense_flow, moving_bodies, point_flow
from sim.looks import randomize_lights, randomize_materials
from sim.world import World, build_world

HORIZON_S = 1.0
"""Time between a picture and its future."""

SETTLING_S = 0.4
"""Time that free bodies get to come to rest before a picture: loose stacks fall."""

STILL = "nothing moves"
"""Description of futures without body motion."""

# Optical frame (x right, y down, z forward) in MuJoCo's camera frame (x right, y up, z backward).
_OPTICAL = np.diag([1.0, -1.0, -1.0])
_VISIBLE_SHARE = 0.004  # of the picture: a part below is not chosen to move
_SUBJECT_SHARE = (0.03, 0.8)  # of the picture, wanted for the main asset's movable parts together
_FLOW_RANGE = (0.004, 0.8)  # of the strongest flow in a future; others are drawn anew
_DRAWS = 8  # of a future or a state, until one is acceptable
_AWAY = 100.0  # metres: beyond what any camera sees; there are bodies that found no place
_PLACES = 30  # tried on the parts for a free body, and as many before them
_EVEN = 0.1  # of its radius: by how much a support may be uneven, or it may sink into one
_JITTER = 1e-3  # of its extent: two states of a free body that differ by less are the same
_HAND_STIFFNESS = (
    40.0  # 1/s, natural frequency of a hand that leads a point; it is critically damped
)
_HAND_RAMP = 0.7  # of the horizon: the hand's way; for the rest it holds
_LED_DAMPING = 5.0  # 1/s, at which a joint that a hand leads loses its speed
_HAND_RANK = 1e-2  # of the easier direction's mobility: less is a direction that a joint forbids
_OCCLUSION_TOLERANCE = 0.01  # relative depth difference that still counts as the same surface


class UnstableError(RuntimeError):
    """MuJoCo's solver diverged; what follows from such a state means nothing."""


@dataclass(frozen=True)
class Frame:
    """A picture with its geometry. Conventions: `sim.flow`."""

    rgb: NDArray[np.uint8]  # [H, W, 3]
    depth: NDArray[np.float32]  # [H, W] metres, 0 = no surface; panes are none
    bodies: NDArray[np.uint8]  # [H, W], 0 = static world
    intrinsics: NDArray[np.float64]  # K [3, 3] pixels
    camera_pose: NDArray[np.float64]  # [4, 4] optical frame in the world


@dataclass(frozen=True)
class Future:
    """One way in which a frame may go on within `HORIZON_S`."""

    body_motion: NDArray[np.float32]  # [n, 4, 4] world-frame rigid motions, body 0 static
    camera_motion: NDArray[np.float32]  # [4, 4], identity for a static camera
    description: str
    qpos: NDArray[np.float64]  # the state of the world afterwards
    causes: int
    """Parts that were chosen to move, 0 for none. What these carry or hit is no cause, nor is the
    camera."""

    @property
    def moving(self) -> NDArray[np.bool_]:
        """[n] which bodies move."""
        return moving_bodies(self.body_motion)


@dataclass(frozen=True)
class Truth:
    """True motion of each pixel of a frame under a future."""

    flow: NDArray[np.float32]  # [H, W, 2] fractions of width and height
    scene_flow: NDArray[np.float32]  # [H, W, 3] metres in the optical frame
    moving: NDArray[np.bool_]  # [H, W] on a moving body
    occluded: NDArray[np.bool_]  # [H, W] hidden by something, or out of the picture afterwards
    next: Frame


def _rigid(rotation: NDArray, translation: NDArray) -> NDArray[np.float64]:
    result = np.eye(4)
    result[:3, :3] = rotation
    result[:3, 3] = translation
    return result


def _rotation(vector: NDArray) -> NDArray[np.float64]:
    """Rotation matrix of a rotation vector (axis times radians)."""
    angle = float(np.linalg.norm(vector))
    quat, matrix = np.empty(4), np.empty(9)
    axis = vector / angle if angle > 0 else np.array([1.0, 0, 0])
    mujoco.mju_axisAngle2Quat(quat, axis, angle)
    mujoco.mju_quat2Mat(matrix, quat)
    return matrix.reshape(3, 3)


class Simulator:
    """A random world with a main asset of `kind`; the same for the same (kind, seed, size).

    Args:
        kind: one of `TRAIN_KINDS` or `HELD_OUT_KINDS`.
        seed: of all random choices, non-negative.
        size: (height, width) of the pictures in pixels.

    Raises:
        ValueError: unknown kind, negative seed or empty size.
        RuntimeError: no OpenGL library for off-screen rendering; the message names the packages.
        UnstableError: no state was found in which free bodies come to rest.
    """

    def __init__(self, kind: str, seed: int, size: tuple[int, int] = (128, 128)) -> None:
        height, width = size
        if height < 1 or width < 1:
            raise ValueError(f"size must be (height, width) of at least 1, got {size}")
        if seed < 0:
            raise ValueError(f"seed must be non-negative, got {seed}")
        self.kind = kind
        self.size = (int(height), int(width))
        rng = np.random.default_rng([seed, *kind.encode()])
        self._world = self._build(rng)
        self.model = self._world.model
        self.data = mujoco.MjData(self.model)
        self._scratch = mujoco.MjData(self.model)
        # What no joint moves against its parent is one body with it; 0: what is static.
        self._body_of_geom = self.model.body_weldid[self.model.geom_bodyid].astype(np.uint8)
        self._body_of_part = np.array([p.body.id for p in self._world.parts])
        self._subject = np.zeros(256, bool)  # [body] moves with a joint of the main asset
        self._shadows = False
        self._camera_distance = 1.0
        self._frame: Frame | None = None
        self._visible: tuple[Frame, NDArray[np.intp]] | None = None  # parts of that frame
        self._drift: tuple[Frame, NDArray[np.float64]] | None = None  # state after that frame
        self._index_parts()
        self.rerandomize(rng)

    # What sim.foreign does otherwise --------------------------------------------------------

    def _build(self, rng: np.random.Generator) -> World:
        return build_world(self.kind, rng)

    def _dress(self, rng: np.random.Generator) -> bool:
        """Draws materials and lights; returns whether shadows are cast."""
        randomize_materials(self._world, rng)
        return randomize_lights(self._world, self.data, rng)

    def _studio(self) -> rendering.Studio:
        return rendering.studio(self.size)

    # State ----------------------------------------------------------------------------------

    @property
    def has_free_bodies(self) -> bool:
        """Whether any body can be pushed or carried off; foreign worlds have none."""
        return bool(self._world.free_bodies)

    def _index_parts(self) -> None:
        """Caches what futures ask for each part: addresses, limits, the bodies it carries."""
        model = self.model
        joints = [part.joint.id for part in self._world.parts]
        self._qpos_of_part = model.jnt_qposadr[joints]
        self._range_of_part = model.jnt_range[joints]
        carried = np.zeros((len(joints), model.nbody), bool)
        for row, body in enumerate(self._body_of_part):
            carried[row, body] = True
            for child in range(body + 1, model.nbody):
                carried[row, child] = carried[row, model.body_parentid[child]]
        self._carried_by_part = carried
        own = [part.asset == 0 for part in self._world.parts]
        self._subject[: model.nbody] = carried[own].any(0)

    def rerandomize(self, rng: np.random.Generator) -> None:
        """Draws joint state, layout of free bodies, materials, lights and camera anew."""
        self._frame = None
        self._randomize_state(rng)
        mujoco.mj_forward(self.model, self.data)
        self._shadows = self._dress(rng)
        self._randomize_camera(rng)

    def _randomize_state(self, rng: np.random.Generator) -> None:
        for _ in range(_DRAWS - 1):
            try:
                return self._draw_state(rng)
            except UnstableError:
                pass  # where bodies were laid they burst apart
        return self._draw_state(rng)

    def _draw_state(self, rng: np.random.Generator) -> None:
        mujoco.mj_resetData(self.model, self.data)
        closed = rng.random() < 0.4  # everything at rest at once, as one finds furniture
        for i, part in enumerate(self._world.parts):
            if part.free:
                continue
            low, high = self._range_of_part[i]
            if (closed and part.rest > 0.25) or rng.random() < part.rest:
                value = part.home
            else:
                value = rng.uniform(low, high)
            self.data.qpos[self._qpos_of_part[i]] = np.clip(value, low, high)
        if self._world.free_bodies:
            if self.kind == "body":
                self._lay_out(rng, self._world.free_bodies)
            else:
                self._strew(rng, self._world.free_bodies)
            self.data.qpos[:] = self._step(SETTLING_S)
            for body in self._world.free_bodies:
                if body.part.held:
                    self._lift(rng, body)

    def _step(
        self,
        duration: float,
        velocity: NDArray[np.float64] | None = None,
        driven: dict[int, float] | None = None,
    ) -> NDArray[np.float64]:
        """[nq] state after the physics has run from the present state.

        Of what is not free only the joints of the parts `driven` move, in that time to the values
        given, whatever is in the way: what lies on them rides, what stands before them is pushed.
        Raises UnstableError.
        """
        model, data = self.model, self._scratch
        mujoco.mj_resetData(model, data)
        data.qpos[:] = self.data.qpos
        if velocity is not None:
            data.qvel[:] = velocity
        steps = round(duration / model.opt.timestep)
        driven = driven or {}
        dofs = model.jnt_dofadr[[self._world.parts[i].joint.id for i in driven]]
        at = self._qpos_of_part[list(driven)]
        start, goal = self.data.qpos[at], np.array(list(driven.values()))
        way = goal - start
        resting_damping = model.dof_damping.copy()
        # Contacts are solved with the speed that damping leaves, which must be the joint's.
        model.dof_damping[dofs] = 0
        try:
            for step in range(steps):
                s = step / steps
                data.qpos[at] = start + way * s**3 * (10 - 15 * s + 6 * s**2)
                data.qvel[dofs] = way * 30 * (s * (1 - s)) ** 2 / duration
                self._hold(data)
                mujoco.mj_step(model, data)
        finally:
            model.dof_damping[:] = resting_damping
        _check_stable(data)
        qpos = data.qpos.copy()
        for i, part in enumerate(self._world.parts):
            if not part.free or part.held:
                here = slice(self._qpos_of_part[i], self._qpos_of_part[i] + (7 if part.free else 1))
                qpos[here] = self.data.qpos[here]
        qpos[at] = goal
        return qpos

    def _hold(self, data: mujoco.MjData) -> None:
        """Puts back, in a state that is stepped, what hands hold."""
        for body in self._world.free_bodies:
            if body.part.held:
                joint = body.part.joint.id
                at, dof = self.model.jnt_qposadr[joint], self.model.jnt_dofadr[joint]
                data.qpos[at : at + 7] = self.data.qpos[at : at + 7]
                data.qvel[dof : dof + 6] = 0

    def _lift(self, rng: np.random.Generator, body: FreeBody) -> None:
        """Takes a held body up from its support, a little tilted."""
        address = self.model.jnt_qposadr[body.part.joint.id]
        self.data.qpos[address + 2] += rng.uniform(0, 1) * body.radius
        tilt = rng.normal(0, 0.25, 3) * np.array([1, 1, 0])
        self._turn(self.data.qpos[address + 3 : address + 7], tilt)

    @staticmethod
    def _turn(quat: NDArray[np.float64], vector: NDArray[np.float64]) -> None:
        """Turns the orientation `quat` in place by a rotation vector of the world."""
        change, result = np.empty(4), np.empty(4)
        mujoco.mju_mat2Quat(change, _rotation(vector).ravel())
        mujoco.mju_mulQuat(result, change, quat)
        quat[:] = result

    def _lay_out(self, rng: np.random.Generator, bodies: list[FreeBody]) -> None:
        """Stands free bodies on the support, now and then one on another, without overlap."""
        origin = self._world.main_centre[:2]
        reach = self._world.support_radius
        taken: list[tuple[NDArray, float, float]] = []  # centre, radius, height of the top or 0
        for i in rng.permutation(len(bodies)):
            body = bodies[i]
            choice = int(rng.integers(len(body.poses))) if rng.random() < 0.5 else 0
            pose = body.poses[choice]
            bases = [t for t in taken if t[2] > 0 and t[1] > body.radius * 0.8]
            if bases and choice == 0 and rng.random() < 0.35:  # on top of another
                k = int(rng.integers(len(bases)))
                xy, level = bases[k][0] + rng.normal(0, 0.1, 2) * bases[k][1] * 0.5, bases[k][2]
                taken = [t for t in taken if t is not bases[k]]
                taken.append((bases[k][0], bases[k][1], 0.0))
            else:
                level = 0.0
                for _ in range(100):
                    heading = rng.uniform(-np.pi, np.pi)
                    far = max(reach - body.radius, 0) * np.sqrt(rng.random())
                    xy = origin + far * np.array([np.cos(heading), np.sin(heading)])
                    if all(np.linalg.norm(xy - t[0]) > t[1] + body.radius for t in taken):
                        break
                else:  # in front, where nothing else stands
                    row = reach + sum(2 * t[1] for t in taken) + body.radius
                    xy = origin - np.array([0.0, row])
            top = level + body.height if body.flat_top and choice == 0 else 0.0
            taken.append((xy, body.radius, top))
            address = self.model.jnt_qposadr[body.part.joint.id]
            self.data.qpos[address : address + 3] = (*xy, level + pose.height)
            self.data.qpos[address + 3 : address + 7] = pose.quat
            yaw = np.array([0, 0, rng.uniform(-np.pi, np.pi)])
            self._turn(self.data.qpos[address + 3 : address + 7], yaw)

    def _strew(self, rng: np.random.Generator, bodies: list[FreeBody]) -> None:
        """Stands free bodies on the main asset's parts or, where there is no room, before it."""
        model, data, world = self.model, self.data, self._world
        mujoco.mj_kinematics(model, data)
        on_part = self._subject[model.geom_bodyid]  # [geom]
        geoms = np.flatnonzero(on_part)
        turned = _rotation(np.array([0, 0, world.front]))[:2, :2]
        # The floor: walls are at z = 0, which it is not above.
        floor = data.geom_xpos[model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE, 2].min()
        places = []  # [7] of each body in qpos
        for number, body in enumerate(bodies):
            start = model.jnt_qposadr[body.part.joint.id]
            places.append(slice(start, start + 7))
            pose = body.poses[0]
            data.qpos[places[-1]] = (0, -_AWAY - number, floor + pose.height, *pose.quat)
        mujoco.mj_kinematics(model, data)
        extent = world.main_extent
        ceiling = world.main_centre[2] + 2 * extent.z + 1
        around = np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
        for body, here in zip(bodies, places, strict=True):
            pose = body.poses[int(rng.integers(len(body.poses)))]
            away = data.qpos[here].copy()
            above = rng.random() < 0.7
            for attempt in range(0 if above else _PLACES, 2 * _PLACES):
                above = attempt < _PLACES
                if above:
                    geom = rng.choice(geoms)
                    reach = model.geom_rbound[geom]
                    xy = data.geom_xpos[geom, :2] + rng.uniform(-0.7, 0.7, 2) * reach
                else:  # within reach of what opens to the front
                    x = rng.uniform(-1, 1) * extent.x
                    y = -extent.y - body.radius - rng.uniform(0, 0.6) * extent.x
                    xy = world.main_centre[:2] + turned @ np.array([x, y])
                seen = [self._surface(xy + 0.6 * body.radius * i, ceiling) for i in around]
                levels, surfaces = zip(*seen, strict=True)
                if above and not on_part[list(surfaces)].all():
                    continue
                # NaN where there is nothing below at all
                if not max(levels) - min(levels) < _EVEN * body.radius:
                    continue
                data.qpos[here] = (*xy, max(levels) + pose.height, *pose.quat)
                yaw = np.array([0, 0, rng.uniform(-np.pi, np.pi)])
                self._turn(data.qpos[here][3:], yaw)
                if self._overlap(body) < _EVEN * body.radius:
                    mujoco.mj_kinematics(model, data)  # others may come to lie on it
                    break
                data.qpos[here] = away

    def _touching(self, qpos: NDArray[np.float64] | None) -> mujoco.MjData:
        """The contacts in the present state, or in `qpos`."""
        data = self._scratch
        data.qpos[:] = self.data.qpos if qpos is None else qpos
        mujoco.mj_kinematics(self.model, data)
        mujoco.mj_collision(self.model, data)
        return data

    def _overlap(self, body: FreeBody, qpos: NDArray[np.float64] | None = None) -> float:
        """How deep a free body is in others or in what is fixed (m); in `qpos`, or now."""
        contact = self._touching(qpos).contact
        own = (self.model.geom_bodyid[contact.geom] == body.part.body.id).any(1)
        return -float(contact.dist[own].min(initial=0.0))

    def _bears(self, i: int) -> bool:
        """Whether another free body lies on the free body that is part `i`."""
        data = self._touching(None)
        below = self._body_of_part[i]
        free = {body.part.body.id for body in self._world.free_bodies} - {below}
        for pair in self.model.geom_bodyid[data.contact.geom]:
            others = free & set(pair)
            if below in pair and any(data.xpos[other, 2] > data.xpos[below, 2] for other in others):
                return True
        return False

    def _surface(self, xy: NDArray[np.float64], ceiling: float) -> tuple[float, int]:
        """Height (m) and geom of the first surface below (x, y, ceiling); -inf, -1: none."""
        geom = np.zeros(1, np.int32)
        down = np.array([0.0, 0, -1])
        start = np.array([*xy, ceiling])
        far = mujoco.mj_ray(self.model, self.data, start, down, None, 1, -1, geom)
        return (ceiling - far, int(geom[0])) if geom[0] >= 0 else (-np.inf, -1)

    # Camera ---------------------------------------------------------------------------------

    def _randomize_camera(self, rng: np.random.Generator) -> None:
        """Looks for a view in which the movable parts are neither tiny nor all there is."""
        best, best_error = None, np.inf
        for attempt in range(12):
            pose, fovy, distance = self._draw_camera(rng, careful=attempt >= 4)
            self._set_camera(pose, fovy)
            share = float(self._subject[self._layers()[1]].mean())
            low, high = _SUBJECT_SHARE
            error = max(low - share, share - high, 0.0)
            if error < best_error:
                best, best_error = (pose, fovy, distance), error
            if error == 0:
                break
        assert best is not None
        self._set_camera(best[0], best[1])
        self._camera_distance = best[2]

    def _draw_camera(
        self, rng: np.random.Generator, careful: bool
    ) -> tuple[NDArray[np.float64], float, float]:
        """Returns pose [4, 4] of the optical frame, vertical field of view (rad), distance (m).

        A careful view is from about the front and slightly above, and frames the movable parts.
        """
        model, data, world = self.model, self.data, self._world
        own = [i for i, part in enumerate(world.parts) if part.asset == 0]
        if rng.random() < 0.25 and not careful:  # one part, close
            bodies = self._carried_by_part[own[int(rng.integers(len(own)))]]
        elif careful or self.kind in ("body", "arm") or rng.random() < 0.3:  # all movable parts
            bodies = self._carried_by_part[own].any(0)
        else:
            bodies = np.zeros(model.nbody, bool)
        geoms = np.flatnonzero(bodies[model.geom_bodyid])
        if len(geoms):
            low = (data.geom_xpos[geoms] - model.geom_rbound[geoms, None] * 0.7).min(0)
            high = (data.geom_xpos[geoms] + model.geom_rbound[geoms, None] * 0.7).max(0)
            centre, radius = (low + high) / 2, float(np.linalg.norm(high - low)) / 2
        else:
            extent = world.main_extent
            centre = world.main_centre
            radius = float(np.linalg.norm([extent.x, extent.y, extent.z / 2]))
        fovy = np.deg2rad(np.exp(rng.uniform(np.log(18), np.log(75))))
        aspect = self.size[1] / self.size[0]
        narrow = fovy if aspect >= 1 else 2 * np.arctan(np.tan(fovy / 2) * aspect)
        distance = radius / np.sin(narrow / 2) * np.exp(rng.uniform(np.log(0.65), np.log(1.6)))
        around = world.walled or self.kind not in ("body", "arm", "turntable")
        azimuth = rng.normal(0, 0.5) if around else rng.uniform(-np.pi, np.pi)
        azimuth = world.front + np.clip(azimuth, -1.2, 1.2) if around else azimuth
        level = (0.1, 1.35) if self.kind == "body" else (-0.05, 1.1)
        elevation = rng.uniform(*level)
        if careful:
            azimuth, elevation = 0.4 * azimuth, rng.uniform(0.2, 0.8)
        elif rng.random() < 0.04:
            elevation = rng.uniform(1.3, 1.55)  # from above
        away = np.array(
            [
                np.cos(elevation) * np.sin(azimuth),
                -np.cos(elevation) * np.cos(azimuth),
                np.sin(elevation),
            ]
        )
        position = centre + distance * away
        position[2] = max(position[2], 0.05 * distance)
        target = centre + rng.normal(0, 0.12, 3) * distance * np.tan(narrow / 2)
        forward = target - position
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0, 0, 1])
        right /= max(float(np.linalg.norm(right)), 1e-6)
        down = np.cross(forward, right)
        roll = rng.normal(0, 0.05) if rng.random() < 0.9 else rng.normal(0, 0.5)
        axes = np.stack([right, down, forward], -1) @ _rotation(np.array([0, 0, roll]))
        return _rigid(axes, position), float(fovy), float(distance)

    def _set_camera(self, pose: NDArray[np.float64], fovy: float | None = None) -> None:
        self.data.cam_xpos[0] = pose[:3, 3]
        self.data.cam_xmat[0] = (pose[:3, :3] @ _OPTICAL).ravel()
        if fovy is not None:
            self._fovy = float(np.rad2deg(fovy))

    @property
    def camera_pose(self) -> NDArray[np.float64]:
        """[4, 4] pose of the optical frame in the world."""
        rotation = self.data.cam_xmat[0].reshape(3, 3) @ _OPTICAL
        return _rigid(rotation, self.data.cam_xpos[0])

    @property
    def intrinsics(self) -> NDArray[np.float64]:
        """K [3, 3] in pixels."""
        height, width = self.size
        focal = height / 2 / np.tan(np.deg2rad(self._fovy) / 2)
        return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])

    # Pictures -------------------------------------------------------------------------------

    def _layers(self) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        studio = self._studio()
        self.model.cam_fovy[0] = self._fovy  # several simulators may share a model
        studio.update(self.model, self.data, self._shadows)
        depth, geoms = studio.layers(self.size)
        return depth, np.where(geoms >= 0, self._body_of_geom[geoms], 0).astype(np.uint8)

    def render(self) -> Frame:
        """The picture of the present state."""
        if self._frame is None:
            depth, bodies = self._layers()
            rgb = self._studio().rgb(self.size)
            self._frame = Frame(rgb, depth, bodies, self.intrinsics, self.camera_pose)
        return self._frame

    # Futures --------------------------------------------------------------------------------

    def sample_future(
        self,
        rng: np.random.Generator,
        camera_motion_probability: float = 0.0,
        wide_probability: float = 0.0,
    ) -> Future:
        """Draws one of the possible continuations of the present state, which stays as it is.

        Mostly one visible part moves, at times two or three, in 1 of 20 nothing; free bodies are
        pushed and stepped by MuJoCo, or carried as by a hand. Camera motion comes on top. A joint
        goes any share of its way, small ones more often; with `wide_probability` most of it. Free
        bodies on it ride along, those in its way are pushed. Where no draw is acceptable nothing
        moves, nor does the camera.
        """
        camera_motion = np.eye(4)
        camera_moves = rng.random() < camera_motion_probability
        # Nothing is drawn for 0, so that the evaluated splits do not depend on it.
        wide = wide_probability > 0 and rng.random() < wide_probability
        for _ in range(_DRAWS):
            if camera_moves:
                camera_motion = self._draw_camera_motion(rng)
            try:
                future = self._draw_future(rng, camera_motion, wide)
            except UnstableError:
                continue
            if self._acceptable(future):
                return future
        return self._still(np.eye(4))

    def _still(self, camera_motion: NDArray) -> Future:
        motion = np.broadcast_to(np.eye(4, dtype=np.float32), (self.model.nbody, 4, 4)).copy()
        return Future(motion, camera_motion.astype(np.float32), STILL, self.data.qpos.copy(), 0)

    def _draw_camera_motion(self, rng: np.random.Generator) -> NDArray[np.float64]:
        size = np.exp(rng.uniform(np.log(0.1), np.log(1.0)))
        translation = rng.normal(0, 0.06 * size, 3) * self._camera_distance
        return _rigid(_rotation(rng.normal(0, 0.04 * size, 3)), translation)

    def _draw_future(self, rng: np.random.Generator, camera_motion: NDArray, wide: bool) -> Future:
        visible = self._visible_parts()
        if rng.random() < 0.05 or not len(visible):
            return self._still(camera_motion)
        count = 1 if rng.random() < 0.85 else int(rng.integers(2, 4))
        chosen = rng.permutation(visible)[:count]
        parts = self._world.parts
        names = []
        qpos = self.data.qpos.copy()
        by_hand = rng.random() < 0.3
        pushed = [
            i
            for i in chosen
            if parts[i].free and not parts[i].held and (not by_hand or self._bears(i))
        ]
        driven = {}
        for i in chosen:
            if not parts[i].free:
                value = self.data.qpos[self._qpos_of_part[i]]
                low, high = self._range_of_part[i]
                driven[i] = self._next_joint_value(rng, value, low, high, wide)
        if self._world.free_bodies and (pushed or driven):
            qpos = self._push(rng, pushed, driven)
        else:  # nothing that could be in the way
            qpos[self._qpos_of_part[list(driven)]] = list(driven.values())
        for i in chosen:
            body = self._body_of_part[i]
            if i in pushed:
                names.append(f"free body {body} is pushed")
            elif i in driven:
                names.append(f"part {body} moves")
            else:
                here = slice(self._qpos_of_part[i], self._qpos_of_part[i] + 7)
                qpos[here] = self.data.qpos[here]  # the hand has it, whatever met it above
                self._carry(rng, i, qpos)
                names.append(f"free body {body} is carried")
        motion = self._motion_to(qpos)
        description = ", ".join(names)
        return Future(motion, camera_motion.astype(np.float32), description, qpos, len(chosen))

    def _visible_parts(self) -> NDArray[np.intp]:
        frame = self.render()
        if self._visible is None or self._visible[0] is not frame:
            counts = np.bincount(frame.bodies.ravel(), minlength=self.model.nbody)
            shares = self._carried_by_part @ counts / frame.bodies.size
            self._visible = (frame, np.flatnonzero(shares >= _VISIBLE_SHARE))
        return self._visible[1]

    @staticmethod
    def _next_joint_value(
        rng: np.random.Generator, value: float, low: float, high: float, wide: bool
    ) -> float:
        """Another value in the limits: either direction, from tiny to the full way."""
        rooms = np.array([value - low, high - value])
        possible = rooms > 0.03 * (high - low)
        direction = int(rng.choice(np.flatnonzero(possible)))
        share = rng.uniform(0.3, 1.0) if wide else np.exp(rng.uniform(np.log(0.05), 0.0))
        return float(value + (-1, 1)[direction] * share * rooms[direction])

    def _motion_to(self, qpos: NDArray[np.float64]) -> NDArray[np.float32]:
        """[nbody, 4, 4] world-frame motions from the present state to `qpos`."""
        before, after = self.data, self._scratch
        after.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, after)
        rotation_before = before.xmat.reshape(-1, 3, 3)
        rotation = after.xmat.reshape(-1, 3, 3) @ rotation_before.transpose(0, 2, 1)
        motion = np.tile(np.eye(4), (self.model.nbody, 1, 1))
        motion[:, :3, :3] = rotation
        motion[:, :3, 3] = after.xpos - np.einsum("nij,nj->ni", rotation, before.xpos)
        # Bodies that did not move get the identity without rounding.
        motion[~moving_bodies(motion)] = np.eye(4)
        return motion.astype(np.float32)

    def _push(
        self, rng: np.random.Generator, parts: list[int], driven: dict[int, float]
    ) -> NDArray[np.float64]:
        """Steps the physics for the horizon after pushes at visible points of free bodies, while
        the joints of the parts `driven` go to their values.
        """
        model, data = self.model, self._scratch
        mujoco.mj_resetData(model, data)
        data.qpos[:] = self.data.qpos
        mujoco.mj_forward(model, data)  # inertias for the impulses below
        frame = self.render()
        gravity = float(np.linalg.norm(model.opt.gravity))
        impulse = np.zeros(model.nv)
        for i in parts:
            body = self._body_of_part[i]
            pixels = np.argwhere(frame.bodies == body)
            if not len(pixels):
                continue
            v, u = pixels[rng.integers(len(pixels))]
            point = self._unproject(frame, int(u), int(v))
            heading = rng.uniform(-np.pi, np.pi)
            direction = np.array([np.cos(heading), np.sin(heading), rng.normal(0, 0.15)])
            # A sliding body comes to rest after v^2 / (2 mu g): draw that way, not the speed.
            way = np.exp(rng.uniform(np.log(0.05), np.log(1.5))) * self._world.main_extent.x
            friction = float(model.geom_friction[model.body_geomadr[body], 0])
            speed = np.sqrt(2 * friction * gravity * way)
            force = np.zeros(model.nv)
            mass = model.body_mass[body]
            # Pushes through a point between the contact and the centre: few spin on the spot.
            lever = rng.uniform(0, 1)
            point = lever * point + (1 - lever) * data.xipos[body]
            mujoco.mj_applyFT(
                model, data, mass * speed * direction, np.zeros(3), point, body, force
            )
            impulse += force
        change = np.zeros((1, model.nv))
        mujoco.mj_solveM(model, data, change, impulse[None])
        qpos = self._step(HORIZON_S, change[0], driven)
        self._undo_jitter(qpos, {int(self._body_of_part[i]) for i in parts})
        return qpos

    def _undo_jitter(self, qpos: NDArray[np.float64], pushed: set[int]) -> None:
        """Contacts jitter, and round bodies creep: what hardly moves, or moves so without any push
        or joint's motion too, stays where it is. Changes `qpos` in place.
        """
        for free in self._world.free_bodies:
            if free.part.body.id not in pushed:
                start = self.model.jnt_qposadr[free.part.joint.id]
                here = slice(start, start + 7)
                before = self.data.qpos[here]
                alike = (before, self._unpushed()[here])
                if any(self._same_place(free, qpos[here], other) for other in alike):
                    qpos[here] = before

    def _unpushed(self) -> NDArray[np.float64]:
        """[nq] state after the horizon without a push; stepped once a frame."""
        frame = self.render()
        if self._drift is None or self._drift[0] is not frame:
            self._drift = (frame, self._step(HORIZON_S))
        return self._drift[1]

    @staticmethod
    def _same_place(body: FreeBody, a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
        """Whether two poses [7] of a free body differ by jitter at most."""
        rotation = np.empty(3)
        mujoco.mju_subQuat(rotation, a[3:], b[3:])
        shift = float(np.linalg.norm(a[:3] - b[:3]))
        turned = float(np.linalg.norm(rotation)) * body.extent
        return max(shift, turned) < _JITTER * body.extent

    def _carry(self, rng: np.random.Generator, i: int, qpos: NDArray[np.float64]) -> None:
        """Moves a free body as a hand does: along the support, up, turned or tilted.

        Not into others, nor into what is fixed; where no draw is so it stays.
        """
        body = next(body for body in self._world.free_bodies if body.part is self._world.parts[i])
        deepest = max(_EVEN * body.radius, self._overlap(body))
        for _ in range(_DRAWS):
            moved = qpos.copy()
            self._draw_carrying(rng, i, moved)
            if self._overlap(body, moved) <= deepest:
                qpos[:] = moved
                return

    def _draw_carrying(self, rng: np.random.Generator, i: int, qpos: NDArray[np.float64]) -> None:
        address = self._qpos_of_part[i]
        size = np.exp(rng.uniform(np.log(0.05), 0.0))
        reach = self._world.main_extent.x * size
        shift = np.append(rng.normal(0, 0.6, 2), 0.0) * reach * (rng.random() < 0.8)
        if rng.random() < 0.15:
            shift[2] = abs(rng.normal(0, 0.5)) * reach
        turning = np.zeros(3)
        if rng.random() < 0.5:
            turning[2] = rng.normal(0, 1.2) * size
        if rng.random() < 0.35:
            turning[:2] = rng.normal(0, 0.6, 2) * size
            shift[2] += 0.3 * float(np.abs(turning[:2]).max()) * self._world.main_extent.x
        qpos[address : address + 3] += shift
        self._turn(qpos[address + 3 : address + 7], turning)

    # Pokes ----------------------------------------------------------------------------------

    def future_of_poke(self, xy: tuple[float, float], motion: tuple[float, float]) -> Future:
        """What follows when a hand takes a visible point along; the present state is kept.

        The hand holds the surface point seen at a pixel (by the true depth) and leads it, within
        `HORIZON_S`, to where it appears displaced by `motion`. It pulls towards the ray of the
        wanted pixel, not along it: how deep the point then lies is up to the joints. They move as
        far as that takes, to their limits at most, and not in a direction that they forbid. All
        joints that carry the body give way alike; gravity is balanced in them, but acts on bodies
        that lie free, be it on what is led. On the static world, and on what another hand holds,
        this one slips.

        Args:
            xy: pixel coordinates (u, v) of the point, taken as the whole pixel that it is in.
            motion: (du, dv) in pixels.

        Raises:
            ValueError: a value that is not finite, or a point outside the picture.
            UnstableError: see there.
        """
        height, width = self.size
        values = np.array([*xy, *motion], np.float64)
        if values.shape != (4,) or not np.isfinite(values).all():
            raise ValueError(f"expected finite (u, v) and (du, dv), got {xy} and {motion}")
        if not inside_image(values[:2], self.size):
            raise ValueError(f"the point must lie in the {width} x {height} picture, got {xy}")
        u, v = (int(i) for i in np.clip(np.rint(values[:2]), 0, [width - 1, height - 1]))
        frame = self.render()
        body = int(frame.bodies[v, u])
        if body == 0:
            return self._still(np.eye(4))
        led = self._lead(body, self._unproject(frame, u, v), np.array([u, v, 1.0]), values[2:])
        qpos = self.data.qpos.copy()  # of what is no part, such as another's robot, too
        for i, part in enumerate(self._world.parts):
            here = slice(self._qpos_of_part[i], self._qpos_of_part[i] + (7 if part.free else 1))
            if part.free and not part.held:
                qpos[here] = led[here]
            elif not part.held and self._carried_by_part[i, body]:
                # MuJoCo's limits are soft: a hand pulls joints beyond them
                qpos[here] = np.clip(led[here], *self._range_of_part[i])
        self._undo_jitter(qpos, {body})
        motions = self._motion_to(qpos)
        if not moving_bodies(motions).any():
            return self._still(np.eye(4))
        description = f"body {body} is led by the hand"
        return Future(motions, np.eye(4, dtype=np.float32), description, qpos, 1)

    def _lead(self, body: int, point: NDArray, pixel: NDArray, motion: NDArray) -> NDArray:
        """[nq] state after a hand has led `point` [3] of `body` from `pixel` [3] by `motion` [2].

        The point's acceleration across the ray is that of a critically damped spring, for which
        the force is found through the mobility J inv(M) J' of the two directions across it
        (Khatib, "A unified approach for motion and force control of robot manipulators: the
        operational space formulation", 1987).
        """
        model, data, rate = self.model, self._scratch, _HAND_STIFFNESS
        mujoco.mj_resetData(model, data)
        data.qpos[:] = self.data.qpos
        local = self.data.xmat[body].reshape(3, 3).T @ (point - self.data.xpos[body])
        eye, to_world = self.camera_pose[:3, 3], self.camera_pose[:3, :3]
        carriers = set()
        carrier = body
        while carrier:
            carriers.add(carrier)
            carrier = int(model.body_parentid[carrier])
        led = np.isin(model.dof_bodyid, list(carriers))
        jointed = led & (model.jnt_type[model.dof_jntid] != mujoco.mjtJoint.mjJNT_FREE)
        resting_damping = model.dof_damping.copy()
        steps = round(HORIZON_S / model.opt.timestep)
        jacobian = np.zeros((3, model.nv))
        try:
            mujoco.mj_forward(model, data)
            model.dof_damping[jointed] = _LED_DAMPING * self._joint_inertia(data)[jointed]
            for step in range(steps):
                self._hold(data)
                mujoco.mj_step1(model, data)
                done = min(1.0, (step + 1) / (_HAND_RAMP * steps))
                wanted = pixel + done * np.append(motion, 0)
                ray = to_world @ np.linalg.solve(self.intrinsics, wanted)
                across = np.linalg.svd(ray[None])[2][1:]  # [2, 3]
                here = data.xpos[body] + data.xmat[body].reshape(3, 3) @ local
                mujoco.mj_jac(model, data, jacobian, None, here, body)
                reduced = across @ jacobian  # [2, nv]
                reduced[:, ~led] = 0
                unit = np.zeros_like(reduced)
                mujoco.mj_solveM(model, data, unit, reduced)
                mobility = reduced @ unit.T
                pull = -rate * (rate * across @ (here - eye) + 2 * reduced @ data.qvel)
                force = np.linalg.pinv(mobility, rcond=_HAND_RANK, hermitian=True) @ pull
                data.qfrc_applied[:] = force @ reduced
                data.qfrc_applied[jointed] += data.qfrc_bias[jointed]
                mujoco.mj_step2(model, data)
        finally:
            model.dof_damping[:] = resting_damping
        _check_stable(data)
        return data.qpos.copy()

    def _joint_inertia(self, data: mujoco.MjData) -> NDArray[np.float64]:
        """[nv] diagonal of the inertia matrix; `data` after mj_forward."""
        full = np.zeros((self.model.nv, self.model.nv))
        mujoco.mj_fullM(self.model, data, full)
        return full.diagonal().copy()

    @staticmethod
    def _unproject(frame: Frame, u: int, v: int) -> NDArray[np.float64]:
        ray = np.linalg.solve(frame.intrinsics, [u, v, 1.0])
        optical = ray * frame.depth[v, u]
        return frame.camera_pose[:3, :3] @ optical + frame.camera_pose[:3, 3]

    def _acceptable(self, future: Future) -> bool:
        """Whether what moves can be seen to move, be the camera as it may, and all stays in reach.

        Something large enough must move: some pixels are looked at. Nothing may go too far, however
        small: those of bodies that move are all looked at.
        """
        frame = self.render()
        step = max(1, min(self.size) // 20)
        some = np.zeros(self.size, bool)
        some[::step, ::step] = True

        def strongest(pixels: NDArray[np.bool_], camera_motion: NDArray | None) -> float:
            v, u = np.nonzero(pixels)
            moved = point_flow(
                np.stack([u, v], -1),
                frame.depth[v, u],
                frame.bodies[v, u],
                frame.intrinsics,
                self.size,
                frame.camera_pose,
                future.body_motion,
                camera_motion,
            )
            return float(np.abs(moved.flow).max(initial=0))

        low, high = _FLOW_RANGE
        if future.description != STILL and strongest(some, None) < low:
            return False
        return strongest(some | future.moving[frame.bodies], future.camera_motion) <= high

    # Truth ----------------------------------------------------------------------------------

    def truth(self, frame: Frame, future: Future) -> Truth:
        """True motion of each pixel of `frame`, which must be of the present state.

        Renders the state after `future` for `Truth.next` and the occlusion, then comes back.
        """
        moved = dense_flow(
            frame.depth,
            frame.bodies,
            frame.intrinsics,
            frame.camera_pose,
            future.body_motion,
            future.camera_motion,
        )
        following = self.after(future)
        height, width = frame.depth.shape
        v, u = np.mgrid[0:height, 0:width]
        u_after, v_after = u + moved.flow[..., 0] * width, v + moved.flow[..., 1] * height
        inside = (np.rint(u_after) >= 0) & (np.rint(u_after) < width)
        inside &= (np.rint(v_after) >= 0) & (np.rint(v_after) < height)
        # A point lands between the centres of four pixels; at an outline one of them shows it.
        hidden = np.ones_like(inside)
        for nearest_u, nearest_v in product((np.floor, np.ceil), repeat=2):
            at = (
                np.clip(nearest_v(v_after), 0, height - 1).astype(int),
                np.clip(nearest_u(u_after), 0, width - 1).astype(int),
            )
            seen = following.depth[at]
            other = (seen > 0) & (seen < moved.depth * (1 - _OCCLUSION_TOLERANCE))
            other |= (following.bodies[at] != frame.bodies) & (moved.depth > 0)
            other |= (seen > 0) & (moved.depth == 0)
            hidden &= other
        hidden |= turned_away(u_after, v_after, frame.depth, frame.bodies)
        return Truth(
            flow=moved.flow,
            scene_flow=moved.scene_flow,
            moving=future.moving[frame.bodies],
            occluded=hidden | ~inside,
            next=following,
        )

    def after(self, future: Future) -> Frame:
        """The frame after `future`; the present state is kept."""
        keep, frame, pose = self.data.qpos.copy(), self._frame, self.camera_pose
        try:
            self._pose(future.qpos)
            self._set_camera(pose @ future.camera_motion)
            self._frame = None
            return self.render()
        finally:
            self._pose(keep)
            self._set_camera(pose)
            self._frame = frame

    def _pose(self, qpos: NDArray[np.float64]) -> None:
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.data)


def _check_stable(data: mujoco.MjData) -> None:
    """Raises UnstableError after steps in which MuJoCo met values too large, and began anew."""
    kinds = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL)
    for kind in (*kinds, mujoco.mjtWarning.mjWARN_BADQACC):
        if data.warning[kind].number:
            raise UnstableError(f"the simulation of bodies in contact diverged: {kind.name}")
