"""The lower bounds: their closed forms, written out again here, and that no simulated pass beats them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import chain, steady_pass_s, traces

from litrt.bound import groups, min_pass_s, min_streamed_bytes
from litrt.schedule import make_schedule, pass_s
from litrt.trace import Segment, Trace, Use

NEAR = 1e-9
"""Relative room for rounding."""


def written_out_streamed_bytes(sizes: list[float], budget_bytes: float) -> float:
    """W - B + m, the smallest m with sum_j min(s_j, m) - m >= W - B found by halving."""
    excess = sum(sizes) - budget_bytes
    low, high = 0.0, max(sizes)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(min(size, middle) for size in sizes) - middle >= excess:
            high = middle
        else:
            low = middle
    return excess + high


def written_out_pass_s(sizes: list[float], compute_s: list[float], budget_bytes: float, bandwidth_bps: float) -> float:
    """The largest of the five closed forms, loop by loop."""
    n_groups, total, compute = len(sizes), sum(sizes), sum(compute_s)
    streamed = written_out_streamed_bytes(sizes, budget_bytes)
    hidden = sum(min(bandwidth_bps * c, budget_bytes - s) for s, c in zip(sizes, compute_s, strict=True))
    forms = [compute, streamed / bandwidth_bps, compute + (streamed - hidden) / bandwidth_bps]
    tops = sorted((s + bandwidth_bps * c for s, c in zip(sizes, compute_s, strict=True)), reverse=True)
    for k in range(2, n_groups + 1):
        forms.append(((k - 1) * total - k * budget_bytes + sum(tops[:k])) / ((k - 1) * bandwidth_bps))
    for first in range(n_groups):
        for n_in in range(1, n_groups + 1):
            inside = [(first + number) % n_groups for number in range(n_in)]
            before_last_s = sum(compute_s[index] for index in inside[:-1])
            needed_s = (sum(sizes[index] for index in inside) - budget_bytes) / bandwidth_bps
            forms.append(compute - before_last_s + max(before_last_s, needed_s))
    return max(forms)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], list[float], float, float]:
    """Draws sizes, seconds, a budget between the largest group and all of them, and a bandwidth."""
    n_groups = draw(st.integers(2, 7))
    sizes = draw(st.lists(st.integers(0, 100).map(float), min_size=n_groups, max_size=n_groups))
    compute_s = draw(st.lists(st.integers(0, 60).map(float), min_size=n_groups, max_size=n_groups))
    share = draw(st.integers(0, 15)) / 16
    budget_bytes = max(sizes) + share * (sum(sizes) - max(sizes))
    return sizes, compute_s, budget_bytes, draw(st.sampled_from([0.5, 1.0, 4.0]))


@pytest.mark.parametrize("n_groups", [2, 5, 32])
def test_equal_groups_stream_n_times_n_less_k_over_n_less_1(n_groups: int) -> None:
    sizes = np.full(n_groups, 100.0)
    for n_kept in range(1, n_groups + 1):
        expected = 100 * n_groups * (n_groups - n_kept) / (n_groups - 1)
        assert min_streamed_bytes(sizes, 100 * n_kept) == pytest.approx(expected)


@pytest.mark.parametrize(("budget", "ratio"), [(0.2, 0.1), (0.5, 0.1), (0.5, 0.3), (0.9, 0.05), (0.5, 1.0), (0.2, 3.0)])
def test_equal_groups_take_the_exact_optimum(budget: float, ratio: float) -> None:
    n_groups, bandwidth_bps = 32, 10.0
    sizes = np.full(n_groups, 100.0)
    total = sizes.sum()
    compute = ratio * total / bandwidth_bps
    streaming = (n_groups * (total - budget * total) / bandwidth_bps + compute) / (n_groups - 1)
    expected = max(compute, streaming)
    assert min_pass_s(sizes, np.full(n_groups, compute / n_groups), budget * total, bandwidth_bps) == pytest.approx(
        expected
    )


@given(cases())
@settings(max_examples=200, deadline=None)
def test_the_fewest_bytes_are_the_excess_and_the_smallest_window(
    case: tuple[list[float], list[float], float, float],
) -> None:
    sizes, _, budget_bytes, _ = case
    expected = written_out_streamed_bytes(sizes, budget_bytes) if budget_bytes < sum(sizes) else 0.0
    assert min_streamed_bytes(np.array(sizes), budget_bytes) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(cases())
@settings(max_examples=200, deadline=None)
def test_the_bound_is_the_largest_of_its_closed_forms(case: tuple[list[float], list[float], float, float]) -> None:
    sizes, compute_s, budget_bytes, bandwidth_bps = case
    if budget_bytes >= sum(sizes):
        expected = sum(compute_s)
    else:
        expected = written_out_pass_s(sizes, compute_s, budget_bytes, bandwidth_bps)
    found = min_pass_s(np.array(sizes), np.array(compute_s), budget_bytes, bandwidth_bps)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_compute_alone_bounds_a_slow_model() -> None:
    assert min_pass_s(np.full(3, 10.0), np.full(3, 500.0), 25.0, 1.0) == 1500


def test_bytes_alone_bound_a_model_that_computes_nothing() -> None:
    # W - B = 20, and m = 10: 3 * 10 - 10 = 20.
    assert min_pass_s(np.full(3, 20.0), np.zeros(3), 40.0, 2.0) == pytest.approx((20 + 10) / 2)


def test_two_heavy_groups_in_a_row_bound_a_pass_that_has_time_elsewhere() -> None:
    sizes = np.array([10.0] * 2 + [1.0] * 10)
    compute_s = np.array([0.0] * 2 + [10.0] * 10)
    # Of the 21 bytes of the two and the one behind them, 12 can be there at first; 9 come while nothing computes.
    assert min_pass_s(sizes, compute_s, 12.0, 1.0) == pytest.approx(100 + 9)


def test_a_budget_below_the_largest_group_is_unbounded() -> None:
    sizes, seconds = np.array([10.0, 30.0, 10.0]), np.zeros(3)
    assert min_streamed_bytes(sizes, 29.0) == min_pass_s(sizes, seconds, 29.0, 1.0) == float("inf")
    assert min_streamed_bytes(sizes, 30.0) < float("inf")


def test_a_budget_for_everything_streams_nothing() -> None:
    sizes = np.array([10.0, 30.0])
    assert min_streamed_bytes(sizes, 40.0) == 0
    assert min_pass_s(sizes, np.array([1.0, 2.0]), 40.0, 1.0) == 3


@given(cases(), st.integers(1, 100))
@settings(max_examples=150, deadline=None)
def test_more_memory_never_raises_a_bound(case: tuple[list[float], list[float], float, float], more_bytes: int) -> None:
    sizes, seconds = np.array(case[0]), np.array(case[1])
    less, more = case[2], case[2] + more_bytes
    assert min_streamed_bytes(sizes, more) <= min_streamed_bytes(sizes, less) * (1 + NEAR)
    assert min_pass_s(sizes, seconds, more, case[3]) <= min_pass_s(sizes, seconds, less, case[3]) * (1 + NEAR)


@given(traces(), st.data())
@settings(max_examples=250, deadline=None)
def test_no_simulated_schedule_beats_the_bound(trace: Trace, data: st.DataObject) -> None:
    streamed = frozenset(data.draw(st.sets(st.sampled_from(trace.used)), label="streamed"))
    window_bytes = data.draw(st.integers(0, trace.used_bytes), label="window_bytes")
    schedule = make_schedule(trace, streamed, window_bytes, merge_bytes=data.draw(st.sampled_from([0, window_bytes])))
    if schedule is None:
        return
    resident = frozenset(trace.used) - streamed
    budget_bytes = window_bytes + sum(trace.segments[index].size_bytes for index in resident)
    sizes, compute_s = groups(trace)
    bound_s = min_pass_s(sizes, compute_s, budget_bytes, trace.bandwidth_bps) * (1 - NEAR)
    assert pass_s(trace, schedule) >= bound_s
    assert steady_pass_s(trace, resident, schedule) >= bound_s
    assert schedule.streamed_bytes >= min_streamed_bytes(sizes, budget_bytes) * (1 - NEAR)


@given(traces(), st.data())
@settings(max_examples=250)
def test_no_schedule_beats_the_bound_where_uses_are_done_before_the_next_begins(
    trace: Trace, data: st.DataObject
) -> None:
    shares = data.draw(st.lists(st.sampled_from([None, 0.0, 0.3, 1.0]), min_size=12, max_size=12), label="shares")
    uses = [
        replace(use, held_s=None if share is None else share * use.compute_s)
        for use, share in zip(trace.uses, shares, strict=False)
    ]
    trace = replace(trace, uses=(*uses, *trace.uses[len(uses) :]))
    streamed = frozenset(data.draw(st.sets(st.sampled_from(trace.used)), label="streamed"))
    window_bytes = data.draw(st.integers(0, trace.used_bytes), label="window_bytes")
    schedule = make_schedule(trace, streamed, window_bytes)
    if schedule is None:
        return
    budget_bytes = window_bytes + sum(trace.segments[i].size_bytes for i in trace.used if i not in streamed)
    assert pass_s(trace, schedule) >= min_pass_s(*groups(trace), budget_bytes, trace.bandwidth_bps) * (1 - NEAR)


def test_what_is_computed_after_a_use_is_done_needs_no_memory() -> None:
    # The other group arrives in the 2 seconds in which nothing is held: 20 bytes at most.
    trace = chain([100, 100], 3.0, bandwidth_bps=10.0)
    trace = replace(trace, uses=tuple(replace(use, held_s=1.0) for use in trace.uses))
    sizes, compute_s = groups(trace)
    assert (list(sizes), list(compute_s)) == ([100, 0, 100, 0], [1, 2, 1, 2])
    schedule = make_schedule(trace, frozenset({0, 1}), 100)
    assert schedule is not None
    assert pass_s(trace, schedule) == min_pass_s(sizes, compute_s, 100, 10.0) == 22


def test_the_bound_is_reached_where_sizes_allow() -> None:
    # Two equal groups of which one fits beside nothing: both are loaded in turn, and nothing can be ahead.
    trace = chain([100, 100], 3.0, bandwidth_bps=10.0)
    schedule = make_schedule(trace, frozenset({0, 1}), 100)
    assert schedule is not None
    assert pass_s(trace, schedule) == min_pass_s(*groups(trace), 100, 10.0) == 26


def test_a_segment_counts_at_its_first_use_and_without_padding() -> None:
    trace = replace(chain([10, 20, 30], 1.0), segments=tuple(Segment(f"w{n}", 10 * n, 64, 64) for n in range(3)))
    trace = replace(trace, uses=(Use((2,), 1.0), Use((1, 2), 2.0), Use((1, 0), 3.0)))
    sizes, compute_s = groups(trace)
    assert list(sizes) == [20, 10, 0]
    assert list(compute_s) == [1, 2, 3]


def test_slots_have_no_bytes_and_gathering_no_compute() -> None:
    slot = Segment("slot", 50, 50, 1, is_slot=True)
    trace = Trace((slot, Segment("wte", 900, 900, 1)), (Use((0,), 4.0, table=1, gathered_bytes=7),), 1.0)
    sizes, compute_s = groups(trace)
    assert list(sizes) == [0]
    assert list(compute_s) == [0]
