"""A model is built by its own constructor without its weights, and all that is not a weight is what it would be."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch
from conftest import MakeStore
from torch import nn

import litrt
from litrt.deferred import Deferred
from litrt.placeholder import Placeholder
from litrt.skeleton import build, match, slots

WIDTH = 8

# Nothing is allocated.


@pytest.mark.parametrize(
    "construct",
    [
        lambda: nn.Linear(500_000, 500_000),
        lambda: nn.Sequential(*(nn.Linear(100_000, 100_000, dtype=torch.bfloat16) for _ in range(50))),
        lambda: nn.Embedding(1_000_000, 250_000),
    ],
    ids=["linear", "layers", "table"],
)
def test_a_constructor_allocates_none_of_its_weights(construct: Callable[[], nn.Module]) -> None:
    process = psutil.Process()
    build(lambda: nn.Linear(2, 2))  # torch imports much of itself when it is first asked
    gc.collect()
    before = process.memory_info()
    tracemalloc.start()
    try:
        module, _ = build(construct)
        python_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(parameter.nbytes for parameter in module.parameters()) >= 10**12
    assert python_bytes < 10**7
    # Not even as address space.
    assert process.memory_info().rss - before.rss < 10**8
    assert process.memory_info().vms - before.vms < 10**9


def test_what_a_constructor_does_to_its_weights_allocates_nothing() -> None:
    class Initialised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(500_000, 500_000, bias=False)
            nn.init.normal_(self.layer.weight, std=0.02)
            with torch.no_grad():
                self.layer.weight[0].zero_()
                self.layer.weight.data.mul_(0.5)
            self.tied = nn.Linear(500_000, 500_000, bias=False)
            self.tied.weight = self.layer.weight
            self.register_buffer("scaled", self.layer.weight.detach() * 2)

    build(lambda: nn.Linear(2, 2))
    before = psutil.Process().memory_info()
    module, _ = build(Initialised)
    assert module.tied.weight is module.layer.weight
    assert module.scaled.shape == (500_000, 500_000)
    assert psutil.Process().memory_info().vms - before.vms < 10**9


def test_the_model_is_of_its_own_class_with_its_own_attributes(make_store: MakeStore) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)
            self.layer.weight.tag = "kept"
            self.config = {"n": 3}
            self.constant = torch.tensor([1.0, 2.0])

    with litrt.Runtime(Mine, make_store(Mine()), budget="min") as rt:
        assert type(rt.module) is Mine
        assert rt.module.config == {"n": 3}
        assert isinstance(rt.module.layer.weight, Placeholder)
        assert rt.module.layer.weight.tag == "kept"
        assert type(rt.module.constant) is torch.Tensor
        assert rt.module.constant.tolist() == [1.0, 2.0]


def test_the_store_says_what_the_weights_are_and_the_constructor_does_not(make_store: MakeStore) -> None:
    class Zeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(WIDTH, WIDTH))
            self.register_buffer("steps", torch.zeros(3, dtype=torch.long))

        def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
            return self.w + 0, self.steps + 0

    state = {"w": torch.randn(WIDTH, WIDTH).to(torch.bfloat16), "steps": torch.tensor([1, 2, 3])}
    with litrt.Runtime(Zeros, make_store(state), budget="min") as rt:
        w, steps = rt()
        assert torch.equal(w, state["w"])
        assert rt.module.w.dtype == torch.bfloat16
        assert steps.tolist() == [1, 2, 3]


# Other threads notice nothing.


def test_another_thread_builds_its_module_as_always_meanwhile() -> None:
    started, finished = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)

    def other() -> nn.Module:
        started.wait()
        module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
        module.register_buffer("table", torch.ones(3) * 2)
        finished.wait()
        return module

    def construct() -> nn.Module:
        first = nn.Linear(500_000, 500_000)
        started.wait()
        finished.wait()  # the other one was built while this constructor runs
        return nn.Sequential(first, nn.Linear(500_000, 500_000))

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(other)
        module, _ = build(construct)
        built = future.result(60)
    assert all(isinstance(parameter, Deferred) for parameter in module.parameters())
    for tensor in (*built.parameters(), *built.buffers()):
        assert type(tensor) in (nn.Parameter, torch.Tensor)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert torch.isfinite(tensor).all()
    assert built.table.tolist() == [2.0, 2.0, 2.0]
    assert all(parameter.requires_grad for parameter in built.parameters())
    y = built(torch.ones(4, WIDTH))
    y.sum().backward()
    assert built[0].weight.grad is not None


def test_two_models_are_built_at_the_same_time() -> None:
    together = threading.Barrier(2, timeout=60)

    def construct() -> nn.Module:
        together.wait()
        made = nn.Linear(500_000, 500_000)
        together.wait()
        return made

    with ThreadPoolExecutor(2) as pool:
        built = list(pool.map(lambda _: build(construct), range(2)))
    (one, first), (other, second) = built
    assert one.weight is not other.weight
    assert first.ref(one.weight) is not None
    assert second.ref(other.weight) is not None


def test_after_a_constructor_that_fails_tensors_are_made_as_always() -> None:
    def construct() -> nn.Module:
        nn.Linear(500_000, 500_000)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        build(construct)
    assert type(torch.ones(3) + 1) is torch.Tensor
    assert type(nn.Linear(2, 2).weight) is nn.Parameter
    assert torch.is_grad_enabled()


# What is not stored.


class Buffers(nn.Module):
    """Values that are computed, drawn, or derived from one another, between weights that draw as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("noise", torch.randn(WIDTH, WIDTH), persistent=False)
        self.b = nn.Linear(WIDTH, WIDTH)
        inv_freq = 1.0 / (10_000 ** (torch.arange(0, WIDTH, 2).float() / WIDTH))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("angles", torch.outer(torch.arange(5.0), inv_freq).cos(), persistent=False)
        self.register_buffer("mask", torch.tril(torch.ones(5, 5, dtype=torch.bool)), persistent=False)
        self.register_buffer("order", torch.randperm(20), persistent=False)
        self.register_buffer("dropped", nn.functional.dropout(torch.ones(30), 0.5), persistent=False)
        self.register_buffer("of_a_weight", self.b.weight.detach()[:2] * 3, persistent=False)
        self.register_buffer("view", self.noise[1], persistent=False)
        self.register_buffer("stored", torch.rand(3))
        self.plain_tensor = torch.rand(4).mul_(2)
        self.in_a_list = [torch.full((2,), 7.0), torch.rand(2)]
        self.number = float(torch.rand(()).item())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) @ self.noise) * self.number + self.stored.sum()


@pytest.mark.parametrize("seed", [0, 7])
def test_what_is_not_stored_has_the_values_of_a_plain_construction(seed: int, make_store: MakeStore) -> None:
    torch.manual_seed(seed)
    plain = Buffers().eval()
    torch.manual_seed(seed)
    with litrt.Runtime(Buffers, make_store(plain), budget="min") as rt:
        module = rt.module
        for name, buffer in plain.named_buffers():
            if name == "stored":
                assert isinstance(module.stored, Placeholder)
                continue
            assert type(module.get_buffer(name)) is torch.Tensor, name
            assert torch.equal(module.get_buffer(name), buffer), name
        assert torch.equal(module.plain_tensor, plain.plain_tensor)
        assert [tensor.tolist() for tensor in module.in_a_list] == [tensor.tolist() for tensor in plain.in_a_list]
        assert module.number == plain.number
        assert module._non_persistent_buffers_set == plain._non_persistent_buffers_set
        # Those that share memory go on sharing it.
        module.noise[1] = 5.0
        assert (module.view == 5.0).all()
        with torch.no_grad():
            plain.noise[1] = 5.0
            assert torch.equal(rt(torch.ones(2, WIDTH)), plain(torch.ones(2, WIDTH)))


def test_values_drawn_before_and_after_a_constructor_seeds_are_those_of_a_plain_construction(
    make_store: MakeStore,
) -> None:
    class Seeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("before", torch.randn(WIDTH), persistent=False)
            torch.manual_seed(12)
            self.register_buffer("after", torch.randn(WIDTH), persistent=False)

    torch.manual_seed(3)
    plain = Seeds()
    torch.manual_seed(3)
    with litrt.Runtime(Seeds, make_store(plain), budget="min") as rt:
        assert torch.equal(rt.module.before, plain.before)
        assert torch.equal(rt.module.after, plain.after)


def test_another_seed_gives_other_values(make_store: MakeStore) -> None:
    torch.manual_seed(0)
    plain = Buffers()
    torch.manual_seed(1)
    with litrt.Runtime(Buffers, make_store(plain), budget="min") as rt:
        assert not torch.equal(rt.module.noise, plain.noise)


def test_a_constructor_that_reads_its_weights_reads_what_it_made() -> None:
    def construct() -> nn.Module:
        layer = nn.Linear(WIDTH, WIDTH)
        layer.total = layer.weight.sum().item()
        layer.listed = layer.bias.tolist()
        layer.is_positive = bool((layer.weight > 0).any())
        return layer

    torch.manual_seed(3)
    plain = construct()
    torch.manual_seed(3)
    module, _ = build(construct)
    assert (module.total, module.listed, module.is_positive) == (plain.total, plain.listed, plain.is_positive)


# Names and shapes.


class Wanted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("table", torch.zeros(3))
        self.register_buffer("temporary", torch.zeros(3), persistent=False)


def test_all_that_does_not_fit_is_reported_at_once(make_store: MakeStore) -> None:
    state = dict(Wanted().state_dict())
    del state["first.bias"], state["norm.running_var"]
    state |= {"extra.weight": torch.zeros(3), "tables": torch.zeros(2)}
    state |= {"second.weight": torch.zeros(WIDTH, 2 * WIDTH), "table": torch.zeros(4)}
    path = make_store(state)
    with pytest.raises(litrt.SkeletonError) as caught:
        litrt.Runtime(Wanted, path)
    error = caught.value
    assert error.missing == ("first.bias", "norm.running_var")
    assert error.unexpected == ("extra.weight", "tables")
    assert error.misshaped == {
        "table": ((3,), (4,)),
        "second.weight": ((2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH)),
    }
    assert isinstance(error, litrt.StoreError)
    said = str(error)
    assert said.startswith(f"{path} does not fit the model:")
    for line in (
        "missing in the store (2): first.bias, norm.running_var",
        "unexpected, not in the model (2): extra.weight, tables",
        "of another shape (2): table is (4,) in the store and (3,) in the model, "
        "second.weight is (8, 16) in the store and (16, 8) in the model",
    ):
        assert line in said


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshaped"])
def test_each_kind_alone_is_an_error(change: str, make_store: MakeStore) -> None:
    state = dict(Wanted().state_dict())
    if change == "missing":
        del state["table"]
    elif change == "unexpected":
        state["other"] = torch.zeros(1)
    else:
        state["table"] = torch.zeros(3, 1)
    with pytest.raises(litrt.SkeletonError) as caught:
        litrt.Runtime(Wanted, make_store(state))
    found = {name: len(getattr(caught.value, name)) for name in ("missing", "unexpected", "misshaped")}
    assert found == {"missing": 0, "unexpected": 0, "misshaped": 0} | {change: 1}


def test_a_message_lists_ten_names_and_the_attributes_all(make_store: MakeStore) -> None:
    with pytest.raises(litrt.SkeletonError, match=r"missing in the store \(24\): .* and 14 more") as caught:
        litrt.Runtime(
            lambda: nn.Sequential(*(nn.Linear(2, 2) for _ in range(13))),
            make_store({"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(2)}),
        )
    assert len(caught.value.missing) == 24
    assert str(caught.value).count(".weight") == 5


def test_of_a_tied_weight_any_of_its_names_will_do(make_store: MakeStore) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(WIDTH, WIDTH)
            self.head = nn.Linear(WIDTH, WIDTH, bias=False)
            self.head.weight = self.embed.weight

    weight = torch.randn(WIDTH, WIDTH)
    for number, name in enumerate(["embed.weight", "head.weight"]):
        with litrt.Runtime(Tied, make_store({name: weight}, f"{number}.zarr"), budget="min") as rt:
            assert rt.module.head.weight is rt.module.embed.weight
            assert torch.equal(rt.module.head.weight + 0, weight)
    with pytest.raises(litrt.SkeletonError) as caught:
        litrt.Runtime(Tied, make_store({"other": weight}))
    assert caught.value.missing == ("embed.weight",)


class Forgiving(Wanted):
    _keys_to_ignore_on_load_unexpected = (r"\.masked_bias$", r"^old\.")


def test_a_stored_tensor_that_the_model_does_without_is_ignored(make_store: MakeStore) -> None:
    extras = {"h.0.masked_bias": torch.zeros(1), "old.weight": torch.zeros(2), "temporary": torch.zeros(3)}
    path = make_store(dict(Wanted().state_dict()) | extras)
    with litrt.Runtime(Forgiving, path, budget="min") as rt:
        assert not hasattr(rt.module, "old")
        assert type(rt.module.temporary) is torch.Tensor
    with pytest.raises(litrt.SkeletonError) as caught:
        litrt.Runtime(Wanted, path)
    assert caught.value.unexpected == ("h.0.masked_bias", "old.weight")


def test_patterns_match_no_more_than_they_say(make_store: MakeStore) -> None:
    extras = {"masked_biases": torch.zeros(1), "very.old.weight": torch.zeros(2), "first.temporary": torch.zeros(3)}
    with pytest.raises(litrt.SkeletonError) as caught:
        litrt.Runtime(Forgiving, make_store(dict(Wanted().state_dict()) | extras))
    assert caught.value.unexpected == tuple(extras)


@pytest.mark.parametrize("patterns", [None, [], ()])
def test_a_model_without_patterns_ignores_nothing(patterns: Any, make_store: MakeStore) -> None:
    class Strict(Wanted):
        _keys_to_ignore_on_load_unexpected = patterns

    with pytest.raises(litrt.SkeletonError):
        litrt.Runtime(Strict, make_store(dict(Wanted().state_dict()) | {"other": torch.zeros(1)}))


def test_weights_are_matched_by_name_and_tied_ones_counted_once(make_store: MakeStore) -> None:
    module, _ = build(lambda: nn.Sequential(*[nn.Linear(WIDTH, WIDTH)] * 3))
    found = slots(module)
    assert [slot.names for slot in found] == [
        ["0.weight", "1.weight", "2.weight"],
        ["0.bias", "1.bias", "2.bias"],
    ]
    store = litrt.open_store(make_store({"1.weight": torch.zeros(WIDTH, WIDTH), "2.bias": torch.zeros(WIDTH)}))
    match(module, found, store)
    assert [slot.stored for slot in found] == ["1.weight", "2.bias"]
    store.close()


# The mode of the model.


def test_the_model_is_in_eval_mode_and_makes_no_gradients(make_store: MakeStore) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)
            self.drop = nn.Dropout(0.9)
            self.norm = nn.BatchNorm1d(WIDTH)
            self.train()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.drop(self.layer(x)))

    plain = Dropping().eval()
    x = torch.randn(4, WIDTH)
    for number, budget in enumerate(("min", "100%")):
        with litrt.Runtime(Dropping, make_store(plain, f"{number}.zarr"), budget=budget) as rt:
            assert not any(module.training for module in rt.module.modules())
            for _ in range(3):
                y = rt(x)
                assert not y.requires_grad
                assert torch.equal(y, plain(x))
    assert torch.is_grad_enabled()


def test_a_call_of_the_module_makes_no_gradients_where_some_weights_stay(make_store: MakeStore) -> None:
    def construct() -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))

    with litrt.Runtime(construct, make_store(construct()), budget="70%") as rt:
        rt.warmup(torch.ones(2, WIDTH))
        assert rt.plan.resident
        assert rt.plan.loads
        assert not rt.module(torch.ones(2, WIDTH)).requires_grad


def test_a_constructor_in_inference_mode_or_with_gradients_off_makes_the_same_model(make_store: MakeStore) -> None:
    plain = Wanted().first
    path = make_store(plain)
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with mode, litrt.Runtime(lambda: nn.Linear(WIDTH, WIDTH), path, budget="min") as rt:
            assert rt.module.weight.requires_grad
            assert torch.equal(rt(torch.ones(2, WIDTH)), plain(torch.ones(2, WIDTH)))


# What is not a constructor of a model.


@pytest.mark.parametrize(
    ("made", "kind"),
    [(None, "NoneType"), ({}, "dict"), (nn.Linear, "type"), ([nn.Linear(2, 2)], "list")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_constructor_returns_is_a_module(made: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"must return an nn\.Module, not {kind}\.$"):
        build(lambda: made)


def test_a_module_in_place_of_its_constructor_is_refused_with_a_hint() -> None:
    with pytest.raises(TypeError, match=r"model_ctor is a Linear: give what makes the model"):
        build(nn.Linear(2, 2))


@pytest.mark.parametrize("construct", [lambda: nn.LazyLinear(3), lambda: nn.LazyBatchNorm1d(affine=False)])
def test_lazy_modules_are_refused(construct: Callable[[], nn.Module]) -> None:
    with pytest.raises(litrt.LitrtError, match=r"lazy module.*no shape yet\. Give every size"):
        build(construct)


def test_a_constructor_is_called_once_and_its_error_comes_through() -> None:
    calls = []

    def construct() -> nn.Module:
        calls.append(1)
        raise RuntimeError("no config")

    with pytest.raises(RuntimeError, match="no config"):
        build(construct)
    assert len(calls) == 1
