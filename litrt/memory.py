"""How much memory of the host there is: the machine's, and that of the control groups that this process is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil


def available_bytes() -> int:
    """Returns the memory that this process may still take: the machine's, or its control group's where that is less."""
    return max(min([int(psutil.virtual_memory().available), *_cgroup_rooms()]), 0)


def _cgroup_rooms(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Yields limit less usage of every memory control group that this process is in."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, names = root, ("memory.max", "memory.current", "memory.stat")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
        else:
            continue
        # In a container the group's own folder may be mounted at the top.
        group = top / path.lstrip("/")
        for folder in [group, *group.parents]:
            room = _room(folder, *names)
            if room is not None:
                yield room
            if folder == top:
                break


def _room(folder: Path, limit_name: str, usage_name: str, stat_name: str) -> int | None:
    try:
        limit = (folder / limit_name).read_text().strip()
        limit_bytes = None if limit == "max" else int(limit)
        usage = int((folder / usage_name).read_text())
        stat = dict(line.split() for line in (folder / stat_name).read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit_bytes is None:
        return None
    # Page cache that can be dropped counts as usage, and gives way.
    cached = int(stat.get("inactive_file", 0))
    return limit_bytes - max(usage - cached, 0)
