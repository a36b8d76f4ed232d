"""Weights that stay make room while other threads compute with them as soon as these are done."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import MakeStore
from corpus.case import seeded
from torch import nn

import litrt
from litrt.onlookers import Onlookers
from litrt.residents import _exchange

WIDTH = 64
LIMIT_S = 30


class Slow(nn.Module):
    """Computes with its weight when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.began, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.linear.weight.detach()  # a view, whose bytes stay
        self.began.set()
        assert self.go_on.wait(LIMIT_S)
        return x @ weight


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slow = Slow()
        self.small = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.wide = nn.Linear(WIDTH, 4 * WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.slow(x)
        for layer in self.small:
            x = layer(x)
        return x


X = torch.linspace(-1, 1, WIDTH).reshape(1, WIDTH)


@pytest.fixture
def plain() -> nn.Module:
    with seeded():
        return Net().eval()


@pytest.mark.usefixtures("poisoned")
@torch.no_grad()
def test_an_operator_waits_for_what_another_thread_computes_with(plain: nn.Module, make_store: MakeStore) -> None:
    budget = 4 * WIDTH * WIDTH * 4
    with litrt.Runtime(Net, make_store(plain), budget=budget) as rt:
        rt.warmup(X)
        assert type(rt.module.slow.linear.weight) is nn.Parameter, "it stays"
        slow = rt.module.slow
        slow.began.clear()
        slow.go_on.clear()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(slow, X)
            assert slow.began.wait(LIMIT_S)
            second = pool.submit(rt.module.wide, X)  # needs the room of what the other one computes with
            with pytest.raises(TimeoutError):
                second.result(timeout=0.2)
            slow.go_on.set()
            assert torch.equal(first.result(LIMIT_S), plain.slow(X))
            assert torch.equal(second.result(LIMIT_S), plain.wide(X))
        assert torch.equal(rt(X), plain(X))
        stats = rt.stats()
        assert stats.peak_bytes <= stats.budget_bytes


@pytest.mark.usefixtures("poisoned")
@torch.no_grad()
def test_what_is_held_without_computing_is_an_error_at_once(plain: nn.Module, make_store: MakeStore) -> None:
    budget = 4 * WIDTH * WIDTH * 4
    with litrt.Runtime(Net, make_store(plain), budget=budget) as rt:
        rt.warmup(X)
        row = rt.module.slow.linear.weight.detach()[0]
        with pytest.raises(litrt.BudgetError, match=r"in use, as somebody keeps tensors over 'slow\.linear\.weight';"):
            rt.module.wide(X)
        assert torch.equal(row, plain.slow.linear.weight[0])


def before_a_look(rt: litrt.Runtime, do: Callable[[], object]) -> None:
    """Does something whenever the runtime is about to look whether other threads are in the way."""
    cache = rt._pipeline.cache
    look = cache.is_watched

    def do_and_look() -> bool:
        do()
        return look()

    cache.is_watched = do_and_look


@pytest.mark.usefixtures("poisoned")
@torch.no_grad()
def test_what_is_let_go_of_at_the_last_moment_is_no_error(plain: nn.Module, make_store: MakeStore) -> None:
    with litrt.Runtime(Net, make_store(plain), budget=4 * WIDTH * WIDTH * 4) as rt:
        rt.warmup(X)
        held = [rt.module.slow.linear.weight.detach()[0]]
        before_a_look(rt, held.clear)
        assert torch.equal(rt.module.wide(X), plain.wide(X))
        assert not held


@pytest.mark.usefixtures("poisoned")
@torch.no_grad()
def test_a_weight_that_could_not_make_room_before_does_once_it_can(plain: nn.Module, make_store: MakeStore) -> None:
    with litrt.Runtime(Net, make_store(plain), budget=4 * WIDTH * WIDTH * 4) as rt:
        rt.warmup(X)
        held = [weakref.ref(rt.module.slow.linear.weight)]  # as good as a thread that computes with it
        rt._planner.begin()
        assert type(rt.module.slow.linear.weight) is nn.Parameter, "it could not be put back"
        before_a_look(rt, held.clear)
        assert torch.equal(rt.module.wide(X), plain.wide(X))
        assert not held
        assert torch.equal(rt(X), plain(X))


class Encoder(nn.TransformerEncoderLayer):
    """Has its weights while it reads rows of a table that is not its own."""

    before: Callable[[], object] = staticmethod(lambda: None)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.before()
        return super().forward(x + self.__dict__["outer"][0].places(torch.arange(x.shape[1])), *args, **kwargs)


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8192, WIDTH)
        self.encoder = Encoder(WIDTH, 2, 2 * WIDTH, batch_first=True)
        self.places = nn.Embedding(8192, WIDTH)
        self.encoder.__dict__["outer"] = [self]


@torch.no_grad()
def test_rows_are_gathered_by_who_has_weights_that_another_one_waits_for_that_gathers(make_store: MakeStore) -> None:
    with seeded():
        plain = Places().eval()
    x, ids = torch.ones(1, 5, WIDTH), torch.arange(5)[None]
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert go_on.wait(LIMIT_S)

    with litrt.Runtime(Places, make_store(plain), budget="min") as rt, ThreadPoolExecutor(2) as pool:
        rt.module.encoder.before = wait
        first = pool.submit(torch.no_grad()(rt.module.encoder), x)
        assert inside.wait(LIMIT_S)
        second = pool.submit(torch.no_grad()(rt.module.table), ids)
        with contextlib.suppress(TimeoutError):
            second.result(timeout=0.3)
        go_on.set()
        assert torch.equal(first.result(LIMIT_S), plain.encoder(x))
        assert torch.equal(second.result(LIMIT_S), plain.table(ids))


HOLDERS: dict[str, Callable[[torch.Tensor], object]] = {
    "a tensor over it": lambda weight: weight.detach(),
    "a view": lambda weight: weight.t(),
    "a weak reference": weakref.ref,
}


def garbage(*things: object) -> None:
    """Makes garbage of things, which only the cycle collector takes away."""
    cycle = [*things]
    cycle.append(cycle)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("how", HOLDERS)
def test_a_weight_that_garbage_holds_makes_room(how: str, plain: nn.Module, make_store: MakeStore) -> None:
    with litrt.Runtime(Net, make_store(plain), budget=4 * WIDTH * WIDTH * 4) as rt:
        rt.warmup(X)
        garbage(HOLDERS[how](rt.module.slow.linear.weight))
        with torch.no_grad():
            assert torch.equal(rt.module.wide(X), plain.wide(X))
            assert torch.equal(rt(X), plain(X))


class Finalizer:
    """What the cycle collector is at for some time, in the thread that has called it."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()

    def __del__(self) -> None:
        self.began.set()
        self.go_on.wait(LIMIT_S)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("what", ["use", "set_budget"])
def test_the_collector_is_waited_for_where_another_thread_is_at_it(
    what: str, plain: nn.Module, make_store: MakeStore
) -> None:
    with litrt.Runtime(Net, make_store(plain), budget=4 * WIDTH * WIDTH * 4) as rt:
        rt.warmup(X)
        finalizer = Finalizer()
        began, go_on = finalizer.began, finalizer.go_on
        garbage(finalizer, *(weight.detach() for weight in rt.module.parameters() if type(weight) is nn.Parameter))
        del finalizer
        thread = threading.Thread(target=gc.collect)
        thread.start()
        assert began.wait(LIMIT_S)
        timer = threading.Timer(0.1, go_on.set)
        timer.start()
        with torch.no_grad():
            if what == "use":
                assert torch.equal(rt.module.wide(X), plain.wide(X))
            else:
                rt.set_budget("min")
            assert torch.equal(rt(X), plain(X))
        thread.join(LIMIT_S)
        timer.join()


def in_thread(work: Callable[[], object], began: threading.Event, go_on: threading.Event, looks: Onlookers) -> bool:
    """Returns what is said of another thread that does some work."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert began.wait(LIMIT_S)
        return looks.are_computing()
    finally:
        go_on.set()
        thread.join()


def test_threads_in_a_module_of_the_model_are_seen_and_no_others() -> None:
    net, other = Net(), Net()
    looks = Onlookers(net)
    assert not looks.are_computing()
    for module, expected in ((net.slow, True), (other.slow, False), (net, True)):
        slow = module if isinstance(module, Slow) else module.slow
        slow.began.clear()
        slow.go_on.clear()
        assert in_thread(lambda module=module: module(X), slow.began, slow.go_on, looks) is expected
    began, go_on = threading.Event(), threading.Event()
    assert not in_thread(lambda: (began.set(), go_on.wait(LIMIT_S)), began, go_on, looks)
    net.register_forward_hook(lambda *_: began.set() if looks.are_computing() else None)
    began.clear()
    net(X)
    assert not began.is_set(), "this thread is no other one"


def test_what_cannot_be_exchanged_is_not_half_exchanged(plain: nn.Module, make_store: MakeStore) -> None:
    """As when another thread uses a weight at the very moment: torch refuses at the end, when all else is done."""

    def refuse(one: object, other: object) -> None:
        raise RuntimeError("somebody uses it")

    with litrt.Runtime(Net, make_store(plain), budget="100%") as rt:
        weight = rt.module.wide.weight
        other = nn.Parameter(torch.ones(2))
        before = type(weight), vars(weight).copy(), weight.shape
        with pytest.raises(RuntimeError, match="somebody"):
            _exchange(weight, other, refuse)
        assert (type(weight), vars(weight), weight.shape) == before
        assert (type(other), vars(other), other.shape) == (nn.Parameter, {}, (2,))
        assert torch.equal(weight.clone(), plain.wide.weight)
        _exchange(weight, other)
        assert (type(weight), weight.shape) == (nn.Parameter, (2,))
        assert torch.equal(other.clone(), plain.wide.weight)
        _exchange(weight, other)
        rt.warmup(X)
        assert type(weight) is nn.Parameter
        assert torch.equal(weight, plain.wide.weight)
