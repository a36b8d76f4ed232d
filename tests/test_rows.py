"""Few rows of a large weight: the right ones, at the price of the blocks that have them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MakeStore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import litrt
import litrt.arrays
import litrt.blocks
from litrt.testing import FakeDevice

pytestmark = pytest.mark.usefixtures("poisoned")

WIDTH = 96
N_ROWS = 1_000
ROW_BYTES = WIDTH * 4
BLOCK_ROWS = 32  # 12 KiB: the fewest rows that are whole pages
BLOCK_BYTES = BLOCK_ROWS * ROW_BYTES
N_EXPERTS = 16


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(N_ROWS, WIDTH))
        self.words = nn.Embedding(N_ROWS, WIDTH, padding_idx=5)
        self.experts = nn.Parameter(torch.empty(N_EXPERTS, 64, WIDTH))
        self.flat = nn.Parameter(torch.empty(20_000))
        self.head = nn.Linear(WIDTH, 8)
        for number, weight in enumerate(self.parameters()):
            nn.init.normal_(weight, generator=torch.Generator().manual_seed(number))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids))


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return Model().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def path(plain: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(litrt.blocks, "BLOCK_BYTES", 4096)
        patch.setattr(litrt.arrays, "TARGET_CHUNK_BYTES", 100_000)
        folder = tmp_path_factory.mktemp("rows")
        litrt.convert(plain.state_dict(), folder / "model.zarr", progress=False)
    return folder / "model.zarr"


@pytest.fixture
def rt(path: Path) -> Iterator[litrt.Runtime]:
    with litrt.Runtime(Model, path, budget="min") as runtime:
        yield runtime
        assert runtime.stats().peak_bytes <= runtime.stats().budget_bytes


def block_bytes(path: Path, name: str, rows: list[int]) -> int:
    """Returns the bytes of the blocks that have `rows`, counted one by one."""
    store = litrt.open_store(path)
    info = store[name]
    blocks = info.blocks
    assert blocks is not None
    found = {(row // info.chunk_rows, row % info.chunk_rows // blocks.block_rows) for row in rows}
    total = 0
    for chunk, block in found:
        first = chunk * info.chunk_rows + block * blocks.block_rows
        end = min(first + blocks.block_rows, (chunk + 1) * info.chunk_rows, blocks.n_rows)
        total += (end - first) * blocks.row_bytes
    store.close()
    return total


def test_the_store_has_several_blocks_in_each_of_several_chunks(path: Path) -> None:
    store = litrt.open_store(path)
    info = store["table"]
    assert info.blocks is not None
    assert info.blocks.block_rows == BLOCK_ROWS
    assert BLOCK_ROWS < info.chunk_rows < N_ROWS
    store.close()


Call = Callable[[torch.Tensor], torch.Tensor]
OPERATORS: dict[str, Callable[[Any], Call]] = {
    "F.embedding": lambda ids: lambda w: F.embedding(ids, w),
    "torch.embedding": lambda ids: lambda w: torch.embedding(w, ids),
    "aten.embedding": lambda ids: lambda w: torch.ops.aten.embedding.default(w, ids),
    "index_select": lambda ids: lambda w: torch.index_select(w, 0, ids.reshape(-1)),
    "Tensor.index_select": lambda ids: lambda w: w.index_select(0, ids.reshape(-1)),
    "negative dim": lambda ids: lambda w: w.index_select(-2, ids.reshape(-1)),
    "aten.index_select": lambda ids: lambda w: torch.ops.aten.index_select.default(w, 0, ids.reshape(-1)),
    "index": lambda ids: lambda w: w[ids],
    "index from the end": lambda ids: lambda w: w[ids - N_ROWS],
    "index of all columns": lambda ids: lambda w: w[ids, :],
    "index and an ellipsis": lambda ids: lambda w: w[ids, ...],
    "aten.index": lambda ids: lambda w: torch.ops.aten.index.Tensor(w, [ids.long()]),
    "transposed ids": lambda ids: lambda w: w[torch.stack([ids, ids.flip(0)]).t() if ids.dim() == 1 else ids.t()],
    "list": lambda ids: lambda w: w[ids.reshape(-1).tolist()],
    "mask": lambda ids: lambda w: w[torch.zeros(N_ROWS, dtype=torch.bool).index_fill(0, ids.reshape(-1).long(), True)],
}


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_an_operator_gives_the_rows_of_the_table_and_reads_their_blocks_only(
    name: str, plain: nn.Module, path: Path, rt: litrt.Runtime, data: Any
) -> None:
    rows = data.draw(st.lists(st.integers(0, N_ROWS - 1), max_size=12))
    ids = torch.tensor(rows, dtype=data.draw(st.sampled_from([torch.int64, torch.int32])))
    if len(rows) % 2 == 0 and data.draw(st.booleans()):
        ids = ids.view(2, -1)
    call = OPERATORS[name](ids)
    before = rt.stats()
    got, expected = call(rt.module.table), call(plain.table)
    counts = rt.stats().since(before)
    assert type(got) is torch.Tensor
    assert torch.equal(got, expected)
    assert (got.dtype, got.stride(), got.requires_grad) == (expected.dtype, expected.stride(), False)
    assert counts.read_bytes == counts.gathered_bytes == block_bytes(path, "table", rows)


VIEWS: dict[str, tuple[Call, list[int]]] = {
    "select": (lambda w: w[3] * 2, [3]),
    "from the end": (lambda w: w[-1] + 1, [N_ROWS - 1]),
    "tensor of no dimension": (lambda w: w[torch.tensor(700)] + 1, [700]),
    "slice": (lambda w: w[40:45].sum(0), [*range(40, 45)]),
    "slice over blocks": (lambda w: w[60:70].cos(), [*range(60, 70)]),
    "narrow": (lambda w: torch.exp(w.narrow(0, 500, 2)), [500, 501]),
    "rows of a slice": (lambda w: w[200:900][torch.tensor([0, 699])], [200, 899]),
    "steps": (lambda w: w[10:100:40] * 1, [*range(10, 91)]),
    "transposed": (lambda w: torch.ones(1, WIDTH) @ w[7:9].t(), [7, 8]),
    "corner": (lambda w: w[900, 3:5] * 1, [900]),
    "chain": (lambda w: w.view(N_ROWS, 2, WIDTH // 2)[4][1].neg(), [4]),
    "rows of another shape": (lambda w: w.view(N_ROWS * 2, -1)[torch.tensor([1, 1999])], [0, 999]),
    "rows over rows": (lambda w: w.view(N_ROWS // 2, -1)[torch.tensor([1, 499])], [2, 3, 998, 999]),
    "into another": (lambda w: torch.zeros(2, WIDTH).copy_(w[20:22]), [20, 21]),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_reads_the_blocks_that_it_lies_in(name: str, plain: nn.Module, path: Path, rt: litrt.Runtime) -> None:
    call, rows = VIEWS[name]
    before = rt.stats()
    got, expected = call(rt.module.table), call(plain.table)
    assert torch.equal(got, expected)
    counts = rt.stats().since(before)
    assert counts.read_bytes == counts.gathered_bytes == block_bytes(path, "table", rows) < N_ROWS * ROW_BYTES


def test_elements_of_a_vector_are_rows_too(plain: nn.Module, path: Path, rt: litrt.Runtime) -> None:
    ids = torch.tensor([0, 19_999, 7])
    before = rt.stats()
    assert torch.equal(rt.module.flat[ids], plain.flat[ids])
    assert rt.module.flat[12_345].item() == plain.flat[12_345].item()
    assert rt.stats().since(before).read_bytes == block_bytes(path, "flat", [0, 19_999]) + block_bytes(
        path, "flat", [12_345]
    )


def test_two_rows_of_one_block_are_read_once_and_a_row_next_to_the_whole_is_no_read(
    plain: nn.Module, path: Path, rt: litrt.Runtime
) -> None:
    before = rt.stats()
    assert torch.equal(
        torch.stack([rt.module.table[1], rt.module.table[2]]), torch.stack([plain.table[1], plain.table[2]])
    )
    assert rt.stats().since(before).read_bytes == block_bytes(path, "table", [1, 2]) == BLOCK_BYTES
    before = rt.stats()
    assert torch.equal(rt.module.table @ rt.module.table[500], plain.table @ plain.table[500])
    assert rt.stats().since(before).read_bytes == N_ROWS * ROW_BYTES


BAD: dict[str, Call] = {
    "too large": lambda w: w[torch.tensor([0, N_ROWS])],
    "too small": lambda w: w[torch.tensor([-N_ROWS - 1])],
    "select": lambda w: w[N_ROWS] * 1,
    "embedding": lambda w: F.embedding(torch.tensor([N_ROWS]), w),
    "embedding, negative": lambda w: F.embedding(torch.tensor([-1]), w),
    "embedding of floats": lambda w: F.embedding(torch.tensor([1.0]), w),
    "padding": lambda w: F.embedding(torch.tensor([1]), w, padding_idx=N_ROWS),
    "index_select": lambda w: w.index_select(0, torch.tensor([N_ROWS])),
    "matrix of rows": lambda w: w.index_select(0, torch.tensor([[1]])),
    "mask of another length": lambda w: w[torch.tensor([True, False])],
    "list": lambda w: w[[1, N_ROWS]],
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_in_torchs_words_and_reads_nothing(
    name: str, plain: nn.Module, rt: litrt.Runtime
) -> None:
    call = BAD[name]
    with pytest.raises(Exception) as expected:  # noqa: PT011
        call(plain.table)
    before = rt.stats()
    with pytest.raises(expected.type) as got:
        call(rt.module.table)
    assert str(got.value) == str(expected.value)
    read_bytes = rt.stats().since(before).read_bytes
    assert read_bytes == 0 or name == "select"  # a view that cannot be is asked of the values


def test_other_indices_use_the_whole_table(plain: nn.Module, rt: litrt.Runtime) -> None:
    ids = torch.tensor([1, 2])
    for call in (
        lambda w: w[ids, ids],
        lambda w: w[:, ids],
        lambda w: w[torch.ones(N_ROWS, WIDTH, dtype=torch.bool)],
        lambda w: w.index_select(1, ids),
        lambda w: torch.index_select(w, 0, ids, out=torch.empty(2, WIDTH)),
    ):
        assert torch.equal(call(rt.module.table), call(plain.table))


def test_a_norm_to_renew_is_refused_before_anything_is_read(rt: litrt.Runtime) -> None:
    with pytest.raises(litrt.WeightWriteError, match="max_norm"):
        F.embedding(torch.tensor([1]), rt.module.table, max_norm=1.0)
    with pytest.raises(litrt.WeightWriteError, match="zero_"):
        rt.module.table[3].zero_()
    assert rt.stats().read_bytes == 0


def test_rows_that_somebody_keeps_are_not_overwritten(plain: nn.Module, rt: litrt.Runtime) -> None:
    kept = rt.module.table[3].numpy()
    for expert in range(N_EXPERTS):
        assert torch.equal(rt.module.experts[expert] * 1, plain.experts[expert])
    assert torch.equal(rt.module.table * 1, plain.table)
    assert (kept == plain.table[3].numpy()).all()


def test_rows_are_cast_after_they_were_read(plain: nn.Module, path: Path) -> None:
    served = Model().to(torch.bfloat16)
    served.load_state_dict(plain.state_dict())
    with litrt.Runtime(Model, path, budget="min", dtype="bfloat16") as rt:
        for call, rows in (VIEWS["select"], VIEWS["rows of a slice"], VIEWS["rows over rows"]):
            before = rt.stats()
            assert torch.equal(call(rt.module.table), call(served.table))
            assert rt.stats().since(before).read_bytes == block_bytes(path, "table", rows)


# Damage.


def damage(file: Path, at: int) -> None:
    values = bytearray(file.read_bytes())
    values[at] ^= 1
    file.write_bytes(values)


@pytest.mark.parametrize("call", [lambda w: w[40] * 1, lambda w: w[torch.tensor([1, 40])]])
def test_a_damaged_block_is_reported_where_its_rows_are_wanted(
    call: Call, plain: nn.Module, path: Path, tmp_path: Path
) -> None:
    shutil.copytree(path, tmp_path / "copy.zarr")
    file = tmp_path / "copy.zarr" / "table" / "c" / "0" / "0"
    damage(file, 40 * ROW_BYTES + 9)
    with litrt.Runtime(Model, tmp_path / "copy.zarr", budget="min") as rt:
        assert torch.equal(rt.module.table[:BLOCK_ROWS] * 1, plain.table[:BLOCK_ROWS])
        for _ in range(2):
            with pytest.raises(
                litrt.CorruptWeightError, match=rf"'table'.*damaged from byte {BLOCK_BYTES} on"
            ) as caught:
                call(rt.module.table)
            assert caught.value.file == str(file)
        damage(file, 40 * ROW_BYTES + 9)
        assert torch.equal(call(rt.module.table), call(plain.table))
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(litrt.CorruptWeightError, match=r"'table'.* bytes in place of"):
            rt.module.table[torch.tensor([90])]
        file.unlink()
        with pytest.raises(litrt.CorruptWeightError, match=r"'table'.*is missing"):
            rt.module.table[torch.tensor([90])]


def attributes(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = path / "table" / "zarr.json"
    document = json.loads(file.read_text())
    change(document["attributes"]["litrt"])
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("change", [lambda told: told.pop("blocks"), lambda told: told["blocks"].update(chunk_rows=7)])
def test_a_store_without_checksums_of_blocks_is_read_chunk_by_chunk(
    change: Callable[[dict[str, Any]], None], plain: nn.Module, path: Path, tmp_path: Path
) -> None:
    shutil.copytree(path, tmp_path / "copy.zarr")
    attributes(tmp_path / "copy.zarr", change)
    with litrt.Runtime(Model, tmp_path / "copy.zarr", budget="min") as rt:
        chunk_bytes = litrt.open_store(path)["table"].chunk_bytes
        before = rt.stats()
        assert torch.equal(rt.module.table[40] * 1, plain.table[40])
        assert rt.stats().since(before).read_bytes == chunk_bytes
        before = rt.stats()
        ids = torch.tensor([chunk_bytes // ROW_BYTES * 2, chunk_bytes // ROW_BYTES])
        assert torch.equal(rt.module.table[ids], plain.table[ids])
        assert rt.stats().since(before).read_bytes == 2 * chunk_bytes


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda told: told["blocks"].update(crc32c="AAAA"), "cannot be read|checksums of"),
        (lambda told: told["blocks"].update(crc32c=told["blocks"]["crc32c"][:-8]), "checksums of"),
        (lambda told: told["blocks"].update(block_rows=0), "cannot have 0 rows"),
    ],
)
def test_checksums_of_blocks_that_do_not_fit_are_an_error(
    change: Callable[[dict[str, Any]], None], what: str, path: Path, tmp_path: Path
) -> None:
    shutil.copytree(path, tmp_path / "copy.zarr")
    attributes(tmp_path / "copy.zarr", change)
    with pytest.raises(litrt.StoreError, match=f"'table' says of its checksums is damaged.*({what})"):
        litrt.open_store(tmp_path / "copy.zarr")


# Tables that are wide, as GPT-J's.


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(5_000, 4096)
        self.mid = nn.Linear(4096, 512)
        self.out = nn.Linear(512, 4096)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.mid(self.wte(ids)))


def test_decoding_a_token_reads_less_than_a_megabyte_of_rows(make_store: MakeStore) -> None:
    with torch.random.fork_rng(devices=[]):
        plain = Wide().eval().requires_grad_(False)
    path = make_store(plain)
    with litrt.Runtime(Wide, path, budget="50%") as rt:
        rt.warmup(torch.tensor([[17]]))
        assert [rt.plan.segments[index].name for index in rt.plan.tables] == ["wte.weight"]
        for token in (17, 4_999, 0, 2_500):
            before = rt.stats()
            ids = torch.tensor([[token]])
            assert torch.equal(rt(ids), plain(ids))
            counts = rt.stats().since(before)
            assert 4096 * 4 <= counts.gathered_bytes == counts.read_bytes <= rt.plan.gathered_bytes < 1_000_000
            assert counts.n_faults == 0
        stats = rt.stats()
        assert stats.peak_bytes <= stats.budget_bytes


# A part of a weight that is nobody's table.


class Positions(nn.Module):
    """Adds the first of many positions, and takes no rows of anything."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", sampled(1, 512))
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x + self.places[: len(x)])
        return y


def test_a_plan_keeps_room_for_a_part_where_there_are_no_tables(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Positions().eval().requires_grad_(False)
    with monkeypatch.context() as patch:
        patch.setattr(litrt.blocks, "BLOCK_BYTES", 16_384)
        path = make_store(plain)
    x = sampled(0, 128)
    for budget in ("min", "60%"):
        with litrt.Runtime(Positions, path, budget=budget) as rt:
            rt.warmup(x)
            for _ in range(3):
                before = rt.stats()
                assert torch.equal(rt(x), plain(x))
                counts = rt.stats().since(before)
                assert counts.n_faults == 0
                # The rows of the pass before are there still, if nothing else took their room.
                assert rt.plan.gathered_bytes > 0 or budget != "min", "with more, it may be as fast to have all"
                assert counts.read_bytes - counts.gathered_bytes == rt.plan.streamed_bytes - rt.plan.gathered_bytes
            stats = rt.stats()
            assert stats.peak_bytes <= stats.budget_bytes


# Mixtures of experts.


class Mixture(nn.Module):
    """Four of 64 experts for each token, written by hand."""

    N, K, INNER = 64, 4, 64

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, self.N)
        self.up = nn.Parameter(torch.empty(self.N, self.INNER, WIDTH))
        self.down = nn.Parameter(torch.empty(self.N, WIDTH, self.INNER))
        self.bias = nn.Parameter(torch.empty(self.N, WIDTH))
        for number, weight in enumerate(self.parameters()):
            nn.init.normal_(weight, generator=torch.Generator().manual_seed(number))

    def routed(self, x: torch.Tensor) -> torch.Tensor:
        return self.router(x).topk(self.K).indices

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for row, experts in enumerate(self.routed(x)):
            for expert in experts.tolist():
                hidden = torch.relu(F.linear(x[row], self.up[expert]))
                y[row] += F.linear(hidden, self.down[expert], self.bias[expert])
        return y


@pytest.fixture
def mixture(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> tuple[Mixture, Path]:
    plain = Mixture().eval().requires_grad_(False)
    with monkeypatch.context() as patch:
        patch.setattr(litrt.blocks, "BLOCK_BYTES", 8192)  # of an expert there are 24 KiB
        return plain, make_store(plain)


def sampled(seed: int, n_rows: int) -> torch.Tensor:
    return torch.randn(n_rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_only_the_experts_that_were_routed_to_are_read(mixture: tuple[Mixture, Path]) -> None:
    plain, path = mixture
    expert_bytes = 2 * Mixture.INNER * WIDTH * 4
    with litrt.Runtime(Mixture, path, budget="min") as rt:
        rt.warmup(sampled(0, 1))
        assert {rt.plan.segments[index].name for index in rt.plan.tables} == {"up", "down", "bias"}
        rt(sampled(0, 1))
        for seed in range(1, 6):
            x = sampled(seed, 1)
            experts = plain.routed(x)[0].tolist()
            before = rt.stats()
            assert torch.equal(rt(x), plain(x))
            counts = rt.stats().since(before)
            assert counts.n_faults == 0
            assert counts.read_bytes == counts.gathered_bytes + rt.plan.streamed_bytes - rt.plan.gathered_bytes
            # A block of biases may be there still for another expert.
            biases = [block_bytes(path, "bias", [expert]) for expert in experts]
            least_bytes = 4 * expert_bytes + block_bytes(path, "bias", experts)
            assert least_bytes <= counts.gathered_bytes <= 4 * expert_bytes + sum(biases)
        stats = rt.stats()
        assert stats.peak_bytes <= stats.budget_bytes


def test_experts_on_a_device_that_runs_behind_the_host(mixture: tuple[Mixture, Path]) -> None:
    plain, path = mixture
    for run in ("late", "random", "early"):
        device = FakeDevice(run)  # type: ignore[arg-type]
        with litrt.Runtime(Mixture, path, budget="25%", device=device, host_budget=0) as rt:
            rt.warmup(sampled(0, 2))
            for seed in range(4):
                x = sampled(seed, 2)
                before = rt.stats()
                with device.watching():
                    got = rt(x)
                device.synchronize()
                assert torch.equal(got, plain(x))
                n_routed = len({*plain.routed(x).flatten().tolist()})
                assert rt.stats().since(before).link_bytes <= n_routed * 4 * 24_576 < rt.plan.segments[1].nbytes
            stats = rt.stats()
            assert stats.peak_bytes <= stats.budget_bytes


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_a_mixture_of_transformers_reads_its_routed_experts(
    how: str, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")

    def make() -> nn.Module:
        config = transformers.Qwen3MoeConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_experts=64,
            num_experts_per_tok=4,
            moe_intermediate_size=64,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            vocab_size=50,
            intermediate_size=64,
        )
        config._experts_implementation = how
        model: nn.Module = transformers.Qwen3MoeForCausalLM(config)
        return model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = make().eval().requires_grad_(False)
    with monkeypatch.context() as patch:
        patch.setattr(litrt.blocks, "BLOCK_BYTES", 16_384)  # one expert of down_proj, half of one of gate_up_proj
        path = make_store(plain)
    routed: list[set[int]] = []
    for layer in plain.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: routed.append({*output[-1].flatten().tolist()}))
    with litrt.Runtime(make, path, budget="min") as rt:
        rt.warmup(torch.tensor([[7]]), use_cache=False)
        assert len(rt.plan.tables) == 4
        for ids in (torch.tensor([[7]]), torch.tensor([[8]]), torch.tensor([[49]])):
            routed.clear()
            expected = plain(ids, use_cache=False).logits
            before = rt.stats()
            assert torch.equal(rt(ids, use_cache=False).logits, expected)
            counts = rt.stats().since(before)
            assert all(len(experts) == 4 for experts in routed)
            assert counts.gathered_bytes == sum(len(experts) * 3 * 16_384 for experts in routed)
            assert counts.read_bytes == counts.gathered_bytes + rt.plan.streamed_bytes - rt.plan.gathered_bytes
        stats = rt.stats()
        assert stats.peak_bytes <= stats.budget_bytes
    with litrt.Runtime(make, path, budget=stats.budget_bytes) as rt:
        rt.warmup(torch.tensor([[7]]), use_cache=False)
        for n_tokens in (3, 48):  # there is no room for all of their experts at once
            ids = torch.arange(n_tokens)[None]
            routed.clear()
            expected = plain(ids, use_cache=False).logits
            for _ in range(4):
                before = rt.stats()
                assert torch.equal(rt(ids, use_cache=False).logits, expected)
            assert rt.stats().since(before).n_faults == 0
        assert max(map(len, routed)) > 32
        stats = rt.stats()
        assert stats.peak_bytes <= stats.budget_bytes
