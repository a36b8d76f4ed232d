"""Reads all of a store and says what of it is damaged."""

from __future__ import annotations

import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from zarr.abc.store import Store as ZarrStore
from zarr.storage import StorePath

from litrt.compression import n_processors
from litrt.crc import Bytes, extend_crc
from litrt.errors import CorruptWeightError, StoreChangedError
from litrt.progress import Progress
from litrt.reader import Piece, Reader, check_link, cut
from litrt.store import Store, open_damaged

_MOST_THREADS = 8


def verify(
    store: str | os.PathLike[str] | ZarrStore | StorePath | Store, *, progress: bool = True
) -> list[CorruptWeightError]:
    """Reads every chunk of a store, past the page cache where that is possible, and checks it.

    Each thread holds one chunk; there are at most eight.

    Args:
        store: A store, or what `litrt.open_store` opens.
        progress: Shows a line of progress on stderr, if that is a terminal.

    Returns:
        An error for everything that is missing, short, unreadable or not what its checksums say, in the order of the
        store, but for weights of which the metadata is damaged, which come first. Each has the name of the weight and
        the file: `error.name`, `error.file`.

    Raises:
        StoreError: If there is no store, or what says which weights are in it is damaged.
    """
    opened, lost = (store, {}) if isinstance(store, Store) else open_damaged(store)
    reader = Reader(opened)
    pieces = [piece for name in opened if name not in opened.aliases for piece in cut(opened[name], opened.root)]
    memory, looked_at = _Memory(), set[str]()
    try:
        with (
            Progress(os.path.basename(opened.path.rstrip("/")), opened.total_bytes, shown=progress) as bar,
            ThreadPoolExecutor(min(n_processors() + 1, _MOST_THREADS)) as pool,
        ):

            def check(piece: Piece) -> CorruptWeightError | None:
                try:
                    check_link(piece, opened.root, looked_at)
                    return check_piece(reader, piece, memory.of(piece.nbytes))
                except CorruptWeightError as error:
                    return error
                finally:
                    bar.add(piece.nbytes)

            return [*lost.values()] + [error for error in pool.map(check, pieces) if error is not None]
    finally:
        reader.close()


class _Memory(threading.local):
    """Memory of each thread, which begins on a page, as large as the largest piece that it has read."""

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, dtype=np.uint8)

    def of(self, n_bytes: int) -> Bytes:
        if len(self._memory) < n_bytes:
            self._memory = np.frombuffer(mmap.mmap(-1, n_bytes), dtype=np.uint8)
        return self._memory[:n_bytes]


def check_piece(reader: Reader, piece: Piece, memory: Bytes) -> CorruptWeightError | None:
    """Returns what is wrong with a piece, of which the chunk and its blocks have checksums apart from each other."""
    changed = None
    try:
        reader.read_part(piece, memory)
    except StoreChangedError as error:
        changed = error  # memory has the values
    except CorruptWeightError as error:
        return error
    info = reader.store[piece.name]
    if info.blocks is None or info.blocks.crc32c is None:
        return changed
    begin, wrong = 0, ""
    for n_bytes, stored in info.blocks.in_chunk(piece.offset, piece.nbytes):
        crc = extend_crc(0, memory[begin : begin + n_bytes])
        if crc != stored:
            start = piece.offset + begin
            wrong = f"its checksum of bytes {start} to {start + n_bytes} is {stored:08x} and should be {crc:08x}"
            break
        begin += n_bytes
    if changed is not None and wrong:
        return changed
    if changed is not None:
        wrong = f"its checksum of chunk {piece.index} is not that of its blocks"
    if not wrong:
        return None
    file = os.path.join(reader.store.root or "", info.path, "zarr.json")
    return CorruptWeightError(
        f"weight {piece.name!r}: {file} is damaged: {wrong}. Run litrt convert again.", name=piece.name, file=file
    )
