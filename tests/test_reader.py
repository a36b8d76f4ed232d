"""Reading: the same values as zarr-python by both ways, nothing outside the piece, and no damage unseen."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr
from arrays import GUARD, arrays, cached_pages, page_aligned, write
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec
from zarr.storage import LocalStore

from litrt import reader as reader_module
from litrt.convert import convert
from litrt.crc import extend_crc
from litrt.errors import CorruptWeightError, WeightNotFoundError
from litrt.reader import Piece, Reader
from litrt.store import open_store


def read_all(reader: Reader, name: str, memory: npt.NDArray[np.uint8]) -> None:
    for piece in reader.pieces(name):
        reader.read(piece, memory)


@pytest.fixture(params=["direct", "buffered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Reads every piece of the test in one of the two ways that do not go through zarr-python."""
    if request.param == "direct":
        monkeypatch.setattr(reader_module, "DIRECT_MIN_BYTES", 1)
        needs_direct_io(tmp_path)
    else:
        monkeypatch.setattr(reader_module, "DIRECT_MIN_BYTES", 1 << 60)
    return str(request.param)


def needs_direct_io(directory: Path) -> None:
    (directory / "probe").write_bytes(bytes(4096))
    try:
        fd = os.open(directory / "probe", os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no direct reads")
    try:
        os.preadv(fd, [page_aligned(4096).data], 0)
    except OSError:
        pytest.skip("this file system has no direct reads")
    finally:
        os.close(fd)


@settings(max_examples=60, deadline=None)
@given(arrays(), st.booleans(), st.sampled_from([0, 0, 1, 512]))
def test_the_fast_path_reads_what_zarr_python_reads(
    case: tuple[str, npt.NDArray[Any], tuple[int, ...]], direct: bool, offset: int
) -> None:
    dtype, values, chunks = case
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "DIRECT_MIN_BYTES", 1 if direct else 1 << 60)
        path = Path(directory, "s.zarr")
        write(path, values, dtype, chunks=chunks)
        store = open_store(path)
        assert store["w"].direct
        guarded = page_aligned(values.nbytes + 8192, offset)
        guarded[:] = GUARD
        read_all(Reader(store), "w", guarded[4096 : 4096 + values.nbytes])
        expected = zarr.open_group(LocalStore(path), mode="r")["w"][...]  # type: ignore[index]
        assert guarded[4096 : 4096 + values.nbytes].tobytes() == np.asarray(expected).tobytes() == values.tobytes()
        assert (guarded[:4096] == GUARD).all()
        assert (guarded[4096 + values.nbytes :] == GUARD).all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_chunks_along_several_axes_and_shards_are_read_through_zarr_python(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3)))
    chunks = tuple(data.draw(st.integers(1, extent)) for extent in shape)
    options: dict[str, Any] = {"chunks": chunks}
    if data.draw(st.booleans()):
        options["shards"] = tuple(chunk * data.draw(st.integers(1, 3)) for chunk in chunks)
    if data.draw(st.booleans()):
        options["serializer"] = BytesCodec(endian="big")
    values = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory, "s.zarr"), values, **options)
        memory = page_aligned(values.nbytes, data.draw(st.integers(0, 3)))
        read_all(Reader(open_store(Path(directory, "s.zarr"))), "w", memory)
    assert memory.tobytes() == values.tobytes()


@pytest.mark.parametrize("compress", [None, "lz4", "zstd"])
@pytest.mark.parametrize("packed", [False, True])
def test_compressed_and_zipped_stores_have_the_same_values(compress: str | None, packed: bool, tmp_path: Path) -> None:
    weights = {
        "a": torch.randn(300, 70),
        "b": torch.randn(9).bfloat16(),
        "c": torch.tensor(True),
        "d": torch.ones(0, 3),
    }
    store = convert(weights, tmp_path / "s.zarr", compress=compress, progress=False)
    if packed:
        store = open_store(shutil.make_archive(str(tmp_path / "s"), "zip", tmp_path / "s.zarr"))
    assert store["a"].direct == (not packed and compress is None)
    assert store["a"].packed == (not packed and compress is not None)
    reader = Reader(store)
    for name, tensor in weights.items():
        found = reader.read_tensor(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    reader.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of two chunks of 7 rows, of which the last has 3 rows of values and 4 of padding."""
    write(tmp_path / "s.zarr", np.arange(10_000, dtype=np.float32).reshape(10, 1000), chunks=(7, 1000))
    return tmp_path / "s.zarr"


def test_pieces_are_the_chunks_in_order_without_padding(path: Path) -> None:
    reader = Reader(open_store(path))
    assert reader.pieces("w") == (
        Piece("w", 0, 28_000, str(path / "w/c/0/0"), 0),
        Piece("w", 28_000, 12_000, str(path / "w/c/1/0"), 1),
    )
    with pytest.raises(WeightNotFoundError):
        reader.pieces("v")


def test_a_read_writes_its_piece_and_nothing_else(path: Path, way: str) -> None:
    reader = Reader(open_store(path))
    for piece in reader.pieces("w"):
        memory = page_aligned(40_000)
        memory[:] = GUARD
        reader.read(piece, memory)
        outside = np.delete(memory, slice(piece.offset, piece.offset + piece.nbytes))
        assert (outside == GUARD).all()
        expected = np.arange(10_000, dtype=np.float32).view(np.uint8)[piece.offset : piece.offset + piece.nbytes]
        assert (memory[piece.offset : piece.offset + piece.nbytes] == expected).all()


def test_a_destination_of_the_wrong_size_is_refused(path: Path) -> None:
    reader = Reader(open_store(path))
    with pytest.raises(ValueError, match=r"'w' is read into 40000 contiguous bytes; got shape \(39999,\) of uint8"):
        reader.read(reader.pieces("w")[0], page_aligned(39_999))


def damage(file: Path, how: str) -> str:
    """Damages a chunk file of the fixture, and returns what the message should say."""
    content = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
        return "is missing"
    if how in {"truncate", "empty", "extend"}:
        n_bytes = {"truncate": len(content) - 1, "empty": 0, "extend": len(content) + 1}[how]
        file.write_bytes((content + b"\0")[:n_bytes])
        return f"has {n_bytes} bytes in place of 28004"
    content[{"flip first": 0, "flip value": 11_999, "flip padding": 20_000, "flip crc": -1}[how]] ^= 0x10
    file.write_bytes(content)
    return "is damaged: its checksum is"


@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("how", ["delete", "truncate", "empty", "extend", "flip first", "flip value", "flip crc"])
def test_damage_is_an_error_that_names_the_tensor_and_the_file(path: Path, way: str, chunk: int, how: str) -> None:
    file = path / "w" / "c" / str(chunk) / "0"
    said = damage(file, how)
    expected = rf"weight 'w': {re.escape(str(file))} {said}.*[rR]un litrt convert again\."
    with pytest.raises(CorruptWeightError, match=expected) as caught:
        Reader(open_store(path)).read_tensor("w")
    assert (caught.value.name, caught.value.file) == ("w", str(file))


@pytest.mark.parametrize("chunk_bytes", [101, 8188, 20_000])
def test_bytes_after_the_checksum_of_a_padded_chunk_are_damage(tmp_path: Path, way: str, chunk_bytes: int) -> None:
    write(tmp_path / "s.zarr", np.ones(chunk_bytes + 100, np.uint8), chunks=(chunk_bytes,))
    file = tmp_path / "s.zarr/w/c/1"
    file.write_bytes(file.read_bytes() + b"\0")
    reader = Reader(open_store(tmp_path / "s.zarr"))
    with pytest.raises(CorruptWeightError, match=f"has {chunk_bytes + 5} bytes in place of {chunk_bytes + 4}"):
        reader.read_part(reader.pieces("w")[1], page_aligned(100))


def test_damage_to_padding_alone_harms_nothing(path: Path, way: str) -> None:
    damage(path / "w/c/1/0", "flip padding")
    assert torch.equal(Reader(open_store(path)).read_tensor("w").flatten(), torch.arange(10_000.0))


def test_a_shard_that_is_missing_is_not_taken_for_zeros(tmp_path: Path) -> None:
    write(tmp_path / "s.zarr", np.ones((8, 8), np.float32), chunks=(2, 8), shards=(4, 8))
    (tmp_path / "s.zarr/w/c/1/0").unlink()
    with pytest.raises(CorruptWeightError, match="weight 'w': w/c/1/0 is missing"):
        Reader(open_store(tmp_path / "s.zarr")).read_tensor("w")


def test_a_chunk_missing_from_a_zip_file_is_not_taken_for_zeros(path: Path, tmp_path: Path) -> None:
    (path / "w/c/1/0").unlink()
    reader = Reader(open_store(shutil.make_archive(str(tmp_path / "s"), "zip", path)))
    with pytest.raises(CorruptWeightError, match="w/c/1/0 is missing") as caught:
        reader.read_tensor("w")
    assert caught.value.file == "w/c/1/0"
    reader.close()


def test_padding_that_another_writer_filled_otherwise_is_still_checked(path: Path, way: str) -> None:
    file = path / "w/c/1/0"
    content = np.frombuffer(file.read_bytes(), np.uint8).copy()
    content[12_000:28_000] = 7
    content[28_000:] = np.frombuffer(google_crc32c.value(content[:28_000]).to_bytes(4, "little"), np.uint8)
    file.write_bytes(content.tobytes())
    reader = Reader(open_store(path))
    assert torch.equal(reader.read_tensor("w").flatten(), torch.arange(10_000.0))
    damage(file, "flip padding")
    with pytest.raises(CorruptWeightError, match="is damaged: its checksum is"):
        reader.read_tensor("w")


def test_an_error_of_the_disk_is_reported_as_such(path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(
        CorruptWeightError, match=r"cannot be read .*Input/output error.* Check the disk, then run"
    ) as caught:
        Reader(open_store(path)).read_tensor("w")
    assert caught.value.__context__ is None, "the frames of the cause would keep the destination alive"


@pytest.mark.parametrize("most", [1000, 4096, 8192, 12_288, 1 << 20])
def test_short_reads_are_continued(path: Path, way: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    n_calls = 0

    def short(fd: int, buffers: list[memoryview], position: int) -> int:
        nonlocal n_calls
        n_calls += 1
        kept, room = [], most
        for buffer in buffers:
            kept.append(buffer[:room])
            room -= len(kept[-1])
        return whole(fd, kept, position)

    monkeypatch.setattr(os, "preadv", short)
    memory = page_aligned(40_000)
    read_all(Reader(open_store(path)), "w", memory)
    assert memory.tobytes() == np.arange(10_000, dtype=np.float32).tobytes()
    assert n_calls >= (28_000 + 12_000) // most


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Reader]:
    """A store of tensors of one to three chunks."""
    weights = {f"w{n}": torch.randn(n, 1_000_000) for n in (1, 7, 17)} | {"odd": torch.randn(3001, 3571)}
    reader = Reader(convert(weights, tmp_path / "large.zarr", progress=False))
    reader.expected = weights  # type: ignore[attr-defined]
    yield reader
    reader.close()


def test_threads_read_at_the_same_time(large: Reader) -> None:
    expected: dict[str, torch.Tensor] = large.expected  # type: ignore[attr-defined]
    memories = {name: page_aligned(tensor.nbytes) for name, tensor in expected.items()}
    jobs = [(piece, memories[name]) for name in expected for piece in large.pieces(name)] * 3
    assert len(jobs) == 3 * 7
    n_open = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda job: large.read(*job), jobs))
    assert len(os.listdir("/proc/self/fd")) == n_open
    for name, tensor in expected.items():
        assert memories[name].tobytes() == tensor.numpy().tobytes()


def test_threads_read_through_zarr_python_at_the_same_time(tmp_path: Path) -> None:
    values = np.arange(60_000, dtype=np.float32).reshape(300, 200)
    write(tmp_path / "s.zarr", values, chunks=(20, 70))
    reader = Reader(open_store(tmp_path / "s.zarr"))
    assert len(reader.pieces("w")) == 15
    memory = page_aligned(values.nbytes)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda piece: reader.read(piece, memory), reader.pieces("w") * 2))
    assert memory.tobytes() == values.tobytes()


def test_scratch_is_two_pages_for_direct_reads_and_a_chunk_twice_for_zarr_python(path: Path, tmp_path: Path) -> None:
    assert Reader(open_store(path)).scratch_bytes_per_task == 0, "reads of small pieces go straight into place"
    write(tmp_path / "large.zarr", np.ones((40, 2000), np.float32))
    assert Reader(open_store(tmp_path / "large.zarr")).scratch_bytes_per_task == 8192
    write(tmp_path / "other.zarr", np.ones((40, 1000), np.float32), chunks=(7, 500))
    assert Reader(open_store(tmp_path / "other.zarr")).scratch_bytes_per_task == 2 * 7 * 500 * 4 + 65_536


@pytest.mark.parametrize("name", ["w17", "odd"])
@pytest.mark.parametrize("offset", [0, 4])
def test_what_was_read_does_not_stay_in_the_page_cache(large: Reader, name: str, offset: int) -> None:
    memory = page_aligned(large.store[name].nbytes, offset)
    os.sync()
    for piece in large.pieces(name):  # what writing the store has left there
        fd = os.open(piece.file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    read_all(large, name, memory)
    read_all(large, name, memory)
    assert [piece.file for piece in large.pieces(name) if any(cached_pages(Path(piece.file)))] == []


@given(st.binary(max_size=300), st.integers(0, 300))
def test_the_checksum_is_crc32c_and_can_be_extended(content: bytes, cut: int) -> None:
    values = np.frombuffer(content, np.uint8)
    assert extend_crc(0, values) == google_crc32c.value(content)
    assert extend_crc(extend_crc(0, values[:cut]), values[cut:]) == google_crc32c.value(content)
    assert extend_crc(0, np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
