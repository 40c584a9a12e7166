# SPDX-License-Identifier: MIT
"""The ROS environment of all tests: this machine alone, and a domain that no other run uses."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fpt_ros import environment

# At import, since Fast DDS, the renderer and OpenMP read these once, when they are first loaded.
# So nothing above may load torch: it would not see the number of threads that child processes see.
os.environ.update(environment.defaults())
_domain, _claim = environment.claim_domain_id()  # held until pytest ends
os.environ["ROS_DOMAIN_ID"] = str(_domain)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """At our own loggers too: ROS's launch, where it is installed, takes over the root's."""
    loggers = [logging.getLogger(name) for name in ("fpt_model", "training", "evaluation")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def build_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where built C++ is kept: not with the user's, and once for a module's tests, since each build
    takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's, of which there may be more than a small model has heads."""
    import torch  # loaded late: see above

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
