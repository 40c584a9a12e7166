# SPDX-License-Identifier: MIT
"""ROS 2 nodes and command-line tools for Flow Poke Transformers, thin over `fpt_model`."""
