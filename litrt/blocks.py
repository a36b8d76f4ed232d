"""Checksums that are kept apart from the values: of a tensor's chunks, and of blocks of rows, parts of a chunk that can
be read and checked alone.

A block is whole rows of a tensor, side by side, and lies in one chunk. The last one of a chunk may be shorter.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK_BYTES = 64 << 10
"""A block has about this size: larger ones read more for a row, smaller ones need more requests and checksums."""

_ALIGN_BYTES = 4096
_MAX_ALIGNED = 4
"""How many times as large as `BLOCK_BYTES` a block becomes so that direct reads can put it in place."""

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Sums = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a tensor.

    Attributes:
        n_rows: Rows of the tensor along its lead axis.
        row_bytes: Bytes of one.
        chunk_rows: Rows that a chunk holds.
        block_rows: Rows that a block holds.
        crc32c: Checksums, of all blocks in order; none where whole chunks are read.
    """

    n_rows: int
    row_bytes: int
    chunk_rows: int
    block_rows: int
    crc32c: Sums | None = None

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest block."""
        return min(self.block_rows, self.n_rows) * self.row_bytes

    @property
    def per_chunk(self) -> int:
        """Blocks of a full chunk."""
        return -(-self.chunk_rows // self.block_rows)

    def covering(self, starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
        """Returns what to read for ranges of bytes of the tensor, none of them empty: those of whole blocks."""
        chunks, rows = np.divmod(starts // self.row_bytes, self.chunk_rows)
        firsts = chunks * self.chunk_rows + rows // self.block_rows * self.block_rows
        chunks, rows = np.divmod((stops - 1) // self.row_bytes, self.chunk_rows)
        ends = np.minimum((rows // self.block_rows + 1) * self.block_rows, self.chunk_rows)
        lasts = np.minimum(chunks * self.chunk_rows + ends, self.n_rows)
        return firsts * self.row_bytes, lasts * self.row_bytes

    def in_chunk(self, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """Returns the sizes and the checksums of the blocks in a range of whole blocks of one chunk."""
        assert self.crc32c is not None
        chunk, row = divmod(offset // self.row_bytes, self.chunk_rows)
        number = chunk * self.per_chunk + row // self.block_rows
        found = []
        while nbytes:
            size = min(self.block_rows, self.chunk_rows - row) * self.row_bytes
            size = min(size, nbytes)
            found.append((size, int(self.crc32c[number])))
            number, row, nbytes = number + 1, row + self.block_rows, nbytes - size
        return found

    def attributes(self) -> dict[str, Any]:
        """Returns what an array's attributes say of its blocks."""
        assert self.crc32c is not None
        return {"chunk_rows": self.chunk_rows, "block_rows": self.block_rows, "crc32c": _text(self.crc32c)}


def choose_block_rows(row_bytes: int, chunk_rows: int) -> int | None:
    """Returns how many rows a block of a new array has, or None where its chunks are not larger than one."""
    if not row_bytes:
        return None
    block_rows = max(1, BLOCK_BYTES // row_bytes)
    align_rows = _ALIGN_BYTES // math.gcd(_ALIGN_BYTES, row_bytes)
    aligned = -(-block_rows // align_rows) * align_rows
    if aligned * row_bytes <= _MAX_ALIGNED * BLOCK_BYTES:
        block_rows = aligned
    return block_rows if block_rows < chunk_rows else None


def sums_of_chunk(values: Bytes, block_bytes: int, crc: Callable[[int, Bytes], int]) -> list[int]:
    """Returns the checksums of the blocks in the bytes of a chunk, without its padding."""
    return [crc(0, values[start : start + block_bytes]) for start in range(0, len(values), block_bytes)]


def blocks_of(attributes: Mapping[str, Any], n_rows: int, row_bytes: int, chunk_rows: int) -> Blocks | None:
    """Returns the blocks that an array's attributes tell of, or None where they tell of none of such chunks.

    Raises:
        ValueError: If they are not as many as the tensor has.
    """
    told = attributes.get("blocks")
    if not isinstance(told, dict) or told.get("chunk_rows") != chunk_rows:
        return None
    block_rows = told.get("block_rows")
    if type(block_rows) is not int or block_rows < 1:
        raise ValueError(f"a block cannot have {block_rows!r} rows")
    n_full, rest = divmod(n_rows, chunk_rows)
    n_blocks = n_full * -(-chunk_rows // block_rows) + -(-rest // block_rows)
    return Blocks(n_rows, row_bytes, chunk_rows, block_rows, _sums(told, "blocks", n_blocks))


def attributes_of_chunks(chunk_rows: int, sums: Sequence[int] | Sums) -> dict[str, Any]:
    """Returns what an array's attributes say of the values of its chunks."""
    return {"chunk_rows": chunk_rows, "crc32c": _text(np.asarray(sums, dtype=np.uint32))}


def sums_of_chunks(attributes: Mapping[str, Any], n_rows: int, chunk_rows: int) -> Sums | None:
    """Returns the checksums of the values of chunks, without padding, or None where none of such chunks are told.

    Raises:
        ValueError: If they are not as many as the tensor has chunks.
    """
    told = attributes.get("chunks")
    if not isinstance(told, dict) or told.get("chunk_rows") != chunk_rows:
        return None
    return _sums(told, "chunks", -(-n_rows // chunk_rows))


def _text(sums: Sums) -> str:
    return base64.b64encode(sums.astype("<u4").tobytes()).decode()


def _sums(told: Mapping[str, Any], what: str, n_expected: int) -> Sums:
    try:
        sums = np.frombuffer(base64.b64decode(told.get("crc32c", ""), validate=True), dtype="<u4")
    except (TypeError, ValueError) as error:
        raise ValueError(f"the checksums of its {what} cannot be read: {error}") from error
    if len(sums) != n_expected:
        raise ValueError(f"there are checksums of {len(sums)} {what} in place of {n_expected}")
    return sums.astype(np.uint32)


def merged(starts: Sequence[int] | Ints, stops: Sequence[int] | Ints) -> list[tuple[int, int]]:
    """Returns the union of ranges that are sorted, with those that touch made one."""
    found: list[tuple[int, int]] = []
    for start, stop in zip(starts, stops, strict=True):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], int(stop)))
        else:
            found.append((int(start), int(stop)))
    return found
