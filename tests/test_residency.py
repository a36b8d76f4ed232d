"""What stays: compared with every subset on short traces, and with simpler choices.

The choice among indivisible sizes is NP-hard. Of a handful of segments every subset is tried; beyond, the search is a
heuristic: water-filling over whole segments, then random swaps. It can miss the best subset where several segments
would have to change places at once. What it may lose is stated in each test beside what was measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import chain, execute, steady_pass_s, traces

from litrt.layout import best_layout
from litrt.plan import make_plan
from litrt.residency import choose_streamed, water_fill
from litrt.schedule import READ_SHARE, Schedule, best_schedule, make_schedule, pass_s, step_by_step
from litrt.trace import Segment, Trace, Use


def short_trace(seed: int, *, several_uses: bool, n_segments: int | None = None) -> tuple[Trace, int]:
    """Returns a trace of 5 to 7 segments, of which some are used twice, and a budget that does not hold all."""
    rng = random.Random(seed)
    n_segments = n_segments or rng.randint(5, 7)
    segments = tuple(
        Segment(f"w{n}", n_bytes, n_bytes, 1) for n in range(n_segments) for n_bytes in [rng.randint(1, 60)]
    )
    order = list(range(n_segments))
    if several_uses:
        order += rng.sample(order, 2)
        rng.shuffle(order)
    uses = []
    while order:
        n_together = rng.choice([1, 1, 2])
        uses.append(Use(tuple(dict.fromkeys(order[:n_together])), rng.choice([0.0, 1.0, 4.0])))
        order = order[n_together:]
    trace = Trace(segments, tuple(uses), rng.choice([8.0, 32.0]), rng.choice([0.0, 0.0, 0.5]))
    return trace, rng.randint(trace.largest_use_bytes, trace.used_bytes - 1)


def fastest_pass_s(trace: Trace, budget_bytes: int, *, placed: bool = False) -> float:
    """Returns the seconds of the best of all resident sets, in a window without gaps or with fixed addresses."""
    found = []
    for n_kept in range(len(trace.used) + 1):
        for kept in combinations(trace.used, n_kept):
            room_bytes = budget_bytes - sum(trace.segments[index].size_bytes for index in kept)
            schedule = best_schedule(trace, frozenset(trace.used) - set(kept), room_bytes)
            if schedule is not None and placed:
                schedule = best_layout(trace, schedule, room_bytes)
            if schedule is not None:
                found.append(pass_s(trace, schedule))
    return min(found)


def cost_s(trace: Trace, schedule: Schedule) -> float:
    """Returns what choices are compared by: the seconds of a pass, and what reading takes from them."""
    n_bytes = sum(trace.segments[load.segment].size_bytes for load in schedule.loads)
    return pass_s(trace, schedule) + READ_SHARE * n_bytes / trace.bandwidth_bps


def prefix(trace: Trace, budget_bytes: int, of: Callable[[Trace, Schedule], float]) -> float:
    """Returns the seconds, or the cost, of the best choice that keeps the first segments and streams the others."""
    found = []
    for n_kept in range(len(trace.used) + 1):
        room_bytes = budget_bytes - sum(trace.segments[index].size_bytes for index in trace.used[:n_kept])
        schedule = make_schedule(trace, frozenset(trace.used[n_kept:]), room_bytes)
        placed = best_layout(trace, schedule, room_bytes) if schedule is not None else None
        if placed is not None:
            found.append(of(trace, placed))
    return min(found)


def chosen_pass_s(trace: Trace, budget_bytes: int) -> float:
    return pass_s(trace, choose_streamed(trace, budget_bytes, 0)[1])


def planned_pass_s(trace: Trace, budget_bytes: int) -> float:
    return make_plan(trace, budget_bytes).pass_s


@pytest.mark.parametrize("several_uses", [False, True])
def test_the_choice_is_nearly_always_the_best_subset(several_uses: bool) -> None:
    # Measured over 60 traces: 46 and 52 equal to the best, 1.0 and 0.3 % slower on average, 13 % at worst.
    ratios = []
    for seed in range(12):
        trace, budget_bytes = short_trace(seed, several_uses=several_uses, n_segments=10)
        ratios.append(chosen_pass_s(trace, budget_bytes) / fastest_pass_s(trace, budget_bytes, placed=True))
    assert np.mean(ratios) <= 1.02
    assert max(ratios) <= 1.15


@pytest.mark.parametrize("several_uses", [False, True])
def test_a_plan_loses_to_the_best_subset_only_what_fixed_addresses_cost(several_uses: bool) -> None:
    # The best subset is allowed memory without gaps. With 5 to 7 segments a gap can cost a whole one:
    # measured over 120 traces, 4 % slower on average, 29 % at worst.
    ratios = []
    for seed in range(25):
        trace, budget_bytes = short_trace(seed, several_uses=several_uses)
        ratios.append(planned_pass_s(trace, budget_bytes) / fastest_pass_s(trace, budget_bytes))
    assert min(ratios) >= 1 - 1e-9
    assert np.mean(ratios) <= 1.06
    assert max(ratios) <= 1.35


@given(traces(nested=False), st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_chosen_fits_and_can_be_executed(trace: Trace, data: st.DataObject) -> None:
    budget_bytes = data.draw(st.integers(trace.largest_use_bytes, trace.used_bytes), label="budget_bytes")
    streamed, schedule = choose_streamed(trace, budget_bytes, 0)
    resident = frozenset(trace.used) - streamed
    window_bytes = budget_bytes - sum(trace.segments[index].size_bytes for index in resident)
    assert streamed <= frozenset(trace.used)
    assert window_bytes >= 0
    assert {load.segment for load in schedule.loads} == streamed
    execute(trace, resident, schedule.loads, len(schedule.steps), window_bytes)


@given(traces(max_segments=6, max_uses=8, several_uses=False, nested=False), st.data())
@settings(max_examples=60, deadline=None)
def test_the_choice_never_costs_more_than_streaming_everything(trace: Trace, data: st.DataObject) -> None:
    budget_bytes = data.draw(st.integers(trace.largest_use_bytes, trace.used_bytes), label="budget_bytes")
    everything = best_schedule(trace, frozenset(trace.used), budget_bytes)
    assert everything is not None
    everything = best_layout(trace, everything, budget_bytes) or step_by_step(trace, frozenset(trace.used))
    assert cost_s(trace, choose_streamed(trace, budget_bytes, 0)[1]) <= cost_s(trace, everything) * (1 + 1e-3)


def test_the_choice_never_costs_more_than_keeping_a_prefix() -> None:
    for seed in range(40):
        trace, budget_bytes = short_trace(seed, several_uses=False)
        chosen_s = cost_s(trace, choose_streamed(trace, budget_bytes, 0)[1])
        assert chosen_s <= prefix(trace, budget_bytes, cost_s) * (1 + 1e-3)


def test_of_what_hides_as_little_is_read_as_possible() -> None:
    # Compute hides all that could stream; what a budget holds is not read all the same.
    trace = chain([100] * 24, 10.0, bandwidth_bps=62.5)
    for budget_bytes in (600, 1200, 2000):
        streamed, schedule = choose_streamed(trace, budget_bytes, 0)
        assert pass_s(trace, schedule) == pytest.approx(trace.compute_s)
        assert sum(trace.segments[index].size_bytes for index in streamed) <= trace.used_bytes - budget_bytes + 200


def test_what_streams_is_spread_so_that_all_of_it_hides() -> None:
    # Half of the model fits. A prefix leaves compute that nothing moves under, and then transfers that wait.
    trace = chain([100] * 24, 1.0, bandwidth_bps=62.5)
    budget_bytes = 1200
    assert prefix(trace, budget_bytes, pass_s) >= 1.05 * trace.compute_s
    assert chosen_pass_s(trace, budget_bytes) == pytest.approx(trace.compute_s)


@pytest.mark.parametrize("n_kept", [1, 2, 7, 15])
def test_equal_sizes_without_compute_stream_all_but_one_less_than_fit(n_kept: int) -> None:
    # Belady's rule loads n (n - k) / (n - 1) of n, of which k fit. A fixed resident set loads n - k + 1: one more at
    # most, the slot that what streams goes through.
    trace = chain([100] * 16, 0.0)
    streamed, _ = choose_streamed(trace, 100 * n_kept, 0)
    assert len(streamed) == 16 - n_kept + 1
    assert 16 * (16 - n_kept) / 15 <= len(streamed) <= 16 * (16 - n_kept) / 15 + 1


def test_what_is_used_often_stays() -> None:
    order = [0, 1, 9, 2, 3, 9, 4, 5, 9, 6, 7, 9, 8]
    segments = tuple(Segment(f"w{number}", 100, 100, 1) for number in range(10))
    trace = Trace(segments, tuple(Use((index,), 0.1) for index in order), 100.0)
    streamed, _ = choose_streamed(trace, 400, 0)
    assert 9 not in streamed
    assert len(streamed) < 9


def test_what_is_too_small_to_be_worth_a_read_stays() -> None:
    # So many that random swaps alone do not bring every small one in.
    trace = replace(chain([1000, 2] * 100, 0.0, bandwidth_bps=1000.0), latency_s=0.5)
    streamed, _ = choose_streamed(trace, 30_000, 0)
    assert all(trace.segments[index].nbytes == 1000 for index in streamed)


def test_everything_stays_where_everything_fits() -> None:
    trace = chain([10, 20, 30], 1.0)
    streamed, schedule = choose_streamed(trace, 60, 0)
    assert streamed == frozenset()
    assert schedule.loads == ()
    assert choose_streamed(trace, 59, 0)[0] != frozenset()


def test_a_budget_without_room_to_spare_streams_everything() -> None:
    trace = chain([10, 40, 30], 1.0)
    streamed, schedule = choose_streamed(trace, 39, 0)
    assert streamed == frozenset({0, 1, 2})
    assert all(load.offset is None for load in schedule.loads), (
        "loaded step by step, which fails where one does not fit"
    )


def test_equal_traces_get_equal_choices_and_the_seed_is_all_the_chance_there_is() -> None:
    trace, budget_bytes = short_trace(5, several_uses=True)
    random.seed(1)
    first = choose_streamed(trace, budget_bytes, 3)
    random.seed(2)
    again = choose_streamed(replace(trace), budget_bytes, 3)
    assert first == again


def test_water_fills_to_one_level_less_what_hides() -> None:
    sizes, hidden = np.array([100.0, 60.0, 10.0, 100.0]), np.array([0.0, 20.0, 0.0, 90.0])
    filled = water_fill(sizes, hidden, 200.0)
    assert filled is not None
    level = filled[0]  # nothing hides there and it is not full
    assert 0 < level < 100
    assert filled == pytest.approx(np.clip(level - hidden, 0, sizes), abs=1e-6)
    assert filled.sum() - level == pytest.approx(sizes.sum() - 200.0, abs=1e-6)


def test_no_level_is_found_where_nothing_would_be_left_for_the_window() -> None:
    assert water_fill(np.array([100.0, 100.0]), np.zeros(2), 50.0) is None


def test_the_seconds_of_the_choice_are_those_of_many_passes() -> None:
    for seed in range(20):
        trace, budget_bytes = short_trace(seed, several_uses=True)
        streamed, schedule = choose_streamed(trace, budget_bytes, 0)
        assert pass_s(trace, schedule) == pytest.approx(
            steady_pass_s(trace, frozenset(trace.used) - streamed, schedule), rel=1e-9
        )
