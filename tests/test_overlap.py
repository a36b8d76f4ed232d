"""Reads happen while operators compute, in the order and at the moment that the plan says, and never more than fits.

Reads go through a gate that a test can close, so that what overlaps is seen and not timed. Plans are made with the
timings of a made-up machine, on which a weight is read a little faster than an operator computes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeStore
from torch import nn

import litrt
import litrt.planner
from litrt.device import Bytes
from litrt.pipeline import Pipeline
from litrt.plan import Plan, make_plan
from litrt.reader import Piece, Reader
from litrt.reads import ReadThreads
from litrt.trace import Trace

WIDTH = 128
N_LAYERS = 8
LAYER_BYTES = WIDTH * WIDTH * 4
LIMIT_S = 20.0
"""How long something that should happen is waited for; then the test fails."""


class Gate:
    """Lets reads of the store through while it is open, and notes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[str] = []
        self.started_bytes = self.done_bytes = 0
        self.parts: list[tuple[int, int]] = []  # addresses that are read into now
        self.overlaps = 0
        self.most_in_flight_bytes = 0
        self._open = threading.Event()
        self._open.set()
        self._changed = threading.Condition()
        read_part = Reader.read_part

        def gated(reader: Reader, piece: Piece, part: Bytes) -> None:
            here = (part.ctypes.data, part.ctypes.data + part.nbytes)
            with self._changed:
                self.overlaps += any(here[0] < end and start < here[1] for start, end in self.parts)
                self.parts.append(here)
                self.most_in_flight_bytes = max(
                    self.most_in_flight_bytes, sum(end - start for start, end in self.parts)
                )
                self.started.append(piece.name)
                self.started_bytes += piece.nbytes
                self._changed.notify_all()
            try:
                assert self._open.wait(LIMIT_S), "the gate was left closed"
                read_part(reader, piece, part)
            finally:
                with self._changed:
                    self.parts.remove(here)
                    self.done_bytes += piece.nbytes
                    self._changed.notify_all()

        monkeypatch.setattr(Reader, "read_part", gated)

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Waits until `condition`, which is looked at whenever a read starts or ends; says whether it came true."""
        with self._changed:
            return self._changed.wait_for(condition, LIMIT_S)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open()


@pytest.fixture
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans as if every operator computed for a second, in which a weight and a bit can be read."""

    def make(trace: Trace, budget_bytes: int, **options: Any) -> Plan:
        uses = tuple(replace(use, compute_s=1.0, held_s=None) for use in trace.uses)
        return make_plan(Trace(trace.segments, uses, LAYER_BYTES / 0.9), budget_bytes, **options)

    monkeypatch.setattr(litrt.planner, "make_plan", make)


class Chain(nn.Module):
    """Products with one weight after the other.

    Attributes:
        before: Called between operators, with the number of the next one.
        during: Called in an operator, while it has its weight.
    """

    def __init__(self, n_layers: int = N_LAYERS, order: tuple[int, ...] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 for _ in range(n_layers)
        )
        self.order = tuple(range(n_layers)) if order is None else order
        self.before: Callable[[int], None] = lambda number: None
        self.during: Callable[[int], None] = lambda number: None

    def product(self, x: torch.Tensor, w: torch.Tensor, number: int) -> torch.Tensor:
        if torch.overrides.has_torch_function_unary(w):
            return torch.overrides.handle_torch_function(self.product, (w,), x, w, number)
        self.during(number)
        return torch.tanh(x @ w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in self.order:
            self.before(number)
            x = self.product(x, self.weights[number], number)
        return x


def sample() -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))


def open_chain(path: Path, n_held: float = 4, **options: Any) -> litrt.Runtime:
    """Returns a warmed-up runtime that can hold `n_held` of the weights, no two reads of which wait for a thread."""
    options = {"n_threads": N_LAYERS, "budget": int(n_held * LAYER_BYTES)} | options
    rt = litrt.Runtime(Chain, path, **options)
    rt.warmup(sample())
    return rt


def names(plan: Plan, indices: list[int]) -> Counter[str]:
    return Counter(plan.segments[index].name for index in indices)


def n_issued(plan: Plan, n_ended: int) -> int:
    """Returns how many loads the plan has issued from its start on when `n_ended` steps have ended."""
    n_steps = len(plan.steps)
    return sum(max((n_ended - load.after) // n_steps + 1, 0) for load in plan.loads)


def issued(plan: Plan, start: int, end: int) -> list[int]:
    """Returns the segments of the loads from number `start` to number `end`, counted through all passes."""
    return [plan.loads[number % len(plan.loads)].segment for number in range(start, end)]


@pytest.fixture
def path(make_store: MakeStore) -> Path:
    return make_store(Chain())


def test_while_an_operator_computes_the_next_loads_of_the_plan_are_read(
    path: Path, gate: Gate, slow_machine: None
) -> None:
    with open_chain(path) as rt:
        plan = rt.plan
        n_steps = len(plan.steps)
        numbers = {step.segments[0]: number for number, step in enumerate(plan.steps)}
        streamed = {plan.segments[index].name: number for index, number in numbers.items()}
        assert sum(load.after < load.first for load in plan.loads) >= 3, "the plan looks ahead"
        rt(sample())
        assert gate.wait_until(lambda: gate.done_bytes == rt.stats().read_bytes)
        seen = []

        for n_passes in (1, 2):
            begun, n_begun = len(gate.started), n_issued(plan, n_passes * n_steps)

            def during(number: int, n_passes: int = n_passes, begun: int = begun, n_begun: int = n_begun) -> None:
                step = streamed.get(f"weights.{number}")
                if step is None:
                    return
                # What the plan issues when the steps before this one have ended, while this one computes.
                expected = issued(plan, n_begun, n_issued(plan, n_passes * n_steps + step))
                assert gate.wait_until(lambda: len(gate.started) - begun >= len(expected)), "nothing reads ahead"
                assert Counter(gate.started[begun:]) == names(plan, expected)
                seen.append(step)

            rt.module.during = during
            rt(sample())
            assert gate.wait_until(lambda: gate.done_bytes == rt.stats().read_bytes)
        assert seen == [*range(n_steps)] * 2


def test_an_operator_is_not_held_up_by_the_reads_for_the_next_ones(path: Path, gate: Gate, slow_machine: None) -> None:
    with open_chain(path) as rt:
        plan = rt.plan
        rt(sample())
        # A step that has its own weight before the one before it ends, after which the weight of a later one is read.
        after = {load.first: load.after for load in plan.loads}
        ahead = next(
            load for load in plan.loads if 1 <= load.after < load.first and after[load.after] <= load.after - 1
        )
        name = plan.segments[ahead.segment].name
        current, previous = (number_of(plan, step) for step in (ahead.after, ahead.after - 1))
        ended = []

        def before(number: int) -> None:
            if number == previous:
                _settle(gate, rt)
                gate.close()
            if number == current + 1:
                ended.append((current, name in gate.started[begun:], gate.done_bytes < rt.stats().read_bytes))
                gate.open()

        def during(number: int) -> None:
            if number == current:
                assert gate.wait_until(lambda: name in gate.started[begun:]), "nothing reads ahead"

        rt.module.before, rt.module.during = before, during
        begun = len(gate.started)
        with torch.no_grad():
            assert torch.equal(rt(sample()), Chain()(sample()))
        assert ended == [(current, True, True)]


def number_of(plan: Plan, step: int) -> int:
    """Returns which operator of the chain a step of the plan is."""
    return int(plan.segments[plan.steps[step].segments[0]].name.removeprefix("weights."))


def test_prefetch_goes_on_from_the_end_of_a_pass_to_the_start_of_the_next(
    path: Path, gate: Gate, slow_machine: None
) -> None:
    with open_chain(path) as rt:
        plan = rt.plan
        n_steps = len(plan.steps)
        wrapped = [load.segment for load in plan.loads if load.after <= 0]
        assert wrapped, "the plan wraps around"
        assert any(load.after < 0 for load in plan.loads), "while the last steps of a pass compute"
        rt(sample())
        begun = 0

        def before(number: int) -> None:
            nonlocal begun
            if not number:
                assert gate.wait_until(lambda: gate.done_bytes == rt.stats().read_bytes)
                begun = len(gate.started)

        rt.module.before = before
        for n_passes in (2, 3):
            rt(sample())
            # The pass has ended, and nobody has asked for another one.
            expected = issued(plan, n_issued(plan, (n_passes - 1) * n_steps), n_issued(plan, n_passes * n_steps))
            assert expected[-len(wrapped) :] == wrapped
            n_expected = len(expected)
            assert gate.wait_until(lambda n=n_expected: len(gate.started) - begun == n)
            assert Counter(gate.started[begun:]) == names(plan, expected)


def test_a_steady_pass_reads_what_the_plan_says_and_no_more(path: Path, gate: Gate) -> None:
    for n_held in (1, 2.5, 4, 7):
        with open_chain(path, n_held) as rt:
            rt(sample())
            for _ in range(3):
                assert gate.wait_until(lambda rt=rt: gate.done_bytes == rt.stats().read_bytes)
                before, begun = rt.stats(), len(gate.started)
                rt(sample())
                assert gate.wait_until(lambda rt=rt: gate.done_bytes == rt.stats().read_bytes)
                assert rt.stats().since(before).read_bytes == rt.plan.streamed_bytes
                assert Counter(gate.started[begun:]) == names(rt.plan, [load.segment for load in rt.plan.loads])
                # What cannot be held must be read, and hardly more.
                assert rt.plan.streamed_bytes >= (N_LAYERS - n_held) * LAYER_BYTES
            gate.done_bytes = 0


def test_a_weight_that_is_there_is_a_hit(path: Path, gate: Gate, slow_machine: None) -> None:
    with open_chain(path) as rt:
        rt.module.before = lambda number: _settle(gate, rt)
        rt(sample())
        before = rt.stats()
        rt(sample())
        counts = rt.stats().since(before)
        assert (counts.n_hits, counts.n_late, counts.n_faults) == (len(rt.plan.steps), 0, 0)


def _settle(gate: Gate, rt: litrt.Runtime) -> None:
    """Waits until all that was issued is there."""
    assert gate.wait_until(lambda: gate.done_bytes == rt.stats().read_bytes)
    with rt._pipeline._lock:  # the thread that read the last piece says so under the lock
        rt._pipeline._ready.wait_for(lambda: not any(entry.n_pending for entry in rt._pipeline._entries), LIMIT_S)


def test_a_weight_that_is_on_its_way_is_late_and_waited_for(
    path: Path, gate: Gate, slow_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = threading.Event()
    wait = Pipeline._wait

    def noted(pipeline: Pipeline) -> None:
        waits.set()
        wait(pipeline)

    monkeypatch.setattr(Pipeline, "_wait", noted)

    def opener() -> None:
        assert waits.wait(LIMIT_S)
        gate.open()

    with open_chain(path) as rt:
        plan = rt.plan
        rt(sample())
        closed_at = number_of(plan, 1)
        thread = threading.Thread(target=opener)

        def before(number: int) -> None:
            if not thread.is_alive():
                _settle(gate, rt)
            if number == closed_at:
                gate.close()
                waits.clear()
                thread.start()

        rt.module.before = before
        before_pass = rt.stats()
        with torch.no_grad():
            assert torch.equal(rt(sample()), Chain()(sample()))
        thread.join(LIMIT_S)
        assert not thread.is_alive()
        counts = rt.stats().since(before_pass)
        assert counts.n_late >= 1
        assert counts.n_faults == 0
        assert counts.n_hits + counts.n_late == len(plan.steps)
        assert counts.stall_s > 0


def test_a_weight_that_was_not_planned_is_a_fault(path: Path, gate: Gate, slow_machine: None) -> None:
    with open_chain(path) as rt:
        plan = rt.plan
        rt(sample())
        _settle(gate, rt)
        unplanned = next(load.segment for load in plan.loads if load.after > 0)
        name = plan.segments[unplanned].name
        before, begun = rt.stats(), len(gate.started)
        assert torch.equal(rt.module.get_parameter(name) + 0, Chain().get_parameter(name))
        counts = rt.stats().since(before)
        assert (counts.n_hits, counts.n_late, counts.n_faults) == (0, 0, 1)
        assert gate.started[begun:] == [name]


def test_on_a_cycle_lru_never_hits_and_reads_nothing_ahead(path: Path, gate: Gate) -> None:
    with open_chain(path, N_LAYERS - 1, policy="lru") as rt:
        rt(sample())
        ahead = []
        rt.module.during = lambda number: ahead.extend(gate.started[begun + number + 1 :])
        before, begun = rt.stats(), len(gate.started)
        rt(sample())
        counts = rt.stats().since(before)
        assert (counts.n_hits, counts.n_late, counts.n_faults) == (0, 0, N_LAYERS)
        assert gate.started[begun:] == [f"weights.{number}" for number in range(N_LAYERS)]
        assert not ahead


def test_reads_in_flight_have_places_of_their_own_within_the_budget(path: Path, gate: Gate, slow_machine: None) -> None:
    n_held = 5
    with open_chain(path, n_held) as rt:
        plan = rt.plan
        arena = rt._pipeline.cache.arena
        assert arena._memory is not None
        low = arena._memory.ctypes.data
        rt(sample())
        _settle(gate, rt)
        gate.overlaps = gate.most_in_flight_bytes = 0
        most = []

        def during(number: int) -> None:
            # Let as much be in flight as there can be: nothing ends while this operator computes.
            gate.close()
            n_blocks = len(arena._blocks)
            assert gate.wait_until(lambda: len(gate.parts) == _n_reading(rt))
            most.append((n_blocks, [*gate.parts]))
            gate.open()

        rt.module.during = during
        rt(sample())
        assert gate.overlaps == 0
        window_bytes = plan.window_bytes
        for n_blocks, parts in most:
            assert n_blocks * LAYER_BYTES <= n_held * LAYER_BYTES
            assert all(low <= start and end <= low + arena.limit_bytes for start, end in parts)
        assert 0 < gate.most_in_flight_bytes <= window_bytes
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes <= n_held * LAYER_BYTES


def test_a_planned_place_that_somebody_still_sees_is_not_read_into(path: Path, gate: Gate, slow_machine: None) -> None:
    plain = Chain()
    with open_chain(path, 5) as rt, torch.no_grad():
        rt(sample())
        for index in dict.fromkeys(load.segment for load in rt.plan.loads):
            name = rt.plan.segments[index].name
            alias = rt.module.get_parameter(name).detach().numpy()  # shares the memory of the arena
            for _ in range(2):
                assert torch.equal(rt(sample()), plain(sample()))
                assert (torch.from_numpy(alias) == plain.get_parameter(name)).all()
            del alias
        assert gate.overlaps == 0
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes


def _n_reading(rt: litrt.Runtime) -> int:
    with rt._pipeline._lock:
        return sum(entry.n_pending > 0 for entry in rt._pipeline._entries)


def test_what_an_operator_waits_for_is_read_before_what_was_planned_earlier() -> None:
    lock = threading.RLock()
    gate, busy, done = threading.Event(), threading.Event(), threading.Event()
    order: list[str] = []

    class Double:
        def load(self, piece: Piece, memory: Bytes, waits: Sequence[Any]) -> None:
            busy.set()
            assert gate.wait(LIMIT_S)
            order.append(piece.name)

        def close(self) -> None:
            pass

    def note(token: str, error: BaseException | None) -> None:
        if len(order) == 5:
            done.set()

    reads: ReadThreads[str] = ReadThreads(Double(), lock, 1, note)  # type: ignore[arg-type]
    try:
        memory = np.zeros(1, dtype=np.uint8)

        def queue(priority: int, name: str) -> None:
            with lock:
                reads.queue(priority, name, [Piece(name, 0, 1, "", 0)], memory)

        queue(7, "under way")
        assert busy.wait(LIMIT_S)
        for priority, name in [(9, "later"), (8, "soon"), (8, "soon as well"), (-1, "urgent")]:
            queue(priority, name)
        gate.set()
        assert done.wait(LIMIT_S)
    finally:
        gate.set()
        reads.close()
    assert order == ["under way", "urgent", "soon", "soon as well", "later"]
