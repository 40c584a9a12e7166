# SPDX-License-Identifier: MIT
"""Comparison of arrays and mixtures within an absolute tolerance."""

import numpy as np
from numpy.typing import ArrayLike

from fpt_model import FlowMixture


def assert_close(own: ArrayLike, expected: ArrayLike, tolerance: float) -> None:
    np.testing.assert_allclose(own, expected, rtol=0, atol=tolerance, equal_nan=False)


def assert_mixtures_close(own: FlowMixture, expected: FlowMixture, tolerance: float = 1e-5) -> None:
    for name in ("log_weights", "means", "scale_tril"):
        assert_close(getattr(own, name), getattr(expected, name), tolerance)
