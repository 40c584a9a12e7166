# SPDX-License-Identifier: MIT
"""Starts the FPT node on a camera's image topic.

ros2 launch fpt_ros fpt.launch.py image:=/camera/color/image_raw
"""

from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from fpt_ros import environment

CONFIG = Path(__file__).parents[1] / "config" / "fpt.yaml"

# Launch arguments that become parameters of the node where they are given.
OVERRIDES = {
    "model": ("Name of a shipped model, or path of a checkpoint.", str),
    "device": ("Where the model runs: cpu, cuda, cuda:1.", str),
    "precision": ("Number format of the model: fp32 or bf16.", str),
    "threads": ("CPU threads of the model; 0: the backend's default.", int),
    "max_age_ms": ("Images older than this are not answered, ms; 0: no limit.", float),
    "autostart": ("Configure and activate the node at start-up.", bool),
    "use_sim_time": ("Take the time from /clock.", bool),
}


def fpt_node(context: LaunchContext) -> list[Node]:
    """The node, with the parameters of the file and those given as launch arguments."""
    given = {
        name: ParameterValue(LaunchConfiguration(name), value_type=kind)
        for name, (_, kind) in OVERRIDES.items()
        if LaunchConfiguration(name).perform(context)
    }
    return [
        Node(
            package="fpt_ros",
            executable="fpt_node",
            name="fpt",
            namespace=LaunchConfiguration("namespace"),
            parameters=[LaunchConfiguration("params_file"), given],
            remappings=[("image", LaunchConfiguration("image"))],
            arguments=["--ros-args", "--log-level", ["fpt:=", LaunchConfiguration("log_level")]],
            output="screen",
            emulate_tty=True,
        )
    ]


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "namespace", default_value="", description="Namespace of the node and its topics."
            ),
            DeclareLaunchArgument(
                "image", default_value="image", description="Topic of the camera's colour images."
            ),
            DeclareLaunchArgument(
                "params_file", default_value=str(CONFIG), description="File of node parameters."
            ),
            *(
                DeclareLaunchArgument(
                    name,
                    default_value="",
                    description=f"{description} Empty: as in params_file.",
                )
                for name, (description, _) in OVERRIDES.items()
            ),
            DeclareLaunchArgument(
                "log_level",
                default_value="info",
                choices=["debug", "info", "warn", "error", "fatal"],
                description="Least severity of messages that the node logs.",
            ),
            # camera images fit into shared memory; a profile that is already set stays
            *(
                SetEnvironmentVariable(name, value)
                for name, value in environment.transport_defaults().items()
            ),
            OpaqueFunction(function=fpt_node),
        ]
    )
