# SPDX-License-Identifier: MIT
"""Procedural articulated MuJoCo worlds with true flow.

``sim.flow`` and the reading half of ``sim.dataset`` need numpy and OpenCV only; MuJoCo and its
OpenGL libraries are loaded when ``Simulator`` is first asked for.
"""

from typing import TYPE_CHECKING, Any

from sim.kinds import HELD_OUT_KINDS, TRAIN_KINDS

if TYPE_CHECKING:
    from sim.simulator import Frame, Future, Simulator, Truth

__all__ = ["HELD_OUT_KINDS", "TRAIN_KINDS", "Frame", "Future", "Simulator", "Truth"]


def __getattr__(name: str) -> Any:
    if name in ("Frame", "Future", "Simulator", "Truth"):
        from sim import simulator

        return getattr(simulator, name)
    raise AttributeError(f"module 'sim' has no attribute {name!r}")
