"""Least recently used on a cyclic trace: its closed forms, and what no policy can beat."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import chain

from litrt.bound import groups, min_streamed_bytes
from litrt.policy import lru_streamed_bytes
from litrt.trace import Segment, Trace, Use


def visits(order: list[int], size_bytes: int = 10) -> Trace:
    """Returns a trace that uses equal segments one by one in `order`."""
    segments = tuple(Segment(f"w{number}", size_bytes, size_bytes, 1) for number in range(max(order) + 1))
    return Trace(segments, tuple(Use((index,), 0.0) for index in order), 1.0)


def reuse_distances(order: list[int]) -> list[int]:
    """Returns for every use of a steady pass the different segments from the last use of its segment to this one."""
    distances = []
    for number, index in enumerate(order):
        earlier = order[:number][::-1] + order[number:][::-1]
        distances.append(len({index, *earlier[: earlier.index(index)]}))
    return distances


@pytest.mark.parametrize("n_segments", [2, 5, 12])
def test_a_cycle_of_equal_sizes_has_no_hit_below_full_size(n_segments: int) -> None:
    trace = chain([10] * n_segments)
    for n_kept in range(1, n_segments):
        assert lru_streamed_bytes(trace, 10 * n_kept) == 10 * n_segments
        assert lru_streamed_bytes(trace, 10 * n_kept + 9) == 10 * n_segments
    assert lru_streamed_bytes(trace, 10 * n_segments) == 0


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 7))
@settings(deadline=None)
def test_a_use_hits_where_no_more_segments_came_between_than_fit(order: list[int], n_kept: int) -> None:
    n_misses = sum(distance > n_kept for distance in reuse_distances(order))
    assert lru_streamed_bytes(visits(order), 10 * n_kept) == 10 * n_misses


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
@settings(deadline=None)
def test_more_memory_never_loads_more_of_equal_sizes(order: list[int]) -> None:
    streamed = [lru_streamed_bytes(visits(order), budget_bytes) for budget_bytes in range(10, 80, 5)]
    assert streamed == sorted(streamed, reverse=True)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_no_cycle_moves_less_than_the_bound(sizes: list[int], extra_bytes: int) -> None:
    trace = chain(sizes)
    budget_bytes = max(sizes) + extra_bytes
    fewest = min_streamed_bytes(groups(trace)[0], budget_bytes)
    assert fewest * (1 - 1e-9) <= lru_streamed_bytes(trace, budget_bytes) <= sum(sizes)


def test_the_least_recently_used_goes_first() -> None:
    # At 2 the oldest is 1, since 0 was used again: the last 0 hits, and 1 is loaded anew by the next pass.
    assert lru_streamed_bytes(visits([0, 1, 0, 2, 0]), 20) == 20


def test_what_a_use_needs_together_is_not_evicted_for_the_rest_of_it() -> None:
    segments = tuple(Segment(f"w{number}", 10, 10, 1) for number in range(3))
    trace = Trace(segments, (Use((0,), 0.0), Use((1,), 0.0), Use((0, 2), 0.0)), 1.0)
    # The use of 0 and 2 drops 1, not 0, which it was about to use, so that the next pass begins with a hit.
    assert lru_streamed_bytes(trace, 20) == 20


def test_memory_is_counted_with_padding_and_reading_without() -> None:
    trace = Trace(tuple(Segment(f"w{n}", 10, 16, 16) for n in range(3)), tuple(Use((n,), 0.0) for n in range(3)), 1.0)
    assert lru_streamed_bytes(trace, 47) == 30
    assert lru_streamed_bytes(trace, 48) == 0


def test_rows_of_tables_are_read_in_every_pass_and_slots_never() -> None:
    slot = Segment("slot", 50, 50, 1, is_slot=True)
    trace = chain([10, 10])
    gather = Use((2,), 0.0, table=3, gathered_bytes=7)
    trace = replace(trace, segments=(*trace.segments, slot, Segment("wte", 900, 900, 1)), uses=(*trace.uses, gather))
    assert lru_streamed_bytes(trace, 10**6) == 7
    assert lru_streamed_bytes(trace, 60) == 27


def test_reuse_distances_count_the_pass_before() -> None:
    assert reuse_distances([0, 1, 0, 2]) == [2, 3, 2, 3]
    assert Counter(reuse_distances([0, 0])) == {1: 2}
