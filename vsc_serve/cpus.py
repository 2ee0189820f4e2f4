"""How many processors this process may use: what the scheduler and the container allow."""

import os
from pathlib import Path
from typing import Final

_CGROUP_2: Final = Path("/sys/fs/cgroup")
_CGROUP_1: Final = Path("/sys/fs/cgroup/cpu")


def usable_cpus() -> int:
    """Return the processors this process may run on, at least 1.

    The scheduler's mask counts, and in a container its quota of processor time, rounded up.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quota = cgroup_quota(_CGROUP_2, _CGROUP_1)
    return max(1, count if quota is None else min(count, -int(-quota // 1)))


def cgroup_quota(unified: Path, legacy: Path) -> float | None:
    """Return the processors' worth of time that a container may use; None without a limit.

    Args:
        unified: Where cgroup version 2 is mounted.
        legacy: Where the cpu controller of version 1 is mounted.
    """
    try:
        words = (unified / "cpu.max").read_text(encoding="ascii").split()
    except OSError:
        words = _legacy_quota(legacy)
    if len(words) != 2 or words[0] in ("max", "-1"):
        return None
    return int(words[0]) / int(words[1])


def _legacy_quota(folder: Path) -> list[str]:
    try:
        return [
            (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
            for name in ("quota", "period")
        ]
    except OSError:
        return []
