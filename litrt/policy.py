"""Replacement policies on a cyclic trace, for comparison with the plan."""

from __future__ import annotations

from collections import OrderedDict

from litrt.trace import Trace

_N_PASSES = 3
"""Passes that are simulated; the last one is steady."""


def lru_streamed_bytes(trace: Trace, budget_bytes: int) -> int:
    """Returns the bytes that a steady pass loads when the least recently used segment is evicted on demand."""
    loaded = lru_loads(trace, budget_bytes)
    return sum(trace.segments[index].fetch_bytes for index in loaded) + trace.gathered_bytes


def lru_loads(trace: Trace, budget_bytes: int) -> list[int]:
    """Returns the segments that a steady pass loads when the least recently used one is evicted on demand.

    On a cyclic trace of equal sizes that is all of them, at any budget below the whole model.
    """
    held: OrderedDict[int, int] = OrderedDict()
    loaded: list[int] = []
    for _ in range(_N_PASSES):
        loaded = []
        for use in trace.uses:
            for index in use.segments:
                if index in held:
                    held.move_to_end(index)
            for index in use.segments:
                if index in held:
                    continue
                size_bytes = trace.segments[index].size_bytes
                while held and sum(held.values()) + size_bytes > budget_bytes:
                    held.popitem(last=False)
                held[index] = size_bytes
                loaded.append(index)
    return loaded
