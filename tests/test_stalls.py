"""A disk that hangs is an error in bounded time, and no more than that: what it answers in the end is used."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MakeStore, read_threads
from test_faults import N_LAYERS, Layers, chunk_file, constructor, expected, run_passes, streamed_name, vector

import litrt
import litrt.patience
from litrt.bindings import Binding
from litrt.patience import LOOK_S, READ_TIMEOUT_S, Patience
from litrt.pipeline import Pipeline
from litrt.testing import FakeDevice
from litrt.turns import Turns

pytestmark = pytest.mark.usefixtures("poisoned")

LIMIT_S = 20.0
TIMEOUT_S = 0.15


class Disk:
    """Lets reads of weights hang until these are freed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._changed = threading.Condition()
        self._stuck: set[str] = set()
        self.n_hanging = 0
        preadv = os.preadv

        def hanging(fd: int, buffers: Any, offset: int, *flags: int) -> int:
            with self._changed:
                name = os.readlink(f"/proc/self/fd/{fd}").rpartition("/c/")[0].rpartition("/")[2]
                if name in self._stuck:
                    self.n_hanging += 1
                    self._changed.notify_all()
                    is_free = self._changed.wait_for(lambda: name not in self._stuck, LIMIT_S)
                    self.n_hanging -= 1
                    self._changed.notify_all()
                    assert is_free, "the disk was left hanging"
            return preadv(fd, buffers, offset, *flags)

        monkeypatch.setattr(os, "preadv", hanging)

    def hang(self, name: str) -> None:
        with self._changed:
            self._stuck.add(name)

    def wait(self, n_hanging: int) -> None:
        """Waits until so many reads hang."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.n_hanging == n_hanging, LIMIT_S)

    def free(self, *names: str) -> None:
        """Lets all go on, or those of some weights."""
        with self._changed:
            self._stuck = self._stuck - {*names} if names else set()
            self._changed.notify_all()
            if not self._stuck:
                assert self._changed.wait_for(lambda: not self.n_hanging, LIMIT_S)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    monkeypatch.setattr("litrt.reads.LOOK_S", 0.02)
    made = Disk(monkeypatch)
    yield made
    made.free()


def fails(rt: litrt.Runtime, width: int, name: str) -> None:
    began_s = time.monotonic()
    with pytest.raises(
        litrt.StalledReadError, match=rf"weight '{name}': a read of .*/{name}/.* read_timeout_s"
    ) as caught:
        run_passes(rt, vector(width), 2)  # it may be there still
    assert caught.value.name == name
    assert f"/{name}/" in caught.value.file
    assert isinstance(caught.value, TimeoutError)
    assert time.monotonic() - began_s < LIMIT_S / 2, "bounded"


@pytest.mark.parametrize("device", ["cpu", "fake"])
@pytest.mark.parametrize(("width", "chunk_bytes"), [(32, 32 << 20), (32, 512), (260, 32 << 20)])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_read_that_hangs_is_an_error_and_is_used_when_it_has_ended(
    device: str,
    width: int,
    chunk_bytes: int,
    n_threads: int,
    disk: Disk,
    make_store: MakeStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Buffered, in one piece and in several; direct.
    monkeypatch.setattr("litrt.arrays.TARGET_CHUNK_BYTES", chunk_bytes)
    path = make_store(Layers(width))
    options: dict[str, Any] = {"budget": "60%", "n_threads": n_threads, "read_timeout_s": TIMEOUT_S}
    if device == "fake":
        options |= {"budget": "min", "device": FakeDevice(), "host_budget": 0}
    with litrt.Runtime(constructor(width), path, **options) as rt:
        rt.warmup(vector(width))
        assert torch.equal(rt(vector(width)), expected(width))
        plan = rt.host_plan or rt.plan  # what is read from the disk
        name = plan.segments[next(load for load in plan.loads if load.first >= 1).segment].name
        for _ in range(2):
            disk.hang(name)
            for _ in range(2):
                fails(rt, width, name)
            disk.free()
            for _ in range(2):
                assert torch.equal(rt(vector(width)), expected(width))
        before = rt.stats()
        rt(vector(width))
        assert rt.stats().since(before).n_faults == 0, "the plan is followed again"


def change_budgets(rt: litrt.Runtime, *budgets: str) -> None:
    for budget in budgets:
        rt.set_budget(budget)
        rt(vector(32))


@pytest.mark.parametrize("budget", ["min", "60%", "100%"])
def test_a_warmup_and_a_change_of_the_budget_are_bounded_as_well(
    budget: str, disk: Disk, make_store: MakeStore
) -> None:
    with litrt.Runtime(Layers, make_store(Layers()), budget=budget, read_timeout_s=TIMEOUT_S) as rt:
        disk.hang("weights.3")
        for _ in range(2):
            with pytest.raises(litrt.StalledReadError, match=r"weight 'weights\.3'"):
                rt.warmup(vector(32))
        disk.free()
        rt.warmup(vector(32))
        assert torch.equal(rt(vector(32)), expected(32))
        smaller, larger = ("min", "60%") if budget != "60%" else ("min", "100%")
        rt.set_budget(smaller)
        rt(vector(32))
        disk.hang("weights.3")
        with pytest.raises(litrt.StalledReadError, match=r"weight 'weights\.3'"):
            change_budgets(rt, larger, smaller, larger)
        disk.free()
        for wanted in (smaller, larger):
            rt.set_budget(wanted)
            assert torch.equal(rt(vector(32)), expected(32))


@pytest.mark.parametrize("what", ["set_budget", "warmup"])
def test_after_a_change_that_a_hanging_disk_has_broken_off_there_is_a_plan_again(
    what: str, disk: Disk, make_store: MakeStore
) -> None:
    with litrt.Runtime(Layers, make_store(Layers()), budget="50%", read_timeout_s=TIMEOUT_S) as rt:
        for _ in range(5):
            rt(vector(32))
        disk.hang(streamed_name(rt, 1))
        with pytest.raises(litrt.StalledReadError):
            run_passes(rt, vector(32), 2)
        with pytest.raises(litrt.StalledReadError):
            rt.set_budget("60%") if what == "set_budget" else rt.warmup(vector(32))
        disk.free()
        for _ in range(3):
            assert torch.equal(rt(vector(32)), expected(32))
        before = rt.stats()
        assert torch.equal(rt(vector(32)), expected(32))
        assert rt.stats().since(before).n_faults == 0


def test_close_does_not_wait_for_what_hangs_and_its_thread_ends_with_it(disk: Disk, make_store: MakeStore) -> None:
    others = read_threads()
    rt = litrt.Runtime(Layers, make_store(Layers()), budget="60%", n_threads=2, read_timeout_s=TIMEOUT_S)
    rt.warmup(vector(32))
    name = streamed_name(rt, 1)
    disk.hang(name)
    fails(rt, 32, name)
    mine = read_threads() - others
    assert len(mine) == 2
    rt.close()
    assert len(read_threads() - others) == 1, "the other one has ended"
    with pytest.raises(litrt.ClosedError):
        rt(vector(32))
    disk.free()
    for thread in mine:
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def test_a_thread_that_needs_something_else_goes_on(disk: Disk, make_store: MakeStore) -> None:
    with litrt.Runtime(Layers, make_store(Layers()), budget="60%", n_threads=2, read_timeout_s=TIMEOUT_S) as rt:
        rt.module.order = [0, 1]
        rt.warmup(vector(32))
        disk.hang("weights.5")
        with pytest.raises(litrt.StalledReadError, match=r"weights\.5"):
            rt.module.weights[5].sum()
        for _ in range(3):
            assert torch.equal(rt(vector(32)), expected(32, [0, 1]))
        disk.free()
        assert torch.equal(rt.module.weights[5] + 0, Layers().weights[5])


def test_a_hundred_reads_that_hang(disk: Disk, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = random.Random(0)
    with litrt.Runtime(Layers, make_store(Layers()), budget="50%", n_threads=2, read_timeout_s=0.1) as rt:
        rt.warmup(vector(32))
        streamed = sorted({rt.plan.segments[load.segment].name for load in rt.plan.loads})
        assert len(streamed) >= 3
        result = expected(32)
        for _ in range(100):
            name = chosen.choice(streamed)
            disk.hang(name)
            fails(rt, 32, name)
            disk.free()
            assert torch.equal(rt(vector(32)), result)


def test_a_store_that_cannot_be_measured_opens(
    disk: Disk, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litrt.tune.READ_TIMEOUT_S", 0.1)
    monkeypatch.setattr("litrt.tune._LEAST_BYTES", 0)
    monkeypatch.setattr("litrt.tune._PIECE_BYTES", 0)
    path = make_store(Layers(260))
    disk.hang("weights.2")
    with litrt.Runtime(constructor(260), path, budget="90%", read_timeout_s=TIMEOUT_S) as rt:
        assert disk.n_hanging
        with pytest.raises(litrt.StalledReadError):
            rt.warmup(vector(260))
        disk.free()
        rt.warmup(vector(260))
        assert torch.equal(rt(vector(260)), expected(260))
    for thread in threading.enumerate():
        if thread.name.startswith("litrt-tune"):
            thread.join(LIMIT_S)
            assert not thread.is_alive()


def test_how_long_a_read_may_take_is_what_others_took() -> None:
    patience = Patience(8.0)
    assert patience.limit_s(0) == 8.0
    assert patience.limit_s(64_000_000) == 24.0, "nothing is known of the store"
    patience.ended(30.0, 64_000_000)  # that was no read, but a disk that hung
    assert patience.limit_s(64_000_000) == 24.0
    patience.ended(0.1, 64_000_000)
    assert patience.limit_s(64_000_000) == 8.0
    patience.ended(5.0, 64_000_000)
    assert patience.limit_s(64_000_000) == 20.0
    for _ in range(16):
        patience.ended(0.1, 64_000_000)
    assert patience.limit_s(64_000_000) == 8.0
    assert READ_TIMEOUT_S + LOOK_S < 10.0


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_a_timeout_that_makes_no_sense_is_refused(value: float, make_store: MakeStore) -> None:
    with pytest.raises(ValueError, match="read_timeout_s must be a positive number of seconds or None"):
        litrt.Runtime(Layers, make_store(Layers()), read_timeout_s=value)


def test_a_file_that_is_waited_for_without_end(disk: Disk, make_store: MakeStore) -> None:
    path = make_store(Layers())
    with litrt.Runtime(Layers, path, budget="60%", read_timeout_s=None) as rt:
        rt.warmup(vector(32))
        name = streamed_name(rt, 1)
        assert chunk_file(path, name).is_file()
        disk.hang(name)
        timer = threading.Timer(0.5, disk.free)
        timer.start()
        for _ in range(2):
            assert torch.equal(rt(vector(32)), expected(32))
        timer.join()


def test_host_memory_is_taken_once_however_often_plans_change_while_the_disk_hangs(
    disk: Disk, make_store: MakeStore
) -> None:
    path = make_store(Layers())
    device = FakeDevice()
    with litrt.Runtime(
        Layers, path, budget="min", device=device, host_budget=0, n_threads=2, read_timeout_s=TIMEOUT_S
    ) as rt:
        run_passes(rt, vector(32), 2)
        assert rt.host_plan is not None
        others = read_threads()
        disk.hang(rt.host_plan.segments[rt.host_plan.loads[1].segment].name)
        with pytest.raises(litrt.StalledReadError):
            run_passes(rt, vector(32), 2)
        for budget in ("50%", "min", "60%", "min"):
            with contextlib.suppress(litrt.StalledReadError):
                rt.set_budget(budget)
            assert len(read_threads()) <= len(others), "those before have ended, and their memory is given back"
        disk.free()
        for _ in range(3):
            assert torch.equal(rt(vector(32)), expected(32))


@pytest.mark.parametrize("number", range(5))
def test_who_uses_a_weight_while_all_is_undone_has_the_weight_or_an_error(
    number: int, disk: Disk, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass is interrupted in one thread, and undone once a read has ended that another one waits for."""
    unpin = Turns.unpin
    n_interrupts = 0

    def interrupted(turns: Turns, entries: Any) -> None:
        nonlocal n_interrupts
        if entries and threading.current_thread().name == "interrupted" and not n_interrupts:
            n_interrupts += 1
            raise KeyboardInterrupt
        unpin(turns, entries)

    monkeypatch.setattr(Turns, "unpin", interrupted)
    plain = Layers()
    with litrt.Runtime(Layers, make_store(plain), budget="60%", policy="lru", n_threads=4) as rt:
        run_passes(rt, vector(32), 2)
        rt._pipeline.let_go()
        first, second = [n for n in range(N_LAYERS) if rt._pipeline.memory(n) is None][-2:]
        errors: list[BaseException] = []
        values: list[tuple[int, torch.Tensor]] = []

        def use(at: int) -> None:
            try:
                values.append((at, rt.module.weights[at].clone()))
            except litrt.LitrtError as error:
                errors.append(error)

        def run() -> None:
            with pytest.raises(KeyboardInterrupt):
                rt(vector(32))

        disk.hang(f"weights.{first}")
        disk.hang(f"weights.{second}")
        threads = [threading.Thread(target=use, args=(first,)), threading.Thread(target=run, name="interrupted")]
        threads[0].start()
        disk.wait(1)
        threads[1].start()
        while not rt._pipeline._is_undone:
            time.sleep(0.001)
        threads.append(threading.Thread(target=use, args=(second,)))
        threads[2].start()
        disk.wait(2)
        disk.free(f"weights.{first}")
        time.sleep(0.01 * number)
        disk.free()
        for thread in threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        assert len(values) + len(errors) == 2
        assert all("was given up" in str(error) for error in errors)
        for at, value in values:
            assert torch.equal(value, plain.weights[at])
        assert rt._pipeline.cache.is_sound()
        assert torch.equal(rt(vector(32)), expected(32))


def test_what_two_threads_have_written_to_is_read_again_by_one_after_the_other(
    disk: Disk, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)
    restore = Pipeline.restore

    def restore_at_once(pipeline: Pipeline, binding: Binding) -> None:
        both.wait(LIMIT_S)
        disk.hang("weights.0")
        restore(pipeline, binding)

    monkeypatch.setattr(Pipeline, "restore", restore_at_once)
    plain = Layers()
    with litrt.Runtime(Layers, make_store(plain), budget=plain.weights[0].nbytes, n_threads=4) as rt:
        rt.module.weights[0].clone()

        def write() -> None:
            with pytest.raises(litrt.WeightWriteError):
                F.embedding_bag(torch.tensor([[1, 2, 3]]), rt.module.weights[0], max_norm=0.01)

        threads = [threading.Thread(target=write) for _ in range(2)]
        for thread in threads:
            thread.start()
        disk.wait(1)
        time.sleep(0.1)
        assert disk.n_hanging == 1
        disk.free()
        for thread in threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        for number in (1, 0, 2):
            assert torch.equal(rt.module.weights[number].clone(), plain.weights[number])
