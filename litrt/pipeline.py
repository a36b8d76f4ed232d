"""Executes a plan: fetches segments ahead of their use, hands them to operators, releases them after their last use.

Note on threads. One lock guards every field here and in the arena. Operators call `acquire` and `release` from the
caller's thread; reads run in daemon threads of the pipeline, outside the lock, each into the block of its entry. A
block that is being read into is never freed: `_finish`, which runs when its last piece is done, decides what becomes of
it. So a reader can never write into bytes that were given to somebody else.

Note on aliases. A tensor over a block has a storage of its own, which holds the only lasting reference to the view of
the arena that the entry's lease points to. When the lease is dead, no tensor sees the bytes. While it lives, the
block is HELD: litrt has let go of it, somebody has not, and it is not overwritten. Lease callbacks can run in any thread
at any allocation, also one that holds the lock, so they only append to a deque.
"""

from __future__ import annotations

import gc
import heapq
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import torch

from litrt.arena import Arena, Block
from litrt.cursor import Cursor
from litrt.device import Bytes, Device
from litrt.errors import BudgetError, ClosedError, TraceMismatchError
from litrt.plan import Plan
from litrt.reader import Piece, Reader
from litrt.store import TensorInfo
from litrt.trace import Segment, Use
from litrt.units import format_bytes

_SMALL_READ_BYTES = 64 << 10
"""Reads up to this size are all latency."""

_URGENT = -1
"""Queue priority of a piece that an operator waits for; planned ones have the number of their load."""


class State(Enum):
    """What the arena holds of a segment."""

    ABSENT = auto()  # nothing
    READING = auto()  # a block, into which reads are queued or under way
    READY = auto()  # a block with verified bytes
    HELD = auto()  # a block that was released while a tensor over it lives


@dataclass(eq=False, slots=True)
class Entry:
    """All that is known of one segment while a runtime lives."""

    segment: Segment
    info: TensorInfo
    state: State = State.ABSENT
    block: Block | None = None
    tensor: torch.Tensor | None = None
    lease: weakref.ref[Bytes] | None = None
    resident: bool = False
    n_pins: int = 0  # operators that use it now
    n_pending: int = 0  # pieces not read yet
    held_until: int = 0  # planned: released when this many steps have ended; 0: kept until room is needed
    last_use: int = 0
    error: BaseException | None = None


@dataclass(slots=True)
class Counters:
    """What the pipeline counts; see `litrt.Stats`."""

    n_hits: int = 0
    n_late: int = 0
    n_faults: int = 0
    read_bytes: int = 0
    stall_s: float = 0.0
    peak_bytes: int = 0


@dataclass(slots=True)
class _Access:
    """One use as it happened."""

    segments: tuple[int, ...]
    began_s: float
    bound_s: float = 0.0
    n_spanned: int = 1


@dataclass(slots=True)
class Binding:
    """Segments that an operator uses, from `acquire` to `release`."""

    indices: tuple[int, ...]
    tensors: list[torch.Tensor]
    step: int | None
    access: int


@dataclass(slots=True)
class _Log:
    """The uses of the pass under way, and how fast the store delivered what they waited for."""

    accesses: list[_Access] = field(default_factory=list)
    began_s: float = 0.0

    def uses(self, ended_s: float, *, keep: Callable[[int], bool] = lambda _: True) -> list[Use]:
        """Returns the uses with the seconds between them; what came before the first counts for the last."""
        uses = []
        for number, access in enumerate(self.accesses):
            following = self.accesses[number + 1].began_s if number + 1 < len(self.accesses) else ended_s
            seconds = max(following - access.bound_s, 0.0)
            segments = tuple(index for index in access.segments if keep(index))
            if segments:
                uses.append(Use(segments, seconds, access.n_spanned))
            elif uses:
                uses[-1] = Use(uses[-1].segments, uses[-1].compute_s + seconds, uses[-1].n_spanned)
        if uses:
            lead_s = max(self.accesses[0].began_s - self.began_s, 0.0)
            uses[-1] = Use(uses[-1].segments, uses[-1].compute_s + lead_s, uses[-1].n_spanned)
        return uses


class Pipeline:
    """Serves segments out of the arena, by a plan or on demand.

    Args:
        segments: What can be served.
        infos: Their entries in the store, in the same order.
        reader: Reads the store.
        device: Makes tensors over the arena.
        arena: Where the bytes are.
        n_threads: Threads that read.
        scratch_bytes: What those threads need beside the arena.
        growable: Raise the arena's limit instead of failing where a use does not fit.
        strict: Refuse what the plan did not predict.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        infos: Sequence[TensorInfo],
        reader: Reader,
        device: Device,
        arena: Arena,
        *,
        n_threads: int,
        scratch_bytes: int,
        growable: bool = False,
        strict: bool = False,
    ) -> None:
        self.counters = Counters()
        self.growable = growable
        self.evict_resident: Callable[[int], bool] = lambda _: False
        self._entries = [Entry(segment, info) for segment, info in zip(segments, infos, strict=True)]
        self._reader = reader
        self._device = device
        self._arena = arena
        self._scratch_bytes = scratch_bytes
        self._strict = strict
        self._plan: Plan | None = None
        self._cursor: Cursor | None = None
        self._n_ended = 0  # steps that have ended, from the start of the plan
        self._open_steps: list[int] = []
        self._next_load = 0  # from the start of the plan
        self._expiring: list[tuple[int, int]] = []  # heap of (held_until, index)
        self._clock = 0
        self._log = _Log()
        self._timings: deque[tuple[int, float]] = deque(maxlen=4096)  # (bytes, seconds) of loads on demand
        self._open_accesses: list[int] = []
        self._counting = False
        self._freed: deque[tuple[Entry, Block]] = deque()
        self._lock = threading.RLock()
        self._ready = threading.Condition(self._lock)
        self._work = threading.Condition(self._lock)
        self._queue: list[tuple[int, int, Entry, Piece]] = []
        self._n_queued = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._read_pieces, name=f"litrt-read-{number}", daemon=True)
            for number in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    # Operators: acquire, use, release.

    def acquire(self, indices: tuple[int, ...]) -> Binding:
        """Returns tensors for `indices`, loading what is not there, and pins them until `release`.

        Args:
            indices: Distinct segments that one operator uses.

        Raises:
            BudgetError: If they cannot be held together.
            CorruptWeightError: If one of them cannot be read.
            TraceMismatchError: If the plan did not predict this use, and `strict`.
            ClosedError: If the pipeline was closed.
        """
        with self._lock:
            self._check_open()
            began_s = time.perf_counter()
            step = self._step_of(indices)
            number = len(self._log.accesses)
            for outer in self._open_accesses:
                self._log.accesses[outer].n_spanned += 1
            access = _Access(indices, began_s)
            self._log.accesses.append(access)
            for index in indices:
                self._entries[index].n_pins += 1
            try:
                tensors = self._bind(indices)
            except BaseException:
                for index in indices:
                    self._entries[index].n_pins -= 1
                raise
            access.bound_s = time.perf_counter()
            if self._counting:
                self.counters.stall_s += access.bound_s - began_s
            if step is not None:
                self._open_steps.append(step)
            self._open_accesses.append(number)
            return Binding(indices, tensors, step, number)

    def release(self, binding: Binding) -> None:
        """Says that the operator is done with what `acquire` gave it."""
        binding.tensors.clear()
        with self._lock:
            self._clock += 1
            for index in binding.indices:
                entry = self._entries[index]
                entry.n_pins -= 1
                entry.last_use = self._clock
            if binding.access in self._open_accesses:
                self._open_accesses.remove(binding.access)
            if binding.step is not None and binding.step in self._open_steps:
                self._open_steps.remove(binding.step)
            if self._cursor is not None and not self._closed:
                self._advance()

    def _step_of(self, indices: tuple[int, ...]) -> int | None:
        if self._cursor is None:
            return None
        streamed = tuple(index for index in indices if not self._entries[index].resident)
        if not streamed:
            return None
        cursor = self._cursor
        expected, number = cursor.expected, cursor.step
        step = cursor.match(streamed)
        if step is None and self._strict:
            names = [tuple(self._entries[index].segment.name for index in part) for part in (expected, streamed)]
            raise TraceMismatchError(
                f"step {number} of the trace uses {', '.join(names[0])}, but {', '.join(names[1])} was used: "
                "call warmup() with an input that takes the same path, or use strict=False.",
                expected=names[0],
                actual=names[1],
                step=number,
            )
        if step is not None and step > self._n_ended:
            self._advance()  # a jump: what was skipped is released before room is needed
        return step

    def _bind(self, indices: tuple[int, ...]) -> list[torch.Tensor]:
        entries = [self._entries[index] for index in indices]
        self._reap()
        for entry in entries:
            if entry.state is State.HELD:
                self._revive(entry)
            if entry.error is not None:
                error, entry.error = entry.error, None
                raise error
        if self._counting:
            self.counters.n_hits += sum(entry.state is State.READY for entry in entries)
            self.counters.n_late += sum(entry.state is State.READING for entry in entries)
            self.counters.n_faults += sum(entry.state is State.ABSENT for entry in entries)
        absent = [entry for entry in entries if entry.state is State.ABSENT]
        if absent:
            began_s = time.perf_counter()
            self._load_now(absent, entries)
        while any(entry.state is not State.READY for entry in entries):
            failed = next((entry for entry in entries if entry.error is not None), None)
            if failed is not None:
                error, failed.error = failed.error, None
                assert error is not None
                raise error
            self._ready.wait()
            self._check_open()
        if absent:
            self._timings.append((sum(entry.info.nbytes for entry in absent), time.perf_counter() - began_s))
        return [self._tensor(entry) for entry in entries]

    def _tensor(self, entry: Entry) -> torch.Tensor:
        if entry.tensor is None:
            assert entry.block is not None
            memory = self._arena.memory(entry.block)
            block, freed = entry.block, self._freed
            entry.lease = weakref.ref(memory, lambda _: freed.append((entry, block)))
            entry.tensor = self._device.tensor(memory, entry.info)
        return entry.tensor

    # Room: who gets a block, and who has to go.

    def _load_now(self, absent: list[Entry], together: list[Entry]) -> None:
        """Places and queues `absent`, which an operator that uses `together` waits for."""
        absent = sorted(absent, key=lambda entry: (-entry.segment.align_bytes, -entry.segment.size_bytes))
        placed = []
        try:
            for entry in absent:
                entry.block = self._make_room(entry.segment)
                entry.state = State.READING  # so that nobody takes the block
                entry.n_pending = 1
                placed.append(entry)
        except BudgetError:
            for entry in placed:
                self._free(entry)
            # They may fit side by side, once those of them that are there do not lie across the room.
            movable = [entry for entry in together if entry.state is State.READY and entry.n_pins == 1]
            movable = [entry for entry in movable if not entry.resident]
            if not movable:
                raise
            for entry in movable:
                self._let_go(entry)
                if entry.state is not State.ABSENT:
                    raise
            self._load_now([*absent, *movable], absent)
            return
        for entry in placed:
            self._queue_reads(entry, _URGENT)

    def _make_room(self, segment: Segment) -> Block:
        """Returns a block for `segment`, evicting what is needed last, or raises BudgetError."""
        collected = False
        while True:
            block = self._arena.place(segment.nbytes, segment.size_bytes, segment.align_bytes)
            if block is not None:
                self._note_peak()
                return block
            if self._evict_one():
                continue
            if any(entry.state is State.READING and entry.n_pins == 0 for entry in self._entries):
                self._ready.wait()
                self._check_open()
                continue
            if not collected:
                # Tensors over released blocks may be waiting for the cycle collector.
                collected = True
                gc.collect()
                self._reap()
                continue
            if self._evict_one_resident():
                continue
            needed = self._arena.end + segment.size_bytes
            if self.growable and needed <= self._arena.capacity_bytes:
                self._arena.limit_bytes = max(self._arena.limit_bytes, needed)
                continue
            raise self._too_small(segment)

    def _too_small(self, segment: Segment) -> BudgetError:
        held_bytes = sum(entry.segment.size_bytes for entry in self._entries if entry.block is not None)
        needed = held_bytes + segment.size_bytes + self._scratch_bytes
        budget = self._arena.limit_bytes + self._scratch_bytes
        return BudgetError(
            f"budget {format_bytes(budget)} cannot hold {segment.name!r} ({format_bytes(segment.nbytes)})"
            + (f" beside {format_bytes(held_bytes)} in use" if held_bytes else "")
            + f"; the smallest workable budget is {format_bytes(needed)} ({needed} bytes).",
            budget_bytes=budget,
            needed_bytes=needed,
        )

    def _evict_one(self) -> bool:
        """Lets one unused streamed segment go: what no plan holds first, then what is needed last."""
        free = [
            entry
            for entry in self._entries
            if entry.state is State.READY and entry.n_pins == 0 and not entry.resident
        ]
        if not free:
            return False
        self._let_go(min(free, key=lambda entry: (entry.held_until > 0, -entry.held_until, entry.last_use)))
        return True

    def _evict_one_resident(self) -> bool:
        for index, entry in enumerate(self._entries):
            if entry.resident and entry.n_pins == 0 and entry.state is State.READY and self.evict_resident(index):
                entry.resident = False
                self._let_go(entry)
                return True
        return False

    def _let_go(self, entry: Entry) -> None:
        """Frees the block of an unused entry, unless tensors over it live: then it is HELD until they die."""
        entry.held_until = 0
        entry.tensor = None
        if entry.lease is not None and entry.lease() is not None:
            entry.state = State.HELD
        else:
            self._free(entry)

    def _free(self, entry: Entry) -> None:
        assert entry.block is not None
        self._arena.free(entry.block)
        entry.block = entry.tensor = entry.lease = None
        entry.state = State.ABSENT
        entry.n_pending = entry.held_until = 0

    def _revive(self, entry: Entry) -> None:
        # The bytes were never overwritten, so a block whose last tensor has not died can be used again.
        memory = entry.lease() if entry.lease is not None else None
        if memory is None:
            self._free(entry)
            return
        entry.tensor = self._device.tensor(memory, entry.info)
        entry.state = State.READY

    def _reap(self) -> None:
        """Frees the held blocks whose last tensor has died."""
        while self._freed:
            entry, block = self._freed.popleft()
            if entry.block is block and entry.state is State.HELD:
                self._free(entry)

    def _note_peak(self) -> None:
        self.counters.peak_bytes = max(self.counters.peak_bytes, self._arena.held_bytes + self._scratch_bytes)

    # The plan: issue loads as steps end, release what has had its last use.

    def start(self, plan: Plan) -> None:
        """Follows `plan` from now on: loads its residents, waits for them, and begins to fetch what streams.

        Called between passes, with nothing pinned. Residents that the plan before had stay as they are.

        Raises:
            CorruptWeightError: If a resident cannot be read.
            BudgetError: If tensors over released weights are in the way of a resident.
        """
        with self._lock:
            self._check_open()
            self.stop_plan()
            wanted = [self._entries[index] for index in plan.resident]
            new = [entry for entry in wanted if not entry.resident]
            for entry in self._entries:
                if not entry.resident and entry.state is State.READY and new:
                    self._let_go(entry)
            if any(entry.state is State.HELD for entry in self._entries):
                gc.collect()
                self._reap()
            for index, offset in plan.resident.items():
                self._load_resident(self._entries[index], offset)
            for entry in new:
                while entry.state is State.READING:
                    self._ready.wait()
                    self._check_open()
                if entry.error is not None:
                    error, entry.error = entry.error, None
                    raise error
                entry.resident = True
            self._plan = plan
            if plan.steps:
                self._cursor = Cursor([step.segments for step in plan.steps])
                self._advance()

    def _load_resident(self, entry: Entry, offset: int) -> None:
        if entry.state is State.HELD:
            self._revive(entry)
        if entry.state is State.READY:
            return
        block = self._arena.place_at(offset, entry.segment.nbytes, entry.segment.size_bytes)
        if block is None:
            block = self._make_room(entry.segment)
        self._note_peak()
        entry.block = block
        self._queue_reads(entry, 0)

    def stop_plan(self) -> None:
        """Goes back to loading on demand; what was fetched ahead stays until its room is needed."""
        with self._lock:
            self._plan = None
            self._cursor = None
            self._expiring.clear()
            self._open_steps.clear()
            self._n_ended = self._next_load = 0
            for entry in self._entries:
                entry.held_until = 0
            while any(entry.state is State.READING for entry in self._entries):
                self._ready.wait()
                self._check_open()

    def _advance(self) -> None:
        """Counts ended steps, releases what has had its last use, and issues what there is room for."""
        assert self._cursor is not None
        assert self._plan is not None
        self._n_ended = min(self._open_steps, default=self._cursor.position)
        self._reap()
        while self._expiring and self._expiring[0][0] <= self._n_ended:
            held_until, index = heapq.heappop(self._expiring)
            entry = self._entries[index]
            if entry.held_until != held_until:
                continue  # a later load took it over
            entry.held_until = 0
            if entry.state is State.READY and entry.n_pins == 0:
                self._let_go(entry)
        loads, n_steps = self._plan.loads, len(self._plan.steps)
        while loads:
            n_passes, number = divmod(self._next_load, len(loads))
            load, base = loads[number], n_passes * n_steps
            if base + load.after > self._n_ended:
                break
            self._next_load += 1
            if base + load.last >= self._n_ended:
                self._fetch(load.segment, load.offset, base + load.last + 1)

    def _fetch(self, index: int, offset: int | None, held_until: int) -> None:
        """Issues a planned load, or takes over what is there."""
        entry = self._entries[index]
        if entry.state is State.HELD:
            self._revive(entry)
        if entry.state is State.ABSENT and entry.error is None:
            block = self._place_planned(entry.segment, offset)
            if block is None:
                return  # something unplanned is in the way: loaded on demand, if that lasts
            self._note_peak()
            entry.block = block
            self._queue_reads(entry, self._next_load)
        if entry.state is not State.ABSENT:
            entry.held_until = held_until
            heapq.heappush(self._expiring, (held_until, index))

    def _place_planned(self, segment: Segment, offset: int | None) -> Block | None:
        if offset is not None:
            for block in self._arena.in_the_way(offset, segment.size_bytes):
                entry = next(entry for entry in self._entries if entry.block is block)
                if entry.state is State.READY and entry.n_pins == 0 and not entry.held_until and not entry.resident:
                    self._let_go(entry)
            placed = self._arena.place_at(offset, segment.nbytes, segment.size_bytes)
            if placed is not None:
                return placed
        while True:
            placed = self._arena.place(segment.nbytes, segment.size_bytes, segment.align_bytes)
            if placed is not None:
                return placed
            loose = [
                entry
                for entry in self._entries
                if entry.state is State.READY
                and not (entry.n_pins or entry.held_until or entry.resident)
            ]
            if not loose:
                return None
            self._let_go(min(loose, key=lambda entry: entry.last_use))

    # Passes, and what they asked for.

    def begin_pass(self, *, counting: bool) -> None:
        """Marks the start of a pass of the root module."""
        with self._lock:
            self._log = _Log(began_s=time.perf_counter())
            self._open_accesses.clear()
            self._counting = counting
            if self._cursor is not None:
                self._cursor.n_mismatches = 0
                self._open_steps.clear()
                self._cursor.begin_pass()
                self._advance()

    def end_pass(self) -> tuple[list[Use], int]:
        """Returns the uses of the pass that ends, of streamed weights only where a plan runs, and its mismatches."""
        with self._lock:
            ended_s = time.perf_counter()
            n_mismatches = self._cursor.n_mismatches if self._cursor is not None else 0
            return self._log.uses(ended_s, keep=lambda index: not self._entries[index].resident), n_mismatches

    def resident_tensor(self, index: int) -> torch.Tensor:
        """Returns a new tensor, with a storage of its own, over the bytes of a resident segment."""
        with self._lock:
            entry = self._entries[index]
            self._tensor(entry)
            memory = entry.lease() if entry.lease is not None else None
            assert memory is not None
            return self._device.tensor(memory, entry.info)

    def measured(self) -> tuple[float, float]:
        """Returns the bytes per second that the store has delivered on demand, and the seconds of the smallest reads."""
        with self._lock:
            small = sorted(seconds for n_bytes, seconds in self._timings if n_bytes <= _SMALL_READ_BYTES)
            latency_s = small[len(small) // 2] if small else 0.0
            large = [(n_bytes, seconds) for n_bytes, seconds in self._timings if n_bytes > _SMALL_READ_BYTES]
            timed = large or self._timings
            n_bytes = sum(n_bytes for n_bytes, _ in timed)
            seconds = sum(seconds for _, seconds in timed)
            return max(n_bytes / max(seconds, 1e-9), 1.0), min(latency_s, seconds / max(len(timed), 1))

    @property
    def budget_bytes(self) -> int:
        """What the arena and the scratch of reads take at most."""
        return self._arena.limit_bytes + self._scratch_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of the segments that stay."""
        with self._lock:
            return sum(entry.segment.nbytes for entry in self._entries if entry.resident)

    # Reads.

    def _queue_reads(self, entry: Entry, priority: int) -> None:
        pieces = self._reader.pieces(entry.info.name)
        entry.state = State.READING
        entry.n_pending = len(pieces)
        for piece in pieces:
            self._n_queued += 1
            heapq.heappush(self._queue, (priority, self._n_queued, entry, piece))
        self.counters.read_bytes += entry.info.nbytes
        self._work.notify(len(pieces))

    def _read_pieces(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._closed:
                    self._work.wait()
                if self._closed:
                    return
                _, _, entry, piece = heapq.heappop(self._queue)
                assert entry.block is not None
                memory = self._arena.memory(entry.block)
            error: BaseException | None = None
            try:
                self._reader.read(piece, memory)
            except BaseException as raised:
                # Its frames would keep the view of the arena alive.
                error = raised.with_traceback(None)
            del memory
            with self._lock:
                entry.error = entry.error or error
                entry.n_pending -= 1
                if entry.n_pending == 0:
                    self._finish(entry)

    def _finish(self, entry: Entry) -> None:
        entry.state = State.READY
        if entry.error is not None:
            self._free(entry)
        elif self._cursor is not None and not (entry.n_pins or entry.held_until or entry.resident):
            self._let_go(entry)  # its step was skipped while it was on its way
        self._ready.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this runtime is closed: make a new litrt.Runtime to use its model again.")

    def close(self) -> None:
        """Ends the threads, once their reads are done, and lets the arena go. Safe to call twice."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._work.notify_all()
            self._ready.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        with self._lock:
            for entry in self._entries:
                entry.tensor = entry.block = entry.lease = None
                entry.state = State.ABSENT
            self._arena.drop()
            self._reader.close()
