# SPDX-License-Identifier: MIT
"""Off-screen pictures of worlds: one OpenGL context a thread, shared by all worlds of our own."""

import threading
from typing import NamedTuple

import cv2
import mujoco
import numpy as np
from numpy.typing import NDArray

from sim.builder import COLLISION_ONLY_GROUP, MESH_SLOTS, PANE_GROUP
from sim.opengl import make_contexts
from sim.world import FAR, NEAR, PLANE_SIZE, PLANE_SLOTS, SKY_TEXTURE, add_slots

SUPERSAMPLING = 2
_MAX_GEOMS = 1000
_local = threading.local()


class Layers(NamedTuple):
    """Geometry of a picture."""

    depth: NDArray[np.float32]  # [H, W] metres along the optical axis, 0 for no surface
    geoms: NDArray[np.int32]  # [H, W] geom ids, -1 for none


class Studio:
    """OpenGL and MuJoCo render contexts for pictures up to `size` (height, width).

    For all models with the slots of `sim.world`, or for the given `model` alone.
    """

    def __init__(self, size: tuple[int, int], model: mujoco.MjModel | None = None) -> None:
        height, width = (SUPERSAMPLING * i for i in size)
        self.size = size
        self.model = model
        self._owner = model  # whose meshes and textures are loaded; those of _textures
        self._textures: set[int] = set() if model is None else set(range(model.ntex))
        if model is None:
            model = _slots()
        model.vis.global_.offheight, model.vis.global_.offwidth = height, width
        self._gl, self._context = make_contexts(model, (height, width))
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        self._scene = mujoco.MjvScene(model, maxgeom=_MAX_GEOMS)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._option = mujoco.MjvOption()
        self._option.geomgroup[COLLISION_ONLY_GROUP] = 0
        self._option.sitegroup[:] = 0  # marks, no surfaces
        # A point behind a pane moves as what is there, so surfaces are those of all but the panes.
        self._surfaces = mujoco.MjvScene(model, maxgeom=_MAX_GEOMS)
        self._surfaces.flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = True
        self._surfaces.flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = True
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = 0

    def close(self) -> None:
        """Frees the contexts; OpenGL objects must go while their own context is current."""
        self._gl.make_current()
        self._context.free()
        self._gl.free()

    def update(self, model: mujoco.MjModel, data: mujoco.MjData, shadows: bool) -> None:
        """Loads the state of a world; meshes and textures only when they were not there before."""
        self._gl.make_current()
        if self._owner is not model:
            for i in range(model.nmesh):
                mujoco.mjr_uploadMesh(model, self._context, i)
            self._owner = model
            self._textures = set()
        # Uploading is slow and a picture shows a few of a world's textures only.
        materials = np.unique(model.geom_matid[model.geom_matid >= 0])
        role = mujoco.mjtTextureRole.mjTEXROLE_RGB.value
        needed = {SKY_TEXTURE, *model.mat_texid[materials, role].tolist()} - {-1}
        for i in sorted(needed - self._textures):
            mujoco.mjr_uploadTexture(model, self._context, i)
        self._textures |= needed
        category = mujoco.mjtCatBit.mjCAT_ALL.value
        for scene, panes in ((self._scene, 1), (self._surfaces, 0)):
            self._option.geomgroup[PANE_GROUP] = panes
            mujoco.mjv_updateScene(model, data, self._option, None, self._camera, category, scene)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = shadows

    def rgb(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        """[H, W, 3] picture of the loaded state, averaged from twice the size."""
        height, width = (SUPERSAMPLING * i for i in size)
        picture = np.empty((height, width, 3), np.uint8)
        rect = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(rect, self._scene, self._context)
        mujoco.mjr_readPixels(picture, None, rect, self._context)
        reduced = cv2.resize(picture, (size[1], size[0]), interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(reduced[::-1])

    def layers(self, size: tuple[int, int]) -> Layers:
        """Depth and geom ids of the loaded state, of the surface at each pixel's centre.

        Panes are none: of what is seen through one, what is behind it.
        """
        height, width = size
        colour = np.empty((height, width, 3), np.uint8)
        buffer = np.empty((height, width), np.float32)
        rect = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(rect, self._surfaces, self._context)
        mujoco.mjr_readPixels(colour, buffer, rect, self._context)
        # Colour 0 is no surface; _MAX_GEOMS is below 2^16, so blue is never used.
        segment = colour[::-1, :, 0] + (colour[::-1, :, 1].astype(np.int32) << 8)
        table = np.full(self._surfaces.ngeom + 1, -1, np.int32)
        for i in range(self._surfaces.ngeom):
            geom = self._surfaces.geoms[i]
            if geom.segid >= 0 and geom.objtype == mujoco.mjtObj.mjOBJ_GEOM:
                table[geom.segid + 1] = geom.objid
        geoms = table[segment]
        # Reversed z: the buffer holds near (far - z) / (z (far - near)) in 0 (far) .. 1 (near).
        inverse = buffer[::-1] * np.float32(1 / NEAR - 1 / FAR) + np.float32(1 / FAR)
        depth = np.where(geoms >= 0, 1 / inverse, np.float32(0))
        return Layers(depth, geoms)


def _slots() -> mujoco.MjModel:
    """A model with all that a world of `sim.world` may hold."""
    spec = mujoco.MjSpec()
    add_slots(spec)
    for i in range(MESH_SLOTS):
        spec.add_mesh(name=f"mesh{i}").make_cone(3, 1)
    for _ in range(PLANE_SLOTS):  # the context holds a display list for each plane
        spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_PLANE, size=PLANE_SIZE)
    return spec.compile()


def studio(size: tuple[int, int], model: mujoco.MjModel | None = None) -> Studio:
    """This thread's studio, made anew only when a larger picture than before is wanted.

    A `model` without the slots of `sim.world` gets one of its own, until another one does.
    """
    name = "shared" if model is None else "own"
    current = getattr(_local, name, None)
    fits = current is not None and current.model is model
    if not fits or current.size[0] < size[0] or current.size[1] < size[1]:
        if current is not None:
            size = (max(size[0], current.size[0]), max(size[1], current.size[1]))
            delattr(_local, name)  # should there be none of the new size
            current.close()
        current = Studio(size, model)
        setattr(_local, name, current)
    return current
