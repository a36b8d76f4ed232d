"""The link to a device: segments pass through a host tier, page-locked, and are copied from there on their own stream.

The host tier is the same machinery once more. What a device streams in a pass, in the order of its loads, is a trace;
the tier has a budget and makes a plan for that trace: what stays in host memory, and what is read from the store in
every pass, ahead of its copy. It is exclusive: what is resident on the device has no place in it, so that the budgets
add up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch

from litrt.arena import Arena
from litrt.bindings import Binding, Counters
from litrt.budget import as_segments, casts_some, slot_segment
from litrt.device import Bytes, CpuDevice, Device, Event, Memory
from litrt.errors import BudgetError, LitrtError
from litrt.gather import Rows, rows_of
from litrt.loader import StoreLoader
from litrt.pipeline import Pipeline
from litrt.plan import Plan, make_plan, replan
from litrt.ranges import named_range
from litrt.reader import Reader
from litrt.tensors import TensorInfo
from litrt.trace import Trace, Use
from litrt.turns import idle

COPY_BYTES = 16 << 20
"""A copy is split into pieces of this size, so that an urgent one need not wait for a large one to end."""

_IN_FLIGHT_BYTES = 128 << 20
"""Copies that are queued and not done, at most: enough to keep a link busy, and what an urgent one waits for."""


class _HostMemory(CpuDevice):
    """Memory of the host that a device copies from."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def allocate(self, n_bytes: int) -> Bytes:
        """Returns memory that is page-locked where possible."""
        return self._device.allocate_host(n_bytes)


class HostTier:
    """Segments in host memory: on their way to a device, or kept for the next pass.

    Args:
        device: Where they go.
        reader: Reads the store.
        infos: The segments, as they are stored, under the indices that the device's pipeline has for them.
        budget_bytes: Host memory to take, at most; what a single segment needs is taken in any case.
        n_threads: Threads that read.
        tables: Segments of which rows may be gathered.
        slot_bytes: What of these is there at once at least.
        timeout_s: Seconds after which a read is taken to have stalled, at least.

    Call `open` before anything else.
    """

    def __init__(
        self,
        device: Device,
        reader: Reader,
        infos: Sequence[TensorInfo],
        budget_bytes: int,
        n_threads: int,
        tables: Set[int],
        slot_bytes: Iterable[int],
        timeout_s: float | None,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.plan: Plan | None = None
        self.pinned_bytes = self.peak_bytes = 0
        self.let_go_of_copied: Callable[[], None] = lambda: None  # waits until what is being copied is
        self._memory = _HostMemory(device)
        self._reader = reader
        self._n_threads = n_threads
        self._timeout_s = timeout_s
        self._scratch_bytes = n_threads * reader.scratch_bytes_per_task
        self._tables = tables
        self._slot = slot_segment(slot_bytes)
        self._segments = as_segments(infos) + self._slot
        self._infos = [*infos, *(TensorInfo.of_bytes(slot.name, slot.nbytes) for slot in self._slot)]
        self._before = Counters()  # of the pipelines before this one
        self._pipeline: Pipeline
        self._matrices: Mapping[int, int] = {}
        self._gathered: Set[int] = frozenset()

    def open(self, matrices: Mapping[int, int], arena_bytes: int) -> None:
        """Prepares for whatever will be asked for.

        Args:
            matrices: Tables of which rows are gathered by way of the host, to their bytes on the device.
            arena_bytes: What the device has.
        """
        self._matrices = matrices
        self.fit(arena_bytes)
        self._open()

    def fit(self, arena_bytes: int) -> None:
        """Says what the device has, from the next time on that nothing is planned: of a larger table, it has rows."""
        self._gathered = {index for index, nbytes in self._matrices.items() if nbytes > arena_bytes // 2}

    def _open(self) -> None:
        self._pipeline = self._make(self._least_bytes(range(len(self._segments))))

    def _least_bytes(self, indices: Iterable[int]) -> int:
        """Returns the room for the largest of `indices` twice: one is read while the other is copied."""
        sizes = (self._segments[index].size_bytes for index in indices if index not in self._gathered)
        return 2 * max(sizes, default=0) + sum(slot.size_bytes for slot in self._slot)

    def _is_matrix(self, index: int) -> bool:
        return len(self._infos[index].shape) == 2

    def _make(self, n_bytes: int) -> Pipeline:
        self.pinned_bytes = n_bytes
        self.peak_bytes = max(self.peak_bytes, n_bytes + self._scratch_bytes)
        pipeline = Pipeline(
            self._segments,
            self._infos,
            StoreLoader(self._reader),
            self._memory,
            Arena(self._memory, n_bytes, n_bytes),
            n_threads=self._n_threads,
            scratch_bytes=self._scratch_bytes,
            tables=self._tables,
            timeout_s=self._timeout_s,
        )
        pipeline.cache.evict_resident = lambda index: True  # nothing but the tier itself refers to it
        pipeline.let_go_of_copied = self.let_go_of_copied
        return pipeline

    def follow(self, plan: Plan | None, link_bps: float) -> None:
        """Prepares for the copies of `plan`, or, for None, for whatever will be asked for. Nothing is being copied.

        Raises:
            StalledReadError: If a read has not ended in time: as long as it has not, it keeps the memory before.
        """
        if plan is None:
            self._pipeline.settle_reads()
            self._close_pipeline()
            self._open()
            return
        size = [segment.size_bytes for segment in self._segments]
        # What is not resident on the device may be asked for at any time, planned or not.
        others = [index for index, info in enumerate(self._infos) if index not in plan.resident and info.path]
        n_bytes = min(sum(size[index] for index in others), self.budget_bytes - self._scratch_bytes)
        n_bytes = max(
            n_bytes,
            self._least_bytes(index for index in others if index not in plan.tables or not self._is_matrix(index)),
        )
        copied = [
            Use((load.segment,), self._infos[load.segment].nbytes / link_bps)
            for load in plan.loads
            if not plan.segments[load.segment].is_slot
        ]
        whole = [index for index in plan.tables if size[index] <= n_bytes // 2]
        if self.plan is not None and n_bytes == self.plan.budget_bytes:
            # The device streams something else of the same: what is here stays here.
            stays = self.plan.resident
            whole = [index for index in whole if index in stays]
            uses = [use for use in self._room_for(plan, whole) + copied if use.segments[0] not in stays]
            made = replan(self.plan, uses)
        else:
            disk_bps, latency_s = self._pipeline.measured()
            self._pipeline.settle_reads()
            self._close_pipeline()
            self._pipeline = self._make(n_bytes)
            while True:
                uses = [Use((index,), 0.0) for index in whole] + self._room_for(plan, whole) + copied
                if not uses:
                    return
                made = make_plan(Trace(self._segments, tuple(uses), disk_bps, latency_s), n_bytes)
                if all(index in made.resident for index in whole):
                    break
                whole = [index for index in whole if index in made.resident]  # all of it is never read for some rows
        self.plan = replace(made, tables=tuple(index for index in plan.tables if index not in whole))
        self._pipeline.start(self.plan)

    def _room_for(self, plan: Plan, whole: Sequence[int]) -> list[Use]:
        """Returns the use of the room for rows, where some of a table are read that does not stay whole."""
        slots = [index for index, segment in enumerate(self._segments) if segment.is_slot]
        return [Use((index,), 0.0) for index in slots if len(plan.tables) > len(whole)]

    def measured(self) -> tuple[float, float]:
        """Returns the bytes per second that the store has delivered, and the seconds of a small read."""
        return self._pipeline.measured()

    def acquire(self, index: int) -> Binding:
        """Returns a segment in host memory, which stays until `release`."""
        return self._pipeline.acquire((index,))

    def release(self, binding: Binding) -> None:
        """Says that what `acquire` returned was copied."""
        self._pipeline.release(binding)

    def acquire_rows(self, index: int, part: tuple[int, int]) -> Binding:
        """Returns elements of a segment, or all of it, in host memory, which stay until `release`."""
        binding = self._pipeline.acquire_rows(index, [part])
        return self.acquire(index) if binding is None else binding

    def gather(self, index: int, rows: Rows) -> torch.Tensor:
        """Returns rows of a table, one after the other."""
        taken = self._pipeline.gather(index, rows)
        if taken is None:
            binding = self.acquire(index)
            try:
                taken = rows_of(binding.tensors[0], rows)
            finally:
                self.release(binding)
        return taken

    def begin_pass(self, *, counting: bool) -> None:
        """Marks the start of a pass of the model. Copies for it may have begun long before."""
        self._pipeline.forget_pass(counting=counting)

    def is_sound(self) -> bool:
        """Says whether nothing was left half done."""
        return not self._pipeline.is_closed and self._pipeline.is_sound(self.plan)

    def count(self) -> Counters:
        """Returns what was counted so far."""
        return self._before + self._pipeline.count()

    def _close_pipeline(self) -> None:
        self._before = self.count()
        self._pipeline.close()
        self.plan = None

    def close(self) -> None:
        """Ends the threads and gives the memory back."""
        self._close_pipeline()
        self.pinned_bytes = 0


@dataclass(frozen=True, slots=True)
class CopyPiece:
    """The part of a segment that is copied at once: bytes as they are stored.

    Attributes:
        index: The segment.
        offset: Its first byte in what is loaded.
        nbytes: Its bytes.
        is_last: Whether it is the last one of that.
        part: The elements that are loaded, where these are not all.
    """

    index: int
    offset: int
    nbytes: int
    is_last: bool
    part: tuple[int, int] | None = None


class Link:
    """Loads segments into the memory of a device, from the host tier.

    Threads: `load` is called by one thread only, in which copies are queued; the others by any. That one lets go of
    what it has copied when it copies the next; whoever needs that room in the host tier before does it in its place.

    Args:
        device: Copies.
        host: Where from.
        stored: The segments as they are stored.
        served: The same as they are served: with other dtypes, they are cast on the device.
    """

    def __init__(
        self, device: Device, host: HostTier, stored: Sequence[TensorInfo], served: Sequence[TensorInfo]
    ) -> None:
        self._device = device
        self._host = host
        self._stored = stored
        self._served = served
        self._index = {info.name: index for index, info in enumerate(served)}
        self._bindings: dict[tuple[int, tuple[int, int] | None], Binding] = {}  # of which some pieces are to be copied
        self._failed: dict[tuple[int, tuple[int, int] | None], BaseException] = {}  # of which a piece could not be had
        self._in_flight: deque[tuple[Event | None, int, Binding | None]] = deque()
        self._in_flight_bytes = 0
        self._lock = threading.Lock()  # of these two
        self._gathering: set[int] = set()  # threads, and those that an exception has broken off at it
        host.let_go_of_copied = lambda: self._wait_until(0)
        casts = casts_some(served, stored)
        self.scratch_bytes = COPY_BYTES if casts else 0
        self._scratch: Memory | None = device.allocate(COPY_BYTES) if casts else None
        self.link_bps = device.copy_bps()

    def pieces(self, info: TensorInfo) -> Sequence[CopyPiece]:
        """Returns what to copy of a segment, in order."""
        return _copies(self._index[info.name], self.stored(info).nbytes)

    def stored(self, info: TensorInfo) -> TensorInfo:
        """Returns a segment as the store has it."""
        return self._stored[self._index[info.name]]

    def part_pieces(self, info: TensorInfo, ranges: Sequence[tuple[int, int]]) -> Sequence[CopyPiece]:
        """Returns what to copy of the elements of a segment; one range."""
        [(start, stop)] = ranges
        return _copies(self._index[info.name], (stop - start) * self.stored(info).dtype.itemsize, (start, stop))

    def load(self, piece: CopyPiece, memory: Memory, waits: Sequence[Event]) -> None:
        """Queues the copy of a piece, once there is little else under way."""
        self._wait_until(_IN_FLIGHT_BYTES - piece.nbytes)
        key = piece.index, piece.part
        if piece.offset == 0:
            self._failed.pop(key, None)
        elif key in self._failed:
            raise self._failed[key]  # it would be waited for once more for every piece
        binding = self._bindings.get(key)
        if binding is None:
            try:
                binding = self._bindings[key] = self._acquire(piece)
            except BaseException as error:
                self._failed[key] = error.with_traceback(None)
                raise
        event: Event | None = None
        try:
            with named_range("copy", [self._stored[piece.index].name]):
                self._copy(piece, memory, self._values(piece, binding), waits)
            event = self._device.record_copy()
        finally:
            if piece.is_last:
                del self._bindings[key]
            with self._lock:
                self._in_flight.append((event, piece.nbytes, binding if piece.is_last else None))
                self._in_flight_bytes += piece.nbytes

    def _copy(self, piece: CopyPiece, memory: Memory, values: torch.Tensor, waits: Sequence[Event]) -> None:
        source = values[piece.offset : piece.offset + piece.nbytes]
        stored, served = self._stored[piece.index], self._served[piece.index].dtype
        if stored.dtype == served:
            self._device.copy(memory[piece.offset : piece.offset + piece.nbytes], source, waits)
            return
        assert self._scratch is not None
        scratch = self._scratch[: piece.nbytes]  # the copy stream does one thing after the other
        self._device.copy(scratch, source)
        part = memory[stored.served(piece.offset, piece.nbytes, served)]
        self._device.cast(part, served, scratch, stored.dtype, waits)

    def _values(self, piece: CopyPiece, binding: Binding) -> torch.Tensor:
        """Returns the bytes that the offsets of `piece` count from."""
        values = _bytes(binding.tensors[0])
        if piece.part is None:
            return values
        return values[
            (piece.part[0] - (binding.ranges or ((0, 0),))[0][0]) * self._stored[piece.index].dtype.itemsize :
        ]

    def _acquire(self, piece: CopyPiece) -> Binding:
        try:
            return self._acquire_now(piece)
        except BudgetError:
            # Others are in the way: those on their way, and those that this one overtook, which are read again.
            self._wait_until(0)
            self._release_left()
            return self._acquire_now(piece)

    def _release_left(self) -> None:
        """Lets go of segments of which other pieces were to be copied: whoever copies these acquires them again."""
        while self._bindings:
            self._host.release(self._bindings.popitem()[1])

    def _acquire_now(self, piece: CopyPiece) -> Binding:
        if piece.part is None:
            return self._host.acquire(piece.index)
        return self._host.acquire_rows(piece.index, piece.part)

    def _wait_until(self, n_bytes: int) -> None:
        """Waits until no more than `n_bytes` of copies are under way, and lets go of what has been copied."""
        while True:
            with self._lock:
                if not self._in_flight:
                    return
                event, piece_bytes, binding = self._in_flight[0]
                is_done = event is None or self._device.is_done(event)
                if is_done:
                    self._in_flight.popleft()
                    self._in_flight_bytes -= piece_bytes
                elif self._in_flight_bytes <= max(n_bytes, 0):
                    return
            if not is_done:
                self._device.pause()
            elif binding is not None:
                self._host.release(binding)

    def gather(self, index: int, rows: Rows) -> torch.Tensor:
        """Gathers rows on the host; what is read for them, the tier counts."""
        thread = threading.get_ident()
        self._gathering.add(thread)
        try:
            taken = self._host.gather(index, rows)
        except LitrtError:
            self._gathering.discard(thread)
            raise
        self._gathering.discard(thread)
        return taken

    def follow(self, plan: Plan | None) -> None:
        """Makes the host tier plan for `plan`; nothing is being loaded."""
        self._wait_until(0)
        self._in_flight_bytes = 0  # an interrupt may have come before it was counted
        self._release_left()
        self._failed.clear()
        self._host.follow(plan, self.link_bps)
        if plan is None:  # the tier is a new one
            self._gathering -= idle(self._gathering)

    def fit(self, arena_bytes: int) -> None:
        """Says what the device has, before `follow(None)`."""
        self._host.fit(arena_bytes)

    def effective_bps(self, trace_bytes: int, budget_bytes: int) -> float:
        """Returns the bytes per second of the link, or less where the store has to deliver and is slower.

        Args:
            trace_bytes: What a pass uses.
            budget_bytes: What the device holds of that.
        """
        streamed_bytes = max(trace_bytes - budget_bytes, 0)
        from_store_bytes = max(streamed_bytes - self._host.budget_bytes, 0)
        if not from_store_bytes:
            return self.link_bps
        disk_bps, _ = self._host.measured()
        return min(self.link_bps, disk_bps * streamed_bytes / from_store_bytes)

    def begin_pass(self, *, counting: bool) -> None:
        """Marks the start of a pass of the model."""
        self._host.begin_pass(counting=counting)

    def is_sound(self) -> bool:
        """Says whether nothing was left half done here, nor in the host tier."""
        return not idle(self._gathering) and self._host.is_sound()

    def ask_again(self, after_s: float) -> None:
        """Does nothing: the host tier waits for the store, and sees to that."""

    def close(self) -> None:
        """Waits for the copies under way, and closes the host tier."""
        self._device.synchronize()
        self._bindings.clear()
        self._in_flight.clear()
        self._host.close()
        self._scratch = None


def _copies(index: int, nbytes: int, part: tuple[int, int] | None = None) -> list[CopyPiece]:
    return [
        CopyPiece(index, offset, min(COPY_BYTES, nbytes - offset), offset + COPY_BYTES >= nbytes, part)
        for offset in range(0, nbytes, COPY_BYTES)
    ]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of a contiguous tensor that has a storage of its own."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), 0, (tensor.nbytes,), (1,))
