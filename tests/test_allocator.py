# SPDX-License-Identifier: MIT
"""fpt_model.allocator: freed memory stays with the process."""

import subprocess
import sys

import pytest

TAKEN_ANEW = """
import resource, sys
import torch
from fpt_model.allocator import keep_freed_memory

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults(10)  # until blocks that stay have found their places
print(faults(10))
"""


def page_faults(setting: str) -> int:
    """Pages that ten tensors of 64 MiB, each freed before the next, took from the system."""
    done = subprocess.run(
        [sys.executable, "-c", TAKEN_ANEW, setting], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_tensors_get_the_memory_of_those_before():
    returning = page_faults("return")
    assert returning > 1000  # what the setting is for; huge pages would make it fewer
    assert page_faults("keep") < returning / 100
