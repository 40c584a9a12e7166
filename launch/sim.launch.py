# SPDX-License-Identifier: MIT
"""Starts a simulated camera and the FPT node on it.

ros2 launch fpt_ros sim.launch.py kind:=drawer seed:=3 rviz:=true
"""

from pathlib import Path

from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    IncludeLaunchDescription,
    SetEnvironmentVariable,
)
from launch.conditions import IfCondition
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from fpt_ros import environment

SHARE = Path(__file__).parents[1]

# Parameters of the camera: default, type, description.
CAMERA = {
    "kind": ("drawer", str, "What stands in the scene: drawer, door, slider, knob, arm, body, ..."),
    "seed": ("0", int, "Seed of the scene."),
    "future_seed": ("0", int, "Seed of the future that is published as the truth."),
    "width": ("640", int, "Width of the image, px."),
    "height": ("480", int, "Height of the image, px."),
    "rate_hz": ("10.0", float, "Images a second, 1/s."),
    "animate": ("false", bool, "Show the present and the future in turn."),
}


def generate_launch_description() -> LaunchDescription:
    namespace = LaunchConfiguration("namespace")
    return LaunchDescription(
        [
            *(
                SetEnvironmentVariable(name, value)
                for name, value in environment.transport_defaults().items()
            ),
            DeclareLaunchArgument(
                "namespace", default_value="", description="Namespace of the nodes and topics."
            ),
            DeclareLaunchArgument(
                "rviz",
                default_value="false",
                choices=["true", "false"],
                description="Show images and outputs in RViz.",
            ),
            DeclareLaunchArgument(
                "poke",
                default_value="true",
                choices=["true", "false"],
                description="Keep poking the point that moves farthest in the truth, by its "
                "motion; false: publish your own on pokes.",
            ),
            *(
                DeclareLaunchArgument(name, default_value=default, description=description)
                for name, (default, _, description) in CAMERA.items()
            ),
            Node(
                package="fpt_ros",
                executable="sim_camera_node",
                name="sim_camera",
                namespace=namespace,
                parameters=[
                    {
                        name: ParameterValue(LaunchConfiguration(name), value_type=kind)
                        for name, (_, kind, _) in CAMERA.items()
                    }
                ],
                output="screen",
                emulate_tty=True,
            ),
            # takes its own arguments (model, device, ...) from the same command line
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(str(SHARE / "launch" / "fpt.launch.py"))
            ),
            Node(
                condition=IfCondition(LaunchConfiguration("poke")),
                package="fpt_ros",
                executable="poke_publisher",
                namespace=namespace,
                remappings=[("suggested_poke", "sim_camera/suggested_poke")],
                output="screen",
                emulate_tty=True,
            ),
            Node(
                condition=IfCondition(LaunchConfiguration("rviz")),
                package="rviz2",
                executable="rviz2",
                namespace=namespace,
                arguments=["-d", str(SHARE / "rviz" / "fpt.rviz")],
                output="screen",
            ),
        ]
    )
