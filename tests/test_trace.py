"""Traces and the log that they come from: what a pass needed, in which order, and where its seconds went."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import chain, traces

from litrt.log import PassLog
from litrt.trace import Segment, Trace, Use


def keep_all(index: int) -> bool:
    return True


@given(traces())
@settings(deadline=None)
def test_used_segments_come_in_order_of_first_use(trace: Trace) -> None:
    first_uses = [min(n for n, use in enumerate(trace.uses) if index in use.segments) for index in trace.used]
    assert first_uses == sorted(first_uses)
    assert len(set(trace.used)) == len(trace.used)
    assert set(trace.used) == {index for use in trace.uses for index in use.segments}
    assert trace.used_bytes == sum(trace.segments[index].size_bytes for index in set(trace.used))
    assert trace.compute_s == sum(use.compute_s for use in trace.uses)


@given(traces())
@settings(deadline=None)
def test_the_largest_use_is_the_most_that_is_needed_at_once(trace: Trace) -> None:
    needed = []
    for now in range(len(trace.uses)):
        open_uses = [use for then, use in enumerate(trace.uses[: now + 1]) if then + use.n_spanned > now]
        needed.append(
            sum(trace.segments[index].size_bytes for index in {index for use in open_uses for index in use.segments})
        )
    assert trace.largest_use_bytes == max(needed)


def test_what_repeats_is_counted_once() -> None:
    trace = replace(chain([10, 20, 40], 1.0), uses=(Use((2,), 1.0), Use((0, 2), 2.0), Use((2,), 4.0)))
    assert trace.used == (2, 0)
    assert trace.used_bytes == 50
    assert trace.largest_use_bytes == 50
    assert trace.compute_s == 7.0


def test_nested_uses_are_needed_together() -> None:
    uses = (Use((0,), 1.0, n_spanned=2), Use((1,), 1.0), Use((2,), 1.0))
    assert replace(chain([10, 20, 25]), uses=uses).largest_use_bytes == 30
    flat = tuple(replace(use, n_spanned=1) for use in uses)
    assert replace(chain([10, 20, 25]), uses=flat).largest_use_bytes == 25


def test_a_segment_used_again_inside_its_use_is_needed_until_the_outer_use_ends() -> None:
    uses = (Use((0,), 1.0, n_spanned=3), Use((0,), 1.0), Use((1,), 1.0))
    assert replace(chain([10, 20]), uses=uses).largest_use_bytes == 30


def test_a_trace_without_uses_needs_nothing() -> None:
    trace = Trace((Segment("a", 10, 10, 1),), (), 1.0)
    assert (trace.used, trace.used_bytes, trace.largest_use_bytes, trace.compute_s) == ((), 0, 0, 0)


def test_loads_read_the_values_of_a_segment_and_nothing_of_a_slot() -> None:
    assert Segment("a", 10, 64, 64).fetch_bytes == 10
    assert Segment("(rows of tables)", 10, 64, 64, is_slot=True).fetch_bytes == 0


def test_whole_tables_take_the_place_of_their_slot() -> None:
    segments = (Segment("wte", 1000, 1000, 1), Segment("slot", 50, 50, 1, is_slot=True), Segment("a", 10, 10, 1))
    gather = Use((1,), 3.0, n_spanned=2, table=0, gathered_bytes=7)
    trace = Trace(segments, (gather, Use((2,), 1.0), gather), 1.0, 0.5)
    assert trace.gathered_bytes == 14
    assert trace.largest_use_bytes == 60
    whole = trace.with_whole_tables()
    assert whole.uses == (Use((0,), 0.0, n_spanned=2), Use((2,), 1.0), Use((0,), 0.0, n_spanned=2))
    assert (whole.gathered_bytes, whole.used, whole.largest_use_bytes) == (0, (0, 2), 1010)
    assert (whole.segments, whole.bandwidth_bps, whole.latency_s) == (segments, 1.0, 0.5)


@given(traces())
@settings(deadline=None)
def test_a_trace_that_gathers_nothing_has_its_tables_whole(trace: Trace) -> None:
    assert trace.with_whole_tables() == trace
    assert trace.gathered_bytes == 0


def access(log: PassLog, segments: tuple[int, ...], began_s: float, bound_s: float) -> int:
    number = log.begin(segments, began_s)
    log.bound(number, bound_s)
    return number


def test_compute_runs_from_having_the_weights_to_asking_for_the_next() -> None:
    log = PassLog(10.0)
    log.end(access(log, (0,), 10.0, 13.0))  # waits for 3 seconds
    log.end(access(log, (1, 2), 14.0, 16.0))
    log.end(access(log, (3,), 20.0, 20.5))
    uses = log.uses(28.5, keep=keep_all)
    assert uses == [Use((0,), 1.0), Use((1, 2), 4.0), Use((3,), 8.0)]


def test_an_access_that_never_waited_computes_from_its_start() -> None:
    log = PassLog(0.0)
    log.end(log.begin((0,), 0.0))
    assert log.uses(5.0, keep=keep_all) == [Use((0,), 5.0)]


def test_what_comes_before_the_first_use_counts_to_the_last() -> None:
    log = PassLog(10.0)
    log.end(access(log, (0,), 12.0, 12.0))
    log.end(access(log, (1,), 13.0, 13.0))
    assert log.uses(17.0, keep=keep_all) == [Use((0,), 1.0), Use((1,), 4.0 + 2.0)]


def test_uses_of_what_is_not_kept_leave_their_seconds_to_the_use_before() -> None:
    log = PassLog(0.0)
    log.end(access(log, (9,), 1.0, 2.0))
    log.end(access(log, (0, 9), 4.0, 4.0))
    log.end(access(log, (9,), 8.0, 10.0))
    log.end(access(log, (1,), 26.0, 26.0))
    uses = log.uses(58.0, keep=lambda index: index != 9)
    # Before the first use kept: 1 second of lead and 2 of compute. The waits of what is not kept count nowhere.
    assert uses == [Use((0,), 4.0 + 16.0), Use((1,), 32.0 + 1.0 + 2.0)]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 7)), min_size=1, max_size=8),
    st.sets(st.integers(0, 5)),
    st.integers(0, 5),
)
@settings(deadline=None)
def test_no_second_of_compute_is_lost(parts: list[tuple[int, int, int]], kept: set[int], lead_s: int) -> None:
    log = PassLog(0.0)
    clock = float(lead_s)
    for index, wait_s, compute_s in parts:
        log.end(access(log, (index,), clock, clock + wait_s))
        clock += wait_s + compute_s
    uses = log.uses(clock, keep=lambda index: index in kept)
    assert [use.segments for use in uses] == [(index,) for index, _, _ in parts if index in kept]
    if uses:
        assert sum(use.compute_s for use in uses) == lead_s + sum(compute_s for _, _, compute_s in parts)


def test_an_access_spans_those_that_begin_before_it_ends() -> None:
    log = PassLog(0.0)
    outer = access(log, (0,), 0.0, 0.0)
    middle = access(log, (1,), 1.0, 1.0)
    log.end(access(log, (2,), 2.0, 2.0))
    log.end(middle)
    log.end(access(log, (3,), 3.0, 3.0))
    log.end(outer)
    log.end(access(log, (4,), 4.0, 4.0))
    uses = log.uses(5.0, keep=keep_all)
    assert [use.n_spanned for use in uses] == [4, 2, 1, 1, 1]
    assert [use.compute_s for use in uses] == [1.0] * 5


def test_a_span_counts_the_uses_that_are_kept() -> None:
    log = PassLog(0.0)
    outer = access(log, (0,), 0.0, 0.0)
    for index in (9, 1, 9, 2):
        log.end(access(log, (index,), 1.0, 1.0))
    log.end(outer)
    log.end(access(log, (3,), 2.0, 2.0))
    uses = log.uses(3.0, keep=lambda index: index != 9)
    assert [(use.segments, use.n_spanned) for use in uses] == [((0,), 3), ((1,), 1), ((2,), 1), ((3,), 1)]


def test_an_access_that_never_ended_spans_the_rest_of_the_pass() -> None:
    log = PassLog(0.0)
    access(log, (0,), 0.0, 0.0)
    for index in (1, 2):
        log.end(access(log, (index,), 1.0, 1.0))
    assert [use.n_spanned for use in log.uses(2.0, keep=keep_all)] == [3, 1, 1]


def test_a_gather_keeps_its_table_and_what_it_read() -> None:
    log = PassLog(0.0)
    number = access(log, (5,), 0.0, 0.5)
    log.gathered(number, 7, 4096, 0.75)
    log.end(number)
    log.end(access(log, (1,), 2.0, 2.0))
    assert log.uses(3.0, keep=keep_all) == [
        Use((5,), 1.5, 1, table=7, gathered_bytes=4096, gathered_s=0.25),
        Use((1,), 1.0),
    ]
    assert log.uses(3.0, keep=keep_all)[0].own_s == 1.25


def test_an_access_that_failed_is_forgotten() -> None:
    log = PassLog(0.0)
    outer = access(log, (0,), 0.0, 0.0)
    log.drop(log.begin((1,), 1.0))
    log.end(access(log, (2,), 2.0, 2.0))
    log.end(outer)
    log.end(access(log, (3,), 3.0, 3.0))
    uses = log.uses(4.0, keep=keep_all)
    assert uses == [Use((0,), 2.0, n_spanned=2), Use((2,), 1.0), Use((3,), 1.0)]


def test_notes_on_an_access_that_was_forgotten_are_ignored() -> None:
    log = PassLog(0.0)
    number = log.begin((0,), 0.0)
    log.drop(number)
    log.bound(number, 1.0)
    log.gathered(number, 7, 10, 0.0)
    log.end(number)
    assert log.uses(1.0, keep=keep_all) == []


@pytest.mark.parametrize("n_accesses", [0, 3])
def test_a_pass_that_uses_nothing_kept_has_no_uses(n_accesses: int) -> None:
    log = PassLog(0.0)
    for index in range(n_accesses):
        log.end(access(log, (index,), float(index), float(index)))
    assert log.uses(10.0, keep=lambda index: False) == []
