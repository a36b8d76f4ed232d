"""A weight that is not there: says what it is, loads when an operator needs it, refuses writes."""

from __future__ import annotations

import copy
import ctypes
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MakeStore
from torch import nn

import litrt
from litrt.placeholder import Placeholder

WIDTH = 16


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.a.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.b(self.a(x)))


@pytest.fixture(autouse=True, params=[True, False], ids=["gradients", "no gradients"])
def gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled(request.param):
        yield


@pytest.fixture
def plain() -> nn.Module:
    return Model().eval()


@pytest.fixture
def rt(plain: nn.Module, make_store: MakeStore, poisoned: None) -> Iterator[litrt.Runtime]:
    with litrt.Runtime(Model, make_store(plain), budget="min") as runtime:
        yield runtime


@pytest.fixture
def w(rt: litrt.Runtime) -> torch.Tensor:
    return rt.module.a.weight


@pytest.fixture
def real(plain: nn.Module) -> torch.Tensor:
    return plain.a.weight.detach()


def test_a_placeholder_says_what_the_weight_is(rt: litrt.Runtime, plain: nn.Module) -> None:
    state = dict(plain.named_parameters()) | dict(plain.named_buffers())
    found = dict(rt.module.named_parameters()) | dict(rt.module.named_buffers())
    assert list(found) == list(state)
    for name, w in found.items():
        real = state[name]
        assert isinstance(w, Placeholder), name
        assert isinstance(w, nn.Parameter) == isinstance(real, nn.Parameter), name
        assert (w.shape, w.dtype, w.device) == (real.shape, real.dtype, real.device)
        assert w.requires_grad == real.requires_grad
        assert (w.stride(), w.numel(), w.dim(), w.nbytes, w.itemsize) == (
            real.stride(), real.numel(), real.dim(), real.nbytes, real.itemsize,
        )  # fmt: skip
        assert (w.is_contiguous(), w.is_leaf, w.is_floating_point()) == (True, True, real.is_floating_point())
        assert w.grad is None
    assert rt.stats().read_bytes == 0


VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "row": lambda w: w[3],
    "rows": lambda w: w[3:7, ::2],
    "None": lambda w: w[None, ..., 1],
    "row by tensor": lambda w: w[torch.tensor(3)],
    "chunk": lambda w: w.chunk(3)[2],
    "split": lambda w: torch.split(w, 5)[1],
    "unbind": lambda w: w.unbind()[4],
    "view": lambda w: w.view(-1),
    "reshape": lambda w: torch.reshape(w, (4, 64)),
    "transpose": lambda w: torch.transpose(w, 0, 1),
    "permute": lambda w: w.permute(1, 0),
    "expand": lambda w: w[0].expand(5, -1),
    "narrow": lambda w: w.narrow(1, 2, 3),
    "unsqueeze": lambda w: w.unsqueeze(0).squeeze(0),
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "diagonal": lambda w: w.diagonal(),
    "as_strided": lambda w: w.as_strided((3, 3), (17, 2), 5),
    "to what it is": lambda w: w.to(torch.float32).float().cpu().contiguous(),
    "view of a view": lambda w: w.t()[2:5].unflatten(1, (2, 8)).movedim(0, 2)[1],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_stay_lazy_and_have_the_right_values(
    name: str, rt: litrt.Runtime, w: torch.Tensor, real: torch.Tensor
) -> None:
    view, expected = VIEWS[name](w), VIEWS[name](real)
    assert isinstance(view, Placeholder)
    assert (view.shape, view.stride(), view.storage_offset()) == (
        expected.shape, expected.stride(), expected.storage_offset(),
    )  # fmt: skip
    assert rt.stats().read_bytes == 0
    assert torch.equal(view.clone(), expected)
    assert rt.stats().read_bytes == real.nbytes


def test_an_operator_loads_what_it_needs_and_nothing_else(
    rt: litrt.Runtime, w: torch.Tensor, real: torch.Tensor
) -> None:
    y = w + 1
    assert type(y) is torch.Tensor
    assert torch.equal(y, real + 1)
    assert rt.stats().read_bytes == real.nbytes


def test_the_result_of_an_operator_can_be_written_to(w: torch.Tensor, real: torch.Tensor) -> None:
    copied = w.clone()
    copied.zero_()
    kept = w.to(torch.float32, copy=True).fill_(3)
    assert (kept == 3).all()
    assert torch.equal(w + 0, real)


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "zero_": lambda w: w.zero_(),
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(WIDTH, WIDTH)),
    "iadd": lambda w: w.__iadd__(1),
    "imul": lambda w: w.__imul__(2),
    "setitem": lambda w: w.__setitem__(0, 1.0),
    "data": lambda w: setattr(w, "data", torch.zeros(WIDTH, WIDTH)),
    "out": lambda w: torch.add(torch.ones(WIDTH, WIDTH), 1, out=w),
    "outs": lambda w: torch.max(torch.ones(WIDTH, WIDTH), 0, out=(w[0], torch.empty(WIDTH, dtype=torch.long))),
    "init": lambda w: nn.init.normal_(w),
    "view": lambda w: w[3].mul_(2),
    "view of a view": lambda w: w.t()[2:].fill_(0),
    "relu_": lambda w: F.relu_(w),
    "functional in-place": lambda w: F.relu(w, inplace=True),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "through dispatch": lambda w: torch.ops.aten.mul_.Scalar(w, 2.0),
    "out through dispatch": lambda w: torch.ops.aten.add.out(torch.ones(16, 16), torch.ones(16, 16), out=w),
    "resize_": lambda w: w.resize_(3),
    "set_": lambda w: w.set_(torch.zeros(3)),
    "index_copy_": lambda w: w.index_copy_(0, torch.tensor([1]), torch.zeros(1, WIDTH)),
    "masked_fill_": lambda w: w.masked_fill_(torch.ones(WIDTH, WIDTH, dtype=torch.bool), 1),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_refused_with_the_name_of_the_weight(
    name: str, rt: litrt.Runtime, w: torch.Tensor, real: torch.Tensor
) -> None:
    with pytest.raises(litrt.WeightWriteError, match=r"'a\.weight'.*read-only") as caught:
        WRITES[name](w)
    assert caught.value.name == "a.weight"
    assert torch.equal(w + 0, real)


def doubled_sum(w: torch.Tensor) -> torch.Tensor:
    """Writes to its argument, and says so nowhere."""
    if torch.overrides.has_torch_function_unary(w):
        return torch.overrides.handle_torch_function(doubled_sum, (w,), w)
    return w.mul_(2).sum()


def test_a_function_that_does_not_say_that_it_writes_is_refused(w: torch.Tensor, real: torch.Tensor) -> None:
    with pytest.raises(litrt.WeightWriteError, match=r"'a\.weight'.*doubled_sum"):
        doubled_sum(w)
    assert torch.equal(w + 0, real)


STATISTICS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "batch norm": lambda x, mean, var: F.batch_norm(x, mean, var, training=True),
    "batch norm of torch": lambda x, mean, var: torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, False),
    "batch norm through dispatch": lambda x, mean, var: torch.ops.aten.native_batch_norm.default(
        x, None, None, mean, var, True, 0.1, 1e-5
    ),
    "instance norm": lambda x, mean, var: F.instance_norm(x[None], mean[:4], var[:4]),
    "instance norm of torch": lambda x, mean, var: torch.instance_norm(
        x[None], None, None, mean[:4], var[:4], True, 0.1, 1e-5, False
    ),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_a_kernel_that_does_not_say_that_it_updates_statistics_is_refused(
    name: str, rt: litrt.Runtime, plain: nn.Module
) -> None:
    norm, x = rt.module.norm, torch.randn(4, WIDTH)
    with pytest.raises(litrt.WeightWriteError, match=r"'norm\.running_mean'.*_norm"):
        STATISTICS[name](x, norm.running_mean, norm.running_var)
    assert torch.equal(norm.running_mean + 0, plain.norm.running_mean)
    assert torch.equal(norm.running_var + 0, plain.norm.running_var)
    assert torch.equal(norm(x), plain.norm(x)), "which uses them and updates nothing"


RETURNED: dict[str, Callable[[torch.Tensor], Any]] = {
    "positive": torch.positive,
    "resolve_conj": torch.resolve_conj,
    "dropout": lambda w: F.dropout(w, 0.5, False),
    "in a list": lambda w: torch.broadcast_tensors(w, torch.ones(1))[0],
}


@pytest.mark.parametrize("name", RETURNED)
def test_an_operator_that_returns_what_it_was_given_returns_a_placeholder(
    name: str, rt: litrt.Runtime, w: torch.Tensor, real: torch.Tensor
) -> None:
    returned = RETURNED[name](w)
    assert isinstance(returned, Placeholder)
    with pytest.raises(litrt.WeightWriteError):
        returned.zero_()
    rt.module.b(torch.randn(1, WIDTH))  # where the budget is so small, it takes the place of the other
    assert torch.equal(returned + 0, real)


def test_a_kernel_that_updates_statistics_is_refused(rt: litrt.Runtime) -> None:
    rt.module.norm.train()
    with pytest.raises(litrt.WeightWriteError, match=r"norm\.(num_batches_tracked|running_mean)"):
        rt(torch.randn(4, WIDTH))


@pytest.mark.parametrize("copier", [copy.copy, pickle.dumps], ids=lambda copier: copier.__name__)
def test_a_placeholder_is_neither_copied_nor_pickled(
    copier: Callable[[Any], Any], rt: litrt.Runtime, w: torch.Tensor
) -> None:
    with pytest.raises(litrt.LitrtError, match=r"cannot pickle 'a\.weight'"):
        copier(w)
    assert rt.stats().read_bytes == 0


@pytest.mark.parametrize(
    "ask",
    [
        lambda w: w.data_ptr(),
        lambda w: w[3].data_ptr(),
        lambda w: w.untyped_storage(),
        lambda w: w.storage(),
        lambda w: w.__cuda_array_interface__,
    ],
)
def test_the_memory_of_a_placeholder_is_not_given_away(
    ask: Callable[[torch.Tensor], Any], rt: litrt.Runtime, w: torch.Tensor
) -> None:
    with pytest.raises(litrt.LitrtError, match=r"cannot give the memory of 'a\.weight'.*w\.clone\(\).*state_dict"):
        ask(w)
    assert rt.stats().read_bytes == 0


def test_weights_are_not_saved_from_where_they_were_a_moment_ago(rt: litrt.Runtime, tmp_path: Path) -> None:
    save = pytest.importorskip("safetensors.torch")
    for write in (save.save_file, lambda state, path: save.save_model(rt.module, path)):
        with pytest.raises(litrt.LitrtError, match=r"cannot give the memory of .*rt\.state_dict\(\)"):
            write(rt.module.state_dict(), tmp_path / "model.safetensors")
    state = dict(rt.state_dict())
    save.save_file(state, tmp_path / "model.safetensors")
    loaded = save.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_copy_of_a_part_is_plain_and_the_users_own(rt: litrt.Runtime) -> None:
    rt.module.a.weight.note = ["kept"]
    copied, (tied, other) = copy.deepcopy(rt.module.a), copy.deepcopy([rt.module.a.weight, rt.module.a.weight])
    assert tied is other
    assert type(copied.weight) is nn.Parameter
    assert copied.weight.requires_grad == rt.module.a.weight.requires_grad
    assert copied.weight.note == ["kept"]
    assert copied.weight.note is not rt.module.a.weight.note
    y = torch.randn(3, WIDTH)
    assert torch.equal(copied(y), rt.module.a(y))
    with torch.no_grad():
        copied.weight.zero_()
    assert rt.module.a.weight.any(), "the copy shares no memory with the weight"


def test_a_module_whose_forward_is_wrapped_is_not_copied(rt: litrt.Runtime) -> None:
    with pytest.raises(litrt.LitrtError, match=r"cannot copy a module that litrt runs.*another litrt\.Runtime"):
        copy.deepcopy(rt.module)


def test_to_set_a_weight_to_itself_is_no_write(rt: litrt.Runtime, w: torch.Tensor) -> None:
    with torch.no_grad():
        assert w.set_(w) is w
        with pytest.raises(litrt.WeightWriteError):
            w.set_(torch.zeros(WIDTH, WIDTH))


def test_repr_names_the_weight_and_loads_nothing(rt: litrt.Runtime, w: torch.Tensor) -> None:
    said = repr(w)
    assert "'a.weight'" in said
    assert "(16, 16)" in said
    assert "torch.float32" in said
    assert str(w) == said
    assert f"{w}" == said
    assert "Linear" in repr(rt.module)
    assert rt.stats().read_bytes == 0


def test_state_dict_and_parameters_load_nothing(rt: litrt.Runtime, plain: nn.Module) -> None:
    state = rt.module.state_dict()
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    assert sum(parameter.numel() for parameter in rt.module.parameters()) == sum(
        parameter.numel() for parameter in plain.parameters()
    )
    assert rt.stats().read_bytes == 0
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value)


def test_after_close_a_use_is_an_error_and_metadata_is_not(plain: nn.Module, make_store: MakeStore) -> None:
    rt = litrt.Runtime(Model, make_store(plain), budget="min")
    w = rt.module.a.weight
    rt.close()
    assert w.shape == (WIDTH, WIDTH)
    assert "'a.weight'" in repr(w)
    with pytest.raises(litrt.ClosedError, match="closed"):
        w + 1
    with pytest.raises(litrt.ClosedError, match="closed"):
        rt(torch.randn(2, WIDTH))
    with pytest.raises(litrt.ClosedError, match="closed"):
        rt.warmup(torch.randn(2, WIDTH))


@pytest.mark.parametrize(
    "use",
    [
        lambda w: torch.add(w, 1),
        lambda w: F.linear(torch.ones(3, WIDTH), w),
        lambda w: torch.ops.aten.mm(torch.ones(3, WIDTH), w),
        lambda w: w[3] * 2,
        lambda w: torch.cat([w, w.t()]),
        lambda w: w.t().chunk(2)[1].contiguous(),
        lambda w: torch.stack(w.unbind()),
        lambda w: torch.view_as_complex(w.view(WIDTH, 8, 2)).abs(),
    ],
)
def test_callers_in_cpp_get_the_right_values(
    use: Callable[[torch.Tensor], torch.Tensor], w: torch.Tensor, real: torch.Tensor
) -> None:
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        y = use(w)
    assert torch.equal(y.clone(), use(real))


MEMORY: dict[str, Callable[[torch.Tensor], Any]] = {
    "numpy": lambda w: w.detach().numpy().copy(),
    "numpy asarray": lambda w: np.array(np.asarray(w.detach())),
    "array interface": lambda w: np.array(w.detach()),
    "tolist": lambda w: np.array(w.tolist(), dtype=np.float32),
    "dlpack": lambda w: torch.from_dlpack(w.detach()).clone().numpy(),
    "dlpack method": lambda w: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(w.detach())).clone().numpy(),
    "storage": lambda w: np.array(w.untyped_storage().tolist(), dtype=np.uint8).view(np.float32).reshape(16, 16),
    "typed storage": lambda w: torch.tensor(list(w.storage())).view(16, 16).numpy(),
    "data_ptr": lambda w: _at(w.data_ptr()),
    "data_ptr of a view": lambda w: _at(w.view(-1).data_ptr()),
    "const_data_ptr": lambda w: _at(torch.ops.aten.alias(w).data_ptr()),
    "set_": lambda w: torch.empty(0).set_(w.detach()).clone().numpy(),
    "new_tensor": lambda w: torch.empty(0).new_tensor(w.detach()).numpy(),
    "torch.tensor": lambda w: torch.tensor(w.detach()).numpy(),
    "as_tensor": lambda w: torch.as_tensor(w.detach()).clone().numpy(),
    "as_subclass": lambda w: w.detach().as_subclass(torch.Tensor).clone().numpy(),
}  # fmt: skip


def _at(address: int) -> Any:
    if not address:
        raise ValueError("no memory")
    return np.ctypeslib.as_array((ctypes.c_float * (WIDTH * WIDTH)).from_address(address)).reshape(16, 16).copy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MEMORY)
def test_what_asks_for_memory_gets_the_values_or_an_error(name: str, w: torch.Tensor, real: torch.Tensor) -> None:
    try:
        values = MEMORY[name](w)
    except Exception:
        return
    assert np.array_equal(values, real.numpy())


def test_numpy_gives_the_values(w: torch.Tensor, real: torch.Tensor) -> None:
    assert np.array_equal(w.detach().numpy(), real.numpy())
    assert w.detach().tolist() == real.tolist()
    assert w[2, 3].item() == real[2, 3].item()
    assert bool(w[2, 3] == real[2, 3])


def test_the_flag_for_gradients_can_be_set_without_loading(rt: litrt.Runtime, w: torch.Tensor) -> None:
    assert w.requires_grad
    rt.module.requires_grad_(False)
    assert not w.requires_grad
    w.requires_grad = True
    assert w.requires_grad
    assert rt.stats().read_bytes == 0


def test_two_weights_of_one_operator_are_there_together(rt: litrt.Runtime, plain: nn.Module) -> None:
    y = torch.randn(3, WIDTH)
    a, b = rt.module.a, rt.module.b
    with torch.no_grad():
        assert torch.equal(torch.addmm(b.bias, y, a.weight), torch.addmm(plain.b.bias, y, plain.a.weight))
        assert torch.equal(a.weight @ b.weight, plain.a.weight @ plain.b.weight)
    stats = rt.stats()
    assert stats.peak_bytes >= 2 * WIDTH * WIDTH * 4
    assert stats.peak_bytes <= stats.budget_bytes
