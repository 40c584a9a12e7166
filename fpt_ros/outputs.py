# SPDX-License-Identifier: MIT
"""The node's outputs: which there are, and the message that each makes of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header
from visualization_msgs.msg import MarkerArray

from fpt_model import FPTConfig
from fpt_msgs.msg import FlowDistribution, ModelInfo
from fpt_ros.images import array_to_image
from fpt_ros.markers import Markers, display_camera
from fpt_ros.messages import distribution_to_msg
from fpt_ros.pipeline import Answer, Stage

Build = Callable[[Answer, Header], Any]
"""Makes an output's message of an answer and the header of its image."""


class Outputs:
    """Makes the messages of one answer after the other.

    Args:
        config: of the model that answers.
        marker_lifetime_s: the present value of the parameter of that name.
        stage: context of each stage.
        report: takes what is wrong with ``camera_info``, once.

    Attributes:
        camera_info: the latest, for the markers; None: none was received.
        table: type and builder of each output, by its name below the node's.
    """

    def __init__(
        self,
        config: FPTConfig,
        marker_lifetime_s: Callable[[], float],
        stage: Stage,
        report: Callable[[str], None],
    ) -> None:
        self._report, self._told = report, ""
        self._config, self._marker_lifetime_s, self._stage = config, marker_lifetime_s, stage
        self._markers = Markers()
        self.camera_info: CameraInfo | None = None
        self.table: dict[str, tuple[type, Build]] = {
            "distribution": (FlowDistribution, self._distribution),
            "flow": _image("32FC2", lambda answer: answer.flow),
            "flow_color": _image("rgb8", lambda answer: answer.flow_color),
            "mask": _image("mono8", lambda answer: answer.mask_image),
            "influence": _image("32FC1", lambda answer: answer.influence),
            "overlay": _image("rgb8", lambda answer: answer.overlay),
            "markers": (MarkerArray, self._mark),
        }

    def model_info(self) -> ModelInfo:
        """What is latched on ``~/info``."""
        config = self._config
        return ModelInfo(
            model_name=config.name,
            licence=config.licence,
            dims=config.flow_dim,
            components=config.components,
            horizon_s=config.horizon_s,
            kl_threshold=config.kl_threshold,
            image_size=config.image_size,
        )

    def _distribution(self, answer: Answer, header: Header) -> FlowDistribution:
        return distribution_to_msg(
            answer.distribution,
            answer.queries,
            answer.view.size,
            header,
            self._config.name,
            self._config.horizon_s,
        )

    def _mark(self, answer: Answer, header: Header) -> MarkerArray:
        mixture = answer.distribution.marginal(2)  # a stage of its own
        with self._stage("mark"):
            camera = display_camera(self.camera_info, answer.view.size, self._tell)
            return self._markers.update(
                answer.pokes,
                answer.queries,
                mixture,
                camera,
                header,
                self._marker_lifetime_s(),
            )

    def _tell(self, problem: str) -> None:
        if problem != self._told:
            self._told = problem
            self._report(problem)


def _image(encoding: str, pixels: Callable[[Answer], Any]) -> tuple[type, Build]:
    return Image, lambda answer, header: array_to_image(pixels(answer), encoding, header)
