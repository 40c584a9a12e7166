# SPDX-License-Identifier: MIT
"""Point clouds as binary PLY files, which Open3D, MeshLab and CloudCompare read.

Written here since it is a header and one array; the library for it, plyfile, is under the GPL.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_TYPES = {"f": "float", "u": "uchar"}


def write_ply(path: str | os.PathLike[str], columns: Mapping[str, NDArray[np.generic]]) -> None:
    """Write vertices with one property a column ``[N]``: uint8 as uchar, all else as float.

    ``x y z`` are the position, ``red green blue`` the colour. ValueError if lengths differ.
    """
    arrays = {
        name: np.asarray(a, np.uint8 if np.asarray(a).dtype == np.uint8 else "<f4")
        for name, a in columns.items()
    }
    if len({a.shape for a in arrays.values()}) != 1 or next(iter(arrays.values())).ndim != 1:
        shapes = {name: list(a.shape) for name, a in arrays.items()}
        raise ValueError(f"expected columns [N] of one length, received shapes {shapes}")
    count = len(next(iter(arrays.values())))
    rows = np.empty(count, [(name, a.dtype) for name, a in arrays.items()])
    for name, array in arrays.items():
        rows[name] = array
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {count}",
        *(f"property {_TYPES[a.dtype.kind]} {name}" for name, a in arrays.items()),
        "end_header\n",
    ]
    Path(path).write_bytes("\n".join(header).encode("ascii") + rows.tobytes())
