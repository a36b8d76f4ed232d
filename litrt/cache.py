"""Which segments are in the arena, who uses them, and who has to go when room is needed.

Everything here is called under the pipeline's lock.

Note on aliases. A tensor over a block has a storage of its own, which holds the only lasting reference to the view of
the arena that the entry's lease points to. When the lease is dead, no tensor sees the bytes. While it lives, the block
is HELD: litrt has let go of it, somebody has not, and it is not overwritten. Lease callbacks can run in any thread at
any allocation, also one that holds the lock, so they only append to a deque. What somebody has queued with an alias is
queued before it dies: an event that is recorded when its end is noticed, on the stream that is current then, comes
after that. As for any tensor in torch, whoever uses an alias on another stream makes the streams wait for each other.
"""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import torch

from litrt.arena import Arena, Block
from litrt.device import Device, Event, Memory
from litrt.errors import BudgetError
from litrt.layout import align_up
from litrt.store import TensorInfo
from litrt.trace import Segment
from litrt.units import format_bytes


class State(Enum):
    """What the arena holds of a segment."""

    ABSENT = auto()  # nothing
    READING = auto()  # a block, into which reads are queued or under way
    READY = auto()  # a block with verified bytes
    HELD = auto()  # a block that was released while a tensor over it lives


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a table.

    Attributes:
        index: The table.
        ranges: Its elements, of whole blocks, sorted and apart; they lie side by side.
    """

    index: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def n_elements(self) -> int:
        """How many they are."""
        return sum(stop - start for start, stop in self.ranges)


@dataclass(eq=False, slots=True)
class Entry:
    """All that is known of one segment, or of a part of one, while a runtime lives."""

    segment: Segment
    info: TensorInfo
    part: Part | None = None
    state: State = State.ABSENT
    block: Block | None = None
    tensor: torch.Tensor | None = None
    lease: weakref.ref[Memory] | None = None
    copied: Event | None = None  # when its bytes are there, on a device that runs behind the host
    used: list[Event] = field(default_factory=list)  # when the uses of it that were queued are done
    resident: bool = False
    n_pins: int = 0  # operators that use it now
    n_waiting: int = 0  # operators that wait for their turn to make room for it
    n_pending: int = 0  # pieces not read yet
    held_until: int = 0  # planned: released when this many steps have ended; 0: kept until room is needed
    last_use: int = 0
    error: BaseException | None = None

    @property
    def is_loose(self) -> bool:
        """Whether it is there for no reason but that nobody has needed its room."""
        return self.state is State.READY and not (self.n_pins or self.held_until or self.resident)

    def take_error(self) -> BaseException | None:
        """Returns the error of the last read, once."""
        error, self.error = self.error, None
        return error


class Crowded(Exception):
    """There is no room until another thread lets go of something."""


class Cache:
    """The entries of all segments, behind them those of parts, and the arena that they share.

    Args:
        segments: What can be held.
        infos: Their entries in the store, in the same order.
        device: Makes tensors over the arena.
        arena: Where the bytes are.
        scratch_bytes: What reads need beside the arena.
        growable: Raise the arena's limit instead of failing where a use does not fit.
        wait: Waits until a read has ended.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        infos: Sequence[TensorInfo],
        device: Device,
        arena: Arena,
        *,
        scratch_bytes: int,
        growable: bool,
        wait: Callable[[], None],
    ) -> None:
        self.entries = [Entry(segment, info) for segment, info in zip(segments, infos, strict=True)]
        self.arena = arena
        self.scratch_bytes = scratch_bytes
        self.peak_bytes = 0
        self.room: tuple[int, int] | None = None  # offset and size of what is kept free for parts
        self.evict_resident: Callable[[int], bool] = lambda _: False
        self.is_crowded: Callable[[], bool] = lambda: False  # whether other threads will let go of something
        self._device = device
        self._growable = growable
        self._wait = wait
        self._freed: deque[tuple[Entry, Block]] = deque()

    # Tensors over blocks.

    def tensor(self, entry: Entry) -> torch.Tensor:
        """Returns the tensor over the block of a READY entry."""
        if entry.tensor is None:
            assert entry.block is not None
            memory = self.arena.memory(entry.block)
            block, freed = entry.block, self._freed
            entry.lease = weakref.ref(memory, lambda _: freed.append((entry, block)))
            entry.tensor = self._device.tensor(memory, entry.info)
        return entry.tensor

    def another_tensor(self, entry: Entry) -> torch.Tensor:
        """Returns a new tensor over the block of a READY entry, with a storage of its own."""
        self.tensor(entry)
        memory = entry.lease() if entry.lease is not None else None
        assert memory is not None
        return self._device.tensor(memory, entry.info)

    def revive(self, entry: Entry) -> None:
        """Makes a HELD entry READY again, or ABSENT where its last tensor has died.

        The bytes were never overwritten, so they need not be read again.
        """
        memory = entry.lease() if entry.lease is not None else None
        if memory is None:
            self._free_held(entry)
            return
        entry.tensor = self._device.tensor(memory, entry.info)
        entry.state = State.READY

    def reap(self) -> None:
        """Frees the held blocks whose last tensor has died."""
        while self._freed:
            entry, block = self._freed.popleft()
            if entry.block is block and entry.state is State.HELD:
                self._free_held(entry)

    def _free_held(self, entry: Entry) -> None:
        """Frees a block over which there was a tensor, called by a thread in which it was used."""
        self._device.record_use(entry.used)
        self.free(entry)

    def let_go(self, entry: Entry) -> None:
        """Frees the block of an unused entry, unless tensors over it live: then it is HELD until they die."""
        entry.held_until = 0
        entry.tensor = None
        if entry.lease is not None and entry.lease() is not None:
            entry.state = State.HELD
        else:
            # There may have been aliases until now, used after the operator that they came from; or the plain tensors
            # of a resident, used without our knowing.
            self._free_held(entry)

    def free(self, entry: Entry) -> None:
        """Gives the block of an entry back to the arena."""
        assert entry.block is not None
        # What was placed and never written to leaves what it would have waited for to the next one.
        self.arena.free(entry.block, [*entry.used, *(entry.block.waits if entry.copied is None else ())])
        entry.block = entry.tensor = entry.lease = entry.copied = None
        entry.used.clear()
        entry.state = State.ABSENT
        entry.n_pending = entry.held_until = 0

    # Room.

    def is_tight(self, size_bytes: int) -> bool:
        """Says whether something of that size would take more than half of the arena, or of what it has grown to."""
        return self._growable or size_bytes > self.arena.limit_bytes // 2

    def place_planned(self, entry: Entry, offset: int | None) -> bool:
        """Gives `entry` a block at `offset`, or anywhere, at the cost of loose ones only; says whether it could."""
        segment = entry.segment
        if offset is not None:
            for block in self.arena.in_the_way(offset, segment.size_bytes):
                other = next(other for other in self.entries if other.block is block)
                if other.is_loose:
                    self.let_go(other)
            if self._taken(entry, self.arena.place_at(offset, segment.nbytes, segment.size_bytes)):
                return True
        while not self._taken(entry, self.arena.place(segment.nbytes, segment.size_bytes, segment.align_bytes)):
            loose = [other for other in self.entries if other.is_loose]
            if not loose:
                return False
            self.let_go(min(loose, key=lambda other: other.last_use))
        return True

    def place_in_room(self, part: Entry, slot: Entry | None) -> bool:
        """Gives a part the room that a plan has kept for it; says whether it could."""
        if slot is not None and slot.block is not None and not slot.n_pins:
            self.room = (slot.block.offset, slot.block.size_bytes)
            self.free(slot)
        if self.room is None:
            return False
        offset, end = self.room[0], sum(self.room)
        for block in self.arena.in_the_way(*self.room):
            other = next(other for other in self.entries if other.block is block)
            if other.is_loose:
                self.let_go(other)
        # An operator may use several parts at once.
        for block in self.arena.in_the_way(*self.room):
            if offset + part.segment.size_bytes <= block.offset:
                break
            offset = max(offset, align_up(block.end, part.segment.align_bytes))
        if offset + part.segment.size_bytes > end:
            return False
        return self._taken(part, self.arena.place_at(offset, part.segment.nbytes, part.segment.size_bytes))

    def place_now(self, absent: Sequence[Entry], together: Sequence[Entry], *, again: bool = True) -> list[Entry]:
        """Gives `absent` blocks at any cost, and returns them all.

        Args:
            absent: What an operator waits for.
            together: All that it uses; where the room is in pieces, these are placed anew, and returned as well.
            again: Where the room is in pieces, try once more from the start.

        Raises:
            BudgetError: If they cannot be held together.
            Crowded: If they cannot as long as other threads are at work.
        """
        placed: list[Entry] = []
        try:
            # Those on a page first: the others then lie behind them without a gap.
            for entry in sorted(absent, key=lambda entry: (-entry.segment.align_bytes, -entry.segment.size_bytes)):
                if not self._make_room(entry):
                    continue  # it is on its way by now
                entry.state = State.READING  # nobody takes the block
                entry.n_pending = 1
                placed.append(entry)
        except BaseException as error:
            for entry in placed:
                self.free(entry)
            if not isinstance(error, BudgetError):
                raise
            mine = [entry for entry in together if entry.state is State.READY]
            if not (placed or mine) or not again or any(entry.n_pins > 1 or entry.resident for entry in mine):
                raise
            for entry in mine:
                self.let_go(entry)
            if any(entry.state is not State.ABSENT for entry in mine):
                raise
            # What was evicted for the last of them left better places for the first.
            return self.place_now([*absent, *mine], (), again=False)
        return placed

    def _make_room(self, entry: Entry) -> bool:
        """Gives `entry` a block, evicting what is needed last, or raises; says whether nobody else has meanwhile."""
        segment = entry.segment
        collected = False
        while entry.state is State.ABSENT:
            if self._taken(entry, self.arena.place(segment.nbytes, segment.size_bytes, segment.align_bytes)):
                return True
            if self._evict_one():
                continue
            if any(other.state is State.READING and not other.n_pins for other in self.entries):
                self._wait()  # for this one too it may be, fetched by another thread
            elif self.is_crowded():
                raise Crowded
            elif not collected and any(other.state is State.HELD for other in self.entries):
                # Tensors over released blocks may be waiting for the cycle collector.
                collected = True
                gc.collect()
                self.reap()
            elif not self._evict_one_resident():
                self._grow(segment)
        return False

    def _taken(self, entry: Entry, block: Block | None) -> bool:
        if block is None:
            return False
        entry.block = block
        self.peak_bytes = max(self.peak_bytes, self.arena.held_bytes + self.scratch_bytes)
        return True

    def place_resident(self, entry: Entry, offset: int) -> bool:
        """Gives `entry` a block at `offset`, or anywhere, at any cost; says whether nobody else has meanwhile."""
        segment = entry.segment
        at_offset = self.arena.place_at(offset, segment.nbytes, segment.size_bytes)
        return self._taken(entry, at_offset) or self._make_room(entry)

    def _evict_one(self) -> bool:
        """Lets one unused streamed segment go: what no plan holds first, then what is needed last."""
        free = [
            entry for entry in self.entries if entry.state is State.READY and not entry.n_pins and not entry.resident
        ]
        if not free:
            return False
        self.let_go(min(free, key=lambda entry: (entry.held_until > 0, -entry.held_until, entry.last_use)))
        return True

    def _evict_one_resident(self) -> bool:
        torch.clear_autocast_cache()  # which holds the plain weights that it has cast
        for index, entry in enumerate(self.entries):
            if entry.resident and entry.block and not entry.n_pins and self.evict_resident(index):
                entry.resident = False
                self.let_go(entry)
                return True
        return False

    def _grow(self, segment: Segment) -> None:
        """Raises the limit of a growable arena so that `segment` fits, or raises BudgetError."""
        arena = self.arena
        needed = align_up(arena.end, segment.align_bytes) + segment.size_bytes
        if self._growable and needed <= arena.capacity_bytes:
            arena.limit_bytes = max(arena.limit_bytes, needed)
            return
        held_bytes = sum(entry.block.size_bytes for entry in self.entries if entry.block is not None)
        budget_bytes = arena.limit_bytes + self.scratch_bytes
        together_bytes = sum(
            entry.segment.size_bytes
            for entry in self.entries
            if entry.n_pins or entry.block is not None or entry.segment is segment
        )
        needed_bytes = together_bytes + self.scratch_bytes
        if needed_bytes <= budget_bytes:  # there is room, in pieces
            needed_bytes = budget_bytes + segment.size_bytes
        beside = f" beside {format_bytes(held_bytes)} in use" if held_bytes else ""
        raise BudgetError(
            f"budget {format_bytes(budget_bytes)} cannot hold {segment.name!r} ({format_bytes(segment.nbytes)})"
            f"{beside}; "
            f"the smallest workable budget is {format_bytes(needed_bytes)} ({needed_bytes} bytes) or more: "
            "budget='min' finds it.",
            budget_bytes=budget_bytes,
            needed_bytes=needed_bytes,
        )
