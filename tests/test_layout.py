"""Addresses: what is alive together never overlaps, and a load waits no longer than its place is taken."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import BrokenScheduleError, chain, execute, traces

from litrt.layout import RULES, Skyline, Where, align_up, best_layout, lay_out
from litrt.schedule import Load, Schedule, best_schedule, pass_s
from litrt.trace import Trace


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Trace, frozenset[int], int]:
    """Draws a trace, what streams of it, and a window that may be too small for that."""
    trace = draw(traces())
    streamed = frozenset(draw(st.sets(st.sampled_from(trace.used), min_size=1)))
    return trace, streamed, draw(st.integers(0, sum(trace.segments[index].size_bytes for index in streamed) + 40))


def run(trace: Trace, streamed: frozenset[int], schedule: Schedule, height_bytes: int) -> None:
    """Executes a layout; the executor notices what overlaps, and what is loaded where something lies still."""
    resident = frozenset(trace.used) - streamed
    execute(trace, resident, schedule.loads, len(schedule.steps), height_bytes, n_passes=6)
    for load in schedule.loads:
        segment = trace.segments[load.segment]
        assert load.offset is not None
        assert load.offset % segment.align_bytes == 0
        assert 0 <= load.offset <= load.offset + segment.size_bytes <= height_bytes


@given(jobs())
def test_every_layout_can_be_executed(job: tuple[Trace, frozenset[int], int]) -> None:
    trace, streamed, height_bytes = job
    schedule = best_schedule(trace, streamed, height_bytes)
    if schedule is not None:
        for placed in lay_out(schedule, trace.segments, height_bytes):
            run(trace, streamed, placed, height_bytes)


@given(jobs())
def test_loads_are_issued_no_earlier_than_scheduled_and_no_later_than_they_must(
    job: tuple[Trace, frozenset[int], int],
) -> None:
    trace, streamed, height_bytes = job
    schedule = best_schedule(trace, streamed, height_bytes)
    if schedule is None:
        return
    for placed in lay_out(schedule, trace.segments, height_bytes):
        issued_after = None
        for number, (load, scheduled) in enumerate(zip(placed.loads, schedule.loads, strict=True)):
            assert scheduled.after <= load.after <= load.first
            if load.after > max(scheduled.after, issued_after if issued_after is not None else load.after - 1):
                # Its place is taken until then: one step earlier, it would overlap.
                earlier = list(placed.loads)
                earlier[number] = replace(load, after=load.after - 1)
                with pytest.raises(BrokenScheduleError):
                    run(trace, streamed, replace(placed, loads=tuple(earlier)), height_bytes)
            issued_after = max(load.after, issued_after if issued_after is not None else load.after)


@given(traces(several_uses=False, nested=False))
def test_there_is_always_a_layout_where_all_that_streams_fits_side_by_side(trace: Trace) -> None:
    streamed = frozenset(trace.used)
    height_bytes = sum(trace.segments[index].size_bytes + trace.segments[index].align_bytes for index in streamed)
    schedule = best_schedule(trace, streamed, height_bytes)
    assert schedule is not None
    placed = best_layout(trace, schedule, height_bytes)
    assert placed is not None
    run(trace, streamed, placed, height_bytes)


@given(traces(several_uses=False, nested=False))
def test_there_is_always_a_layout_where_each_use_fits_and_alignments_are_equal(trace: Trace) -> None:
    segments = tuple(replace(segment, size_bytes=segment.nbytes, align_bytes=1) for segment in trace.segments)
    trace = replace(trace, segments=segments)
    streamed = frozenset(trace.used)
    schedule = best_schedule(trace, streamed, trace.largest_use_bytes)
    assert schedule is not None
    placed = best_layout(trace, schedule, trace.largest_use_bytes)
    assert placed is not None
    run(trace, streamed, placed, trace.largest_use_bytes)


def laid_out(sizes: Sequence[int], height_bytes: int) -> tuple[Trace, Schedule, Schedule]:
    """Returns a chain of segments that all stream, its schedule, and its layout."""
    trace = chain(sizes, 1.0, bandwidth_bps=100.0)
    schedule = best_schedule(trace, frozenset(trace.used), height_bytes)
    assert schedule is not None
    placed = best_layout(trace, schedule, height_bytes)
    assert placed is not None
    run(trace, frozenset(trace.used), placed, height_bytes)
    return trace, schedule, placed


def test_two_slots_take_turns() -> None:
    trace, schedule, placed = laid_out([100] * 6, 200)
    assert sorted({load.offset for load in placed.loads}) == [0, 100]
    assert pass_s(trace, placed) == pass_s(trace, schedule) == 6.0


def test_bytes_are_used_again_once_they_are_free() -> None:
    _, _, placed = laid_out([100] * 5, 100)
    assert [load.offset for load in placed.loads] == [0] * 5
    assert [load.after for load in placed.loads] == [0, 1, 2, 3, 4]


def test_an_odd_cycle_in_two_slots_waits_once_per_pass() -> None:
    trace, schedule, placed = laid_out([100] * 7, 200)
    assert pass_s(trace, schedule) == 7.0
    assert pass_s(trace, placed) == 8.0
    assert sum(load.after > ideal.after for load, ideal in zip(placed.loads, schedule.loads, strict=True)) == 1


def test_large_and_small_segments_take_turns_at_the_two_ends() -> None:
    trace, schedule, placed = laid_out([60, 40, 55, 45, 70, 30, 50, 50], 100)
    assert pass_s(trace, placed) == pass_s(trace, schedule)


def test_loads_of_one_use_lie_side_by_side_where_nothing_else_fits() -> None:
    # What is there when 30 of the last use could be loaded lies in the middle of the window.
    trace = chain([40, 20, 40], 1.0)
    segments = (*trace.segments, *chain([30, 30, 40], 1.0).segments)
    uses = (*trace.uses, replace(trace.uses[0], segments=(3, 4, 5)))
    trace = Trace(segments, uses, 1.0)
    schedule = best_schedule(trace, frozenset(range(6)), 100)
    assert schedule is not None
    placed = best_layout(trace, schedule, 100)
    assert placed is not None
    run(trace, frozenset(range(6)), placed, 100)


def test_layouts_of_random_chains_are_nearly_as_fast_as_without_addresses() -> None:
    # Measured: mean 1.003, worst 1.022.
    rng = random.Random(7)
    ratios = []
    for _ in range(30):
        sizes = [rng.randint(20, 100) for _ in range(30)]
        trace, schedule, placed = laid_out(sizes, 300)
        ratios.append(pass_s(trace, placed) / pass_s(trace, schedule))
    assert sum(ratios) / len(ratios) <= 1.01
    assert max(ratios) <= 1.04


def test_a_window_smaller_than_a_segment_has_no_layout() -> None:
    trace = chain([100], 1.0)
    schedule = Schedule(best_schedule(trace, frozenset({0}), 100).steps, (Load(0, 0, 0, 0),), 100)  # type: ignore[union-attr]
    assert best_layout(trace, schedule, 100) is not None
    assert best_layout(trace, schedule, 99) is None


def test_nothing_needs_no_place() -> None:
    empty = Schedule((), (), 0)
    assert [placed.loads for placed in lay_out(empty, (), 0)] == [()] * len(RULES)


def test_equal_schedules_get_equal_layouts() -> None:
    rng = random.Random(3)
    sizes = [rng.randint(1, 50) for _ in range(30)]
    assert laid_out(sizes, 120)[2] == laid_out(sizes, 120)[2]


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 39), st.integers(0, 12), st.integers(0, 30)), max_size=20),
    st.tuples(st.integers(0, 12), st.sampled_from([1, 4]), st.integers(0, 30), st.sampled_from(Where)),
)
def test_a_skyline_says_what_an_array_of_addresses_says(
    height_bytes: int, taken: list[tuple[int, int, int]], asked: tuple[int, int, int, Where]
) -> None:
    skyline = Skyline(height_bytes)
    free_after = [-1] * height_bytes
    for low, size_bytes, until in taken:
        high = min(low + size_bytes, height_bytes)
        if low < high:
            skyline.take(low, high, until)
            free_after[low:high] = [until] * (high - low)
            assert skyline.latest(low, high) == until
    size_bytes, align_bytes, not_before, where = asked
    for low in range(height_bytes):
        assert max(skyline.latest(low, low + 1), -1) == free_after[low]
    offsets = range(0, height_bytes - size_bytes + 1, align_bytes)
    earliest = min((max([not_before, *free_after[low : low + size_bytes]]) for low in offsets), default=None)
    offset = skyline.best_offset(size_bytes, align_bytes, not_before, where)
    if earliest is None or not size_bytes:
        assert offset is None or not size_bytes
        return
    assert offset is not None
    assert offset % align_bytes == 0
    assert max([not_before, *free_after[offset : offset + size_bytes]]) == earliest
    earliest_offsets = [low for low in offsets if max([not_before, *free_after[low : low + size_bytes]]) == earliest]
    if where is Where.LOWEST:
        assert offset == min(earliest_offsets)
    if where is Where.HIGHEST:
        assert offset == max(earliest_offsets)


@pytest.mark.parametrize(("value", "aligned"), [(0, 0), (1, 16), (16, 16), (17, 32)])
def test_align_up_goes_to_the_next_multiple(value: int, aligned: int) -> None:
    assert align_up(value, 16) == aligned
