"""How many cores this process may use."""

import contextlib
import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def usable_cores(cgroups: Path = _CGROUPS, own: Path = _OWN) -> int:
    """Cores that this process may use: those of its affinity, and no more than its control group has time for.

    Threads beyond a container's CPU limit, which is such a time, would wait for each other.
    OMP_NUM_THREADS lowers it, as it does for PyTorch: Ray sets it to what a replica has asked for.

    Args:
        cgroups: where control groups are mounted, version 2.
        own: tells the process's own: "0::/path".
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min([cores, *_limits(cgroups, own), *([int(wanted)] if wanted.isdecimal() and int(wanted) else [])])


def _limits(cgroups: Path, own: Path) -> list[int]:
    """The limits of the control group and those above it, in cores, at least 1."""
    try:
        line = next(line for line in own.read_text(encoding="utf-8").splitlines() if line.startswith("0::/"))
    except (OSError, StopIteration):
        return []
    group = cgroups / line.removeprefix("0::/")
    limits = []
    for folder in (group, *group.parents):
        # No such file, or "max": this group has no limit of its own.
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
            limits.append(max(1, math.ceil(int(quota) / int(period))))
        if folder == cgroups:
            break
    return limits
