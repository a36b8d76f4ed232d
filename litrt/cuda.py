"""CUDA: the arena in device memory, copies on a stream of their own, events between them and the caller's stream.

In a steady pass nothing here allocates or waits for the device: events come from a pool and go back to it, and whether
one has happened is asked, never waited for.
"""

from __future__ import annotations

import ctypes
import mmap
import time
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from litrt.device import Bytes, Event, contiguous_strides
from litrt.errors import DeviceError
from litrt.tensors import TensorInfo

_PROBE_BYTES = 64 << 20
_N_PROBES = 5
_PAUSE_S = 20e-6
_LATE_S = 20e-6
"""A wait of less than this is the device's own latency."""


class CudaMemory:
    """A range of device memory, which torch takes as it is and keeps alive."""

    __slots__ = ("__weakref__", "_owner", "address", "nbytes")

    def __init__(self, owner: torch.Tensor, address: int, nbytes: int) -> None:
        self._owner = owner
        self.address = address
        self.nbytes = nbytes

    def __len__(self) -> int:
        return self.nbytes

    def __getitem__(self, part: slice) -> CudaMemory:
        start, stop, _ = part.indices(self.nbytes)
        return CudaMemory(self._owner, self.address + start, max(stop - start, 0))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.address if self.nbytes else 0, False),
            "strides": None,
            "version": 2,
        }


class CudaEvent:
    """An event of a pool, to which it returns when nobody refers to it any more."""

    __slots__ = ("_pool", "event", "stream")

    def __init__(self, pool: deque[torch.cuda.Event], stream: torch.cuda.Stream) -> None:
        self._pool = pool
        try:
            self.event = pool.pop()
        except IndexError:
            self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.stream = int(stream.cuda_stream)
        self.event.record(stream)

    def __del__(self) -> None:
        self._pool.append(self.event)


class CudaDevice:
    """Weights in the memory of one CUDA device.

    Threads: any may call; the caller's current stream is asked for at every call.

    Raises:
        DeviceError: If there is no such device.
    """

    align_bytes = 512  # what torch gives to every tensor: kernels choose by it
    is_host = False

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(f"device {str(device)!r} is not there: torch finds no CUDA device. Use device='cpu'.")
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise DeviceError(f"device {str(device)!r} is not there: torch finds {torch.cuda.device_count()} of them.")
        self.torch_device = torch.device("cuda", index)
        self._copies = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._pool: deque[torch.cuda.Event] = deque()
        self._waits: deque[tuple[CudaEvent, CudaEvent, bool]] = deque()  # who came, for what, and if it was a hit

    def allocate(self, n_bytes: int) -> CudaMemory:
        """Returns device memory."""
        with torch.inference_mode(False), torch.no_grad():
            owner = torch.empty(n_bytes + self.align_bytes, dtype=torch.uint8, device=self.torch_device)
        # The copy stream must not write before whoever had this memory is done with it.
        self._copies.wait_stream(torch.cuda.current_stream(self.torch_device))
        start = -owner.data_ptr() % self.align_bytes
        return CudaMemory(owner, owner.data_ptr() + start, n_bytes)

    def allocate_host(self, n_bytes: int) -> Bytes:
        """Returns page-locked memory, exactly that much; where the system refuses, other memory, with a warning."""
        mapping = mmap.mmap(-1, max(n_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = np.frombuffer(mapping, dtype=np.uint8)[:n_bytes]
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self.torch_device):
            error = int(runtime.cudaHostRegister(address, len(mapping), 0))
        if error:
            warnings.warn(
                f"cannot page-lock {n_bytes} bytes of host memory (CUDA error {error}): copies to the device will be "
                "slower. Give a smaller host_budget, or raise the limit of locked memory (ulimit -l).",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            weakref.finalize(mapping, runtime.cudaHostUnregister, address)
        return memory

    def tensor(self, memory: CudaMemory, info: TensorInfo) -> torch.Tensor:
        """Returns a contiguous tensor of the shape and dtype of `info` over `memory`."""
        with torch.inference_mode(False), torch.no_grad():
            made = torch.empty(0, dtype=info.dtype, device=self.torch_device)
            if not memory.nbytes:
                made = made.reshape(info.shape)
                made._litrt_memory = memory  # type: ignore[attr-defined]
                return made
            storage = self._bytes(memory).untyped_storage()
            return made.set_(storage, 0, info.shape, contiguous_strides(info.shape))

    def _bytes(self, memory: CudaMemory) -> torch.Tensor:
        return torch.as_tensor(memory, device=self.torch_device)

    def fill(self, memory: CudaMemory, byte: int, waits: Sequence[Event] = ()) -> None:
        """Queues an overwrite of `memory` among the copies."""
        if memory.nbytes:
            self._queue_waits(waits)
            with torch.cuda.stream(self._copies), torch.inference_mode(False), torch.no_grad():
                self._bytes(memory).fill_(byte)

    def copy(self, memory: CudaMemory, source: torch.Tensor, waits: Sequence[Event] = ()) -> None:
        """Queues a copy on the copy stream, behind `waits`."""
        self._queue_waits(waits)
        with torch.cuda.stream(self._copies), torch.inference_mode(False), torch.no_grad():
            self._bytes(memory).copy_(source, non_blocking=True)

    def cast(
        self, memory: CudaMemory, dtype: torch.dtype, source: CudaMemory, stored: torch.dtype, waits: Sequence[Event]
    ) -> None:
        """Queues a cast from one dtype to another on the copy stream, behind `waits`."""
        self._queue_waits(waits)
        with torch.cuda.stream(self._copies), torch.inference_mode(False), torch.no_grad():
            self._bytes(memory).view(dtype).copy_(self._bytes(source).view(stored))

    def _queue_waits(self, waits: Sequence[Event]) -> None:
        for event in waits:
            assert isinstance(event, CudaEvent)
            self._copies.wait_event(event.event)

    def record_copy(self) -> CudaEvent:
        """Returns an event of the copy stream."""
        return CudaEvent(self._pool, self._copies)

    def wait(self, event: Event, *, is_hit: bool) -> None:
        """Makes the caller's current stream wait, unless the event has happened already."""
        assert isinstance(event, CudaEvent)
        if self.is_done(event):
            return
        stream = torch.cuda.current_stream(self.torch_device)
        self._waits.append((CudaEvent(self._pool, stream), event, is_hit))
        stream.wait_event(event.event)

    def record_use(self, events: list[Event]) -> None:
        """Adds an event of the caller's current stream."""
        event = CudaEvent(self._pool, torch.cuda.current_stream(self.torch_device))
        events[:] = [other for other in events if other.stream != event.stream]
        events.append(event)

    def is_done(self, event: Event) -> bool:
        """Asks whether an event has happened."""
        assert isinstance(event, CudaEvent)
        return bool(event.event.query())  # type: ignore[no-untyped-call]

    def pause(self) -> None:
        """Sleeps for a few microseconds."""
        time.sleep(_PAUSE_S)

    def synchronize(self) -> None:
        """Waits until the device has nothing to do."""
        torch.cuda.synchronize(self.torch_device)

    def mark(self) -> CudaEvent:
        """Returns an event of the caller's current stream."""
        return CudaEvent(self._pool, torch.cuda.current_stream(self.torch_device))

    def seconds(self, start: CudaEvent, end: CudaEvent) -> float:
        """Returns the device's time from one event to the other, both of which have happened."""
        return float(start.event.elapsed_time(end.event)) / 1e3

    def take_stalls(self) -> tuple[int, float]:
        """Returns what is known by now of the waits of callers' streams for copies."""
        n_late, stall_s = 0, 0.0
        while self._waits and self.is_done(self._waits[0][0]) and self.is_done(self._waits[0][1]):
            came, copied, is_hit = self._waits.popleft()
            seconds = self.seconds(came, copied)
            if seconds > _LATE_S:
                n_late += is_hit
                stall_s += seconds
        return n_late, stall_s

    def copy_bps(self) -> float:
        """Measures copies of page-locked memory, a few times, and returns the median bytes per second."""
        source = torch.from_numpy(self.allocate_host(_PROBE_BYTES))
        memory = self.allocate(_PROBE_BYTES)
        seconds = []
        for _ in range(_N_PROBES):
            start = self.record_copy()
            self.copy(memory, source)
            end = self.record_copy()
            self.synchronize()
            seconds.append(self.seconds(start, end))
        return _PROBE_BYTES / sorted(seconds)[_N_PROBES // 2]

    def free_bytes(self) -> int:
        """Returns what the device has free, and what torch has set aside and does not use."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        unused = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return int(free + unused)

    def peak_bytes(self) -> int:
        """Returns the most memory that torch has allocated since the last call, and begins to measure anew."""
        peak = torch.cuda.max_memory_allocated(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        return int(peak)
