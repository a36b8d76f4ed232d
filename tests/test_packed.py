"""Compressed chunks: the same values as zarr-python, nothing outside the piece, and no damage unseen."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import arrays
import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr
from arrays import GUARD, cached_pages, page_aligned
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import LocalStore

from litrt import packed
from litrt.convert import convert
from litrt.errors import CorruptWeightError
from litrt.reader import Reader
from litrt.store import open_store

CRC = Crc32cCodec()


def write(path: Path, values: npt.NDArray[Any], chunks: tuple[int, ...], dtype: str = "", **blosc: Any) -> None:
    """Writes a store with one tensor "w", of compressed chunks."""
    codec = BloscCodec(**({"typesize": values.dtype.itemsize, "cname": "lz4"} | blosc))
    arrays.write(path, values, dtype, chunks=chunks, compressors=[codec, CRC])


def guarded_read(path: Path, n_bytes: int, offset: int = 0) -> npt.NDArray[np.uint8]:
    """Returns the bytes of "w", and checks that nothing around them was written to."""
    reader = Reader(open_store(path))
    assert reader.store["w"].packed
    memory = page_aligned(n_bytes + offset + 8192)
    memory[:] = GUARD
    values = memory[4096 + offset : 4096 + offset + n_bytes]
    try:
        for piece in reader.pieces("w"):
            reader.read(piece, values)
    finally:
        assert reader.store._group is None, "zarr-python was not needed"
        assert (memory[: 4096 + offset] == GUARD).all()
        assert (memory[4096 + offset + n_bytes :] == GUARD).all()
    return values


@settings(max_examples=80)
@given(
    arrays.arrays((1, 3, 256)),
    st.booleans(),
    st.sampled_from([0, 1, 512]),
    st.fixed_dictionaries(
        {
            "cname": st.sampled_from(["lz4", "lz4hc", "zstd", "blosclz", "zlib"]),
            "clevel": st.integers(0, 9),
            "shuffle": st.sampled_from(["noshuffle", "shuffle", "bitshuffle"]),
            "blocksize": st.sampled_from([0, 128, 4096, 1 << 20]),
        }
    ),
)
def test_compressed_chunks_are_read_as_zarr_python_reads_them(
    case: tuple[str, npt.NDArray[Any], tuple[int, ...]], direct: bool, offset: int, blosc: dict[str, Any]
) -> None:
    dtype, values, chunks = case
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_DIRECT_MIN_BYTES", 1 if direct else 1 << 60)
        path = Path(directory, "s.zarr")
        write(path, values, chunks, dtype, **blosc)
        found = guarded_read(path, values.nbytes, offset).tobytes()
        expected = zarr.open_group(LocalStore(path), mode="r")["w"][...]  # type: ignore[index]
    assert found == np.asarray(expected).tobytes() == values.tobytes()


def test_blocks_that_are_larger_than_scratch_allows_are_left_to_zarr_python(tmp_path: Path) -> None:
    values = np.arange(1 << 20, dtype=np.float32).reshape(4, -1)
    write(tmp_path / "s.zarr", values, values.shape, blocksize=2 << 20)
    reader = Reader(open_store(tmp_path / "s.zarr"))
    assert not reader.store["w"].packed
    assert torch.equal(reader.read_tensor("w"), torch.from_numpy(values))
    reader.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of two chunks of 70 rows, of which the last has 30 rows of values and 40 of padding."""
    write(tmp_path / "s.zarr", np.arange(100_000, dtype=np.float32).reshape(100, 1000), (70, 1000))
    return tmp_path / "s.zarr"


@pytest.fixture(params=["direct", "buffered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_DIRECT_MIN_BYTES", 1 if request.param == "direct" else 1 << 60)


def damage(file: Path, how: str) -> str:
    """Damages a chunk file, and returns what the message should say."""
    content = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
        return "is missing"
    if how in {"empty", "header"}:
        file.write_bytes(content[: {"empty": 0, "header": 20}[how]])
        return f"has {os.path.getsize(file)} bytes in place of 21 to 280020"
    if how == "swell":
        file.write_bytes(content + bytes(280_000))
        return f"has {len(content) + 280_000} bytes in place of 21 to 280020"
    if how in {"truncate", "extend"}:
        file.write_bytes((content + b"\0")[: len(content) + {"truncate": -1, "extend": 1}[how]])
    else:
        content[{"flip header": 5, "flip middle": len(content) // 2, "flip crc": -1}[how]] ^= 0x10
        file.write_bytes(content)
    return "is damaged: its checksum is"


@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize(
    "how",
    ["delete", "empty", "header", "swell", "truncate", "extend", "flip header", "flip middle", "flip crc"],
)
def test_damage_is_an_error_that_names_the_tensor_and_the_file(path: Path, way: None, chunk: int, how: str) -> None:
    file = path / "w" / "c" / str(chunk) / "0"
    said = damage(file, how)
    expected = rf"weight 'w': {re.escape(str(file))} {said}.*[rR]un litrt convert again\."
    with pytest.raises(CorruptWeightError, match=expected) as caught:
        guarded_read(path, 400_000)
    assert (caught.value.name, caught.value.file) == ("w", str(file))
    assert caught.value.__context__ is None, "the frames of the cause would keep the destination alive"


def forge(file: Path, change: Callable[[bytearray], None]) -> None:
    """Changes a Blosc buffer, and gives it the checksum of what it then is."""
    content = bytearray(file.read_bytes()[:-4])
    change(content)
    file.write_bytes(bytes(content) + google_crc32c.value(bytes(content)).to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (4, 280_001, "holds 280001 bytes in place of 280000"),
        (4, 279_999, "holds 279999 bytes in place of 280000"),
        (4, 0xFFFF_FFFF, "holds 4294967295 bytes in place of 280000"),
        (8, (1 << 20) + 1, "has blocks of 1048577 bytes, and its metadata promises at most 1048576"),
        (8, 0xFFFF_FFF0, "has blocks of 4294967280 bytes"),
        (8, 0, r"cannot be decoded \("),
        (12, 17, "says that it has 17 compressed bytes, and has "),
        (12, 0x7FFF_FFFF, "says that it has 2147483647 compressed bytes, and has "),
    ],
)
def test_a_header_that_lies_is_not_believed(path: Path, at: int, value: int, said: str) -> None:
    def change(content: bytearray) -> None:
        content[at : at + 4] = value.to_bytes(4, "little")

    forge(path / "w/c/0/0", change)
    with pytest.raises(CorruptWeightError, match=said):
        guarded_read(path, 400_000)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 9))
def test_whatever_a_chunk_holds_nothing_is_written_outside_its_place(
    changes: list[tuple[int, int]], level: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "s.zarr")
        write(path, np.arange(3000, dtype=np.float32).reshape(30, 100), (20, 100), clevel=level)

        def change(content: bytearray) -> None:
            for at, byte in changes:
                content[at % len(content)] = byte

        forge(path / "w/c/0/0", change)
        try:
            guarded_read(path, 12_000)
        except CorruptWeightError as error:
            assert error.name == "w"  # noqa: PT017


def test_threads_decode_at_the_same_time(tmp_path: Path) -> None:
    weights = {f"w{n}": torch.randn(n, 300_000) for n in (1, 8, 17)}
    reader = Reader(convert(weights, tmp_path / "s.zarr", compress="lz4", progress=False))
    assert all(info.packed for info in reader.store.values())
    memories = {name: page_aligned(tensor.nbytes) for name, tensor in weights.items()}
    jobs = [(piece, memories[name]) for name in weights for piece in reader.pieces(name)] * 3
    assert len(jobs) > 12
    n_open = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda job: reader.read(*job), jobs))
    assert len(os.listdir("/proc/self/fd")) == n_open
    for name, tensor in weights.items():
        assert memories[name].tobytes() == tensor.numpy().tobytes()
    # Through the lock of Blosc's global state, threads would decode one at a time.
    assert packed.blosc.use_threads is False


def test_scratch_is_a_file_and_two_blocks_and_a_chunk_where_there_is_padding(path: Path, tmp_path: Path) -> None:
    file_bytes = 69 * 4096  # 280,020 bytes in whole pages
    assert Reader(open_store(path)).scratch_bytes_per_task == file_bytes + 280_000 + 2 * 280_000 + 262_144
    write(tmp_path / "whole.zarr", np.arange(140_000, dtype=np.float32).reshape(140, 1000), (70, 1000))
    assert Reader(open_store(tmp_path / "whole.zarr")).scratch_bytes_per_task == file_bytes + 2 * 280_000 + 262_144
    large = np.arange(4 << 20, dtype=np.float32).reshape(4, -1)
    write(tmp_path / "large.zarr", large, (2, 1 << 20))
    assert Reader(open_store(tmp_path / "large.zarr")).scratch_bytes_per_task == (
        (8 << 20) + 4096 + 2 * (1 << 20) + 262_144
    )


@pytest.mark.parametrize("n_rows", [10, 1000])
def test_what_was_read_does_not_stay_in_the_page_cache(n_rows: int, tmp_path: Path) -> None:
    reader = Reader(convert({"w": torch.randn(n_rows, 1000)}, tmp_path / "s.zarr", compress="lz4", progress=False))
    os.sync()
    reader.read_tensor("w")
    (piece,) = reader.pieces("w")
    assert not any(cached_pages(Path(piece.file)))
