"""Rows of a table that does not fit: the right ones, at the price of the pieces that have them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MakeStore
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import litrt
import litrt.arrays
from litrt.blocks import Blocks
from litrt.gather import Rows, batches, copy_rows

pytestmark = pytest.mark.usefixtures("poisoned")

WIDTH = 64
N_ROWS = 1_000
ROW_BYTES = WIDTH * 4
TABLE_BYTES = N_ROWS * ROW_BYTES
ROWS_PER_PIECE = 64
PIECE_BYTES = ROWS_PER_PIECE * ROW_BYTES
BUDGET = 60_000  # a quarter of the table


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(N_ROWS, WIDTH, padding_idx=3)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture
def plain() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model().eval().requires_grad_(False)


@pytest.fixture
def path(plain: nn.Module, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(litrt.arrays, "TARGET_CHUNK_BYTES", PIECE_BYTES)
        return make_store(plain)


@pytest.fixture
def rt(path: Path) -> Iterator[litrt.Runtime]:
    with litrt.Runtime(Model, path, budget=BUDGET, n_threads=1) as runtime:
        assert runtime.stats().budget_bytes == BUDGET < TABLE_BYTES
        yield runtime
        assert runtime.stats().peak_bytes <= BUDGET


def test_the_table_is_in_pieces(path: Path) -> None:
    store = litrt.open_store(path)
    assert PIECE_BYTES / 2 < store["table.weight"].chunk_bytes <= 2 * PIECE_BYTES
    assert TABLE_BYTES // store["table.weight"].chunk_bytes >= 8
    store.close()


@pytest.fixture
def piece_bytes(path: Path) -> int:
    store = litrt.open_store(path)
    found = store["table.weight"].chunk_bytes
    store.close()
    return found


IDS: dict[str, Callable[[], torch.Tensor]] = {
    "one": lambda: torch.tensor([5]),
    "first and last": lambda: torch.tensor([0, N_ROWS - 1]),
    "a number": lambda: torch.tensor(17),
    "duplicated": lambda: torch.tensor([7, 7, 999, 7, 0, 999]),
    "out of order": lambda: torch.tensor([900, 3, 500, 4, 901]),
    "int32": lambda: torch.tensor([[900, 3], [4, 901]], dtype=torch.int32),
    "two dimensions": lambda: torch.tensor([[1, 900, 1], [64, 63, 65]]),
    "three dimensions": lambda: torch.arange(24).reshape(2, 3, 4) * 40,
    "not contiguous": lambda: (torch.arange(12).reshape(3, 4) * 80).t(),
    "none": lambda: torch.empty(0, dtype=torch.long),
    "none of some": lambda: torch.empty(2, 0, 3, dtype=torch.long),
    "padding": lambda: torch.tensor([3, 4, 3]),
    "all": lambda: torch.arange(N_ROWS),
}


@pytest.mark.parametrize("name", IDS)
def test_rows_are_those_of_the_table(name: str, rt: litrt.Runtime, plain: nn.Module) -> None:
    ids = IDS[name]()
    for _ in range(2):
        rows = rt.module.table(ids)
        expected = plain.table(ids)
        assert (rows.shape, rows.dtype) == (expected.shape, expected.dtype)
        assert not rows.requires_grad
        assert torch.equal(rows, expected)
        assert torch.equal(F.embedding(ids, rt.module.table.weight), expected)


def test_as_many_pieces_are_read_as_have_rows_that_are_wanted(
    rt: litrt.Runtime, plain: nn.Module, piece_bytes: int
) -> None:
    rows = piece_bytes // ROW_BYTES
    for ids, n_pieces in [
        ([0], 1),
        ([0, rows - 1, 5, 5], 1),
        ([rows - 1, rows], 2),
        ([5 * rows, 0, 3 * rows + 1, 3 * rows], 3),
        ([], 0),
    ]:
        before = rt.stats()
        wanted = torch.tensor(ids, dtype=torch.long)
        assert torch.equal(rt.module.table(wanted), plain.table(wanted))
        assert rt.stats().since(before).read_bytes == n_pieces * piece_bytes


def test_the_last_piece_has_what_rows_are_left(rt: litrt.Runtime, piece_bytes: int) -> None:
    before = rt.stats()
    rt.module.table(torch.tensor([N_ROWS - 1]))
    assert rt.stats().since(before).read_bytes == TABLE_BYTES - TABLE_BYTES // piece_bytes * piece_bytes > 0


def test_rows_are_the_callers_own(rt: litrt.Runtime, plain: nn.Module) -> None:
    ids = torch.tensor([1, 500])
    rows = rt.module.table(ids)
    kept = rows.clone()
    rt.module.table(torch.tensor([900, 700]))
    assert torch.equal(rows, kept)
    rows.zero_()
    assert torch.equal(rt.module.table(ids), plain.table(ids))


@pytest.mark.parametrize("bad", [-1, N_ROWS, 10**12, -(2**40)])
def test_an_id_that_is_no_row_is_an_index_error(bad: int, rt: litrt.Runtime, plain: nn.Module) -> None:
    ids = torch.tensor([0, bad, 5])
    with pytest.raises(IndexError, match="index out of range in self"):
        plain.table(ids)
    before = rt.stats()
    with pytest.raises(IndexError, match="index out of range in self"):
        rt.module.table(ids)
    assert rt.stats().since(before).read_bytes == 0
    assert torch.equal(rt.module.table(torch.tensor([0])), plain.table(torch.tensor([0])))
    assert torch.equal(rt(torch.tensor([0])), plain(torch.tensor([0])))


def test_a_pass_gathers_and_streams_within_the_budget(rt: litrt.Runtime, plain: nn.Module, piece_bytes: int) -> None:
    ids = torch.tensor([[1, 900, 1], [64, 63, 65]])
    n_pieces = len(set((ids // (piece_bytes // ROW_BYTES)).flatten().tolist()))
    rt.warmup(ids)
    assert len(rt.plan.tables) == 1
    assert rt.plan.segments[rt.plan.tables[0]].name == "table.weight"
    assert rt.plan.gathered_bytes == n_pieces * piece_bytes
    rt(ids)
    for _ in range(2):
        before = rt.stats()
        assert torch.equal(rt(ids), plain(ids))
        counts = rt.stats().since(before)
        assert counts.n_faults == 0
        assert counts.read_bytes == rt.plan.streamed_bytes < TABLE_BYTES
    # Other rows are right as well, and cost what they cost.
    for seed in range(3):
        other = torch.randint(N_ROWS, (2, 3), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(rt(other), plain(other))
    # An empty pass, between others.
    none = torch.empty(0, dtype=torch.long)
    assert torch.equal(rt(none), plain(none))
    assert torch.equal(rt(ids), plain(ids))


def test_a_table_that_fits_is_kept_whole(path: Path, plain: nn.Module) -> None:
    with litrt.Runtime(Model, path, budget="100%") as rt:
        rt.warmup(torch.tensor([1]))
        before = rt.stats()
        for name in ("all", "duplicated", "one"):
            assert torch.equal(rt(IDS[name]()), plain(IDS[name]()))
        assert rt.stats().since(before).read_bytes == 0
        assert rt.plan.tables == ()


def test_a_table_without_room_is_an_error_where_it_is_used_whole(rt: litrt.Runtime) -> None:
    with pytest.raises(litrt.BudgetError, match=r"'table\.weight'"):
        rt.module.table.weight.sum()
    assert rt.module.table(torch.tensor([1])).shape == (1, WIDTH)


def test_a_damaged_piece_is_reported_where_its_rows_are_wanted(
    path: Path, rt: litrt.Runtime, plain: nn.Module, piece_bytes: int
) -> None:
    file = path / "table.weight" / "c" / "1" / "0"
    whole = file.read_bytes()
    file.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    rows = piece_bytes // ROW_BYTES
    fine, damaged = torch.tensor([0, 2 * rows]), torch.tensor([0, rows])
    assert torch.equal(rt.module.table(fine), plain.table(fine))
    for _ in range(2):
        with pytest.raises(litrt.CorruptWeightError, match=r"'table\.weight'.*damaged") as caught:
            rt.module.table(damaged)
        assert caught.value.file == str(file)
    file.write_bytes(whole)
    assert torch.equal(rt.module.table(damaged), plain.table(damaged))


def test_threads_that_gather_at_the_same_time_share_one_slot(rt: litrt.Runtime, plain: nn.Module) -> None:
    n_threads = 3
    together = threading.Barrier(n_threads)

    def run(seed: int) -> bool:
        together.wait(60)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            ids = torch.randint(N_ROWS, (5,), generator=generator)
            if not torch.equal(rt.module.table(ids), plain.table(ids)):
                return False
        return True

    with ThreadPoolExecutor(n_threads) as pool:
        assert all(pool.map(run, range(n_threads)))


@settings(max_examples=200)
@given(st.data())
def test_each_block_is_read_once_and_each_row_comes_to_its_place(data: Any) -> None:
    n_rows, width = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 6))
    chunk_rows = data.draw(st.integers(1, n_rows + 3))
    block_rows = data.draw(st.integers(1, chunk_rows))
    dtype = np.dtype(data.draw(st.sampled_from(["uint8", "int16", "float64"])))
    table = np.arange(n_rows * width).astype(dtype)
    blocks = Blocks(n_rows, width * dtype.itemsize, chunk_rows, block_rows)
    # A view of it, with rows of its own.
    first = data.draw(st.integers(0, len(table) - 1))
    n_elements = data.draw(st.integers(1, len(table) - first))
    n_view_rows = (len(table) - first) // n_elements
    numbers = np.array(data.draw(st.lists(st.integers(0, n_view_rows - 1), min_size=1, max_size=20)))
    max_bytes = data.draw(st.integers(0, table.nbytes + 9))

    view = table[first : first + n_view_rows * n_elements].reshape(n_view_rows, n_elements)
    dest = np.zeros((len(numbers), n_elements * dtype.itemsize), dtype=np.uint8)
    read: list[int] = []
    largest = 0
    for batch in batches(Rows(first, n_elements, numbers), blocks, dtype.itemsize, max_bytes):
        source = np.concatenate([table[start:stop] for start, stop in batch.ranges])
        assert len(source) == batch.n_elements
        read += [row for start, stop in batch.ranges for row in range(start // width, stop // width)]
        largest = max(largest, len({*numbers[batch.wanted].tolist()}) if source.nbytes > max_bytes else 0)
        copy_rows(batch, source.view(np.uint8), dest, dtype.itemsize)
    assert np.array_equal(dest.view(dtype), view[numbers])
    wanted = {
        row
        for number in numbers.tolist()
        for row in range((first + number * n_elements) // width, (first + (number + 1) * n_elements - 1) // width + 1)
    }
    block = [(row // chunk_rows, row % chunk_rows // block_rows) for row in range(n_rows)]
    assert sorted(read) == [row for row in range(n_rows) if block[row] in {block[other] for other in wanted}]
    if n_elements == width and first % width == 0:
        assert largest <= block_rows  # more than the limit only for the rows of one block
