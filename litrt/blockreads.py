"""Reads runs of blocks of a chunk, and checks each: what a few rows of a large table cost."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

from litrt.arrays import ALIGN_BYTES
from litrt.crc import Bytes, extend_crc
from litrt.directio import StoppedError, fill, is_on_page
from litrt.errors import CorruptWeightError
from litrt.reader import Piece, Reader, check_size, corrupt, unreadable


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks of one chunk, side by side, that one request reads.

    Attributes:
        chunk: Where they are.
        offset: Their first byte in the values of the chunk.
        nbytes: Their bytes.
        dest: Where these go in the memory of all runs that are read together.
    """

    chunk: Piece
    offset: int
    nbytes: int
    dest: int

    @property
    def name(self) -> str:
        """The tensor."""
        return self.chunk.name

    @property
    def file(self) -> str:
        """The file of the chunk."""
        return self.chunk.file


def runs(reader: Reader, name: str, ranges: Iterable[tuple[int, int]]) -> list[Run]:
    """Returns what to read for ranges of bytes of tensor `name`, of whole blocks, to have them side by side."""
    pieces = reader.pieces(name)
    step = pieces[0].nbytes  # of all but the last
    found = []
    dest = 0
    for start, stop in ranges:
        while start < stop:
            piece = pieces[start // step]
            end = min(stop, piece.offset + piece.nbytes)
            found.append(Run(piece, start - piece.offset, end - start, dest))
            dest += end - start
            start = end
    return found


def read_run(reader: Reader, run: Run, part: Bytes) -> None:
    """Reads `run` into `part`, contiguous bytes of its size, and checks it.

    Raises:
        CorruptWeightError: If the chunk is missing, short or unreadable, or a block fails its checksum.
    """
    if run.nbytes == run.chunk.nbytes:
        reader.read_part(run.chunk, part)
        return
    info = reader.store[run.name]
    try:
        direct = (run.offset | run.nbytes) % ALIGN_BYTES == 0 and is_on_page(part)
        reader.files.read(run.chunk.file, direct, _fill, run, part, info.chunk_bytes)
        assert info.blocks is not None
        start = 0
        for nbytes, stored in info.blocks.in_chunk(run.chunk.offset + run.offset, run.nbytes):
            crc = extend_crc(0, part[start : start + nbytes])
            if crc != stored:
                what = f"is damaged from byte {run.offset + start} on: its checksum is {crc:08x} and should be"
                raise corrupt(run.chunk, f"{what} {stored:08x}", "Check the disk, then")
            start += nbytes
        return
    except CorruptWeightError:
        raise
    except FileNotFoundError:
        failure = corrupt(run.chunk, "is missing")
    except OSError as error:
        failure = unreadable(run.chunk, error)
    # Raised here, without the error that caused it: the frames of that one would keep `part` alive.
    raise failure


def _fill(fd: int, direct: bool, run: Run, part: Bytes, chunk_bytes: int) -> None:
    check_size(fd, run.chunk, chunk_bytes)
    if not direct:
        with contextlib.suppress(AttributeError, OSError):
            os.posix_fadvise(fd, run.offset, run.nbytes, os.POSIX_FADV_RANDOM)  # nothing ahead of what is asked for
    end = run.offset + run.nbytes
    stopped = fill(fd, [part.data], run.offset, end, direct)
    if stopped != end:
        raise StoppedError if direct else corrupt(run.chunk, f"ended at byte {stopped} while it was read")
