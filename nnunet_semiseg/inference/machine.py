"""What this process may use of the machine: in a container, less than the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def threads(cgroups: Path = _CGROUPS) -> int:
    """As many as processors, by the cgroup's quota and the affinity of the process."""
    try:
        processors = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        processors = os.cpu_count() or 1
    quota = _numbers(cgroups / "cpu.max") or [
        *_numbers(cgroups / "cpu" / "cpu.cfs_quota_us"),
        *_numbers(cgroups / "cpu" / "cpu.cfs_period_us"),
    ]
    if len(quota) == 2 and quota[0] > 0:
        processors = min(processors, math.ceil(quota[0] / quota[1]))
    return max(1, processors)


def free_memory(cgroups: Path = _CGROUPS, meminfo: Path = Path("/proc/meminfo")) -> float:
    """Bytes that can still be taken; infinite where nothing tells."""
    free = math.inf
    try:
        lines = meminfo.read_text().splitlines()
        free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    for limit, used, statistics, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        numbers = [*_numbers(cgroups / limit), *_numbers(cgroups / used)]
        if len(numbers) == 2:
            # Cached files give way.
            free = min(free, numbers[0] - numbers[1] + _statistic(cgroups / statistics, cache))
    return free


def _numbers(file: Path) -> list[float]:
    """In a file of a cgroup; none if it is missing or says that there is no limit."""
    try:
        return [float(word) for word in file.read_text().split()]
    except (OSError, ValueError):
        return []


def _statistic(file: Path, name: str) -> float:
    try:
        return next(float(line.split()[1]) for line in file.read_text().splitlines() if line.split()[0] == name)
    except (OSError, StopIteration, ValueError, IndexError):
        return 0.0
