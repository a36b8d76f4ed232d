"""Chunks that are compressed: files that are one Blosc buffer and its crc32c, decoded straight into place.

The file is read past the page cache into scratch, checked, and decoded by the calling thread alone, without the
interpreter lock, so that several threads decode at the same time. zarr-python reads the same files.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager

import numpy as np
from numcodecs import blosc

from litrt.arrays import ALIGN_BYTES, MAX_BLOCK_BYTES
from litrt.crc import CRC_BYTES, Bytes, extend_crc
from litrt.directio import Files, StoppedError, fill, size_of
from litrt.layout import align_up
from litrt.tensors import TensorInfo

HEADER_BYTES = 16
"""What a Blosc buffer begins with, and the most by which it is larger than what is in it."""

_DIRECT_MIN_BYTES = 256 << 10
_WORK_BYTES = 256 << 10
"""What Blosc and its codecs allocate while they decode, beside two blocks."""


class DamageError(Exception):
    """Says what is wrong with a chunk file, as the rest of a sentence that begins with its name."""


class PackedChunks:
    """Reads the compressed chunks of a store.

    Threads: any number may call `read` at the same time; each has scratch of its own, until it ends.

    Args:
        infos: The tensors of the store, of which those that are compressed matter.
        files: Opens its files.

    Attributes:
        scratch_bytes_per_task: Bytes that one call of `read` needs beside its destination, at worst.
    """

    def __init__(self, infos: Iterable[TensorInfo], files: Files) -> None:
        self._files = files
        packed = [info for info in infos if info.packed and info.nbytes]
        chunk_bytes = max((info.chunk_bytes for info in packed), default=0)
        padded_bytes = max((info.chunk_bytes for info in packed if info.is_padded), default=0)
        self._file_bytes = align_up(chunk_bytes + HEADER_BYTES + CRC_BYTES, ALIGN_BYTES) if packed else 0
        self._scratch_bytes = self._file_bytes + padded_bytes
        work_bytes = 2 * min(chunk_bytes, MAX_BLOCK_BYTES) + _WORK_BYTES if packed else 0
        self.scratch_bytes_per_task = self._scratch_bytes + work_bytes
        self._scratch = threading.local()

    def read(
        self, file: str, part: Bytes, chunk_bytes: int, in_flight: AbstractContextManager[object] | None = None
    ) -> int:
        """Reads the chunk in `file`, checks it, decodes its first bytes into `part`, and returns the file's checksum.

        What is in `in_flight`, which may keep the thread waiting, is the reading of a large file alone.

        Raises:
            DamageError: If it is short, long, fails its checksum or cannot be decoded. What `part` then holds is
                undefined; nothing outside it was written to.
            OSError: If it cannot be read.
        """
        scratch = self._memory()
        direct = chunk_bytes >= _DIRECT_MIN_BYTES
        in_flight = in_flight or contextlib.nullcontext()
        content = scratch[: self._files.read(file, direct, _fill, scratch, chunk_bytes, in_flight)]
        values = content[:-CRC_BYTES]
        found, stored = extend_crc(0, values), int.from_bytes(content[-CRC_BYTES:].tobytes(), "little")
        if found != stored:
            raise DamageError(f"is damaged: its checksum is {found:08x} and should be {stored:08x}")
        _check_header(values, chunk_bytes)
        # A chunk ends with padding where the tensor ends before it. Blosc decodes all or nothing.
        is_whole = len(part) == chunk_bytes
        dest = part if is_whole else scratch[self._file_bytes : self._file_bytes + chunk_bytes]
        try:
            blosc.decompress(values, dest)
        except (RuntimeError, ValueError) as error:
            raise DamageError(f"cannot be decoded ({error})") from None
        if not is_whole:
            part[:] = dest[: len(part)]
        return stored

    def _memory(self) -> Bytes:
        """Returns this thread's scratch, on a page: room for a file, then for a chunk with its padding."""
        scratch: Bytes | None = getattr(self._scratch, "memory", None)
        if scratch is None:
            mapping = mmap.mmap(-1, self._scratch_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                mapping.madvise(mmap.MADV_HUGEPAGE)
            scratch = self._scratch.memory = np.frombuffer(mapping, dtype=np.uint8)
        return scratch


def _fill(fd: int, direct: bool, scratch: Bytes, chunk_bytes: int, in_flight: AbstractContextManager[object]) -> int:
    """Reads a file to the start of `scratch`, and returns its size."""
    size = size_of(fd)
    most = chunk_bytes + HEADER_BYTES + CRC_BYTES
    if not HEADER_BYTES + CRC_BYTES < size <= most:
        raise DamageError(f"has {size} bytes in place of {HEADER_BYTES + CRC_BYTES + 1} to {most}")
    with in_flight if direct else contextlib.nullcontext():
        stopped = fill(fd, [scratch[: align_up(size, ALIGN_BYTES)].data], 0, size, direct)
    if stopped < size:
        raise StoppedError if direct else DamageError(f"ended at byte {stopped} while it was read")
    return size


def _check_header(values: Bytes, chunk_bytes: int) -> None:
    """Checks what Blosc would believe: the sizes of the buffer, of what is in it, and of the memory to decode it."""
    n_bytes, block_bytes, buffer_bytes = np.frombuffer(values[4:HEADER_BYTES].tobytes(), dtype="<u4").tolist()
    if buffer_bytes != len(values):
        raise DamageError(f"says that it has {buffer_bytes} compressed bytes, and has {len(values)}")
    if n_bytes != chunk_bytes:
        raise DamageError(f"holds {n_bytes} bytes in place of {chunk_bytes}")
    if block_bytes > MAX_BLOCK_BYTES:
        raise DamageError(f"has blocks of {block_bytes} bytes, and its metadata promises at most {MAX_BLOCK_BYTES}")
