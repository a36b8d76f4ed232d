"""Safetensors files, as https://huggingface.co/docs/safetensors describes them: a length, a JSON header, the values."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from pathlib import Path
from typing import Any

import torch

from litrt import documents
from litrt.arrays import are_counts
from litrt.directio import forget
from litrt.errors import CorruptWeightError, StoreError
from litrt.source import Source, check_shape, read_into

SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


_PACKED = {"F4": torch.float4_e2m1fn_x2}
"""Dtypes that have two values in a byte: the shape in a file counts the values, and that in torch the bytes."""


def open_safetensors(path: Path, stack: contextlib.ExitStack) -> Source:
    """Opens a file, which is closed with `stack`.

    Raises:
        StoreError: If it is not a safetensors file; where a tensor has a dtype that torch has not, when that is
            fetched.
        CorruptWeightError: If it is truncated.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # which does not wait for who writes a pipe
    stack.callback(os.close, fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise StoreError(f"{path} is not a safetensors file: it is no file at all.")
    entries, start = _safetensors_header(path, fd)

    def fetch(name: str) -> torch.Tensor:
        dtype, shape, begin, end = fitting[name]
        tensor = torch.empty(end - begin, dtype=torch.uint8)
        read_into(path, fd, name, tensor, start + begin)
        return tensor.view(dtype).reshape(shape)

    def release(tensor: torch.Tensor) -> None:
        forget(fd)

    fitting = {
        name: (dtype, shape, begin, end)
        for name, (dtype, shape, begin, end) in entries.items()
        if isinstance(dtype, torch.dtype)
    }
    unfit = {
        name: f"{path}: {name!r} has dtype {entry[0]}, which litrt cannot store"
        for name, entry in entries.items()
        if name not in fitting
    }
    sizes = {name: (math.prod(shape), dtype) for name, (dtype, shape, _, _) in fitting.items()}
    return Source(tuple(entries), fetch, {}, sizes, release, (path,), unfit)


_Entry = tuple[torch.dtype | str, tuple[int, ...], int, int]
"""The dtype of a tensor, or what it is called where torch has none such; its shape; and where it begins and ends."""


def _safetensors_header(path: Path, fd: int) -> tuple[dict[str, _Entry], int]:
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > min(size - 8, documents.MOST_BYTES):
        raise StoreError(
            f"{path} is not a safetensors file, or its beginning is lost: it has {size} bytes and announces "
            f"a header of {length}. Download it again."
        )
    try:
        header: dict[str, Any] = documents.parse(os.pread(fd, length, 8))
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, value) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is not a safetensors file: its header is not what the format says.") from error
    position = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise StoreError(f"{path} is damaged: {name!r} begins at byte {begin} and should at {position}.")
        position = end
        if 8 + length + end > size:
            whole = 8 + length + max(entry[3] for entry in entries.values())
            raise CorruptWeightError(
                f"{path} is truncated: it has {size} of {whole} bytes, and {name!r} is cut off. Download it again.",
                name=name,
                file=str(path),
            )
    return entries, 8 + length


def _entry(path: Path, name: str, value: dict[str, Any]) -> _Entry:
    called, shape = str(value["dtype"]), tuple(value["shape"])
    begin, end = value["data_offsets"]
    if not are_counts((*shape, begin, end)) or begin > end:
        raise ValueError("numbers of bytes and of elements are whole")
    dtype = _PACKED.get(called) or getattr(torch, SAFETENSORS_DTYPES.get(called, ""), None)
    if not isinstance(dtype, torch.dtype):
        return called[:100], shape, begin, end
    said = f"{name!r} of shape {str(shape)[:200]} and dtype {called}"
    if called in _PACKED:
        if not shape or shape[-1] % 2:
            raise StoreError(f"{path} is damaged: {said} has half a byte.")
        shape = (*shape[:-1], shape[-1] // 2)
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise StoreError(
            f"{path} is damaged: {said} takes {math.prod(shape) * dtype.itemsize} bytes, and the header gives it "
            f"{end - begin}."
        )
    try:
        check_shape(repr(name), shape, dtype)
    except ValueError as error:
        raise StoreError(f"{path} is damaged: {error}.") from error
    return dtype, shape, begin, end
