"""Byte counts as people write them: `"6GB"` is 6e9, `"6GiB"` is 6 * 2**30, `"40%"` is a share of the model.

And what messages say: byte counts and names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from litrt.errors import BudgetError

_FACTORS = {
    "": 1,
    "b": 1,
    "byte": 1,
    "bytes": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z%]*)\s*", re.ASCII)


def parse_bytes(value: int | str, *, of_bytes: int | None = None) -> int:
    """Returns the bytes that `value` stands for.

    Args:
        value: An int of bytes, or a string: `"6GB"` (10**9), `"6GiB"` (2**30), `"1.5 MB"`, `"40%"`.
        of_bytes: What a percentage is a share of; without it a percentage is an error.

    Raises:
        BudgetError: If `value` is not one of these, or is not positive.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise _unreadable(value)
    if isinstance(value, int):
        n_bytes = value
    else:
        match = _NUMBER.fullmatch(value)
        if match is None:
            raise _unreadable(value)
        number, unit = Decimal(match[1]), match[2].lower()
        if unit == "%":
            if of_bytes is None:
                raise _unreadable(value)
            n_bytes = int(number * of_bytes / 100)
        elif unit in _FACTORS:
            n_bytes = int(number * _FACTORS[unit])
        else:
            raise _unreadable(value)
    if n_bytes <= 0:
        raise BudgetError(
            f"budget {value!r} is {n_bytes} bytes: give a positive number of bytes.", budget_bytes=n_bytes
        )
    return n_bytes


def format_bytes(n_bytes: float) -> str:
    """Returns `n_bytes` in a decimal unit, MB from 0.1 MB on and GB from 0.1 GB on.

    >>> format_bytes(830_000_000)
    '0.83 GB'
    """
    if n_bytes >= 10**8:
        return f"{n_bytes / 10**9:.2f} GB"
    if n_bytes >= 10**5:
        return f"{n_bytes / 10**6:.2f} MB"
    if n_bytes >= 10**3:
        return f"{n_bytes / 10**3:.2f} kB"
    return f"{n_bytes:.0f} bytes"


def format_names(names: Sequence[str]) -> str:
    """Returns the first of some names, and how many more there are.

    >>> format_names(["a", "b", "c"])
    "'a' and 2 more"
    """
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]!r}{more}"


def _unreadable(value: object) -> BudgetError:
    return BudgetError(
        f"cannot read budget {value!r}: use an int of bytes, '6GB' (10**9), '6GiB' (2**30), '40%', 'min' or 'auto'."
    )
