"""Which segments are in the arena, who uses them, and who has to go when room is needed.

Everything here is called under the pipeline's lock.

Note on aliases. A tensor over a block has a storage of its own, which holds the only lasting reference to the view of
the arena that the entry's lease points to. When the lease is dead, no tensor sees the bytes. While it lives, the block
is HELD: litrt has let go of it, somebody has not, and it is not overwritten. Leases can end in any thread at any
allocation, also in one that holds the lock, so they are only appended to a deque then. What somebody has queued with an
alias is queued before it dies: an event that is recorded when its end is noticed, on the stream that is current then,
comes after that. As for any tensor in torch, whoever uses an alias on another stream makes the streams wait for each
other.
"""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NoReturn

import torch

from litrt.arena import Arena, Block
from litrt.device import Device, Event, Memory
from litrt.errors import BudgetError, LitrtError
from litrt.layout import align_up
from litrt.tensors import TensorInfo
from litrt.trace import Segment
from litrt.units import format_bytes, format_names

_LOOK_S = 0.002
"""How often to look whether the cycle collector is free, where another thread is at it."""

_LOOKS = 500


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
    lease: _Lease | None = None
    copied: Event | None = None  # when its bytes are there, on a device that runs behind the host
    used: list[Event] = field(default_factory=list)  # when the uses of it that were queued are done
    resident: bool = False
    n_pins: int = 0  # operators that use it now
    n_waiting: int = 0  # operators that wait for their turn to make room for it
    n_pending: int = 0  # pieces not read yet
    held_until: int = 0  # planned: released when this many steps have ended; 0: kept until room is needed
    error: BaseException | None = None  # of its last read
    is_forgiven: bool = False  # an error of the read under way is of no account
    is_gone: bool = False  # there is another entry in its place

    @property
    def is_loose(self) -> bool:
        """Whether it is there for no reason but that nobody has needed its room."""
        return self.state is State.READY and not (self.n_pins or self.held_until or self.resident)

    def clear(self) -> None:
        """Forgets its block, and the tensors over it."""
        self.block = self.tensor = self.lease = self.copied = None
        self.state = State.ABSENT

    def take_error(self) -> BaseException | None:
        """Returns the error of the last read, once, when all its pieces are done: none is forgotten before."""
        if self.state is State.READING:
            return None
        error, self.error = self.error, None
        return error


class _Lease(weakref.ref[Memory]):
    """A reference to the view of the arena that tensors over a block share.

    No Python code runs when it ends, which may be in the middle of torch's own.
    """

    __slots__ = ("block", "entry")
    entry: Entry
    block: Block


def _collect() -> bool:
    """Runs the cycle collector; says whether it ran, as it does not while it is at work."""
    n_before: int = gc.get_stats()[-1]["collections"]
    gc.collect()
    n_after: int = gc.get_stats()[-1]["collections"]
    return n_after > n_before


class Crowded(Exception):
    """There is no room until another thread lets go of something."""


def gone(entry: Entry) -> LitrtError:
    """Returns what to raise where an entry is waited for that `Cache.reset` has replaced."""
    return LitrtError(
        f"{entry.segment.name!r} was given up while it was waited for: another thread was interrupted, and what it was "
        "at had to be undone. Try again."
    )


class Cache:
    """The entries of all segments, behind them those of parts, and the arena that they share.

    Args:
        segments: What can be held.
        infos: Their entries in the store, in the same order.
        device: Makes tensors over the arena.
        arena: Where the bytes are.
        scratch_bytes: What reads need beside the arena.
        growable: Raise the arena's limit instead of failing where a use does not fit.
        wait: Waits until something may have changed, or for some seconds.
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
        wait: Callable[[float | None], object],
    ) -> None:
        self.entries = [Entry(segment, info) for segment, info in zip(segments, infos, strict=True)]
        self.arena = arena
        self.scratch_bytes = scratch_bytes
        self.peak_bytes = 0
        self.room: tuple[int, int] | None = None  # offset and size of what is kept free for parts
        self.evict_resident: Callable[[int], bool] = lambda _: False
        self.is_crowded: Callable[[], bool] = lambda: False  # whether other threads will let go of something
        self.is_watched: Callable[[], bool] = lambda: False  # whether others compute with plain tensors over it
        self._device = device
        self.growable = growable
        self._wait = wait
        self._owners: dict[Block, Entry] = {}
        self._passing: OrderedDict[Entry, None] = OrderedDict()  # have a block, do not stay; longest unused first
        self._freed: deque[_Lease] = deque()

    # Tensors over blocks.

    def tensor(self, entry: Entry) -> torch.Tensor:
        """Returns the tensor over the block of a READY entry."""
        if entry.tensor is None:
            assert entry.block is not None
            memory = self.arena.memory(entry.block)
            entry.lease = _Lease(memory, self._freed.append)
            entry.lease.entry, entry.lease.block = entry, entry.block
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
            lease = self._freed.popleft()
            entry, block = lease.entry, lease.block
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
        del self._owners[entry.block]
        self._passing.pop(entry, None)
        # What was placed and never written to leaves what it would have waited for to the next one.
        self.arena.free(entry.block, [*entry.used, *(entry.block.waits if entry.copied is None else ())])
        entry.clear()
        entry.used.clear()
        entry.n_pending = entry.held_until = 0

    # Who stays, and who was used last.

    def settle(self, entry: Entry) -> None:
        """Makes a resident of an entry."""
        entry.resident = True
        self._passing.pop(entry, None)

    def unsettle(self, entry: Entry) -> None:
        """Makes a resident an entry like any other, used just now."""
        if entry.resident:
            entry.resident = False
            if entry.block is not None:
                self._passing[entry] = None

    def used(self, entry: Entry) -> None:
        """Says that an operator has used an entry, or that one will."""
        if entry in self._passing:
            self._passing.move_to_end(entry)

    # Room.

    def keep(self, offsets: Mapping[Entry, int]) -> None:
        """Makes residents of those of `offsets` that are there, moved to their offsets; lets go of other loose ones.

        What cannot be moved, because there are tensors over it, or because it is in the way of itself, is let go of.
        On a device nothing is moved.
        """
        if not offsets:
            return
        for entry in self.entries:
            if entry.is_loose and entry not in offsets:
                self.let_go(entry)
        self.reap()
        to_move: list[Entry] = []
        for entry, offset in offsets.items():
            if entry.block is None or not entry.is_loose:
                continue
            if entry.block.offset == offset and entry.block.size_bytes == entry.segment.size_bytes:
                self.settle(entry)
            elif self._device.is_host and entry.block.size_bytes and self._is_unseen(entry):
                to_move.append(entry)
            else:
                self.let_go(entry)
        to_move.sort(key=lambda entry: entry.block.offset if entry.block is not None else 0)
        while to_move:
            left = []
            for entry in to_move:
                assert entry.block is not None
                moved = self.arena.move(entry.block, offsets[entry], entry.segment.size_bytes)
                if moved is not None:
                    del self._owners[entry.block]
                    entry.block = moved
                    self._owners[moved] = entry
                    self.settle(entry)
                else:
                    left.append(entry)
            if len(left) == len(to_move):
                # Each in the way of another one: the smallest is read again.
                self.free(left.pop(min(range(len(left)), key=lambda number: left[number].segment.size_bytes)))
            to_move = left[::-1]  # those that move up can do so from the last one on

    def _is_unseen(self, entry: Entry) -> bool:
        """Says whether there is no tensor over the block of a READY entry, once ours is dropped."""
        entry.tensor = None
        return entry.lease is None or entry.lease() is None

    def is_tight(self, size_bytes: int) -> bool:
        """Says whether something of that size would take more than half of the arena, or of what it has grown to."""
        return self.growable or size_bytes > self.arena.limit_bytes // 2

    def place_planned(self, entry: Entry, offset: int | None) -> bool:
        """Gives `entry` a block at `offset`, or anywhere, at the cost of loose ones only; says whether it could."""
        segment = entry.segment
        if offset is not None:
            self._clear_range(offset, segment.size_bytes)
            if self.give(entry, self.arena.place_at(offset, segment.nbytes, segment.size_bytes)):
                return True
        while not self.give(entry, self.arena.place(segment.nbytes, segment.size_bytes, segment.align_bytes)):
            loose = next((other for other in self._passing if other.is_loose), None)
            if loose is None:
                return False
            self.let_go(loose)
        return True

    def _clear_range(self, offset: int, size_bytes: int) -> None:
        """Lets go of what is loose and lies in a range, in part or whole."""
        for block in self.arena.in_the_way(offset, size_bytes):
            owner = self._owners.get(block)  # none of one that an interrupt has just left there
            if owner is not None and owner.is_loose:
                self.let_go(owner)

    def place_in_room(self, part: Entry, slot: Entry | None) -> bool:
        """Gives a part the room that a plan has kept for it; says whether it could."""
        if slot is not None and slot.block is not None and not slot.n_pins:
            self.room = (slot.block.offset, slot.block.size_bytes)
            self.free(slot)
        if self.room is None:
            return False
        offset, end = self.room[0], sum(self.room)
        self._clear_range(*self.room)
        # An operator may use several parts at once.
        for block in self.arena.in_the_way(*self.room):
            if offset + part.segment.size_bytes <= block.offset:
                break
            offset = max(offset, align_up(block.end, part.segment.align_bytes))
        if offset + part.segment.size_bytes > end:
            return False
        return self.give(part, self.arena.place_at(offset, part.segment.nbytes, part.segment.size_bytes))

    def place_now(self, absent: Sequence[Entry], together: Sequence[Entry], *, again: bool = True) -> list[Entry]:
        """Gives `absent` blocks at any cost, and returns them all.

        Args:
            absent: What an operator waits for.
            together: All that it uses; where the room is in pieces, those of these that nobody else uses, and that do
                not stay, are placed anew, and returned as well.
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
            if isinstance(error, LitrtError | Crowded) or self.is_sound():  # an interrupt comes while it waits, mostly
                for entry in placed:
                    if not entry.is_gone:
                        self.free(entry)
            if not isinstance(error, BudgetError):
                raise
            mine = [e for e in together if e.state is State.READY and e.n_pins == 1 and not e.resident]
            if not (placed or mine) or not again:
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
        collected = is_last = False
        while entry.state is State.ABSENT:
            if entry.is_gone:
                raise gone(entry)
            if self.give(entry, self.arena.place(segment.nbytes, segment.size_bytes, segment.align_bytes)):
                return True
            if self._evict_one():
                continue
            if any(other.state is State.READING and not other.n_pins for other in self._owners.values()):
                self._wait(None)  # what is to stay among them; for this one too it may be, fetched by another thread
            elif self.is_crowded():
                raise Crowded
            elif not collected and any(other.state is State.HELD for other in self._owners.values()):
                collected = True
                self.collect()
            elif not self._evict_one_resident() and not self._grow(segment):
                if not collected and any(other.resident and not other.n_pins for other in self._owners.values()):
                    collected = True  # they could not be evicted
                    self.collect()
                    continue
                if self.is_watched():
                    raise Crowded
                if is_last:
                    self._refuse(segment)
                is_last = True  # somebody may have let go of something just before that look
                self._evict_held()
        return False

    def give(self, entry: Entry, block: Block | None) -> bool:
        """Gives an entry a block that the arena has placed for it; says whether it has."""
        if block is None:
            return False
        entry.block = block
        self._owners[block] = entry
        if not entry.resident:
            self._passing[entry] = None
        self.peak_bytes = max(self.peak_bytes, self.arena.held_bytes + self.scratch_bytes)
        return True

    def place_resident(self, entry: Entry, offset: int) -> bool:
        """Gives `entry` a block at `offset`, or anywhere, at any cost; says whether nobody else has meanwhile."""
        segment = entry.segment
        at_offset = self.arena.place_at(offset, segment.nbytes, segment.size_bytes)
        return self.give(entry, at_offset) or self._make_room(entry)

    def _evict_one(self) -> bool:
        """Lets one unused streamed segment go: what no plan holds first, then what is needed last."""
        last: Entry | None = None
        for entry in self._passing:
            if entry.state is not State.READY or entry.n_pins:
                continue
            if not entry.held_until:
                last = entry
                break
            if last is None or entry.held_until > last.held_until:
                last = entry
        if last is None:
            return False
        self.let_go(last)
        return True

    def _evict_one_resident(self) -> bool:
        torch.clear_autocast_cache()  # which holds the plain weights that it has cast
        for index, entry in enumerate(self.entries):
            if entry.resident and entry.state is State.READY and not entry.n_pins and self.evict_resident(index):
                self.unsettle(entry)
                self.let_go(entry)
                return True
        return False

    def collect(self) -> None:
        """Ends the tensors over blocks that wait for the cycle collector, and frees the held ones among these."""
        # Where another thread is at it, it does nothing, and that one may need the lock.
        for _ in range(_LOOKS):
            if _collect():
                break
            self._wait(_LOOK_S)
        self._evict_held()

    def _evict_held(self) -> None:
        """Frees held blocks over which a plain tensor still is, as somebody computed with it when it was to go."""
        for index, entry in enumerate(self.entries):
            if entry.state is State.HELD:
                self.evict_resident(index)
        self.reap()

    def _grow(self, segment: Segment) -> bool:
        """Raises the limit of a growable arena so that `segment` fits; says whether it could."""
        needed = align_up(self.arena.end, segment.align_bytes) + segment.size_bytes
        if not self.growable or needed > self.arena.capacity_bytes:
            return False
        self.arena.limit_bytes = max(self.arena.limit_bytes, needed)
        return True

    def _refuse(self, segment: Segment) -> NoReturn:
        """Raises the error that says that `segment` does not fit."""
        arena = self.arena
        held_bytes = sum(block.size_bytes for block in self._owners)
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
        kept = [entry.segment.name for entry in self._owners.values() if entry.state is State.HELD]
        if kept:
            beside += f", as somebody keeps tensors over {format_names(kept)}"
        raise BudgetError(
            f"budget {format_bytes(budget_bytes)} cannot hold {segment.name!r} ({format_bytes(segment.nbytes)})"
            f"{beside}; "
            f"the smallest workable budget is {format_bytes(needed_bytes)} ({needed_bytes} bytes) or more: "
            "budget='min' finds it.",
            budget_bytes=budget_bytes,
            needed_bytes=needed_bytes,
        )

    # What an exception has broken off.

    def is_sound(self) -> bool:
        """Says whether all that is known of blocks agrees."""
        there = {entry: entry.block for entry in self.entries if entry.block is not None}
        return (
            all((entry.state is State.ABSENT) == (entry.block is None) for entry in self.entries)
            and len(self._owners) == len(there)
            and all(self._owners.get(block) is entry for entry, block in there.items())
            and self._passing.keys() == {entry for entry in there if not entry.resident}
            and self.arena.is_sound(self._owners)
        )

    def forget(self, segments: Sequence[Segment]) -> None:
        """Puts new entries, of which nothing is there, in the place of all; until `arena.reset`, nothing can be placed.

        What others have of the old ones ends with an error where they wait for one.
        """
        for entry in self.entries:
            entry.is_gone = True  # for the threads that read, from here on
            entry.clear()
        self.entries[:] = [Entry(segment, entry.info) for segment, entry in zip(segments, self.entries, strict=False)]
        self._owners.clear()
        self._passing.clear()
        self._freed.clear()
        self.room = None

    def drop(self) -> None:
        """Forgets all that is there, and lets the arena go."""
        for entry in self.entries:
            entry.clear()
        self._owners.clear()
        self._passing.clear()
        self.arena.drop()
