"""Reads the bytes of weights into memory that the caller owns, and checks every one of them.

Three ways, with the same results. A chunk of a local, uncompressed store is a file that holds the values and
their crc32c: it is read straight into place, past the page cache where the file system allows that, because a
budget inside a container counts the page cache too. One that is compressed is read into scratch, and decoded into
place: `litrt.packed`. Everything else is read through zarr-python.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zarr
from zarr.buffer.cpu import NDBuffer

from litrt.arrays import ALIGN_BYTES, array_dtype, lead_axis
from litrt.bounded import bounded
from litrt.checked import MissingChunkError
from litrt.crc import CRC_BYTES, Bytes, extend_crc
from litrt.directio import Files, StoppedError, fill, is_on_page, size_of
from litrt.errors import CorruptWeightError, StoreChangedError
from litrt.links import link_out
from litrt.packed import DamageError, PackedChunks
from litrt.store import Store
from litrt.tensors import TensorInfo

DIRECT_MIN_BYTES = 256 << 10
"""Below this, a direct read costs more in latency than a buffered one does in copying."""

_SCRATCH_BYTES = 2 * ALIGN_BYTES
_ZEROS: Bytes = np.zeros(64 << 10, dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a tensor that one call reads: rows along its lead axis, contiguous in memory.

    Attributes:
        name: The tensor, by the name it is stored under.
        offset: First byte in the tensor.
        nbytes: Bytes, without padding.
        file: The chunk file; of a store that is read through zarr-python, the key of the array.
        index: Number of the piece in its tensor.
    """

    name: str
    offset: int
    nbytes: int
    file: str
    index: int


class _Scratch(threading.local):
    """Pages of each thread, from when it first needs them."""

    def __init__(self) -> None:
        self.memory: Bytes = np.frombuffer(mmap.mmap(-1, _SCRATCH_BYTES), dtype=np.uint8)


class Reader:
    """Reads pieces of the tensors of a store.

    Threads: any number may call any method at the same time; the reader starts none. The only state they
    share is what was found out about the store, which is only ever added to.

    Args:
        store: What to read.

    Attributes:
        files: Opens the chunk files.
        scratch_bytes_per_task: Bytes that one call of `read` needs beside its destination, at worst in this
            store.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        infos = list({info.name: info for info in store.values()}.values())
        others = [info.chunk_bytes for info in infos if info.nbytes and not (info.direct or info.packed)]
        # Through zarr-python: a chunk as it is stored, at most a little larger than decoded, and decoded.
        through_zarr_bytes = 2 * max(others) + len(_ZEROS) if others else 0
        direct = any(info.direct and info.nbytes >= DIRECT_MIN_BYTES for info in infos)
        self.files = Files()
        self._packed = PackedChunks(infos, self.files)
        # A thread keeps what it reads packed and direct chunks with.
        kept_bytes = self._packed.scratch_bytes_per_task + _SCRATCH_BYTES * direct
        self.scratch_bytes_per_task = kept_bytes + through_zarr_bytes
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._scratch = _Scratch()
        self._checked: dict[tuple[str, int], int] = {}  # the checksums of compressed chunks whose values were checked
        self._n_in_flight: int | None = None
        self._in_flight: AbstractContextManager[object] = contextlib.nullcontext()

    @property
    def n_in_flight(self) -> int | None:
        """How many threads may wait for the disk at once while others check and decode; None for all. Small reads do
        not count. It may be set while nothing is reading."""
        return self._n_in_flight

    @n_in_flight.setter
    def n_in_flight(self, n_in_flight: int | None) -> None:
        self._n_in_flight = n_in_flight
        self._in_flight = contextlib.nullcontext() if n_in_flight is None else threading.Semaphore(n_in_flight)

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Returns what to read of tensor `name`, in order; an empty tensor has no pieces.

        Raises:
            WeightNotFoundError: If the store has no such tensor.
            CorruptWeightError: If a chunk is reached through a link that leads out of the store.
        """
        info = self.store[name]
        pieces = self._pieces.get(info.name)
        if pieces is None:
            pieces = tuple(cut(info, self.store.root))
            looked_at: set[str] = set()
            for piece in pieces:
                check_link(piece, self.store.root, looked_at)
            # Two threads may both make them; they are equal, so the second changes nothing.
            self._pieces[info.name] = pieces
        return pieces

    def read(self, piece: Piece, dest: Bytes) -> None:
        """Reads `piece` into its place in `dest`, and checks it.

        Args:
            piece: One of `pieces`.
            dest: The bytes of the whole tensor, contiguous. Nothing outside the piece is written. Large
                pieces are read fastest where they begin at a multiple of 4096 bytes in memory.

        Raises:
            CorruptWeightError: If the chunk is missing, short, unreadable or fails its checksum. What `dest`
                then holds of the piece is undefined.
        """
        info = self.store[piece.name]
        if dest.dtype != np.uint8 or dest.shape != (info.nbytes,) or not dest.flags.c_contiguous:
            raise ValueError(
                f"{piece.name!r} is read into {info.nbytes} contiguous bytes; got shape {dest.shape} of {dest.dtype}."
            )
        self.read_part(piece, dest[piece.offset : piece.offset + piece.nbytes])

    def read_part(self, piece: Piece, part: Bytes) -> None:
        """Reads `piece` into `part`, the contiguous bytes of the piece alone, and checks it.

        Raises:
            CorruptWeightError: As `read` does.
        """
        info = self.store[piece.name]
        try:
            if info.packed:
                found = self._packed.read(piece.file, part, info.chunk_bytes, self._in_flight)
                self._check_packed(info, piece, part, found)
            elif not info.direct:
                self._read_through_zarr(info, piece, part)
                self._check_values(info, piece, extend_crc(0, part) if info.sums is not None else 0)
            else:
                direct = piece.nbytes >= DIRECT_MIN_BYTES and is_on_page(part)
                self.files.read(piece.file, direct, self._fill, piece, part, info.chunk_bytes)
            return
        except CorruptWeightError:
            raise
        except FileNotFoundError:
            failure = corrupt(piece, "is missing")
        except MissingChunkError as error:
            failure = corrupt(piece, "is missing", file=error.key)
        except DamageError as error:
            failure = corrupt(piece, str(error), "Check the disk, then")
        except OSError as error:
            failure = unreadable(piece, error)
        except Exception as error:
            if info.direct or info.packed or isinstance(error, MemoryError):
                raise  # which says nothing about the chunk
            failure = corrupt(piece, f"cannot be decoded ({error})", "Check the disk or the network, then")
        # Raised here, without the error that caused it: the frames of that one would keep `dest` alive.
        raise failure

    def read_tensor(self, name: str) -> torch.Tensor:
        """Returns tensor `name` in memory of its own."""
        info = self.store[name]
        tensor = torch.empty(info.nbytes, dtype=torch.uint8)
        for piece in self.pieces(name):
            self.read(piece, tensor.numpy())
        return tensor.view(info.dtype).reshape(info.shape)

    def close(self) -> None:
        """Closes what the store holds open; nothing may be reading."""
        self._arrays.clear()
        self.store.close()

    def _fill(self, fd: int, direct: bool, piece: Piece, part: Bytes, chunk_bytes: int) -> None:
        """Reads a chunk file and checks it: its size by where it ends, and its values by their checksum."""
        end = chunk_bytes + CRC_BYTES
        if direct:
            tail = self._scratch.memory
            n_whole = len(part) - len(part) % ALIGN_BYTES
            # One request; the tail of the values, and the padding and the checksum if they fit, go to scratch.
            with self._in_flight:
                stopped = fill(fd, [part[:n_whole].data, tail.data], 0, end, direct)
        else:
            tail = np.empty(CRC_BYTES + 1, dtype=np.uint8)  # a byte more shows that a file is longer than it should
            n_whole = len(part)
            stopped = fill(fd, [part.data, tail.data], 0, end, direct)
        if n_whole < len(part):
            part[n_whole:] = tail[: len(part) - n_whole]
        crc_at = chunk_bytes - n_whole
        if stopped == n_whole + len(tail) <= end:
            block = chunk_bytes - chunk_bytes % ALIGN_BYTES if direct else chunk_bytes
            stopped = fill(fd, [tail.data], block, end, direct)
            crc_at = chunk_bytes - block
        if stopped != end:
            if direct:
                raise StoppedError
            check_size(fd, piece, chunk_bytes)
            raise corrupt(piece, f"ended at byte {stopped} while it was read")
        stored = int.from_bytes(tail[crc_at : crc_at + CRC_BYTES].tobytes(), "little")
        found = _verify(piece, part, chunk_bytes, stored)
        self._check_values(self.store[piece.name], piece, found)

    def _check_packed(self, info: TensorInfo, piece: Piece, part: Bytes, of_file: int) -> None:
        """Checks decoded values, unless they are of a file like one of which they have been checked before."""
        key = piece.name, piece.index
        if info.sums is not None and self._checked.get(key) != of_file:
            self._check_values(info, piece, extend_crc(0, part))
            self._checked[key] = of_file

    def _check_values(self, info: TensorInfo, piece: Piece, found: int) -> None:
        """Raises an error where a chunk that is whole is not the one that the store had when it was opened."""
        if info.sums is None or found == info.sums[piece.index]:
            return
        expected = int(info.sums[piece.index])
        raise StoreChangedError(
            f"weight {piece.name!r}: {piece.file} is whole, but it is not what the store had when it was opened: the "
            f"checksum of its values is {found:08x} and should be {expected:08x}. If the store was replaced, open it "
            "again; if not, run litrt convert again.",
            name=piece.name,
            file=piece.file,
        )

    def _read_through_zarr(self, info: TensorInfo, piece: Piece, part: Bytes) -> None:
        """Reads the chunks of a band of rows one by one, so that scratch is bounded by one chunk."""
        stored = array_dtype(info.dtype)
        assert stored is not None, "open_store refuses other dtypes"
        values = part.view(np.dtype(stored))
        array = self._arrays.get(info.path)
        if array is None:
            found = self.store.group[info.path]
            assert isinstance(found, zarr.Array), "open_store refuses groups"
            array = self._arrays[info.path] = bounded(found)
        if not info.shape:
            array.get_basic_selection((), out=NDBuffer.from_numpy_array(values.reshape(())))
            return
        axis = lead_axis(info.shape)
        first = piece.index * info.chunk_rows
        rows = min(info.chunk_rows, info.shape[axis] - first)
        band = values.reshape((*info.shape[:axis], rows, *info.shape[axis + 1 :]))
        cuts = [
            [slice(start, min(start + step, extent)) for start in range(0, extent, step)]
            for extent, step in zip(band.shape, array.chunks, strict=True)
        ]
        for place in itertools.product(*cuts):
            source = list(place)
            source[axis] = slice(first, first + rows)
            array.get_basic_selection(tuple(source), out=NDBuffer.from_numpy_array(band[place]))


def check_link(piece: Piece, root: str | None, looked_at: set[str]) -> None:
    """Raises a CorruptWeightError where a link on the way to a chunk file leads out of the store.

    Args:
        piece: The piece of the chunk.
        root: The directory of the store.
        looked_at: Paths that have been looked at, which this adds to.
    """
    if root is not None and piece.file.startswith(root + os.sep):
        link = link_out(root, piece.file, looked_at)
        if link is not None:
            raise corrupt(piece, f"cannot be read, as {link} is a link that leads out of the store")


def cut(info: TensorInfo, root: str | None) -> list[Piece]:
    """Returns the pieces of a tensor in order, without a look at their files."""
    if not info.nbytes:
        return []
    axis = lead_axis(info.shape)
    rows = info.shape[axis] if info.shape else 1
    row_bytes = info.nbytes // rows
    pieces = []
    for index, first in enumerate(range(0, rows, info.chunk_rows)):
        file = info.path
        if (info.direct or info.packed) and root is not None:
            indices = ["0"] * len(info.shape)
            if indices:
                indices[axis] = str(index)
            file = os.path.join(root, info.path, "c", *indices)
        n_rows = min(info.chunk_rows, rows - first)
        pieces.append(Piece(info.name, first * row_bytes, n_rows * row_bytes, file, index))
    return pieces


def check_size(fd: int, piece: Piece, chunk_bytes: int) -> None:
    size = size_of(fd)
    if size != chunk_bytes + CRC_BYTES:
        raise corrupt(piece, f"has {size} bytes in place of {chunk_bytes + CRC_BYTES}")


def _verify(piece: Piece, part: Bytes, chunk_bytes: int, stored: int) -> int:
    """Checks the values in memory, and the padding of the last chunk, against the checksum in the file.

    Returns the checksum of the values.

    The padding is zeros, so that it need not be read to be checked; only when that fails is it read, because
    another writer may have padded with something else.
    """
    n_padding = chunk_bytes - len(part)
    crc = values = extend_crc(0, part)
    for done in range(0, n_padding, len(_ZEROS)):
        crc = extend_crc(crc, _ZEROS[: n_padding - done])
    if crc != stored and n_padding:
        crc = _extend_over_file(values, piece.file, len(part), chunk_bytes)
    if crc != stored:
        raise corrupt(
            piece, f"is damaged: its checksum is {crc:08x} and should be {stored:08x}", "Check the disk, then"
        )
    return values


def _extend_over_file(crc: int, file: str, start: int, end: int) -> int:
    buffer = np.empty(len(_ZEROS), dtype=np.uint8)
    with open(file, "rb", buffering=0) as source:
        source.seek(start)
        while start < end and (n_read := source.readinto(buffer[: end - start].data)):
            crc = extend_crc(crc, buffer[:n_read])
            start += n_read
    return crc


_ADVICE = {
    errno.EMFILE: "This process has too many files open: close some, or raise the limit (ulimit -n).",
    errno.ENFILE: "The system has too many files open: close some.",
    errno.EACCES: "Make it readable for this user.",
    errno.EPERM: "Make it readable for this user.",
    errno.ENOMEM: "Free some memory.",
}


def unreadable(piece: Piece, error: OSError) -> CorruptWeightError:
    """Returns the error for a chunk that the system does not read."""
    advice = _ADVICE.get(error.errno or 0)
    if isinstance(error, TimeoutError):
        advice = "Check the network, or what is behind it, then try again."
    if advice is None:
        return corrupt(piece, f"cannot be read ({error})", "Check the disk, then")
    message = f"weight {piece.name!r}: {piece.file} cannot be read ({error}). {advice}"
    return CorruptWeightError(message, name=piece.name, file=piece.file)


def corrupt(piece: Piece, what: str, first: str = "", file: str | None = None) -> CorruptWeightError:
    file = file or piece.file
    advice = f"{first} run" if first else "Run"
    return CorruptWeightError(
        f"weight {piece.name!r}: {file} {what}. {advice} litrt convert again.", name=piece.name, file=file
    )
