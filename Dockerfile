# SPDX-License-Identifier: MIT
# The FPT node on ROS 2 Jazzy, on the CPU. See docs/deployment.md.
#   docker build -t fpt_ros .
#   docker run --rm --net=host --ipc=host fpt_ros ros2 launch fpt_ros fpt.launch.py image:=/camera/image_raw
FROM ros:jazzy
SHELL ["/bin/bash", "-c"]
WORKDIR /ws

# What the packages need comes first, so that a change of the code does not install it again.
COPY package.xml src/fpt_ros/package.xml
COPY fpt_msgs/package.xml src/fpt_ros/fpt_msgs/package.xml
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rosdep update --rosdistro jazzy \
    && rosdep install --from-paths src/fpt_ros src/fpt_ros/fpt_msgs --ignore-src -y \
    && rm -rf /var/lib/apt/lists/*

# apt has no torch, timm or safetensors, and too old a typer; cv_bridge was built against NumPy 1
RUN python3 -m venv --system-site-packages venv \
    && venv/bin/pip install --no-cache-dir "numpy<2" torch==2.13.0 torchvision==0.28.0 \
        --index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple \
    && venv/bin/pip install --no-cache-dir "numpy<2" timm safetensors "typer>=0.21" onnxruntime rosbags

COPY . src/fpt_ros
RUN source /opt/ros/jazzy/setup.bash && source venv/bin/activate \
    && colcon build --base-paths src/fpt_ros src/fpt_ros/fpt_msgs

# what compile:=true builds; a volume there outlives the container
RUN useradd --create-home fpt && mkdir /cache && chown fpt /cache
ENV XDG_CACHE_HOME=/cache TORCHINDUCTOR_CACHE_DIR=/cache/torch
USER fpt
ENTRYPOINT ["/bin/bash", "-c", "source /opt/ros/jazzy/setup.bash && source /ws/venv/bin/activate && source /ws/install/setup.bash && exec \"$@\"", "--"]
CMD ["ros2", "launch", "fpt_ros", "fpt.launch.py"]
