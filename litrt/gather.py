"""Which blocks of a table have the rows that are wanted, and where each row is once these are read side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from litrt.blocks import Blocks, Bytes, Ints, merged


@dataclass(frozen=True)
class Rows:
    """Rows of a contiguous view of a table, by number.

    Attributes:
        first: The element of the table that the view begins at.
        n_elements: Elements of a row of the view.
        numbers: Rows of the view that are wanted, in order, as often as they are wanted.
    """

    first: int
    n_elements: int
    numbers: Ints


@dataclass(frozen=True)
class Batch:
    """Rows that are gathered together.

    Attributes:
        ranges: Elements of the table to read, of whole blocks, sorted and apart.
        wanted: Which of the wanted rows these have.
        sources: Where each of them begins, in elements, when the ranges lie side by side.
    """

    ranges: tuple[tuple[int, int], ...]
    wanted: Ints
    sources: Ints

    @property
    def n_elements(self) -> int:
        """Elements that are read."""
        return sum(stop - start for start, stop in self.ranges)


def batches(rows: Rows, blocks: Blocks, itemsize: int, max_bytes: int) -> Iterator[Batch]:
    """Yields what to read of a table, each block once, in batches of at most `max_bytes` or one row.

    Args:
        rows: What is wanted; the rows have elements.
        blocks: What can be read alone.
        itemsize: Bytes of an element, as it is stored.
        max_bytes: Bytes to hold at once, as they are stored.
    """
    unique, inverse = np.unique(rows.numbers, return_inverse=True)
    starts = (rows.first + unique * rows.n_elements) * itemsize
    lows, highs = blocks.covering(starts, starts + rows.n_elements * itemsize)
    cuts = [0]
    held = end = 0
    for number, (low, high) in enumerate(zip(lows.tolist(), highs.tolist(), strict=True)):
        if low >= end and held and held + high - low > max_bytes:
            cuts.append(number)
            held = 0
        held += max(0, high - max(low, end))
        end = max(end, high)
    order = np.argsort(inverse, kind="stable")
    places = np.searchsorted(inverse[order], [*cuts, len(unique)])
    for number, cut in enumerate(cuts):
        if cut == len(unique):
            return
        until = cuts[number + 1] if number + 1 < len(cuts) else len(unique)
        ranges = merged(lows[cut:until], highs[cut:until])
        begins = np.array([start for start, _ in ranges])
        before = np.concatenate([[0], np.cumsum([stop - start for start, stop in ranges])])
        wanted = order[places[number] : places[number + 1]]
        found = np.searchsorted(begins, starts[cut:until], side="right") - 1
        at = (before[found] + starts[cut:until] - begins[found]) // itemsize
        yield Batch(
            tuple((start // itemsize, stop // itemsize) for start, stop in ranges), wanted, at[inverse[wanted] - cut]
        )


def rows_of(table: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Returns rows of a table that is there whole, one after the other."""
    n_rows = (table.numel() - rows.first) // max(rows.n_elements, 1)
    view = table.as_strided((n_rows, rows.n_elements), (rows.n_elements, 1), rows.first)
    return view.index_select(0, torch.from_numpy(rows.numbers)).reshape(-1)


def copy_rows(batch: Batch, source: Bytes, dest: Bytes, itemsize: int) -> None:
    """Copies the rows of a batch to their places.

    Args:
        batch: Which rows.
        source: What was read for it.
        dest: Of shape (wanted rows, bytes of a row).
        itemsize: Bytes of an element, as it is served.
    """
    row_bytes = dest.shape[1]
    starts = batch.sources * itemsize
    unit = math.gcd(row_bytes, len(source), int(np.gcd.reduce(starts)))
    units = source.reshape(-1, unit)
    numbers = starts // unit
    if unit != row_bytes:  # rows of a view that are not rows of the table
        numbers = (numbers[:, None] + np.arange(row_bytes // unit)).reshape(-1)
    if len(batch.wanted) < len(dest):
        dest[batch.wanted] = units[numbers].reshape(-1, row_bytes)
        return
    ordered = np.empty((len(dest), len(numbers) // len(dest)), dtype=np.int64)
    ordered[batch.wanted] = numbers.reshape(ordered.shape)
    np.take(units, ordered.reshape(-1), axis=0, out=dest.reshape(-1, unit), mode="clip")
