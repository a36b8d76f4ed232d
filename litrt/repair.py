"""Writes what is damaged of a store again, from the checkpoint that it was made of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from litrt.arrays import array_dtype, lead_axis, litrt_attributes
from litrt.blocks import attributes_of_chunks, sums_of_chunk
from litrt.checkpoint import SourceLike, open_source
from litrt.convert import values_of, write_rows
from litrt.crc import Bytes, extend_crc
from litrt.errors import CorruptWeightError, StoreChangedError, StoreError
from litrt.links import link_out
from litrt.reader import Piece, Reader, check_link, cut
from litrt.source import KeyMap, Source, renamed
from litrt.staging import remove, sync
from litrt.store import Store, open_damaged, open_store
from litrt.tensors import TensorInfo
from litrt.verify import check_piece, verify


def repair(
    source: SourceLike | Sequence[SourceLike],
    store: str | os.PathLike[str],
    *,
    key_map: KeyMap | None = None,
    progress: bool = True,
) -> list[CorruptWeightError]:
    """Verifies a store, and writes what is damaged of it again from `source`, and nothing else.

    What is whole of a weight has to be what `source` has of it; so has what the checksums of its blocks say, which are
    stored apart from the chunks. Holds one tensor at a time. Interrupted, it can be called again.

    Args:
        source: What the store was made of, as for `litrt.convert`.
        key_map: The one that the store was made with.
        store: The directory of a store. Where it was converted to another dtype, so is what is written.
        progress: Shows a line of progress on stderr, if that is a terminal.

    Returns:
        What was damaged, as `litrt.verify` says it. It is no more.

    Raises:
        StoreError: If `store` is no store in a directory, or its metadata is damaged, which `litrt.convert` has to
            write anew, as it has chunks that litrt does not read itself; or if a damaged weight is not the one that
            `source` has. What was repaired until then stays so.
        FileNotFoundError: If there is no file `source`.
        CorruptWeightError: If a file of `source` is truncated, or what was written cannot be read.
    """
    opened, lost = open_damaged(store)
    if opened.root is None:
        raise StoreError(f"cannot repair {opened.path}: repair a local directory, and copy that.")
    for error in lost.values():
        raise StoreError(f"cannot repair {opened.path}, as not only chunks of it are damaged: {error}")
    damaged = verify(opened, progress=progress)
    for error in damaged:
        if not (opened[error.name].direct or opened[error.name].packed):
            raise StoreError(
                f"cannot repair {opened.path}, as litrt does not read the chunks of {error.name!r} itself: {error}"
            )
    if damaged:
        with open_source(source) as checkpoint:
            if key_map is not None:
                checkpoint = renamed(checkpoint, key_map)
            names = dict.fromkeys(error.name for error in damaged)
            group = zarr.open_group(LocalStore(opened.root), mode="r+")
            reader = Reader(opened)
            for name in names:
                files = [error.file for error in damaged if error.name == name]
                _repair(checkpoint, reader, group, opened[name], files)
        _check_repaired(Reader(open_store(opened.root)), names)
    return damaged


def _repair(source: Source, reader: Reader, group: zarr.Group, info: TensorInfo, files: Sequence[str]) -> None:
    root = reader.store.root
    assert root is not None
    values = _values(source, reader.store, info)
    metadata = os.path.join(root, info.path, "zarr.json")
    pieces = cut(info, root)
    are_sums_damaged = _check_source(reader, info, values, metadata in files)
    array = group[info.path]
    assert isinstance(array, zarr.Array), "open_store refuses groups"
    for piece in pieces:
        if piece.file not in files:
            continue
        file = Path(piece.file)
        folders = [folder for folder in file.parents if Path(root, info.path) in folder.parents]
        for folder in reversed(folders):
            if os.path.lexists(folder) and (not folder.is_dir() or link_out(root, str(folder), set()) is not None):
                remove(folder)
        if os.path.lexists(file):
            remove(file)  # or zarr-python would read it first
        _write_chunk(array, info, piece, values)
        for path in (file, *folders, Path(root, info.path)):
            sync(path)
    if are_sums_damaged:
        _write_sums(array, info, pieces, values)
        sync(Path(metadata))


def _check_repaired(reader: Reader, names: Iterable[str]) -> None:
    for name in names:
        for piece in reader.pieces(name):
            error = check_piece(reader, piece, np.empty(piece.nbytes, dtype=np.uint8))
            if error is not None:
                raise error


def _values(source: Source, store: Store, info: TensorInfo) -> Bytes:
    """Returns the bytes of a weight as the store should have them."""
    name = source.aliases.get(info.name, info.name)
    if name not in source.names:
        raise _other(store, f"it has no {info.name!r}")
    tensor = source.fetch(name)
    if tuple(tensor.shape) != info.shape:
        raise _other(store, f"its {info.name!r} has shape {tuple(tensor.shape)} in place of {info.shape}")
    if tensor.dtype != info.dtype and not (tensor.is_floating_point() and info.dtype.is_floating_point):
        raise _other(store, f"its {info.name!r} is {tensor.dtype} in place of {info.dtype}")
    stored = array_dtype(info.dtype)
    assert stored is not None, "open_store refuses other dtypes"
    values: Bytes = values_of(info.name, tensor, info.dtype, stored).reshape(-1).view(np.uint8)
    return values


def _check_source(reader: Reader, info: TensorInfo, values: Bytes, are_sums_damaged: bool) -> bool:
    """Raises an error where what is whole of a weight is not what the source has; says whether its checksums are not.

    A chunk that is whole and has the source's values, while the checksum that is kept apart from it differs, says that
    this one is damaged.
    """
    pieces = cut(info, reader.store.root)
    looked_at: set[str] = set()
    for piece in pieces:
        memory = np.empty(piece.nbytes, dtype=np.uint8)
        try:
            check_link(piece, reader.store.root, looked_at)
            reader.read_part(piece, memory)
        except StoreChangedError:
            if np.array_equal(memory, values[piece.offset : piece.offset + piece.nbytes]):
                are_sums_damaged = True
            continue
        except CorruptWeightError:
            continue
        if not np.array_equal(memory, values[piece.offset : piece.offset + piece.nbytes]):
            raise _other(reader.store, f"its {info.name!r} has other values than {piece.file}")
    of_blocks, of_chunks = _sums(info, pieces, values)
    stored = info.blocks.crc32c.tolist() if info.blocks is not None and info.blocks.crc32c is not None else of_blocks
    if info.sums is not None:
        stored, of_blocks = [*stored, *info.sums.tolist()], [*of_blocks, *of_chunks]
    if stored != of_blocks and not are_sums_damaged:
        raise _other(reader.store, f"its {info.name!r} has other values than the checksums of the store say")
    return are_sums_damaged


def _other(store: Store, what: str) -> StoreError:
    return StoreError(
        f"cannot repair {store.path} from this checkpoint: {what}. Pass what the store was made of, or run "
        "litrt convert again."
    )


def _sums(info: TensorInfo, pieces: Sequence[Piece], values: Bytes) -> tuple[list[int], list[int]]:
    """Returns the checksums of the blocks and of the chunks."""
    blocks = info.blocks
    parts = [values[piece.offset : piece.offset + piece.nbytes] for piece in pieces]
    block_bytes = blocks.block_rows * blocks.row_bytes if blocks is not None else 0
    of_blocks = [crc for part in parts for crc in sums_of_chunk(part, block_bytes, extend_crc)] if block_bytes else []
    return of_blocks, [extend_crc(0, part) for part in parts]


def _write_chunk(array: zarr.Array[Any], info: TensorInfo, piece: Piece, values: Bytes) -> None:
    rows = values[piece.offset : piece.offset + piece.nbytes].view(np.dtype(array_dtype(info.dtype)))
    shape = list(info.shape)
    if shape:
        shape[lead_axis(info.shape)] = -1
    write_rows(array, piece.index * info.chunk_rows, rows.reshape(shape))


def _write_sums(array: zarr.Array[Any], info: TensorInfo, pieces: Sequence[Piece], values: Bytes) -> None:
    of_blocks, of_chunks = _sums(info, pieces, values)
    told = litrt_attributes(array.attrs.asdict())
    if info.sums is not None:
        told["chunks"] = attributes_of_chunks(info.chunk_rows, of_chunks)
    if info.blocks is not None:
        told["blocks"] = replace(info.blocks, crc32c=np.array(of_blocks, dtype=np.uint32)).attributes()
    array.update_attributes({"litrt": told})
