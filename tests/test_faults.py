"""What goes wrong is said once, where it matters, and the runtime goes on once it has been put right."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeStore, read_threads
from test_overlap import LIMIT_S, Chain, Gate, _settle, gate, open_chain, sample, slow_machine
from torch import nn

import litrt
from litrt.device import Bytes
from litrt.reader import Piece, Reader
from litrt.testing import FakeDevice

__all__ = ["gate", "slow_machine"]  # fixtures

pytestmark = pytest.mark.usefixtures("poisoned")

N_LAYERS = 6


class Layers(nn.Module):
    """Layers in an order that can be changed, of weights that are read through the page cache or past it.

    Attributes:
        before: Called with the number of the next layer.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(width, width, generator=generator) / 8 for _ in range(N_LAYERS))
        self.order = list(range(N_LAYERS))
        self.before: Callable[[int], None] = lambda number: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in self.order:
            self.before(number)
            x = torch.tanh(x @ self.weights[number])
        return x


WIDTHS = [32, 260]  # buffered, direct


def constructor(width: int) -> Callable[[], nn.Module]:
    return lambda: Layers(width)


def vector(width: int) -> torch.Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(1))


def expected(width: int, order: list[int] | None = None) -> torch.Tensor:
    plain = Layers(width)
    plain.order = order or plain.order
    with torch.no_grad():
        result: torch.Tensor = plain(vector(width))
    return result


def run_passes(rt: litrt.Runtime, x: torch.Tensor, n: int) -> None:
    for _ in range(n):
        rt(x)


def chunk_file(path: Path, name: str, *, last: bool = False) -> Path:
    """Returns the file of the only chunk of a weight, or of its last one."""
    found = sorted(file for file in (path / name / "c").rglob("*") if file.is_file())
    assert last or len(found) == 1
    return found[-1]


def streamed_name(rt: litrt.Runtime, position: int) -> str:
    """Returns the name of a weight that the plan loads ahead of its use."""
    loads = [load for load in rt.plan.loads if load.first >= position]
    return rt.plan.segments[loads[0].segment].name


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


FAULTS = {
    "is missing": remove,
    "has \\d+ bytes in place of \\d+": truncate,
    "is damaged: its checksum is": damage,
    "has 0 bytes": empty,
}


@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_weight_that_breaks_while_it_streams_is_reported_once_and_is_served_again_when_it_is_restored(
    what: str, width: int, make_store: MakeStore
) -> None:
    path = make_store(Layers(width))
    with litrt.Runtime(constructor(width), path, budget="60%") as rt:
        rt.warmup(vector(width))
        assert torch.equal(rt(vector(width)), expected(width))
        name = streamed_name(rt, 1)
        file = chunk_file(path, name)
        whole = file.read_bytes()
        for _ in range(2):
            # A pass may still find it there; no more than two can.
            FAULTS[what](file)
            with pytest.raises(litrt.CorruptWeightError, match=f"weight '{name}': .*{what}.*litrt convert") as caught:
                run_passes(rt, vector(width), 2)
            assert caught.value.name == name
            assert caught.value.file == str(file)
            file.write_bytes(whole)
            for _ in range(2):
                assert torch.equal(rt(vector(width)), expected(width))


def test_a_fault_that_nobody_has_met_is_not_remembered(make_store: MakeStore) -> None:
    path = make_store(Layers())
    with litrt.Runtime(Layers, path, budget="60%") as rt:
        run_passes(rt, vector(32), 3)
        name = streamed_name(rt, 1)
        number = int(name.removeprefix("weights."))
        without = [other for other in range(N_LAYERS) if other != number]
        file = chunk_file(path, name)
        whole = file.read_bytes()
        file.unlink()
        rt.module.order = without
        for _ in range(3):
            assert torch.equal(rt(vector(32)), expected(32, without))
        file.write_bytes(whole)
        assert torch.equal(rt.module.weights[number].clone(), dict(Layers().named_parameters())[name])
        rt.module.order = list(range(N_LAYERS))
        for _ in range(2):
            assert torch.equal(rt(vector(32)), expected(32))


def test_a_store_that_is_back_is_served_at_once(make_store: MakeStore) -> None:
    path = make_store(Layers())
    with litrt.Runtime(Layers, path, budget="min") as rt:
        run_passes(rt, vector(32), 3)
        away = path.rename(path.with_name("away"))
        for _ in range(4):
            with pytest.raises(litrt.CorruptWeightError, match="is missing"):
                run_passes(rt, vector(32), 2)
        away.rename(path)
        for _ in range(3):
            assert torch.equal(rt(vector(32)), expected(32))


@pytest.mark.parametrize("budget", ["min", "60%"])
def test_where_no_memory_is_left_for_a_tensor_the_next_pass_is_right(
    budget: str, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with litrt.Runtime(Layers, make_store(Layers()), budget=budget) as rt:
        run_passes(rt, vector(32), 2)
        frombuffer = torch.frombuffer

        def failing(*_: object, **__: object) -> torch.Tensor:
            monkeypatch.setattr(torch, "frombuffer", frombuffer)
            raise MemoryError("no memory is left")

        monkeypatch.setattr(torch, "frombuffer", failing)
        with pytest.raises(MemoryError):
            run_passes(rt, vector(32), 2)
        results: list[torch.Tensor] = []

        def another() -> None:
            results.append(rt(vector(32)))
            rt.set_budget("80%")
            results.append(rt(vector(32)))

        thread = threading.Thread(target=another, daemon=True)
        thread.start()
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "it hangs"
        assert len(results) == 2
        assert all(torch.equal(result, expected(32)) for result in results)


def test_every_byte_is_checked_again_on_every_read(make_store: MakeStore) -> None:
    path = make_store(Layers())
    with litrt.Runtime(Layers, path, budget="min", policy="lru") as rt:
        for name in ("weights.1", "weights.4"):
            assert torch.equal(rt(vector(32)), expected(32))
            file = chunk_file(path, name)
            whole = file.read_bytes()
            damage(file)
            with pytest.raises(litrt.CorruptWeightError, match=rf"'{name}'.*damaged"):
                rt(vector(32))
            file.write_bytes(whole)
        assert torch.equal(rt(vector(32)), expected(32))


def test_a_read_error_in_a_prefetch_thread_surfaces_in_the_operator_that_needs_the_weight(
    make_store: MakeStore, gate: Gate, slow_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(Chain())
    with open_chain(path) as rt, torch.no_grad():
        plain = Chain()(sample())
        rt(sample())
        _settle(gate, rt)
        plan = rt.plan
        ahead = next(load for load in plan.loads if 0 < load.after < load.first)
        name = plan.segments[ahead.segment].name
        number = int(name.removeprefix("weights."))
        preadv, threads, begun = os.preadv, [], []

        def failing(fd: int, buffers: Any, offset: int, *flags: int) -> int:
            if f"/{name}/" in os.readlink(f"/proc/self/fd/{fd}"):
                threads.append(threading.current_thread().name)
                raise OSError(errno.EIO, "Input/output error")
            return preadv(fd, buffers, offset, *flags)

        monkeypatch.setattr(os, "preadv", failing)
        rt.module.before = begun.append
        with pytest.raises(litrt.CorruptWeightError, match=rf"'{name}'.*cannot be read .*Errno 5") as caught:
            rt(sample())
        assert caught.value.name == name
        assert f"/{name}/" in caught.value.file
        assert begun == [*range(number + 1)], "those before it ran, and none after it"
        assert len(threads) == 1
        assert threads[0].startswith("litrt-read")
        monkeypatch.setattr(os, "preadv", preadv)
        for _ in range(3):
            assert torch.equal(rt(sample()), plain)


def test_any_error_of_a_read_reaches_the_caller_as_it_is(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(Layers())
    broken = ""
    read_part = Reader.read_part

    def failing(reader: Reader, piece: Piece, part: Bytes) -> None:
        if piece.name == broken:
            raise MemoryError("no memory to read with")
        read_part(reader, piece, part)

    monkeypatch.setattr(Reader, "read_part", failing)
    with litrt.Runtime(Layers, path, budget="50%") as rt:
        rt.warmup(vector(32))
        rt(vector(32))
        broken = streamed_name(rt, 0)
        with pytest.raises(MemoryError, match="no memory to read with"):
            run_passes(rt, vector(32), 2)
        broken = ""
        assert torch.equal(rt(vector(32)), expected(32))


class Reads:
    """Reads of one weight, which are counted, and fail or wait where a test says so.

    Attributes:
        name: The weight; of none, if it is empty.
        begun: Set once a read of it waits.
        go_on: Lets the reads go on that wait.
        n: Reads of it so far.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name = ""
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.n = 0
        self._lock = threading.Lock()
        self._read_part = Reader.read_part
        monkeypatch.setattr(Reader, "read_part", lambda *args: self._read(*args))

    def _read(self, reader: Reader, piece: Piece, part: Bytes) -> None:
        if piece.name == self.name:
            with self._lock:
                self.n += 1
                number = self.n
            self.read(number)
        self._read_part(reader, piece, part)

    def read(self, number: int) -> None:
        """Called before each of them, with its number from 1 on: does nothing."""

    def wait(self) -> None:
        """Waits until it is to go on."""
        self.begun.set()
        assert self.go_on.wait(LIMIT_S)

    def fail(self) -> None:
        """Fails."""
        raise litrt.CorruptWeightError("it fails", name=self.name, file="")


class FailsAtFirst(Reads):
    """One piece of it fails, and another one takes longer."""

    def read(self, number: int) -> None:
        if number == 1:
            assert self.begun.wait(LIMIT_S)
            self.fail()
        if number == 2:
            self.wait()


@pytest.mark.parametrize("policy", ["belady", "lru"])
def test_a_weight_of_which_a_piece_has_failed_is_not_served_when_the_others_are_there(
    policy: Any, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litrt.arrays.TARGET_CHUNK_BYTES", 512)
    monkeypatch.setattr("litrt.reads.LOOK_S", 0.02)
    path = make_store(Layers())
    reads = FailsAtFirst(monkeypatch)
    with litrt.Runtime(Layers, path, budget="70%", policy=policy, n_threads=2) as rt:
        run_passes(rt, vector(32), 3)
        reads.name = streamed_name(rt, 1) if policy == "belady" else "weights.3"
        # Whoever waits for it looks around meanwhile.
        timer = threading.Timer(0.2, reads.go_on.set)
        timer.start()
        fails: AbstractContextManager[object] = pytest.raises(litrt.CorruptWeightError, match="it fails")
        if policy == "belady":
            fails = contextlib.suppress(litrt.CorruptWeightError)  # a pass that begins after it reads it again
        with fails:
            run_passes(rt, vector(32), 2)
        timer.join()
        assert reads.n >= 2
        for _ in range(3):
            assert torch.equal(rt(vector(32)), expected(32))


def test_a_weight_that_cannot_be_read_is_not_read_for_every_copy_of_it(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litrt.arrays.TARGET_CHUNK_BYTES", 1024)
    monkeypatch.setattr("litrt.link.COPY_BYTES", 256)
    path = make_store(Layers())
    with litrt.Runtime(Layers, path, budget="min", device=FakeDevice(), host_budget=0) as rt:
        run_passes(rt, vector(32), 3)
        assert rt.host_plan is not None
        name = rt.host_plan.segments[rt.host_plan.loads[2].segment].name
        file = chunk_file(path, name, last=True)
        whole = file.read_bytes()
        damage(file)
        reads = Reads(monkeypatch)
        reads.name = name
        with pytest.raises(litrt.CorruptWeightError, match=f"weight '{name}'.*damaged"):
            run_passes(rt, vector(32), 2)
        assert reads.n <= 3 * 4  # it has 4 chunks and 16 copies, and may be read ahead for the next pass
        file.write_bytes(whole)
        for _ in range(2):
            assert torch.equal(rt(vector(32)), expected(32))


class FailsLate(Reads):
    """The first read of it fails when it is to go on."""

    def read(self, number: int) -> None:
        if number == 1:
            self.wait()
            self.fail()


@pytest.mark.parametrize("is_pass", [True, False])
@pytest.mark.parametrize("policy", ["belady", "lru"])
def test_a_read_that_is_under_way_when_a_use_begins_may_have_met_a_fault_that_is_gone(
    policy: Any, is_pass: bool, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litrt.reads.LOOK_S", 0.02)
    path = make_store(Layers())
    reads = FailsLate(monkeypatch)
    with litrt.Runtime(Layers, path, budget="60%", policy=policy, n_threads=1, read_timeout_s=0.15) as rt:
        run_passes(rt, vector(32), 3)
        reads.name = streamed_name(rt, 1) if policy == "belady" else "weights.3"
        with pytest.raises(litrt.StalledReadError, match=reads.name):
            run_passes(rt, vector(32), 2)
        if is_pass:
            rt.module.before = lambda _: reads.go_on.set()
        else:
            timer = threading.Timer(0.05, reads.go_on.set)
            timer.start()
            assert torch.equal(rt.module.get_parameter(reads.name).clone(), Layers().get_parameter(reads.name))
            timer.join()
        for _ in range(2):
            assert torch.equal(rt(vector(32)), expected(32))
        assert reads.n >= 2


@pytest.mark.parametrize("budget", ["min", "60%", "100%"])
def test_a_damaged_weight_fails_the_warmup_and_a_repaired_one_does_not(budget: str, make_store: MakeStore) -> None:
    path = make_store(Layers())
    file = chunk_file(path, "weights.3")
    whole = file.read_bytes()
    damage(file)
    with litrt.Runtime(Layers, path, budget=budget) as rt:
        for _ in range(2):
            with pytest.raises(litrt.CorruptWeightError, match=r"'weights\.3'.*damaged"):
                rt.warmup(vector(32))
            with pytest.raises(litrt.LitrtError, match="no plan yet"):
                _ = rt.plan
        file.write_bytes(whole)
        rt.warmup(vector(32))
        for _ in range(2):
            assert torch.equal(rt(vector(32)), expected(32))


def test_a_weight_that_should_stay_and_cannot_be_read_is_reported_and_tried_again(make_store: MakeStore) -> None:
    path = make_store(Layers())
    file = chunk_file(path, "weights.5")
    whole = file.read_bytes()
    with litrt.Runtime(Layers, path, budget="100%") as rt:
        rt.module.order = [0, 1, 2]  # the plan keeps the others as well, which only then are read
        damage(file)
        with pytest.raises(litrt.CorruptWeightError, match=r"'weights\.5'.*damaged"):
            rt.warmup(vector(32))
        file.write_bytes(whole)
        rt.module.order = [*range(N_LAYERS)]
        rt.warmup(vector(32))
        before = rt.stats()
        assert torch.equal(rt(vector(32)), expected(32))
        assert rt.stats().since(before).read_bytes == 0


# The model itself fails.


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("budget", ["min", "60%", "100%"])
@pytest.mark.parametrize("number", [0, 3, N_LAYERS - 1])
def test_a_pass_after_one_that_was_broken_off_is_right(
    number: int, budget: str, error: type[BaseException], make_store: MakeStore
) -> None:
    with litrt.Runtime(Layers, make_store(Layers()), budget=budget) as rt:
        rt.warmup(vector(32))

        def before(at: int) -> None:
            if at == number:
                raise error

        for _ in range(2):
            rt.module.before = before
            with pytest.raises(error):
                rt(vector(32))
            rt.module.before = lambda at: None
            for _ in range(2):
                assert torch.equal(rt(vector(32)), expected(32))
        planned = rt.stats()
        rt(vector(32))
        counts = rt.stats().since(planned)
        assert counts.n_faults == 0
        assert counts.read_bytes == rt.plan.streamed_bytes
        assert counts.n_passes == 1


def test_an_operator_that_fails_lets_go_of_its_weights(make_store: MakeStore) -> None:
    with litrt.Runtime(Layers, make_store(Layers()), budget="min") as rt:
        for number in range(N_LAYERS):
            with pytest.raises(RuntimeError, match="shape"):
                _ = torch.ones(3, 5) @ rt.module.weights[number]
        # They would be in each other's way.
        assert torch.equal(rt(vector(32)), expected(32))
        assert rt.stats().budget_bytes == Layers().weights[0].nbytes


def test_a_warmup_that_was_broken_off_can_be_repeated(make_store: MakeStore) -> None:
    with litrt.Runtime(Layers, make_store(Layers()), budget="60%") as rt:

        def before(at: int) -> None:
            if at == 3:
                raise KeyboardInterrupt

        rt.module.before = before
        with pytest.raises(KeyboardInterrupt):
            rt.warmup(vector(32))
        rt.module.before = lambda at: None
        rt.warmup(vector(32))
        assert rt.stats().n_passes == 0
        assert torch.equal(rt(vector(32)), expected(32))
        assert rt.stats().n_passes == 1


# Passes that stray from the plan.


def test_strict_names_the_step_and_the_weights(make_store: MakeStore) -> None:
    with litrt.Runtime(Layers, make_store(Layers()), budget="min", strict=True) as rt:
        rt.warmup(vector(32))
        assert len(rt.plan.steps) == N_LAYERS, "all weights stream"
        for _ in range(2):
            assert torch.equal(rt(vector(32)), expected(32))
            rt.module.order = [0, 1, 4, 3, 2, 5]
            with pytest.raises(
                litrt.TraceMismatchError, match=r"step 2 of the trace uses weights\.2, but weights\.4 was"
            ) as caught:
                rt(vector(32))
            assert caught.value.step == 2
            assert caught.value.expected == ("weights.2",)
            assert caught.value.actual == ("weights.4",)
            assert isinstance(caught.value, RuntimeError)
            rt.module.order = [*range(N_LAYERS)]


def test_the_first_passes_that_follow_a_plan_are_measured_for_what_it_predicts(make_store: MakeStore) -> None:
    with litrt.Runtime(Layers, make_store(Layers()), budget="min") as rt:
        rt.warmup(vector(32))
        plan = rt.plan
        rt(vector(32))
        measured = rt.plan
        assert measured.loads is plan.loads
        assert measured.latency_s == 0
        assert measured.bandwidth_bps != plan.bandwidth_bps
        assert [step.segments for step in measured.steps] == [step.segments for step in plan.steps]
        assert measured.pass_s >= measured.bound_s * (1 - 1e-9)
        for _ in range(3):
            rt(vector(32))
        settled = rt.plan
        rt(vector(32))
        assert rt.plan is settled


def test_a_pass_that_strays_costs_faults_and_is_right(make_store: MakeStore) -> None:
    with litrt.Runtime(Layers, make_store(Layers()), budget="min") as rt:
        rt.warmup(vector(32))
        plan = rt.plan
        rt(vector(32))
        before = rt.stats()
        rt.module.order = [0, 1, 4, 3, 2, 5]
        assert torch.equal(rt(vector(32)), expected(32, rt.module.order))
        assert rt.stats().since(before).n_faults > 0
        # Once is no reason to plan anew.
        assert rt.plan.loads is plan.loads
        rt.module.order = [*range(N_LAYERS)]
        rt(vector(32))
        before = rt.stats()
        assert torch.equal(rt(vector(32)), expected(32))
        assert rt.stats().since(before).n_faults == 0
        assert rt.plan.loads is plan.loads


@pytest.mark.parametrize(
    ("budget", "order"),
    [
        ("min", [0, 1, 4, 3, 2, 5]),
        ("min", [0, 2, 4]),
        ("min", [0, 1, 1, 2, 3, 4, 5, 5]),
        ("min", [5, 4, 3, 2, 1, 0]),
        ("60%", [5, 4, 3, 2, 1, 0]),
    ],
)
def test_passes_that_go_on_straying_are_planned_anew(budget: str, order: list[int], make_store: MakeStore) -> None:
    with litrt.Runtime(Layers, make_store(Layers()), budget=budget) as rt:
        rt.warmup(vector(32))
        plan = rt.plan
        rt(vector(32))
        rt.module.order = order
        for _ in range(2):
            assert torch.equal(rt(vector(32)), expected(32, order))
        assert rt.plan.loads is not plan.loads
        assert rt.plan.resident == plan.resident
        rt(vector(32))
        for _ in range(2):
            before = rt.stats()
            assert torch.equal(rt(vector(32)), expected(32, order))
            counts = rt.stats().since(before)
            assert counts.n_faults == 0
            assert counts.read_bytes == rt.plan.streamed_bytes


def test_passes_that_go_on_straying_to_a_larger_operator_are_planned_in_the_arena_that_it_made_grow(
    make_store: MakeStore,
) -> None:
    with litrt.Runtime(Layers, make_store(Layers()), budget="min") as rt:
        rt.warmup(vector(32))
        smallest = rt.stats().budget_bytes
        weights = rt.module.weights
        rt.module.before = lambda number: weights[number] @ weights[number - 1] if number else None
        for _ in range(4):
            assert torch.equal(rt(vector(32)), expected(32))
        assert rt.stats().budget_bytes == rt.plan.budget_bytes == 2 * smallest
        assert rt.plan.bound_bytes > 0
        before = rt.stats()
        assert torch.equal(rt(vector(32)), expected(32))
        assert rt.stats().since(before).n_faults == 0


def test_passes_that_stray_in_another_way_each_time_keep_the_plan(make_store: MakeStore) -> None:
    with litrt.Runtime(Layers, make_store(Layers()), budget="min") as rt:
        rt.warmup(vector(32))
        plan = rt.plan
        for order in ([0, 3, 1], [5, 2], [1, 0, 4], [2, 2, 3]):
            rt.module.order = order
            assert torch.equal(rt(vector(32)), expected(32, order))
            assert rt.plan.loads is plan.loads


# The end.


def test_close_waits_for_reads_under_way_and_leaves_no_thread(make_store: MakeStore, gate: Gate) -> None:
    rt = open_chain(make_store(Chain()), n_threads=2)
    rt(sample())
    _settle(gate, rt)
    mine = read_threads()
    assert len(mine) == 2
    gate.close()
    begun = len(gate.started)
    unplanned = next(load.segment for load in rt.plan.loads if load.after > 0)
    raised: list[BaseException] = []

    def use() -> None:
        try:
            rt.module.get_parameter(rt.plan.segments[unplanned].name).sum()
        except litrt.ClosedError as error:
            raised.append(error)

    user = threading.Thread(target=use)
    user.start()
    assert gate.wait_until(lambda: len(gate.started) > begun)
    closer = threading.Thread(target=rt.close)
    closer.start()
    # Whoever waits for a weight is told at once; the read that is under way has its memory until it ends.
    user.join(LIMIT_S)
    assert not user.is_alive()
    assert "closed" in str(raised[0])
    assert closer.is_alive()
    assert gate.parts
    gate.open()
    closer.join(LIMIT_S)
    assert not closer.is_alive()
    assert not (read_threads() & mine)


def test_close_drops_reads_that_have_not_begun(make_store: MakeStore, gate: Gate, slow_machine: None) -> None:
    rt = open_chain(make_store(Chain()), n_threads=1)
    rt(sample())
    _settle(gate, rt)
    at = rt.plan.steps[0].segments[0]
    closed = int(rt.plan.segments[at].name.removeprefix("weights."))

    def before(number: int) -> None:
        if number == closed:
            gate.close()
        if number == closed + 1:
            raise KeyboardInterrupt

    rt.module.before = before
    with pytest.raises(KeyboardInterrupt):
        rt(sample())
    begun = len(gate.started)
    gate.open()
    rt.close()
    assert len(gate.started) <= begun + 1
    assert rt.stats().read_bytes >= gate.done_bytes


@pytest.mark.parametrize("budget", ["min", "60%", "100%"])
def test_use_after_close_says_so(budget: str, make_store: MakeStore) -> None:
    rt = litrt.Runtime(Layers, make_store(Layers()), budget=budget)
    rt.warmup(vector(32))
    rt(vector(32))
    rt.close()
    rt.close()
    uses: list[Callable[[], Any]] = [
        lambda: rt(vector(32)),
        lambda: rt.warmup(vector(32)),
        lambda: rt.module(vector(32)),
        lambda: rt.module.weights[2] + 1,
        lambda: rt.module.weights[2].t().clone(),
    ]
    for use in uses:
        with pytest.raises(litrt.ClosedError, match=r"closed: make a new litrt\.Runtime"):
            use()
    assert rt.stats().n_passes == 1
    assert rt.plan.steps is not None


def test_what_a_caller_keeps_of_a_weight_outlives_the_runtime(make_store: MakeStore) -> None:
    with litrt.Runtime(Layers, make_store(Layers()), budget="min") as rt:
        kept = [rt.module.weights[number].detach().numpy() for number in range(1)]
    del rt
    gc.collect()
    assert (torch.from_numpy(kept[0]) == Layers().weights[0]).all()


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("budget", ["min", "60%", "100%"])
def test_a_runtime_that_is_dropped_without_close_ends_its_threads(
    budget: str, warm: bool, make_store: MakeStore
) -> None:
    others = read_threads()
    rt = litrt.Runtime(Layers, make_store(Layers()), budget=budget, n_threads=3)
    if warm:
        rt.warmup(vector(32))
        rt(vector(32))
    mine = read_threads() - others
    assert len(mine) == (3 if warm else 0)
    del rt
    gc.collect()
    assert not any(thread.is_alive() for thread in mine)


@pytest.mark.parametrize("budget", ["min", "100%"])
def test_a_module_that_is_kept_works_without_its_runtime(budget: str, make_store: MakeStore) -> None:
    rt = litrt.Runtime(Layers, make_store(Layers()), budget=budget)
    rt.warmup(vector(32))
    module = rt.module
    del rt
    gc.collect()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(module(vector(32)), expected(32))
