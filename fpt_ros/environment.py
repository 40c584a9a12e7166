# SPDX-License-Identifier: MIT
"""The process environment of demo, tests and launch files: ROS 2 transport and rendering.

Everything here is a default: a variable the user has set is never replaced. Launch files use
`transport_defaults` alone, since a robot's nodes must stay visible to its other computers.

Run as a program it prints shell assignments::

    eval "$(python -m fpt_ros.environment)"
"""

import os
import shlex
import socket
import sys
from collections.abc import Mapping
from ctypes.util import find_library
from pathlib import Path

# 7400 + 250 * domain is the first UDP port of a domain; above 101 Linux's ephemeral ports begin.
MAX_DOMAIN_ID = 101
FASTDDS_PROFILE_VARIABLES = {"FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"}


def fastdds_profile() -> Path:
    """Path of the Fast DDS profile, in the source tree or below the installation's share/.

    Raises:
        FileNotFoundError: the package is installed without its config folder.
    """
    folders = (Path(__file__).parents[1], Path(sys.prefix, "share", "fpt_ros"), *_ament_shares())
    for folder in folders:
        profile = folder / "config" / "fastdds.xml"
        if profile.is_file():
            return profile
    raise FileNotFoundError(
        f"config/fastdds.xml is in none of {[str(f) for f in folders]}; reinstall fpt_ros"
    )


def rendering_backend(environment: Mapping[str, str] = os.environ) -> str | None:
    """MuJoCo's off-screen OpenGL backend: "egl" or "osmesa"; None where neither is installed.

    The user's MUJOCO_GL where it is one of them, else the first whose library this machine has.
    """
    libraries = {"egl": "EGL", "osmesa": "OSMesa"}
    wanted = environment.get("MUJOCO_GL", "").lower()
    if wanted in libraries:
        return wanted
    return next((name for name, library in libraries.items() if find_library(library)), None)


def transport_defaults(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables to add so that images travel whole between processes; they isolate no machine."""
    fastdds = environment.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp") == "rmw_fastrtps_cpp"
    if not fastdds or FASTDDS_PROFILE_VARIABLES & environment.keys():
        return {}
    return {"FASTRTPS_DEFAULT_PROFILES_FILE": str(fastdds_profile())}


def defaults(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables to add for a demo or a test: transport, discovery on this machine, rendering.

    Args:
        environment: the variables already set, which stay as they are.

    Returns:
        The missing variables alone; and, when ROS is installed into this Python environment,
        AMENT_PREFIX_PATH and PATH with that environment before what is there.
    """
    local = {
        "RMW_IMPLEMENTATION": "rmw_fastrtps_cpp",
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
    }
    backend = rendering_backend(environment)
    if backend:
        local["MUJOCO_GL"] = backend
    added = {name: value for name, value in local.items() if name not in environment}
    added |= transport_defaults(environment)
    if Path(sys.prefix, "share", "ament_index").is_dir():
        # executables below lib/fpt_ros start the first python3 of PATH
        for name, folder in (("AMENT_PREFIX_PATH", sys.prefix), ("PATH", f"{sys.prefix}/bin")):
            others = [
                p for p in environment.get(name, "").split(os.pathsep) if p not in ("", folder)
            ]
            added[name] = os.pathsep.join([folder, *others])
    return added


def claim_domain_id() -> tuple[int, socket.socket]:
    """Find a ROS_DOMAIN_ID that no other caller on this machine holds.

    Returns:
        The id, and the socket that keeps the claim: it ends when the socket is closed.

    Raises:
        RuntimeError: all domains are taken.
    """
    start = os.getpid()
    for offset in range(MAX_DOMAIN_ID):
        domain = 1 + (start + offset) % MAX_DOMAIN_ID  # 0 is everybody's default
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0fpt_ros_domain_{domain}")  # abstract: gone with the process
        except OSError:
            claim.close()
        else:
            return domain, claim
    raise RuntimeError(f"all ROS domains from 1 to {MAX_DOMAIN_ID} are in use on this machine")


def _ament_shares() -> list[Path]:
    prefixes = os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)
    return [Path(prefix, "share", "fpt_ros") for prefix in prefixes if prefix]


if __name__ == "__main__":
    for name, value in defaults().items():
        print(f"export {name}={shlex.quote(value)}")
