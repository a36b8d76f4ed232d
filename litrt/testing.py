"""Doubles for tests: a device that runs behind the host, without one.

    device = litrt.testing.FakeDevice(run="late")
    with litrt.Runtime(model_ctor, store, budget="50%", device=device) as rt, device.watching():
        rt(x)                              # raises OrderError where bytes are used too early or overwritten too soon

The fake has the memory of the host, streams, events and a clock of its own. What an operator computes is computed at
once, though its end may be said to be still to come; copies wait in a queue, and run when `run` says so, or when
somebody waits for them. So a use of bytes whose copy nobody waited for sees poison, and is an error besides: every use
and every copy is checked against what the events order before it.
"""

from __future__ import annotations

import contextlib
import mmap
import random
import threading
import weakref
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from litrt.device import Bytes, CpuDevice, Event
from litrt.tensors import TensorInfo

_COPIES = -1
"""The copy stream; the streams of callers are counted from 0."""

_POISON = 0xFF
_MATMULS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::linear"})

Clock = dict[int, int]
"""Of every stream, how much of its work comes before a point."""


class OrderError(AssertionError):
    """Bytes that were used before an event had made them ready, or overwritten before an event said they were free."""


@dataclass(eq=False)
class FakeEvent:
    """A point in the work of a stream.

    Attributes:
        stream: The stream.
        before: What comes before it.
        has_happened: Whether the work before it is known to have run.
        time_s: When, on the clock of the device.
    """

    stream: int
    before: Clock
    has_happened: bool = False
    time_s: float = 0.0


@dataclass(eq=False)
class _Job:
    """Work in the copy stream's queue."""

    run: Callable[[], None]
    seconds: float
    waits: Sequence[FakeEvent]
    event: FakeEvent | None = None


@dataclass(frozen=True)
class _Access:
    """A range of device memory that a stream has used, and which part of its work that was."""

    start: int
    end: int
    stream: int
    tick: int

    def overlaps(self, start: int, end: int) -> bool:
        return self.start < end and start < self.end


@dataclass
class Mutation:
    """Rules to break, so that a test can see that breaking them is noticed.

    Attributes:
        ignore_wait: Callers do not wait for copies.
        ignore_waits: Copies do not wait for uses.
        early_record: The event of a copy is recorded before its last piece is queued.
    """

    ignore_wait: bool = False
    ignore_waits: bool = False
    early_record: bool = False


class FakeDevice(CpuDevice):
    """A device that runs behind the host, in memory of the host.

    Threads: any may call.

    Args:
        run: When queued copies run: "late", only when somebody waits for them; "early", at once; "random". So, too,
            for when the end of a use is known.
        bandwidth_bps: Bytes per second of a copy, on the device's clock.
        matmul_s: Seconds that a product of matrices takes, on that clock, where the device is watched.
        memory_bytes: Memory of the device.
        activation_bytes: What a pass is said to allocate beside its weights.
        seed: Of "random".
        mutation: Rules to break.

    Attributes:
        n_synchronized: Times that the host has waited for all work.
        copied_bytes: Bytes that were copied.
        now_s: The time of the caller's streams.
    """

    align_bytes = 512
    is_host = False

    def __init__(
        self,
        run: Literal["late", "early", "random"] = "late",
        *,
        bandwidth_bps: float = 1e9,
        matmul_s: float = 0.0,
        memory_bytes: int = 1 << 30,
        activation_bytes: int = 0,
        seed: int = 0,
        mutation: Mutation | None = None,
    ) -> None:
        self.n_synchronized = 0
        self.copied_bytes = 0
        self.now_s = 0.0
        self._run = run
        self._bandwidth_bps = bandwidth_bps
        self._matmul_s = matmul_s
        self._memory_bytes = memory_bytes
        self._activation_bytes = activation_bytes
        self._mutation = mutation or Mutation()
        self._rng = random.Random(seed)
        self._lock = threading.RLock()
        self._queue: deque[_Job] = deque()
        self._together: Clock = {}  # what came before the host last waited for all work
        self._seen: Clock = {}  # what the host knows to have happened
        self._clocks: defaultdict[int, Clock] = defaultdict(lambda: dict(self._together))
        self._copied_s = 0.0
        self._stalls: list[tuple[bool, float]] = []
        self._arenas: list[tuple[int, int]] = []
        self._allocated_bytes = 0
        self._writes: list[_Access] = []
        self._reads: list[_Access] = []
        self._stream = threading.local()
        self._last_event: FakeEvent | None = None

    # Memory.

    def allocate(self, n_bytes: int) -> Bytes:
        """Returns poisoned memory."""
        if n_bytes > self.free_bytes():
            raise MemoryError(f"{n_bytes} bytes asked for and {self.free_bytes()} free")
        mapping = mmap.mmap(-1, n_bytes + self.align_bytes)
        memory = np.frombuffer(mapping, dtype=np.uint8)
        start = -memory.ctypes.data % self.align_bytes
        memory = memory[start : start + n_bytes]
        memory[:] = _POISON
        with self._lock:
            arena = (memory.ctypes.data, memory.ctypes.data + n_bytes)
            self._arenas.append(arena)
            self._allocated_bytes += n_bytes
        weakref.finalize(mapping, self._free, arena)
        return memory

    def _free(self, arena: tuple[int, int]) -> None:
        with self._lock:
            self._arenas.remove(arena)
            self._allocated_bytes -= arena[1] - arena[0]
            # The system may give the same addresses out again.
            self._writes = [write for write in self._writes if not write.overlaps(*arena)]
            self._reads = [read for read in self._reads if not read.overlaps(*arena)]

    def allocate_host(self, n_bytes: int) -> Bytes:
        """Returns memory on a page."""
        return np.frombuffer(mmap.mmap(-1, max(n_bytes, 1)), dtype=np.uint8)[:n_bytes]

    def tensor(self, memory: Bytes, info: TensorInfo) -> torch.Tensor:
        """Returns a tensor over `memory`, which is no use of it."""
        with _disable_current_modes():
            return super().tensor(memory, info)

    def free_bytes(self) -> int:
        """Returns what is not allocated."""
        return self._memory_bytes - self._allocated_bytes

    def peak_bytes(self) -> int:
        """Returns what is allocated, and the activations."""
        return self._allocated_bytes + self._activation_bytes

    def copy_bps(self) -> float:
        """Returns the bandwidth that it was made with."""
        return self._bandwidth_bps

    # The copy stream.

    def fill(self, memory: Bytes, byte: int, waits: Sequence[Event] = ()) -> None:
        """Queues an overwrite."""
        self._queue_write(memory, 0, waits, lambda: memory.fill(byte))

    def copy(self, memory: Bytes, source: torch.Tensor, waits: Sequence[Event] = ()) -> None:
        """Queues a copy, which reads its source when it runs."""
        values = source.numpy()
        queued = zlib.crc32(values.tobytes())

        def run() -> None:
            if zlib.crc32(values.tobytes()) != queued:
                raise OrderError("host memory was overwritten before its copy had run")
            memory[:] = values

        self.copied_bytes += len(memory)
        self._queue_write(memory, len(memory), waits, run)

    def cast(
        self, memory: Bytes, dtype: torch.dtype, source: Bytes, stored: torch.dtype, waits: Sequence[Event]
    ) -> None:
        """Queues a cast."""
        self._queue_write(memory, 0, waits, lambda: CpuDevice.cast(self, memory, dtype, source, stored, ()))

    def _queue_write(self, memory: Bytes, n_bytes: int, waits: Sequence[Event], run: Callable[[], None]) -> None:
        with self._lock:
            events = [] if self._mutation.ignore_waits else [event for event in waits if isinstance(event, FakeEvent)]
            for before in (self._seen, *(event.before for event in events)):
                _join(self._clocks[_COPIES], before)
            start, end = memory.ctypes.data, memory.ctypes.data + len(memory)
            clock = self._clocks[_COPIES]
            for read in self._reads:
                if read.overlaps(start, end) and clock.get(read.stream, 0) < read.tick:
                    raise OrderError(f"a copy to {len(memory)} bytes that stream {read.stream} still uses")
            self._reads = [read for read in self._reads if not (start <= read.start and read.end <= end)]
            self._writes = [write for write in self._writes if not (start <= write.start and write.end <= end)]
            if self._mutation.early_record:
                self._last_event = FakeEvent(_COPIES, dict(clock))
            self._writes.append(_Access(start, end, _COPIES, self._tick(_COPIES)))
            self._queue.append(_Job(run, n_bytes / self._bandwidth_bps, events))
        self._progress()

    def record_copy(self) -> FakeEvent:
        """Returns an event behind what is queued."""
        with self._lock:
            event = FakeEvent(_COPIES, dict(self._clocks[_COPIES]))
            if self._mutation.early_record and self._last_event is not None:
                event = FakeEvent(_COPIES, dict(self._last_event.before))
            self._queue.append(_Job(lambda: None, 0.0, (), event))
        self._progress()
        return event

    def _progress(self) -> None:
        if self._run == "early":
            self._run_until(lambda: False)
        elif self._run == "random":
            n_jobs = self._rng.randrange(4)
            for _ in range(n_jobs):
                self._run_one()

    def _run_one(self) -> None:
        with self._lock:
            if not self._queue:
                return
            job = self._queue.popleft()
            with _disable_current_modes():
                job.run()
            started_s = max([self._copied_s, *(event.time_s for event in job.waits)])
            self._copied_s = started_s + job.seconds
            for event in job.waits:
                event.has_happened = True
            if job.event is not None:
                job.event.has_happened, job.event.time_s = True, self._copied_s

    def _run_until(self, is_enough: Callable[[], bool]) -> None:
        with self._lock:
            while self._queue and not is_enough():
                self._run_one()

    # The streams of callers.

    @contextlib.contextmanager
    def stream(self, number: int) -> Iterator[None]:
        """Makes another stream the calling thread's current one; what is queued there waits for nothing by itself."""
        before = self._current
        self._stream.number = number
        try:
            yield
        finally:
            self._stream.number = before

    @property
    def _current(self) -> int:
        return getattr(self._stream, "number", 0)

    def _tick(self, stream: int) -> int:
        clock = self._clocks[stream]
        clock[stream] = clock.get(stream, 0) + 1
        return clock[stream]

    def wait(self, event: Event, *, is_hit: bool) -> None:
        """Runs the copies that the event comes after, and lets the clock wait for them."""
        assert isinstance(event, FakeEvent)
        if self._mutation.ignore_wait:
            return
        with self._lock:
            self._run_until(lambda: event.has_happened)
            _join(self._clocks[self._current], event.before)
            if event.time_s > self.now_s:
                self._stalls.append((is_hit, event.time_s - self.now_s))
                self.now_s = event.time_s

    def record_use(self, events: list[Event]) -> None:
        """Adds an event of the current stream."""
        with self._lock:
            stream = self._current
            happened = self._run == "early" or (self._run == "random" and self._rng.random() < 0.5)
            event = FakeEvent(stream, dict(self._clocks[stream]), happened, self.now_s)
            events[:] = [other for other in events if other.stream != stream]
            events.append(event)

    def is_done(self, event: Event) -> bool:
        """Says whether an event has happened: if so, whatever is queued from now on comes after it."""
        assert isinstance(event, FakeEvent)
        with self._lock:
            before = event.before.get(event.stream, 0)
            event.has_happened = event.has_happened or before <= self._together.get(event.stream, 0)
            if event.has_happened:
                _join(self._seen, event.before)
            return event.has_happened

    def pause(self) -> None:
        """Runs one copy."""
        self._run_one()

    def synchronize(self) -> None:
        """Runs all copies; whatever comes then comes after all that was before."""
        with self._lock:
            self.n_synchronized += 1
            self._run_until(lambda: False)
            for clock in self._clocks.values():
                _join(self._together, clock)
            for clock in self._clocks.values():
                _join(clock, self._together)

    def mark(self) -> float:
        """Returns the time."""
        return self.now_s

    def take_stalls(self) -> tuple[int, float]:
        """Returns the waits since the last call."""
        with self._lock:
            stalls, self._stalls = self._stalls, []
        return sum(is_hit for is_hit, _ in stalls), sum(seconds for _, seconds in stalls)

    # The watch.

    def watching(self) -> TorchDispatchMode:
        """Returns a context in which every operator of this thread is checked."""
        return _Watch(self)

    def _use(self, tensor: torch.Tensor) -> None:
        with self._lock:
            start = tensor.untyped_storage().data_ptr()
            if not any(low <= start < high for low, high in self._arenas) or not tensor.numel():
                return
            end = start + tensor.untyped_storage().nbytes()
            stream = self._current
            clock = self._clocks[stream]
            _join(clock, self._seen)
            for write in self._writes:
                if write.overlaps(start, end) and clock.get(_COPIES, 0) < write.tick:
                    raise OrderError(f"stream {stream} uses {end - start} bytes that no event has made ready")
            self._reads.append(_Access(start, end, stream, self._tick(stream)))


class _Watch(TorchDispatchMode):
    def __init__(self, device: FakeDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_flatten((args, kwargs))[0]:
            if type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided:
                self._device._use(value)
        if func._schema.name in _MATMULS:
            with self._device._lock:
                self._device.now_s += self._device._matmul_s
        return func(*args, **(kwargs or {}))


def _join(clock: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)
