"""Rows of a table that is never held whole: its pieces pass through one slot, and the rows are copied out.

An embedding needs a few rows of what is often the largest weight of a model. Every piece that has wanted rows is read
and checked in full; the others are not read at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from litrt.device import Bytes
from litrt.reader import Piece
from litrt.store import TensorInfo


def gather_rows(
    ids: torch.Tensor,
    info: TensorInfo,
    pieces: Sequence[Piece],
    read: Callable[[Piece, Bytes], None],
    slot: torch.Tensor,
) -> tuple[torch.Tensor, int]:
    """Returns the rows `ids` of a table, as `F.embedding` does, and the bytes that were read.

    Args:
        ids: Integers of any shape.
        info: The table, of shape (rows, width).
        pieces: Its pieces, each of whole rows.
        read: Reads a piece into memory of its size.
        slot: uint8, room for the largest piece.

    Raises:
        IndexError: If an id is not a row of the table.
    """
    n_rows, width = info.shape
    flat = ids.reshape(-1).to(torch.int64)
    rows = torch.empty((flat.numel(), width), dtype=info.dtype)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= n_rows):
        raise IndexError("index out of range in self")
    row_bytes = info.nbytes // n_rows
    n_read_bytes = 0
    for piece in pieces:
        first = piece.offset // row_bytes
        n_here = piece.nbytes // row_bytes
        wanted = ((flat >= first) & (flat < first + n_here)).nonzero().squeeze(1)
        if not wanted.numel():
            continue
        part = slot[: piece.nbytes]
        read(piece, part.numpy())
        n_read_bytes += piece.nbytes
        rows[wanted] = part.view(info.dtype).view(n_here, width)[flat[wanted] - first]
    return rows.reshape(*ids.shape, width), n_read_bytes
