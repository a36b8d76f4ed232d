"""How a tensor is kept as an array: the choices of names, dtypes and chunks, and what litrt reads itself."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litrt.arrays import TARGET_CHUNK_BYTES, ChunkFiles, array_dtype, chunk_files, chunk_shape, lead_axis, node_name


@given(st.lists(st.text(max_size=300) | st.sampled_from(["", ".", "..", "__a", "zarr.json", "a/b", "%"]), unique=True))
def test_node_names_are_legal_and_tell_tensors_apart(names: list[str]) -> None:
    nodes = [node_name(name) for name in names]
    assert len(set(nodes)) == len(names)
    for node in nodes:
        assert re.fullmatch(r"[A-Za-z0-9._%-]{1,200}", node)
        assert node.strip(".")
        assert not node.startswith("__")
        assert node != "zarr.json"


def test_usual_names_are_kept() -> None:
    assert node_name("transformer.h.0.attn-qkv_1.weight") == "transformer.h.0.attn-qkv_1.weight"
    assert (node_name("a/b%"), node_name("é"), node_name("__x"), node_name(""), node_name("..")) == (
        "a%2Fb%25",
        "%C3%A9",
        "%5F_x",
        "%",
        "%2E.",
    )


@given(
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(0, 300_000),
    st.lists(st.integers(1, 5000), max_size=2),
    st.sampled_from([1, 2, 4, 8]),
)
def test_chunks_are_contiguous_and_hardly_padded(outer: list[int], rows: int, inner: list[int], itemsize: int) -> None:
    shape = (*outer, rows, *inner)
    chunks = chunk_shape(shape, itemsize)
    axis = lead_axis(shape)
    expected = [max(extent, 1) for extent in shape]
    assert [*chunks[:axis], *chunks[axis + 1 :]] == [*expected[:axis], *expected[axis + 1 :]]
    assert all(extent == 1 for extent in shape[:axis])
    n_bytes, chunk_bytes = math.prod(shape) * itemsize, math.prod(chunks) * itemsize
    row_bytes = chunk_bytes // chunks[axis]
    assert chunk_bytes <= 2 * max(TARGET_CHUNK_BYTES, row_bytes)
    if n_bytes:
        n_chunks = -(-shape[axis] // chunks[axis])
        padding_rows = n_chunks * chunks[axis] - shape[axis]
        assert padding_rows < n_chunks or padding_rows <= shape[axis] / 50


@pytest.mark.parametrize(
    ("shape", "itemsize", "expected"),
    [
        ((4096, 16384), 4, (512, 16384)),
        ((50257, 4096), 4, (2011, 4096)),
        ((1, 1, 4096, 16384), 4, (1, 1, 512, 16384)),
        ((8, 4096, 14336), 2, (1, 4096, 14336)),
        ((16_777_216,), 4, (8_388_608,)),
        ((10, 3), 4, (10, 3)),
        ((0, 3), 4, (1, 3)),
        ((3, 0), 4, (3, 1)),
        ((), 4, ()),
    ],
)
def test_chunks_of_usual_shapes(shape: tuple[int, ...], itemsize: int, expected: tuple[int, ...]) -> None:
    assert chunk_shape(shape, itemsize) == expected


def test_chunks_are_rounded_to_pages_where_that_costs_little() -> None:
    (rows, _) = chunk_shape((50_000, 1000), 4)
    assert rows * 4000 % 4096 == 0
    assert array_dtype(torch.bfloat16) == "uint16"
    assert array_dtype(torch.float32) == "float32"
    assert array_dtype(torch.qint8) is None


BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
PLAIN: dict[str, Any] = {
    "zarr_format": 3,
    "shape": [1, 10, 4],
    "data_type": "float32",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 3, 4]}},
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    "codecs": [BYTES, {"name": "crc32c"}],
    "attributes": {},
}


@pytest.mark.parametrize(
    "same",
    [
        {},
        {"chunk_key_encoding": "default"},
        {"codecs": [BYTES, "crc32c"]},
        {"storage_transformers": []},
        {"attributes": {"litrt": {"torch_dtype": "float32"}}},
    ],
)
def test_chunks_along_the_lead_axis_under_a_checksum_are_files_that_litrt_reads(same: dict[str, Any]) -> None:
    assert chunk_files(PLAIN | same) == ChunkFiles((1, 10, 4), (1, 3, 4), torch.float32, packed=False)


@pytest.mark.parametrize(("blocksize", "is_read"), [(0, True), (1 << 20, True), ((1 << 20) + 1, False)])
def test_compressed_chunks_are_read_where_scratch_suffices_for_their_blocks(blocksize: int, is_read: bool) -> None:
    blosc = {"name": "blosc", "configuration": {"blocksize": blocksize}}
    found = chunk_files(PLAIN | {"codecs": [BYTES, blosc, "crc32c"]})
    assert found == (ChunkFiles((1, 10, 4), (1, 3, 4), torch.float32, packed=True) if is_read else None)


@pytest.mark.parametrize(
    "other",
    [
        {"zarr_format": 2},
        {"data_type": "datetime64"},
        {"attributes": {"litrt": {"torch_dtype": "bfloat16"}}},
        {"chunk_grid": {"name": "rectilinear", "configuration": {"chunk_shape": [1, 3, 4]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 3, 2]}}},
        {"chunk_key_encoding": "v2"},
        {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, "crc32c"]},
        {"codecs": [BYTES]},
        {"codecs": [BYTES, "gzip", "crc32c"]},
        {"codecs": ["transpose", BYTES, "crc32c"]},
        {"codecs": "bytes"},
        {"storage_transformers": ["cache"]},
    ],
)
def test_all_other_arrays_are_left_to_zarr_python(other: dict[str, Any]) -> None:
    assert chunk_files(PLAIN | other) is None
