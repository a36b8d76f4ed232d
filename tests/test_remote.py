"""Stores that answer over a network: what fails is asked for again, for a while, and what hangs is an error."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MakeStore, read_threads
from test_faults import N_LAYERS, Layers, constructor, expected, run_passes, vector
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest
from zarr.core.buffer.cpu import Buffer as CpuBuffer
from zarr.storage import MemoryStore, WrapperStore

import litrt
import litrt.checked

WIDTH = 260
"""A weight takes more than the scratch of a read, so that most of them stream."""

pytestmark = pytest.mark.usefixtures("poisoned")


class Content(dict[str, Buffer]):
    """What a store has, and what it does before it answers.

    Attributes:
        trouble: Called with each key before it is answered; raises, or returns seconds to wait.
        asked: The keys that were asked for.
    """

    def __init__(self, path: Path) -> None:
        files = [file for file in path.rglob("*") if file.is_file()]
        super().__init__({str(file.relative_to(path)): CpuBuffer.from_bytes(file.read_bytes()) for file in files})
        self.trouble: Callable[[str], float] = lambda key: 0.0
        self.asked: list[str] = []


class Network(WrapperStore[MemoryStore]):
    """A store that answers late, or not at all, where its content says so. zarr-python makes copies of it."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Returns what is there under `key`."""
        content = self._store._store_dict
        assert isinstance(content, Content)
        content.asked.append(key)
        await asyncio.sleep(content.trouble(key))
        return await super().get(key, prototype, byte_range)


@pytest.fixture
def network(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> Content:
    monkeypatch.setattr(litrt.checked, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(litrt.checked, "_RETRY_S", 0.03)
    monkeypatch.setattr("litrt.reads.LOOK_S", 0.02)
    return Content(make_store(Layers(WIDTH)))


class TransportError(Exception):
    """What the library of a network raises."""


def open_layers(network: Content, read_timeout_s: float = 8.0) -> litrt.Runtime:
    store = litrt.open_store(Network(MemoryStore(network)))
    return litrt.Runtime(constructor(WIDTH), store, budget="min", n_threads=1, read_timeout_s=read_timeout_s)


@pytest.mark.parametrize("error", [TimeoutError, ConnectionResetError, TransportError, OSError])
def test_what_fails_is_asked_for_again(error: type[Exception], network: Content) -> None:
    with open_layers(network) as rt:
        rt.warmup(vector(WIDTH))
        failures = {f"weights.{number}/c/0/0": 2 for number in range(N_LAYERS)}

        def trouble(key: str) -> float:
            if failures.get(key, 0):
                failures[key] -= 1
                raise error("no answer")
            return 0.0

        network.trouble = trouble
        for _ in range(2):  # the first one may have begun to be read before that
            assert torch.equal(rt(vector(WIDTH)), expected(WIDTH))
        assert not any(failures.values())


def test_requests_are_made_again_for_some_seconds_and_the_pauses_grow(
    network: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(seconds)

    with open_layers(network) as rt:
        rt.warmup(vector(WIDTH))
        monkeypatch.setattr(litrt.checked, "_RETRY_S", 0.5)
        monkeypatch.setattr(litrt.checked, "_FIRST_PAUSE_S", 0.02)
        monkeypatch.setattr(litrt.checked.asyncio, "sleep", noted)
        broken = "weights.3/c/0/0"

        def trouble(key: str) -> float:
            if key == broken:
                raise TransportError("no answer")
            return 0.0

        network.trouble = trouble
        network.asked.clear()
        began_s = time.monotonic()
        with pytest.raises(litrt.CorruptWeightError, match=r"weight 'weights\.3': .*no answer.* the network") as caught:
            run_passes(rt, vector(WIDTH), 2)
        assert caught.value.name == "weights.3"
        assert time.monotonic() - began_s < 8
        n_asked = network.asked.count(broken)
        assert 3 <= n_asked <= 12  # 20, 40, ... 320 ms, and a little less; one read or two of them
        mine = [pause for pause in pauses if pause > 0]
        assert max(mine) > 4 * min(mine)
        network.trouble = lambda key: 0.0
        for _ in range(2):
            assert torch.equal(rt(vector(WIDTH)), expected(WIDTH))


@pytest.mark.parametrize("error", [PermissionError, ValueError])
def test_what_would_not_change_is_asked_for_once(error: type[Exception], network: Content) -> None:
    with open_layers(network) as rt:
        rt.warmup(vector(WIDTH))

        def trouble(key: str) -> float:
            if key == "weights.3/c/0/0":
                raise error("not yours")
            return 0.0

        network.trouble = trouble
        network.asked.clear()
        with pytest.raises(litrt.CorruptWeightError, match=r"weight 'weights\.3': .*not yours"):
            run_passes(rt, vector(WIDTH), 1)
        assert network.asked.count("weights.3/c/0/0") == 1


def test_what_hangs_is_an_error_and_close_gives_it_up(network: Content) -> None:
    others = read_threads()
    rt = open_layers(network, read_timeout_s=0.15)
    rt.warmup(vector(WIDTH))
    network.trouble = lambda key: 3600.0 if "weights.3" in key else 0.0
    began_s = time.monotonic()
    for _ in range(2):
        with pytest.raises(litrt.StalledReadError, match=r"weight 'weights\.3'") as caught:
            run_passes(rt, vector(WIDTH), 2)
        assert caught.value.file == "weights.3"
    rt.close()
    for thread in read_threads() - others:
        thread.join(5)
        assert not thread.is_alive()
    assert time.monotonic() - began_s < 8


def test_a_request_that_was_lost_is_made_again(network: Content) -> None:
    lost = "weights.3/c/0/0"
    with open_layers(network, read_timeout_s=0.15) as rt:
        rt.warmup(vector(WIDTH))
        network.trouble = lambda key: 3600.0 if key == lost else 0.0
        with pytest.raises(litrt.StalledReadError, match=r"weight 'weights\.3'"):
            run_passes(rt, vector(WIDTH), 2)
        network.trouble = lambda key: 0.0
        for _ in range(2):
            assert torch.equal(rt(vector(WIDTH)), expected(WIDTH))


def test_a_store_that_answers_late_is_served(network: Content) -> None:
    with open_layers(network, read_timeout_s=0.3) as rt:
        network.trouble = lambda key: 0.1
        rt.warmup(vector(WIDTH))
        for _ in range(2):
            assert torch.equal(rt(vector(WIDTH)), expected(WIDTH))


def test_a_hundred_requests_that_fail(network: Content) -> None:
    chosen = random.Random(0)
    result = expected(WIDTH)
    with open_layers(network) as rt:
        rt.warmup(vector(WIDTH))
        for _ in range(100):
            name = f"weights.{chosen.randrange(N_LAYERS)}"
            n_left = chosen.choice([1, 2, 1000])

            def trouble(key: str, name: str = name) -> float:
                nonlocal n_left
                if key == f"{name}/c/0/0" and n_left:
                    n_left -= 1
                    raise TimeoutError("no answer")
                return 0.0

            network.trouble = trouble
            if n_left < 10:
                assert torch.equal(rt(vector(WIDTH)), result)
            else:
                with pytest.raises(litrt.CorruptWeightError, match=f"weight '{name}'"):
                    run_passes(rt, vector(WIDTH), 2)
            network.trouble = lambda key: 0.0
            assert torch.equal(rt(vector(WIDTH)), result)


def test_a_local_store_is_not_asked_again(make_store: MakeStore, tmp_path: Path) -> None:
    path = make_store(Layers(WIDTH))
    store = litrt.checked.CheckedStore(litrt.checked.LocalStore(path))
    assert not store._is_remote
