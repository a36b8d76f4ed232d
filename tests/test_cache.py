"""Which segments are in the arena, where several threads ask for room."""

from __future__ import annotations

import torch

from litrt.arena import Arena
from litrt.cache import Cache, State
from litrt.device import CpuDevice
from litrt.store import TensorInfo
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

    def wait() -> None:
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
