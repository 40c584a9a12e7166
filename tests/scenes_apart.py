# SPDX-License-Identifier: MIT
"""Threads that share a predictor, each with a scene of its own."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from closeness import assert_mixtures_close

from fpt_model import FlowMixture, FlowPredictor


def assert_scenes_apart(
    predictor: FlowPredictor, pictures: Sequence[np.ndarray], queries: Sequence[np.ndarray]
) -> None:
    """Two pictures asked at once, again and again: they disturb neither each other's scenes nor
    answers. Each of ``queries [Q, 2]`` is asked with both flags and a varying number of pokes."""
    pokes = np.random.default_rng(0).random((2, 6, 2))

    def ask(picture: np.ndarray) -> list[FlowMixture]:
        scene = predictor.encode(picture)
        return [
            predictor.predict(scene, pokes[0, :count], pokes[1, :count], points, static)
            for count in (0, 2, 6, 1)
            for points in queries
            for static in (True, False)
        ]

    alone = [ask(picture) for picture in pictures]
    different = np.abs(alone[0][2].means - alone[1][2].means).max()
    assert different > 1e-4, "scenes are different"
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(ask, 10 * list(pictures)))
    for i, answers in enumerate(together):
        for found, expected in zip(answers, alone[i % 2], strict=True):
            assert_mixtures_close(found, expected)
