"""Quantised weights stream as they are stored: narrow dtypes, packed integers, and tensors that consist of others.

A model here dequantises in its forward, by hand or in a tensor class of its own, and gives what it gives when plain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest
import torch
import torch.nn.functional as F
from conftest import MakeStore
from corpus.case import seeded
from torch import nn
from torch.utils._pytree import tree_map

import litrt
from litrt.placeholder import Placeholder

pytestmark = pytest.mark.usefixtures("poisoned")

WIDTH = 64
BUDGETS = ("min", "50%", "100%")


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check(
    plain: nn.Module,
    path: Path,
    construct: Callable[[], nn.Module],
    x: torch.Tensor,
    budgets: tuple[str, ...] = BUDGETS,
) -> None:
    """Asserts that passes give the plain model's output inside each budget, and read weights where not all stay."""
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(plain(x), expected)
    assert expected.isfinite().all()
    for budget in budgets:
        with litrt.Runtime(construct, path, budget=budget) as rt:
            assert torch.equal(rt(x), expected), budget
            warm = rt.stats()
            for _ in range(2):
                assert torch.equal(rt(x), expected), budget
            stats = rt.stats()
            assert stats.peak_bytes <= stats.budget_bytes
            read_bytes = stats.since(warm).read_bytes
            assert read_bytes == 0 if budget == "100%" else read_bytes > 0 or budget != "min"


# Plain tensors of narrow dtypes.


class Quantised(nn.Module):
    """A layer whose weights a forward makes usable, between two that make them come and go."""

    def __init__(self, use: Callable[[Any, torch.Tensor], torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.use = use
        self.before = nn.Linear(WIDTH, WIDTH)
        for name, weight in weights.items():
            if weight.is_floating_point() or weight.is_complex():
                self.register_parameter(name, nn.Parameter(torch.zeros_like(weight), requires_grad=False))
            else:
                self.register_buffer(name, torch.zeros_like(weight))
        self.after = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.use(self, self.before(x)))


_FLOAT = torch.randn(WIDTH, WIDTH, generator=drawn())
_SCALE = torch.rand(WIDTH, 1, generator=drawn(1)) / 10
_INT8 = torch.randint(-128, 128, (WIDTH, WIDTH), dtype=torch.int8, generator=drawn(2))
_BYTES = torch.randint(0, 120, (WIDTH, WIDTH), dtype=torch.uint8, generator=drawn(3))  # as e4m3fn no NaN
_NIBBLES = torch.randint(0, 256, (WIDTH, WIDTH // 2), dtype=torch.uint8, generator=drawn(4))
_WORDS = torch.randint(-(2**31), 2**31 - 1, (WIDTH, WIDTH // 8), dtype=torch.int32, generator=drawn(5))
_ROWS = torch.arange(5)


def _from_nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1).to(torch.int8) - 8


def _from_words(packed: torch.Tensor) -> torch.Tensor:
    return ((packed[..., None] >> torch.arange(0, 32, 4)) & 0xF).flatten(1) - 8


def _blocks(m: Any, x: torch.Tensor) -> torch.Tensor:
    weight = m.w.float().view(2, WIDTH // 2, 2, WIDTH // 2) * m.s[:, None, :, None]
    return F.linear(x, weight.reshape(WIDTH, WIDTH))


def _scaled_mm(m: Any, x: torch.Tensor) -> torch.Tensor:
    x8, one = x.to(torch.float8_e4m3fn), torch.ones(())
    return torch._scaled_mm(x8, m.w.t(), scale_a=one, scale_b=m.s, out_dtype=torch.float32)


Use = Callable[[Any, torch.Tensor], torch.Tensor]

USES: dict[str, tuple[Use, dict[str, torch.Tensor]]] = {
    "e4m3": (
        lambda m, x: F.linear(x, m.w.to(torch.bfloat16) * m.s),
        {"w": _FLOAT.to(torch.float8_e4m3fn), "s": _SCALE},
    ),
    "e5m2": (lambda m, x: F.linear(x, m.w.float() * m.s), {"w": _FLOAT.to(torch.float8_e5m2), "s": _SCALE}),
    "e4m3 in blocks": (_blocks, {"w": _FLOAT.to(torch.float8_e4m3fn), "s": torch.rand(2, 2, generator=drawn(6))}),
    "scaled product": (_scaled_mm, {"w": _FLOAT.to(torch.float8_e4m3fn), "s": torch.tensor(0.5)}),
    "int8": (lambda m, x: F.linear(x, m.w.to(x.dtype) * m.s), {"w": _INT8, "s": _SCALE}),
    "int8, promoted": (lambda m, x: F.linear(x, m.w * m.s), {"w": _INT8, "s": _SCALE}),
    "int8 product": (
        lambda m, x: torch._int_mm((x * 10).to(torch.int8), m.w.t()) * m.s.t(),
        {"w": _INT8, "s": _SCALE},
    ),
    "int8 packed product": (
        lambda m, x: torch._weight_int8pack_mm(x.bfloat16(), m.w, m.s.flatten().bfloat16()).float(),
        {"w": _INT8, "s": _SCALE},
    ),
    "int8 rows": (lambda m, x: x + m.w[_ROWS] * m.s[_ROWS], {"w": _INT8, "s": _SCALE}),
    "two in a byte": (lambda m, x: F.linear(x, _from_nibbles(m.w) * m.s), {"w": _NIBBLES, "s": _SCALE}),
    "eight in a word": (lambda m, x: F.linear(x, _from_words(m.w) * m.s), {"w": _WORDS, "s": _SCALE}),
    "a table of values": (
        lambda m, x: F.linear(x, m.table[m.w.long() % 16]),
        {"w": _BYTES, "table": torch.randn(16, generator=drawn(7))},
    ),
    "shifted": (lambda m, x: F.linear(x, torch.ldexp(m.f, m.w % 4)), {"f": _FLOAT, "w": _INT8}),
    "bytes of e4m3": (lambda m, x: x + (m.w.view(torch.uint8) & 0x7F)[:5], {"w": _FLOAT.to(torch.float8_e4m3fn)}),
    "bytes as e4m3": (lambda m, x: F.linear(x, m.w.view(torch.float8_e4m3fn).float()), {"w": _BYTES}),
    "rows of bytes as e4m3": (lambda m, x: x + m.w.view(torch.float8_e4m3fn)[3].float(), {"w": _BYTES}),
    "bytes as wider values": (lambda m, x: x + m.w.view(torch.int16).float().sum(-1), {"w": _BYTES}),
    "bool": (lambda m, x: F.linear(x, torch.where(m.w, m.f, -m.f)), {"w": _FLOAT > 0, "f": _FLOAT}),
    "complex": (
        lambda m, x: torch.view_as_real(x.to(torch.complex64) @ m.w).sum(-1),
        {"w": torch.complex(_FLOAT, _FLOAT.t().contiguous())},
    ),
    "quantised on the way": (
        lambda m, x: F.linear(x, torch.fake_quantize_per_channel_affine(m.f, m.s.flatten(), m.z, 0, -128, 127)),
        {"f": _FLOAT, "s": _SCALE, "z": torch.zeros(WIDTH, dtype=torch.int32)},
    ),
}


@pytest.mark.parametrize("name", USES)
def test_narrow_weights_stream_as_they_are(name: str, make_store: MakeStore) -> None:
    use, weights = USES[name]
    plain = Quantised(use, weights).eval()
    plain.load_state_dict(weights, strict=False)
    path = make_store(plain)
    stored = litrt.open_store(path)
    assert all(stored[weight].nbytes == tensor.nbytes for weight, tensor in weights.items())
    x = torch.randn(32 if "product" in name else 5, WIDTH)
    check(plain, path, lambda: Quantised(use, weights), x, ("min", "50%"))


# Tensors that consist of others.


class Scaled(torch.Tensor):
    """int8 values with a scale for each row, as libraries for quantisation write such classes."""

    values: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Self:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values, self.scale = values, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], context: None, size: Any, stride: Any) -> Self:
        return cls(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(func(args[0].values), func(args[0].scale))
        return func(*tree_map(lambda a: a.dequantised() if isinstance(a, cls) else a, args), **(kwargs or {}))

    def dequantised(self) -> torch.Tensor:
        return self.values * self.scale

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)


def quantised() -> nn.Module:
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    for layer in module:
        layer.weight = nn.Parameter(Scaled.of(layer.weight), requires_grad=False)
    return module


@pytest.fixture
def plain() -> nn.Module:
    with seeded():
        return quantised().eval()


@pytest.fixture
def path(plain: nn.Module, make_store: MakeStore) -> Path:
    return make_store(plain)


def test_what_a_weight_consists_of_is_stored_and_streams(plain: nn.Module, path: Path) -> None:
    stored = litrt.open_store(path)
    assert list(stored)[:3] == ["0.weight.values", "0.weight.scale", "0.bias"]
    assert stored["0.weight.values"].dtype == torch.int8
    check(plain, path, quantised, torch.randn(5, WIDTH))


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_weight_that_consists_of_others_keeps_its_class(budget: str, plain: nn.Module, path: Path) -> None:
    x = torch.randn(3, WIDTH)
    with litrt.Runtime(quantised, path, budget=budget) as rt, torch.no_grad():
        rt.warmup(x)
        weight = rt.module[1].weight
        assert isinstance(weight, Scaled)
        assert isinstance(weight, nn.Parameter)
        if budget != "50%":
            assert isinstance(weight.values, Placeholder) == (budget == "min")
        state = dict(rt.state_dict())
        assert state.keys() == plain.state_dict().keys()
        for name, tensor in plain.state_dict().items():
            assert type(state[name]) is type(tensor)
            assert torch.equal(state[name], tensor)
        module = rt.detach()
    assert torch.equal(module(x), plain(x))


def test_a_file_of_such_weights_is_converted(plain: nn.Module, path: Path, tmp_path: Path) -> None:
    torch.save(plain.state_dict(), tmp_path / "model.pt")
    with torch.serialization.safe_globals([Scaled]):
        litrt.convert(tmp_path / "model.pt", tmp_path / "other.zarr", progress=False)
    assert list(litrt.open_store(tmp_path / "other.zarr")) == list(litrt.open_store(path))
    check(plain, tmp_path / "other.zarr", quantised, torch.randn(5, WIDTH), ("min",))


def test_a_constructor_that_quantises_needs_a_store_of_quantised_weights(make_store: MakeStore, path: Path) -> None:
    def construct() -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))

    with pytest.raises(litrt.SkeletonError, match=r"missing in the store \(8\): 0\.weight\.values, 0\.weight\.scale"):
        litrt.Runtime(quantised, make_store(construct(), "plain.zarr"))
    with pytest.raises(litrt.SkeletonError, match=r"unexpected, not in the model \(8\): 0\.weight\.values"):
        litrt.Runtime(construct, path)


def test_weights_that_consist_of_others_are_served_as_they_are_stored(path: Path) -> None:
    with pytest.raises(litrt.LitrtError, match=r"cannot serve '0\.weight' in another dtype: it is a Scaled"):
        litrt.Runtime(quantised, path, dtype="bfloat16")


class Logged(torch.Tensor):
    """A tensor with operators of its own, and memory like any other."""


def test_a_weight_with_operators_of_its_own_is_refused(make_store: MakeStore) -> None:
    def construct() -> nn.Module:
        module = nn.Linear(2, 1, bias=False)
        module.weight = nn.Parameter(torch.tensor([[1.0, 2.0]]).as_subclass(Logged))
        return module

    with pytest.raises(litrt.LitrtError, match=r"cannot serve 'weight': it is a Logged.*after litrt\.Runtime"):
        litrt.Runtime(construct, make_store({"weight": torch.ones(1, 2)}))


class Lazily(Mapping[str, torch.Tensor]):
    """A checkpoint that makes its tensors when they are asked for."""

    def __init__(self, module: nn.Module) -> None:
        self._state = module.state_dict()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
def test_what_cannot_be_stored_is_refused(plain: nn.Module, tmp_path: Path) -> None:
    class Shared(Scaled):
        def full_tensor(self) -> torch.Tensor:
            return self.dequantised()

    store = tmp_path / "model.zarr"
    weight = plain[0].weight.detach()
    with pytest.raises(TypeError, match=r"'0\.weight' is a Scaled, which consists of other tensors: pass a dict"):
        litrt.convert(Lazily(plain), store, progress=False)
    with pytest.raises(TypeError, match=r"'w' is a Shared, shared out over processes.*full_tensor"):
        litrt.convert({"w": Shared(weight.values, weight.scale)}, store, progress=False)
    with pytest.raises(TypeError, match=r"two tensors 'w\.scale'"):
        litrt.convert({"w.scale": torch.ones(1), "w": weight}, store, progress=False)
    with pytest.raises(TypeError, match=r"'w' is quantised, which cannot be stored"):
        litrt.convert({"w": torch.quantize_per_tensor(_FLOAT, 0.1, 0, torch.qint8)}, store, progress=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_torchao_quantised(config: str, dtype: torch.dtype, make_store: MakeStore) -> None:
    torchao = pytest.importorskip("torchao.quantization")

    def construct() -> nn.Module:
        module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4))).to(dtype)
        torchao.quantize_(module, getattr(torchao, config)())
        return module

    plain = construct().eval()
    assert type(plain[0].weight) is not nn.Parameter
    check(plain, make_store(plain), construct, torch.randn(2, 3, WIDTH, generator=drawn(8)).to(dtype))
