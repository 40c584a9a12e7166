# SPDX-License-Identifier: MIT
"""An engine whose layers are run by C++, beside one with PyTorch's."""

import copy
import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from closeness import assert_close

from fpt_model import FlowPokeTransformer
from fpt_model.encoder import preprocess
from fpt_model.engine import PRECISIONS, TorchEngine, prepare
from fpt_model.native_layers import FewTokens, QueryLayers

Counts = tuple[int, int]  # of new pokes and of queries
TOLERANCE = {"fp32": 1e-5, "bf16": 0.03}


def counting(layers: FewTokens | QueryLayers) -> list[list[int]]:
    """The shape of each call into C++ from now on."""
    calls: list[list[int]] = []

    def function(shape: int, *arguments: int, own: Any = layers._function) -> None:
        calls.append(list((ctypes.c_int64 * 10).from_address(shape)))
        own(shape, *arguments)

    layers._function = function
    return calls


def assert_run_alike(
    model: FlowPokeTransformer,
    precision: str,
    kind: type[FewTokens] | type[QueryLayers],
    runs: Iterable[tuple[int, Counts, Counts]],
) -> list[list[int]]:
    """For so many hypotheses a context that grows by both counts, the second one twice and with
    the other flag first; that of one hypothesis with room. Returns the shape of each call."""
    plain = TorchEngine(model, "cpu", precision)
    other = copy.copy(plain)
    other.model = prepare(model, torch.device("cpu"), PRECISIONS[precision])
    layers = other.model.run_layers = kind(other.model)
    calls = counting(layers)
    rng, config = np.random.default_rng(0), model.config
    image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    features = plain.encode(preprocess(image, config).numpy())
    for rows, first, later in runs:
        contexts: list[Any] = [None, None]
        for static, (pokes, queries) in ((True, first), (False, later), (True, later)):
            arguments = (
                rng.random((rows, pokes, 2), np.float32),
                rng.normal(0, 0.1, (rows, pokes, config.flow_dim)).astype(np.float32),
                rng.random((rows, queries, 2), np.float32),
                static,
            )
            (expected, contexts[0]), (found, contexts[1]) = (
                engine.run(features, context, *arguments)
                for engine, context in zip((plain, other), contexts, strict=True)
            )
            scale = max(1.0, np.abs(expected).max(initial=0))
            assert_close(found, expected, TOLERANCE[precision] * scale)
            assert contexts[0].pokes == contexts[1].pokes
            if rows == 1:
                contexts = [c.with_room(1, 7) for c in contexts]
    return calls
