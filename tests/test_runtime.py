"""The runtime as its users see it: arguments, passes, counts, and nothing left behind."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import os
import re
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import MakeStore, open_files, read_threads
from torch import nn

import litrt
from litrt.placeholder import Placeholder
from litrt.stats import Stats

pytestmark = pytest.mark.usefixtures("poisoned")

WIDTH = 32
N_LAYERS = 6


class Net(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(N_LAYERS))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.norm(x) * scale

    @torch.no_grad()
    def generate(self, x: torch.Tensor, n: int) -> torch.Tensor:
        """Feeds every result back, with parts of the model called on their own in between."""
        for _ in range(n):
            x = self(x) + self.layers[2](self.norm(x)) @ self.layers[4].weight
        return x


def sample(seed: int = 1, n: int = 3, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def plain() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval().requires_grad_(False)


@pytest.fixture
def path(plain: nn.Module, make_store: MakeStore) -> Path:
    return make_store(plain)


# Arguments.


def test_the_signature_is_the_documented_one(path: Path) -> None:
    empty = inspect.Parameter.empty
    parameters = inspect.signature(litrt.Runtime).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "model_ctor": empty,
        "store": empty,
        "budget": "auto",
        "device": "cpu",
        "policy": "belady",
        "n_threads": None,
        "strict": False,
        "host_budget": "auto",
        "dtype": None,
        "read_timeout_s": 8.0,
    }
    positional = [name for name, parameter in parameters.items() if parameter.kind == parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["model_ctor", "store", "budget", "device"]
    documented = inspect.getdoc(litrt.Runtime)
    assert documented is not None
    arguments = documented[documented.index("Args:") : documented.index("Attributes:")]
    assert re.findall(r"^    (\w+):", arguments, re.MULTILINE) == list(parameters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "fifo"}, "policy 'fifo' is not known: use 'belady' or 'lru'"),
        ({"policy": None}, "policy None is not known"),
        ({"n_threads": 0}, "n_threads must be a positive int, not 0"),
        ({"n_threads": -3}, "n_threads must be a positive int, not -3"),
        ({"n_threads": 2.0}, "n_threads must be a positive int, not 2.0"),
        ({"n_threads": "2"}, "n_threads must be a positive int, not '2'"),
        ({"device": "xpu"}, "device 'xpu' is not supported.*'cpu' and 'cuda'"),
        ({"device": torch.device("meta")}, "device 'meta' is not supported"),
        ({"budget": "a lot"}, "cannot read budget 'a lot'"),
    ],
)
def test_an_argument_that_is_wrong_is_named_before_the_model_is_built(
    options: dict[str, Any], message: str, path: Path
) -> None:
    def constructor() -> nn.Module:
        raise AssertionError("the model was built")

    with pytest.raises(ValueError, match=message):
        litrt.Runtime(constructor, path, **options)


def test_unknown_arguments_are_errors(path: Path) -> None:
    with pytest.raises(TypeError, match="prefetch"):
        litrt.Runtime(Net, path, prefetch=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        litrt.Runtime(Net, path, "auto", "cpu", "lru")  # type: ignore[misc]


def test_there_is_no_store_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(litrt.StoreError, match="none\\.zarr does not exist"):
        litrt.Runtime(Net, tmp_path / "none.zarr")


def test_a_store_is_a_path_or_an_open_store(path: Path, plain: nn.Module) -> None:
    for store in (path, str(path), litrt.open_store(path)):
        with litrt.Runtime(Net, store, budget="min") as rt:
            assert torch.equal(rt(sample()), plain(sample()))


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_as_many_threads_read_as_were_asked_for(n_threads: int, path: Path, plain: nn.Module) -> None:
    others = read_threads()
    with litrt.Runtime(Net, path, budget="50%", n_threads=n_threads) as rt:
        assert read_threads() == others, "nothing is to be read yet"
        rt.warmup(sample())
        mine = read_threads() - others
        assert len(mine) == n_threads
        assert all(thread.daemon for thread in mine)
        assert torch.equal(rt(sample()), plain(sample()))
        assert read_threads() - others == mine


def test_the_default_budget_holds_what_fits(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path) as rt:
        rt.warmup(sample())
        assert rt.stats().resident_bytes == sum(parameter.nbytes for parameter in plain.parameters())


# Passes.


@pytest.mark.parametrize("policy", ["belady", "lru"])
@pytest.mark.parametrize("budget", ["min", "50%", "100%"])
def test_there_is_no_plan_before_a_pass_and_one_after_it(
    budget: str, policy: Any, path: Path, plain: nn.Module
) -> None:
    with litrt.Runtime(Net, path, budget=budget, policy=policy) as rt:
        with pytest.raises(litrt.LitrtError, match=r"no plan yet: call warmup\(sample_input\), or run one pass"):
            _ = rt.plan
        with pytest.raises(litrt.LitrtError, match=r"no trace yet: call warmup\(sample_input\), or run one pass"):
            _ = rt.trace
        assert torch.equal(rt(sample()), plain(sample()))  # no warm-up is needed
        used = [rt.trace.segments[index].name for index in rt.trace.used]
        assert used == [name for name, _ in plain.named_parameters()]
        assert rt.plan.compute_s == rt.trace.compute_s
        assert isinstance(rt.plan, litrt.Plan)
        assert rt.plan.policy == policy
        assert rt.plan.budget_bytes <= rt.stats().budget_bytes
        for seed in range(3):
            assert torch.equal(rt(sample(seed)), plain(sample(seed)))
        assert rt.stats().n_passes == 4


def test_keyword_arguments_reach_the_module(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="min") as rt:
        rt.warmup(sample(), scale=2.0)
        assert torch.equal(rt(x=sample(), scale=3.0), plain(sample(), scale=3.0))


def test_passes_of_the_module_are_passes_of_the_runtime(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="50%") as rt:
        assert torch.equal(rt.module(sample()), plain(sample()))
        assert rt.plan is not None
        assert torch.equal(rt.module(sample()), plain(sample()))
        assert rt.stats().n_passes == 2


def test_an_operator_that_evicts_what_it_uses_gets_it_back(make_store: MakeStore) -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(128, 128)) for _ in range(3))

        def forward(self, x: torch.Tensor, unplanned: bool = False) -> torch.Tensor:
            return self.c @ self.a @ x if unplanned else self.b @ (self.a @ x)

    plain = Products().eval().requires_grad_(False)
    x = torch.randn(128, 1)
    with litrt.Runtime(Products, make_store(plain), budget=5 * plain.a.nbytes // 2) as rt:
        rt.warmup(x)
        assert rt.plan is not None
        assert sorted(rt.plan.segments[index].name for index in rt.plan.resident) == ["a", "b"]
        assert rt.plan.streamed_bytes == 0
        for unplanned in (False, True, False, True, True, False):
            assert torch.equal(rt(x, unplanned), plain(x, unplanned))
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes


@pytest.mark.parametrize("budget", ["min", "50%", "100%"])
def test_a_second_warmup_plans_anew_for_another_input(budget: str, make_store: MakeStore) -> None:
    class TwoPaths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.few = nn.Linear(WIDTH, WIDTH)
            self.many = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) == 1:
                return self.few(x)
            for layer in self.many:
                x = layer(x)
            return x

    plain = TwoPaths().eval().requires_grad_(False)
    with litrt.Runtime(TwoPaths, make_store(plain), budget=budget) as rt:
        for n in (1, 5, 1, 5):
            rt.warmup(sample(n=n))
            plan, before = rt.plan, rt.stats()
            for seed in range(2):
                assert torch.equal(rt(sample(seed, n)), plain(sample(seed, n)))
            counts = rt.stats().since(before)
            assert counts.n_faults == 0
            assert counts.n_passes == 2
            assert rt.plan.loads is plan.loads
            assert rt.stats().peak_bytes <= rt.stats().budget_bytes
            used = {plan.segments[index].name.partition(".")[0] for step in plan.steps for index in step.segments}
            assert used <= ({"few"} if n == 1 else {"many"})


def test_a_warmup_counts_in_what_was_read_and_held_and_nowhere_else(path: Path, plain: nn.Module) -> None:
    weights = sum(parameter.nbytes for parameter in plain.parameters())
    with litrt.Runtime(Net, path, budget="min") as rt:
        assert rt.stats().read_bytes == rt.stats().peak_bytes == 0
        rt.warmup(sample())
        stats = rt.stats()
        assert (stats.n_passes, stats.n_hits, stats.n_late, stats.n_faults, stats.stall_s) == (0, 0, 0, 0, 0.0)
        assert stats.read_bytes >= weights
        assert 0 < stats.peak_bytes <= stats.budget_bytes < weights


@pytest.mark.parametrize("budget", ["min", "50%"])
def test_both_policies_give_equal_outputs_and_only_one_reads_ahead(budget: str, path: Path, plain: nn.Module) -> None:
    n_uses = sum(1 for _ in plain.parameters())
    counted = {}
    for policy in ("belady", "lru"):
        with litrt.Runtime(Net, path, budget=budget, policy=policy) as rt:
            rt.warmup(sample())
            rt(sample())
            before = rt.stats()
            assert torch.equal(rt(sample()), plain(sample()))
            counted[policy] = rt.stats().since(before)
            if policy == "lru":
                assert rt.plan.loads == ()
                assert rt.stats().resident_bytes == 0
    assert counted["belady"].n_faults == 0
    assert counted["lru"].n_late == 0
    assert counted["lru"].n_hits + counted["lru"].n_faults == n_uses
    if budget == "min":
        assert counted["lru"].n_faults >= n_uses - 2
        assert counted["belady"].n_hits + counted["belady"].n_late > 0


# Where all fits, nothing is left of litrt.


@pytest.mark.parametrize("budget", ["100%", "1GB", "auto"])
def test_a_budget_that_holds_all_leaves_a_plain_module(budget: str, path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget=budget) as rt:
        weights = dict(rt.module.named_parameters())
        assert all(isinstance(weight, Placeholder) for weight in weights.values())
        rt.warmup(sample())
        for module in rt.module.modules():
            assert "forward" not in vars(module)
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        for name, weight in rt.module.named_parameters():
            assert weight is weights[name], "whoever has it has the plain tensor now"
            assert type(weight) is nn.Parameter
            assert torch.equal(weight, plain.get_parameter(name))
        assert rt.plan.steps == rt.plan.loads == ()
        assert rt.plan.streamed_bytes == 0
        before = rt.stats()
        for seed in range(2):
            assert torch.equal(rt(sample(seed)), plain(sample(seed)))
        counts = rt.stats().since(before)
        assert counts == Stats(
            n_passes=2,
            peak_bytes=before.peak_bytes,
            budget_bytes=before.budget_bytes,
            resident_bytes=sum(weight.nbytes for weight in weights.values()),
        )


def test_below_the_model_what_stays_is_plain_and_the_rest_is_not(path: Path) -> None:
    with litrt.Runtime(Net, path, budget="60%") as rt:
        rt.warmup(sample())
        stays = {rt.plan.segments[index].name for index in rt.plan.resident}
        assert stays
        for name, weight in rt.module.named_parameters():
            assert (type(weight) is nn.Parameter) == (name in stays)
            assert isinstance(weight, nn.Parameter)
        assert rt.stats().resident_bytes == sum(rt.module.get_parameter(name).nbytes for name in stays)


# Beginning and end.


def test_a_with_block_gives_the_runtime_and_closes_it(path: Path) -> None:
    rt = litrt.Runtime(Net, path, budget="min")
    with rt as entered:
        assert entered is rt
        rt(sample())
    with pytest.raises(litrt.ClosedError):
        rt(sample())


def test_a_with_block_that_fails_closes_and_lets_the_error_through(path: Path) -> None:
    others = read_threads()
    with pytest.raises(KeyError, match="mine"), litrt.Runtime(Net, path, budget="min") as rt:
        raise KeyError("mine")
    assert read_threads() == others
    with pytest.raises(litrt.ClosedError):
        rt(sample())


def test_a_runtime_that_cannot_be_made_leaves_nothing(path: Path, make_store: MakeStore) -> None:
    threads, files = read_threads(), open_files()
    for construct, store in ((lambda: Net(WIDTH + 1), path), (lambda: nn.Linear(2, 2), path)):
        with pytest.raises(litrt.SkeletonError):
            litrt.Runtime(construct, store, budget="min")
    with pytest.raises(litrt.BudgetError):
        litrt.Runtime(Net, make_store(Net(), "packed.zarr", compress="lz4"), budget=10)
    gc.collect()
    assert read_threads() == threads
    assert open_files() == files


def test_a_runtime_that_cannot_serve_a_weight_ends_its_threads(make_store: MakeStore) -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)
            self.reference = weakref.ref(self.layer.weight)  # torch swaps no tensor that is weakly referenced

    threads = read_threads()
    with pytest.raises(litrt.LitrtError, match=r"cannot serve 'layer\.weight'") as caught:
        litrt.Runtime(Watched, make_store(Watched()), budget="min")
    assert read_threads() == threads, "while the error is looked at"
    del caught


def test_round_after_round_leaves_no_thread_no_descriptor_and_no_memory(make_store: MakeStore) -> None:
    width = 512
    model_bytes = N_LAYERS * width * width * 4
    path = make_store(Net(width))
    process = psutil.Process()
    threads, n_fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    rss = 0
    for number in range(10):
        with litrt.Runtime(lambda: Net(width), path, budget=("min", "60%", "100%")[number % 3]) as rt:
            rt.warmup(sample(width=width))
            rt(sample(width=width))
        del rt
        gc.collect()
        assert threading.active_count() <= threads
        assert len(os.listdir("/proc/self/fd")) <= n_fds
        if number == 1:
            rss = process.memory_info().rss
    # Eight rounds that each left their arena would be five models.
    assert process.memory_info().rss - rss < 2 * model_bytes


def in_a_fork(run: Callable[[], bool]) -> bool:
    """Returns what `run` returns in a process that is forked off, or False where that takes too long."""
    child = os.fork()
    if not child:
        try:
            os._exit(0 if run() else 1)
        finally:
            os._exit(2)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_is_forked_off_is_told_to_make_its_own(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="min") as rt:
        rt.warmup(sample())

        def refused() -> bool:
            uses: list[Callable[[], Any]] = [
                lambda: rt(sample()),
                lambda: rt.warmup(sample()),
                lambda: rt.module.layers[3](sample()),
                lambda: rt.module.norm.weight + 1,
            ]
            for use in uses:
                with pytest.raises(litrt.ClosedError, match=r"forked.*make a litrt\.Runtime in every process"):
                    use()
            rt.close()
            with litrt.Runtime(Net, path, budget="min") as own:
                # Not a product: after a fork, torch waits for its own threads.
                return np.array_equal(own.module.layers[3].weight.detach().numpy(), plain.layers[3].weight.numpy())

        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with rt._passes.lock, rt._pipeline._lock:
                held.set()
                done.wait(60)

        with ThreadPoolExecutor(1) as other:
            holding = other.submit(hold)
            held.wait(60)
            assert in_a_fork(refused)
            done.set()
            holding.result()
        assert torch.equal(rt(sample()), plain(sample()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_weights_that_all_stay_are_there_in_a_process_that_is_forked_off(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="100%") as rt:
        rt.warmup(sample())

        def same() -> bool:
            return all(np.array_equal(w.detach().numpy(), plain.get_parameter(n).numpy()) for n, w in weights)

        weights = list(rt.module.named_parameters())
        assert in_a_fork(same)


@pytest.mark.timeout(60)
def test_a_runtime_that_is_collected_in_a_thread_that_reads_for_it_ends(path: Path) -> None:
    others = read_threads()
    rt = litrt.Runtime(Net, path, budget="min", n_threads=2)
    mine = read_threads() - others
    stopped = threading.Event()
    read_done = rt._pipeline._reads._done

    def collect(*args: Any) -> None:  # under the lock
        read_done(*args)
        rt._stop()
        stopped.set()

    rt._pipeline._reads._done = collect
    with pytest.raises(litrt.ClosedError):
        rt(sample())
    assert stopped.wait(30)
    for thread in mine:
        thread.join(30)
        assert not thread.is_alive()


# Several at once.


def test_two_runtimes_on_one_store_do_not_meet(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="min") as one, litrt.Runtime(Net, path, budget="60%") as other:
        for rt in (one, other):
            rt.warmup(sample())
        for seed in range(3):
            assert torch.equal(one(sample(seed)), plain(sample(seed)))
            assert torch.equal(other(sample(seed)), plain(sample(seed)))
        mixed = torch.nn.functional.linear(sample(), one.module.layers[0].weight, other.module.layers[1].bias)
        expected = torch.nn.functional.linear(sample(), plain.layers[0].weight, plain.layers[1].bias)
        assert torch.equal(mixed, expected)
        one.close()
        assert torch.equal(other(sample()), plain(sample()))
        for rt in (one, other):
            assert rt.stats().peak_bytes <= rt.stats().budget_bytes


def test_two_runtimes_in_two_threads(path: Path, plain: nn.Module) -> None:
    together = threading.Barrier(2)

    def run(budget: str) -> bool:
        with litrt.Runtime(Net, path, budget=budget) as rt:
            rt.warmup(sample())
            together.wait(60)
            return all(torch.equal(rt(sample(seed)), plain(sample(seed))) for seed in range(10))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, ["min", "50%"]))


@pytest.mark.parametrize("policy", ["belady", "lru"])
@pytest.mark.parametrize("budget", ["40%", "60%", "100%"])
def test_threads_that_share_a_runtime_get_right_answers(budget: str, policy: Any, path: Path, plain: nn.Module) -> None:
    n_threads, n_rounds = 3, 8
    together = threading.Barrier(n_threads)
    with litrt.Runtime(Net, path, budget=budget, policy=policy) as rt, torch.no_grad():
        rt.warmup(sample())

        def run(seed: int) -> bool:
            together.wait(60)
            return all(torch.equal(rt(sample(seed + n)), plain(sample(seed + n))) for n in range(n_rounds))

        with ThreadPoolExecutor(n_threads) as pool:
            assert all(pool.map(run, range(0, 100 * n_threads, 100)))
        stats = rt.stats()
        assert stats.n_passes == n_threads * n_rounds
        assert stats.peak_bytes <= stats.budget_bytes


def test_a_thread_may_use_parts_of_the_model_while_another_runs_it(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="60%") as rt:
        rt.warmup(sample())
        together = threading.Barrier(2)

        def whole() -> bool:
            together.wait(60)
            return all(torch.equal(rt(sample(seed)), plain(sample(seed))) for seed in range(10))

        def part() -> bool:
            together.wait(60)
            layers = [number % N_LAYERS for number in range(3, 60, 7)]
            with torch.no_grad():
                return all(torch.equal(rt.module.layers[n](sample(n)), plain.layers[n](sample(n))) for n in layers)

        with ThreadPoolExecutor(2) as pool:
            assert all(future.result() for future in [pool.submit(whole), pool.submit(part)])
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes


@pytest.mark.parametrize("room", [0, 1.5])
def test_threads_take_turns_where_the_budget_holds_the_weights_of_one_operator(
    room: float, path: Path, plain: nn.Module
) -> None:
    with litrt.Runtime(Net, path, budget="min") as rt:
        rt.warmup(sample())
        smallest = rt.stats().budget_bytes
    budget = smallest + int(room * plain.layers[0].weight.nbytes)
    together = threading.Barrier(3)
    with litrt.Runtime(Net, path, budget=budget) as rt, torch.no_grad():
        rt.warmup(sample())

        def whole() -> bool:
            together.wait(60)
            return all(torch.equal(rt(sample(seed)), plain(sample(seed))) for seed in range(20))

        def part() -> bool:
            together.wait(60)
            layers = [number % N_LAYERS for number in range(100)]
            return all(torch.equal(rt.module.layers[n](sample(n)), plain.layers[n](sample(n))) for n in layers)

        with ThreadPoolExecutor(3) as pool:
            assert all(future.result() for future in [pool.submit(run) for run in (whole, part, part)])
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes == budget


def test_a_plan_is_made_of_what_the_pass_used_and_not_of_what_other_threads_did_meanwhile(
    path: Path, plain: nn.Module
) -> None:
    with litrt.Runtime(Net, path, budget="40%", strict=True) as rt, ThreadPoolExecutor(1) as other, torch.no_grad():

        def use_another(*_: Any) -> None:
            done = other.submit(lambda: rt.module.layers[5](sample()))
            assert torch.equal(done.result(60), plain.layers[5](sample()))

        rt.module.layers[0].register_forward_hook(use_another)
        for _ in range(3):
            assert torch.equal(rt(sample()), plain(sample()))
        names = [segment.name for segment in rt.trace.segments]
        assert [names[index] for use in rt.trace.uses for index in use.segments] == [
            name for name, _ in plain.named_parameters()
        ]


@pytest.mark.parametrize("budget", ["min", "60%", "100%"])
def test_methods_that_call_the_module_and_its_parts_are_right(budget: str, path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget=budget) as rt:
        for _ in range(2):
            assert torch.equal(rt.module.generate(sample(), 4), plain.generate(sample(), 4))
        assert torch.equal(rt.module.generate(sample(2), 2), plain.generate(sample(2), 2))
        # Where all fits, calls of the module are not seen any more.
        assert rt.stats().n_passes == (10 if budget != "100%" else 1)
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes


def test_a_module_that_calls_itself_makes_one_pass(make_store: MakeStore) -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: torch.Tensor, depth: int = 0) -> torch.Tensor:
            x = torch.tanh(self.layers[depth](x))
            return self(x, depth + 1) if depth + 1 < len(self.layers) else x

    plain = Recursive().eval().requires_grad_(False)
    with litrt.Runtime(Recursive, make_store(plain), budget="min") as rt:
        rt.warmup(sample())
        for _ in range(2):
            assert torch.equal(rt(sample()), plain(sample()))
        assert rt.stats().n_passes == 2
        assert len(rt.plan.steps) == 3


# Counts.


@pytest.fixture
def streaming(path: Path) -> Iterator[litrt.Runtime]:
    with litrt.Runtime(Net, path, budget="50%") as rt:
        rt.warmup(sample())
        yield rt


def test_stats_have_the_documented_fields_and_types(streaming: litrt.Runtime) -> None:
    streaming(sample())
    stats = streaming.stats()
    assert isinstance(stats, litrt.Stats)
    types = {field.name: type(getattr(stats, field.name)) for field in dataclasses.fields(stats)}
    assert types == {name: float if name.endswith(("_s", "_bps")) else int for name in types}
    documented = inspect.getdoc(Stats)
    assert documented is not None
    assert re.findall(r"^    (\w+):", documented, re.MULTILINE) == list(types)
    assert all(value >= 0 for value in dataclasses.astuple(stats))
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.n_hits = 0  # type: ignore[misc]


def test_stats_add_up(streaming: litrt.Runtime) -> None:
    streaming(sample())
    before = streaming.stats()
    n_passes = 3
    for _ in range(n_passes):
        streaming(sample())
    counts = streaming.stats().since(before)
    plan = streaming.plan
    assert counts.n_passes == n_passes
    assert counts.n_hits + counts.n_late + counts.n_faults == n_passes * sum(len(step.segments) for step in plan.steps)
    assert counts.read_bytes == n_passes * plan.streamed_bytes > 0
    assert counts.resident_bytes == plan.resident_bytes == streaming.stats().resident_bytes
    assert counts.peak_bytes == streaming.stats().peak_bytes
    assert counts.budget_bytes == streaming.stats().budget_bytes
    assert streaming.stats().since(Stats()) == streaming.stats()


def test_stats_are_a_copy_that_does_not_change(streaming: litrt.Runtime) -> None:
    stats = streaming.stats()
    same = dataclasses.replace(stats)
    streaming(sample())
    assert stats == same != streaming.stats()


def test_the_plan_says_what_it_does(streaming: litrt.Runtime) -> None:
    said = str(streaming.plan)
    for word in ("plan (belady)", "resident", "streamed", "bound", "GB/s"):
        assert word in said
