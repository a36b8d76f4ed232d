"""Which segments are in the arena, where several threads ask for room."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from litrt.arena import Arena
from litrt.cache import Cache, Entry, State
from litrt.device import CpuDevice
from litrt.layout import align_up
from litrt.tensors import TensorInfo
from litrt.trace import Segment

N_BYTES = 128


def test_what_another_thread_has_fetched_while_room_was_made_is_not_placed_again() -> None:
    device = CpuDevice()
    arena = Arena(device, 3 * N_BYTES, 3 * N_BYTES)
    names = ["large", "wanted", "on its way"]
    sizes = [2 * N_BYTES, N_BYTES, 2 * N_BYTES]
    segments = [Segment(name, size, size, 64) for name, size in zip(names, sizes, strict=True)]
    infos = [
        TensorInfo(name, (size,), torch.uint8, size, name, size, True) for name, size in zip(names, sizes, strict=True)
    ]

    def wait(_: float | None) -> None:
        arriving.state = State.READY
        assert cache.place_planned(wanted, None)
        wanted.state = State.READING

    cache = Cache(segments, infos, device, arena, scratch_bytes=0, growable=False, wait=wait)
    large, wanted, arriving = cache.entries
    assert cache.place_planned(arriving, 0)
    arriving.state = State.READING
    assert cache.place_now([large, wanted], [large, wanted]) == [large]
    assert wanted.block is not None
    assert {id(block) for block in arena.in_the_way(0, 3 * N_BYTES)} == {id(large.block), id(wanted.block)}
    for entry in (large, wanted):
        cache.free(entry)
    assert arena.held_bytes == 0


def test_what_is_to_stay_does_not_make_room_before_it_is_there() -> None:
    device = CpuDevice()
    arena = Arena(device, 2 * N_BYTES, 2 * N_BYTES)
    sizes = {"stays": N_BYTES, "large": 2 * N_BYTES}
    segments = [Segment(name, size, size, 64) for name, size in sizes.items()]
    infos = [TensorInfo(name, (size,), torch.uint8, size, name, size, True) for name, size in sizes.items()]
    waited = []

    def wait(_: float | None) -> None:
        assert stays.block is not None
        waited.append(arena.in_the_way(stays.block.offset, N_BYTES) == [stays.block])
        stays.state = State.READY

    cache = Cache(segments, infos, device, arena, scratch_bytes=0, growable=False, wait=wait)
    cache.evict_resident = lambda _: True
    stays, large = cache.entries
    assert cache.place_resident(stays, 0)
    stays.state = State.READING
    cache.settle(stays)
    assert cache.place_now([large], [large]) == [large]
    assert waited == [True]
    assert stays.state is State.ABSENT


ROOM = 8
STEPS = st.lists(st.tuples(st.sampled_from(["use", "plan", "pin", "unpin", "settle", "unsettle"]), st.integers(0, 19)))


@given(steps=STEPS)
def test_room_is_made_at_the_cost_of_what_was_used_longest_ago_and_of_what_is_planned_last(
    steps: list[tuple[str, int]],
) -> None:
    device = CpuDevice()
    arena = Arena(device, ROOM * 64, ROOM * 64)
    segments = [Segment(str(number), 64, 64, 64) for number in range(20)]
    infos = [TensorInfo(str(number), (64,), torch.uint8, 64, str(number), 64, True) for number in range(20)]
    cache = Cache(segments, infos, device, arena, scratch_bytes=0, growable=False, wait=lambda _: None)
    used: dict[Entry, int] = {}  # of what is there: when it was used last
    for now, (step, number) in enumerate(steps):
        entry = cache.entries[number]
        if entry not in used:
            loose = [other for other in used if other.is_loose]
            free = [other for other in used if not (other.n_pins or other.resident)]
            goes = None
            if len(used) == ROOM:
                if not free:
                    continue
                goes = min(loose, key=lambda other: used[other], default=None) or max(
                    free, key=lambda other: (other.held_until, -used[other])
                )
                del used[goes]
            assert cache.place_now([entry], [entry]) == [entry]
            entry.state = State.READY
            assert goes is None or goes.state is State.ABSENT
            assert all(other.state is State.READY for other in used)
            used[entry] = now
        if step == "use":
            cache.used(entry)
        elif step == "plan":
            entry.held_until = 1 + number // 4
            cache.used(entry)
        elif step == "pin":
            entry.n_pins = 1
        elif step == "unpin":
            entry.n_pins = 0
        elif step == "settle":
            cache.settle(entry)
        elif entry.resident:
            cache.unsettle(entry)
            used[entry] = now
        if step in ("use", "plan"):
            used[entry] = now


SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=10)


@given(sizes=SIZES, data=st.data())
def test_what_stays_is_moved_to_where_it_is_to_be_and_its_bytes_with_it(sizes: list[int], data: st.DataObject) -> None:
    """From one order and alignment to another, some of them not there, some with a tensor that somebody holds."""
    numbers = range(len(sizes))
    first, second = (data.draw(st.permutations(list(numbers))) for _ in range(2))
    aligns = data.draw(st.sampled_from([(1, 64), (64, 1), (64, 64)]))
    there = data.draw(st.sets(st.sampled_from(list(numbers))))
    stays = data.draw(st.sets(st.sampled_from(list(numbers))))
    held = data.draw(st.sets(st.sampled_from(list(numbers)), max_size=1))
    device = CpuDevice()
    capacity = sum(align_up(size, 64) for size in sizes)
    segments = [Segment(str(n), size, align_up(size, aligns[1]), aligns[1]) for n, size in enumerate(sizes)]
    infos = [TensorInfo(str(n), (size,), torch.uint8, size, str(n), size, True) for n, size in enumerate(sizes)]
    arena = Arena(device, capacity, capacity, poison=True)
    cache = Cache(segments, infos, device, arena, scratch_bytes=0, growable=False, wait=lambda _: None)
    offset = 0
    holders = {}
    for number in first:
        size_bytes = align_up(sizes[number], aligns[0])
        if number in there:
            entry = cache.entries[number]
            cache.give(entry, arena.place_at(offset, sizes[number], size_bytes))
            entry.state = State.READY
            cache.tensor(entry).fill_(number)
            if number in held:
                holders[number] = cache.tensor(entry).view(-1)
        offset += size_bytes
    offsets, offset = {}, 0
    for number in second:
        if number in stays:
            offsets[cache.entries[number]] = offset
            offset += segments[number].size_bytes
    cache.keep(offsets)
    for number, entry in enumerate(cache.entries):
        if entry.resident:
            assert entry.block is not None
            assert (number in there, entry.state, entry.block.offset) == (True, State.READY, offsets[entry])
            assert entry.block.size_bytes == segments[number].size_bytes
            assert (cache.tensor(entry) == number).all()
        elif stays and number not in holders:
            assert entry.state is State.ABSENT
    for number, tensor in holders.items():
        assert (tensor == number).all(), "bytes that somebody sees are where they were"
    if (
        stays
        and not holders
        and aligns[0] == aligns[1]
        and [n for n in first if n in stays & there] == [n for n in second if n in stays & there]
    ):
        assert all(cache.entries[n].resident for n in stays & there), "in one order, all can move"
