"""Fixed addresses for what streams: offline dynamic storage allocation on a circle.

Every load holds its bytes from one step to another, again in every pass. Giving each load an offset such that loads
that are alive together never overlap, within a given height, is dynamic storage allocation (NP-hard); placing
greedily in a few orders comes within a few per cent of the load for the lifetimes of a streamed model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_N_PERTURBED = 20
"""Times that an order is changed and tried again."""

_MAX_ITEMS = 4_000
"""Items up to which a layout is tried: the work is quadratic."""


@dataclass(frozen=True, slots=True)
class Item:
    """Something to place: `size_bytes` at a multiple of `align_bytes`, alive in steps [`start`, `end`)."""

    size_bytes: int
    align_bytes: int
    start: int
    end: int


_ORDERS: tuple[Callable[[Item], tuple[int, ...]], ...] = (
    lambda item: (-item.size_bytes, item.start),
    lambda item: (-item.size_bytes * (item.end - item.start), item.start),
    lambda item: (item.start, -item.size_bytes),
    lambda item: (item.end - item.start, -item.size_bytes),
)


def alive_together(a: Item, b: Item, period: int) -> bool:
    """Says whether two lifetimes meet on a circle of `period` steps; neither is longer than `period`."""
    shift = (b.start - a.start) % period
    return shift < a.end - a.start or (-shift) % period < b.end - b.start


def place(items: Sequence[Item], period: int, height_bytes: int) -> list[int] | None:
    """Returns an offset for every item such that none that are alive together overlap, or None.

    Args:
        items: What to place.
        period: Steps of a pass, after which lifetimes repeat.
        height_bytes: What no item may reach beyond.
    """
    if len(items) > _MAX_ITEMS:
        return None
    if any(item.end - item.start > period or item.size_bytes > height_bytes for item in items):
        return None
    neighbours: list[list[int]] = [[] for _ in items]
    for i, a in enumerate(items):
        for j in range(i):
            if alive_together(a, items[j], period):
                neighbours[i].append(j)
                neighbours[j].append(i)
    rng = random.Random(0)
    for key in _ORDERS:
        order = sorted(range(len(items)), key=lambda i: key(items[i]))
        for _ in range(max(1, min(_N_PERTURBED, _MAX_ITEMS // len(items))) if items else 1):
            offsets, failed = _first_fit(items, neighbours, order, height_bytes)
            if failed is None:
                return offsets
            # What did not fit goes earlier next time: a place is easier to find while there are few.
            order.remove(failed)
            order.insert(rng.randrange(len(order) // 2 + 1), failed)
    return None


def _first_fit(
    items: Sequence[Item], neighbours: list[list[int]], order: list[int], height_bytes: int
) -> tuple[list[int], int | None]:
    """Returns offsets, and the item for which there was no room, if any."""
    offsets = [-1] * len(items)
    for i in order:
        taken = sorted((offsets[j], offsets[j] + items[j].size_bytes) for j in neighbours[i] if offsets[j] >= 0)
        offset = 0
        for low, high in taken:
            if offset + items[i].size_bytes <= low:
                break
            offset = max(offset, align_up(high, items[i].align_bytes))
        if offset + items[i].size_bytes > height_bytes:
            return offsets, i
        offsets[i] = offset
    return offsets, None


def align_up(value: int, align_bytes: int) -> int:
    """Returns the smallest multiple of `align_bytes` that is not below `value`."""
    return -(-value // align_bytes) * align_bytes
