"""Passes that take different paths: each has its plan, and what stays is the same for all."""

from __future__ import annotations

from pathlib import Path as File
from typing import Any

import pytest
import torch
from conftest import MakeStore
from corpus.case import seeded
from torch import nn

import litrt
from litrt.paths import Path, Paths, signature
from litrt.plan import make_plan
from litrt.testing import FakeDevice
from litrt.trace import Segment, Trace, Use

WIDTH = 48


class Net(nn.Module):
    """An encoder that is called or not, a branch that a flag takes, and one that the values take."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.decoder = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.extra = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor, source: torch.Tensor | None = None, extra: bool = False) -> torch.Tensor:
        if source is not None:
            for layer in self.encoder:
                source = torch.tanh(layer(source))
            x = x + source.mean(0)
        for number, layer in enumerate(self.decoder):
            x = torch.tanh(layer(x))
            if extra and number % 2:
                x = torch.tanh(self.extra[number // 2](x))
        if x.isnan().any() or bool(x[0, 0] > 10):
            return x
        return x


X = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)
PATHS: dict[str, dict[str, Any]] = {
    "decode": {},
    "with encoder": {"source": X.flip(0)},
    "with extra": {"extra": True},
}


@pytest.fixture
def plain() -> nn.Module:
    with seeded():
        return Net().eval()


@pytest.fixture
def path(plain: nn.Module, make_store: MakeStore) -> File:
    return make_store(plain)


def run(rt: litrt.Runtime, plain: nn.Module, name: str) -> litrt.Stats:
    """Runs a pass; returns what it did."""
    before = rt.stats()
    with torch.no_grad():
        assert torch.equal(rt(X, **PATHS[name]), plain(X, **PATHS[name]))
    return rt.stats().since(before)


DEVICES: dict[str, Any] = {"cpu": lambda: "cpu", "double": FakeDevice}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
def test_every_path_that_was_warmed_up_has_its_plan(device: str, path: File, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="40%", device=DEVICES[device](), strict=True) as rt:
        for name in PATHS:
            rt.warmup(X, **PATHS[name])
        resident = rt.plan.resident
        assert resident, "something stays"
        for name in ["decode", "with encoder", "with extra", "decode", "decode", "with extra", "with encoder"] * 2:
            counts = run(rt, plain, name)
            assert counts.n_faults == 0, name
            assert rt.plan.resident == resident
        stats = rt.stats()
        assert stats.peak_bytes <= stats.budget_bytes


@pytest.mark.usefixtures("poisoned")
def test_a_path_that_passes_turn_to_gets_a_plan_and_the_others_keep_theirs(path: File, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="40%") as rt:
        rt.warmup(X, **PATHS["with encoder"])
        resident = rt.plan.resident
        for _ in range(2):
            run(rt, plain, "with extra")
        assert run(rt, plain, "with extra").n_faults == 0
        for name in ["with encoder", "with extra"] * 3:
            assert run(rt, plain, name).n_faults == 0, name
        assert rt.plan.resident == resident


@pytest.mark.usefixtures("poisoned")
def test_a_path_that_is_taken_now_and_then_gets_a_plan(path: File, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="40%") as rt:
        rt.warmup(X, **PATHS["with encoder"])
        assert run(rt, plain, "with extra").n_faults > 0
        run(rt, plain, "decode")
        run(rt, plain, "with encoder")
        run(rt, plain, "with extra")
        assert run(rt, plain, "with extra").n_faults == 0


class Halves(Net):
    """One half of it is called, or the other."""

    def forward(self, x: torch.Tensor, *_: Any, second: bool = False, **__: Any) -> torch.Tensor:
        for layer in self.decoder if second else self.encoder:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
def test_what_stays_is_chosen_anew_where_passes_keep_to_another_path(device: str, make_store: MakeStore) -> None:
    with seeded():
        plain = Halves().eval()
    with (
        litrt.Runtime(Halves, make_store(plain), budget="45%", device=DEVICES[device]()) as rt,
        torch.no_grad(),
    ):
        rt.warmup(X)
        assert not rt.plan.streamed_bytes
        assert all(rt.plan.segments[index].name.startswith("encoder") for index in rt.plan.resident)
        expected = plain(X, second=True)
        for _ in range(14):
            before = rt.stats()
            assert torch.equal(rt(X, second=True), expected)
        assert rt.stats().since(before).n_faults == 0
        assert any(rt.plan.segments[index].name.startswith("decoder") for index in rt.plan.resident)
        assert torch.equal(rt(X), plain(X))
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes


def test_a_path_beside_a_plan_in_which_all_stays_is_a_mismatch(make_store: MakeStore) -> None:
    with seeded():
        plain = Halves().eval()
    with litrt.Runtime(Halves, make_store(plain), budget="45%", strict=True) as rt:
        rt.warmup(X)
        with pytest.raises(
            litrt.TraceMismatchError, match=r"step 0 of the trace uses nothing that streams, but decoder"
        ):
            rt(X, second=True)
        assert torch.equal(rt(X), plain(X))


@pytest.mark.usefixtures("poisoned")
def test_a_second_warm_up_reads_only_what_did_not_stay(path: File, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="80%") as rt:
        rt.warmup(X)
        before = rt.stats().read_bytes
        rt.warmup(X)
        assert rt.stats().read_bytes - before <= rt.total_bytes - rt.plan.resident_bytes + rt.plan.streamed_bytes


def test_inputs_that_look_alike_have_one_signature() -> None:
    flat = torch.zeros(1, 7)
    assert signature([flat], {}) == signature([torch.ones(1, 9)], {})
    assert signature([flat], {}) != signature([torch.ones(1, 1)], {})
    assert signature([flat], {"a": None, "b": 1}) == signature([flat], {"b": 1, "a": None})
    assert signature([flat], {"a": None}) != signature([flat], {"a": flat})
    assert signature([flat], {"a": True}) != signature([flat], {"a": False})
    assert signature([flat], {"a": "x" * 1000}) == signature([flat], {"a": "y" * 1000})
    assert hash(signature([[flat], {"a": flat}, object()], {"cache": object()}))


SEGMENTS = tuple(Segment(f"s{number}", 100, 100, 1) for number in range(6))


def trace(*order: int) -> Trace:
    return Trace(SEGMENTS, tuple(Use((index,), 1.0) for index in order), 100.0)


def paths_of(*orders: tuple[int, ...]) -> tuple[Paths, list[Path]]:
    paths = Paths()
    made = []
    for number, order in enumerate(orders):
        found = trace(*order)
        made.append(paths.record(found.uses, f"looks {number}"))
        made[-1].plan = make_plan(found, 300)
    return paths, made


def test_a_path_is_known_by_what_it_uses() -> None:
    paths, (one, other) = paths_of((0, 1, 2, 3), (0, 1, 4, 5))
    assert paths.record(trace(0, 1, 2, 3).uses, "looks different") is one
    assert paths.recorded == [other, one], "the last one recorded is last"
    assert one.plan is not None
    steps = [Use(step.segments, 1.0) for step in one.plan.steps]
    assert paths.find(steps) is one
    assert paths.find([*steps, *steps]) is None


def test_the_next_path_is_guessed_by_inputs_and_by_the_one_before() -> None:
    paths, (one, other) = paths_of((0, 1, 2, 3), (0, 1, 4, 5))
    assert paths.expected("looks 0") is one
    assert paths.expected("looks 1") is other
    assert paths.expected("never seen") is None
    assert paths.took(one, "the same") is one, "nothing has come after it yet"
    assert paths.took(other, "the same") is other
    assert paths.took(one, "the same") is other, "as before"
    assert paths.expected("the same") is other
    assert paths.took(other, "the same") is one
    assert paths.expected("the same") is one


def test_paths_that_are_taken_least_lately_are_forgotten_with_what_was_guessed_of_them() -> None:
    paths, made = paths_of(*((0, 1, 2, 3, *([4] * number)) for number in range(12)))
    assert len(paths) == 8
    assert paths.recorded == made[4:]
    assert paths.expected("looks 0") is None
    assert paths.expected("looks 11") is made[11]
    assert paths.took(made[4], "looks 4") is made[4]
    for order in ((5, 4, 3), (3, 4, 5), (5, 3, 4)):
        paths.stray(make_plan(trace(*order), 300))
        assert len(paths) == 8
        assert len(paths.recorded) == 7, "what was not recorded makes room first"
    assert made[4] in paths.recorded
    paths.forget_strayed()
    assert len(paths) == 7
