"""Budgets that change while a runtime lives, and budgets that runtimes share."""

from __future__ import annotations

import gc
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import MakeStore, read_threads
from corpus.case import seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import litrt
from litrt.pipeline import Pipeline
from litrt.reads import ReadThreads
from litrt.shared import Need, divide
from litrt.testing import FakeDevice

pytestmark = pytest.mark.usefixtures("poisoned")

WIDTH = 64
N_LAYERS = 5


class Net(nn.Module):
    """Layers with large and small weights, and a table of which rows are read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3000, WIDTH)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8 * WIDTH), nn.ReLU(), nn.Linear(8 * WIDTH, WIDTH))
            for _ in range(N_LAYERS)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


IDS = torch.tensor([3, 1, 2900, 7])


@pytest.fixture
def plain() -> nn.Module:
    with seeded():
        return Net().eval()


@pytest.fixture
def path(plain: nn.Module, make_store: MakeStore) -> Path:
    return make_store(plain)


def read_in(rt: litrt.Runtime, plain: nn.Module, n: int = 1) -> int:
    """Runs passes; returns the bytes that they read."""
    before = rt.stats().read_bytes
    with torch.no_grad():
        for _ in range(n):
            assert torch.equal(rt(IDS), plain(IDS))
    return rt.stats().read_bytes - before


def check(rt: litrt.Runtime, plain: nn.Module) -> None:
    read_in(rt, plain, 2)
    stats = rt.stats()
    assert stats.peak_bytes <= stats.budget_bytes
    assert rt._pipeline.cache.arena.end <= rt._pipeline.cache.arena.limit_bytes


DEVICES: dict[str, Any] = {"cpu": lambda: "cpu", "double": FakeDevice}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("warm", [False, True])
def test_a_budget_changes_up_and_down(device: str, warm: bool, path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="50%", device=DEVICES[device]()) as rt:
        if warm:
            rt.warmup(IDS)
        for budget in ["25%", "75%", "100%", "min", "40%", "200%", "least", "90%"]:
            rt.set_budget(rt.min_budget_bytes if budget == "least" else budget)
            check(rt, plain)
            stats = rt.stats()
            if budget in ("min", "least"):
                assert stats.budget_bytes == rt.min_budget_bytes
            elif budget != "200%" and (device, budget) != ("double", "100%"):  # there, gaps come on top
                assert stats.budget_bytes <= int(budget.rstrip("%")) * rt.total_bytes // 100


def test_what_stays_in_both_budgets_is_not_read_again(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="100%") as rt:
        rt.warmup(IDS)
        assert read_in(rt, plain) == 0
        for budget in ["60%", "30%", "60%", "100%", "45%"]:
            before = rt.plan
            stayed = {before.segments[index].name for index in before.resident if not before.segments[index].is_slot}
            read_bytes = rt.stats().read_bytes
            rt.set_budget(budget)
            more = [
                rt.plan.segments[index]
                for index in rt.plan.resident
                if not rt.plan.segments[index].is_slot and rt.plan.segments[index].name not in stayed
            ]
            ahead_bytes = rt._pipeline.cache.arena.held_bytes - rt.plan.resident_bytes
            read = rt.stats().read_bytes - read_bytes
            assert read <= sum(part.fetch_bytes for part in more) + max(ahead_bytes, 0)
            check(rt, plain)


def test_a_warm_up_with_everything_resident_needs_no_larger_budget(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="100%") as rt:
        rt.warmup(IDS)
        least = rt.min_budget_bytes
        for n_passes in range(2):
            for _ in range(n_passes):
                rt(IDS)
            rt.warmup(IDS)
            assert rt.min_budget_bytes == least < plain.get_submodule("embed").weight.nbytes
        rt.set_budget("min")
        assert torch.equal(rt(IDS), plain(IDS))
        assert rt.stats().peak_bytes <= least


def test_memory_that_a_smaller_budget_has_no_room_for_is_given_back(make_store: MakeStore) -> None:
    def construct() -> nn.Module:
        return nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(6)))

    with seeded():
        plain = construct().eval()
    path, x = make_store(plain), torch.randn(1, 2048)
    with litrt.Runtime(construct, path, budget="100%") as rt, torch.no_grad():
        rt.warmup(x)
        before = psutil.Process().memory_info().rss
        rt.set_budget("34%")
        assert before - psutil.Process().memory_info().rss > rt.total_bytes // 2
        assert torch.equal(rt(x), plain(x))


def test_a_budget_for_a_while(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="80%") as rt:
        rt.warmup(IDS)
        whole = rt.stats().budget_bytes
        with rt.at_budget("30%") as same:
            assert same is rt
            assert rt.stats().budget_bytes <= rt.total_bytes * 3 // 10
            check(rt, plain)
        assert rt.stats().budget_bytes == whole
        with pytest.raises(KeyError), rt.at_budget("30%"):
            raise KeyError
        assert rt.stats().budget_bytes == whole
        check(rt, plain)
        with rt.at_budget("30%"):
            rt.close()


@pytest.mark.parametrize("budget", ["6 parsecs", -1, "-2GB", 0, 1000, "1%"])
def test_a_budget_that_cannot_be_is_refused_and_changes_nothing(budget: Any, path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="50%") as rt:
        rt.warmup(IDS)
        before = rt.plan, rt.stats()
        with pytest.raises(litrt.BudgetError):
            rt.set_budget(budget)
        assert (rt.plan, rt.stats().budget_bytes) == (before[0], before[1].budget_bytes)
        assert rt.stats().read_bytes == before[1].read_bytes
        check(rt, plain)


def test_too_small_a_budget_says_what_would_do(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="50%") as rt:
        rt.warmup(IDS)
        with pytest.raises(litrt.BudgetError) as caught:
            rt.set_budget(rt.min_budget_bytes - 1)
        assert caught.value.needed_bytes is not None
        rt.set_budget(caught.value.needed_bytes)
        check(rt, plain)


def test_a_weight_that_is_held_is_never_moved(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="100%") as rt, torch.no_grad():
        rt.warmup(IDS)
        held = [rt.module.embed.weight.detach()[5], *(layer[3].weight.detach()[5] for layer in rt.module.layers)]
        wanted = [row.clone() for row in held]
        before = rt.plan
        with pytest.raises(litrt.BudgetError, match="your code holds"):
            rt.set_budget("25%")
        assert rt.plan is before
        check(rt, plain)
        assert all(torch.equal(row, want) for row, want in zip(held, wanted, strict=True))
        del held[1:]
        gc.collect()
        rt.set_budget("75%")
        check(rt, plain)
        assert torch.equal(held[0], wanted[0])
        held.clear()
        rt.set_budget("25%")
        check(rt, plain)


def test_a_budget_is_not_changed_in_a_pass(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Net, path, budget="50%") as rt:
        rt.warmup(IDS)
        handle = rt.module.layers[2].register_forward_hook(lambda *_: rt.set_budget("60%"))
        with pytest.raises(litrt.LitrtError, match="in a pass"):
            rt(IDS)
        handle.remove()
        check(rt, plain)
        rt.close()
        with pytest.raises(litrt.ClosedError):
            rt.set_budget("60%")


def test_a_budget_changes_while_others_compute(path: Path, plain: nn.Module) -> None:
    with torch.no_grad():
        expected = plain(IDS)
    wrong: list[BaseException | str] = []
    stop = threading.Event()

    def work(rt: litrt.Runtime) -> None:
        try:
            while not stop.is_set():
                if not torch.equal(rt(IDS), expected):
                    wrong.append("a wrong result")
        except BaseException as error:
            wrong.append(error)

    with litrt.Runtime(Net, path, budget="50%") as rt:
        rt.warmup(IDS)
        threads = [threading.Thread(target=work, args=(rt,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for budget in ["30%", "100%", "min", "100%"] * 3:
            rt.set_budget(budget)
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong
        check(rt, plain)


def test_rows_are_gathered_where_the_budget_has_changed_since_all_of_a_table_was_to_be_used(
    path: Path, plain: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = Pipeline.gather
    with litrt.Runtime(Net, path, budget="30%") as rt, torch.no_grad():
        rt.warmup(IDS)

        def all_of_it(*_: Any) -> None:
            monkeypatch.setattr(Pipeline, "gather", gather)

        monkeypatch.setattr(Pipeline, "gather", all_of_it)
        assert torch.equal(rt.module.embed(IDS), plain.get_submodule("embed")(IDS))
        with pytest.raises(litrt.BudgetError):
            _ = rt.module.embed.weight + 1


def test_a_budget_changes_while_others_gather_rows_for_a_device(path: Path, plain: nn.Module) -> None:
    with torch.no_grad():
        expected = plain(IDS), plain.get_submodule("embed")(IDS)
    wrong: list[BaseException | str] = []
    stop = threading.Event()

    def work(rt: litrt.Runtime) -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    if not torch.equal(rt.module.embed(IDS), expected[1]):
                        wrong.append("wrong rows")
                time.sleep(0.02)  # or the two could leave no room between them
        except BaseException as error:
            wrong.append(error)

    with litrt.Runtime(Net, path, budget="min", device=FakeDevice("random"), host_budget=0) as rt:
        rt.warmup(IDS)
        least = rt.stats().budget_bytes
        threads = [threading.Thread(target=work, args=(rt,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for number in range(20):
            rt.set_budget(least + number % 3 * 20_000)
            assert torch.equal(rt(IDS), expected[0])
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong


def test_a_thread_that_reads_and_was_one_too_many_is_replaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, may_end = threading.Semaphore(0), threading.Event()
    run = ReadThreads._run

    def run_and_end_late(reads: ReadThreads[Any], number: int) -> None:
        run(reads, number)
        ended.release()
        assert may_end.wait(30)

    monkeypatch.setattr(ReadThreads, "_run", run_and_end_late)
    before = read_threads()
    with litrt.Runtime(Net, path, budget="50%", n_threads=3) as rt:
        rt(IDS)
        rt._pipeline._reads.resize(1)
        assert all(ended.acquire(timeout=30) for _ in range(2))
        rt._pipeline._reads.resize(3)  # the two read no more, and have not ended
        while len(read_threads() - before) < 5:
            rt(IDS)
        may_end.set()


# Shared budgets.


needs = st.builds(lambda least, more: Need(least, least + more), st.integers(1, 10**9), st.integers(0, 10**10))


@given(st.lists(needs, min_size=1, max_size=5), st.floats(0, 1.2))
def test_shares_add_up_and_suffice(parts: list[Need], share: float) -> None:
    least = sum(need.least_bytes for need in parts)
    most = sum(need.most_bytes for need in parts)
    budget = least + int(share * (most - least))
    shares = divide(budget, parts)
    assert sum(shares) <= budget
    assert all(need.least_bytes <= part <= need.most_bytes for need, part in zip(parts, shares, strict=True))
    assert sum(shares) >= min(budget, most) - len(parts), "nothing is left over"
    with pytest.raises(litrt.BudgetError) as caught:
        divide(least - 1, parts)
    assert caught.value.needed_bytes == least


def held(*runtimes: litrt.Runtime) -> int:
    return sum(rt.stats().budget_bytes for rt in runtimes)


def test_runtimes_share_a_budget(path: Path, plain: nn.Module) -> None:
    total = sum(tensor.nbytes for tensor in plain.state_dict().values())
    shared = litrt.SharedBudget(total)
    with litrt.Runtime(Net, path, budget=shared) as one:
        one.warmup(IDS)
        assert one.stats().budget_bytes == total == shared.shares[0]
        with litrt.Runtime(Net, path, budget=shared) as other:
            other.warmup(IDS)
            assert held(one, other) <= total
            assert min(shared.shares) > 0.45 * total
            for rt in (one, other, one):
                check(rt, plain)
            with litrt.Runtime(Net, path, budget=shared) as third:
                third.warmup(IDS)
                assert held(one, other, third) <= total
                for rt in (one, other, third):
                    check(rt, plain)
        assert shared.shares == [total]
        assert one.stats().budget_bytes == total
        check(one, plain)
        with pytest.raises(litrt.LitrtError, match="SharedBudget"):
            one.set_budget("50%")
    assert shared.shares == []


def test_a_shared_budget_that_is_too_small_for_another_one_leaves_all_as_it_was(path: Path, plain: nn.Module) -> None:
    shared = litrt.SharedBudget("290kB")
    with litrt.Runtime(Net, path, budget=shared) as one:
        one.warmup(IDS)
        before = one.stats().budget_bytes
        with pytest.raises(litrt.BudgetError, match="shared by 2 runtimes"):
            litrt.Runtime(Net, path, budget=shared)
        assert one.stats().budget_bytes == before
        check(one, plain)


def test_a_runtime_that_cannot_be_made_leaves_a_shared_budget(path: Path, plain: nn.Module) -> None:
    shared = litrt.SharedBudget("4MB")
    with litrt.Runtime(Net, path, budget=shared) as one:
        before = shared.shares
        with pytest.raises(litrt.SkeletonError):
            litrt.Runtime(lambda: nn.Linear(2, 2), path, budget=shared)
        assert shared.shares == before
        check(one, plain)


def test_a_share_that_a_runtime_could_not_fill_is_counted(path: Path, plain: nn.Module, tmp_path: Path) -> None:
    copy = shutil.copytree(path, tmp_path / "copy.zarr")
    total = sum(tensor.nbytes for tensor in plain.state_dict().values())
    shared = litrt.SharedBudget(total)
    with litrt.Runtime(Net, copy, budget=shared) as one:
        one.warmup(IDS)
        with litrt.Runtime(Net, path, budget=shared) as other:
            other.warmup(IDS)
            away = copy.rename(tmp_path / "away")
        assert shared.shares == [one.stats().budget_bytes], "what it has grown to, although nothing could be read"
        away.rename(copy)
        with litrt.Runtime(Net, path, budget=shared) as another:
            another.warmup(IDS)
            for rt in (one, another, one):
                check(rt, plain)
            assert held(one, another) <= total


def test_a_runtime_that_was_dropped_leaves_its_share(path: Path, plain: nn.Module) -> None:
    shared = litrt.SharedBudget("4MB")
    litrt.Runtime(Net, path, budget=shared)
    gc.collect()
    with litrt.Runtime(Net, path, budget=shared) as rt:
        assert len(shared.shares) == 1
        check(rt, plain)


def test_a_runtime_is_not_made_in_a_pass_of_another_one_with_the_same_budget(path: Path, plain: nn.Module) -> None:
    shared = litrt.SharedBudget("4MB")
    with litrt.Runtime(Net, path, budget=shared) as one:
        handle = one.module.layers[2].register_forward_hook(lambda *_: litrt.Runtime(Net, path, budget=shared))
        with pytest.raises(litrt.LitrtError, match="in a pass"):
            one(IDS)
        handle.remove()
        check(one, plain)
