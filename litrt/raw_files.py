"""Arrays in files of numpy (`.npz`), and the folders that Accelerate offloads weights to."""

from __future__ import annotations

import contextlib
import io
import math
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from litrt import documents
from litrt.arrays import is_text
from litrt.errors import CorruptWeightError, StoreError
from litrt.safetensors_file import open_safetensors
from litrt.source import Source, check_shape, numpy_dtype, numpy_tensor, read_into
from litrt.zips import MOST_DEFLATED, open_zip

_SUFFIX = ".npy"
_MOST_HEADER_BYTES = 64 << 10  # numpy itself takes 10000 characters


def open_npz(path: Path, stack: contextlib.ExitStack) -> Source:
    """Opens a file of `numpy.savez`, which is closed with `stack`.

    Raises:
        StoreError: If it is not such a file; where an array is no tensor, when that is fetched.
        CorruptWeightError: If an array cannot be read; raised when it is fetched.
    """
    try:
        archive = stack.enter_context(open_zip(path))
        names = [name.removesuffix(_SUFFIX) for name in archive.namelist() if name.endswith(_SUFFIX)]
        if len(set(names)) < len(names):
            raise StoreError(f"{path} has {len(names)} arrays of {len(set(names))} names: write it again.")
        headers = {name: _header(path, name, archive) for name in names}
    except StoreError:
        raise
    except Exception as error:  # zipfile, zlib and numpy's parser of headers raise many kinds
        raise StoreError(f"{path} is not a whole file of numpy.savez: {error}. Download it again.") from error
    found = {name: (shape, numpy_dtype(dtype)) for name, (shape, dtype) in headers.items()}
    sizes = {name: (math.prod(shape), dtype) for name, (shape, dtype) in found.items() if dtype is not None}
    unfit = {
        name: f"{path}: {name!r} is an array of {headers[name][1]}, which is no tensor"
        for name in names
        if name not in sizes
    }

    def fetch(name: str) -> torch.Tensor:
        try:
            with archive.open(name + _SUFFIX) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:
            raise CorruptWeightError(
                f"{path}: {name!r} is damaged: {error}. Download it again.", name=name, file=str(path)
            ) from error
        return numpy_tensor(array)

    return Source(tuple(names), fetch, {}, sizes, files=(path,), unfit=unfit)


def _whole_header(start: bytes, member: IO[bytes]) -> bytes:
    """Returns the header of an array that begins with 12 bytes: numpy would read as much as it says that it has."""
    n_length = 2 if start[6:7] == b"\x01" else 4
    n_bytes = 8 + n_length + int.from_bytes(start[8 : 8 + n_length], "little")
    if n_bytes > _MOST_HEADER_BYTES:
        raise ValueError(f"an array has a header of {n_bytes} bytes")
    return start + member.read(max(n_bytes - len(start), 0))


def _header(path: Path, name: str, archive: zipfile.ZipFile) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Returns the shape and the dtype of an array, of which the file may have all values."""
    with archive.open(name + _SUFFIX) as member:
        file = io.BytesIO(_whole_header(member.read(12), member))
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    packed = archive.getinfo(name + _SUFFIX)
    n_bytes = min(packed.file_size, min(packed.compress_size, path.stat().st_size) * MOST_DEFLATED)
    if math.prod(shape) * dtype.itemsize > n_bytes:
        raise StoreError(f"{path} is damaged: {name!r} of shape {shape} is larger than what the file has of it.")
    kind = numpy_dtype(dtype)
    if kind is not None:
        try:
            check_shape(repr(name), shape, kind)
        except ValueError as error:
            raise StoreError(f"{path} is damaged: {error}.") from error
    return shape, dtype


def open_offloaded(index: Path, stack: contextlib.ExitStack) -> Source:
    """Opens the `index.json` of a folder that Accelerate has offloaded weights to; its files are closed with `stack`.

    Each weight is a `<name>.dat` of its values, or is said to be in a safetensors file.

    Raises:
        StoreError: If it is not such an index.
        CorruptWeightError: If a file is truncated or missing.
    """
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    elsewhere: dict[str, tuple[str, str]] = {}
    found = documents.read(index, what="the index of an offload folder", remedy="Offload the model again.")
    try:
        if found is None:
            raise ValueError("it is no object")
        for name, told in found.items():
            if "safetensors_file" in told:
                elsewhere[name] = (str(told["safetensors_file"]), str(told.get("weight_name", name)))
            else:
                entries[name] = _entry(name, told)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{index} is not the index of an offload folder of Accelerate: {error}.") from error
    files = {name: _offloaded_file(index, name, entry) for name, entry in entries.items()}
    for name, (other, _) in elsewhere.items():
        if not os.path.isfile(index.parent / other):
            raise StoreError(f"{index} places {name!r} in {other!r}, which is no file: offload the model again.")
    opened = {file: open_safetensors(index.parent / file, stack) for file, _ in dict.fromkeys(elsewhere.values())}
    keys = {file: set(source.names) for file, source in opened.items()}
    for name, (file, key) in elsewhere.items():
        if key not in keys[file]:
            raise StoreError(f"{index} places {name!r} in {file}, which has no {key!r}.")

    def fetch(name: str) -> torch.Tensor:
        if name in elsewhere:
            file, key = elsewhere[name]
            return opened[file].fetch(key)
        dtype, shape = entries[name]
        tensor = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        fd = os.open(files[name], os.O_RDONLY | os.O_CLOEXEC)
        try:
            read_into(files[name], fd, name, tensor, 0)
        finally:
            os.close(fd)
        return tensor.view(dtype).reshape(shape)

    sizes = {name: (math.prod(shape), dtype) for name, (dtype, shape) in entries.items()}
    unfit = {name: opened[file].unfit[key] for name, (file, key) in elsewhere.items() if key in opened[file].unfit}
    fitting = {name: place for name, place in elsewhere.items() if name not in unfit}
    sizes |= {name: (opened[file].sizes or {})[key] for name, (file, key) in fitting.items()}
    names = (*entries, *elsewhere)
    return Source(names, fetch, {}, sizes, files=(index, *files.values(), *map(Path, opened)), unfit=unfit)


def _entry(name: str, told: dict[str, Any]) -> tuple[torch.dtype, tuple[int, ...]]:
    dtype = getattr(torch, str(told["dtype"]), None)
    shape = tuple(told["shape"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"there is no dtype {told['dtype']!r}")
    check_shape(repr(name), shape, dtype)
    return dtype, shape


def _offloaded_file(index: Path, name: str, entry: tuple[torch.dtype, tuple[int, ...]]) -> Path:
    """Returns the file of a weight, which has all of its bytes and lies beside the index."""
    file = index.parent / f"{name}.dat"
    if file.parent != index.parent or "\0" in name or not is_text(name):
        raise StoreError(f"{index} names {name!r}, which no file beside it can have.")
    dtype, shape = entry
    n_bytes = math.prod(shape) * dtype.itemsize
    found = os.path.getsize(file) if os.path.isfile(file) else 0
    if found < n_bytes:
        raise CorruptWeightError(
            f"{file} is truncated or missing: it has {found} of {n_bytes} bytes. Offload the model again.",
            name=name,
            file=str(file),
        )
    return file
