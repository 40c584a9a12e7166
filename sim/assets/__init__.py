# SPDX-License-Identifier: MIT
"""Procedural assets, a function a kind: `BUILDERS[kind](builder, root) -> Extent`.

Unit and frame are those of `sim.builder`: about 1 in the largest extent, on z = 0, front to -y.
"""

from collections.abc import Callable

import mujoco

from sim.assets import assembly, bodies, furniture, held_out, mechanisms, sliders
from sim.builder import Builder, Extent

BUILDERS: dict[str, Callable[[Builder, mujoco.MjsBody], Extent]] = {
    "drawer": furniture.drawer,
    "door": furniture.door,
    "slider": sliders.slider,
    "knob": mechanisms.knob,
    "arm": mechanisms.arm,
    "body": bodies.body,
    "assembly": assembly.assembly,
    "lid": held_out.lid,
    "lever": held_out.lever,
    "turntable": held_out.turntable,
}
