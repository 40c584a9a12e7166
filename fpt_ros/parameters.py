# SPDX-License-Identifier: MIT
"""Parameters as tables: each is declared, described and bounded in one place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node

from fpt_model.mixture import Reduce


@dataclass(frozen=True)
class Spec:
    """A parameter. Its type is that of ``default``."""

    name: str
    default: bool | int | float | str
    description: str
    minimum: int | float | None = None
    maximum: int | float | None = None
    choices: tuple[str, ...] = ()  # all that a string may be; empty: anything
    fixed: bool = False  # changes would take effect on configure only, so they are refused after it
    read_only: bool = False  # set at start, never changed


FPT_PARAMETERS: tuple[Spec, ...] = (
    Spec("autostart", True, "Configure and activate at start-up.", read_only=True),
    Spec("model", "fpt-tiny", "Name of a shipped model, or path of a checkpoint.", fixed=True),
    Spec(
        "backend",
        "auto",
        "What runs the model: torch; onnxruntime, which needs graphs; auto: that if given.",
        choices=("auto", "torch", "onnxruntime"),
        fixed=True,
    ),
    Spec("graphs", "", "Folder that fpt export wrote from the model, for onnxruntime.", fixed=True),
    Spec(
        "providers",
        "cpu",
        "What onnxruntime may use of tensorrt, cuda and cpu, the first preferred: "
        "tensorrt,cuda,cpu.",
        fixed=True,
    ),
    Spec(
        "strict_backend",
        False,
        "Fail to configure when something else than asked would run the model, rather than warn.",
        fixed=True,
    ),
    Spec(
        "device",
        "cpu",
        "Where the model runs, as torch names it: cpu, cuda, cuda:1. Of onnxruntime the GPU's "
        "number: providers decides.",
        fixed=True,
    ),
    Spec(
        "precision",
        "fp32",
        "Number format of the model: fp32; bf16 with torch; fp16 or int8 with onnxruntime.",
        choices=("fp32", "bf16", "fp16", "int8"),
        fixed=True,
    ),
    Spec(
        "compile",
        False,
        "Of torch: compile the model, which needs a C++ compiler (CXX in one word, or g++) and "
        "Python's headers; what cannot be compiled runs as it is. One query and up to 8 joint "
        "samples take half of the time or less, dense outputs two thirds. Configuring takes "
        "longer, most of all the first time.",
        fixed=True,
    ),
    Spec("threads", 0, "CPU threads of the model; 0: PyTorch's default.", 0, 256, fixed=True),
    Spec(
        "image_transport",
        "raw",
        "What the camera's images are: raw, on image; or compressed, on image/compressed.",
        choices=("raw", "compressed"),
        fixed=True,
    ),
    Spec(
        "image_history",
        30,
        "Images kept for requests that name one by its stamp.",
        1,
        1000,
        fixed=True,
    ),
    Spec(
        "scene_history",
        8,
        "Encodings kept, of the images last asked about; they need far more memory than images.",
        1,
        1000,
        fixed=True,
    ),
    Spec(
        "use_depth",
        True,
        "With a three-dimensional model, take registered depth images from the topic depth.",
        fixed=True,
    ),
    Spec(
        "depth_slop_ms",
        20.0,
        "Largest difference between the stamps of an image and its depth, ms; 0: they are equal.",
        0.0,
        1e4,
    ),
    Spec(
        "depth_wait_ms",
        100.0,
        "How long an image waits for its depth while depth images keep coming, ms; then it is "
        "answered without.",
        0.0,
        1e3,
    ),
    Spec(
        "target_frame",
        "",
        "Frame of the point cloud, through tf2; empty: the image's optical frame.",
    ),
    Spec(
        "max_age_ms",
        500.0,
        "Images older than this by the node's clock are not answered, ms; 0: no limit.",
        0.0,
        3.6e6,
    ),
    Spec("camera_static", True, "Whether the camera stands still during the predicted motion."),
    Spec(
        "flow_reduce",
        "median",
        "What of its distribution a point's dense flow is: mean; median, the motion with the least "
        "expected error; or mode, that of the most probable component.",
        choices=get_args(Reduce),
    ),
    Spec("dense_height", 64, "Rows of the grid behind the dense outputs, cells.", 1, 1024),
    Spec("dense_width", 64, "Columns of the grid behind the dense outputs, cells.", 1, 1024),
    Spec(
        "full_resolution",
        True,
        "Resize the dense outputs to the image's size; false: publish the grid. "
        "Flow is in px of the image in both cases.",
    ),
    Spec(
        "kl_threshold_nats",
        0.0,
        "Influence above which a point belongs to the moving part, nats; 0: the model's own.",
        0.0,
        1e6,
    ),
    Spec("query_grid_height", 8, "Rows of query points while no queries are sent.", 1, 256),
    Spec("query_grid_width", 8, "Columns of query points while no queries are sent.", 1, 256),
    Spec(
        "max_pokes",
        128,
        "Messages, requests and hypotheses with more pokes than this are refused.",
        1,
        10000,
    ),
    Spec(
        "max_queries",
        16384,
        "Messages and requests with more queries than this are refused; each counts once for every "
        "hypothesis or sample.",
        1,
        1000000,
    ),
    Spec(
        "marker_lifetime_s",
        1.0,
        "Time after which RViz removes markers that were not renewed, s; 0: never.",
        0.0,
        3600.0,
    ),
    Spec(
        "stuck_after_s",
        5.0,
        "A stage at work for longer than this, or only failures for longer, is an ERROR of "
        "/diagnostics, s.",
        0.1,
        3600.0,
    ),
    Spec("diagnostics_period_s", 1.0, "Time between diagnostics, s.", 0.1, 60.0, read_only=True),
)
"""Of the FPT node."""


def parse_value(spec: Spec, text: str) -> bool | int | float | str:
    """The value that a user gives as text.

    Raises:
        ValueError: it is not of the parameter's type, or outside its range or choices.
    """
    kind = type(spec.default)
    expected: object = kind.__name__
    try:
        value = {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"{spec.name} must be of type {expected}, received {text!r}") from None
    if spec.minimum is not None and not spec.minimum <= value <= spec.maximum:  # type: ignore[operator]
        expected = f"from {spec.minimum:g} to {spec.maximum:g}"
    elif spec.choices and value not in spec.choices:
        expected = f"one of {', '.join(spec.choices)}"
    else:
        return value
    raise ValueError(f"{spec.name} must be {expected}, received {text!r}")


def declare_parameters(node: Node, specs: Iterable[Spec]) -> None:
    """Declare parameters with their descriptors on ``node``."""
    node.declare_parameters("", [(spec.name, spec.default, _descriptor(spec)) for spec in specs])


def _descriptor(spec: Spec) -> ParameterDescriptor:
    descriptor = ParameterDescriptor(
        name=spec.name, description=spec.description, read_only=spec.read_only
    )
    constraints = [f"One of {', '.join(spec.choices)}."] if spec.choices else []
    if spec.fixed:
        constraints.append("Can be changed only while the node is unconfigured.")
    descriptor.additional_constraints = " ".join(constraints)
    if isinstance(spec.default, float):
        descriptor.floating_point_range = [
            FloatingPointRange(from_value=spec.minimum, to_value=spec.maximum)
        ]
    elif spec.minimum is not None:
        descriptor.integer_range = [
            IntegerRange(from_value=spec.minimum, to_value=spec.maximum, step=1)
        ]
    return descriptor
