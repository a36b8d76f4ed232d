"""One buffer, allocated once, that holds every weight byte litrt holds: the budget.

The arena hands out blocks, at a planned offset or in the first hole that fits. It knows nothing of weights. Not
thread-safe: the pipeline calls it under its lock.

Note on reuse. A range is given back when the host is done with it; the device may still be at work on it. What has to
happen before the range may be written to is remembered with it, and handed to the next block there.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

from litrt.device import Device, Event, Memory, give_back, move_bytes
from litrt.layout import align_up

POISON = 0xFF
"""What a poisoned byte is: all ones is a NaN in every floating dtype."""


@dataclass(eq=False, slots=True)
class Block:
    """A range of the arena in use: `size_bytes` from `offset`, `nbytes` of them values.

    Whoever writes to it first waits for `waits`.
    """

    offset: int
    size_bytes: int
    nbytes: int
    waits: list[Event] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Offset of the first byte after the block."""
        return self.offset + self.size_bytes


class Arena:
    """Blocks in one buffer.

    Args:
        device: Whose memory it is.
        capacity_bytes: Address space; the limit can be raised up to it. Where there is not so much, it is the limit.
        limit_bytes: No block reaches beyond this offset.
        poison: Fill what is released with NaN bytes, so that a stale read cannot pass unseen. For tests.
    """

    def __init__(self, device: Device, capacity_bytes: int, limit_bytes: int, *, poison: bool = False) -> None:
        self.capacity_bytes = capacity_bytes
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._poison = poison
        self._device = device
        self._memory: Memory | None = None
        try:
            self._memory = self._allocate(capacity_bytes)
        except (OSError, MemoryError):
            if capacity_bytes <= limit_bytes:
                raise
            self.capacity_bytes = limit_bytes
            self._memory = self._allocate(limit_bytes)
        self._blocks: list[Block] = []  # sorted by offset, disjoint
        self._offsets: list[int] = []
        # Holes, maximal ones: where each begins and where it ends. There are few of them even where there are many
        # blocks. The last one goes on beyond the limit.
        self._hole_starts = [0]
        self._hole_ends = [sys.maxsize]
        self._busy: list[tuple[int, int, list[Event]]] = []  # ranges given back, and what they wait for

    @property
    def end(self) -> int:
        """Offset after the last block."""
        return self._blocks[-1].end if self._blocks else 0

    def memory(self, block: Block) -> Memory:
        """Returns a fresh view of the values of `block`."""
        return self._range(block.offset, block.offset + block.nbytes)

    def _range(self, start: int, end: int) -> Memory:
        assert self._memory is not None, "the arena was dropped"
        return self._memory[start:end]

    def resize(self, limit_bytes: int) -> bool:
        """Puts memory of exactly `limit_bytes` in the place of the buffer; says whether it could: it is empty then."""
        if self._blocks:
            return False
        self._device.synchronize()
        self._busy.clear()
        self._memory = None
        self._memory = self._allocate(limit_bytes)
        self.capacity_bytes = self.limit_bytes = limit_bytes
        return True

    def _allocate(self, n_bytes: int) -> Memory:
        memory = self._device.allocate(max(n_bytes, 1))
        if self._poison:
            self._device.fill(memory, POISON)
        return memory

    def shrink(self, limit_bytes: int) -> bool:
        """Lowers the limit and gives the memory behind it back to the host; says whether no block was in the way."""
        if self.end > limit_bytes:
            return False
        self.limit_bytes = limit_bytes
        give_back(self._range(limit_bytes, self.capacity_bytes))
        return True

    def move(self, block: Block, offset: int, size_bytes: int) -> Block | None:
        """Moves what is in a block, in memory of the host; returns its new block, or None if others are there.

        Nobody sees its bytes meanwhile.
        """
        if offset + size_bytes > self.limit_bytes:
            return None
        if any(other is not block for other in self.in_the_way(offset, size_bytes)):
            return None
        self._remove(block)
        move_bytes(self._range(0, self.capacity_bytes), block.offset, offset, block.nbytes)
        if self._poison:
            left = (block.offset, min(block.end, offset)), (max(block.offset, offset + size_bytes), block.end)
            for start, end in left:
                if start < end:
                    self._device.fill(self._range(start, end), POISON)
        return self._add(Block(offset, size_bytes, block.nbytes))

    def place(self, nbytes: int, size_bytes: int, align_bytes: int) -> Block | None:
        """Returns a block in the first hole that fits, or None."""
        if not size_bytes:
            return Block(0, 0, nbytes)  # in nobody's way, wherever it is
        for start, end in zip(self._hole_starts, self._hole_ends, strict=True):
            offset = align_up(start, align_bytes)
            if offset + size_bytes <= end:
                break
        if offset + size_bytes > self.limit_bytes:
            return None
        return self._add(Block(offset, size_bytes, nbytes))

    def place_at(self, offset: int, nbytes: int, size_bytes: int) -> Block | None:
        """Returns a block at `offset`, or None where other blocks are in its way."""
        if self.in_the_way(offset, size_bytes) or offset + size_bytes > self.limit_bytes:
            return None
        return self._add(Block(offset, size_bytes, nbytes))

    def in_the_way(self, offset: int, size_bytes: int) -> list[Block]:
        """Returns the blocks that overlap a range."""
        first = max(bisect_right(self._offsets, offset) - 1, 0)
        after = bisect_left(self._offsets, offset + size_bytes)
        return [block for block in self._blocks[first:after] if block.end > offset]

    def free(self, block: Block, events: Iterable[Event] = ()) -> None:
        """Gives the range of `block` back; it may be written to once `events` have happened."""
        if not block.size_bytes:
            return  # nothing is in its way, and it is in nothing's way
        waits = list(events)
        if self._poison and self._memory is not None:
            self._device.fill(self._range(block.offset, block.end), POISON, waits)
        if waits:
            self._busy.append((block.offset, block.end, waits))
        self._remove(block)

    def _remove(self, block: Block) -> None:
        index = bisect_left(self._offsets, block.offset)
        assert self._blocks[index] is block, "a block is freed once"
        del self._blocks[index], self._offsets[index]
        self._open_hole(block.offset, block.end)
        self.held_bytes -= block.nbytes

    def is_sound(self, blocks: Iterable[Block]) -> bool:
        """Says whether `blocks` are all in memory that there are, apart from each other, the holes between them."""
        blocks = sorted((block for block in blocks if block.size_bytes), key=lambda block: block.offset)
        starts, ends = [0], []
        for block in blocks:
            if block.offset < starts[-1]:
                return False
            if block.offset == starts[-1]:
                starts[-1] = block.end
            else:
                ends.append(block.offset)
                starts.append(block.end)
        ends.append(sys.maxsize)
        return (
            self._memory is not None
            and blocks == self._blocks
            and [block.offset for block in blocks] == self._offsets
            and (starts, ends) == (self._hole_starts, self._hole_ends)
            and sum(block.nbytes for block in blocks) == self.held_bytes
        )

    def reset(self) -> None:
        """Makes it an empty one with other memory: whoever sees the one before keeps what it sees."""
        self._device.synchronize()
        self._memory = None
        self._blocks, self._offsets, self._busy = [], [], []
        self._hole_starts, self._hole_ends = [0], [sys.maxsize]
        self.held_bytes = 0
        self._memory = self._allocate(self.capacity_bytes)

    def drop(self) -> None:
        """Lets the buffer go; its memory is given back when the last tensor over it is gone."""
        self._memory = None
        self._busy.clear()

    def _add(self, block: Block) -> Block:
        if not block.size_bytes:
            return block  # in nobody's way; among the others it could share an offset with one
        index = bisect_left(self._offsets, block.offset)
        self._blocks.insert(index, block)
        self._offsets.insert(index, block.offset)
        self._fill_hole(block.offset, block.end)
        self.held_bytes += block.nbytes
        if self._busy:
            self._hand_over(block)
        return block

    def _fill_hole(self, start: int, end: int) -> None:
        """Takes a range out of the hole that it is in."""
        at = bisect_right(self._hole_starts, start) - 1
        hole_start, hole_end = self._hole_starts[at], self._hole_ends[at]
        left = [(low, high) for low, high in ((hole_start, start), (end, hole_end)) if low < high]
        self._hole_starts[at : at + 1] = [low for low, _ in left]
        self._hole_ends[at : at + 1] = [high for _, high in left]

    def _open_hole(self, start: int, end: int) -> None:
        """Makes a range part of the holes beside it, or a new one."""
        first = after = bisect_left(self._hole_starts, start)
        if first and self._hole_ends[first - 1] == start:
            first -= 1
            start = self._hole_starts[first]
        if self._hole_starts[after] == end:  # there is always a hole behind
            end = self._hole_ends[after]
            after += 1
        self._hole_starts[first:after] = [start]
        self._hole_ends[first:after] = [end]

    def _hand_over(self, block: Block) -> None:
        """Gives `block` what its range waits for; what it covers in full need not be remembered any more."""
        kept = []
        for start, end, events in self._busy:
            if start < block.end and block.offset < end:
                block.waits.extend(event for event in events if event not in block.waits)
                if block.offset <= start and end <= block.end:
                    continue
            if not all(self._device.is_done(event) for event in events):
                kept.append((start, end, events))
        self._busy = kept
