"""The model as an object: what it says of itself, what changes it, and what transforms it, at every budget."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corpus.case import seeded
from torch import nn

import litrt
import litrt.runtime
from litrt.placeholder import Placeholder

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # which torch itself uses, once
]

WIDTH = 16
IDS = torch.arange(10)
X = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.relu(self.drop(self.up(self.norm(x))), inplace=True))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.cell = nn.GRU(WIDTH, WIDTH)
        self.register_buffer("scale", torch.full((WIDTH,), 2.0))
        self.register_buffer("positions", torch.arange(40), persistent=False)
        self.register_buffer("wide", torch.full((WIDTH,), 0.5, dtype=torch.float64), persistent=False)
        self.head = nn.Linear(WIDTH, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids + self.positions[0])
        for block in self.blocks:
            x = block(x)
        return self.head(self.cell(x)[0] * self.scale * self.wide.float())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x)))


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    with seeded():
        return Net().eval()


@pytest.fixture(scope="module")
def path(plain: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("object") / "net.zarr"
    litrt.convert(plain.state_dict(), path, progress=False)
    return path


WARMED = [(budget, is_warm) for budget in ("min", "50%", "100%") for is_warm in (False, True)]


@pytest.fixture(params=WARMED, ids=[f"{budget} {'warm' if is_warm else 'cold'}" for budget, is_warm in WARMED])
def rt(request: pytest.FixtureRequest, path: Path) -> Iterator[litrt.Runtime]:
    budget, is_warm = request.param
    with litrt.Runtime(Net, path, budget=budget) as runtime:
        if is_warm:
            runtime.warmup(IDS)
        yield runtime


@pytest.fixture
def half(path: Path) -> Iterator[litrt.Runtime]:
    """A runtime of which a part stays and a part streams."""
    with litrt.Runtime(Net, path, budget="50%") as runtime:
        runtime.warmup(IDS)
        assert 0 < runtime.stats().resident_bytes < runtime.total_bytes
        yield runtime


def plain_weights(rt: litrt.Runtime) -> list[tuple[str, nn.Parameter]]:
    return [(name, w) for name, w in rt.module.named_parameters() if not isinstance(w, Placeholder)]


@torch.no_grad()
def output(module: nn.Module) -> torch.Tensor:
    result: torch.Tensor = module(IDS)
    return result


# What it says.


def test_what_a_model_says_of_itself_is_true_and_loads_nothing(rt: litrt.Runtime, plain: nn.Module) -> None:
    before = rt.stats().read_bytes
    module = rt.module
    assert repr(module) == repr(plain)
    assert module.get_submodule("blocks.2.up") is module.blocks[2].up
    assert module.get_parameter("head.weight") is module.embed.weight
    assert [name for name, _ in module.named_modules()] == [name for name, _ in plain.named_modules()]
    for mine, others in (
        (dict(module.named_parameters()), dict(plain.named_parameters())),
        (dict(module.named_buffers()), dict(plain.named_buffers())),
        (module.state_dict(), plain.state_dict()),
    ):
        assert list(mine) == list(others)
        for name, tensor in mine.items():
            other = others[name]
            assert (tensor.shape, tensor.dtype, tensor.device) == (other.shape, other.dtype, other.device)
            assert (tensor.requires_grad, tensor.is_leaf) == (other.requires_grad, other.is_leaf)
    assert sum(w.nbytes for w in module.parameters()) == sum(w.nbytes for w in plain.parameters())
    assert rt.stats().read_bytes == before


# What changes it as a whole.

NOTHING: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to the device": lambda m: m.to("cpu"),
    "to the dtype": lambda m: m.to(torch.float32),
    "to both": lambda m: m.to(device=torch.device("cpu"), dtype=torch.float32, non_blocking=True),
    "to a tensor": lambda m: m.to(torch.ones(1)),
    "to nothing": lambda m: m.to(),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "cpu": lambda m: m.cpu(),
    "float": lambda m: m.float(),
    "type": lambda m: m.blocks.type(torch.float32) and m if isinstance(m, Net) else m.type(torch.float32),
    "eval": lambda m: m.eval(),
    "train and back": lambda m: m.train().eval(),
    "requires_grad_": lambda m: m.requires_grad_(False),
    "apply": lambda m: m.apply(lambda child: None),
}


def test_a_conversion_that_changes_no_weight_is_one_that_does_nothing(rt: litrt.Runtime, plain: nn.Module) -> None:
    before, read_bytes = [id(w) for w in rt.module.parameters()], rt.stats().read_bytes
    expected = copy.deepcopy(plain)
    for name, change in NOTHING.items():
        assert change(rt.module) is rt.module, name
        assert change(rt.module.blocks[1]) is rt.module.blocks[1], name
        change(expected)
        assert rt.module.wide.dtype == expected.wide.dtype, "what is not served is converted"
    assert [id(w) for w in rt.module.parameters()] == before
    assert rt.stats().read_bytes == read_bytes
    for _ in range(2):
        assert not any(w.requires_grad for w in rt.module.parameters())
        assert torch.equal(output(rt.module), output(expected))
        rt.warmup(IDS)


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "half": (lambda m: m.half(), r"\(half\).*dtype=torch\.float16"),
    "bfloat16": (lambda m: m.bfloat16(), r"dtype=torch\.bfloat16"),
    "double": (lambda m: m.double(), r"dtype=torch\.float64"),
    "to bfloat16": (lambda m: m.to(torch.bfloat16), r"\(to\).*dtype=torch\.bfloat16"),
    "to meta": (lambda m: m.to("meta"), "placeholders"),
    "cuda": (lambda m: m.cuda(), r"\(cuda\).*device='cuda'"),
    "to cuda": (lambda m: m.to("cuda:1"), "device='cuda:1'"),
    "type": (lambda m: m.type(torch.float16), r"dtype=torch\.float16"),
    "share_memory": (lambda m: m.share_memory(), r"in every process"),
    "to_empty": (lambda m: m.to_empty(device="cpu"), r"detach"),
    "a function of one's own": (lambda m: m._apply(lambda w: w * 2), "detach"),
    "load_state_dict": (lambda m: m.load_state_dict(m.state_dict()), r"cannot load.*litrt\.convert.*assign=True"),
    "some of a state dict": (
        lambda m: m.load_state_dict(dict(list(m.state_dict().items())[-1:]), strict=False),
        "cannot load",
    ),
}


@pytest.mark.parametrize("part", ["", "blocks.1", "cell"])
def test_a_change_of_all_weights_is_refused_before_any_is_changed(
    part: str, rt: litrt.Runtime, plain: nn.Module
) -> None:
    before, read_bytes = [id(w) for w in rt.module.parameters()], rt.stats().read_bytes
    for change, advice in REFUSED.values():
        with pytest.raises(litrt.WeightWriteError, match=advice) as caught:
            change(rt.module.get_submodule(part))
        assert caught.value.name in plain.state_dict()
        assert [id(w) for w in rt.module.parameters()] == before
        assert rt.module.wide.dtype == torch.float64
        assert rt.stats().read_bytes == read_bytes
    assert torch.equal(output(rt.module), output(plain))


def test_weights_of_ones_own_are_converted_and_loaded_beside_those_that_are_served(
    rt: litrt.Runtime, plain: nn.Module
) -> None:
    rt.module.adapter = nn.Linear(WIDTH, 2)
    rt.module.blocks[0].up.bonus = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    rt.module.float()
    assert rt.module.blocks[0].up.bonus.dtype == torch.float32
    loaded = {"adapter.weight": torch.ones(2, WIDTH), "adapter.bias": torch.ones(2), "blocks.0.up.bonus": torch.ones(3)}
    rt.module.load_state_dict(loaded, strict=False)
    assert (rt.module.adapter.weight == 1).all()
    assert (rt.module.blocks[0].up.bonus == 1).all()
    rt.module.adapter.half()
    assert rt.module.adapter.weight.dtype == torch.float16
    with pytest.raises(litrt.WeightWriteError, match="Nothing was changed"):
        rt.module.double()
    assert rt.module.adapter.weight.dtype == torch.float16
    assert torch.equal(output(rt.module), output(plain))


@pytest.mark.parametrize("how", ["setattr", "register_parameter", "load_state_dict"])
def test_a_weight_can_be_replaced_by_ones_own(how: str, rt: litrt.Runtime, plain: nn.Module) -> None:
    own = {"blocks.0.up.weight": torch.ones(2 * WIDTH, WIDTH), "cell.weight_hh_l0": torch.ones(3 * WIDTH, WIDTH)}
    expected = copy.deepcopy(plain)
    for module in (rt.module, expected):
        if how == "load_state_dict":
            module.load_state_dict(own, strict=False, assign=True)
            continue
        for name, tensor in own.items():
            prefix, _, leaf = name.rpartition(".")
            owner = module.get_submodule(prefix)
            if how == "setattr":
                setattr(owner, leaf, nn.Parameter(tensor))
            else:
                owner.register_parameter(leaf, nn.Parameter(tensor))
    for _ in range(3):
        assert torch.equal(output(rt.module), output(expected))
    rt.warmup(IDS)
    assert torch.equal(output(rt.module), output(expected))
    assert torch.equal(output(rt.detach()), output(expected))


def test_a_closed_or_detached_module_is_not_guarded(path: Path, plain: nn.Module) -> None:
    rt = litrt.Runtime(Net, path, budget="50%")
    rt.warmup(IDS)
    module = rt.detach()
    assert not any("_apply" in vars(child) for child in module.modules())
    assert module.double().embed.weight.dtype == torch.float64


def test_a_copy_of_a_model_that_is_all_there_is_a_plain_one(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="100%") as rt:
        rt.warmup(IDS)
        copied = copy.deepcopy(rt.module)
        pickled = io.BytesIO()
        pickle.dump(rt.module, pickled)
    unpickled = pickle.loads(pickled.getvalue())
    for module in (copied, unpickled):
        assert torch.equal(output(module), output(plain))
        assert module.double().blocks[3].up.weight.dtype == torch.float64
        module.load_state_dict(plain.state_dict())
        assert torch.equal(module.embed.weight, plain.embed.weight.double())
        assert copy.deepcopy(module).half().embed.weight.dtype == torch.float16


def test_training_mode_is_that_of_the_plain_model(rt: litrt.Runtime, plain: nn.Module) -> None:
    outputs = []
    for module in (rt.module, copy.deepcopy(plain)):
        module.train()
        module.zero_grad()
        torch.manual_seed(1)
        outputs.append(output(module))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], output(plain))


@pytest.mark.parametrize("budget", ["min", "50%", "100%"])
def test_running_statistics_are_not_updated(budget: str, tmp_path: Path) -> None:
    plain = Normed().eval()
    litrt.convert(plain.state_dict(), tmp_path / "normed.zarr", progress=False)
    with litrt.Runtime(Normed, tmp_path / "normed.zarr", budget=budget) as rt:
        for _ in range(2):
            rt.module.train()
            with pytest.raises(litrt.WeightWriteError, match=r"'norm\.running_mean'.*eval\(\)"):
                rt(X)
            rt.module.eval()
            assert torch.equal(rt(X), plain(X).detach())
            rt.warmup(X)


# Writes to weights that stay, which are plain tensors.


def step(w: torch.Tensor) -> None:
    w.grad = torch.ones_like(w)
    torch.optim.SGD([w], 1.0).step()
    w.grad = None


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda w: w.mul_(2),
    "through a view": lambda w: w.view(-1)[:1].fill_(7),
    "a row": lambda w: w.__setitem__(0, 1.0),
    "initialized": lambda w: nn.init.normal_(w),
    "an optimizer": step,
    "other bytes": lambda w: setattr(w, "data", torch.zeros_like(w)),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_to_a_weight_that_stays_is_an_error_before_it_is_used(
    name: str, half: litrt.Runtime, plain: nn.Module
) -> None:
    rt, (weight, w) = half, plain_weights(half)[0]
    with torch.no_grad():
        WRITES[name](w)
    with pytest.raises(litrt.WeightWriteError, match=rf"written to '{weight}'.*detach") as caught:
        rt(IDS)
    assert caught.value.name == weight
    assert torch.equal(w, plain.get_parameter(weight))
    for _ in range(2):
        assert torch.equal(rt(IDS), output(plain))
    assert not isinstance(w, Placeholder), "it stays"


def test_where_one_write_is_found_all_weights_that_stay_are_read_again(half: litrt.Runtime, plain: nn.Module) -> None:
    (_, first), *others = plain_weights(half)
    with torch.no_grad():
        first.zero_()
        for _, other in others:
            other.data.zero_()  # which torch does not count
    with pytest.raises(litrt.WeightWriteError, match="written"):
        half(IDS)
    for name, w in plain_weights(half):
        assert torch.equal(w, plain.get_parameter(name))
    assert torch.equal(half(IDS), output(plain))


def test_what_torch_does_not_count_lasts_as_in_the_plain_module(half: litrt.Runtime, plain: nn.Module) -> None:
    written, expected = [], copy.deepcopy(plain)

    def merge() -> None:
        # What stays first: which weights these are depends on what the warm-up has measured.
        for name, w in sorted(half.module.named_parameters(), key=lambda named: isinstance(named[1], Placeholder)):
            w.data += 1
            written.append(name)

    with pytest.raises(litrt.WeightWriteError, match=r"__iadd__|add_"):
        merge()
    assert written
    with torch.no_grad():
        for name in written:
            expected.get_parameter(name).add_(1)
    for _ in range(2):
        assert torch.equal(half(IDS), output(expected))
        half.warmup(IDS)


def test_a_write_in_forward_is_an_error_and_not_a_result(half: litrt.Runtime, plain: nn.Module) -> None:
    name, w = plain_weights(half)[0]

    def write(*_: Any) -> None:
        w.detach().add_(1)

    handle = half.module.blocks[3].register_forward_hook(write)
    with pytest.raises(litrt.WeightWriteError, match=rf"written to '{name}'"):
        half(IDS)
    handle.remove()
    assert torch.equal(half(IDS), output(plain))


def test_what_was_written_is_not_served_where_a_weight_has_to_make_room(half: litrt.Runtime, plain: nn.Module) -> None:
    name, w = plain_weights(half)[0]
    kept = w.detach().view(-1)  # it keeps the bytes in the arena
    index = next(i for i, entry in enumerate(half._pipeline.cache.entries) if entry.segment.name == name)
    with torch.no_grad():
        w.zero_()
    half._residents.evict(index)
    assert torch.equal(kept, plain.get_parameter(name).view(-1))
    with pytest.raises(litrt.WeightWriteError, match=rf"written to '{name}'"):
        half(IDS)
    assert torch.equal(half(IDS), output(plain))


@pytest.mark.parametrize("look", ["warmup", "state_dict", "detach", "close", "exit"])
@pytest.mark.parametrize("budget", ["50%", "100%"])
def test_a_write_is_noticed_whoever_looks_next(budget: str, look: str, path: Path, plain: nn.Module) -> None:
    with contextlib.ExitStack() as stack:
        rt = stack.enter_context(litrt.Runtime(Net, path, budget=budget))
        rt.warmup(IDS)
        name, w = plain_weights(rt)[0]
        with torch.no_grad():
            w.mul_(2)
        looks: dict[str, Callable[[], Any]] = {
            "warmup": lambda: rt.warmup(IDS),
            "state_dict": lambda: next(rt.state_dict()),
            "detach": rt.detach,
            "close": rt.close,
            "exit": stack.close,
        }
        with pytest.raises(litrt.WeightWriteError, match=rf"written to '{name}'"):
            looks[look]()
        if look in ("close", "exit"):
            with pytest.raises(litrt.ClosedError):
                rt(IDS)
        else:
            assert torch.equal(rt(IDS), output(plain))
            assert torch.equal(output(rt.detach()), output(plain))


def test_an_error_inside_a_runtime_is_not_hidden_by_one_at_its_end(path: Path) -> None:
    def fail() -> None:
        with litrt.Runtime(Net, path, budget="100%") as rt:
            rt.warmup(IDS)
            with torch.no_grad():
                rt.module.embed.weight.zero_()
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_as_long_as_true_values_cannot_be_read_nothing_is_served(tmp_path: Path, plain: nn.Module) -> None:
    litrt.convert(plain.state_dict(), tmp_path / "net.zarr", progress=False)
    with litrt.Runtime(Net, tmp_path / "net.zarr", budget="50%") as rt:
        rt.warmup(IDS)
        name, w = plain_weights(rt)[0]
        (file,) = (file for file in (tmp_path / "net.zarr" / name / "c").rglob("*") if file.is_file())
        whole = file.read_bytes()
        file.write_bytes(whole[:-5])
        with torch.no_grad():
            w.zero_()
        for _ in range(2):
            with pytest.raises(litrt.CorruptWeightError, match=name):
                rt(IDS)
        file.write_bytes(whole)
        with pytest.raises(litrt.WeightWriteError, match=name):
            rt(IDS)
        assert torch.equal(rt(IDS), output(plain))


# What runs it otherwise.


def traced(module: nn.Module) -> torch.Tensor:
    return torch.fx.symbolic_trace(module.blocks[1])(X)


def compiled(module: nn.Module) -> torch.Tensor:
    torch._dynamo.reset()
    block = torch.compile(module.blocks[1], backend="eager")
    return torch.stack([block(X), block(X + 1)])


def compiled_whole(module: nn.Module) -> torch.Tensor:
    torch._dynamo.reset()
    whole = torch.compile(module, backend="eager")
    return torch.stack([whole(IDS), whole(IDS + 1)])


def autocast(module: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return module(IDS)


def inference(module: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return module(IDS)


def hooked(module: nn.Module) -> torch.Tensor:
    handles = [
        module.blocks[0].register_forward_pre_hook(lambda _, args: (args[0] + 1,)),
        module.blocks[1].up.register_forward_hook(lambda m, args, y: y * m.weight.mean() + m.bias),
        module.register_forward_hook(lambda _, args, y: (y, args[0])),
        module.register_forward_pre_hook(lambda _, args: (args[0] + 1,)),
    ]
    y, ids = module(IDS)
    for handle in handles:
        handle.remove()
    return torch.cat([y.view(-1), ids])


def functional(module: nn.Module) -> torch.Tensor:
    own = {"blocks.0.up.weight": torch.ones(2 * WIDTH, WIDTH), "scale": torch.ones(WIDTH)}
    call = torch.func.functional_call
    replaced = call(module, own, (IDS,))
    return torch.stack([replaced, call(module, dict(module.named_parameters()), (IDS,)), module(IDS)])


RUNS: dict[str, Callable[[nn.Module], torch.Tensor]] = {
    "fx of a block": traced,
    "autocast": autocast,
    "inference mode": inference,
    "hooks": hooked,
    "functional_call": functional,
    "vmap": lambda m: torch.vmap(m.blocks[1])(X),
    "vmap of more": lambda m: torch.vmap(lambda ids: m.blocks[1](m.blocks[0](m.embed(ids))))(torch.stack([IDS, IDS])),
    "vmap of rows": lambda m: torch.vmap(m.embed)(IDS),
    "vmap over rows": lambda m: torch.vmap(lambda i, x: x @ m.blocks[0].up.weight[i] + m.blocks[0].up.weight[0])(
        IDS, X[0].expand(10, -1)
    ),
    "jvp": lambda m: torch.stack(torch.func.jvp(m.blocks[1], (X,), (X,))),
    "jacfwd": lambda m: torch.func.jacfwd(m.blocks[1].up)(X[0]),
}


SOME = pytest.mark.parametrize(("budget", "is_warm"), [("min", False), ("50%", True), ("100%", True)])


@SOME
@torch.no_grad()
def test_what_else_runs_a_model_gives_the_same_bits(budget: str, is_warm: bool, path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget=budget) as rt:
        if is_warm:
            rt.warmup(IDS)
        for name, run in RUNS.items():
            expected = run(copy.deepcopy(plain))
            assert torch.equal(run(rt.module), expected), name
            assert torch.equal(rt(IDS), output(plain)), name
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes


@pytest.mark.parametrize(("budget", "is_warm"), [("min", False), ("75%", True), ("100%", True)])
@torch.no_grad()
def test_a_trace_of_torch_jit_gives_the_same_bits(budget: str, is_warm: bool, path: Path, plain: nn.Module) -> None:
    """It keeps the weights that it has met, as long as the process lives: there has to be room beside them."""
    with litrt.Runtime(Net, path, budget=budget) as rt:
        if is_warm:
            rt.warmup(IDS)
        made = torch.jit.trace(rt.module.blocks[1], (X,), check_trace=False)
        for _ in range(2):
            assert torch.equal(made(X), plain.get_submodule("blocks.1")(X))
            assert torch.equal(rt(IDS), output(plain))
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes


@SOME
@torch.no_grad()
def test_a_compiled_block_and_a_compiled_model_give_the_same_bits(
    budget: str, is_warm: bool, path: Path, plain: nn.Module
) -> None:
    with litrt.Runtime(Net, path, budget=budget) as rt:
        if is_warm:
            rt.warmup(IDS)
        for run in (compiled, compiled_whole):
            assert torch.equal(run(rt.module), run(plain))
        rt.warmup(IDS)
        assert torch.equal(compiled(rt.module), compiled(plain))
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes


@torch.no_grad()
def test_a_compiled_model_does_not_compile_litrt(path: Path, plain: nn.Module) -> None:
    files: set[str] = set()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            files.update(part.split('"')[0] for part in (node.stack_trace or "").split('File "')[1:])
        return graph

    torch._dynamo.reset()
    with litrt.Runtime(Net, path, budget="min") as rt:
        assert torch.equal(torch.compile(rt.module, backend=backend)(IDS), output(plain))
    assert files
    assert not any(file.startswith(str(Path(litrt.__file__).parent)) for file in files - {litrt.runtime.__file__})


def full_graph(module: nn.Module) -> None:
    torch._dynamo.reset()
    torch.compile(module, backend="eager", fullgraph=True)(IDS if isinstance(module, Net) else X)


def exported(module: nn.Module) -> None:
    torch.export.export(module, (IDS if isinstance(module, Net) else X,), strict=True)


@pytest.mark.parametrize("part", ["", "blocks.1"])
@pytest.mark.parametrize("run", [full_graph, exported])
@torch.no_grad()
def test_what_needs_the_whole_graph_says_what_to_do(
    run: Callable[[nn.Module], None], part: str, half: litrt.Runtime, plain: nn.Module
) -> None:
    module = half.module.get_submodule(part)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"litrt .*fullgraph=True.*holds the whole model.*detach"):
        run(module)
    assert torch.equal(output(half.module), output(plain))


# Gradients.


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
@pytest.mark.parametrize("part", ["", "blocks.1"])
def test_a_transform_that_goes_backward_says_what_to_do(
    transform: Callable[..., Any], part: str, half: litrt.Runtime
) -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return half.module.blocks[1](x).sum() if part else half.module(x[0, :10].long()).sum()

    with pytest.raises(litrt.LitrtError, match=r"cannot differentiate.*backward.*detach"):
        transform(loss)(X)


def test_a_backward_pass_is_an_error_and_not_a_wrong_gradient(path: Path, plain: nn.Module) -> None:
    for budget in ("min", "50%"):
        with litrt.Runtime(Net, path, budget=budget) as rt:
            rt.warmup(IDS)
            x = X.clone().requires_grad_()
            y = rt.module.blocks[1](x)
            assert torch.equal(y, plain.blocks[1](x))
            with pytest.raises(litrt.LitrtError, match=r"cannot differentiate linear with 'blocks\.1.*detach"):
                y.sum().backward()


def test_a_pass_has_no_gradient_and_what_is_around_it_no_wrong_one(path: Path) -> None:
    plain = Block().eval()
    with litrt.Runtime(Block, _store(plain, path.parent / "block.zarr"), budget="min") as rt:
        x = X.clone().requires_grad_()
        y = x + rt.module(x)
        assert torch.equal(y, x + plain(x))
        with pytest.raises(litrt.LitrtError, match=r"cannot differentiate a pass.*detach"):
            y.sum().backward()
        assert not rt(x).requires_grad


def _store(module: nn.Module, path: Path) -> Path:
    litrt.convert(module.state_dict(), path, progress=False)
    return path


def test_vmap_with_gradients_says_what_to_do(half: litrt.Runtime) -> None:
    streamed = (block for block in half.module.blocks if any(isinstance(w, Placeholder) for w in block.parameters()))
    block = next(streamed)
    with pytest.raises(litrt.LitrtError, match=r"gradients.*under torch\.no_grad"):
        torch.vmap(block)(X.clone().requires_grad_())
