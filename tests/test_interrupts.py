"""Interrupts, as Ctrl-C sends them, at any moment of what litrt does: what follows is right, and does not hang."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import litrt
from litrt.cache import Cache, Entry, State
from litrt.pipeline import Pipeline
from litrt.planner import Planner
from litrt.testing import FakeDevice

N_MOMENTS = 40
"""Moments at which each thing is interrupted, and for every other one what mends it as well."""

N_MOMENTS_OF_MENDING = 150
"""Among how many the moment for that is drawn; where nothing has to be undone there are fewer."""

_NOT_IN = {f"litrt.{name}" for name in ("layout", "residency", "schedule", "testing", "trace")}
"""Modules that only compute, in which nearly all moments would be, and the double of a device."""

LIMIT_S = 20.0
WIDTH = 128
CHUNK_BYTES = 64 << 10
"""The table and the projections of the attention are in several pieces."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(1024, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.table(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.attention(x, x, x, need_weights=False)[0] @ self.layers[0].weight


class Interrupts:
    """Raises KeyboardInterrupt at one of the moments at which Python looks for signals in code of litrt's.

    That is at the beginning of a function, and after a call of one that is not Python's.
    """

    def __init__(self) -> None:
        self.n_moments = 0
        self._at = -1

    def _look(self, frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        if event in ("call", "c_return") and name.startswith("litrt.") and name not in _NOT_IN:
            self.n_moments += 1
            if self.n_moments == self._at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    def run(self, function: Callable[[], object], at: int) -> bool:
        """Runs a function, interrupted at moment number `at`; says whether it came to that."""
        try:
            self.pass_on(function, at)
        except KeyboardInterrupt:
            return True
        return False

    def pass_on(self, function: Callable[[], object], at: int) -> None:
        """Runs a function, interrupted at moment number `at`, which ends the caller as well."""
        self.n_moments, self._at = 0, at
        sys.setprofile(self._look)
        try:
            function()
        finally:
            sys.setprofile(None)

    def count(self, function: Callable[[], object]) -> int:
        """Runs a function that is not interrupted; returns how many moments it has."""
        self.pass_on(function, -1)
        return self.n_moments


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("interrupts") / "model.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("litrt.arrays.TARGET_CHUNK_BYTES", CHUNK_BYTES)
        litrt.convert(Model().state_dict(), path)
    return path


def in_a_thread(function: Callable[[], object]) -> object:
    """Returns what a function returns in a thread of its own, which has to end in time."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "it hangs"
    assert results, "it has raised"
    return results[0]


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a generator that is closed has moments too
@pytest.mark.parametrize(
    ("budget", "device"), [("min", "cpu"), ("40%", "cpu"), ("60%", "cpu"), ("min", "fake"), ("40%", "fake")]
)
@pytest.mark.parametrize("what", ["pass", "set_budget", "warmup", "use"])
def test_what_was_interrupted_anywhere_is_right_the_next_time(
    store: Path, what: str, budget: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(0, 1024, (2, 5), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def use(model: Any) -> torch.Tensor:
        """Uses weights outside of a pass, without gradients, which would hold them."""
        sums = [weight.sum()[None] for weight in model.attention.parameters()]
        return torch.cat([model.table(tokens).flatten(), *sums])

    with torch.no_grad():
        plain = Model().eval()
        expected, expected_of_use = plain(tokens), use(plain)
    options: dict[str, Any] = {"device": FakeDevice(), "host_budget": 0} if device == "fake" else {}
    with litrt.Runtime(Model, store, budget=budget, **options) as rt:
        others = ["70%", budget]

        def change() -> None:
            others.append(others.pop(0))
            rt.set_budget(others[0])

        doing: dict[str, Callable[[], object]] = {
            "pass": lambda: rt(tokens),
            "set_budget": change,
            "warmup": lambda: rt.warmup(tokens),
            "use": lambda: use(rt.module),
        }
        rt.warmup(tokens)
        rng = random.Random(f"{what} {budget} {device}")
        interrupts, second = Interrupts(), Interrupts()
        n_moments = interrupts.count(doing[what])
        mend = Planner.mend
        n_mended = 0

        def mend_interrupted(planner: Planner) -> None:
            nonlocal n_mended
            n_mended += 1
            if n_mended % 2:
                second.pass_on(lambda: mend(planner), rng.randrange(1, N_MOMENTS_OF_MENDING))
            else:
                mend(planner)

        def check_use() -> torch.Tensor:
            """Returns what is expected, or what a use has computed where nothing that was left pinned is in its way."""
            try:
                return use(rt.module)
            except litrt.BudgetError:
                assert rt._pipeline._turns.is_anybody_at_work
                return expected_of_use

        n_interrupted = 0
        for number in range(N_MOMENTS):
            monkeypatch.setattr(Planner, "mend", mend_interrupted)
            n_interrupted += interrupts.run(doing[what], rng.randrange(1, n_moments + 1))
            monkeypatch.setattr(Planner, "mend", mend)
            if what == "use":
                assert torch.equal(check_use(), expected_of_use)
                if number % 2:
                    assert torch.equal(in_a_thread(check_use), expected_of_use)  # type: ignore[arg-type]
                    assert torch.equal(check_use(), expected_of_use)
            for _ in range(2):
                assert torch.equal(in_a_thread(lambda: rt(tokens)), expected)  # type: ignore[arg-type]
            assert torch.equal(rt(tokens), expected)
            stats = rt.stats()
            assert stats.peak_bytes <= stats.budget_bytes
        assert n_interrupted > N_MOMENTS // 3
        rt.set_budget("min")
        assert torch.equal(rt(tokens), expected)


def test_a_change_of_the_budget_that_is_interrupted_before_a_read_is_queued_ends(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.arange(5)[None]
    with litrt.Runtime(Model, store, budget="40%") as rt:
        rt.warmup(tokens)
        expected = rt(tokens)

        def interrupted(pipeline: Pipeline, entry: Entry, priority: int) -> None:
            entry.state = State.READING
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Pipeline, "_queue_reads", interrupted)
            with pytest.raises(KeyboardInterrupt):
                rt.set_budget("80%")
        assert torch.equal(rt(tokens), expected)
        rt.set_budget("80%")
        assert torch.equal(rt(tokens), expected)


@pytest.mark.parametrize("where", ["making room", "queueing reads"])
def test_who_waits_for_what_another_thread_was_interrupted_at_is_told(
    store: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with litrt.Runtime(Model, store, budget="100%") as rt:
        pipeline = rt._pipeline
        weight, bias = (
            next(number for number, entry in enumerate(pipeline.cache.entries) if entry.segment.name == name)
            for name in ("layers.0.weight", "layers.0.bias")
        )
        expected = rt.module.layers[0].weight.detach().clone()
        pipeline.let_go()
        first = threading.current_thread()
        is_placed = threading.Event()
        make_room, queue_reads = Cache._make_room, Pipeline._queue_reads

        def slowly(cache: Cache, entry: Entry) -> bool:
            if threading.current_thread() is first and entry is cache.entries[bias]:
                is_placed.set()
                while cache.entries[weight].n_pins < 2:
                    pipeline._wait()
                if where == "making room":
                    raise KeyboardInterrupt
            return make_room(cache, entry)

        def interrupted(pipeline: Pipeline, entry: Entry, priority: int) -> None:
            if threading.current_thread() is first:
                raise KeyboardInterrupt
            queue_reads(pipeline, entry, priority)

        monkeypatch.setattr(Cache, "_make_room", slowly)
        monkeypatch.setattr(Pipeline, "_queue_reads", interrupted)

        def use() -> torch.Tensor:
            is_placed.wait()
            binding = pipeline.acquire((weight,))
            try:
                return binding.tensors[0].clone()
            finally:
                pipeline.release(binding)

        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(use)
            with pytest.raises(KeyboardInterrupt):
                pipeline.acquire((weight, bias))
            if where == "queueing reads":
                with pytest.raises(litrt.LitrtError, match="another thread was interrupted"):
                    other.result(LIMIT_S)
                other = pool.submit(use)
            assert torch.equal(other.result(LIMIT_S), expected)


def test_what_a_thread_has_left_pinned_keeps_no_other_one_waiting(store: Path) -> None:
    with litrt.Runtime(Model, store, budget="min") as rt:
        names = [entry.segment.name for entry in rt._pipeline.cache.entries]
        rt._pipeline.acquire((names.index("table.weight"),))  # and interrupted before it is released
        with torch.no_grad():
            assert torch.equal(
                in_a_thread(lambda: rt.module.attention.in_proj_weight + 0),  # type: ignore[arg-type]
                Model().attention.in_proj_weight,
            )
        assert not rt._pipeline._turns.is_anybody_at_work
