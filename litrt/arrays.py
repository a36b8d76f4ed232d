"""How a tensor is kept as a Zarr array: its name, its data type, its chunks, and what its metadata says of them.

`docs/format.md` specifies all of it. What is in a store, and where, is `litrt.store`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TARGET_CHUNK_BYTES = 32 << 20
"""Requests of 16 to 64 MiB reach the speed of the disk from one thread."""

ALIGN_BYTES = 4096
"""What direct reads want chunks, and so the offsets that they are read to, to be multiples of."""

MAX_BLOCK_BYTES = 1 << 20
"""The largest block that Blosc chooses itself."""

_MAX_PADDING = 1 / 50
"""Share of a tensor up to which the last chunk is padded for the sake of alignment."""

METADATA = frozenset({"zarr.json", ".zgroup", ".zarray", ".zattrs", ".zmetadata"})
"""What the files of Zarr's metadata are called, in any version of it."""

_MAX_NODE_BYTES = 200

_NATIVE = frozenset(
    {"bool", "float16", "float32", "float64", "complex64", "complex128"}
    | {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
)
_VIEWED = frozenset(
    {"bfloat16", "complex32", "float8_e8m0fnu", "float4_e2m1fn_x2"}
    | {f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")}
)


def lead_axis(shape: tuple[int, ...]) -> int:
    """Returns the first axis whose extent is not 1; a range of rows along it is contiguous."""
    return next((axis for axis, extent in enumerate(shape) if extent != 1), 0)


def chunk_shape(
    shape: tuple[int, ...],
    itemsize: int,
    target_bytes: int | None = None,
    *,
    align_bytes: int = ALIGN_BYTES,
    max_padding: float = _MAX_PADDING,
) -> tuple[int, ...]:
    """Returns the shape of the chunks of a new array: about `target_bytes` each, along the lead axis only.

    Zarr stores the last chunk at full size, so rows are shared out evenly, and rounded up to a multiple of
    `align_bytes` only where that pads the last chunk by `max_padding` of the tensor at most.
    """
    target_bytes = TARGET_CHUNK_BYTES if target_bytes is None else target_bytes
    if not shape:
        return ()
    axis = lead_axis(shape)
    rows, inner = shape[axis], tuple(max(extent, 1) for extent in shape[axis + 1 :])
    row_bytes = itemsize * math.prod(inner)
    n_chunks = -(-rows * row_bytes // target_bytes)
    chunk_rows = max(rows, 1)
    if n_chunks > 1:
        chunk_rows = -(-rows // n_chunks)
        align_rows = align_bytes // math.gcd(align_bytes, row_bytes)
        # A few more and smaller chunks often leave no padding where the first choice would.
        for wanted in range(n_chunks, n_chunks + n_chunks // 4 + 2):
            aligned = -(-rows // wanted // align_rows) * align_rows
            fits = aligned <= rows and aligned * row_bytes <= 2 * target_bytes
            if fits and -rows % aligned <= rows * max_padding:
                chunk_rows = aligned
                break
    return (1,) * axis + (chunk_rows,) + inner


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of `dtype` without its module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def floating_dtype(dtype: torch.dtype | str, what: str) -> torch.dtype:
    """Returns the floating dtype that `dtype` names.

    Raises:
        ValueError: If it names none that a store can have; the message says that litrt cannot do `what` with it.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or array_dtype(found) is None:
        raise ValueError(f"cannot {what} {dtype!r}: use a floating dtype such as 'bfloat16' or 'float16'.")
    return found


def array_dtype(dtype: torch.dtype) -> str | None:
    """Returns the Zarr data type that stores `dtype`, or None where there is none.

    A dtype that Zarr lacks is stored as the unsigned integers of the same size that have its bits.
    """
    name = dtype_name(dtype)
    if name in _NATIVE:
        return name
    return f"uint{8 * dtype.itemsize}" if name in _VIEWED else None


def is_text(name: str) -> bool:
    """Says whether a string can be written: JSON and pickles may have halves of characters in it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def node_name(name: str) -> str:
    """Returns the name of the array that holds tensor `name`: percent-escaped where Zarr needs that."""
    escaped = "".join(
        char if re.fullmatch(r"[A-Za-z0-9._-]", char) else "".join(f"%{byte:02X}" for byte in char.encode())
        for char in name
    )
    if not escaped.strip(".") or escaped.startswith("__") or escaped in METADATA:
        escaped = f"%{ord(escaped[0]):02X}{escaped[1:]}" if escaped else "%"
    if len(escaped) > _MAX_NODE_BYTES:
        escaped = f"{escaped[: _MAX_NODE_BYTES - 33]}%{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    return escaped


def size_of_chunks(directory: Path) -> tuple[int, int]:
    """Returns how many chunk files an array has, of those that are there, and their bytes."""
    n_files = n_bytes = 0
    for parent, _, files in os.walk(directory):
        for file in files:
            if file != "zarr.json":
                with contextlib.suppress(OSError):
                    n_bytes += os.path.getsize(Path(parent, file))
                    n_files += 1
    return n_files, n_bytes


def bytes_of_chunks(directory: Path) -> int:
    """Returns the bytes of the chunk files of an array, of those that are there."""
    return size_of_chunks(directory)[1]


def litrt_attributes(attributes: object) -> dict[str, Any]:
    """Returns what litrt wrote to the attributes of a group or an array; nothing where it wrote nothing."""
    header = attributes.get("litrt") if isinstance(attributes, Mapping) else None
    return header if isinstance(header, dict) else {}


def torch_dtype(attributes: object, stored: str) -> torch.dtype | None:
    """Returns the dtype of an array of data type `stored` by its attributes, or None where torch has none such."""
    name = litrt_attributes(attributes).get("torch_dtype", stored)
    dtype = getattr(torch, name, None) if isinstance(name, str) and name in _NATIVE | _VIEWED else None
    return dtype if isinstance(dtype, torch.dtype) else None


@dataclass(frozen=True, slots=True)
class ChunkFiles:
    """An array whose chunk files litrt reads itself: contiguous values along the lead axis, each with its crc32c.

    Attributes:
        shape: Its shape.
        chunks: That of its chunks.
        dtype: Its dtype in torch.
        packed: Whether the values of a chunk are one Blosc buffer.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: torch.dtype
    packed: bool


def chunk_files(metadata: Mapping[str, Any]) -> ChunkFiles | None:
    """Returns what the metadata of an array says of its chunk files, or None where zarr-python has to read them."""
    shape, codecs = metadata.get("shape"), metadata.get("codecs")
    dtype = torch_dtype(metadata.get("attributes"), str(metadata.get("data_type")))
    if dtype is None or array_dtype(dtype) != metadata.get("data_type"):
        return None
    if metadata.get("zarr_format") != 3 or metadata.get("storage_transformers") or not isinstance(codecs, list):
        return None
    grid, grid_options = _extension(metadata.get("chunk_grid"))
    keys, key_options = _extension(metadata.get("chunk_key_encoding"))
    chunks = grid_options.get("chunk_shape")
    if not (isinstance(shape, list) and isinstance(chunks, list) and len(shape) == len(chunks)):
        return None
    if not are_counts(shape) or not are_counts(chunks, least=1):
        return None
    shape, chunks = tuple(shape), tuple(chunks)
    chain = [_extension(codec) for codec in codecs]
    is_packed = [name for name, _ in chain] == ["bytes", "blosc", "crc32c"]
    block_bytes = chain[1][1].get("blocksize", 0) if is_packed else 0
    is_plain = (
        (grid, keys, key_options.get("separator", "/")) == ("regular", "default", "/")
        and (is_packed or [name for name, _ in chain] == ["bytes", "crc32c"])
        and (dtype.itemsize == 1 or chain[0][1].get("endian") == "little")
        and are_counts([block_bytes])
        and block_bytes <= MAX_BLOCK_BYTES
    )
    axis = lead_axis(shape)
    expected = tuple(max(extent, 1) for extent in shape)
    if not is_plain or (*chunks[:axis], *chunks[axis + 1 :]) != (*expected[:axis], *expected[axis + 1 :]):
        return None
    return ChunkFiles(shape, chunks, dtype, is_packed)


def are_counts(values: Iterable[object], *, least: int = 0) -> bool:
    """Says whether values that somebody else has written are integers of 64 bits of at least `least`, and no bools."""
    return all(type(value) is int and least <= value < 1 << 63 for value in values)


def _extension(value: object) -> tuple[object, dict[str, Any]]:
    """Returns the name and the configuration of a codec or grid, which may be written as a name alone."""
    if not isinstance(value, dict):
        return value, {}
    options = value.get("configuration")
    return value.get("name"), options if isinstance(options, dict) else {}
