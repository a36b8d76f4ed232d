"""Which tables to have whole, and of which to gather rows: choices for the plan to compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, TypeVar

from litrt.trace import Trace, Use

_SMALL_SHARE = 0.1
"""Share of a budget that tables may take beside weights that do not fit by themselves."""

_GAPS_SHARE = 0.03
"""Share of a budget that is left for gaps when tables are to fill what other weights leave."""


class Planned(Protocol):
    """What is known of a plan."""

    @property
    def resident(self) -> dict[int, int]:
        """Segments that stay, with where."""
        ...

    @property
    def cost_s(self) -> float:
        """What plans are compared by."""
        ...


P = TypeVar("P", bound=Planned)


def best_plan(trace: Trace, budget_bytes: int, make: Callable[[Trace], P]) -> P | None:
    """Returns the best of the plans that use some tables whole and gather rows of the others.

    What the rows of a table cost in a pass is spared where the table stays. So tables are taken whole in the order of
    the seconds that are spared for the memory that they need: none, all, and as many as fit. A table of which a pass
    needs less than half is never whole in order to stream.

    Args:
        trace: A pass that gathers.
        budget_bytes: What no use may exceed.
        make: Makes the plan for a trace, of which no use does.

    Returns:
        The plan, or None where each has a use that exceeds the budget.
    """
    trace = replace(trace, uses=tuple(_estimated(trace, use) for use in trace.uses))
    order, may_stream = _in_order(trace)
    tried: set[frozenset[int]] = set()
    plans: list[P] = []
    choices = [frozenset(order[:count]) for count in _counts(trace, order, budget_bytes)]
    while choices:
        whole = choices.pop(0)
        made = trace.with_whole_tables(whole)
        if whole in tried or made.largest_use_bytes > budget_bytes:
            continue
        tried.add(whole)
        plan = make(made)
        staying = frozenset(table for table in whole if table in plan.resident or table in may_stream)
        if staying == whole:
            plans.append(plan)
        else:
            choices.insert(0, staying)
    if not plans:
        # Rows of all of them, there at once, may need more room than the whole of one.
        made = trace.with_whole_tables()
        return make(made) if made.largest_use_bytes <= budget_bytes else None
    return min(plans, key=lambda plan: plan.cost_s)


def _in_order(trace: Trace) -> tuple[list[int], set[int]]:
    """Returns the tables of a pass, the most worthwhile first, and those of which it needs at least half."""
    segments = trace.segments
    seconds: dict[int, float] = {}
    n_bytes: Counter[int] = Counter()
    for use in trace.uses:
        if use.table is not None:
            seconds[use.table] = seconds.get(use.table, 0.0) + use.compute_s - use.own_s
            n_bytes[use.table] += use.gathered_bytes
    half = {table for table in seconds if n_bytes[table] >= segments[table].fetch_bytes / 2}
    gain = {table: seconds[table] / max(segments[table].size_bytes, 1) for table in seconds}
    return sorted(seconds, key=lambda table: (table not in half, -gain[table], table)), half


def _counts(trace: Trace, order: list[int], budget_bytes: int) -> list[int]:
    """Returns how many of the tables in `order` to try to have whole."""
    size = [trace.segments[table].size_bytes for table in order]
    others_bytes = sum(trace.segments[index].size_bytes for index in trace.used if index not in order)
    counts = [len(order)]
    for room_bytes in (budget_bytes * (1 - _GAPS_SHARE) - others_bytes, budget_bytes * _SMALL_SHARE):
        fitting = [sum(size[: count + 1]) <= room_bytes for count in range(len(order))]
        counts.append(fitting.index(False) if False in fitting else len(order))
    return [*counts, 0]


def _estimated(trace: Trace, use: Use) -> Use:
    """Returns a use that takes at least the time of its reads: in the warm-up, rows may have been there already."""
    if use.table is None or use.gathered_s is None or not use.gathered_bytes:
        return use
    read_s = max(use.gathered_s, use.gathered_bytes / trace.bandwidth_bps + trace.latency_s)
    return replace(use, compute_s=use.own_s + read_s, gathered_s=read_s)


def with_room(trace: Trace, wanted_bytes: int, least_bytes: int, budget_bytes: int) -> Trace:
    """Returns `trace` with room for rows of tables: `wanted_bytes`, or else `least_bytes`, or else none."""
    for n_bytes in (wanted_bytes, least_bytes):
        made = replace(
            trace,
            segments=tuple(
                replace(segment, nbytes=n_bytes, size_bytes=n_bytes) if segment.is_slot else segment
                for segment in trace.segments
            ),
        )
        if made.largest_use_bytes <= budget_bytes:
            return made
    slots = {index for index, segment in enumerate(trace.segments) if segment.is_slot}
    uses = (replace(use, segments=tuple(i for i in use.segments if i not in slots)) for use in trace.uses)
    return replace(trace, uses=tuple(uses))
