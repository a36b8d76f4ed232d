"""The place of a pass in the plan: followed when it repeats, found again after surprises, never taken back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from litrt.cursor import Cursor

A, B, C, D, E, X = (0,), (1,), (2,), (3, 4), (5,), (9,)
steps_of_a_pass = st.lists(st.sampled_from([A, B, C, D]), min_size=1, max_size=6)
accesses = st.lists(st.sampled_from([A, B, C, D, X, None]), max_size=30)


@given(steps_of_a_pass, st.integers(1, 3))
@settings(deadline=None)
def test_a_pass_that_repeats_is_matched_step_by_step(steps: list[tuple[int, ...]], n_passes: int) -> None:
    cursor = Cursor(steps)
    for number in range(n_passes * len(steps)):
        assert cursor.step == number % len(steps)
        assert cursor.expected == steps[cursor.step]
        assert cursor.match(steps[number % len(steps)]) == number
    assert cursor.position == n_passes * len(steps)
    assert cursor.n_mismatches == 0


def test_one_surprise_costs_one_mismatch_and_no_position() -> None:
    cursor = Cursor([A, B, C, D])
    assert cursor.match(A) == 0
    assert cursor.match(X) is None
    assert cursor.position == 1
    assert [cursor.match(segments) for segments in (B, C, D)] == [1, 2, 3]
    assert cursor.n_mismatches == 1


def test_a_known_step_out_of_turn_is_a_surprise_and_not_a_jump() -> None:
    cursor = Cursor([A, B, C, D])
    assert cursor.match(C) is None
    assert cursor.position == 0
    assert [cursor.match(segments) for segments in (A, B, C, D)] == [0, 1, 2, 3]


def test_two_steps_in_a_row_elsewhere_move_the_position_forward() -> None:
    cursor = Cursor([A, B, C, D, E])
    assert cursor.match(A) == 0
    assert cursor.match(C) is None
    assert cursor.match(D) == 3
    assert cursor.match(E) == 4
    assert cursor.n_mismatches == 1


def test_a_jump_passes_into_the_next_pass() -> None:
    cursor = Cursor([A, B, C, D])
    assert [cursor.match(segments) for segments in (A, B, C)] == [0, 1, 2]
    # The pass ends early: A and B of the next one come in place of D.
    assert cursor.match(A) is None
    assert cursor.match(B) == 5
    assert cursor.step == 2


def test_a_jump_goes_to_the_nearest_occurrence() -> None:
    cursor = Cursor([A, B, C, E, B, D, B, C])
    assert [cursor.match(segments) for segments in (A, B, C)] == [0, 1, 2]
    assert cursor.match(B) is None
    assert cursor.match(D) == 5  # behind the B at 4, not the one at 6


def test_what_was_elsewhere_is_forgotten_once_the_expected_step_comes() -> None:
    cursor = Cursor([A, B, C, D, E])
    assert cursor.match(C) is None
    assert cursor.match(A) == 0
    assert cursor.match(D) is None
    assert cursor.position == 1


def test_a_second_surprise_replaces_the_first() -> None:
    cursor = Cursor([A, B, C, D, E])
    assert cursor.match(C) is None
    assert cursor.match(X) is None
    assert cursor.match(D) is None
    assert cursor.match(E) == 4


def test_a_part_of_a_step_is_not_the_step() -> None:
    cursor = Cursor([D, A])
    assert cursor.match((3,)) is None
    assert cursor.match((4, 3)) is None
    assert cursor.match((3, 4)) == 0


def test_a_pass_begins_at_its_first_step() -> None:
    cursor = Cursor([A, B, C])
    cursor.begin_pass()
    assert cursor.position == 0
    cursor.match(A)
    cursor.begin_pass()  # the last pass ended after its first step
    assert cursor.position == 3
    assert [cursor.match(segments) for segments in (A, B, C)] == [3, 4, 5]
    cursor.begin_pass()  # a whole pass has just ended
    assert cursor.position == 6


def test_a_pass_begins_without_what_was_elsewhere() -> None:
    cursor = Cursor([A, B, C, D])
    assert cursor.match(B) is None
    cursor.begin_pass()
    assert cursor.match(C) is None
    assert cursor.position == 0


@given(steps_of_a_pass, accesses)
@settings(deadline=None)
def test_the_position_never_goes_backwards_nor_past_a_pass(
    steps: list[tuple[int, ...]], asked: list[tuple[int, ...] | None]
) -> None:
    cursor = Cursor(steps)
    n_unmatched = 0
    for segments in asked:
        before = cursor.position
        if segments is None:
            cursor.begin_pass()
            assert cursor.position % len(steps) == 0
        elif (found := cursor.match(segments)) is None:
            n_unmatched += 1
            assert cursor.position == before
        else:
            assert steps[found % len(steps)] == segments
            assert cursor.position == found + 1
        assert before <= cursor.position <= before + len(steps) + 1
    assert cursor.n_mismatches == n_unmatched


@given(steps_of_a_pass, st.lists(st.sampled_from([A, B, C, D, X]), max_size=10))
@settings(deadline=None)
def test_a_whole_pass_is_matched_again_after_any_surprises(
    steps: list[tuple[int, ...]], surprises: list[tuple[int, ...]]
) -> None:
    cursor = Cursor(steps)
    for segments in surprises:
        cursor.match(segments)
    cursor.begin_pass()
    start = cursor.position
    assert [cursor.match(segments) for segments in steps] == list(range(start, start + len(steps)))


def test_without_steps_nothing_is_expected() -> None:
    cursor = Cursor([])
    cursor.begin_pass()
    assert cursor.expected == ()
    assert cursor.step == 0
    assert cursor.match((1,)) is None
    assert cursor.match((1,)) is None
    assert cursor.n_mismatches == 2
