"""Blocks of the arena never overlap, lie where they were asked for, and are the bytes of one buffer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litrt.arena import POISON, Arena, Block
from litrt.device import Bytes, CpuDevice
from litrt.layout import align_up

LIMIT = 1 << 10


def arena(limit_bytes: int = LIMIT, *, capacity_bytes: int = 2 * LIMIT, poison: bool = False) -> Arena:
    return Arena(CpuDevice(), capacity_bytes, limit_bytes, poison=poison)


class Model:
    """What the arena should do, by looking at every byte."""

    def __init__(self, limit_bytes: int) -> None:
        self.taken = np.zeros(limit_bytes, dtype=bool)
        self.blocks: list[Block] = []

    def is_free(self, offset: int, size_bytes: int) -> bool:
        return offset + size_bytes <= len(self.taken) and not self.taken[offset : offset + size_bytes].any()

    def first_fit(self, size_bytes: int, align_bytes: int) -> int | None:
        """Returns the lowest aligned offset from which on all bytes are free."""
        offsets = range(0, len(self.taken) + 1, align_bytes)
        return next((offset for offset in offsets if self.is_free(offset, size_bytes)), None)

    def add(self, block: Block) -> None:
        self.taken[block.offset : block.end] = True
        self.blocks.append(block)

    def free(self, block: Block) -> None:
        self.taken[block.offset : block.end] = False
        self.blocks.remove(block)


ALIGNS = st.sampled_from([1, 4, 64, 128])
OPERATIONS = st.one_of(
    st.tuples(st.just("place"), st.integers(0, 300), ALIGNS, st.just(0)),
    st.tuples(st.just("place_at"), st.integers(0, 300), ALIGNS, st.integers(0, LIMIT // 4)),
    st.tuples(st.just("free"), st.integers(0, 50), st.just(1), st.just(0)),
    st.tuples(st.just("move"), st.integers(0, 50), ALIGNS, st.integers(0, LIMIT // 4)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(OPERATIONS, max_size=60), st.integers(0, LIMIT))
def test_blocks_are_where_a_model_of_single_bytes_puts_them(
    operations: list[tuple[str, int, int, int]], limit_bytes: int
) -> None:
    tested, model = arena(limit_bytes), Model(limit_bytes)
    marks: dict[Block, int] = {}
    for number, (what, n, align_bytes, at) in enumerate(operations):
        if what == "free":
            if not model.blocks:
                continue
            block = model.blocks[n % len(model.blocks)]
            assert (tested.memory(block) == marks.pop(block)).all(), "somebody else wrote to it"
            tested.free(block)
            model.free(block)
        elif what == "move":
            if not model.blocks:
                continue
            block = model.blocks[n % len(model.blocks)]
            offset, size_bytes, mark = 4 * at, align_up(block.nbytes, align_bytes), marks[block]
            model.free(block)
            can = not block.size_bytes or model.is_free(offset, size_bytes)
            model.add(block)
            moved = tested.move(block, offset, size_bytes) if block.size_bytes else block
            assert (moved is not None) == can
            if moved is not None and block.size_bytes:
                assert (moved.offset, moved.size_bytes, moved.nbytes) == (offset, size_bytes, block.nbytes)
                model.free(block)
                model.add(moved)
                marks[moved] = marks.pop(block)
                assert (tested.memory(moved) == mark).all()
        else:
            size_bytes = align_up(n, align_bytes)
            if what == "place":
                made = tested.place(n, size_bytes, align_bytes)
                expected = model.first_fit(size_bytes, align_bytes)
            else:
                offset = 4 * at
                in_the_way = [
                    block
                    for block in model.blocks
                    if block.size_bytes and block.offset < offset + size_bytes and offset < block.end
                ]
                assert tested.in_the_way(offset, size_bytes) == sorted(in_the_way, key=lambda block: block.offset)
                made = tested.place_at(offset, n, size_bytes)
                expected = None if in_the_way or offset + size_bytes > limit_bytes else offset
            assert (made is None) == (expected is None)
            if made is not None:
                assert (made.offset, made.size_bytes, made.nbytes) == (expected, size_bytes, n)
                assert made.end <= limit_bytes
                model.add(made)
                tested.memory(made)[:] = marks[made] = number % 200
        assert tested.held_bytes == sum(block.nbytes for block in model.blocks)
        assert tested.end == max((block.end for block in model.blocks if block.size_bytes), default=0)
        assert int(model.taken.sum()) == sum(block.size_bytes for block in model.blocks), "blocks overlap"
    for block, mark in marks.items():
        assert (tested.memory(block) == mark).all(), "blocks share bytes"


def test_the_first_hole_that_fits_is_taken() -> None:
    tested = arena()
    blocks = [tested.place(100, 128, 64) for _ in range(4)]
    assert [block.offset for block in blocks if block] == [0, 128, 256, 384]
    for block in (blocks[0], blocks[2]):
        assert block is not None
        tested.free(block)
    hole = tested.place(64, 64, 64)
    too_large_for_a_hole = tested.place(129, 192, 64)
    assert hole is not None
    assert too_large_for_a_hole is not None
    assert (hole.offset, too_large_for_a_hole.offset) == (0, 512)


def test_an_offset_is_aligned_although_the_block_before_ends_anywhere() -> None:
    tested = arena()
    tested.place(3, 3, 1)
    block = tested.place(128, 128, 128)
    assert block is not None
    assert block.offset == 128
    # What needs no alignment still goes between the two.
    between = tested.place(5, 5, 1)
    assert between is not None
    assert between.offset == 3


def test_a_block_ends_where_the_limit_is_and_not_beyond() -> None:
    tested = arena(256)
    assert tested.place(257, 257, 1) is None
    assert tested.place_at(1, 256, 256) is None
    assert tested.held_bytes == 0
    whole = tested.place_at(0, 256, 256)
    assert whole is not None
    assert tested.place(1, 1, 1) is None
    tested.limit_bytes = 257
    block = tested.place(1, 1, 1)
    assert block is not None
    assert block.offset == 256


def test_neighbours_are_not_in_the_way_and_overlaps_of_one_byte_are() -> None:
    tested = arena()
    low, high = tested.place_at(100, 100, 100), tested.place_at(300, 100, 100)
    assert tested.in_the_way(200, 100) == []
    assert tested.in_the_way(199, 101) == [low]
    assert tested.in_the_way(200, 101) == [high]
    assert tested.in_the_way(0, LIMIT) == [low, high]
    assert tested.in_the_way(150, 1) == [low]
    assert tested.place_at(199, 10, 10) is None
    assert tested.place_at(200, 100, 100) is not None


def test_memory_is_the_values_without_the_padding() -> None:
    tested = arena()
    block = tested.place(100, 128, 64)
    assert block is not None
    memory = tested.memory(block)
    assert memory.nbytes == 100
    memory[:] = 7
    assert (tested.memory(block) == 7).all()
    assert tested.held_bytes == 100


def test_the_buffer_begins_on_a_page_so_that_offsets_are_addresses() -> None:
    tested = arena()
    block = tested.place_at(512, 16, 16)
    assert block is not None
    assert (tested.memory(block).ctypes.data - 512) % 4096 == 0


def test_poison_fills_what_is_freed_and_nothing_else() -> None:
    tested = arena(poison=True)
    blocks = [tested.place(100, 128, 64) for _ in range(3)]
    for block in blocks:
        assert block is not None
        tested.memory(block)[:] = 1
    middle = blocks[1]
    assert middle is not None
    stale = tested.memory(middle)
    tested.free(middle)
    assert (stale == POISON).all()
    assert np.isnan(stale.view(np.float32)).all()
    for block in (blocks[0], blocks[2]):
        assert block is not None
        assert (tested.memory(block) == 1).all()


def test_without_poison_what_is_freed_keeps_its_bytes() -> None:
    tested = arena()
    block = tested.place(64, 64, 64)
    assert block is not None
    memory = tested.memory(block)
    memory[:] = 5
    tested.free(block)
    assert (memory == 5).all()


def test_an_empty_block_is_in_nobodys_way_and_frees_nobody_elses_room() -> None:
    tested = arena()
    empty = [tested.place(0, 0, 64) for _ in range(3)]
    block = tested.place_at(0, 64, 64)
    empty += [tested.place(0, 0, 64), tested.place_at(64, 0, 0)]
    assert block is not None
    assert tested.in_the_way(0, 64) == [block]
    for nothing in empty:
        assert nothing is not None
        assert tested.memory(nothing).nbytes == 0
        tested.free(nothing)
    assert tested.held_bytes == 64
    assert tested.in_the_way(0, 64) == [block]


def test_a_block_is_freed_once() -> None:
    tested = arena()
    first, second = tested.place(64, 64, 64), tested.place(64, 64, 64)
    assert first is not None
    assert second is not None
    tested.free(first)
    with pytest.raises(AssertionError, match="freed once"):
        tested.free(first)
    assert tested.held_bytes == 64


def test_values_outlive_the_arena_for_as_long_as_somebody_sees_them() -> None:
    tested = arena(poison=True)
    block = tested.place(64, 64, 64)
    assert block is not None
    memory = tested.memory(block)
    memory[:] = 3
    tested.drop()
    tested.free(block)
    assert (memory == 3).all()
    with pytest.raises(AssertionError, match="dropped"):
        tested.memory(block)


def test_poison_fills_what_a_block_has_moved_away_from() -> None:
    tested = arena(poison=True)
    block = tested.place_at(100, 50, 64)
    assert block is not None
    tested.memory(block)[:] = 7
    moved = tested.move(block, 80, 64)
    assert moved is not None
    assert (tested.memory(moved) == 7).all()
    assert (tested._range(144, 164) == POISON).all()
    back = tested.move(moved, 120, 64)
    assert back is not None
    assert (tested.memory(back) == 7).all()
    assert (tested._range(80, 120) == POISON).all()


def resident_bytes(memory: np.ndarray) -> int:
    """Returns how much of some memory the machine has given."""
    start = memory.ctypes.data
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            low, high = (int(part, 16) for part in fields[0].split("-"))
            found = low <= start < high
        elif found and fields[0] == "Rss:":
            return int(fields[1]) * 1024
    raise AssertionError("no such memory")


def test_memory_behind_a_lower_limit_is_given_back() -> None:
    limit = 64 << 20
    tested = arena(limit, capacity_bytes=limit)
    block = tested.place(limit, limit, 64)
    assert block is not None
    assert not tested.shrink(limit // 4), "a block is in the way"
    memory = tested.memory(block)
    memory[:] = 5
    before = resident_bytes(memory)
    tested.free(block)
    assert tested.shrink(limit // 4)
    assert before - resident_bytes(memory) >= limit // 2
    assert (memory[: limit // 4] == 5).all()
    assert tested.place(limit // 4 + 1, limit // 4 + 1, 1) is None


class Small(CpuDevice):
    """Has no address space for more than a limit."""

    def allocate(self, n_bytes: int) -> Bytes:
        if n_bytes > LIMIT:
            raise OSError("cannot allocate memory")
        return super().allocate(n_bytes)


def test_where_there_is_no_address_space_for_more_the_limit_is_all() -> None:
    tested = Arena(Small(), 5 * LIMIT, LIMIT)
    assert (tested.capacity_bytes, tested.limit_bytes) == (LIMIT, LIMIT)
    assert tested.place(LIMIT, LIMIT, 64) is not None
    with pytest.raises(OSError, match="cannot allocate"):
        Arena(Small(), 5 * LIMIT, 2 * LIMIT)
