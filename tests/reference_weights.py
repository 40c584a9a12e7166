# SPDX-License-Identifier: MIT
"""Reproducible weights and inputs for parity with the public implementation.

Each value is a function of (seed, key, index) alone, so neither weights nor the public code need to
be stored to compare outputs: SplitMix64 (Steele et al. 2014) started from the key's CRC-32.
"""

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def uniform(seed: int, key: str, shape: Sequence[int]) -> NDArray[np.float64]:
    """Values in [-1, 1) of ``shape``, row by row."""
    start = (seed * 0x100000001B3 + zlib.crc32(key.encode())) % 2**64
    with np.errstate(over="ignore"):
        z = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
        z = z * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (2 * ((z >> np.uint64(11)) * 2.0**-53) - 1).reshape(shape)


def weight(seed: int, key: str, shape: Sequence[int]) -> torch.Tensor:
    """A plausible float32 tensor for the key of a reference state dict."""
    u = uniform(seed, key, shape)
    root3 = math.sqrt(3)
    if key.endswith("_scale"):
        values = 10 * (1 + 0.2 * u)
    elif "cond_emb" in key or "query_token" in key:
        values = root3 * u
    elif key.endswith(("cls_token", "register_tokens", "mask_token", "pos_embed")):
        values = 0.5 * root3 * u
    elif len(shape) >= 2:
        values = root3 * u / math.sqrt(math.prod(shape[1:]))
    elif key.endswith("bias"):
        values = 0.1 * u
    else:
        values = 1 + 0.1 * u
    return torch.from_numpy(values.astype(np.float32))


def state_dict(seed: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """All tensors but the constants, which the model computes by itself."""
    return {
        key: weight(seed, key, shape)
        for key, shape in shapes.items()
        if not key.endswith(("pos_emb.freqs", "coeffs"))
    }


def inputs(seed: int, side: int, batch: int, pokes: int, queries: int) -> dict[str, torch.Tensor]:
    """Image ``[B, 3, S, S]``, ``poke_pos``, ``poke_flow``, ``query_pos``, all float32.

    The first five queries are special places: two corners, outside, on the first poke, the centre.
    """
    points = (uniform(seed, "input.query_pos", (batch, queries, 2)) + 1) / 2
    poke_pos = (uniform(seed, "input.poke_pos", (batch, pokes, 2)) + 1) / 2
    points[:, :3] = [[0, 0], [1, 1], [1.05, -0.02]]
    points[:, 3] = poke_pos[:, 0]
    points[:, 4] = 0.5
    arrays = {
        "image": uniform(seed, "input.image", (batch, 3, side, side)),
        "poke_pos": poke_pos,
        "poke_flow": 0.2 * uniform(seed, "input.poke_flow", (batch, pokes, 2)),
        "query_pos": points,
    }
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in arrays.items()}
