# SPDX-License-Identifier: MIT
"""fpt_model.allocator: freed memory stays with the process, or is returned."""

import subprocess
import sys

import pytest

TAKEN_ANEW = """
import ctypes, resource, sys
import torch
from fpt_model.allocator import keep_freed_memory

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages are counted
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
    assert returning > 1000  # what the setting is for
    assert page_faults("keep") < returning / 100


RETURNED = """
import torch
from fpt_model.allocator import keep_freed_memory, return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

keep_freed_memory()
tensors = [torch.ones(2**18) for _ in range(200)]  # of 1 MiB
del tensors[::2]
before = resident()
return_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_memory_between_tensors_is_returned():
    done = subprocess.run(
        [sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) > 90  # MiB of 100


APART = """
import ctypes, resource, sys
import torch
from fpt_model import allocator

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

torch.set_num_threads(1)
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages are counted
if sys.argv[1] == "keep":
    allocator.keep_freed_memory()
torch.ones(2**23)  # of 32 MiB: glibc adapts, if it may
with allocator.blocks_apart():
    tensors = [torch.ones(2**18) for _ in range(200)]  # of 1 MiB
    before = resident()
    del tensors[::2]
    returned = before - resident()
for _ in range(5):
    torch.ones(2**22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**22)  # 16 MiB
print(returned, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize("setting", ["keep", "return"])
def test_blocks_apart_leave_no_holes(setting):
    """And afterwards tensors get the memory of those before, as they did."""
    done = subprocess.run(
        [sys.executable, "-c", APART, setting], capture_output=True, text=True, check=True
    )
    returned, faults = done.stdout.split()
    assert float(returned) > 70  # MiB of 100; some lie where something was free before
    assert int(faults) < 100  # of 4096 a tensor


NESTED = """
import threading
import torch
from fpt_model import allocator

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

def other():
    with allocator.blocks_apart():
        pass

with allocator.blocks_apart():
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    tensors = [torch.ones(2**18) for _ in range(200)]  # of 1 MiB
    before = resident()
    del tensors[::2]
    print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_another_thread_may_load_meanwhile():
    done = subprocess.run(
        [sys.executable, "-c", NESTED], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) > 70
