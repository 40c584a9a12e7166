# SPDX-License-Identifier: MIT
"""Contexts for off-screen OpenGL. As a program it makes one, or says what this machine lacks."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from fpt_ros.environment import rendering_backend

if TYPE_CHECKING:
    import mujoco

_INSTALL = (
    "Off-screen rendering needs EGL or OSMesa. On Debian or Ubuntu install them with\n"
    "    sudo apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri\n"
    "or, for software rendering without EGL,\n"
    "    sudo apt-get install libosmesa6"
)


def make_contexts(
    model: mujoco.MjModel | None = None, size: tuple[int, int] = (16, 16)
) -> tuple[Any, mujoco.MjrContext]:
    """OpenGL's context, made current, and MuJoCo's of `model`, for pictures of (height, width).

    Raises:
        RuntimeError: neither EGL nor OSMesa works, where the message names the packages; or
            pictures of this size cannot be had.
    """
    backend = rendering_backend()
    if backend is None:
        raise RuntimeError(f"neither libEGL nor libOSMesa was found. {_INSTALL}")
    height, width = size
    try:
        # mujoco.GLContext depends on what MUJOCO_GL was when MuJoCo was first imported.
        gl = importlib.import_module(f"mujoco.{backend}").GLContext(width, height)
        gl.make_current()
        import mujoco  # here, since importing it can fail for the same reason

        model = mujoco.MjSpec().compile() if model is None else model
        return gl, mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50.value)
    except Exception as error:
        if "framebuffer is not complete" in str(error):
            raise RuntimeError(
                f"OpenGL backend {backend!r} has no buffer of {width} x {height} px: {error}"
            ) from error
        raise RuntimeError(f"OpenGL backend {backend!r} failed: {error}\n{_INSTALL}") from error


if __name__ == "__main__":
    try:
        make_contexts()
    except RuntimeError as error:
        sys.exit(str(error))
