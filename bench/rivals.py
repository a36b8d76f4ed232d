"""Other schedules for the same trace: what a pass takes with them, by the model of time that litrt plans with.

One link moves one segment at a time. A schedule on demand computes nothing while it moves; one that looks ahead moves
the next block while this one computes. Uses that nest count as if they did not. Every function returns infinity where
the budget cannot hold what a use, or a block, needs at once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from litrt.trace import Trace

_N_PASSES = 12
"""Passes that are played; the second half is averaged."""


@dataclass(frozen=True)
class Block:
    """Uses that follow each other and belong to one block of the model.

    Attributes:
        segments: What they need.
        compute_s: Their seconds.
    """

    segments: tuple[int, ...]
    compute_s: float


def blocks(trace: Trace) -> list[Block]:
    """Returns the blocks of a trace: uses of one numbered module, as `model.layers.3`, are one block."""
    names: list[str] = []
    segments: list[list[int]] = []
    seconds: list[float] = []
    for use in trace.uses:
        name = _block_name(trace.segments[use.segments[0]].name) if use.segments else None
        if names and name in (names[-1], None):
            segments[-1] += use.segments
            seconds[-1] += use.compute_s
        else:
            names.append(name or "")
            segments.append(list(use.segments))
            seconds.append(use.compute_s)
    return [Block(tuple(dict.fromkeys(some)), s) for some, s in zip(segments, seconds, strict=True)]


def _block_name(name: str) -> str:
    parts = name.split(".")
    numbers = [position for position, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1] or parts)


def _transfer_s(trace: Trace, segments: Sequence[int]) -> float:
    moved = [trace.segments[index] for index in segments if not trace.segments[index].is_slot]
    return sum(segment.fetch_bytes / trace.bandwidth_bps + trace.latency_s for segment in moved)


def lru_on_demand(trace: Trace, budget_bytes: int) -> float:
    """Evicts what was used longest ago, when the next use needs the room."""
    by_use: dict[int, None] = {}  # least recently used first

    def touch(indices: Sequence[int]) -> None:
        for index in indices:
            by_use.pop(index, None)
            by_use[index] = None

    return _on_demand(trace, budget_bytes, lambda others, now: next(i for i in by_use if i in others), touch)


def belady_on_demand(trace: Trace, budget_bytes: int) -> float:
    """Evicts what is needed last, when the next use needs the room (MIN)."""
    uses_of: dict[int, list[int]] = defaultdict(list)
    for number, use in enumerate(trace.uses):
        for index in use.segments:
            uses_of[index].append(number)
    n_uses = len(trace.uses)

    def distance(index: int, now: int) -> int:
        numbers = uses_of[index]
        following = bisect_right(numbers, now % n_uses)
        if following < len(numbers):
            return numbers[following] - now % n_uses
        return numbers[0] + n_uses - now % n_uses

    def victim(others: Set[int], now: int) -> int:
        return max(others, key=lambda index: (distance(index, now), index))

    return _on_demand(trace, budget_bytes, victim, lambda indices: None)


def _on_demand(
    trace: Trace,
    budget_bytes: int,
    victim: Callable[[Set[int], int], int],
    touch: Callable[[Sequence[int]], None],
) -> float:
    """Plays uses one after the other.

    Args:
        trace: What a pass uses.
        budget_bytes: What may be held.
        victim: Chooses what to evict, among others than the use of that number needs.
        touch: Is told what is used: first what was there, then what was fetched.
    """
    if budget_bytes < trace.largest_use_bytes:
        return math.inf
    size = [segment.size_bytes for segment in trace.segments]
    held: set[int] = set()
    held_bytes = 0
    waited_s = 0.0
    n_uses = len(trace.uses)
    for now in range(_N_PASSES * n_uses):
        needed = trace.uses[now % n_uses].segments
        missing = [index for index in dict.fromkeys(needed) if index not in held]
        excess = held_bytes + sum(size[index] for index in missing) - budget_bytes
        while excess > 0:
            evicted = victim(held.difference(needed), now)
            held.remove(evicted)
            held_bytes -= size[evicted]
            excess -= size[evicted]
        held.update(missing)
        held_bytes += sum(size[index] for index in missing)
        touch([index for index in needed if index not in missing] + missing)
        if now >= _N_PASSES // 2 * n_uses:
            waited_s += _transfer_s(trace, missing)
    return trace.compute_s + waited_s / (_N_PASSES - _N_PASSES // 2)


def one_ahead(trace: Trace, budget_bytes: int) -> float:
    """Keeps nothing, and fetches the next block while one computes, where there is room for two."""
    return _one_ahead(trace, blocks(trace), budget_bytes, 0)


def fixed_prefix(trace: Trace, budget_bytes: int) -> float:
    """Keeps the first blocks for good, as many as are best, and fetches the others one ahead."""
    found = blocks(trace)
    return min(_one_ahead(trace, found, budget_bytes, n_kept) for n_kept in range(len(found) + 1))


def _one_ahead(trace: Trace, found: list[Block], budget_bytes: int, n_kept: int) -> float:
    size = [segment.size_bytes for segment in trace.segments]
    kept = {index for block in found[:n_kept] for index in block.segments}
    room_bytes = budget_bytes - sum(size[index] for index in kept)
    streamed = [[index for index in block.segments if index not in kept] for block in found]
    sizes = [sum(size[index] for index in some) for some in streamed]
    if room_bytes < max(sizes, default=0):
        return math.inf
    order = [number for number, some in enumerate(streamed) if some]
    if not order:
        return trace.compute_s
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    transfer_s = [_transfer_s(trace, some) for some in streamed]
    link_s = transfer_s[order[0]]
    ready_s = {order[0]: link_s}
    clock_s = 0.0
    marks = []
    for _ in range(_N_PASSES):
        for number, block in enumerate(found):
            clock_s = max(clock_s, ready_s.pop(number, 0.0))
            began_s = clock_s
            clock_s += block.compute_s
            if number in following:
                then = following[number]
                fits = then != number and sizes[number] + sizes[then] <= room_bytes
                link_s = max(link_s, began_s if fits else clock_s) + transfer_s[then]
                ready_s[then] = link_s
        marks.append(clock_s)
    half = _N_PASSES // 2
    return (marks[-1] - marks[half - 1]) / (_N_PASSES - half)


RIVALS: dict[str, Callable[[Trace, int], float]] = {
    "LRU on demand": lru_on_demand,
    "Belady on demand": belady_on_demand,
    "one block ahead, no cache": one_ahead,
    "fixed prefix, one block ahead": fixed_prefix,
}
"""By their names in tables and pictures."""
