"""Blocks: what the checksums in a store cover, and which of them have a range of bytes."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from conftest import MakeStore
from hypothesis import given
from hypothesis import strategies as st

import litrt
import litrt.arrays
import litrt.blocks
from litrt.blocks import BLOCK_BYTES, Blocks, choose_block_rows, merged


@given(st.data())
def test_what_covers_ranges_is_the_blocks_that_they_touch(data: st.DataObject) -> None:
    n_rows, row_bytes = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 5))
    chunk_rows = data.draw(st.integers(1, n_rows + 3))
    block_rows = data.draw(st.integers(1, chunk_rows))
    blocks = Blocks(n_rows, row_bytes, chunk_rows, block_rows)
    start = data.draw(st.integers(0, n_rows * row_bytes - 1))
    stop = data.draw(st.integers(start + 1, n_rows * row_bytes))
    lows, highs = blocks.covering(np.array([start]), np.array([stop]))
    number = [(row // chunk_rows, row % chunk_rows // block_rows) for row in range(n_rows)]
    touched = {number[at // row_bytes] for at in range(start, stop)}
    rows = [row for row in range(n_rows) if number[row] in touched]
    assert (lows.tolist(), highs.tolist()) == ([rows[0] * row_bytes], [(rows[-1] + 1) * row_bytes])


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=12))
def test_merged_ranges_are_apart_and_cover_the_same(sized: list[tuple[int, int]]) -> None:
    ranges = sorted((start, start + size) for start, size in sized)
    found = merged([start for start, _ in ranges], [stop for _, stop in ranges])
    assert {at for start, stop in found for at in range(start, stop)} == {
        at for start, stop in ranges for at in range(start, stop)
    }
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("row_bytes", "chunk_rows", "block_rows"),
    [
        (16_384, 2_016, 4),  # GPT-J's embedding
        (10_240, 3_000, 6),  # whole pages
        (12_288, 3_000, 5),
        (12_582_912, 2, 1),  # experts
        (12_582_912, 1, None),
        (16_384, 4, None),  # a chunk is a block
        (1_022, 30_000, 64),  # whole pages would be 2 MB
        (4, 8_000_000, 16_384),
    ],
)
def test_a_block_is_whole_rows_of_about_64_kib_and_whole_pages_where_these_are_few(
    row_bytes: int, chunk_rows: int, block_rows: int | None
) -> None:
    assert BLOCK_BYTES == 65_536
    assert choose_block_rows(row_bytes, chunk_rows) == block_rows


@pytest.mark.parametrize("shape", [(700, 33), (1, 700, 33), (23_100,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_store_says_of_its_blocks_what_the_format_says(
    shape: tuple[int, ...], dtype: torch.dtype, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litrt.blocks, "BLOCK_BYTES", 1_000)
    monkeypatch.setattr(litrt.arrays, "TARGET_CHUNK_BYTES", 9_000)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)
    path = make_store({"w": weight})
    array = zarr.open_group(path, mode="r")["w"]
    assert isinstance(array, zarr.Array)
    told = array.attrs["litrt"]["blocks"]  # type: ignore[index, call-overload]
    axis = litrt.arrays.lead_axis(shape)
    assert told["chunk_rows"] == array.chunks[axis]
    rows = np.asarray(array[...]).reshape(shape[axis], -1)
    sums = [
        google_crc32c.value(rows[first : min(first + told["block_rows"], start + told["chunk_rows"])].tobytes())
        for start in range(0, len(rows), told["chunk_rows"])
        for first in range(start, min(start + told["chunk_rows"], len(rows)), told["block_rows"])
    ]
    assert len(sums) > len(rows) // told["chunk_rows"] + 1
    assert base64.b64decode(told["crc32c"]) == np.array(sums, dtype="<u4").tobytes()


def test_small_compressed_and_empty_weights_have_no_blocks(make_store: MakeStore, tmp_path: Path) -> None:
    weights = {"small": torch.ones(100, 100), "empty": torch.ones(0, 4), "one": torch.tensor(1.0)}
    plain = make_store(weights)
    packed = make_store({"large": torch.ones(1_000, 100)}, "packed.zarr", compress="lz4")
    for path in (plain, packed):
        for _, array in zarr.open_group(path, mode="r").arrays():
            assert "blocks" not in array.attrs["litrt"]  # type: ignore[operator]
