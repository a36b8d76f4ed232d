"""Where weights are computed with: memory to serve them from, tensors over it, and the order of work there.

All that differs between devices is behind `Device`; the plan, the arena and the pipeline are the same for all.

Note on order. A device may run behind the host: copies into its memory are queued on a stream of their own, operators
on the caller's stream. Two rules keep them apart, and both are events. Whoever uses what was copied waits for the copy
(`wait`, before an operator is called). Whoever overwrites what was used waits for the use (the `waits` of `copy`, of
events that `record_use` recorded when the operator had been called). An event that was not recorded yet holds up
nobody, so that an event is handed from thread to thread only after it was recorded, under the pipeline's lock.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from litrt.memory import available_bytes
from litrt.tensors import TensorInfo

Bytes = npt.NDArray[np.uint8]

Memory = Any
"""Bytes of a device, contiguous; a slice of it is a view of it. On the CPU a `Bytes`."""

HUGE_PAGE_BYTES = 2 << 20


class Event(Protocol):
    """A point in the work of a stream.

    Attributes:
        stream: Which stream it was recorded on.
    """

    stream: int


class Device(Protocol):
    """A device that weights can be served on.

    Attributes:
        torch_device: The device that placeholders report.
        align_bytes: What the address of every weight is a multiple of.
        is_host: Whether its memory is the host's, so that the store is read straight into it.
    """

    torch_device: torch.device
    align_bytes: int
    is_host: bool

    def allocate(self, n_bytes: int) -> Memory:
        """Returns memory for `n_bytes`; that of the host takes none until it is written to."""
        ...

    def allocate_host(self, n_bytes: int) -> Bytes:
        """Returns memory of the host that copies to this device are fastest from."""
        ...

    def tensor(self, memory: Memory, info: TensorInfo) -> torch.Tensor:
        """Returns a tensor over `memory`, which it keeps alive, with a storage of its own."""
        ...

    def fill(self, memory: Memory, byte: int, waits: Sequence[Event] = ()) -> None:
        """Queues an overwrite of `memory` among the copies, to run once `waits` have happened."""
        ...

    def copy(self, memory: Memory, source: torch.Tensor, waits: Sequence[Event] = ()) -> None:
        """Queues a copy of the bytes of `source`, a uint8 tensor of the host, to run once `waits` have happened."""
        ...

    def cast(
        self, memory: Memory, dtype: torch.dtype, source: Memory, stored: torch.dtype, waits: Sequence[Event]
    ) -> None:
        """Queues a cast of `source`, values of dtype `stored`, to `memory` among the copies."""
        ...

    def record_copy(self) -> Event | None:
        """Returns an event that happens when the copies queued so far are done."""
        ...

    def wait(self, event: Event, *, is_hit: bool) -> None:
        """Makes what the caller queues from now on, on its current stream, wait for `event`.

        `is_hit` says whether it counts among the waits of `take_stalls`.
        """
        ...

    def record_use(self, events: list[Event]) -> None:
        """Adds an event that happens when what the caller has queued on its current stream is done.

        It takes the place of an earlier one of the same stream.
        """
        ...

    def is_done(self, event: Event) -> bool:
        """Says whether `event` has happened."""
        ...

    def pause(self) -> None:
        """Lets a moment pass for a thread that waits for `is_done`."""
        ...

    def synchronize(self) -> None:
        """Waits until all that was queued is done. Never called in a steady pass."""
        ...

    def mark(self) -> Any:
        """Returns a moment of the caller's current stream, for `seconds`."""
        ...

    def seconds(self, start: Any, end: Any) -> float:
        """Returns the time from one mark to another; after `synchronize`, if the device runs behind the host."""
        ...

    def take_stalls(self) -> tuple[int, float]:
        """Returns how many hits were found to wait since the last call, and the seconds of all waits."""
        ...

    def copy_bps(self) -> float:
        """Returns the bytes per second of a large copy, measured; infinite where nothing has to be copied."""
        ...

    def free_bytes(self) -> int:
        """Returns the memory that can still be allocated."""
        ...

    def peak_bytes(self) -> int:
        """Returns the most memory that was allocated since the last call, or 0 where nobody knows."""
        ...


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the strides of a contiguous tensor."""
    strides = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def cast_bytes(memory: Bytes, dtype: torch.dtype, source: Bytes, stored: torch.dtype) -> None:
    """Writes values of dtype `stored` to `memory` as values of `dtype`, both in memory of the host."""
    with torch.inference_mode(False), torch.no_grad():
        torch.from_numpy(memory).view(dtype).copy_(torch.from_numpy(source).view(stored))


def move_bytes(memory: Bytes, source: int, dest: int, n_bytes: int) -> None:
    """Moves bytes of `memory` from one offset to another; the ranges may overlap. Nothing else is allocated."""
    assert max(source, dest) + n_bytes <= len(memory)
    ctypes.memmove(memory.ctypes.data + dest, memory.ctypes.data + source, n_bytes)


def give_back(memory: Bytes) -> None:
    """Gives the whole pages of part of a `CpuDevice`'s memory back to the host: they take none until written to."""
    mapping: Any = memory
    while isinstance(mapping, np.ndarray):
        mapping = mapping.base
    if isinstance(mapping, memoryview):
        mapping = mapping.obj
    if not isinstance(mapping, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = memory.ctypes.data - np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (start + memory.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < end:
        mapping.madvise(mmap.MADV_DONTNEED, first, end - first)


class CpuDevice:
    """Weights in anonymous huge pages of this process, which does all its work at once and in order.

    Direct reads of large requests into huge pages take a hundredth of a second of CPU per GB; into small pages five
    times that, which is compute taken from the model.
    """

    torch_device = torch.device("cpu")
    align_bytes = 64
    is_host = True

    def allocate(self, n_bytes: int) -> Bytes:
        """Returns address space aligned to huge pages; it is given back when its last view is gone."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        mapping = mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(mapping, dtype=np.uint8)
        start = -whole.ctypes.data % HUGE_PAGE_BYTES
        return whole[start : start + n_bytes]

    def allocate_host(self, n_bytes: int) -> Bytes:
        """Returns address space, as `allocate` does."""
        return self.allocate(n_bytes)

    def tensor(self, memory: Memory, info: TensorInfo) -> torch.Tensor:
        """Returns a contiguous tensor of the shape and dtype of `info` over `memory`."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self.tensor(memory, info)
        if not info.nbytes:
            return torch.from_numpy(memory).view(info.dtype).view(info.shape)
        return torch.frombuffer(memory, dtype=info.dtype).view(info.shape)

    def fill(self, memory: Memory, byte: int, waits: Sequence[Event] = ()) -> None:
        """Overwrites `memory`."""
        memory[:] = byte

    def copy(self, memory: Memory, source: torch.Tensor, waits: Sequence[Event] = ()) -> None:
        """Copies at once."""
        memory[:] = source.numpy()

    def cast(
        self, memory: Memory, dtype: torch.dtype, source: Memory, stored: torch.dtype, waits: Sequence[Event]
    ) -> None:
        """Casts at once."""
        cast_bytes(memory, dtype, source, stored)

    def record_copy(self) -> Event | None:
        """Returns None: all is done."""
        return None

    def wait(self, event: Event, *, is_hit: bool) -> None:
        """Returns at once."""

    def record_use(self, events: list[Event]) -> None:
        """Adds nothing."""

    def is_done(self, event: Event) -> bool:
        """Returns True."""
        return True

    def pause(self) -> None:
        """Returns at once."""

    def synchronize(self) -> None:
        """Returns at once."""

    def mark(self) -> float:
        """Returns the time."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Returns the difference."""
        return end - start

    def take_stalls(self) -> tuple[int, float]:
        """Returns none: whoever waits here is the caller, who knows."""
        return 0, 0.0

    def copy_bps(self) -> float:
        """Returns infinity."""
        return float("inf")

    def free_bytes(self) -> int:
        """Returns the memory that this process may still take."""
        return available_bytes()

    def peak_bytes(self) -> int:
        """Returns 0: torch does not count what it allocates on the host."""
        return 0
