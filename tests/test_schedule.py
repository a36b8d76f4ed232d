"""Schedules: they can be executed, load as early as the window allows, and take as long as they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import BrokenScheduleError, chain, execute, steady_pass_s, traces

from litrt.schedule import Load, Schedule, Step, best_schedule, make_schedule, pass_s, streamed_steps
from litrt.trace import Segment, Trace, Use

N_PASSES = 4


@st.composite
def choices(draw: st.DrawFn) -> tuple[Trace, frozenset[int], int]:
    """Draws a trace, what streams of it, and a window."""
    trace = draw(traces())
    streamed = frozenset(draw(st.sets(st.sampled_from(trace.used))))
    return trace, streamed, draw(st.integers(0, max(trace.used_bytes, 1)))


def resident_of(trace: Trace, streamed: frozenset[int]) -> frozenset[int]:
    return frozenset(trace.used) - streamed


@given(choices(), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=400, deadline=None)
def test_every_schedule_can_be_executed_within_its_window(
    choice: tuple[Trace, frozenset[int], int], merge_share: float
) -> None:
    trace, streamed, window_bytes = choice
    schedule = make_schedule(trace, streamed, window_bytes, merge_bytes=int(merge_share * window_bytes))
    if schedule is None:
        return
    # The executor checks what is held, and that every use finds what it needs until it ends.
    loaded = execute(
        trace, resident_of(trace, streamed), schedule.loads, len(schedule.steps), window_bytes, n_passes=N_PASSES
    )
    per_pass = sum(trace.segments[load.segment].size_bytes for load in schedule.loads)
    for segments in loaded[1:-1]:
        assert sum(trace.segments[index].size_bytes for index in segments) == per_pass == schedule.streamed_bytes


@given(choices(), st.sampled_from([0.0, 1.0]))
@settings(max_examples=400, deadline=None)
def test_each_load_is_issued_as_early_as_the_window_allows(
    choice: tuple[Trace, frozenset[int], int], merge_share: float
) -> None:
    trace, streamed, window_bytes = choice
    schedule = make_schedule(trace, streamed, window_bytes, merge_bytes=int(merge_share * window_bytes))
    if schedule is None:
        return
    n_steps = len(schedule.steps)
    for number, load in enumerate(schedule.loads):
        before = schedule.loads[number - 1].after - (n_steps if number == 0 else 0)
        if load.after <= before:
            continue  # loads are issued in order, so that the one before it decides
        earlier = list(schedule.loads)
        earlier[number] = replace(load, after=load.after - 1)
        with pytest.raises(BrokenScheduleError):
            execute(trace, resident_of(trace, streamed), earlier, n_steps, window_bytes, n_passes=6)


@given(choices(), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=300, deadline=None)
def test_the_predicted_seconds_are_those_of_many_passes(
    choice: tuple[Trace, frozenset[int], int], merge_share: float
) -> None:
    trace, streamed, window_bytes = choice
    schedule = make_schedule(trace, streamed, window_bytes, merge_bytes=int(merge_share * window_bytes))
    if schedule is None:
        return
    expected_s = steady_pass_s(trace, resident_of(trace, streamed), schedule)
    assert pass_s(trace, schedule) == pytest.approx(expected_s, rel=1e-9, abs=1e-9)


@given(traces())
@settings(max_examples=200, deadline=None)
def test_a_window_of_the_largest_use_can_stream_everything(trace: Trace) -> None:
    schedule = best_schedule(trace, frozenset(trace.used), trace.largest_use_bytes)
    assert schedule is not None
    execute(trace, (), schedule.loads, len(schedule.steps), trace.largest_use_bytes)


@given(traces())
@settings(max_examples=100, deadline=None)
def test_no_window_below_the_largest_use_can_stream_everything(trace: Trace) -> None:
    assert best_schedule(trace, frozenset(trace.used), trace.largest_use_bytes - 1) is None


@given(choices(), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_a_larger_window_never_makes_a_pass_slower(choice: tuple[Trace, frozenset[int], int], more_bytes: int) -> None:
    trace, streamed, window_bytes = choice
    schedule = make_schedule(trace, streamed, window_bytes)
    if schedule is None:
        return
    roomier = make_schedule(trace, streamed, window_bytes + more_bytes)
    assert roomier is not None
    assert all(a.after <= b.after for a, b in zip(roomier.loads, schedule.loads, strict=True))
    assert pass_s(trace, roomier) <= pass_s(trace, schedule) * (1 + 1e-9)


@given(choices())
@settings(max_examples=150, deadline=None)
def test_the_best_schedule_is_no_slower_than_any_that_it_tries(choice: tuple[Trace, frozenset[int], int]) -> None:
    trace, streamed, window_bytes = choice
    best = best_schedule(trace, streamed, window_bytes)
    for merge_bytes in (0, window_bytes):
        tried = make_schedule(trace, streamed, window_bytes, merge_bytes=merge_bytes)
        if tried is not None:
            assert best is not None
            assert pass_s(trace, best) <= pass_s(trace, tried)


@pytest.mark.parametrize("n_ahead", [0, 1, 2, 3])
def test_a_window_of_more_slots_fetches_further_ahead(n_ahead: int) -> None:
    trace = chain([100] * 6, 1.0)
    schedule = make_schedule(trace, frozenset(range(6)), 100 * (n_ahead + 1) + 99)
    assert schedule is not None
    # The bytes of step j - n - 1 are free once that step has ended, which is when j - n steps have.
    assert schedule.loads == tuple(Load(number, number, number, number - n_ahead) for number in range(6))


def test_prefetch_never_evicts_the_next_segment() -> None:
    trace = chain([60, 100, 40, 100], 1.0)
    schedule = make_schedule(trace, frozenset(range(4)), 140)
    assert schedule is not None
    # 40 fits beside 100 at once; the second 100 does not fit beside 40 and the first, and waits for the first to go.
    assert [(load.segment, load.after) for load in schedule.loads] == [(0, 0), (1, 1), (2, 1), (3, 2)]


def test_a_load_may_begin_when_its_room_is_released_and_not_only_when_the_next_step_begins() -> None:
    late = chain([10, 10, 10], [3.0, 3.0, 3.0], 10.0)
    early = replace(late, uses=tuple(replace(use, held_s=1.0) for use in late.uses))
    seconds = []
    for trace in (late, early):
        schedule = make_schedule(trace, frozenset(range(3)), 10)
        assert schedule is not None
        seconds.append(pass_s(trace, schedule))
    # One place: a load of 1 s follows a use of 3 s, or lies in the 2 s that are left of it.
    assert seconds == [pytest.approx(12.0), pytest.approx(9.0)]


def test_residents_are_not_loaded_and_their_uses_are_no_steps() -> None:
    trace = chain([10, 20, 30, 40], [1.0, 2.0, 4.0, 8.0])
    schedule = make_schedule(trace, frozenset({1, 3}), 60)
    assert schedule is not None
    assert [load.segment for load in schedule.loads] == [1, 3]
    # What computes without waiting counts to the step before it, across the end of the pass too.
    assert schedule.steps == (Step((1,), 6.0, 6.0), Step((3,), 9.0, 9.0))
    assert schedule.streamed_bytes == 60


@given(choices())
@settings(max_examples=100, deadline=None)
def test_steps_keep_all_seconds_of_the_pass(choice: tuple[Trace, frozenset[int], int]) -> None:
    trace, streamed, _ = choice
    steps, spans = streamed_steps(trace, streamed)
    assert [step.segments for step in steps] == [
        kept for use in trace.uses if (kept := tuple(index for index in use.segments if index in streamed))
    ]
    if steps:
        assert sum(step.compute_s for step in steps) == pytest.approx(trace.compute_s)
    assert all(number <= span < len(steps) for number, span in enumerate(spans))


def test_a_use_holds_its_segments_until_those_nested_in_it_end() -> None:
    segments = tuple(Segment(f"w{number}", 10, 10, 1) for number in range(4))
    trace = Trace(segments, (Use((0,), 1.0, n_spanned=3), Use((1,), 1.0), Use((2,), 1.0), Use((3,), 1.0)), 1.0)
    schedule = make_schedule(trace, frozenset(range(4)), 20)
    assert schedule is not None
    assert schedule.loads[0] == Load(0, 0, 2, -1)
    assert make_schedule(trace, frozenset(range(4)), 19) is None


def twice(*, between: int = 1) -> Trace:
    """A trace that uses segment 0 at its start and again after `between` others."""
    segments = tuple(Segment(f"w{number}", 10, 10, 1) for number in range(between + 2))
    order = [0, *range(1, between + 1), 0, between + 1]
    return Trace(segments, tuple(Use((index,), 1.0) for index in order), 1.0)


def test_a_segment_is_kept_between_two_uses_where_that_takes_no_more_than_it_may() -> None:
    trace = twice()
    everything = frozenset(trace.used)
    again = make_schedule(trace, everything, 40, merge_bytes=19)
    kept = make_schedule(trace, everything, 40, merge_bytes=20)
    assert again is not None
    assert kept is not None
    assert [load.segment for load in again.loads] == [0, 1, 0, 2]
    assert [load.segment for load in kept.loads] == [0, 1, 2]
    assert kept.loads[0].last == 2
    assert (again.streamed_bytes, kept.streamed_bytes) == (40, 30)


def test_uses_in_a_row_are_one_load() -> None:
    segments = (Segment("a", 10, 10, 1), Segment("b", 10, 10, 1))
    trace = Trace(segments, (Use((0,), 1.0), Use((0,), 1.0), Use((1,), 1.0)), 1.0)
    schedule = make_schedule(trace, frozenset({0, 1}), 10)
    assert schedule is not None
    assert [(load.segment, load.first, load.last) for load in schedule.loads] == [(0, 0, 1), (1, 2, 2)]


def test_keeping_is_chosen_where_it_saves_time_and_left_where_it_does_not_fit() -> None:
    trace = twice(between=3)
    best = best_schedule(trace, frozenset(trace.used), 40)
    assert best is not None
    assert best.streamed_bytes == 50
    tight = best_schedule(trace, frozenset(trace.used), 10)
    assert tight is not None
    assert tight.streamed_bytes == 60


def test_one_slot_neither_overlaps_nor_hides_anything() -> None:
    trace = chain([100] * 5, 3.0, bandwidth_bps=50.0)
    schedule = make_schedule(trace, frozenset(range(5)), 100)
    assert schedule is not None
    assert pass_s(trace, schedule) == 5 * (2.0 + 3.0)


@pytest.mark.parametrize(("compute_s", "step_s"), [(3.0, 3.0), (2.0, 2.0), (0.5, 2.0)])
def test_two_slots_hide_the_shorter_of_compute_and_transfer(compute_s: float, step_s: float) -> None:
    trace = chain([100] * 5, compute_s, bandwidth_bps=50.0)
    schedule = make_schedule(trace, frozenset(range(5)), 200)
    assert schedule is not None
    assert pass_s(trace, schedule) == pytest.approx(5 * step_s)


def test_every_read_costs_its_latency() -> None:
    trace = replace(chain([100] * 5, 0.0, bandwidth_bps=50.0), latency_s=0.25)
    schedule = make_schedule(trace, frozenset(range(5)), 200)
    assert schedule is not None
    assert pass_s(trace, schedule) == pytest.approx(5 * 2.25)


def test_padding_takes_room_and_no_time() -> None:
    segments = tuple(Segment(f"w{number}", 100, 128, 64) for number in range(3))
    trace = Trace(segments, tuple(Use((number,), 0.0) for number in range(3)), 50.0)
    assert make_schedule(trace, frozenset(range(3)), 127) is None
    schedule = make_schedule(trace, frozenset(range(3)), 128)
    assert schedule is not None
    assert pass_s(trace, schedule) == 6.0


def test_a_slot_takes_room_and_no_transfer() -> None:
    segments = (Segment("a", 100, 100, 1), Segment("slot", 300, 300, 1, is_slot=True))
    trace = replace(Trace(segments, (Use((0,), 1.0), Use((1,), 1.0)), 50.0), latency_s=5.0)
    assert make_schedule(trace, frozenset({0, 1}), 299) is None
    schedule = make_schedule(trace, frozenset({0, 1}), 300)
    assert schedule is not None
    assert pass_s(trace, schedule) == 2 + 2 + 5


def test_nothing_streamed_waits_for_nothing() -> None:
    trace = chain([10, 20], 3.0)
    schedule = make_schedule(trace, frozenset(), 0)
    assert schedule == Schedule((), (), 0)
    assert pass_s(trace, schedule) == 6.0


def test_residents_that_do_not_fit_leave_no_window() -> None:
    assert make_schedule(chain([10, 20]), frozenset(), -1) is None
    assert best_schedule(chain([10, 20]), frozenset({0}), -1) is None


def test_empty_tensors_can_be_streamed_through_nothing() -> None:
    trace = chain([0, 0], 1.0)
    schedule = make_schedule(trace, frozenset({0, 1}), 0)
    assert schedule is not None
    execute(trace, (), schedule.loads, 2, 0)
    assert pass_s(trace, schedule) == 2.0
