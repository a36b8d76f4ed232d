"""Fixed addresses for what streams, and from when on each may be loaded there.

Giving every load an offset in the window such that loads that are alive together never overlap is dynamic storage
allocation on a circle (NP-hard). It is solved in order of time, as skyline packing: for every address the step is kept
after which nothing lies there any more, and a load goes where it can be issued earliest. Where no place is free in time
for all that was scheduled ahead, a load is issued later rather than not at all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum, auto

from litrt.schedule import Load, Schedule, pass_s
from litrt.trace import Segment, Trace

_NEVER = -(1 << 60)
"""Step after which an address is free that was never taken."""

_MAX_BUNDLED = 16
"""Steps whose loads are put side by side, where they do not fit otherwise, before a layout is given up."""


class Where(Enum):
    """Which hole to take, of several."""

    LOWEST = auto()
    TIGHTEST = auto()
    HIGHEST = auto()


RULES = ((Where.LOWEST, Where.LOWEST), (Where.TIGHTEST, Where.TIGHTEST), (Where.LOWEST, Where.HIGHEST))
"""Layouts that are tried: where every other load goes, from the first and from the second on."""


class Skyline:
    """For every address of a window, the step after which nothing lies there any more.

    Args:
        height_bytes: Size of the window.
    """

    def __init__(self, height_bytes: int) -> None:
        self.height_bytes = height_bytes
        self.lows = [0] if height_bytes else []  # where ranges begin, each up to the next
        self.free_after = [_NEVER] if height_bytes else []

    def high(self, number: int) -> int:
        """Returns where range `number` ends."""
        return self.lows[number + 1] if number + 1 < len(self.lows) else self.height_bytes

    def latest(self, low: int, high: int) -> int:
        """Returns the step after which all of [`low`, `high`) is free."""
        found = _NEVER
        number = bisect_right(self.lows, low) - 1
        while low < high and number < len(self.lows) and self.lows[number] < high:
            found = max(found, self.free_after[number])
            number += 1
        return found

    def take(self, low: int, high: int, free_after: int) -> None:
        """Says that something lies in [`low`, `high`) until a step."""
        if low == high:
            return
        first = bisect_right(self.lows, low) - 1
        last = bisect_right(self.lows, high - 1) - 1
        lows, after = [low], [free_after]
        if self.lows[first] < low:
            lows.insert(0, self.lows[first])
            after.insert(0, self.free_after[first])
        if high < self.high(last):
            lows.append(high)
            after.append(self.free_after[last])
        self.lows[first : last + 1] = lows
        self.free_after[first : last + 1] = after

    def best_offset(self, size_bytes: int, align_bytes: int, not_before: int, where: Where) -> int | None:
        """Returns where `size_bytes` can be loaded earliest: in one of the holes that there are then."""
        after = not_before
        while True:
            best = best_bytes = -1
            low = -1  # where the hole begins that is being looked at
            following: int | None = None
            for start, free_after in zip((*self.lows, self.height_bytes), (*self.free_after, None), strict=True):
                if free_after is not None and free_after <= after:
                    if low < 0:
                        low = start
                    continue
                if free_after is not None and (following is None or free_after < following):
                    following = free_after
                if low >= 0:
                    offset = align_up(low, align_bytes)
                    if offset + size_bytes <= start:
                        if where is Where.HIGHEST:
                            best = (start - size_bytes) // align_bytes * align_bytes
                        elif best < 0 or (where is Where.TIGHTEST and start - low < best_bytes):
                            best, best_bytes = offset, start - low
                    low = -1
            if best >= 0:
                return best
            if following is None:
                return None
            after = following


def best_layout(trace: Trace, schedule: Schedule, height_bytes: int) -> Schedule | None:
    """Returns the fastest of a few layouts of `schedule`, or None where none is found."""
    return min(lay_out(schedule, trace.segments, height_bytes), key=lambda placed: pass_s(trace, placed), default=None)


def lay_out(schedule: Schedule, segments: Sequence[Segment], height_bytes: int) -> Iterator[Schedule]:
    """Yields `schedule` with offsets in a window of `height_bytes`, in one or more ways, or not at all.

    A load is issued no earlier than the schedule says, and later where its place is not free before.
    """
    for rule in RULES:
        bundled: set[int] = set()
        while len(bundled) <= _MAX_BUNDLED:
            placed, failed = _placed(schedule, segments, height_bytes, rule, bundled)
            if placed is not None:
                yield placed
            if failed is None or failed in bundled:
                break
            bundled.add(failed)


def _placed(
    schedule: Schedule, segments: Sequence[Segment], height_bytes: int, rule: Sequence[Where], bundled: set[int]
) -> tuple[Schedule | None, int | None]:
    """Returns `schedule` with an offset for each load, or the step for which there was no room.

    Two passes are laid out, and the second one is taken: it began with what the first one had left behind.
    """
    n_steps = len(schedule.steps)
    skyline = Skyline(height_bytes)
    issued_after = _NEVER
    offsets: list[int] = []
    for base in (0, n_steps):
        offsets.clear()
        beside: tuple[int, int] | None = None  # a step whose loads lie side by side, and where they end
        for number, load in enumerate(schedule.loads):
            segment = segments[load.segment]
            size_bytes = segment.size_bytes
            offset: int | None
            if not size_bytes:
                offset = 0
            elif load.first in bundled:
                start = beside[1] if beside is not None and beside[0] == load.first else 0
                offset = align_up(start, segment.align_bytes)
                beside = (load.first, offset + size_bytes)
            else:
                earliest = max(issued_after, base + load.after)
                offset = skyline.best_offset(size_bytes, segment.align_bytes, earliest, rule[number % 2])
            if offset is None or offset + size_bytes > height_bytes:
                return None, load.first
            issued_after = max(issued_after, base + load.after, skyline.latest(offset, offset + size_bytes))
            if issued_after > base + load.first:
                return None, load.first
            skyline.take(offset, offset + size_bytes, base + load.last + 1)
            offsets.append(offset)
    return _issued_when_free(schedule, segments, height_bytes, offsets)


def _issued_when_free(
    schedule: Schedule, segments: Sequence[Segment], height_bytes: int, offsets: Sequence[int]
) -> tuple[Schedule | None, int | None]:
    """Returns `schedule` at `offsets`, each load issued once its place is free, or the step that this is too late for.

    The first pass finds what the one before has left behind, the second says when that is gone.
    """
    n_steps = len(schedule.steps)
    skyline = Skyline(height_bytes)
    issued_after = _NEVER
    loads: list[Load] = []
    for base in (0, n_steps):
        loads.clear()
        for load, offset in zip(schedule.loads, offsets, strict=True):
            high = offset + segments[load.segment].size_bytes
            after = max(load.after, skyline.latest(offset, high) - base)
            issued_after = max(issued_after, base + after)
            if issued_after > base + load.first:
                return None, load.first
            skyline.take(offset, high, base + load.last + 1)
            loads.append(replace(load, offset=offset, after=after))
    return replace(schedule, loads=tuple(loads)), None


def align_up(value: int, align_bytes: int) -> int:
    """Returns the smallest multiple of `align_bytes` that is not below `value`."""
    return -(-value // align_bytes) * align_bytes
