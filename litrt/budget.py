"""From what the user asked for to bytes: how much the arena gets, and how tightly it packs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from litrt.device import Device
from litrt.errors import BudgetError
from litrt.layout import align_up
from litrt.memory import available_bytes
from litrt.tensors import TensorInfo
from litrt.trace import Segment
from litrt.units import format_bytes, parse_bytes

PAGE_BYTES = 4096
CACHE_LINE_BYTES = 64

_LARGE_BYTES = 256 << 10
"""Tensors from this size on lie on a page, where direct reads can put them; smaller ones on a cache line."""

_AUTO_SHARE = 0.5
"""Share of the available memory that `"auto"` takes; the rest is for activations and everybody else."""


@dataclass(frozen=True)
class Budget:
    """A budget, settled.

    Attributes:
        budget_bytes: What all weight bytes held at any moment may not exceed.
        arena_bytes: What of it is the arena; the rest is scratch.
        scratch_bytes: What reads need beside the arena.
        segments: The weights, as they lie in the arena.
        growable: Start with no arena, and let it grow to what the largest use needs.
        is_auto: What it grows to is for the warm-up only: after that, it is what the device has left.
    """

    budget_bytes: int
    arena_bytes: int
    scratch_bytes: int
    segments: tuple[Segment, ...]
    growable: bool = False
    is_auto: bool = False

    @property
    def footprint_bytes(self) -> int:
        """Arena bytes of all segments."""
        return sum(segment.size_bytes for segment in self.segments)

    @property
    def most_bytes(self) -> int:
        """Bytes of the largest arena that any budget can ask for: every weight, and its padding."""
        return max(self.arena_bytes, sum(segment.size_bytes + PAGE_BYTES for segment in self.segments))


def requested_bytes(budget: int | str, total_bytes: int, held_bytes: int = 0) -> int | None:
    """Returns the bytes that `budget` asks for on the host, of a model of `total_bytes`; None for `"min"`.

    Of `held_bytes` a runtime has taken already, which is available to itself.

    Raises:
        BudgetError: If `budget` cannot be read.
    """
    if budget == "min":
        return None
    if budget == "auto":
        return int((available_bytes() + held_bytes) * _AUTO_SHARE)
    return parse_bytes(budget, of_bytes=total_bytes)


def settle(
    budget: int | str,
    infos: Sequence[TensorInfo],
    scratch_bytes: int,
    slot_bytes: dict[str, int],
    *,
    of_rows: Set[str] | None = None,
    stored: Sequence[TensorInfo] | None = None,
    device: Device | None = None,
) -> Budget:
    """Returns the bytes of `budget` for the weights `infos`.

    Args:
        budget: As in `litrt.Runtime`.
        infos: The distinct weights of the model.
        scratch_bytes: What loads need beside the arena.
        slot_bytes: Names of those of which parts may be there, to the bytes of what is there at once at least.
        of_rows: Those of them of which operators take rows, and never all; by default each.
        stored: The weights as they are in the store, where some are served in another dtype.
        device: Where the arena is; by default in memory of the host.

    Raises:
        BudgetError: If `budget` cannot be read, or cannot hold the largest weight.
    """
    of_rows = slot_bytes.keys() if of_rows is None else of_rows
    total_bytes = sum(info.nbytes for info in infos)
    on_host = device is None or device.is_host
    segments = as_segments(infos, stored, None if on_host or device is None else device.align_bytes)
    # Rows of a matrix come by way of the host, so that a device needs no room for them.
    by_host = set() if on_host else {info.name for info in infos if info.name in of_rows and len(info.shape) == 2}
    slot = slot_segment(n_bytes for name, n_bytes in slot_bytes.items() if name not in by_host)
    footprint_bytes = sum(segment.size_bytes for segment in segments)
    is_direct = all(info.direct for info in infos)
    if budget == "min":
        return Budget(scratch_bytes, 0, scratch_bytes, segments + slot, growable=True)
    if budget == "auto" and not on_host:
        return Budget(scratch_bytes, 0, scratch_bytes, segments + slot, growable=True, is_auto=True)
    budget_bytes = requested_bytes(budget, total_bytes)
    assert budget_bytes is not None
    if budget_bytes >= footprint_bytes + scratch_bytes:
        return Budget(footprint_bytes + scratch_bytes, footprint_bytes, scratch_bytes, segments + slot)
    if not on_host and budget_bytes >= total_bytes + scratch_bytes:
        # All values fit; the gaps between them, of less than the alignment each, come on top.
        return Budget(budget_bytes, footprint_bytes, scratch_bytes, segments + slot)
    if budget_bytes >= total_bytes and not casts_some(infos, stored) and on_host and is_direct:
        # All fits, though not with every large weight on a page. Off a page, reads need no scratch.
        packed = as_segments(infos, stored, CACHE_LINE_BYTES)
        return Budget(budget_bytes, sum(segment.size_bytes for segment in packed), 0, packed + slot)
    largest = largest_segment(segments + slot, of_rows)
    if largest is not None and largest.size_bytes + scratch_bytes > budget_bytes:
        needed_bytes = largest.size_bytes + scratch_bytes
        raise BudgetError(
            f"budget {format_bytes(budget_bytes)} cannot hold {largest.name!r} ({format_bytes(largest.nbytes)}); "
            f"the smallest workable budget is {format_bytes(needed_bytes)} ({needed_bytes} bytes"
            + (f", {scratch_bytes} of them scratch for reads" if scratch_bytes else "")
            + ") or more: budget='min' finds it.",
            budget_bytes=budget_bytes,
            needed_bytes=needed_bytes,
        )
    return Budget(budget_bytes, budget_bytes - scratch_bytes, scratch_bytes, segments + slot)


def largest_segment(segments: Iterable[Segment], tables: Set[str]) -> Segment | None:
    """Returns the largest of what is ever needed at once by itself: of `tables`, no more than the room for rows."""
    alone = (segment for segment in segments if segment.name not in tables)
    return max(alone, key=lambda segment: segment.size_bytes, default=None)


def settle_host(budget: int | str, device: Device) -> int:
    """Returns the bytes of the host tier: `"auto"` is half of what is available, and no more ever is.

    Raises:
        BudgetError: If `budget` cannot be read.
    """
    if device.is_host or (not isinstance(budget, str) and budget == 0):
        return 0
    available = available_bytes()
    if budget == "auto":
        return int(available * _AUTO_SHARE)
    return min(parse_bytes(budget, of_bytes=available), available)


def as_segments(
    infos: Sequence[TensorInfo], stored: Sequence[TensorInfo] | None = None, align_bytes: int | None = None
) -> tuple[Segment, ...]:
    """Returns weights as they lie in an arena; by default large ones on a page and others on a cache line."""
    segments = []
    for info, as_stored in zip(infos, stored or infos, strict=True):
        align = align_bytes or (PAGE_BYTES if info.nbytes >= _LARGE_BYTES else CACHE_LINE_BYTES)
        moved_bytes = None if as_stored.dtype == info.dtype else as_stored.nbytes
        size_bytes = align_up(info.nbytes, align)
        segments.append(Segment(info.name, info.nbytes, size_bytes, align, stored_bytes=moved_bytes))
    return tuple(segments)


def part_bytes(stored: TensorInfo, served: TensorInfo) -> int:
    """Returns the bytes of a table that are there at once at least: a block, and all of a row that is no vector."""
    blocks = stored.readable
    n_bytes = blocks.largest_bytes
    if len(stored.shape) > 2:
        n_bytes = min(-(-blocks.row_bytes // n_bytes) * n_bytes, stored.nbytes)
    return max(n_bytes, n_bytes // stored.dtype.itemsize * served.dtype.itemsize)


def slot_segment(least_bytes: Iterable[int]) -> tuple[Segment, ...]:
    """Returns the room for rows of tables, of which those bytes are there at once, or none where there are none."""
    size_bytes = align_up(max(least_bytes, default=0), PAGE_BYTES)
    return (Segment("(rows of tables)", size_bytes, size_bytes, PAGE_BYTES, is_slot=True),) if size_bytes else ()


def casts_some(infos: Sequence[TensorInfo], stored: Sequence[TensorInfo] | None) -> bool:
    """Says whether some weight is served in another dtype than it is stored in."""
    return any(info.dtype != other.dtype for info, other in zip(infos, stored or infos, strict=True))
