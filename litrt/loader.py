"""Where the bytes of segments come from: straight from the store, or over a link from the host's memory."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from litrt.blockreads import Run, read_run, runs
from litrt.device import Bytes, Event, Memory, cast_bytes
from litrt.gather import Rows
from litrt.plan import Plan
from litrt.ranges import named_range
from litrt.reader import Reader
from litrt.tensors import TensorInfo


class Loader(Protocol):
    """Loads segments into the memory of a device, piece by piece. Any thread may call any method."""

    def pieces(self, info: TensorInfo) -> Sequence[Any]:
        """Returns what to load of a segment, in order."""
        ...

    def load(self, piece: Any, memory: Memory, waits: Sequence[Event]) -> None:
        """Loads a piece into the `memory` of its segment, or queues that on the device, behind `waits`."""
        ...

    def stored(self, info: TensorInfo) -> TensorInfo:
        """Returns a segment as the store has it."""
        ...

    def part_pieces(self, info: TensorInfo, ranges: Sequence[tuple[int, int]]) -> Sequence[Any]:
        """Returns what to load of ranges of a segment's elements, of whole blocks, to have them side by side."""
        ...

    def gather(self, index: int, rows: Rows) -> torch.Tensor:
        """Returns rows of a segment in memory of the host, where the arena is not that."""
        ...

    def follow(self, plan: Plan | None) -> None:
        """Prepares for the loads of `plan`, or, for None, for whatever will be asked for."""
        ...

    def begin_pass(self, *, counting: bool) -> None:
        """Marks the start of a pass of the model, of which stalls and faults count, or do not."""
        ...

    def is_sound(self) -> bool:
        """Says whether nothing was left half done; called between passes."""
        ...

    def ask_again(self, after_s: float) -> None:
        """Says that something was waited for too long: what was asked for so many seconds ago is asked for again."""
        ...

    def close(self) -> None:
        """Lets go of everything; nothing is being loaded."""
        ...


class StoreLoader:
    """Reads segments from the store straight into place, in memory of the host.

    Args:
        reader: Reads the store.
        casts: Names of the tensors that are served in another dtype than they are stored in: those they pass through
            scratch, a piece at a time.
    """

    def __init__(self, reader: Reader, casts: Mapping[str, torch.dtype] | None = None) -> None:
        self._reader = reader
        self._casts = casts or {}
        self._scratch_bytes = max(
            (piece.nbytes for name in self._casts for piece in reader.pieces(name)),
            default=0,
        )
        self._scratch = threading.local()
        self.scratch_bytes_per_task = reader.scratch_bytes_per_task + self._scratch_bytes

    def pieces(self, info: TensorInfo) -> Sequence[Any]:
        """Returns the chunks of a segment."""
        return self._reader.pieces(info.name)

    def load(self, piece: Any, memory: Memory, waits: Sequence[Event] = ()) -> None:
        """Reads a chunk; the host has nothing to wait for."""
        with named_range("read", [piece.name]):
            self._load(piece, memory)

    def _load(self, piece: Any, memory: Memory) -> None:
        served = self._casts.get(piece.name)
        start, read = (piece.dest, self._read_run) if isinstance(piece, Run) else (piece.offset, self._reader.read_part)
        if served is None:
            read(piece, memory[start : start + piece.nbytes])
            return
        info = self._reader.store[piece.name]
        part = self._memory()[: piece.nbytes]
        read(piece, part)
        cast_bytes(memory[info.served(start, piece.nbytes, served)], served, part, info.dtype)

    def _read_run(self, run: Run, part: Bytes) -> None:
        read_run(self._reader, run, part)

    def _memory(self) -> Bytes:
        """Returns this thread's scratch, on a page."""
        memory: Bytes | None = getattr(self._scratch, "memory", None)
        if memory is None:
            memory = np.frombuffer(mmap.mmap(-1, self._scratch_bytes), dtype=np.uint8)
            self._scratch.memory = memory
        return memory

    def stored(self, info: TensorInfo) -> TensorInfo:
        """Returns the entry of the store."""
        return self._reader.store[info.name]

    def part_pieces(self, info: TensorInfo, ranges: Sequence[tuple[int, int]]) -> Sequence[Any]:
        """Returns the runs of blocks."""
        size = self.stored(info).dtype.itemsize
        return runs(self._reader, info.name, ((start * size, stop * size) for start, stop in ranges))

    def gather(self, index: int, rows: Rows) -> torch.Tensor:
        """Is never asked: on the host, rows are gathered in the arena."""
        raise NotImplementedError

    def follow(self, plan: Plan | None) -> None:
        """Does nothing: chunks are read as they are asked for."""

    def begin_pass(self, *, counting: bool) -> None:
        """Does nothing."""

    def is_sound(self) -> bool:
        """Returns True: there is nothing to leave half done."""
        return True

    def ask_again(self, after_s: float) -> None:
        """Makes requests of a remote store again; a disk answers when it does."""
        self._reader.store.ask_again(after_s)

    def close(self) -> None:
        """Closes the reader."""
        self._reader.close()
