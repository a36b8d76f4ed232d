"""Parts of tables that are in the arena without the rest: the rows that operators ask for.

A part is an entry of the cache like any other: it is pinned while it is used, held while a tensor over it lives, and
stays for the next use until its room is needed. Where a plan gathers rows it keeps room for them, and a part takes that
first. Everything here is called under the pipeline's lock.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from litrt.blocks import merged
from litrt.budget import PAGE_BYTES
from litrt.cache import Cache, Entry, Part, State
from litrt.gather import Batch, Rows, batches, copy_rows
from litrt.layout import align_up
from litrt.loader import Loader
from litrt.plan import Plan
from litrt.tensors import TensorInfo
from litrt.trace import Segment

_BATCH_BYTES = 8 << 20
"""Rows are gathered in batches of this many bytes, or of this share of the arena, or of one block."""

_BATCH_SHARE = 64


class Parts:
    """The entries of parts.

    Args:
        cache: Where they are, behind the entries of segments.
        loader: Loads them.
    """

    def __init__(self, cache: Cache, loader: Loader) -> None:
        self._cache = cache
        self._loader = loader
        self._n_segments = len(cache.entries)
        self._entries: dict[Part, Entry] = {}
        self._taken: Counter[int] = Counter()  # bytes of tables that a pass has taken in parts, without a plan
        self.largest_bytes = 0

    def forget(self) -> None:
        """Forgets all parts; the cache has no entries of them any more."""
        self._entries.clear()

    def begin_pass(self) -> None:
        """Says that what was taken so far is of no account for what to take in parts."""
        self._taken.clear()

    def stored(self, index: int) -> TensorInfo:
        """Returns a table as it is stored."""
        return self._loader.stored(self._cache.entries[index].info)

    def covering(self, index: int, ranges: Sequence[tuple[int, int]]) -> Part:
        """Returns the part of whole blocks that has sorted ranges of the elements of a table."""
        stored = self.stored(index)
        size = stored.dtype.itemsize
        wanted = np.array(ranges, dtype=np.int64) * size
        found = merged(*stored.readable.covering(wanted[:, 0], wanted[:, 1]))
        return Part(index, tuple((start // size, stop // size) for start, stop in found))

    def batches(self, index: int, rows: Rows) -> list[Batch]:
        """Returns the batches in which rows are gathered."""
        stored, served = self.stored(index), self._cache.entries[index].info
        widest = max(stored.dtype.itemsize, served.dtype.itemsize)
        max_bytes = self.batch_bytes * stored.dtype.itemsize // widest
        return list(batches(rows, stored.readable, stored.dtype.itemsize, max_bytes))

    @property
    def batch_bytes(self) -> int:
        """Bytes that a batch may take in the arena, unless a row needs more."""
        if self._cache.room is not None:
            return self._cache.room[1]
        return min(_BATCH_BYTES, self._cache.arena.limit_bytes // _BATCH_SHARE)

    def room_bytes(self, limit_bytes: int) -> tuple[int, int]:
        """Returns the room for parts that a plan in that much should keep, and that those so far have needed."""
        least = align_up(
            max([self.largest_bytes, *(e.segment.size_bytes for e in self._cache.entries if e.segment.is_slot)]),
            PAGE_BYTES,
        )
        return max(least, align_up(min(_BATCH_BYTES, limit_bytes // _BATCH_SHARE), PAGE_BYTES)), least

    def n_at_once(self, index: int, ranges: Sequence[tuple[int, int]], plan: Plan | None) -> int:
        """Returns how many of sorted ranges, at least one, to take together, so that nothing that stays has to go."""
        if plan is not None:
            most_bytes = max((e.segment.size_bytes for e in self._cache.entries if e.segment.is_slot), default=0)
        elif self._cache.growable:
            return len(ranges)
        else:
            most_bytes = self._cache.arena.limit_bytes // 2

        def exceeds(count: int) -> bool:
            return self._made(self.covering(index, ranges[:count])).segment.size_bytes > most_bytes

        if not exceeds(len(ranges)):
            return len(ranges)
        return max(bisect_left(range(1, len(ranges)), True, key=exceeds), 1)

    def is_whole(self, index: int, plan: Plan | None) -> bool:
        """Says whether a table is there whole, or should be."""
        if plan is None:
            return False  # what is recorded is not to depend on what was there
        entry = self._cache.entries[index]
        return index not in plan.tables or entry.resident or entry.state in (State.READING, State.READY)

    def serve(self, index: int, n_elements: int, plan: Plan | None) -> bool:
        """Says whether a use of so many elements of a table should take a part of it, and not all of it.

        Without a plan, as long as all such uses in a pass together have taken less than all of it would.
        """
        if self.is_whole(index, plan):
            return False
        if plan is not None:
            return True
        stored = self.stored(index)
        self._taken[index] += n_elements * stored.dtype.itemsize
        tight = self._cache.is_tight(self._cache.entries[index].segment.size_bytes)
        return self._taken[index] < stored.nbytes or tight

    def entry(self, part: Part) -> Entry:
        """Returns the entry of a part."""
        found = self._entries.get(part)
        if found is None:
            found = self._entries[part] = self._new(part)
        pinned = (entry.segment.size_bytes for entry in self._entries.values() if entry.n_pins and entry is not found)
        self.largest_bytes = max(self.largest_bytes, found.segment.size_bytes + sum(pinned))
        return found

    def _new(self, part: Part) -> Entry:
        for key, entry in list(self._entries.items()):
            if entry.state is State.ABSENT and not (entry.n_pins or entry.n_waiting):
                del self._entries[key]
                self._cache.entries.remove(entry)
        made = self._made(part)
        self._cache.entries.append(made)
        return made

    def gather(
        self,
        index: int,
        rows: Rows,
        batches: Sequence[Batch],
        lock: threading.Condition,
        hold: Callable[[list[Entry]], object],
        unpin: Callable[[list[Entry]], object],
        gathered: Callable[[int], None],
    ) -> torch.Tensor:
        """Returns the elements of rows of a table, copied out of parts; called without the lock.

        Args:
            index: The table.
            rows: What is wanted.
            batches: In which parts to take it.
            lock: Enters the pipeline's lock.
            hold: Pins entries and waits until they are there, under the lock.
            unpin: Undoes that.
            gathered: Told of the bytes of every part.
        """
        served, stored = self._cache.entries[index].info.dtype, self.stored(index).dtype
        taken = torch.empty(len(rows.numbers) * rows.n_elements * served.itemsize, dtype=torch.uint8)
        dest = taken.numpy().reshape(len(rows.numbers), -1)
        for batch in batches:
            with lock:
                entry = self.entry(Part(index, batch.ranges))
                hold([entry])
                assert entry.block is not None
                memory = self._cache.arena.memory(entry.block)
            try:
                copy_rows(batch, memory, dest, served.itemsize)
            finally:
                del memory
                with lock:
                    unpin([entry])
            # Not after an exception: what is known of blocks may be wrong then.
            with lock:
                if entry.is_loose:
                    self._cache.let_go(entry)
            gathered(batch.n_elements * stored.itemsize)
        return taken.view(served)

    def _made(self, part: Part) -> Entry:
        table = self._cache.entries[part.index]
        stored, served = self.stored(part.index), table.info
        info = TensorInfo(
            served.name, (part.n_elements,), served.dtype, part.n_elements * served.dtype.itemsize, "", 1, False
        )
        align_bytes = table.segment.align_bytes
        segment = Segment(
            f"rows of {served.name}",
            info.nbytes,
            align_up(info.nbytes, align_bytes),
            align_bytes,
            stored_bytes=part.n_elements * stored.dtype.itemsize,
        )
        return Entry(segment, info, part=part)

    def pieces(self, part: Part) -> Sequence[Any]:
        """Returns what to load of a part."""
        return self._loader.part_pieces(self._cache.entries[part.index].info, part.ranges)
