"""Zarr groups as sources: stores of litrt, and those that others have made of whatever arrays."""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import zarr
from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore, ZipStore

from litrt import documents
from litrt.arrays import are_counts, litrt_attributes
from litrt.bounded import bounded, is_compressed
from litrt.checked import CheckedStore
from litrt.errors import CorruptWeightError, StoreError
from litrt.reader import Reader
from litrt.source import Source, check_shape, numpy_dtype, numpy_tensor
from litrt.store import open_store
from litrt.tensors import LARGE_BYTES, MOST_RATIO
from litrt.zips import check_members, open_zip

_MOST_SPARSE = 2
"""Bytes of values for one in the files, of an array without a compressor: others are the fill value."""

_CHUNK = re.compile(r"c|(c[/.])?\d+([/.]\d+)*")
"""What zarr-python calls a chunk, below its array."""

_ZARR_FORMATS: dict[str, Literal[2, 3]] = {".zarray": 2, "zarr.json": 3}


def is_zarr_folder(path: Path) -> bool:
    """Says whether a directory is a Zarr group or array."""
    return any((path / file).is_file() for file in ("zarr.json", ".zgroup", ".zarray"))


def open_zarr(path: Path, stack: contextlib.ExitStack) -> Source:
    """Opens a group in a directory or a zip file, which is closed with `stack`.

    A store of litrt is read as one. Of any other group each array is a tensor, whose name is its path with "." for "/".
    No consolidated metadata is needed, nor used. A chunk that is missing has the fill value, as Zarr says.

    Raises:
        StoreError: If it is not such a group. Where an array is no tensor, when that is fetched.
        CorruptWeightError: If an array cannot be read; raised when it is fetched.
    """
    place = _Archive(path, stack) if path.is_file() else _Folder(path)
    if litrt_attributes(_attributes(path, place)):
        return open_litrt(path, stack)
    n_bytes = place.n_bytes()
    found = {key.rpartition("/")[0]: zarr_format for key in n_bytes if (zarr_format := _array_format(key, place))}
    arrays = dict(sorted(found.items()))
    if "" in arrays:
        raise StoreError(f"{path} is an array of Zarr, which has no name: pass the group that it is in.")
    if not arrays:
        raise StoreError(f"{path} is a Zarr group in which there is no array: pass the one that has the weights.")
    names = _names(path, arrays)
    stored, packed = _bytes_of_chunks(arrays, n_bytes), _bytes_of_chunks(arrays, place.n_packed_bytes())
    plain: ZarrStore = ZipStore(path, mode="r") if path.is_file() else LocalStore(path, read_only=True)
    store = CheckedStore(plain, owned=True, sizes=n_bytes, is_sparse=True)
    stack.callback(store.close)
    opened: dict[str, zarr.Array[Any]] = {}
    sizes: dict[str, tuple[int, torch.dtype]] = {}
    unfit: dict[str, str] = {}
    for name, node in names.items():
        try:
            array = bounded(zarr.open_array(store, path=node, mode="r", zarr_format=arrays[node]))
            sizes[name] = _size(array, stored[node], packed[node])
            opened[name] = array
        except Exception as error:  # whatever zarr-python raises for metadata that it cannot make sense of
            reason = str(error) or type(error).__name__
            unfit[name] = f"{path}: {name!r} is no tensor: {reason[:200]}"

    def fetch(name: str) -> torch.Tensor:
        try:
            return numpy_tensor(np.asarray(opened[name][...]))
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise CorruptWeightError(
                f"{path}: {name!r} cannot be decoded ({reason[:200]}). Copy the group again.", name=name, file=str(path)
            ) from error

    files = (path,) if path.is_file() else tuple(path / key for key in n_bytes)
    return Source(tuple(names), fetch, {}, sizes, files=files, unfit=unfit)


def open_litrt(path: str | os.PathLike[str], stack: contextlib.ExitStack) -> Source:
    """Opens a store of litrt, whose checksums are checked; it is closed with `stack`.

    Raises:
        StoreError: If it is incomplete, or no such store.
        CorruptWeightError: If a chunk is damaged; raised when it is fetched.
    """
    reader = Reader(open_store(path))
    stack.callback(reader.close)
    store = reader.store
    sizes = {info.name: (info.n_elements, info.dtype) for info in store.values()}
    return Source(tuple(store), reader.read_tensor, dict(store.aliases), sizes, files=_files(path))


def _files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Returns the files of a store; none of one that is not on this machine."""
    if "://" in os.fspath(path):
        return ()
    if not os.path.isdir(path):
        return (Path(path),)
    # Arrays may be links to folders: `rglob` follows one that it starts from, and no other.
    inside = [file for child in Path(path).iterdir() for file in ([child] if child.is_file() else child.rglob("*"))]
    return tuple(sorted(file for file in inside if file.is_file()))


class _Folder:
    """A Zarr store in a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def json(self, key: str) -> dict[str, Any] | None:
        """Returns a file of metadata, or None where there is none."""
        return documents.read(self._path / key)

    def n_bytes(self) -> dict[str, int]:
        """Returns the bytes of each file, by its key.

        Raises:
            StoreError: If there is a link that leads nowhere, which would be taken for a chunk of the fill value, or to
                a folder; or a pipe, on which a read would wait.
        """
        found = {}
        for parent, folders, files in os.walk(self._path):
            for name in folders + files:
                path = Path(parent, name)
                try:
                    status = path.stat()
                except OSError as error:
                    raise StoreError(f"{path} cannot be read ({error.strerror}): copy the group again.") from error
                if stat.S_ISREG(status.st_mode):
                    found[path.relative_to(self._path).as_posix()] = status.st_size
                elif path.is_symlink() or not stat.S_ISDIR(status.st_mode):
                    raise StoreError(f"{path} is neither a file nor a folder: copy the group with cp -rL.")
        return dict(sorted(found.items()))

    def n_packed_bytes(self) -> dict[str, int]:
        """Returns the same."""
        return self.n_bytes()


class _Archive:
    """A Zarr store in a zip file, which is closed with `stack`."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self._path = path
        try:
            self._archive = stack.enter_context(open_zip(path))
            check_members(self._archive)
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise StoreError(f"{path} is not a whole zip file: {error}. Download it again.") from error

    def json(self, key: str) -> dict[str, Any] | None:
        """Returns a file of metadata, or None where there is none."""
        try:
            n_bytes = self._archive.getinfo(key).file_size
        except KeyError:
            return None
        try:
            if n_bytes > documents.MOST_BYTES:
                raise ValueError(f"it has {n_bytes} bytes")
            document = documents.parse(self._archive.read(key))
        except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, OSError, zlib.error) as error:
            raise StoreError(f"{self._path}: {key} is damaged: {str(error)[:200]}. Copy the group again.") from error
        return document if isinstance(document, dict) else None

    def n_bytes(self) -> dict[str, int]:
        """Returns the bytes of each file, by its key, when it is unpacked."""
        return {entry.filename: entry.file_size for entry in self._archive.infolist() if not entry.is_dir()}

    def n_packed_bytes(self) -> dict[str, int]:
        """Returns the bytes that each file has in the zip file, by its key."""
        return {entry.filename: entry.compress_size for entry in self._archive.infolist() if not entry.is_dir()}


def _attributes(path: Path, place: _Folder | _Archive) -> object:
    """Returns the attributes of a group."""
    group = place.json("zarr.json")
    if group is not None:
        return group.get("attributes")
    if place.json(".zgroup") is None and place.json(".zarray") is None:
        raise StoreError(f"{path} is not a Zarr group: it has no zarr.json and no .zgroup at its top.")
    return place.json(".zattrs")


def _array_format(key: str, place: _Folder | _Archive) -> Literal[2, 3] | None:
    """Returns the version of Zarr of the array that a file is the metadata of, or None where it is another file."""
    zarr_format = _ZARR_FORMATS.get(key.rpartition("/")[2])
    if zarr_format == 3:
        return zarr_format if (place.json(key) or {}).get("node_type") == "array" else None
    return zarr_format


def _names(path: Path, nodes: Iterable[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in nodes:
        name = node.replace("/", ".")
        if name in names:
            raise StoreError(f"{path} has the arrays {names[name]!r} and {node!r}, both of which would be {name!r}.")
        names[name] = node
    return names


def _bytes_of_chunks(arrays: Iterable[str], n_bytes: dict[str, int]) -> dict[str, int]:
    """Returns for each array the bytes of all files below it that are called like chunks."""
    total = dict.fromkeys(arrays, 0)
    for key, n in n_bytes.items():
        node = key
        while node and node not in total:
            node = node.rpartition("/")[0]
        if node and _CHUNK.fullmatch(key, len(node) + 1):
            total[node] += n
    return total


def _size(array: zarr.Array[Any], n_stored: int, n_packed: int) -> tuple[int, torch.dtype]:
    """Returns the elements and the dtype of an array.

    Args:
        array: The array.
        n_stored: The bytes of its chunks.
        n_packed: The same, as they are in a zip file.

    Raises:
        ValueError: If it is no tensor, or of a size that its files do not account for.
    """
    dtype = numpy_dtype(array.dtype)
    if dtype is None:
        raise ValueError(f"it is an array of {array.dtype}, which is no dtype of torch")
    nbytes = math.prod(array.shape) * dtype.itemsize
    chunk_bytes = math.prod(array.chunks) * dtype.itemsize
    if not are_counts(array.shape) or chunk_bytes > max(2 * nbytes, LARGE_BYTES):
        raise ValueError(f"it has shape {array.shape} and chunks of shape {array.chunks}, which no memory holds")
    check_shape("it", array.shape, dtype)
    most_bytes = n_packed * MOST_RATIO if is_compressed(array) else n_stored * _MOST_SPARSE
    if nbytes > max(most_bytes, LARGE_BYTES):
        raise ValueError(
            f"it has {nbytes} bytes and its files {n_stored}, so that most of it is fill value: write it with "
            "write_empty_chunks"
        )
    return math.prod(array.shape), dtype
