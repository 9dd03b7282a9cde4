"""What this process may use of the machine it runs on, as the kernel and the control group allow."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def memory_bytes() -> tuple[int, int]:
    """(available, total) bytes of main memory."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        free = 1024 * int(meminfo.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError):  # not Linux
        free = total
    try:
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((CGROUP / "memory.current").read_text(encoding="ascii")) - _page_cache()
    except (OSError, ValueError):  # no control group, or "max": no limit
        return free, total
    total = min(total, limit)
    return max(0, min(free, total - used)), total


def _page_cache() -> int:
    """Bytes of files that the kernel keeps in memory and charges to the group, but gives back on demand."""
    stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    return int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))


def cpu_quota() -> int | None:
    """How many CPUs the control group allows at once, rounded up; None is no limit."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return None
