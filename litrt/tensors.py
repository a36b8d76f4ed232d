"""What a store says of one tensor, and whether that can be so: before memory is taken for it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import zarr
from zarr.core.sync import sync

from litrt.arrays import (
    METADATA,
    array_dtype,
    chunk_files,
    lead_axis,
    litrt_attributes,
    node_name,
    torch_dtype,
)
from litrt.blocks import Blocks, Sums, blocks_of, sums_of_chunks
from litrt.bounded import bounded, is_compressed
from litrt.errors import StoreError

LARGE_BYTES = 64 << 20
"""From this size on, a tensor is looked for before it is believed in."""

_MANY_CHUNKS = 1 << 10
"""Of more chunks than these as well, as each of them takes memory to know of."""

MOST_RATIO = 1 << 15
"""Bytes that no codec makes of one: Zstandard has blocks of 128 KiB, which take 4 bytes at least."""

_INDEX_BYTES = 64
"""What an inner chunk may take of a shard beside twice its values: its place in the index, and what its codecs add."""

_SLACK_BYTES = 64 << 10
"""What a chunk may take beside twice its values when it is stored."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a store.

    The rows of a tensor run along its lead axis: the first axis whose extent is not 1.

    Attributes:
        name: Its name in the model.
        shape: Its shape.
        dtype: Its dtype in torch, which may differ from that of the array: see `litrt.arrays`.
        nbytes: Bytes of its values.
        path: Path of its array in the group.
        chunk_rows: Rows along the lead axis that one chunk holds.
        direct: Whether a chunk is a file whose bytes are the values of those rows, followed by their crc32c.
        chunk_bytes: Decoded bytes of one chunk, padding included.
        blocks: Parts of its chunks that can be read and checked alone, where the store has checksums of them.
        packed: Whether a chunk is a file that is one Blosc buffer, followed by its crc32c.
        sums: CRC-32C of the values of its chunks, without padding, where the store has them apart from the chunks.
        n_chunks: How many chunks it has.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    path: str
    chunk_rows: int
    direct: bool
    chunk_bytes: int = 0
    packed: bool = False
    blocks: Blocks | None = field(default=None, repr=False, compare=False)
    sums: Sums | None = field(default=None, repr=False, compare=False)
    n_chunks: int = field(default=0, repr=False, compare=False)

    @property
    def is_large(self) -> bool:
        """Whether it is looked for before it is believed in."""
        return self.nbytes > LARGE_BYTES or self.n_chunks > _MANY_CHUNKS

    @property
    def is_padded(self) -> bool:
        """Whether the last chunk holds more rows than the tensor has left for it."""
        return self.chunk_bytes > 0 and self.nbytes % self.chunk_bytes > 0

    @classmethod
    def of_bytes(cls, name: str, nbytes: int) -> TensorInfo:
        """Returns the entry of bytes that no store has."""
        return cls(name, (nbytes,), torch.uint8, nbytes, "", 1, direct=False)

    def served(self, offset: int, nbytes: int, dtype: torch.dtype) -> slice:
        """Returns where bytes of the stored values lie when the tensor is served in `dtype`."""
        start = offset // self.dtype.itemsize * dtype.itemsize
        return slice(start, start + nbytes // self.dtype.itemsize * dtype.itemsize)

    @property
    def n_elements(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def readable(self) -> Blocks:
        """What of the stored bytes can be read and checked alone: blocks, or else chunks. It has elements."""
        if self.blocks is not None:
            return self.blocks
        n_rows = self.shape[lead_axis(self.shape)] if self.shape else 1
        return Blocks(n_rows, self.nbytes // n_rows, self.chunk_rows, self.chunk_rows)

    def cast(self, dtype: torch.dtype) -> TensorInfo:
        """Returns what the tensor is when served in `dtype`: the same, unless it is floating."""
        if not self.dtype.is_floating_point or dtype == self.dtype:
            return self
        nbytes = math.prod(self.shape) * dtype.itemsize
        return replace(self, dtype=dtype, nbytes=nbytes)


@contextlib.contextmanager
def refusing(what: str, *, is_file: bool = True) -> Iterator[None]:
    """Makes a StoreError of whatever zarr-python raises for metadata that it cannot make sense of."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not is_file:
            raise  # of the network
        reason = str(error) or type(error).__name__
        raise StoreError(f"{what} is damaged: {reason[:200]}. Run litrt convert again.") from error


def check_is_there(label: str, info: TensorInfo, n_files: int, n_bytes: int, array: zarr.Array[Any] | None) -> None:
    """Raises an error where a large tensor cannot be there: memory for it may be taken before its chunks are read.

    Args:
        label: The store.
        info: The tensor.
        n_files: How many files its chunks have, or members of a zip file.
        n_bytes: The bytes of these.
        array: Its array, where zarr-python reads it.
    """
    n_stored, is_plain = info.n_chunks, info.direct
    if array is not None:
        is_plain = not is_compressed(array)
        steps = array.shards or array.chunks
        n_stored = math.prod(-(-extent // max(step, 1)) for extent, step in zip(array.shape, steps, strict=True))
    if n_bytes < info.nbytes // (2 if is_plain else MOST_RATIO):
        shortfall = f"has {info.nbytes} bytes and its files {n_bytes}"
    elif n_files < n_stored // 2 or n_bytes < info.n_chunks // 2:
        shortfall = f"has {info.n_chunks} chunks and {n_files} files of {n_bytes} bytes"
    else:
        return
    raise StoreError(
        f"{label} is incomplete: {info.name!r} {shortfall}. Files were deleted or a copy was interrupted: copy the "
        "store again, or run litrt convert again."
    )


def check_array(label: str, info: TensorInfo, array: Any, sizes: Mapping[str, int] | None) -> None:
    """Raises an error where a large tensor cannot be there: by the sizes, or else because its last chunk is not."""
    if sizes is not None:
        of_array = (item for item in sizes.items() if item[0].startswith(f"{info.path}/"))
        found = [size for key, size in of_array if key.rpartition("/")[2] not in METADATA]
        check_is_there(label, info, len(found), sum(found), array)
        return
    last = tuple((extent - 1) // step for extent, step in zip(array.shape, array.shards or array.chunks, strict=True))
    key = f"{array.path}/{array.metadata.encode_chunk_key(last)}"
    if not sync(array.store.exists(key)):
        raise StoreError(
            f"{label} is incomplete: {info.name!r} has {info.nbytes} bytes and no {key}. Files were deleted or a copy "
            "was interrupted: copy the store again, or run litrt convert again."
        )


def info_of_files(name: str, node: str, metadata: dict[str, Any]) -> TensorInfo | None:
    """Returns the entry of an array whose chunk files litrt reads itself, or None for any other."""
    found = chunk_files(metadata)
    if found is None:
        return None
    axis = lead_axis(found.shape)
    nbytes = math.prod(found.shape) * found.dtype.itemsize
    if math.prod(found.chunks) * found.dtype.itemsize > max(2 * nbytes, LARGE_BYTES):
        return None  # scratch is as large as a chunk
    chunk_rows = found.chunks[axis] if found.chunks else 1
    told = litrt_attributes(metadata.get("attributes", {}))
    n_rows = found.shape[axis] if found.shape else 1
    with refusing(f"what the metadata of {name!r} says of its checksums"):
        blocks = blocks_of(told, n_rows, nbytes // n_rows, chunk_rows) if nbytes else None
        sums = sums_of_chunks(told, n_rows, chunk_rows) if nbytes else None
    return TensorInfo(
        name,
        found.shape,
        found.dtype,
        nbytes,
        node,
        chunk_rows,
        direct=not found.packed,
        chunk_bytes=math.prod(found.chunks) * found.dtype.itemsize,
        packed=found.packed,
        blocks=blocks,
        sums=sums,
        n_chunks=-(-n_rows // chunk_rows),
    )


def info_of_array(label: str, name: str, array: object, limits: dict[str, int]) -> TensorInfo:
    """Returns the entry of an array that has to be read through zarr-python, and notes how large its chunks may be."""
    if not isinstance(array, zarr.Array):
        raise StoreError(f"{label}: {name!r} is a group, not an array: run litrt convert again.")
    bounded(array)  # or its codecs are refused
    dtype = torch_dtype(array.attrs.asdict(), array.dtype.name)
    if dtype is None or array_dtype(dtype) != array.dtype.name:
        raise StoreError(
            f"{label}: {name!r} is stored as {array.dtype.name}, which is no form of a torch dtype that "
            "litrt knows: upgrade litrt, or run litrt convert again."
        )
    chunk_rows = max(array.chunks[lead_axis(array.shape)], 1) if array.shape else 1
    chunk_bytes = math.prod(array.chunks) * dtype.itemsize
    nbytes = math.prod(array.shape) * dtype.itemsize
    if max(array.shape, default=0) >= 1 << 63 or chunk_bytes > max(2 * nbytes, LARGE_BYTES):
        raise StoreError(
            f"{label}: {name!r} has shape {array.shape} and chunks of shape {array.chunks}, which no memory holds: "
            "run litrt convert again."
        )
    outer = array.shards or array.chunks
    outer_bytes = math.prod(outer) * dtype.itemsize
    if outer_bytes > max(2 * nbytes, LARGE_BYTES):
        raise StoreError(
            f"{label}: {name!r} of shape {array.shape} has shards of shape {outer}, which no memory holds."
        )
    n_inner = math.prod(outer) // max(math.prod(array.chunks), 1)
    limits[array.path] = 2 * outer_bytes + n_inner * _INDEX_BYTES + _SLACK_BYTES
    n_chunks = math.prod(-(-extent // max(step, 1)) for extent, step in zip(array.shape, array.chunks, strict=True))
    told = litrt_attributes(array.attrs.asdict())
    n_rows = array.shape[lead_axis(array.shape)] if array.shape else 1
    return TensorInfo(
        name,
        array.shape,
        dtype,
        nbytes,
        node_name(name),
        chunk_rows,
        direct=False,
        chunk_bytes=chunk_bytes,
        sums=sums_of_chunks(told, n_rows, chunk_rows) if nbytes else None,
        n_chunks=n_chunks,
    )
