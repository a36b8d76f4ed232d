"""On a GPU: the model that is resident on the same device is what everything is compared with. Run with -m gpu."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeStore
from corpus import hf
from corpus.case import NotBuilt, outputs
from corpus.case import seeded as repeated
from corpus.check import perturbed
from test_corpus import model_types
from test_equivalence import CASES, EarlyExit, assert_same, plain_model, seeded, x
from torch import nn
from torch.utils._pytree import tree_map

import litrt
from litrt.cuda import CudaDevice, CudaEvent

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BUDGETS = ["min", "50%", "100%"]
WIDTH = 1024
N_LAYERS = 12


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(N_LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture
def plain() -> Iterator[nn.Module]:
    yield plain_model(Chain).cuda()
    torch.cuda.empty_cache()


@pytest.fixture
def path(plain: nn.Module, make_store: MakeStore) -> Path:
    return make_store(plain)


def sample() -> torch.Tensor:
    return x(32, WIDTH).cuda()


def on_gpu(value: Any) -> Any:
    return tree_map(lambda part: part.cuda() if isinstance(part, torch.Tensor) else part, value)


def check(construct: Callable[[], nn.Module], plain: nn.Module, path: Path, call: Callable[[nn.Module], Any]) -> None:
    with torch.no_grad():
        expected = call(plain)
        for budget in BUDGETS:
            try:
                with litrt.Runtime(construct, path, budget=budget, device="cuda") as rt:
                    for _ in range(4):
                        assert_same(call(rt.module), expected)
                    stats = rt.stats()
                    assert stats.link_bytes > 0
                    assert stats.peak_bytes <= stats.budget_bytes
            except litrt.BudgetError:
                assert budget == "50%"  # which can be too little for a small model


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].repeats and "numpy" not in name])
def test_outputs_are_those_of_the_resident_model(name: str, make_store: MakeStore) -> None:
    case = CASES[name]
    plain = plain_model(case.construct).cuda()
    args = on_gpu(case.inputs())
    try:
        with torch.no_grad():
            case.call(plain, *args)
    except RuntimeError as error:
        pytest.skip(f"the model itself does not run on a GPU: {error}")
    check(seeded(case.construct), plain, make_store(plain), lambda module: case.call(module, *args))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", model_types())
def test_architectures(model_type: str, make_store: MakeStore) -> None:
    try:
        case = hf.case_of(model_type)
    except NotBuilt as error:
        pytest.skip(str(error))
    plain = case.build()
    plain.load_state_dict(perturbed(plain), strict=False)
    path = make_store(plain)
    inputs = on_gpu(case.inputs(0))

    def call(module: nn.Module) -> list[torch.Tensor]:
        with repeated():
            return outputs(module(**inputs))

    check(case.build, plain.cuda(), path, call)


@pytest.mark.parametrize("budget", ["25%", "75%"])
def test_the_device_holds_no_more_than_the_budget_and_the_activations(
    budget: str, plain: nn.Module, path: Path
) -> None:
    y = sample()
    with torch.no_grad():
        plain(y)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        plain(y)
        activation_bytes = torch.cuda.max_memory_allocated() - before
    with litrt.Runtime(Chain, path, budget=budget, device="cuda") as rt:
        rt.warmup(y)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            rt(y)
        grown = torch.cuda.max_memory_allocated() - before
        assert grown <= rt.stats().budget_bytes + activation_bytes + (2 << 20)


def test_a_steady_pass_does_not_wait_for_the_device(path: Path) -> None:
    y = sample()
    with litrt.Runtime(Chain, path, budget="40%", device="cuda") as rt:
        rt.warmup(y)
        for _ in range(3):
            rt(y)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                for _ in range(3):
                    rt(y)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [event.key for event in profile.key_averages() if event.key.endswith("Synchronize")]
    assert not waits


@pytest.mark.parametrize("slow", ["copies", "compute", "both"])
def test_delays_make_no_difference(slow: str, plain: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    copy = CudaDevice.copy

    def delayed(self: CudaDevice, *args: Any) -> None:
        with torch.cuda.stream(self._copies):
            torch.cuda._sleep(rng.randrange(2_000_000))
        copy(self, *args)

    if slow != "compute":
        monkeypatch.setattr(CudaDevice, "copy", delayed)
    y = sample()
    with torch.no_grad(), litrt.Runtime(Chain, path, budget="30%", device="cuda") as rt:
        if slow != "copies":
            for layer in rt.module.layers:
                layer.register_forward_hook(lambda *_: torch.cuda._sleep(rng.randrange(2_000_000)))
        for number in range(12):
            stream = torch.cuda.Stream() if number % 3 == 2 else torch.cuda.current_stream()
            with torch.cuda.stream(stream):
                stream.wait_stream(torch.cuda.default_stream())
                got = rt(y)
            torch.cuda.default_stream().wait_stream(stream)
            assert torch.equal(got, plain(y))


@pytest.mark.parametrize("rule", ["wait", "waits"])
def test_without_the_protocol_values_are_wrong(
    rule: str, plain: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rule == "wait":
        copy = CudaDevice.copy

        def slow(self: CudaDevice, *args: Any) -> None:
            with torch.cuda.stream(self._copies):
                torch.cuda._sleep(5_000_000)
            copy(self, *args)

        monkeypatch.setattr(CudaDevice, "copy", slow)
        monkeypatch.setattr(CudaDevice, "wait", lambda self, event, **_: None)
    else:
        monkeypatch.setattr(CudaDevice, "_queue_waits", lambda self, waits: None)
    y = sample()
    with torch.no_grad(), litrt.Runtime(Chain, path, budget="20%", device="cuda") as rt:
        rt.warmup(y)
        if rule == "waits":
            for layer in rt.module.layers:
                layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(5_000_000))
        assert any(not torch.equal(rt(y), plain(y)) for _ in range(6))


def test_a_fault_and_an_exception_while_copies_are_under_way(plain: nn.Module, path: Path) -> None:
    y = sample()
    with litrt.Runtime(Chain, path, budget="30%", device="cuda") as rt, torch.no_grad():
        rt.warmup(y)
        name = rt.plan.segments[rt.plan.loads[-1].segment].name
        assert torch.equal(rt.module.get_parameter(name) + 0, plain.get_parameter(name))

        def fail(*_: Any) -> None:
            raise torch.OutOfMemoryError("of activations")

        handle = rt.module.layers[5].register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            rt(y)
        handle.remove()
        assert torch.equal(rt(y), plain(y))


def test_early_exits(make_store: MakeStore) -> None:
    plain = plain_model(EarlyExit).cuda()
    width = plain.state_dict()["gate.weight"].shape[1]
    with litrt.Runtime(seeded(EarlyExit), make_store(plain), budget="90%", device="cuda") as rt, torch.no_grad():
        for number in (2, 5, 1, 2, 2, 1, 4, 4, 3):
            y = x(number, width, seed=number).cuda()
            assert_same(rt(y), plain(y))


def test_auto_leaves_room_for_activations(plain: nn.Module, path: Path) -> None:
    with litrt.Runtime(Chain, path, budget="auto", device="cuda") as rt, torch.no_grad():
        rt.warmup(sample())
        assert torch.equal(rt(sample()), plain(sample()))
        assert rt.stats().budget_bytes == sum(segment.size_bytes for segment in rt.plan.segments)


def test_weights_are_cast_on_the_device(plain: nn.Module, path: Path) -> None:
    y = sample().bfloat16()
    with litrt.Runtime(Chain, path, budget="50%", device="cuda", dtype=torch.bfloat16) as rt, torch.no_grad():
        expected = plain.bfloat16()(y)
        for _ in range(3):
            assert torch.equal(rt(y), expected)


def test_events_go_back_to_their_pool(path: Path) -> None:
    y = sample()
    with litrt.Runtime(Chain, path, budget="40%", device="cuda") as rt:
        rt.warmup(y)
        for _ in range(3):
            rt(y)
        torch.cuda.synchronize()
        made = []
        event = torch.cuda.Event

        def count(*args: Any, **kwargs: Any) -> Any:
            made.append(1)
            return event(*args, **kwargs)

        torch.cuda.Event = count  # type: ignore[misc, assignment]
        try:
            for _ in range(3):
                rt(y)
                torch.cuda.synchronize()
        finally:
            torch.cuda.Event = event  # type: ignore[misc]
        assert not made
        assert isinstance(rt._device, CudaDevice)
        assert isinstance(rt._device.mark(), CudaEvent)


@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_are_not_compiled_again_after_the_second_pass(plain: nn.Module, path: Path) -> None:
    y = sample()
    torch._dynamo.reset()
    with litrt.Runtime(Chain, path, budget="50%", device="cuda") as rt, torch.no_grad():
        for layer in rt.module.layers:
            layer.compile(backend="eager")
        for _ in range(2):
            rt(y)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                assert torch.equal(rt(y), plain(y))
    torch._dynamo.reset()
