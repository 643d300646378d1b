"""Memory that is still to be had, for what is sized by it before it is started.

Out: bytes. A moment's answer: others on the machine take theirs as well, so a caller asks for a part of it.
"""

from __future__ import annotations

from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int:
    """What the machine could give to new processes without swapping, or the container (cgroup v2) where that
    is less: its limit less its working set, which leaves out files that were read a while ago."""
    machine = 1024 * _field(root / "proc/meminfo", "MemAvailable:")
    group = root / "sys/fs/cgroup"
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text()) - _field(group / "memory.stat", "inactive_file")
    except OSError:  # no container, or another kind of one
        return machine
    return machine if limit == "max" else min(machine, max(0, int(limit) - used))


def _field(path: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == name)
