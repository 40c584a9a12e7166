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
from sim import camera_node

SHARE = Path(__file__).parents[1]


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
                description="Show images and outputs in RViz, from the package rviz2.",
            ),
            DeclareLaunchArgument(
                "poke",
                default_value="true",
                choices=["true", "false"],
                description="Keep poking the point that moves farthest in the truth, by its "
                "motion; false: publish your own on pokes.",
            ),
            *(
                DeclareLaunchArgument(
                    spec.name, default_value=str(spec.default), description=spec.description
                )
                for spec in camera_node.PARAMETERS
            ),
            Node(
                package="fpt_ros",
                executable="sim_camera_node",
                name="sim_camera",
                namespace=namespace,
                parameters=[
                    {
                        spec.name: ParameterValue(
                            LaunchConfiguration(spec.name), value_type=type(spec.default)
                        )
                        for spec in camera_node.PARAMETERS
                    }
                ],
                output="screen",
                emulate_tty=True,
            ),
            # takes its own arguments (model, device, ...) from the same command line
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(str(SHARE / "launch" / "fpt.launch.py")),
                # what must be as the camera has it is not for the command line
                launch_arguments={
                    "image": "image",
                    "depth": "depth",
                    "camera_info": "camera_info",
                    "use_sim_time": "false",
                }.items(),
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
