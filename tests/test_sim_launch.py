# SPDX-License-Identifier: MIT
"""The simulation and the node, started and watched by ROS's launch_testing where it is present.

As part of the suite, or alone: ``launch_test tests/test_sim_launch.py``.
"""

from __future__ import annotations

import tempfile
import unittest
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("launch_testing")
pytest.importorskip("launch_ros")

import launch_testing
from launch import LaunchDescription
from launch.actions import IncludeLaunchDescription, SetEnvironmentVariable
from launch_testing.actions import ReadyToTest
from launch_testing.asserts import assertExitCodes
from node_harness import ROOT, Client, save_small_model
from sensor_msgs.msg import Image

from fpt_msgs.msg import FlowDistribution
from fpt_msgs.srv import PredictFlow
from fpt_ros.environment import claim_domain_id
from fpt_ros.images import image_to_array

SIZE = {"width": "160", "height": "120"}  # px


@pytest.mark.launch_test
def generate_test_description() -> tuple[LaunchDescription, dict[str, Any]]:
    """Starts ``sim.launch.py`` with a model that takes little time."""
    folder = tempfile.TemporaryDirectory()
    model = save_small_model(Path(folder.name) / "fpt-test.safetensors")
    domain, claim = claim_domain_id()
    arguments = {"model": str(model), "threads": "1", "rate_hz": "5.0", "max_age_ms": "30000.0"}
    description = LaunchDescription(
        [
            SetEnvironmentVariable("ROS_DOMAIN_ID", str(domain)),
            IncludeLaunchDescription(
                str(ROOT / "launch" / "sim.launch.py"),
                launch_arguments=(arguments | SIZE).items(),
            ),
            ReadyToTest(),
        ]
    )
    return description, {"domain": domain, "kept": (folder, claim)}


class TestAnswers(unittest.TestCase):
    """While the nodes run."""

    def test_distribution_and_flow(self, domain: int) -> None:
        with Client(domain) as client:
            client.subscribe(FlowDistribution, "/fpt/distribution")
            client.subscribe(Image, "/fpt/flow")
            found = client.next("/fpt/distribution", timeout_s=120.0)
            flow = image_to_array(client.next("/fpt/flow", timeout_s=120.0))
        assert (found.image_width, found.image_height, found.dims) == (160, 120, 2)
        weights = np.reshape(found.weights, (found.count, found.components))
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        assert flow.shape == (120, 160, 2)
        assert np.isfinite(flow).all()

    def test_a_service_refuses_what_it_cannot_answer(self, domain: int) -> None:
        with Client(domain) as client:
            request = PredictFlow.Request(queries=[1000.0, 5.0])
            answer = client.call(PredictFlow, "/fpt/predict_flow", request, timeout_s=120.0)
        assert not answer.success
        assert "query 0 of 1 at x=1000, y=5 px lies outside the 160 x 120" in answer.message


@launch_testing.post_shutdown_test()
class TestEnd(unittest.TestCase):
    """After SIGINT to all of them."""

    def test_exit_codes(self, proc_info: Any) -> None:
        assertExitCodes(proc_info)
