"""Which tables a plan has whole, and of which it gathers rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litrt.plan import make_plan
from litrt.tables import with_room
from litrt.trace import Segment, Trace, Use


def mixture(gathered: list[int], size: int = 1_000, *, n_dense: int = 2) -> Trace:
    """Returns a pass over tables of `size` bytes of which so many are gathered, each behind a weight of 100 bytes."""
    n = len(gathered)
    segments = [Segment(f"table {i}", size, size, 1) for i in range(n)]
    segments += [Segment(f"dense {i}", 100, 100, 1) for i in range(n_dense)]
    segments.append(Segment("(rows of tables)", 50, 50, 1, is_slot=True))
    uses = [Use((n + i,), 1.0) for i in range(n_dense)]
    for table, n_bytes in enumerate(gathered):
        uses.append(
            Use((n + n_dense,), 0.5 + n_bytes / 100, table=table, gathered_bytes=n_bytes, gathered_s=n_bytes / 100)
        )
    return Trace(tuple(segments), tuple(uses), 100.0)


def test_the_tables_that_stay_are_those_of_which_most_is_gathered() -> None:
    trace = mixture([40, 300, 10, 200])
    plan = make_plan(trace, 2_500)
    assert {index for index in plan.resident if index < 4} == {1, 3}
    assert plan.tables == (0, 2)
    assert plan.gathered_bytes == plan.streamed_bytes == 50


def test_as_many_tables_stay_as_fit() -> None:
    trace = mixture([60] * 8)
    for n_fit in range(9):
        budget_bytes = int((n_fit * 1_000 + 260) / 0.97) + 1
        plan = make_plan(trace, budget_bytes)
        assert len(plan.tables) == 8 - n_fit
        assert plan.streamed_bytes == (8 - n_fit) * 60


def test_a_table_of_which_little_is_needed_is_never_streamed_whole() -> None:
    trace = replace(mixture([60]), bandwidth_bps=1e9)  # reading all of it would take no time, gathering does
    plan = make_plan(trace, 1_000)
    assert plan.tables == (0,)


def test_a_table_does_not_take_the_room_of_weights_that_would_be_read_in_its_place() -> None:
    # Whole, it spares a gather of a tenth of a second, and nine dense weights stream, hidden by compute.
    trace = mixture([10], n_dense=10)
    trace = replace(trace, uses=tuple(replace(use, compute_s=use.compute_s + 5) for use in trace.uses))
    plan = make_plan(trace, 1_200)
    assert plan.tables == (0,)
    assert plan.streamed_bytes == 10


def test_a_table_of_which_most_is_needed_is_fetched_ahead() -> None:
    # Gathered, it takes nine seconds in which nothing computes; whole, one that is hidden.
    trace = replace(mixture([900], n_dense=40), bandwidth_bps=1_000.0)
    plan = make_plan(trace, 1_150)
    assert plan.tables == ()
    assert plan.pass_s < 42 < trace.compute_s


@given(st.lists(st.integers(1, 1_000), min_size=1, max_size=6), st.integers(260, 9_000))
def test_no_plan_is_slower_than_one_that_gathers_from_all_tables(gathered: list[int], budget_bytes: int) -> None:
    trace = mixture(gathered)
    plan = make_plan(trace, budget_bytes)
    assert plan.pass_s <= trace.compute_s + 1e-9  # the other weights all fit
    for table, n_bytes in enumerate(gathered):
        assert table in plan.tables or table in plan.resident or 2 * n_bytes >= 1_000


def test_there_is_room_for_rows_as_far_as_the_budget_allows() -> None:
    trace = mixture([10])
    assert with_room(trace, 400, 60, 1_000).segments[-1].size_bytes == 400
    assert with_room(trace, 400, 60, 399).segments[-1].size_bytes == 60
    without = with_room(trace, 400, 110, 105)
    assert all(3 not in use.segments for use in without.uses)
    assert without.largest_use_bytes == 100


@pytest.mark.parametrize("measured_s", [0.0, 7.0])
def test_rows_that_were_there_already_in_the_warm_up_cost_their_time(measured_s: float) -> None:
    trace = mixture([300])
    use = replace(trace.uses[-1], compute_s=0.5 + measured_s, gathered_s=measured_s)
    plan = make_plan(replace(trace, uses=(*trace.uses[:-1], use)), 300)
    assert plan.pass_s == pytest.approx(2.0 + 0.5 + max(measured_s, 3.0))
