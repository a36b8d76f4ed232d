"""Methods and parts that are called beside the model itself: their calls are passes once they were warmed up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeStore
from corpus.case import seeded
from torch import nn

import litrt
from litrt.testing import FakeDevice

WIDTH = 48


class Coder(nn.Module):
    """Is called through methods; its forward calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
        self.quant = nn.Linear(WIDTH, WIDTH)
        self.decoder = nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, batch_first=True)
        self.out = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.quant(self.encoder(x)))

    def decode(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        result: torch.Tensor = self.out(self.decoder(x[None] * scale)[0])
        return result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))

    def shifted(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Pipe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coder = Coder()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.coder(x)
        return result


X = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)
CALLS: dict[str, Callable[[Any], torch.Tensor]] = {
    "forward": lambda module: module(X),
    "encode": lambda module: module.encode(X),
    "decode": lambda module: module.decode(X, scale=2.0),
    "encoder": lambda module: module.encoder(X),
    "decoder": lambda module: module.decoder(X[None]),
    "out.forward": lambda module: module.out(X),
}
SAMPLES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "forward": ((X,), {}),
    "encode": ((X,), {}),
    "decode": ((X,), {"scale": 2.0}),
    "encoder": ((X,), {}),
    "decoder": ((X[None],), {}),
    "out.forward": ((X,), {}),
}
DEVICES: dict[str, Any] = {"cpu": lambda: "cpu", "double": FakeDevice}


@pytest.fixture
def plain() -> Coder:
    with seeded():
        return Coder().eval()


@pytest.fixture
def path(plain: nn.Module, make_store: MakeStore) -> Path:
    return make_store(plain)


def warm(rt: litrt.Runtime, *methods: str) -> None:
    for method in methods:
        args, kwargs = SAMPLES[method]
        rt.warmup(*args, method=method, **kwargs)


@pytest.mark.usefixtures("poisoned", "rough_plans")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("budget", ["min", "60%"])
def test_what_was_warmed_up_is_read_ahead(device: str, budget: str, path: Path, plain: Coder) -> None:
    with litrt.Runtime(Coder, path, budget=budget, device=DEVICES[device](), strict=True) as rt:
        warm(rt, *CALLS)
        before = rt.stats()
        for name in [*CALLS, *reversed(CALLS), "decode", "decode", "forward", "encode"]:
            with torch.no_grad():
                assert torch.equal(CALLS[name](rt.module), CALLS[name](plain)), name
        counts = rt.stats().since(before)
        assert counts.n_passes == 2 * len(CALLS) + 4
        assert counts.n_faults == 0
        assert counts.read_bytes + counts.link_bytes > 0
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes


@pytest.mark.usefixtures("poisoned", "rough_plans")
def test_what_was_not_is_loaded_on_demand(path: Path, plain: Coder) -> None:
    with litrt.Runtime(Coder, path, budget="60%") as rt, torch.no_grad():
        warm(rt, "decode")
        before = rt.stats()
        assert torch.equal(rt.module.encode(X), plain.encode(X))
        assert rt.stats().since(before).n_passes == 0
        assert torch.equal(rt.module.decode(X), plain.decode(X))
        assert rt.stats().since(before).n_passes == 1


def test_a_method_of_a_part_is_named_with_dots(plain: Coder, make_store: MakeStore) -> None:
    path = make_store({f"coder.{name}": tensor for name, tensor in plain.state_dict().items()})
    with litrt.Runtime(Pipe, path, budget="60%", strict=True) as rt, torch.no_grad():
        rt.warmup(X, method="coder.decode")
        for _ in range(2):
            assert torch.equal(rt.module.coder.decode(X), plain.decode(X))  # type: ignore[operator, union-attr]
        assert rt.stats().n_passes == 2


def test_a_method_inside_of_a_pass_is_a_part_of_it(path: Path, plain: Coder) -> None:
    with litrt.Runtime(Coder, path, budget="60%") as rt, torch.no_grad():
        warm(rt, "decode", "forward")
        assert torch.equal(rt(X), plain(X))
        assert rt.stats().n_passes == 1


@pytest.mark.parametrize("method", ["decod", "coder.decode", "quant.weight", "encoder.9", "", "out.", "forward.real"])
def test_a_method_that_is_not_there_changes_nothing(method: str, path: Path, plain: Coder) -> None:
    with litrt.Runtime(Coder, path, budget="60%") as rt, torch.no_grad():
        warm(rt, "forward")
        plan = rt.plan
        with pytest.raises(ValueError, match=f"Coder has no method '{method}'.*such as"):
            rt.warmup(X, method=method)
        assert rt.plan is plan


def test_a_method_that_uses_no_weights_is_refused(path: Path, plain: Coder) -> None:
    with litrt.Runtime(Coder, path, budget="60%") as rt, torch.no_grad():
        warm(rt, "forward")
        with pytest.raises(litrt.LitrtError, match=r"'shifted' used no weights.*warm up what uses them"):
            rt.warmup(X, method="shifted")
        assert torch.equal(rt.module.shifted(X), plain.shifted(X))  # type: ignore[operator]
        for _ in range(2):
            before = rt.stats()
            assert torch.equal(rt(X), plain(X))
        assert rt.stats().since(before).n_faults == 0


def test_a_warm_up_in_a_pass_is_refused(path: Path) -> None:
    with litrt.Runtime(Coder, path, budget="60%") as rt:
        handle = rt.module.quant.register_forward_hook(lambda *_: rt.warmup(X))  # type: ignore[operator, union-attr]
        with pytest.raises(litrt.LitrtError, match="inside of another one"):
            rt.warmup(X)
        handle.remove()
        rt.warmup(X)


def test_nothing_is_left_of_the_wrappers(path: Path, plain: Coder) -> None:
    rt = litrt.Runtime(Coder, path, budget="60%")
    own = [set(vars(part)) for part in plain.modules()]
    warm(rt, "decode", "decoder", "encoder")
    with pytest.raises(litrt.LitrtError, match="cannot copy"):
        copy.deepcopy(rt.module.encoder)
    module = rt.detach()
    assert [set(vars(part)) for part in module.modules()] == own
    with torch.no_grad():
        assert all(torch.equal(call(module), call(plain)) for call in CALLS.values())
    assert isinstance(copy.deepcopy(module), Coder)


def test_all_that_fits_has_no_wrappers_until_it_does_not(path: Path, plain: Coder) -> None:
    with litrt.Runtime(Coder, path, budget="100%") as rt, torch.no_grad():
        warm(rt, "decode", "forward")
        assert not {"forward", "decode", "__deepcopy__"} & set(vars(rt.module))
        rt.set_budget("60%")
        before = rt.stats()
        assert torch.equal(rt.module.decode(X), plain.decode(X))  # type: ignore[operator]
        assert rt.stats().since(before).n_passes == 1
