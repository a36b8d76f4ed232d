"""Direct reads: the bytes asked for, however they are cut, and a refusal that is remembered for all of a store."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from arrays import page_aligned
from conftest import MakeStore
from hypothesis import given
from hypothesis import strategies as st

from litrt import packed, reader
from litrt.blockreads import read_run, runs
from litrt.directio import Files, StoppedError, fill, is_on_page, size_of
from litrt.reader import Reader
from litrt.store import open_store

CONTENT = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("files") / "content"
    path.write_bytes(CONTENT.tobytes())
    return str(path)


@given(st.lists(st.integers(0, 9000), min_size=1, max_size=4), st.integers(0, 20_000), st.integers(1, 9000))
def test_buffers_are_filled_from_where_reading_starts_however_short_each_read(
    file: str, sizes: list[int], start: int, most: int
) -> None:
    whole = os.preadv

    def short(fd: int, buffers: list[memoryview], position: int) -> int:
        room = memoryview(bytearray(most))
        n_read = whole(fd, [room], position)
        left = room[:n_read]
        for buffer in buffers:
            n_bytes = min(len(buffer), len(left))
            buffer[:n_bytes] = left[:n_bytes]
            left = left[n_bytes:]
        return n_read - len(left)

    memories = [np.zeros(size, np.uint8) for size in sizes]
    end = start + sum(sizes)
    fd = os.open(file, os.O_RDONLY)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "preadv", short)
            stopped = fill(fd, [memory.data for memory in memories], start, end, direct=False)
        assert size_of(fd) == len(CONTENT)
    finally:
        os.close(fd)
    assert stopped == min(end, len(CONTENT))
    assert np.concatenate(memories)[: stopped - start].tobytes() == CONTENT[start:stopped].tobytes()


@pytest.mark.parametrize(("n_read", "calls"), [(4096, 3), (4095, 1)])
def test_a_direct_read_that_was_cut_goes_on_from_a_page_alone(
    n_read: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = []

    def cut(fd: int, buffers: list[memoryview], position: int) -> int:
        positions.append(position)
        return n_read

    monkeypatch.setattr(os, "preadv", cut)
    assert fill(-1, [page_aligned(3 * 4096).data], 0, 3 * 4096, direct=True) == calls * n_read
    assert positions == [number * 4096 for number in range(calls)]


@pytest.mark.parametrize("offset", [0, 1, 512, 4096])
def test_a_page_begins_at_a_multiple_of_its_size(offset: int) -> None:
    assert is_on_page(page_aligned(10, offset)) == (offset % 4096 == 0)


class FileSystem:
    """One that refuses direct reads, when a file is opened or when it is read."""

    def __init__(self, refused: str, number: int = errno.EINVAL) -> None:
        self.refused = refused
        self.number = number
        self.n_refused = 0
        self.direct: set[int] = set()
        self._open, self._preadv, self._close = os.open, os.preadv, os.close

    def _refuse(self) -> None:
        self.n_refused += 1
        raise OSError(self.number, os.strerror(self.number))

    def open(self, file: str, flags: int) -> int:
        if flags & os.O_DIRECT and self.refused == "open":
            self._refuse()
        fd = self._open(file, flags & ~os.O_DIRECT)
        if flags & os.O_DIRECT:
            self.direct.add(fd)
        return fd

    def preadv(self, fd: int, buffers: list[memoryview], position: int) -> int:
        if fd in self.direct and self.refused == "preadv":
            self._refuse()
        return self._preadv(fd, buffers, position)

    def close(self, fd: int) -> None:
        self.direct.discard(fd)
        self._close(fd)


@pytest.fixture(params=[("open", errno.EINVAL), ("open", errno.EOPNOTSUPP), ("preadv", errno.EINVAL), ("nothing", 0)])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileSystem]:
    monkeypatch.setattr(reader, "DIRECT_MIN_BYTES", 1)
    monkeypatch.setattr(packed, "_DIRECT_MIN_BYTES", 1)
    return FileSystem(*request.param)


@pytest.mark.parametrize("kind", ["chunks", "packed", "runs"])
def test_a_file_system_without_direct_reads_is_asked_once(
    kind: str, file_system: FileSystem, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(3000, 1024)
    found = Reader(open_store(make_store({"w": weight}, compress="lz4" if kind == "packed" else None)))
    n_opened = 0

    def opened(file: str, flags: int) -> int:
        nonlocal n_opened
        n_opened += 1
        return file_system.open(file, flags)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", file_system.preadv)
    monkeypatch.setattr(os, "close", file_system.close)
    memory = page_aligned(weight.nbytes)
    n_reads = 0
    for _ in range(3):
        if kind == "runs":
            size = found.store["w"].readable.largest_bytes
            for run in runs(found, "w", [(0, size), (4 * size, 5 * size)]):
                read_run(found, run, memory[: run.nbytes])
                n_reads += 1
            assert memory[:size].tobytes() == weight.numpy().view(np.uint8).reshape(-1)[4 * size : 5 * size].tobytes()
        else:
            for piece in found.pieces("w"):
                found.read(piece, memory)
                n_reads += 1
            assert memory.tobytes() == weight.numpy().tobytes()
    refuses = file_system.refused != "nothing"
    assert file_system.n_refused == refuses
    assert n_opened == n_reads + refuses
    assert file_system.direct == set(), "every file was closed"


def test_a_direct_read_that_stopped_is_followed_by_a_buffered_one_and_not_held_against_the_file_system(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_system = FileSystem("nothing")
    monkeypatch.setattr(os, "open", file_system.open)
    ways = []

    def read(fd: int, direct: bool, what: str) -> str:
        ways.append(direct)
        if direct:
            raise StoppedError
        return what

    files = Files()
    n_open = len(os.listdir("/proc/self/fd"))
    assert files.read(file, True, read, "values") == "values"
    assert files.read(file, True, read, "values") == "values"
    assert files.read(file, False, read, "values") == "values"
    assert ways == [True, False, True, False, False]
    assert len(os.listdir("/proc/self/fd")) == n_open


def test_an_error_that_is_no_refusal_is_raised(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", FileSystem("nothing").open)
    ways = []

    def read(fd: int, direct: bool) -> None:
        ways.append(direct)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            Files().read(file, True, read)
    assert ways == [True, True]
