"""JSON that somebody else has written: parsed only where what Python makes of it stays small."""

from __future__ import annotations

import json
from typing import Any

MOST_BYTES = 100_000_000
"""What a document may take: as much as the header of a safetensors file."""

MOST_VALUES = 1 << 21
"""Values that a document may have, of which Python takes up to 100 bytes for each. The header of a safetensors file has
nine of them for a tensor, and the group of a store one or two: these are enough for 200 thousand tensors."""


def parse(content: bytes) -> Any:
    """Returns what a document says.

    Raises:
        ValueError: If it is not JSON, or has too many values.
        RecursionError: If it is nested too deep.
    """
    check_values(content)
    return json.loads(content)


def check_values(content: bytes) -> None:
    """Raises a ValueError where a document has too many values: by its commas and brackets, without parsing it."""
    if len(content) <= MOST_VALUES:
        return
    n_values = sum(content.count(mark) for mark in (b",", b"[", b"{"))
    if n_values > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES} values")
