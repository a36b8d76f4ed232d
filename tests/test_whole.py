"""What a runtime says of its model's size, and what takes weights out of it, whole."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import MakeStore, read_threads
from corpus.case import seeded
from torch import nn

import litrt
from litrt.placeholder import Placeholder

pytestmark = pytest.mark.usefixtures("poisoned")

WIDTH = 32


class Net(nn.Module):
    """Has a tied weight, a buffer, weights that a constructor keeps, and a view of one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.cell = nn.GRU(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, 40, bias=False)
        self.head.weight = self.embed.weight
        self.kept = [layer.weight for layer in self.layers]
        self.row = self.layers[1].weight.detach()[3]
        self.layers[0].bias.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer, weight in zip(self.layers, reversed(self.kept), strict=True):
            x = torch.tanh(layer(x) @ weight) + self.row
        return self.head(self.norm(self.cell(x)[0]))


IDS = torch.arange(10)
BUDGETS = ["min", "60%", "100%"]


@pytest.fixture
def plain() -> nn.Module:
    with seeded():
        return Net().eval()


@pytest.fixture
def path(plain: nn.Module, make_store: MakeStore) -> Path:
    return make_store(plain)


@torch.no_grad()
def output(module: nn.Module) -> torch.Tensor:
    result: torch.Tensor = module(IDS)
    return result


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_bytes_of_a_model_and_the_least_that_it_needs_are_known(budget: str, path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="min") as rt:
        rt.warmup(IDS)
        smallest = rt.stats().budget_bytes
    with litrt.Runtime(Net, path, budget=budget) as rt:
        assert rt.total_bytes == sum(tensor.nbytes for tensor in {*plain.parameters(), *plain.buffers()})
        assert rt.min_budget_bytes == plain.cell.weight_ih_l0.nbytes, "the largest weight"
        rt.warmup(IDS)
        assert rt.min_budget_bytes == smallest
    with litrt.Runtime(Net, path, budget=smallest) as rt:
        assert torch.equal(output(rt.module), output(plain))
        assert rt.stats().budget_bytes == smallest
    with litrt.Runtime(Net, path, budget=smallest - 1) as rt, pytest.raises(litrt.BudgetError):
        rt(IDS)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_state_comes_one_true_tensor_at_a_time(budget: str, warm: bool, path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget=budget) as rt:
        if warm:
            rt.warmup(IDS)
        before = rt.stats()
        state = dict(rt.state_dict())
        assert rt.stats().peak_bytes == before.peak_bytes
        assert rt.stats().resident_bytes == before.resident_bytes
        assert list(state) == list(plain.state_dict())
        for name, tensor in plain.state_dict().items():
            assert type(state[name]) is torch.Tensor
            assert torch.equal(state[name], tensor)
            state[name].zero_()
        assert torch.equal(output(rt.module), output(plain)), "they are the caller's"
    with pytest.raises(litrt.ClosedError):
        next(rt.state_dict())


def test_the_state_is_served_in_the_dtype_of_the_runtime(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="min", dtype="bfloat16") as rt:
        for name, tensor in rt.state_dict():
            stored = plain.state_dict()[name]
            assert torch.equal(tensor, stored.bfloat16() if stored.is_floating_point() else stored)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_detached_module_is_a_plain_one(budget: str, warm: bool, path: Path, plain: nn.Module) -> None:
    others = read_threads()
    rt = litrt.Runtime(Net, path, budget=budget)
    if warm:
        rt.warmup(IDS)
    view = rt.module.layers[2].weight.t()
    module = rt.detach()
    assert module is rt.module
    assert read_threads() == others
    with pytest.raises(litrt.ClosedError):
        rt(IDS)
    for child in module.modules():
        assert "forward" not in vars(child)
    for (name, weight), (_, expected) in zip(module.named_parameters(), plain.named_parameters(), strict=True):
        assert type(weight) is nn.Parameter
        assert torch.equal(weight, expected), name
        assert weight.requires_grad == expected.requires_grad
    assert not any(isinstance(buffer, Placeholder) for buffer in module.buffers())
    assert module.head.weight is module.embed.weight
    assert torch.equal(output(module), output(plain))
    assert torch.equal(output(copy.deepcopy(module)), output(plain))
    with torch.no_grad():
        module.layers[2].weight[0, 0] = 7
        assert view[0, 0] == 7, "what was a view still is one"
    module(IDS).sum().backward()
    assert module.layers[1].weight.grad is not None


def test_a_module_that_cannot_be_read_whole_is_not_detached(path: Path, plain: nn.Module) -> None:
    (file,) = (file for file in (path / "layers.3.weight" / "c").rglob("*") if file.is_file())
    whole = file.read_bytes()
    with litrt.Runtime(Net, path, budget="min") as rt:
        file.write_bytes(whole[:-100])
        with pytest.raises(litrt.CorruptWeightError, match=r"layers\.3\.weight"):
            rt.detach()
        file.write_bytes(whole)
        assert torch.equal(output(rt.module), output(plain))
        assert torch.equal(output(rt.detach()), output(plain))


def test_a_write_to_the_data_of_a_weight_that_stays_lasts(path: Path, plain: nn.Module) -> None:
    """As when an adapter is merged: nothing can notice it, so that it must not be undone by the next plan either."""
    with litrt.Runtime(Net, path, budget="100%") as rt:
        rt.warmup(IDS)
        for module in (rt.module, plain):
            module.layers[1].weight.data.add_(1)
        expected = output(plain)
        assert torch.equal(output(rt.module), expected)
        for _ in range(2):
            rt.warmup(IDS)
            assert torch.equal(output(rt.module), expected)
            assert type(rt.module.layers[1].weight) is nn.Parameter
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes
        weight = rt.module.layers[1].weight
    with pytest.raises(litrt.ClosedError):
        weight + 1


def test_weights_that_were_not_written_to_are_given_back(path: Path) -> None:
    with litrt.Runtime(Net, path, budget="100%") as rt:
        rt.warmup(IDS)
        assert type(rt.module.layers[1].weight) is nn.Parameter
        rt._planner.begin()
        assert isinstance(rt.module.layers[1].weight, Placeholder)
