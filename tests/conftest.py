# SPDX-License-Identifier: MIT
"""The ROS environment of all tests: this machine alone, and a domain that no other run uses."""

import os

from fpt_ros import environment

# At import, since Fast DDS and the renderer read these once, when they are first loaded.
os.environ.update(environment.defaults())
_domain, _claim = environment.claim_domain_id()  # held until pytest ends
os.environ["ROS_DOMAIN_ID"] = str(_domain)
os.environ.setdefault("OMP_NUM_THREADS", "1")
