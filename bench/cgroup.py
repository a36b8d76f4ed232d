"""A memory control group, version 1 or 2, which counts the page cache. Making one needs root."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Callable[[], None]]:
    """Makes a group; yields what moves the calling process into it.

    Raises:
        OSError: If that is not permitted, or if there is no memory controller.
    """
    is_version_1 = (ROOT / "memory").is_dir()
    group = (ROOT / "memory" if is_version_1 else ROOT) / f"litrt-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if is_version_1 else "memory.max")).write_text(str(limit_bytes))

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        yield enter
    finally:
        group.rmdir()


def peak_bytes() -> int | None:
    """Returns the most that the group of this process has held, its page cache included; None where that is unknown."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            file = ROOT / "memory" / path.lstrip("/") / "memory.max_usage_in_bytes"
        elif not controllers:
            file = ROOT / path.lstrip("/") / "memory.peak"
        else:
            continue
        if file.is_file():
            return int(file.read_text())
    return None


def why_not(limit_bytes: int) -> str | None:
    """Says why no group can be made, or returns None where one can."""
    try:
        with memory_group(limit_bytes):
            return None
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
