"""From what the user asked for to bytes: how much the arena gets, and how tightly it packs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from litrt.errors import BudgetError
from litrt.layout import align_up
from litrt.store import TensorInfo
from litrt.trace import Segment
from litrt.units import format_bytes, parse_bytes

PAGE_BYTES = 4096
CACHE_LINE_BYTES = 64

_LARGE_BYTES = 256 << 10
"""Tensors from this size on lie on a page, where direct reads can put them; smaller ones on a cache line."""

_AUTO_SHARE = 0.5
"""Share of the available memory that `"auto"` takes; the rest is for activations and everybody else."""


@dataclass(frozen=True)
class Budget:
    """A budget, settled.

    Attributes:
        budget_bytes: What all weight bytes held at any moment may not exceed.
        arena_bytes: What of it is the arena; the rest is scratch.
        scratch_bytes: What reads need beside the arena.
        segments: The weights, as they lie in the arena.
        growable: Start with no arena, and let it grow to what the largest use needs.
    """

    budget_bytes: int
    arena_bytes: int
    scratch_bytes: int
    segments: tuple[Segment, ...]
    growable: bool = False

    @property
    def capacity_bytes(self) -> int:
        """Bytes of an arena that may become as large as it has to: every weight, and its padding."""
        if not self.growable:
            return self.arena_bytes
        return max(self.arena_bytes, sum(segment.size_bytes + PAGE_BYTES for segment in self.segments))


def settle(budget: int | str, infos: Sequence[TensorInfo], scratch_bytes: int, slot_bytes: dict[str, int]) -> Budget:
    """Returns the bytes of `budget` for the weights `infos`.

    Args:
        budget: As in `litrt.Runtime`.
        infos: The distinct weights of the model.
        scratch_bytes: What the reader's threads need beside the arena.
        slot_bytes: Names of tables of which rows may be gathered, to the bytes of their largest piece.

    Raises:
        BudgetError: If `budget` cannot be read, or cannot hold the largest weight.
    """
    total_bytes = sum(info.nbytes for info in infos)
    segments = tuple(_segment(info, PAGE_BYTES) for info in infos)
    slot: tuple[Segment, ...] = ()
    if slot_bytes:
        size_bytes = align_up(max(slot_bytes.values()), PAGE_BYTES)
        slot = (Segment("(rows of tables)", size_bytes, size_bytes, PAGE_BYTES, is_slot=True),)
    footprint_bytes = sum(segment.size_bytes for segment in segments)
    if budget == "min":
        return Budget(scratch_bytes, 0, scratch_bytes, segments + slot, growable=True)
    if budget == "auto":
        budget_bytes = int(available_bytes() * _AUTO_SHARE)
    else:
        budget_bytes = parse_bytes(budget, of_bytes=total_bytes)
    if budget_bytes >= footprint_bytes + scratch_bytes:
        return Budget(footprint_bytes + scratch_bytes, footprint_bytes, scratch_bytes, segments + slot)
    if budget_bytes >= total_bytes and all(info.direct for info in infos):
        # All fits, though not with every large weight on a page. Off a page, reads need no scratch.
        packed = tuple(_segment(info, CACHE_LINE_BYTES) for info in infos)
        return Budget(budget_bytes, sum(segment.size_bytes for segment in packed), 0, packed)
    # Of a table, no more than a piece may ever be needed at once.
    largest = max(
        (segment for segment in segments + slot if segment.name not in slot_bytes),
        key=lambda segment: segment.size_bytes,
        default=None,
    )
    if largest is not None and largest.size_bytes + scratch_bytes > budget_bytes:
        needed_bytes = largest.size_bytes + scratch_bytes
        raise BudgetError(
            f"budget {format_bytes(budget_bytes)} cannot hold {largest.name!r} ({format_bytes(largest.nbytes)}); "
            f"the smallest workable budget is {format_bytes(needed_bytes)} ({needed_bytes} bytes"
            + (f", {scratch_bytes} of them scratch for reads" if scratch_bytes else "")
            + ") or more: budget='min' finds it.",
            budget_bytes=budget_bytes,
            needed_bytes=needed_bytes,
        )
    return Budget(budget_bytes, budget_bytes - scratch_bytes, scratch_bytes, segments + slot)


def _segment(info: TensorInfo, page_bytes: int) -> Segment:
    align_bytes = page_bytes if info.nbytes >= _LARGE_BYTES else CACHE_LINE_BYTES
    return Segment(info.name, info.nbytes, align_up(info.nbytes, align_bytes), align_bytes)


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
