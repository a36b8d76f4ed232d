"""The trace: which operator uses which weights, in order, and how long it computes.

A pass repeats, so a trace is cyclic: after its last use comes its first one.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Segment:
    """The unit that is moved, kept or evicted: one stored tensor.

    Attributes:
        name: Name of the tensor in the store.
        nbytes: Bytes of its values.
        size_bytes: Bytes it occupies in the arena, its padding to `align_bytes` included.
        align_bytes: What its offset in the arena is a multiple of.
        is_slot: Room for rows of tables that are not there whole; it has no bytes of its own to fetch.
        stored_bytes: Bytes of its values in the store, where they are of another dtype there.
    """

    name: str
    nbytes: int
    size_bytes: int
    align_bytes: int
    is_slot: bool = False
    stored_bytes: int | None = None

    @property
    def fetch_bytes(self) -> int:
        """Bytes that a load of it moves."""
        if self.is_slot:
            return 0
        return self.nbytes if self.stored_bytes is None else self.stored_bytes


@dataclass(frozen=True, slots=True)
class Use:
    """One operator call that needs weights.

    Attributes:
        segments: Indices of the segments that must be in the arena together.
        compute_s: Seconds from the moment they were all there to the start of the next use.
        n_spanned: Uses that began before this one ended, itself included: 1 unless uses nest.
        table: The segment of which rows were gathered, where `segments` is the slot that has room for them.
        gathered_bytes: What has to be read for that.
        held_s: Seconds of `compute_s` until it was done with the segments; None for all of them.
        gathered_s: Seconds of `compute_s` until the rows were there; None for all of them.
    """

    segments: tuple[int, ...]
    compute_s: float
    n_spanned: int = 1
    table: int | None = None
    gathered_bytes: int = 0
    held_s: float | None = None
    gathered_s: float | None = None

    @property
    def own_s(self) -> float:
        """Seconds of `compute_s` in which nothing was gathered."""
        if self.table is None:
            return self.compute_s
        return 0.0 if self.gathered_s is None else max(self.compute_s - self.gathered_s, 0.0)


@dataclass(frozen=True, slots=True)
class Trace:
    """What one pass did.

    Attributes:
        segments: Every segment of the store, used or not.
        uses: The uses of one pass, in order.
        bandwidth_bps: Bytes per second that the store delivered.
        latency_s: Seconds that a read costs beside its bytes.
    """

    segments: tuple[Segment, ...]
    uses: tuple[Use, ...]
    bandwidth_bps: float
    latency_s: float = 0.0

    @property
    def compute_s(self) -> float:
        """Seconds of a pass that never waits."""
        return sum(use.compute_s for use in self.uses)

    @property
    def gathered_bytes(self) -> int:
        """Bytes of tables that a pass reads to gather rows."""
        return sum(use.gathered_bytes for use in self.uses)

    def with_whole_tables(self, tables: Container[int] | None = None) -> Trace:
        """Returns the trace of a pass that uses `tables`, by default all, whole in place of gathering rows of them."""
        uses = [
            Use((use.table,), use.own_s, use.n_spanned)
            if use.table is not None and (tables is None or use.table in tables)
            else use
            for use in self.uses
        ]
        return replace(self, uses=tuple(uses))

    @property
    def used(self) -> tuple[int, ...]:
        """Indices of the segments that the pass uses, in order of first use."""
        return tuple(dict.fromkeys(index for use in self.uses for index in use.segments))

    @property
    def used_bytes(self) -> int:
        """Arena bytes of the segments that the pass uses."""
        return sum(self.segments[index].size_bytes for index in self.used)

    @property
    def largest_use_bytes(self) -> int:
        """Arena bytes of the most demanding moment of the pass: no budget below this can run it."""
        largest = 0
        open_until: dict[int, int] = {}
        for number, use in enumerate(self.uses):
            open_until = {index: end for index, end in open_until.items() if end > number}
            for index in use.segments:
                open_until[index] = max(open_until.get(index, 0), number + use.n_spanned)
            largest = max(largest, sum(self.segments[index].size_bytes for index in open_until))
        return largest
