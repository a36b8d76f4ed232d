"""Executes a plan: fetches segments ahead of their use, hands them to operators, releases them after their last use.

Note on threads. One lock guards every field here, in the cache and in the arena. Operators call `acquire` and `release`
from the caller's thread; loads run in threads of their own, outside the lock, each into the block of its entry. A block
that is being loaded into is never freed: `_read_done`, called when its last piece is there, decides what becomes of it.
So a load can never write into bytes that were given to somebody else.

On a device that runs behind the host, "there" means: the copy is queued, and the event of its end recorded. `acquire`
makes the caller's stream wait for that event, and `release` records the one that the next copy to the same place waits
for.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NoReturn

import torch

from litrt.arena import Arena
from litrt.bindings import Binding, Counters, Timings
from litrt.budget import Budget
from litrt.cache import Cache, Crowded, Entry, State, gone
from litrt.device import Device, Memory
from litrt.errors import BudgetError, ClosedError, TraceMismatchError
from litrt.follower import Follower
from litrt.gather import Rows
from litrt.loader import Loader
from litrt.log import PassLog
from litrt.parts import Parts
from litrt.plan import Plan
from litrt.ranges import named_range
from litrt.reads import ReadThreads
from litrt.tensors import TensorInfo
from litrt.trace import Segment, Use
from litrt.turns import Turns, Unfinished

_URGENT = -1
"""Priority of a piece that an operator waits for; planned ones have the number of their load."""


_LOOK_S = 0.002
"""How often to look whether other threads are done with plain tensors."""


class _Forked:
    """Stands for the lock in a process that was forked off: the threads that read did not come along."""

    def __enter__(self) -> NoReturn:
        raise ClosedError(
            "this process was forked from the one that made this runtime, whose threads it does not have: make a "
            "litrt.Runtime in every process that uses one."
        )

    def __exit__(self, *_: object) -> None:
        raise AssertionError("never entered")


class Pipeline:
    """Serves segments out of the arena, by a plan or on demand.

    Args:
        segments: What can be served.
        infos: Their entries in the store, in the same order.
        loader: Loads them into the arena.
        device: Makes tensors over the arena.
        arena: Where the bytes are.
        n_threads: Threads that load.
        scratch_bytes: What those threads need beside the arena.
        growable: Raise the arena's limit instead of failing where a use does not fit.
        strict: Refuse what the plan did not predict.
        tables: Segments of which rows may be there without the rest.
        timeout_s: Seconds after which a read is taken to have stalled, at least; None if the loader sees to that.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        infos: Sequence[TensorInfo],
        loader: Loader,
        device: Device,
        arena: Arena,
        *,
        n_threads: int,
        scratch_bytes: int,
        growable: bool = False,
        strict: bool = False,
        tables: Set[int] = frozenset(),
        timeout_s: float | None = None,
    ) -> None:
        self.counters = Counters()
        lock = threading.RLock()
        self._lock: threading.RLock | _Forked = lock
        self._ready = threading.Condition(lock)
        self.cache = Cache(
            segments, infos, device, arena, scratch_bytes=scratch_bytes, growable=growable, wait=self._wait
        )
        self._entries = self.cache.entries
        self._segments = tuple(segments)
        self._turns = Turns(self._wait, self._ready.notify_all)
        self.cache.is_crowded = self._is_crowded
        # What other threads have pinned for it, but need no more: they may not come to say so.
        self.let_go_of_copied: Callable[[], None] = lambda: None
        # With plain tensors, beside those that wait for their turn: nobody asks for them.
        self.are_others_computing: Callable[[Set[int]], bool] = lambda _: False
        self.cache.is_watched = self._is_watched
        self._strict = strict
        self._tables = tables
        self._slot = tuple(index for index, segment in enumerate(segments) if segment.is_slot)
        self._slot_lock = threading.RLock()
        self._device = device
        self._loader = loader
        self._parts = Parts(self.cache, loader)
        self._closed = False
        self._unfinished = Unfinished()
        self.mend: Callable[[], None] = lambda: None  # puts right what was broken off, unless there is a pass
        self._failed: list[Entry] = []  # whose last read has failed, waited for or not
        self._is_undone = False  # while a reset is not done
        self._plan: Plan | None = None
        self._follower: Follower | None = None  # of the plan, if that is to be followed
        self._log = PassLog()
        self._ended_s: Any = 0.0
        self._counting = False
        self._pass_thread: int | None = None  # while there is a pass, which is recorded and follows the plan
        self._at_begin = (0, 0.0)  # of the pass: bytes read, and seconds of reading, before it
        self._timings = Timings()
        self._reads: ReadThreads[Entry] = ReadThreads(loader, lock, n_threads, self._read_done, timeout_s)

    # Operators: acquire, use, release.

    def acquire(self, indices: tuple[int, ...]) -> Binding:
        """Returns tensors for `indices`, loading what is not there, and pins them until `release`.

        Args:
            indices: Distinct segments that one operator uses.

        Raises:
            BudgetError: If they cannot be held together.
            CorruptWeightError: If one of them cannot be read.
            StalledReadError: If a read has not ended in time.
            TraceMismatchError: If the plan did not predict this use, and `strict`.
            ClosedError: If the pipeline was closed.
        """
        self._mend()
        with self._lock, self._unfinished:
            self._check_open()
            return self._bind(indices, [self._entries[index] for index in indices])

    def acquire_rows(self, index: int, ranges: Sequence[tuple[int, int]]) -> Binding | None:
        """Returns a tensor of elements of a table and pins it, or None where the whole of it should be used.

        It has those of `ranges`, and others beside them: `binding.ranges` are side by side in it.

        Raises:
            BudgetError: As `acquire` does, like all others.
        """
        if index not in self._tables:
            return None
        self._mend()
        with self._lock, self._unfinished:
            self._check_open()
            part = self._parts.covering(index, ranges)
            if len(part.ranges) > 1 and not self._device.is_host:
                return None  # copies are of one range
            if part.n_elements == self._entries[index].info.n_elements:
                return None
            if not self._parts.serve(index, part.n_elements, self._plan):
                return None
            return self._bind(self._slot, [self._parts.entry(part)])

    def n_at_once(self, index: int, ranges: Sequence[tuple[int, int]]) -> int:
        """Returns how many of sorted `ranges` of a table, at least one, to acquire together, as there is room."""
        with self._lock:
            return self._parts.n_at_once(index, ranges, self._plan)

    def gather(self, index: int, rows: Rows) -> torch.Tensor | None:
        """Returns rows of a table, one after the other, or None where the whole of it should be used.

        Raises:
            BudgetError: As `acquire` does, like all others.
        """
        if index not in self._tables:
            return None
        self._mend()
        with self._unfinished:
            with self._lock:
                self._check_open()
                if self._parts.is_whole(index, self._plan):
                    return None
                batches = self._parts.batches(index, rows)
                if not self._parts.serve(index, sum(batch.n_elements for batch in batches), self._plan):
                    return None
            if not self._device.is_host:
                return self._gather_by_host(index, rows)
            # Whoever has pinned something, in a fused module, may be waited for by whoever has the lock.
            lock = nullcontext() if self._turns.am_i_at_work else self._slot_lock
            with lock, self._noting(self._slot, index) as gathered:
                return self._parts.gather(index, rows, batches, self._ready, self._hold, self._turns.unpin, gathered)

    def _gather_by_host(self, index: int, rows: Rows) -> torch.Tensor:
        """Returns rows that came by way of the host: nothing of them was in the arena."""
        with self._noting((), index) as gathered, self._elsewhere():
            try:
                taken = self._loader.gather(index, rows).to(self._entries[index].info.dtype)
            except ClosedError:
                self._check_open()
                raise gone(self._entries[index]) from None  # `reset` has closed what it came from
            with self._lock:
                self.counters.read_bytes += taken.nbytes
                self.counters.gathered_bytes += taken.nbytes
            gathered(taken.nbytes)
        return taken.to(self._device.torch_device)

    @contextmanager
    def _elsewhere(self) -> Iterator[None]:
        """Makes those wait that want to be alone, for what pins nothing here."""
        with self._lock:
            self._turns.make_way()
            self._turns.enter_elsewhere()
        try:
            yield
        finally:
            with self._lock:
                self._turns.leave_elsewhere()

    @contextmanager
    def _noting(self, slot: tuple[int, ...], table: int) -> Iterator[Callable[[int], None]]:
        """Makes a use of what runs inside, of which rows are gathered; it is told of the bytes."""
        with self._lock:
            binding = self._bind(slot, [])
        n_bytes = 0

        def gathered(more_bytes: int) -> None:
            nonlocal n_bytes
            n_bytes += more_bytes

        try:
            with self._unfinished:
                yield gathered
                with self._lock:
                    self._log.gathered(binding.access, table, n_bytes, self._device.mark())
        finally:
            self.release(binding)

    def _bind(self, indices: tuple[int, ...], entries: list[Entry]) -> Binding:
        """Makes a use of `indices`; `entries` are those of them, or the part for which one is the room."""
        began_s = time.perf_counter()
        is_mine = self._pass_thread in (None, threading.get_ident())
        step = self._step_of(indices) if is_mine and self._follower is not None else None
        access = self._log.begin(indices, self._device.mark()) if is_mine else None
        part = entries[0].part if entries else None
        if part is not None:
            self._log.bound(access, self._device.mark())
        try:
            self._hold(entries)
        except BaseException:
            self._log.drop(access)
            raise
        try:
            tensors = [self.cache.tensor(entry) for entry in entries]
            if part is not None:
                self._log.gathered(access, part.index, entries[0].segment.fetch_bytes, self._device.mark())
            else:
                self._log.bound(access, self._device.mark())
            if self._counting:
                self.counters.stall_s += time.perf_counter() - began_s
            if step is not None and self._follower is not None:
                self._follower.begin(step)
            return Binding(indices, tensors, step, access, entries)
        except BaseException:
            self._log.drop(access)
            self._turns.unpin(entries)
            raise

    def _hold(self, entries: list[Entry]) -> None:
        """Pins entries and waits until they are all there."""
        self._check_open()
        self._turns.pin(entries)
        for entry in entries:
            if entry.state is not State.READY or entry.part is not None or entry.copied is not None:
                break
        else:
            if self._counting:
                self.counters.n_hits += len(entries)
            return
        try:
            with named_range("wait", (entry.segment.name for entry in entries)):
                hits = self._make_ready(entries)
            for entry in entries:
                if entry.copied is not None:
                    self._device.wait(entry.copied, is_hit=entry in hits)
        except BaseException:
            self._turns.unpin(entries)
            raise

    def release(self, binding: Binding) -> None:
        """Says that the operator is done with what `acquire` gave it."""
        binding.tensors.clear()
        with self._lock, self._unfinished:
            for entry in binding.entries:
                self.cache.used(entry)
                self._device.record_use(entry.used)
            self._turns.unpin(binding.entries)
            if self._unfinished.is_broken_off:
                self._log.drop(binding.access)
                return  # what is known of blocks may be wrong: nothing to follow a plan by
            self._log.end(binding.access, self._device.mark())
            if self._follower is not None and not self._closed:
                self._follower.end(binding.step)

    def restore(self, binding: Binding) -> None:
        """Reads again, in place, what an operator has written to."""
        with self._lock, self._unfinished:
            for entry in binding.entries:
                while entry.state is State.READING:
                    self._wait()  # another thread has written to it as well
                if entry.block is None:
                    continue  # and it could not be read again
                # Not before the operator that has written to it; nor does anything else come there before that.
                self._device.record_use(entry.block.waits)
                self._device.record_use(entry.used)
                self._queue_reads(entry, _URGENT)
            while any(entry.state is State.READING for entry in binding.entries):
                self._wait()

    def _step_of(self, indices: tuple[int, ...]) -> int | None:
        """Returns the step of the plan that a use of `indices` is, and moves the plan on to it."""
        streamed = tuple([index for index in indices if not self._entries[index].resident])
        if self._follower is None or not streamed:
            return None
        expected, number = self._follower.cursor.expected, self._follower.cursor.step
        step = self._follower.match(streamed)
        if step is None and self._strict:
            wanted, used = (tuple(self._entries[index].segment.name for index in part) for part in (expected, streamed))
            raise TraceMismatchError(
                f"step {number} of the trace uses {', '.join(wanted) or 'nothing that streams'}, but {', '.join(used)} "
                "was used: call warmup() with an input that takes the same path, or use strict=False.",
                expected=wanted,
                actual=used,
                step=number,
            )
        return step

    def _make_ready(self, entries: list[Entry]) -> list[Entry]:
        """Waits until pinned `entries` are all there, loading those of which nothing is; returns those that were."""
        self.cache.reap()
        if self._pass_thread is None:
            self._forgive(entries)
        self._revive(entries)
        whole = [entry for entry in entries if entry.part is None]
        hits = [entry for entry in whole if entry.state is State.READY]
        if self._counting:
            self.counters.n_hits += len(hits)
            self.counters.n_late += sum(entry.state is State.READING for entry in whole)
            self.counters.n_faults += sum(entry.state is State.ABSENT for entry in whole)
        absent = [entry for entry in entries if entry.state is State.ABSENT]
        began_s = time.perf_counter()
        while any(entry.state is not State.READY for entry in entries):
            is_absent = any(entry.state is State.ABSENT for entry in entries)
            if not (is_absent and self._place(entries)) and not self._wait():
                self._check_queued(entries)
            self._revive(entries)
        if absent:
            self._timings.add(sum(entry.segment.fetch_bytes for entry in absent), time.perf_counter() - began_s)
        return hits

    def _check_queued(self, entries: list[Entry]) -> None:
        """Raises where an interrupt has come between another thread and its queueing of reads of one of `entries`."""
        pending = self._reads.pending()
        for entry in entries:
            if entry.state is State.READING and not pending[entry] and not self._turns.is_taken:
                raise gone(entry)

    def _forgive(self, mine: Sequence[Entry] = ()) -> None:
        """Forgets errors of reads that nobody waits for: what failed then need not fail again.

        Args:
            mine: What the caller has pinned, and has not waited for yet.
        """
        for entry in self._failed:
            if entry.state is State.ABSENT:
                entry.error = None
        self._failed.clear()
        for entry in self._reads.pending():
            entry.is_forgiven = not entry.resident and entry.n_pins == (entry in mine)

    def _revive(self, entries: list[Entry]) -> None:
        """Takes back what of pinned `entries` was released and lives on; raises what reading one of them has raised."""
        for entry in entries:
            if entry.is_gone:
                raise gone(entry)
            if entry.state is State.HELD:
                self.cache.revive(entry)
            if (error := entry.take_error()) is not None:
                raise error

    def _place(self, entries: list[Entry]) -> bool:
        """Finds room for those of pinned `entries` that are absent and queues their reads, or waits for its turn.

        Returns:
            Whether it did; others of them may be in the way until they have been read.
        """
        with self._turns.mine(entries):
            self._revive(entries)
            absent = [entry for entry in entries if entry.state is State.ABSENT]
            if not absent:
                return True
            slot = self._entries[self._slot[0]] if self._slot else None
            if absent[0].part is not None and self.cache.place_in_room(absent[0], slot):
                self._queue_reads(absent[0], _URGENT)
                return True
            try:
                placed = self.cache.place_now(absent, entries)
            except Crowded:
                self._wait_for_others(entries)
                return True
            except BudgetError:
                if any(entry.state is State.READING for entry in entries):
                    return False
                raise
            for entry in placed:
                self._queue_reads(entry, _URGENT)
            return True

    def _is_crowded(self) -> bool:
        """Says whether other threads have pinned what they will let go of."""
        if not self._turns.are_others_at_work:
            return False
        self.let_go_of_copied()
        return True

    def _is_watched(self) -> bool:
        """Says whether other threads may have plain tensors that they will let go of."""
        return self.are_others_computing(self._turns.stuck) or self._turns.may_others_let_go()

    def _wait_for_others(self, entries: Sequence[Entry] = ()) -> None:
        """Lets others have the turn until there may be room. Those with plain tensors do not say when they are done."""
        self._turns.wait_for_others(entries, timeout_s=None if self._turns.are_others_at_work else _LOOK_S)

    # The plan: issue loads as steps end, release what has had its last use.

    def start(self, plan: Plan) -> None:
        """Follows `plan` from now on: loads its residents, waits for them, and begins to fetch what streams.

        On a device, work that is not of the caller's current stream need not wait for the residents: all is done here.

        Called between passes, with nothing pinned. Residents of the plan before must be among those of this one, and
        stay where they are.

        Raises:
            CorruptWeightError: If a resident cannot be read.
            BudgetError: If tensors over released weights are in the way of a resident.
        """
        with self._lock, self._turns.mine():
            self._check_open()
            self.stop()
            new = [(self._entries[i], offset) for i, offset in plan.resident.items() if not self._entries[i].resident]
            self.cache.room = None
            for index in self._slot:
                self._entries[index].segment = plan.segments[index]
                self.cache.unsettle(self._entries[index])
                if index in plan.resident:
                    self.cache.settle(self._entries[index])
                    # Not a block: parts take its place.
                    self.cache.room = plan.resident[index], plan.segments[index].size_bytes
                    new = [(entry, offset) for entry, offset in new if not entry.segment.is_slot]
            if new:
                self.let_go()
            for entry, offset in new:
                if entry.state is State.HELD:
                    self.cache.revive(entry)
                while entry.state is State.ABSENT:
                    try:
                        if self.cache.place_resident(entry, offset):
                            self._queue_reads(entry, 0)
                    except Crowded:
                        self._wait_for_others()
                self.cache.settle(entry)
            for entry, _ in new:
                while entry.state is State.READING:
                    self._wait()
            failed = [entry for entry, _ in new if entry.state is not State.READY]
            for entry in failed:
                self.cache.unsettle(entry)
            for entry in failed:
                if (error := entry.take_error()) is not None:
                    raise error
            self._device.synchronize()
            for entry in self._entries:
                if entry.resident:
                    entry.copied = None
            with nullcontext() if self._device.is_host else self._turns.alone():
                self._loader.follow(plan)
            self._plan = plan
            if plan.policy != "lru":
                self._follower = Follower(plan, self.cache, self._queue_reads)
                self._follower.advance()

    def stop(self) -> None:
        """Goes back to loading on demand; what was fetched ahead stays until its room is needed."""
        with self._lock:
            self._plan = self._follower = None
            for entry in self._entries:
                entry.held_until = 0
            while any(entry.state is State.READING for entry in self._entries):
                self._wait()

    def settle_reads(self) -> None:
        """Waits until nothing is being read.

        Raises:
            StalledReadError: If a read has not ended in time. Nothing has changed then.
        """
        with self._lock:
            while self._reads.pending():
                self._wait()

    def forget_residents(self) -> None:
        """Makes residents like any other segment, after `stop`."""
        with self._lock:
            self.cache.room = None
            for index, segment in enumerate(self._segments):
                self._entries[index].segment = segment  # the room for rows had the size that a plan gave it
                self.cache.unsettle(self._entries[index])

    def keep(self, offsets: Mapping[int, int]) -> None:
        """Makes residents of what is there of segments that are to stay, moved to their offsets."""
        with self._lock:
            self.cache.keep({self._entries[i]: offset for i, offset in offsets.items() if i not in self._slot})

    def let_go(self) -> bool:
        """Lets go of all that does not have to stay; says whether no tensor over it lives."""
        with self._lock:
            for entry in self._entries:
                if entry.is_loose:
                    self.cache.let_go(entry)
            self.cache.reap()
            return all(entry.state is not State.HELD for entry in self._entries)

    def resize(self, limit_bytes: int) -> None:
        """Makes an arena in which nothing has to stay as large as it is to be from now on."""
        with self._lock:
            self.stop()
            self.let_go()
            if not self.cache.arena.resize(limit_bytes):
                self.cache.arena.limit_bytes = min(limit_bytes, self.cache.arena.capacity_bytes)

    @property
    def n_threads(self) -> int:
        """Threads that load."""
        return self._reads.n_threads

    def change(self, settled: Budget, limit_bytes: int, n_threads: int, *, stays: Mapping[int, int]) -> str | None:
        """Changes the budget, with nothing that has to stay; peaks count anew.

        Args:
            settled: What the segments are in it, and the scratch.
            limit_bytes: Of the arena.
            n_threads: Threads that load.
            stays: What to keep of what is there, and where.

        Returns:
            The name of a segment over which there are tensors that are in the way, or None.
        """
        with self.alone():
            self.stop()
            self._segments = settled.segments
            self.forget_residents()
            is_last = False
            while not self._fit(limit_bytes, stays):
                if self._is_in_use():
                    self._turns.wait_for_others(timeout_s=_LOOK_S)
                elif not is_last:
                    is_last = True
                    self.cache.collect()
                else:
                    in_the_way = (e for e in self._entries if e.block is not None and e.block.end > limit_bytes)
                    held = (entry for entry in self._entries if entry.state is State.HELD)
                    return next(itertools.chain(in_the_way, held)).segment.name
                for index in range(len(self._segments)):
                    self.cache.evict_resident(index)  # of which others may have had a plain tensor until now
            self.cache.growable, self.cache.scratch_bytes = settled.growable, settled.scratch_bytes
            self.cache.peak_bytes = self.cache.arena.held_bytes + settled.scratch_bytes
            self._reads.resize(n_threads)
        return None

    def _is_in_use(self) -> bool:
        """Says whether other threads use something, or have it read, and will be done with it."""
        is_read = any(entry.state is State.READING for entry in self._entries)
        return is_read or self._turns.are_others_at_work or self._is_watched()

    def _fit(self, limit_bytes: int, stays: Mapping[int, int]) -> bool:
        """Gives the arena that limit, and what stays its place in it; says whether it could."""
        arena = self.cache.arena
        if not self._device.is_host or limit_bytes > arena.capacity_bytes:
            return self.let_go() and arena.resize(limit_bytes)
        arena.limit_bytes = max(arena.limit_bytes, limit_bytes)
        self.keep(stays)
        if not stays:
            self.let_go()
        return arena.shrink(limit_bytes)

    # Passes, and what they asked for.

    def begin_pass(self, *, counting: bool) -> None:
        """Marks the start of a pass of the root module by this thread; stalls and faults count, or do not."""
        with self._lock:
            self._pass_thread = threading.get_ident()
            self._forgive()
            self._take_stalls()
            self._log = PassLog(began_s=self._device.mark())
            self._counting = counting
            self._at_begin = (self.counters.read_bytes, self._reads.busy_s)
            self._loader.begin_pass(counting=counting)
            self._parts.begin_pass()
            if self._follower is not None:
                self._follower.begin_pass()

    def forget_pass(self, *, counting: bool) -> None:
        """Begins a new record of what is asked for, of a pass that has no beginning that we know."""
        with self._lock:
            self._log = PassLog(began_s=self._device.mark())
            self._counting = counting

    def end_pass(self) -> int:
        """Marks the end of a pass; returns how many of its uses were not as planned."""
        with self._lock:
            self._ended_s = self._device.mark()
            return self._follower.cursor.n_mismatches if self._follower is not None else 0

    def leave_pass(self) -> None:
        """Says that there is no pass any more, whether it ended or not."""
        with self._lock:
            self._pass_thread = None

    def uses(self) -> list[Use]:
        """Returns the uses of the pass that has ended, residents left out. Waits until the device has run it."""
        with self._lock:
            self._device.synchronize()
            return self._log.uses(
                self._ended_s, keep=lambda index: not self._entries[index].resident, seconds=self._device.seconds
            )

    def _take_stalls(self) -> None:
        """Counts the waits of the device that are known by now."""
        n_late, stall_s = self._device.take_stalls()
        if self._counting:
            self.counters.n_hits -= n_late
            self.counters.n_late += n_late
            self.counters.link_stall_s += stall_s

    def count(self) -> Counters:
        """Returns what was counted so far."""
        with self._lock:
            self._take_stalls()
            return replace(self.counters)

    # What an exception has broken off: an interrupt can come between any two steps.

    def _mend(self) -> None:
        """Puts right what was broken off before an operator begins outside of a pass."""
        if not self._unfinished.is_suspect or self._pass_thread is not None or self._closed:
            return
        if self._unfinished.is_broken_off or not self._turns.am_i_at_work:  # not inside of another operator
            self.mend()

    @property
    def may_be_unsound(self) -> bool:
        """Whether an exception has broken something off, or something is pinned, as far as can be told at once."""
        return bool(self._unfinished) or self._turns.is_anybody_at_work

    def is_sound(self, plan: Plan | None) -> bool:
        """Says whether nothing was left half done; called between passes, where `plan` should be followed."""
        with self._lock:
            self._unfinished.forget()
            pending = self._reads.pending()
            return (
                not self._is_undone
                and self._follows(plan)
                and self.cache.is_sound()
                and self._turns.is_sound(sum(entry.n_pins for entry in self._entries))
                # What another thread has just given a block is not queued yet.
                and all(
                    0 < entry.n_pending == pending[entry] or entry.n_pins
                    for entry in self._entries
                    if entry.state is State.READING
                )
                and self._loader.is_sound()
            )

    def _follows(self, plan: Plan | None) -> bool:
        """Says whether this plan is followed, its predictions aside, and no more stays: some may have made room."""
        stays = {
            index
            for index, entry in enumerate(self._entries)
            if entry.resident and (entry.state is State.READY or entry.segment.is_slot)
        }
        if self._plan is None or plan is None:
            return self._plan is plan and not stays
        return self._plan.loads == plan.loads and stays <= plan.resident.keys()

    def reset(self) -> None:
        """Makes it a new one, in other memory, that loads on demand. Tensors over the memory before keep their values.

        Raises:
            StalledReadError: If a read has not ended in time. Nothing can be used until this is called again.
        """
        with self._lock:
            self._is_undone = True
            self._plan = self._follower = self._pass_thread = None
            while True:
                self._reads.drop_queue()
                self.cache.forget(self._segments)  # what other threads have begun meanwhile as well
                self._parts.forget()
                self._turns.forget()
                self._ready.notify_all()
                if not self._reads.pending():
                    break
                self._reads.wait(self._ready)  # into memory of which there is to be no more than the budget
            self.cache.arena.reset()
            # What was counted since may be too much; no block was ever beyond the limit.
            self.cache.peak_bytes = min(self.cache.peak_bytes, self.budget_bytes)
            self._loader.follow(None)
            self._is_undone = False

    # What others ask.

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other threads from using weights; waits until those that do are done."""
        with self._lock, self._turns.alone():
            yield

    def resident_tensor(self, index: int) -> torch.Tensor | None:
        """Returns a new tensor, with a storage of its own, over the bytes of a segment; None if it does not stay."""
        with self._lock:
            entry = self._entries[index]
            return self.cache.another_tensor(entry) if entry.resident else None

    def memory(self, index: int) -> Memory | None:
        """Returns the bytes of a segment where they are; None if they are not."""
        with self._lock:
            block = self._entries[index].block
            return self.cache.arena.memory(block) if block is not None else None

    def measured(self) -> tuple[float, float]:
        """Returns the bytes per second that the store has delivered on demand, and the seconds of a small read."""
        with self._lock:
            latency_s = self._reads.latency_s
            return self._timings.bandwidth_bps(latency_s), latency_s

    def room_bytes(self, limit_bytes: int) -> tuple[int, int]:
        """Returns the room for rows that a plan in so much arena should keep, and that uses so far have needed."""
        with self._lock:
            return self._parts.room_bytes(limit_bytes)

    def delivered(self) -> tuple[int, float]:
        """Returns the bytes read since the pass began, and the seconds in which something was being read."""
        with self._lock:
            n_bytes, busy_s = self._at_begin
            return self.counters.read_bytes - n_bytes, self._reads.busy_s - busy_s

    @property
    def resident_bytes(self) -> int:
        """Bytes of the segments that stay."""
        with self._lock:
            return sum(entry.segment.fetch_bytes for entry in self._entries if entry.resident)

    @property
    def budget_bytes(self) -> int:
        """What the arena and the scratch of reads take at most."""
        return self.cache.arena.limit_bytes + self.cache.scratch_bytes

    # Reads.

    def _queue_reads(self, entry: Entry, priority: int) -> None:
        assert entry.block is not None
        if entry.part is not None:
            pieces = self._parts.pieces(entry.part)
            self.counters.gathered_bytes += entry.segment.fetch_bytes
        else:
            pieces = () if entry.segment.is_slot else self._loader.pieces(entry.info)
        entry.state = State.READING if pieces else State.READY
        entry.n_pending = len(pieces)
        entry.error, entry.is_forgiven = None, False
        self.counters.read_bytes += entry.segment.fetch_bytes
        self._reads.queue(priority, entry, pieces, self.cache.arena.memory(entry.block), tuple(entry.block.waits))

    def _read_done(self, entry: Entry, error: BaseException | None) -> None:
        if entry.is_gone:
            self._ready.notify_all()
            return
        entry.error = entry.error or error
        entry.n_pending -= 1
        if entry.n_pending:
            return
        entry.state = State.READY
        if entry.error is not None:
            if entry.is_forgiven:
                entry.error = None  # whoever waits for it reads it again
            else:
                self._failed.append(entry)
            self.cache.free(entry)
            self._ready.notify_all()
            return
        entry.copied = self._device.record_copy()
        if self._follower is not None and entry.is_loose:
            self.cache.free(entry)  # its step was skipped while it was on its way
        self._ready.notify_all()

    def _wait(self, timeout_s: float | None = None) -> bool:
        """Waits until something may have changed: a read has ended, or somebody has let go of something.

        Returns:
            Whether anything has; one looks around from time to time.
        """
        is_notified = self._reads.wait(self._ready, timeout_s)
        self._check_open()
        if not is_notified and timeout_s is None:
            self._turns.let_go_of_left()
        return is_notified

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be served any more."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this runtime is closed: make a new litrt.Runtime to use its model again.")

    def forked(self) -> None:
        """Refuses all work in a process that was forked off; whoever held the lock there is gone."""
        self._lock = _Forked()

    def close(self) -> None:
        """Ends the threads, once their reads are done, and lets the arena go. Safe to call twice."""
        if isinstance(self._lock, _Forked):
            return
        if self._reads.is_one_of_them:
            # The cycle collector ran there, and maybe under the lock that the others need to end.
            threading.Thread(target=self.close, name="litrt-close", daemon=True).start()
            return
        with self._lock:
            self._closed = True
            self._ready.notify_all()
        self._reads.close()
        with self._lock:
            self.cache.drop()
