"""The allocator setting, in a process of its own: it cannot be taken back."""

import subprocess
import sys

PROBE = """
import resource, sys, threading
import torch
from heatlens_server.engines.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def faults_of_a_batch():
    for _ in range(3):
        torch.ones(8 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(8 << 20)  # 32 MiB: 8192 pages
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=faults_of_a_batch)
thread.start()
thread.join()
"""


def faults(mode: str) -> int:
    return int(subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True).stdout)


def test_freed_memory_is_used_again_without_page_faults():
    assert faults("default") > 10_000  # the control: without it, every tensor is faulted in anew
    assert faults("keep") < 100
