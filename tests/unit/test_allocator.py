"""The allocator setting, in a process of its own: it cannot be taken back."""

import asyncio
import os
import subprocess
import sys

import pytest

from heatlens_server.allocator import return_memory_when_idle

# Activations of 2 to 13 MB, as in the first layers of a classifier at batch 8, on a thread that is not the main one.
PROBE = """
import resource, sys, threading
from heatlens_server.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

import torch
from torch import nn

net = nn.Sequential(
    nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU6(),
    nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32), nn.ReLU6(),
    nn.Conv2d(32, 16, 1), nn.Conv2d(16, 96, 1, stride=2), nn.BatchNorm2d(96), nn.ReLU6(),
).eval().requires_grad_(False)
images = torch.zeros(8, 3, 224, 224)

def faults_of_four_batches():
    for _ in range(2):
        net(images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        net(images)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=faults_of_four_batches)
thread.start()
thread.join()
"""


def faults(mode: str) -> int:
    # The convolution algorithms, and so the sizes asked for, depend on the number of threads.
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    probe = subprocess.run([sys.executable, "-c", PROBE, mode], env=env, capture_output=True, text=True, check=True)
    return int(probe.stdout)


def test_freed_memory_is_used_again_without_page_faults():
    default = faults("default")
    assert default > 4_000  # the control: without it, every activation is faulted in anew
    # Mostly none at all. Where a freed block does not fit the next layer's alignment, a few new pages are touched.
    assert faults("keep") < default / 5


async def test_freed_memory_is_given_back_once_after_each_burst():
    # Idle, a call in flight, two ended, idle for two looks, another call, idle.
    works = iter([0, 0, None, 2, 2, 2, 3, 3, 3])
    given_back, seen = [], []

    def work() -> int | None:
        seen.append(next(works, "over"))
        if seen[-1] == "over":
            raise asyncio.CancelledError
        return seen[-1]

    with pytest.raises(asyncio.CancelledError):
        await return_memory_when_idle(work, look_s=0, give_back=lambda: given_back.append(seen[-1]))
    assert given_back == [2, 3]
