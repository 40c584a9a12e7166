# SPDX-License-Identifier: MIT
"""Starts the FPT node on a camera's image topic, and the poke planner if wanted.

ros2 launch fpt_ros fpt.launch.py image:=/camera/color/image_raw
"""

from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable, Shutdown
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from fpt_ros import environment, poke_planner
from fpt_ros.parameters import FPT_PARAMETERS, Spec

CONFIG = Path(__file__).parents[1] / "config" / "fpt.yaml"

# Each is a launch argument, and a parameter of the nodes where that argument is given.
PARAMETERS = (*FPT_PARAMETERS, Spec("use_sim_time", False, "Take the time from /clock."))
SHARED = {spec.name for spec in poke_planner.PARAMETERS} | {"use_sim_time"}  # with the planner


def nodes(context: LaunchContext) -> list[Node]:
    """The nodes, with the parameters of the file and those given as launch arguments."""
    given = {
        spec.name: ParameterValue(LaunchConfiguration(spec.name), value_type=type(spec.default))
        for spec in PARAMETERS
        if LaunchConfiguration(spec.name).perform(context)
    }
    # the level is that of a logger, which is named as the node, with dots
    namespace = LaunchConfiguration("namespace").perform(context).strip("/").replace("/", ".")
    prefix = f"{namespace}." if namespace else ""
    level = LaunchConfiguration("log_level").perform(context)
    common = {
        "package": "fpt_ros",
        "namespace": LaunchConfiguration("namespace"),
        "output": "screen",
        "emulate_tty": True,
    }
    if LaunchConfiguration("required").perform(context) == "true":
        common["on_exit"] = Shutdown()
    camera = [(name, LaunchConfiguration(name)) for name in ("camera_info", "depth")]
    return [
        Node(
            executable="fpt_node",
            name="fpt",
            parameters=[LaunchConfiguration("params_file"), given],
            remappings=[("image", LaunchConfiguration("image")), *camera],
            arguments=["--ros-args", "--log-level", f"{prefix}fpt:={level}"],
            **common,
        ),
        Node(
            condition=IfCondition(LaunchConfiguration("planner")),
            executable="poke_planner",
            name="poke_planner",
            parameters=[
                LaunchConfiguration("params_file"),
                {name: value for name, value in given.items() if name in SHARED},
            ],
            remappings=camera,
            arguments=["--ros-args", "--log-level", f"{prefix}poke_planner:={level}"],
            **common,
        ),
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
                "camera_info",
                default_value="camera_info",
                description="Topic of that camera's intrinsics, for markers and depth.",
            ),
            DeclareLaunchArgument(
                "depth",
                default_value="depth",
                description="Topic of depth images registered to the camera's, for "
                "three-dimensional models.",
            ),
            DeclareLaunchArgument(
                "params_file", default_value=str(CONFIG), description="File of node parameters."
            ),
            DeclareLaunchArgument(
                "planner",
                default_value="false",
                choices=["true", "false"],
                description="Start the poke planner too, which answers what to poke.",
            ),
            DeclareLaunchArgument(
                "required",
                default_value="false",
                choices=["true", "false"],
                description="End all that was launched, this file and others, when a node ends.",
            ),
            *(
                DeclareLaunchArgument(
                    spec.name,
                    default_value="",
                    description=f"{spec.description} Empty: as in params_file.",
                )
                for spec in PARAMETERS
            ),
            DeclareLaunchArgument(
                "log_level",
                default_value="info",
                choices=["debug", "info", "warn", "error", "fatal"],
                description="Least severity of messages that the nodes log.",
            ),
            # camera images fit into shared memory; a profile that is already set stays
            *(
                SetEnvironmentVariable(name, value)
                for name, value in environment.transport_defaults().items()
            ),
            OpaqueFunction(function=nodes),
        ]
    )
