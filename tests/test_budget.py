"""What the user asked for becomes bytes, and no more bytes than that are ever held."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import MakeStore
from torch import nn

import litrt
import litrt.budget
import litrt.memory
from litrt.arena import Arena, Block
from litrt.budget import CACHE_LINE_BYTES, PAGE_BYTES, settle
from litrt.memory import available_bytes
from litrt.reader import Reader
from litrt.tensors import TensorInfo

LARGE = 300_000  # on a page
SMALL = 1_000  # on a cache line


def info(name: str, nbytes: int, *, direct: bool = True) -> TensorInfo:
    return TensorInfo(name, (nbytes,), torch.uint8, nbytes, name, nbytes, direct, nbytes)


INFOS = [info("small", SMALL), info("large", LARGE), info("larger", 2 * LARGE)]
TOTAL = 3 * LARGE + SMALL
FOOTPRINT = 1024 + 74 * PAGE_BYTES + 147 * PAGE_BYTES


# From words to bytes.


@pytest.mark.parametrize(
    ("budget", "budget_bytes"),
    [
        (700_000, 700_000),
        ("700kB", 700_000),
        ("0.7 MB", 700_000),
        ("650KiB", 650 * 1024),
        ("80%", TOTAL * 80 // 100),
        ("99.9%", int(TOTAL * 0.999)),
    ],
)
def test_a_budget_is_settled_to_its_bytes_scratch_included(budget: int | str, budget_bytes: int) -> None:
    settled = settle(budget, INFOS, 8192, {})
    assert settled.budget_bytes == budget_bytes
    assert settled.scratch_bytes == 8192
    assert settled.arena_bytes == budget_bytes - 8192
    assert not settled.growable


def test_segments_are_the_weights_in_order_and_lie_on_what_reads_want() -> None:
    settled = settle(700_000, INFOS, 8192, {})
    assert [(segment.name, segment.nbytes) for segment in settled.segments] == [
        (info.name, info.nbytes) for info in INFOS
    ]
    assert [segment.align_bytes for segment in settled.segments] == [CACHE_LINE_BYTES, PAGE_BYTES, PAGE_BYTES]
    for segment in settled.segments:
        assert segment.size_bytes % segment.align_bytes == 0
        assert 0 <= segment.size_bytes - segment.nbytes < segment.align_bytes
    assert sum(segment.size_bytes for segment in settled.segments) == FOOTPRINT


@pytest.mark.parametrize("budget", [FOOTPRINT + 8192, FOOTPRINT + 8193, "6GB", "1TiB", "200%", 10**15])
def test_a_budget_beyond_the_model_is_clamped_to_it(budget: int | str) -> None:
    settled = settle(budget, INFOS, 8192, {})
    assert settled.budget_bytes == FOOTPRINT + 8192
    assert settled.arena_bytes == FOOTPRINT


@pytest.mark.parametrize("budget", ["100%", TOTAL, FOOTPRINT + 8191])
def test_all_weights_stay_where_they_fit_without_the_padding_to_pages(budget: int | str) -> None:
    settled = settle(budget, INFOS, 8192, {})
    assert settled.arena_bytes == sum(segment.size_bytes for segment in settled.segments) < TOTAL + 3 * CACHE_LINE_BYTES
    assert {segment.align_bytes for segment in settled.segments} == {CACHE_LINE_BYTES}
    # Reads that end off a page need no scratch.
    assert settled.scratch_bytes == 0


def test_weights_that_need_scratch_wherever_they_lie_are_not_packed() -> None:
    infos = [*INFOS[:2], info("larger", 2 * LARGE, direct=False)]
    settled = settle("100%", infos, 8192, {})
    assert settled.arena_bytes == TOTAL - 8192
    assert settled.scratch_bytes == 8192


def test_the_smallest_budget_starts_with_scratch_alone_and_may_grow_to_hold_all() -> None:
    settled = settle("min", INFOS, 8192, {})
    assert settled.growable
    assert (settled.budget_bytes, settled.arena_bytes, settled.scratch_bytes) == (8192, 0, 8192)
    assert settled.most_bytes >= FOOTPRINT


@pytest.mark.parametrize("available", [1_400_000, 10**12])
def test_auto_is_half_of_what_is_available_clamped_to_the_model(
    available: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litrt.budget, "available_bytes", lambda: available)
    assert settle("auto", INFOS, 8192, {}).budget_bytes == min(available // 2, FOOTPRINT + 8192)


def test_auto_says_so_where_half_of_what_is_available_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litrt.budget, "available_bytes", lambda: 1_000_000)
    with pytest.raises(litrt.BudgetError, match=r"budget 0\.50 MB cannot hold 'larger' \(0\.60 MB\)"):
        settle("auto", INFOS, 8192, {})


def test_too_small_a_budget_names_the_weight_and_a_budget_that_works() -> None:
    needed = 147 * PAGE_BYTES + 8192
    with pytest.raises(litrt.BudgetError) as caught:
        settle(needed - 1, INFOS, 8192, {})
    assert (caught.value.budget_bytes, caught.value.needed_bytes) == (needed - 1, needed)
    assert "'larger' (0.60 MB)" in str(caught.value)
    assert "budget 0.61 MB cannot hold" in str(caught.value)
    assert f"{needed} bytes, 8192 of them scratch for reads" in str(caught.value)
    assert "budget='min'" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert settle(needed, INFOS, 8192, {}).budget_bytes == needed


def test_a_message_does_not_mention_scratch_where_there_is_none() -> None:
    with pytest.raises(litrt.BudgetError) as caught:
        settle(SMALL, INFOS, 0, {})
    assert "scratch" not in str(caught.value)
    assert caught.value.needed_bytes == 147 * PAGE_BYTES


@pytest.mark.parametrize("budget", [0, -1, "0", "0%"])
def test_a_budget_is_positive(budget: int | str) -> None:
    with pytest.raises(litrt.BudgetError, match="positive number of bytes"):
        settle(budget, INFOS, 0, {})


@pytest.mark.parametrize("budget", ["6 gigs", "", "maximum", "%", 1.5, None, True])
def test_a_budget_that_cannot_be_read_is_refused_before_the_model_is_built(budget: Any, tmp_path: Path) -> None:
    def constructor() -> nn.Module:
        raise AssertionError("the model was built")

    with pytest.raises(litrt.BudgetError, match=re.escape(f"cannot read budget {budget!r}")):
        litrt.Runtime(constructor, tmp_path / "none.zarr", budget=budget)


# Tables: what has to fit is a piece.


def test_of_a_table_only_its_largest_piece_has_to_fit() -> None:
    table = info("table", 50 * LARGE)
    budget = 160 * PAGE_BYTES
    settled = settle(budget, [*INFOS, table], 8192, {"table": 30_000})
    assert settled.budget_bytes == budget
    slot = settled.segments[-1]
    assert slot.is_slot
    assert (slot.nbytes, slot.fetch_bytes) == (8 * PAGE_BYTES, 0)
    assert [segment.is_slot for segment in settled.segments[:-1]] == [False] * 4
    with pytest.raises(litrt.BudgetError, match="'table'"):
        settle(budget, [*INFOS, table], 8192, {})


def test_a_piece_that_does_not_fit_is_named() -> None:
    with pytest.raises(litrt.BudgetError, match=r"cannot hold '\(rows of tables\)' \(0\.90 MB\)") as caught:
        settle(160 * PAGE_BYTES, [*INFOS, info("table", 50 * LARGE)], 0, {"table": 3 * LARGE})
    assert caught.value.needed_bytes == 220 * PAGE_BYTES


def test_where_all_fits_there_is_room_for_all_tables_whole_and_none_for_their_rows() -> None:
    settled = settle("100%", [*INFOS, info("table", LARGE)], 8192, {"table": 30_000})
    assert settled.arena_bytes == sum(segment.size_bytes for segment in settled.segments if not segment.is_slot)


# The memory that is available.


def write(folder: Path, **files: str | int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def rooms(tmp_path: Path, own: str) -> list[int]:
    (tmp_path / "own").write_text(own)
    return list(litrt.memory._cgroup_rooms(tmp_path / "cgroup", tmp_path / "own"))


def version_2(folder: Path, limit: str | int, usage: int, inactive: int = 0) -> None:
    stat = f"anon 5\ninactive_file {inactive}\nactive_file 17"
    write(folder, memory__max=limit, memory__current=usage, memory__stat=stat)


def version_1(folder: Path, limit: str | int, usage: int, inactive: int = 0) -> None:
    stat = f"cache 5\ninactive_file {inactive}\ntotal_inactive_file 17"
    write(folder, memory__limit_in_bytes=limit, memory__usage_in_bytes=usage, memory__stat=stat)


def test_version_2_groups_and_their_parents_limit(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    version_2(root / "user.slice" / "app", 1_000, 300)
    version_2(root / "user.slice", 5_000, 4_500)
    assert rooms(tmp_path, "0::/user.slice/app\n") == [700, 500]


def test_version_2_without_a_limit_is_no_limit(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    version_2(root / "app", "max", 300)
    version_2(root, 5_000, 1_000)
    assert rooms(tmp_path, "0::/app\n") == [4_000]


def test_page_cache_that_can_be_dropped_is_room(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    version_2(root / "app", 1_000, 900, inactive=600)
    version_1(root / "memory" / "app", 1_000, 800, inactive=700)
    assert rooms(tmp_path, "0::/app\n4:memory:/app\n") == [700, 900]


def test_more_page_cache_than_usage_is_not_room_beyond_the_limit(tmp_path: Path) -> None:
    version_2(tmp_path / "cgroup" / "app", 1_000, 100, inactive=600)
    assert rooms(tmp_path, "0::/app\n") == [1_000]


def test_in_a_container_the_group_is_mounted_at_the_top(tmp_path: Path) -> None:
    version_2(tmp_path / "cgroup", 2_000, 500)
    assert rooms(tmp_path, "0::/system.slice/docker-0123.scope\n") == [1_500]


def test_version_1_memory_groups_limit_and_other_controllers_do_not(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    version_1(root / "memory" / "docker" / "x", 3_000, 1_000)
    version_1(root / "memory", 9223372036854771712, 1_000)
    version_1(root / "cpu" / "docker" / "x", 10, 1)
    own = "5:cpu,cpuacct:/docker/x\n4:memory,hugetlb:/docker/x\n1:name=systemd:/docker/x\n"
    assert rooms(tmp_path, own) == [2_000, 9223372036854770712]


@pytest.mark.parametrize("own", ["0::/\n", "4:memory:/gone\n", ""])
def test_groups_that_cannot_be_read_are_no_limit(own: str, tmp_path: Path) -> None:
    write(tmp_path / "cgroup" / "memory", memory__limit_in_bytes=1, memory__usage_in_bytes="x", memory__stat="a 1")
    assert rooms(tmp_path, own) == []
    assert list(litrt.memory._cgroup_rooms(tmp_path, tmp_path / "none")) == []


@pytest.mark.parametrize("found", [[], [10**15], [123_456, 10**15], [456, 123_456], [-5]])
def test_what_is_available_is_the_least_of_the_machine_and_its_groups(
    found: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(litrt.memory, "_cgroup_rooms", lambda: iter(found))
    assert available_bytes() == max(min([machine.available, *found]), 0)


# A runtime keeps within it.

WIDTH = 300


class Model(nn.Module):
    """Weights of several sizes, one of them used twice, one used with another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x = self.layers[0](x)
        return self.wide(x @ (self.layers[1].weight + self.layers[2].weight))


class Watch:
    """Adds up for itself what blocks are held, whenever one is placed, and reads under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: list[Block] = []
        self.most_bytes = self.most_end = 0
        add, remove = Arena._add, Arena._remove

        def watched_add(arena: Arena, block: Block) -> Block:
            self.blocks.append(block)
            self.most_bytes = max(self.most_bytes, sum(block.nbytes for block in self.blocks))
            self.most_end = max(self.most_end, block.end)
            return add(arena, block)

        def watched_remove(arena: Arena, block: Block) -> None:
            self.blocks.remove(block)
            remove(arena, block)

        monkeypatch.setattr(Arena, "_add", watched_add)
        monkeypatch.setattr(Arena, "_remove", watched_remove)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def scratch_of(path: Path, n_threads: int) -> int:
    reader = Reader(litrt.open_store(path))
    try:
        return n_threads * reader.scratch_bytes_per_task
    finally:
        reader.close()


@pytest.mark.parametrize(
    ("share", "policy"), [(None, "belady"), (0.0, "belady"), (0.5, "belady"), (1.0, "belady"), (0.5, "lru")]
)
@pytest.mark.parametrize("compress", [None, "lz4"])
def test_no_more_than_the_budget_is_held_at_any_moment(
    compress: str | None, share: float | None, policy: Any, make_store: MakeStore, watch: Watch
) -> None:
    plain = Model().eval()
    path = make_store(plain, compress=compress)
    n_threads = 2
    scratch = scratch_of(path, n_threads)
    weights = sum(parameter.nbytes for parameter in plain.parameters())
    smallest = 2 * WIDTH * WIDTH * 4 + 8192  # the two weights that are added up, on pages, and a bias
    budget = "min" if share is None else scratch + smallest + 4096 + int(share * (weights - smallest))
    x = torch.randn(3, WIDTH)
    with litrt.Runtime(Model, path, budget=budget, policy=policy, n_threads=n_threads) as rt, torch.no_grad():

        def check() -> None:
            stats = rt.stats()
            assert watch.most_end + scratch <= stats.budget_bytes
            assert stats.peak_bytes == watch.most_bytes + scratch <= stats.budget_bytes
            if budget != "min":
                assert stats.budget_bytes <= budget

        for layer in (*rt.module.layers, rt.module.wide):
            layer.register_forward_hook(lambda *_: check())
        rt.warmup(x)
        check()
        before = rt.stats()
        for _ in range(3):
            assert torch.equal(rt(x), plain(x))
            check()
        assert (rt.stats().since(before).read_bytes > 0) == (share != 1.0)


def test_decode_scratch_is_part_of_the_budget(make_store: MakeStore) -> None:
    plain = Model().eval()
    path = make_store(plain, compress="lz4")
    largest = plain.wide.weight.nbytes
    per_thread = scratch_of(path, 1)
    assert per_thread > largest, "a chunk as it is stored, and what Blosc needs"
    for n_threads in (1, 3):
        needed = n_threads * per_thread + -(-largest // PAGE_BYTES) * PAGE_BYTES
        with pytest.raises(litrt.BudgetError, match=f"{n_threads * per_thread} of them scratch") as caught:
            litrt.Runtime(Model, path, budget=needed - 1, n_threads=n_threads)
        assert caught.value.needed_bytes == needed
        with litrt.Runtime(Model, path, budget=needed, n_threads=n_threads) as rt:
            assert rt.module.wide.weight.sum() == plain.wide.weight.sum()
            assert rt.stats().peak_bytes == n_threads * per_thread + largest
            assert rt.stats().budget_bytes == needed


@pytest.mark.parametrize("compress", [None, "lz4"])
def test_reads_take_no_more_memory_than_the_scratch_they_are_given(compress: str | None, make_store: MakeStore) -> None:
    plain = Model().eval()
    path = make_store(plain, compress=compress)
    x = torch.randn(3, WIDTH)
    with litrt.Runtime(Model, path, budget="min", n_threads=1) as rt:
        rt.warmup(x)
        rt(x)
        scratch = scratch_of(path, 1)
        tracemalloc.start()
        try:
            rt(x)
            _, most_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # Arena and activations are not Python's; what is left beside scratch is small objects.
    assert most_bytes < scratch + 200_000


def test_a_use_that_the_budget_cannot_hold_says_what_is_in_use_and_more_leads_to_one_that_works(
    make_store: MakeStore,
) -> None:
    path = make_store(Model())
    budget = 729_088  # 'wide.weight' on its pages, and scratch
    for _ in range(5):
        with litrt.Runtime(Model, path, budget=budget, n_threads=1) as rt:
            error = budget_error(lambda rt=rt: rt(torch.randn(3, WIDTH)))
            assert rt.stats().peak_bytes <= rt.stats().budget_bytes == budget
        if error is None:
            break
        assert re.search(r"cannot hold '[a-z.0-9]+' \([0-9.]+ k?M?B\) beside [0-9.]+ MB in use", str(error))
        assert error.budget_bytes == budget
        assert error.needed_bytes is not None
        assert error.needed_bytes > budget
        budget = error.needed_bytes
    assert error is None, f"budget {budget} is said to be enough, and is not"
    assert 729_088 < budget < 900_000


def budget_error(call: Callable[[], Any]) -> litrt.BudgetError | None:
    try:
        call()
    except litrt.BudgetError as error:
        return error
    return None


def test_the_smallest_budget_is_what_the_largest_use_needs_and_is_enough(make_store: MakeStore) -> None:
    path = make_store(Model())
    x = torch.randn(3, WIDTH)
    with litrt.Runtime(Model, path, budget="min") as rt:
        rt.warmup(x)
        smallest = rt.stats().budget_bytes
        assert smallest < sum(segment.nbytes for segment in rt.plan.segments) / 2
    with litrt.Runtime(Model, path, budget=smallest) as rt:
        rt.warmup(x)
        rt(x)
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes == smallest


def test_autocast_does_not_keep_what_has_to_make_room(make_store: MakeStore) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
            self.large = nn.Linear(32, 128)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    plain = Two().eval()
    x = torch.randn(3, 32)
    budget = sum(weight.nbytes for weight in plain.layers.parameters()) + 1024
    with litrt.Runtime(Two, make_store(plain), budget=budget) as rt, torch.no_grad():
        rt.warmup(x)
        assert rt.stats().resident_bytes == budget - 1024, "all that a pass uses"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(rt(x), plain(x))
            assert torch.equal(rt.module.large(x), plain.large(x))
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes == budget


def test_autocast_keeps_no_weight_of_a_fused_module(make_store: MakeStore) -> None:
    def construct() -> nn.Module:
        return nn.Sequential(*(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True) for _ in range(3)))

    plain = construct().eval()
    x = torch.randn(3, 32)  # not a batch: the layers call their parts
    with litrt.Runtime(construct, make_store(plain), budget="min") as rt, torch.no_grad():
        rt.warmup(x)
        smallest = rt.stats().budget_bytes
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(2):
                assert torch.equal(rt(x), plain(x))
        assert rt.stats().budget_bytes == smallest
