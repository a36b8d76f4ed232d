"""Byte counts: what is read, what is refused and in which words, and how they are printed."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litrt.errors import BudgetError, LitrtError
from litrt.units import format_bytes, parse_bytes

HOW_TO = "use an int of bytes, '6GB' (10**9), '6GiB' (2**30), '40%', 'min' or 'auto'."


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("6GB", 6 * 10**9),
        ("6GiB", 6 * 2**30),
        ("1.5 MB", 1_500_000),
        ("2kB", 2_000),
        ("2KiB", 2_048),
        ("3TB", 3 * 10**12),
        ("3 tib", 3 * 2**40),
        ("0.5MiB", 2**19),
        (".25gb", 250_000_000),
        ("7.B", 7),
        ("4096", 4096),
        ("  12 gb ", 12 * 10**9),
    ],
)
def test_decimal_and_binary_units_are_read_in_any_case_and_spacing(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


def test_fractions_are_exact_where_floats_are_not() -> None:
    assert int(1.005 * 10**9) == 1_004_999_999
    assert parse_bytes("1.005GB") == 1_005_000_000


def test_a_part_of_a_byte_is_dropped_so_that_no_budget_is_exceeded() -> None:
    assert parse_bytes("1.9999kB") == 1999
    assert parse_bytes("33%", of_bytes=100_001) == 33_000


@given(st.integers(1, 10**15))
@settings(deadline=None)
def test_an_int_and_its_digits_are_bytes(n_bytes: int) -> None:
    assert parse_bytes(n_bytes) == parse_bytes(str(n_bytes)) == parse_bytes(f"{n_bytes} b") == n_bytes


@given(st.integers(1, 300), st.integers(100, 10**13))
@settings(deadline=None)
def test_a_percentage_is_a_share_of_the_model(percent: int, of_bytes: int) -> None:
    assert parse_bytes(f"{percent}%", of_bytes=of_bytes) == percent * of_bytes // 100


@pytest.mark.parametrize(
    "value",
    [
        "6 gigs",
        "",
        "GB",
        "%",
        "-5GB",
        "+5GB",
        "1e9",
        "6,5GB",
        "6GB now",
        "6 G B",
        "0x10",
        "1_000",
        "٦GB",
        "nan",
        "auto",
    ],
)
def test_an_unreadable_text_is_named_with_what_to_type(value: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(f"cannot read budget {value!r}: {HOW_TO}")) as caught:
        parse_bytes(value, of_bytes=10**9)
    assert caught.value.budget_bytes is None
    assert caught.value.needed_bytes is None


@pytest.mark.parametrize("value", [True, False, None, 6e9, 1.5, b"6GB", ["6GB"], Decimal(6)])
def test_other_types_are_unreadable(value: object) -> None:
    with pytest.raises(BudgetError, match=re.escape(f"cannot read budget {value!r}: {HOW_TO}")):
        parse_bytes(value)  # type: ignore[arg-type]


def test_a_percentage_of_nothing_known_is_unreadable() -> None:
    with pytest.raises(BudgetError, match=re.escape("cannot read budget '40%'")):
        parse_bytes("40%")


@pytest.mark.parametrize(("value", "n_bytes"), [(0, 0), (-3, -3), ("0GB", 0), ("0.4B", 0), ("0%", 0), ("0.001%", 0)])
def test_a_budget_that_is_not_positive_is_named_with_its_bytes(value: int | str, n_bytes: int) -> None:
    message = f"budget {value!r} is {n_bytes} bytes: give a positive number of bytes."
    with pytest.raises(BudgetError, match=re.escape(message)) as caught:
        parse_bytes(value, of_bytes=1000)
    assert caught.value.budget_bytes == n_bytes


def test_the_error_is_one_that_callers_guess() -> None:
    with pytest.raises(ValueError, match="cannot read budget") as caught:
        parse_bytes("lots")
    assert isinstance(caught.value, LitrtError)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 bytes"),
        (1, "1 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (12_345, "12.35 kB"),
        (99_990, "99.99 kB"),
        (100_000, "0.10 MB"),
        (1_500_000, "1.50 MB"),
        (99_990_000, "99.99 MB"),
        (100_000_000, "0.10 GB"),
        (830_000_000, "0.83 GB"),
        (16_060_000_000, "16.06 GB"),
        (3.5e12, "3500.00 GB"),
    ],
)
def test_sizes_are_printed_in_decimal_units(n_bytes: float, text: str) -> None:
    assert format_bytes(n_bytes) == text


@given(st.integers(1000, 10**14))
@settings(deadline=None)
def test_a_printed_size_reads_back_to_its_last_digit(n_bytes: int) -> None:
    text = format_bytes(n_bytes)
    last_digit_bytes = parse_bytes("0.01 " + text.split()[1])
    assert abs(parse_bytes(text) - n_bytes) <= last_digit_bytes / 2
