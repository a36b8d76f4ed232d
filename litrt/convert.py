"""Writes a checkpoint as a store: one tensor at a time, one chunk at a time, complete or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import LocalStore

from litrt.arrays import (
    METADATA,
    TARGET_CHUNK_BYTES,
    array_dtype,
    bytes_of_chunks,
    chunk_shape,
    dtype_name,
    floating_dtype,
    lead_axis,
    node_name,
)
from litrt.blocks import BLOCK_BYTES, Blocks, attributes_of_chunks, choose_block_rows, sums_of_chunk
from litrt.checkpoint import SourceLike, open_source
from litrt.compression import CHUNK_BYTES, CODECS, SAMPLE_BYTES, SETTINGS, Compression, blosc_codec
from litrt.crc import Bytes, extend_crc
from litrt.errors import StoreError
from litrt.progress import Progress
from litrt.source import KeyMap, Source, renamed
from litrt.staging import Staging, check_space, make_parent, naming, sync
from litrt.store import FORMAT, Store, is_store, open_store
from litrt.zarr_source import is_zarr_folder

_WRITTEN = 2
"""Another number wherever the same source is written as other bytes, so that nothing of before is gone on with."""


def convert(
    source: SourceLike | Sequence[SourceLike],
    store: str | os.PathLike[str],
    *,
    key_map: KeyMap | None = None,
    dtype: torch.dtype | str | None = None,
    compress: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Store:
    """Writes the weights of `source` to a new store, and opens it.

    Values are kept bit for bit. Holds one tensor at a time, and at most twice the bytes of the largest; only
    torch files of before torch 1.6 have to be loaded whole. The store is written to `<store>.partial` beside
    it and renamed when it is complete and on disk. Where that was interrupted, the same call goes on with it: what was
    finished is not read again, unless a file of `source` has changed. An error removes what was written.

    Args:
        source: A `state_dict`; any other mapping of names to tensors, of which each is fetched once and
            dropped before the next; a `.safetensors` file; a `.bin`, `.pt`, `.pth` or `.ckpt` file of
            tensors; the directory or the `.index.json` of a sharded checkpoint; the directory of a model in the
            cache of the Hugging Face hub; a `.npz` file of numpy; a `.gguf` file that is not quantised, which needs
            the extra `litrt[gguf]`; a store of litrt or another Zarr group of version 2 or 3, as a directory or a
            `.zip`; the folder that Accelerate has offloaded weights to, or its `index.json`; the folder of PyTorch-LIT,
            or its `meta.json`. Tensors that share their memory in a `dict` or a torch file are stored once. A list of
            these is taken for one.
        store: Directory to write.
        key_map: New names: a mapping of names to new ones, in which others keep theirs, or a function. None for a new
            name leaves the tensor out, as is needed of those that cannot be stored.
        dtype: Casts floating tensors, and no others, to this dtype.
        compress: None, "lz4" or "zstd": lossless. "auto" measures how fast the weights are read from the disk of
            `store`, as they are and compressed, which needs some 300 MB there for a moment, once for each dtype, and
            chooses for each tensor what is read fastest: `Store.compression` says what was decided and why. A tensor
            that gains less than 5 % is stored as it is.
        overwrite: Replaces the store of litrt that is there, once the new one is complete.
        progress: Shows a line of progress on stderr, if that is a terminal.

    Raises:
        StoreError: If `store` exists, cannot be written, is being written by another conversion, lies in a Zarr group
            that it is made of or would not fit on the disk, or if `source` is not a checkpoint, or has something that
            cannot be stored, such as quantised blocks; or if `<store>.partial` is not of litrt.
        CorruptWeightError: If a file of `source` is truncated.
        FileNotFoundError: If there is no file `source`.
        TypeError: If `source` is not a checkpoint, or holds something else than plain tensors.
        ValueError: If `dtype` or `compress` is not one of those above, or two tensors would have the same name.
    """
    cast = None if dtype is None else floating_dtype(dtype, "cast weights to")
    if compress is not None and compress not in (*CODECS, "auto"):
        raise ValueError(f"cannot compress with {compress!r}: use None, 'lz4', 'zstd' or 'auto'.")
    target = Path(os.path.realpath(_local_path(store)))
    _check_target(target, os.fspath(store), overwrite)
    with open_source(source) as opened:
        if key_map is not None:
            opened = renamed(opened, key_map)
        opened.refuse_unfit()
        for name, (_, known) in (opened.sizes or {}).items():
            _dtypes(name, known, cast)
        _check_outside(target, source if isinstance(source, list | tuple) else [source], opened.files)
        total_bytes = _total_bytes(opened, cast)
        make_parent(target)
        with Staging(target, _key(opened, cast, compress)) as staging, naming(staging.path):
            _check_target(target, os.fspath(store), overwrite)  # again: another conversion may have ended
            if total_bytes is not None and compress is None:
                done_bytes = sum(told["stored_bytes"] for told in staging.finished.values())
                check_space(target, total_bytes - done_bytes)
            with Progress(target.name, total_bytes, shown=progress) as bar:
                _write_store(opened, staging, cast, compress, bar)
            _check_target(target, os.fspath(store), overwrite)  # what is replaced now may be another thing than before
            staging.publish(replace=overwrite)
    return open_store(store)


def _key(source: Source, cast: torch.dtype | None, compress: str | None) -> str | None:
    """Returns what says which bytes a conversion writes, or None where its source could say so only by its values."""
    if not source.files:
        return None
    files = [
        (str(file.resolve()), status.st_size, status.st_mtime_ns) for file in source.files for status in [file.stat()]
    ]
    layout = [FORMAT, _WRITTEN, TARGET_CHUNK_BYTES, BLOCK_BYTES, CHUNK_BYTES, str(SETTINGS)]
    said = [layout, files, source.names, source.origins, source.aliases, str(cast), compress]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _local_path(store: str | os.PathLike[str]) -> str:
    path = os.fspath(store)
    if "://" in path:
        raise StoreError(f"cannot write to {path}: convert to a local directory, and copy that.")
    return path


def _check_target(target: Path, label: str, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise StoreError(f"{label} exists: choose another path, or pass overwrite=True to replace it.")
    if not target.is_dir() or (any(target.iterdir()) and not is_store(target)):
        raise StoreError(
            f"{label} exists and is not a store of litrt, so that it is not overwritten: choose another path."
        )


def _check_outside(target: Path, sources: Sequence[object], files: Sequence[Path]) -> None:
    """Raises an error where a store would lie in a group of Zarr that it is made of, and be read with it.

    The files of several sources are not known where one of them has none; and that a source is the cache of a hub, in
    which there is a group, is only known by its files.
    """
    around = [folder for folder in target.parents if is_zarr_folder(folder)]
    if not around:
        return
    groups = {os.path.realpath(file.parent) for file in files if file.name in METADATA}
    groups |= {os.path.realpath(source) for source in sources if isinstance(source, str | os.PathLike)}
    for folder in around:
        if str(folder) in groups:
            raise StoreError(
                f"cannot write {target} into {folder}, which it is made of, and of which all is read: choose a path "
                "outside."
            )


def _dtypes(name: str, dtype: torch.dtype, cast: torch.dtype | None) -> tuple[torch.dtype, str]:
    """Returns what a tensor is stored as: its dtype in torch, and that of its array."""
    dtype = cast if cast is not None and dtype.is_floating_point else dtype
    stored = array_dtype(dtype)
    if stored is None:
        raise TypeError(f"{name!r} has dtype {dtype}, which litrt cannot store: convert it to another dtype first.")
    return dtype, stored


def _total_bytes(source: Source, cast: torch.dtype | None) -> int | None:
    if source.sizes is None:
        return None
    return sum(
        n_elements * (cast if cast is not None and dtype.is_floating_point else dtype).itemsize
        for name, (n_elements, dtype) in source.sizes.items()
        if name not in source.aliases
    )


def _write_store(
    source: Source, staging: Staging, cast: torch.dtype | None, compress: str | None, bar: Progress
) -> None:
    staging.begin()
    partial = staging.path
    header = {"format": FORMAT, "complete": False, "tensors": list(source.names), "aliases": source.aliases}
    group = zarr.create_group(LocalStore(partial), zarr_format=3, attributes={"litrt": header})
    compression = Compression(compress, partial)
    for told in staging.finished.values():
        compression.restore(told["compression"])
        bar.skip(told["nbytes"])
    flushed: Future[None] | None = None

    def finish(name: str, nbytes: int, measured: dict[str, Any]) -> None:
        stored_bytes = _flush(partial / node_name(name))
        staging.finish(name, {"nbytes": nbytes, "stored_bytes": stored_bytes, "compression": measured})

    # One thread puts an array on disk while the next is written: the page cache never holds much of them.
    with ThreadPoolExecutor(1) as flusher:
        for name in source.names:
            if name not in source.aliases and name not in staging.finished:
                nbytes = _write_tensor(group, source, name, cast, compression, bar)
                if flushed is not None:
                    flushed.result()
                flushed = flusher.submit(finish, name, nbytes, compression.state)
        if flushed is not None:
            flushed.result()
    if compress is not None:
        finished = staging.finished.values()
        nbytes, stored_bytes = (sum(told[key] for told in finished) for key in ("nbytes", "stored_bytes"))
        header["compression"] = compression.attributes(nbytes, stored_bytes)
    group.update_attributes({"litrt": {**header, "complete": True}})
    for file in (partial / "zarr.json", partial):
        sync(file)


def _write_tensor(
    group: zarr.Group,
    source: Source,
    name: str,
    cast: torch.dtype | None,
    compression: Compression,
    bar: Progress,
) -> int:
    """Writes a tensor, and returns the bytes of its values."""
    tensor = source.fetch(name)
    dtype, stored = _dtypes(name, tensor.dtype, cast)
    shape = tuple(tensor.shape)
    attributes: dict[str, Any] = {"name": name, "torch_dtype": dtype_name(dtype)}
    nbytes = tensor.numel() * dtype.itemsize
    samples = [] if compression.asked is None else _samples(name, tensor, dtype, stored)
    codec = compression.codec(samples, nbytes, dtype)
    if codec is None:
        chunks = chunk_shape(shape, dtype.itemsize)
    else:
        # Decoding has no need of pages, and a chunk without padding is decoded into place.
        chunks = chunk_shape(shape, dtype.itemsize, CHUNK_BYTES, align_bytes=1, max_padding=0.0)
    array = group.create_array(
        node_name(name),
        shape=shape,
        chunks=chunks,
        dtype=stored,
        fill_value=False if stored == "bool" else 0,
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=[*([blosc_codec(codec, dtype.itemsize)] if codec is not None else []), Crc32cCodec()],
        attributes={"litrt": attributes},
        # A chunk that is missing is an error, so that one of zeros has to be there.
        config={"write_empty_chunks": True},
    )
    if tensor.numel():
        axis = lead_axis(shape)
        n_rows, chunk_rows = (shape[axis], chunks[axis]) if shape else (1, 1)
        row_bytes = nbytes // n_rows
        block_rows = choose_block_rows(row_bytes, chunk_rows) if codec is None else None
        sums: list[int] = []
        sums_of_blocks: list[int] = []
        for first in range(0, n_rows, chunk_rows):
            rows = tensor.narrow(axis, first, min(chunk_rows, n_rows - first)) if shape else tensor
            block = values_of(name, rows, dtype, stored)
            write_rows(array, first, block)
            values = block.reshape(-1).view(np.uint8)
            sums.append(extend_crc(0, values))
            if block_rows is not None:
                sums_of_blocks += sums_of_chunk(values, block_rows * row_bytes, extend_crc)
            bar.add(block.nbytes)
        attributes["chunks"] = attributes_of_chunks(chunk_rows, sums)
        if block_rows is not None:
            made = Blocks(n_rows, row_bytes, chunk_rows, block_rows, np.array(sums_of_blocks, dtype=np.uint32))
            attributes["blocks"] = made.attributes()
        array.update_attributes({"litrt": attributes})
    source.release(tensor)
    return nbytes


def write_rows(array: zarr.Array[Any], first: int, values: npt.NDArray[Any]) -> None:
    """Writes rows of an array along its lead axis from row `first` on, or all of one that has no axes."""
    place: list[slice] = [slice(None)] * values.ndim
    if place:
        axis = lead_axis(array.shape)
        place[axis] = slice(first, first + values.shape[axis])
    array[tuple(place)] = values


def _samples(name: str, tensor: torch.Tensor, dtype: torch.dtype, stored: str) -> list[Bytes]:
    """Returns the bytes of some rows at the start, in the middle and at the end of a tensor; all, if it is small."""
    shape = tuple(tensor.shape)
    if not shape or not tensor.numel():
        return []
    axis = lead_axis(shape)
    row_bytes = tensor.numel() * dtype.itemsize // shape[axis]
    rows = min(max(SAMPLE_BYTES // row_bytes, 1), shape[axis])
    last = shape[axis] - rows
    return [
        values_of(name, tensor.narrow(axis, first, rows), dtype, stored).reshape(-1).view(np.uint8)
        for first in sorted({0, last // 2, last})
    ]


def values_of(name: str, block: torch.Tensor, dtype: torch.dtype, stored: str) -> npt.NDArray[Any]:
    """Returns the bits of `block`, cast to `dtype`, as an array of the dtype that Zarr stores them in."""
    try:
        dense = block.to(device="cpu", dtype=dtype).resolve_conj().resolve_neg().contiguous()
        bits = dense.reshape(-1).view(torch.uint8).numpy()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        kind = type(block).__name__
        raise TypeError(f"cannot read the values of {name!r}, a {kind} of {block.dtype}: {error}") from error
    return bits.view(np.dtype(stored)).reshape(tuple(block.shape))


def _flush(directory: Path) -> int:
    """Puts the files of an array on disk, and out of the page cache; returns the bytes of its chunks."""
    for parent, _, files in os.walk(directory):
        for file in files:
            sync(Path(parent, file))
        sync(Path(parent))
    return bytes_of_chunks(directory)
