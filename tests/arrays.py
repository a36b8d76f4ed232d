"""Stores with one array, written by zarr-python alone, for tests of what reads them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import LocalStore

GUARD = 0xA5
DTYPES = (
    "bool",
    "int8",
    "uint16",
    "int64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "bfloat16",
    "float8_e5m2",
)


def page_aligned(n_bytes: int, offset: int = 0) -> npt.NDArray[np.uint8]:
    """Returns memory that begins `offset` bytes after the start of a page."""
    return np.frombuffer(mmap.mmap(-1, n_bytes + offset + 4096), dtype=np.uint8)[offset : offset + n_bytes]


def write(path: Path, values: npt.NDArray[Any], dtype: str = "", **options: Any) -> None:
    """Writes a store with one tensor "w" as another program would, with zarr-python alone."""
    group = zarr.create_group(
        LocalStore(path),
        attributes={"litrt": {"format": 1, "complete": True, "tensors": ["w"], "aliases": {}}},
    )
    array = group.create_array(
        "w",
        shape=values.shape,
        dtype=values.dtype,
        config={"write_empty_chunks": True},
        attributes={"litrt": {"name": "w", "torch_dtype": dtype or values.dtype.name}},
        **{"serializer": BytesCodec(endian="little"), "compressors": [Crc32cCodec()], "filters": None} | options,
    )
    array[...] = values


@st.composite
def arrays(draw: st.DrawFn, tops: Sequence[int] = (256,)) -> tuple[str, npt.NDArray[Any], tuple[int, ...]]:
    """Draws a dtype of torch, the array that stores it, of bytes below one of `tops`, and chunks of its rows."""
    dtype = draw(st.sampled_from(DTYPES))
    stored = {"bfloat16": "uint16", "float8_e5m2": "uint8"}.get(dtype, dtype)
    outer = draw(st.lists(st.just(1), max_size=2))
    shape = (*outer, draw(st.integers(0, 60)), *draw(st.lists(st.integers(0, 300), max_size=2)))
    if draw(st.integers(0, 9)) == 0:
        shape = ()
    top = 2 if dtype == "bool" else draw(st.sampled_from(tops))
    n_bytes = int(np.prod(shape)) * np.dtype(stored).itemsize
    raw = np.random.default_rng(draw(st.integers(0, 9))).integers(0, top, n_bytes, dtype=np.uint8)
    axis = next((axis for axis, extent in enumerate(shape) if extent != 1), 0)
    chunks = [max(extent, 1) for extent in shape]
    if shape:
        chunks[axis] = draw(st.integers(1, max(shape[axis], 1) + 3))
    return dtype, raw.view(stored).reshape(shape), tuple(chunks)


def cached_pages(file: Path) -> bytes:
    """Returns for each page of a file whether it is in the page cache; to ask does not put it there."""
    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        found = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.byref(first), ctypes.c_size_t(len(mapped)), found)
        del first  # or `mapped` could not be closed
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        return bytes(page & 1 for page in found)
