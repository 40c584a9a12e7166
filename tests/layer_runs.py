# SPDX-License-Identifier: MIT
"""An engine whose layers something stands in for, beside one with PyTorch's."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from closeness import assert_close

from fpt_model.encoder import preprocess
from fpt_model.engine import TorchEngine

Counts = tuple[int, int]  # of new pokes and of queries
TOLERANCE = {"fp32": 1e-5, "bf16": 0.03}


def assert_run_alike(
    plain: TorchEngine,
    other: TorchEngine,
    precision: str,
    runs: Iterable[tuple[int, Counts, Counts]],
) -> None:
    """For so many hypotheses a context that grows by both counts, the second one twice and with
    the other flag first; that of one hypothesis with room."""
    rng, config = np.random.default_rng(0), plain.model.config
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
