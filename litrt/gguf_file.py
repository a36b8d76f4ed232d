"""GGUF files, the format of llama.cpp: their tensors that are not quantised. What is in one, its own package tells."""

from __future__ import annotations

import contextlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from litrt.directio import forget
from litrt.errors import CorruptWeightError, StoreError
from litrt.source import Source, check_shape, merged, read_into, swap_bytes

_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_MOST_VALUES = 10_000_000
"""Values of metadata that are looked at, each of which takes a hundred bytes: vocabularies have a tenth as many."""

_PART = re.compile(r"(.*-)(\d{5})(-of-\d{5}\.gguf)")


@dataclass(frozen=True)
class _Entry:
    """A tensor that is not quantised: its dtype, its shape in the order of torch, and the byte that it begins at."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class _Header:
    """What a file says of itself.

    Attributes:
        names: Its tensors.
        entries: Those that are not quantised.
        unfit: The others, and what they are, in words.
        is_swapped: Whether its byte order is not the machine's.
        part: Which part of a split file it is, counted from 0.
        n_parts: Of how many.
    """

    names: tuple[str, ...]
    entries: dict[str, _Entry]
    unfit: dict[str, str]
    is_swapped: bool
    part: int
    n_parts: int


def open_gguf(path: Path, stack: contextlib.ExitStack) -> Source:
    """Opens a file, or all parts of a split one by its first, which are closed with `stack`.

    Names, and the order of the values in a tensor, are those of llama.cpp.

    Raises:
        StoreError: If it is not such a file, a part is missing, or the package gguf is. Where a tensor is quantised,
            when that is fetched.
        CorruptWeightError: If a file is truncated.
    """
    header = _read_header(path)
    if header.n_parts <= 1:
        return _open(path, header, stack)
    match = _PART.fullmatch(path.name)
    if header.part or match is None:
        first = f"the first, which stands for all: {_part(match, 0)}" if match else "the first by the name it had"
        raise StoreError(f"{path} is part {header.part + 1} of {header.n_parts}: pass {first}.")
    files = [path.with_name(_part(match, part)) for part in range(header.n_parts)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise StoreError(
            f"{path} is split into {len(files)} parts and {len(missing)} are missing, the first {missing[0]}: download "
            "them again."
        )
    try:
        return merged([_open(file, _read_header(file), stack) for file in files])
    except ValueError as error:
        raise StoreError(f"{path} and its other parts are damaged: {error}") from error


def _part(match: re.Match[str], part: int) -> str:
    return f"{match[1]}{part + 1:05}{match[3]}"


def _open(path: Path, header: _Header, stack: contextlib.ExitStack) -> Source:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)

    def fetch(name: str) -> torch.Tensor:
        entry = header.entries[name]
        tensor = torch.empty(math.prod(entry.shape) * entry.dtype.itemsize, dtype=torch.uint8)
        read_into(path, fd, name, tensor, entry.begin)
        if header.is_swapped:
            swap_bytes(tensor, entry.dtype)
        return tensor.view(entry.dtype).reshape(entry.shape)

    def release(tensor: torch.Tensor) -> None:
        forget(fd)

    sizes = {name: (math.prod(entry.shape), entry.dtype) for name, entry in header.entries.items()}
    return Source(header.names, fetch, {}, sizes, release, (path,), header.unfit)


def _read_header(path: Path) -> _Header:
    try:
        import gguf
    except ImportError as error:
        raise StoreError(f"to read {path}, install the package gguf: pip install 'litrt[gguf]'.") from error

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        """The reader of the package, which asks this method for every value that it looks at.

        It would take a value after the end of the file for an empty one, and so read an array of 2**60 values for ever.
        And its views of mapped memory take many times the room of views of plain memory.
        """

        n_values = 0

        def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Any = None) -> Any:
            kind = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
            self.n_values += 1
            if self.n_values > _MOST_VALUES:
                raise ValueError(f"it has more than {_MOST_VALUES} values of metadata")
            end = int(offset) + kind.itemsize * int(count)
            if end > len(self.data):
                raise EOFError(f"it has {len(self.data)} bytes, and {end} are needed")
            return np.frombuffer(self.data, dtype=kind, count=int(count), offset=int(offset))

    try:
        with np.errstate(over="raise"):
            return _header(path, Reader(path))
    except EOFError as error:
        failure: Exception = CorruptWeightError(
            f"{path} is truncated: {error}. Download it again.", name="", file=str(path)
        )
    except OSError:
        raise
    except Exception as error:  # whatever the package raises for what it cannot make sense of
        reason = str(error) or type(error).__name__
        failure = StoreError(f"{path} is not a GGUF file that can be read: {reason[:200]}.")
    # Raised here, without the error that caused it: the frames of that one would keep the file mapped.
    raise failure


def _header(path: Path, reader: Any) -> _Header:
    """Returns what is to know of a file, and keeps nothing of its reader."""
    entries: dict[str, _Entry] = {}
    unfit: dict[str, str] = {}
    # The reader has made a view of each, so that their values are in the file.
    for tensor in reader.tensors:
        dtype = _DTYPES.get(tensor.tensor_type.name)
        if dtype is None:
            unfit[tensor.name] = (
                f"{path}: {tensor.name!r} is quantised ({tensor.tensor_type.name}), which litrt does not decode: pass "
                "a file whose tensors are F32, F16 or BF16"
            )
            continue
        shape = tuple(int(extent) for extent in reversed(tensor.shape))
        check_shape(repr(tensor.name), shape, dtype)
        entries[tensor.name] = _Entry(dtype, shape, int(tensor.data_offset))

    def number(key: str, otherwise: int) -> int:
        field = reader.get_field(key)
        return otherwise if field is None else int(field.parts[-1][0])

    names = tuple(tensor.name for tensor in reader.tensors)
    is_swapped = reader.byte_order == "S"
    return _Header(names, entries, unfit, is_swapped, number("split.no", 0), number("split.count", 1))
