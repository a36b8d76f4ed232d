"""How many threads read a store: the choice, what it is made from, and what bounds it."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zarr.buffer.cpu import Buffer
from zarr.storage import MemoryStore

import litrt
from litrt import packed as packed_module
from litrt import reader as reader_module
from litrt import tune as tune_module
from litrt.convert import convert
from litrt.device import CpuDevice
from litrt.reader import Piece, Reader
from litrt.store import open_store
from litrt.tune import LOCAL, REMOTE, THROUGH_ZARR, Tuning, candidates, choose, read_bps, tune

MB = 10**6


@pytest.fixture(autouse=True)
def small_stores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures stores that are small enough for tests, on a machine of many processors; forgets what was chosen."""
    monkeypatch.setattr(tune_module, "_LEAST_BYTES", 8 * MB)
    monkeypatch.setattr(tune_module, "_chosen", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))


class Speeds:
    """Measures as it is told, and remembers what it was asked."""

    def __init__(self, **bps: float) -> None:
        self.bps = {tuple(map(int, name.strip("t").split("x"))): value for name, value in bps.items()}
        self.asked: list[Tuning] = []
        self.first: list[Piece] = []

    def __call__(self, reader: Reader, pieces: Sequence[Piece], tuning: Tuning) -> float:
        self.asked.append(tuning)
        self.first.append(pieces[0])
        return self.bps.get((tuning.n_threads, tuning.n_in_flight), 1e9)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """A reader of 32 MB in 8 pieces."""
    weights = {f"w{n}": torch.randn(1000, 1000) for n in range(8)}
    opened = Reader(convert(weights, tmp_path / "s.zarr", progress=False))
    yield opened
    opened.close()


def tuned(reader: Reader, budget_bytes: int | None, measure: Any, scratch_bytes: int | None = None) -> Tuning:
    infos = [reader.store[name] for name in reader.store]
    scratch_bytes = reader.scratch_bytes_per_task if scratch_bytes is None else scratch_bytes
    return tune(reader, infos, budget_bytes, scratch_bytes, measure=measure)


def test_fewer_threads_are_chosen_over_more_that_are_hardly_faster() -> None:
    samples = [
        (Tuning(1, 1), 2.8),
        (Tuning(2, 2), 3.25),
        (Tuning(3, 2), 3.44),
        (Tuning(4, 2), 3.40),
        (Tuning(4, 4), 3.5),
    ]
    assert choose(samples) == Tuning(3, 2), "the last is faster by less than 2 %"
    assert choose([*samples, (Tuning(8, 8), 3.7)]) == Tuning(8, 8)
    assert choose(samples[:1]) == Tuning(1, 1)


@given(
    st.dictionaries(st.sampled_from(candidates(8)), st.floats(1e6, 1e11), min_size=1),
)
def test_nothing_with_fewer_threads_is_as_fast_as_what_is_chosen(speeds: dict[Tuning, float]) -> None:
    chosen = choose(speeds.items())
    assert speeds[chosen] >= 0.97 * max(speeds.values())
    assert all(bps < 0.97 * max(speeds.values()) for other, bps in speeds.items() if other.n_threads < chosen.n_threads)


def test_candidates_begin_with_two_threads_and_never_exceed_the_most() -> None:
    assert candidates(4) == [Tuning(2, 2), Tuning(3, 2), Tuning(4, 2), Tuning(4, 4)]
    for most in range(2, 9):
        assert max(tuning.n_threads for tuning in candidates(most)) <= most
        assert all(tuning.n_in_flight <= tuning.n_threads for tuning in candidates(most))


def test_the_fastest_tuning_of_the_store_is_chosen_once_for_the_process(reader: Reader, tmp_path: Path) -> None:
    speeds = Speeds(t3x2=3e9, t4x4=2e9)
    assert tuned(reader, 30 * MB, speeds) == Tuning(3, 2)
    assert speeds.asked == 2 * candidates(7), "what fits the budget, with a piece of 4 MB each"
    assert len({piece.name for piece in speeds.first}) > 4, "not the same pieces each time"
    assert tuned(Reader(open_store(tmp_path / "s.zarr")), 30 * MB, Speeds(t8x8=9e9)) == Tuning(3, 2)
    other = Reader(open_store(shutil.copytree(tmp_path / "s.zarr", tmp_path / "other.zarr")))
    assert tuned(other, 30 * MB, Speeds(t2x2=9e9)) == Tuning(2, 2)


@pytest.mark.parametrize(
    ("budget_bytes", "scratch_bytes", "most"),
    [
        (31 * MB, 0, 7),  # pieces of 4 MB to measure with
        (31 * MB, MB // 2, 3),  # 1.55 MB of scratch
        (20 * MB, 0, 5),
        (20 * MB, MB // 2, None),  # two threads are the least
        (9 * MB, 0, None),
        (None, 0, None),
        (32 * MB, 0, None),  # all fits: it is read once
    ],
)
def test_the_budget_bounds_the_threads_and_what_is_measured(
    budget_bytes: int | None, scratch_bytes: int, most: int | None, reader: Reader
) -> None:
    speeds = Speeds(**{f"t{n}x2": n * 1e9 for n in range(3, 9)})
    chosen = tuned(reader, budget_bytes, speeds, scratch_bytes)
    if most is None:
        assert chosen == LOCAL
        assert set(speeds.asked) <= {LOCAL}, "to know the bandwidth"
        return
    assert budget_bytes is not None
    assert speeds.asked == 2 * candidates(most)
    for tuning in speeds.asked:
        assert tuning.n_threads * (scratch_bytes + 4 * MB) <= budget_bytes
        assert tuning.n_threads * scratch_bytes <= budget_bytes / 20


def test_few_processors_get_few_threads(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1))
    speeds = Speeds()
    tuned(reader, 30 * MB, speeds)
    assert speeds.asked == 2 * candidates(3)


def test_small_stores_are_not_measured(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "_LEAST_BYTES", 33 * MB)
    speeds = Speeds()
    assert (tuned(reader, 30 * MB, speeds), speeds.asked) == (LOCAL, [])


def test_a_slow_disk_is_not_measured_for_long(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(tune_module.time, "perf_counter", lambda: now_s)
    speeds = Speeds(t2x2=2e9, t3x2=9e9)

    def slow(*arguments: Any) -> float:
        nonlocal now_s
        now_s += slice_s
        return speeds(*arguments)

    slice_s = 0.15
    assert tuned(reader, 30 * MB, slow) == Tuning(3, 2)
    assert speeds.asked == candidates(3), "a third would have ended after 0.4 s"
    tune_module._chosen.clear()
    slice_s = 0.3
    assert tuned(reader, 30 * MB, slow) == LOCAL, "one measurement is no choice"


def test_damage_is_left_to_be_found_where_the_weight_is_used(reader: Reader) -> None:
    for name in reader.store:
        os.truncate(reader.pieces(name)[0].file, 1)
    assert tuned(reader, 30 * MB, None) == LOCAL
    with pytest.raises(litrt.CorruptWeightError):
        reader.read_tensor("w0")


def test_stores_that_zarr_python_reads_have_threads_for_their_latency(reader: Reader, tmp_path: Path) -> None:
    zipped = Reader(open_store(shutil.make_archive(str(tmp_path / "s"), "zip", tmp_path / "s.zarr")))
    assert tuned(zipped, 10**10, Speeds()) == THROUGH_ZARR
    zipped.close()
    remote = MemoryStore()
    for file in (tmp_path / "s.zarr").rglob("*"):
        if file.is_file():
            content = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8).numpy()
            remote._store_dict[str(file.relative_to(tmp_path / "s.zarr"))] = Buffer.from_array_like(content)
    far = Reader(open_store(remote))
    assert tuned(far, 10**10, Speeds()) == REMOTE
    assert tuned(far, 100 * MB, Speeds()) == THROUGH_ZARR, "8 times 8 MB of scratch are too much of that"


@pytest.mark.parametrize("compress", [None, "lz4"])
def test_the_measurement_reads_the_store_and_leaves_the_reader_as_it_was(compress: str | None, tmp_path: Path) -> None:
    store = convert({"w": torch.randn(4000, 1000)}, tmp_path / "s.zarr", compress=compress, progress=False)
    assert store["w"].packed == (compress is not None)
    reader = Reader(store)
    reader.n_in_flight = 7
    n_threads = threading.active_count()
    assert read_bps(reader, reader.pieces("w"), Tuning(3, 2)) > 0
    assert reader.n_in_flight == 7
    assert threading.active_count() == n_threads


@pytest.mark.parametrize("compress", [None, "lz4"])
@pytest.mark.parametrize("n_in_flight", [1, 2, None])
def test_no_more_threads_wait_for_the_disk_than_may(
    compress: str | None, n_in_flight: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {f"w{n}": torch.randn(300, 400) for n in range(12)}
    reader = Reader(convert(weights, tmp_path / "s.zarr", compress=compress, progress=False))
    monkeypatch.setattr(reader_module, "DIRECT_MIN_BYTES", 1)
    monkeypatch.setattr(packed_module, "_DIRECT_MIN_BYTES", 1)
    whole, lock, together = os.preadv, threading.Lock(), threading.Barrier(n_in_flight or 4)
    now = most = 0

    def read(fd: int, buffers: list[Any], offset: int) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        together.wait(timeout=20)  # as many as may are there at the same time
        with lock:
            now -= 1
        return whole(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    reader.n_in_flight = n_in_flight
    places = {name: CpuDevice().allocate(480_000) for name in weights}
    pieces = [piece for name in weights for piece in reader.pieces(name)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda piece: reader.read(piece, places[piece.name]), pieces))
    assert most == (n_in_flight or 4)
    for name, tensor in weights.items():
        assert places[name].tobytes() == tensor.numpy().tobytes()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1000, 1000, bias=False) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_runtime_reads_as_was_chosen_inside_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Model().eval()
    store = convert(plain.state_dict(), tmp_path / "m.zarr", compress="lz4", progress=False)
    speeds = Speeds(t3x2=9e9)
    monkeypatch.setattr(tune_module, "read_bps", speeds)
    monkeypatch.setattr(tune_module, "_SCRATCH_SHARE", 1.0)
    x = torch.randn(2, 1000)
    scratch_bytes = Reader(store).scratch_bytes_per_task
    for n_threads, expected in ((None, 3), (1, 1)):
        with litrt.Runtime(Model, store, budget=40 * MB, n_threads=n_threads) as rt, torch.no_grad():
            rt.warmup(x)
            names = [thread.name for thread in threading.enumerate() if thread.name.startswith("litrt-read")]
            assert len(names) == expected
            assert torch.equal(rt(x), plain(x))
            assert rt.stats().peak_bytes <= 40 * MB
            assert rt.plan.budget_bytes == 40 * MB - expected * scratch_bytes
    assert speeds.asked


def test_threads_that_were_asked_for_are_measured_for_their_bandwidth_only(reader: Reader) -> None:
    infos = [reader.store[name] for name in reader.store]
    speeds = Speeds(t3x3=3e9, t8x8=9e9)
    asked = tune(reader, infos, 30 * MB, 0, n_threads=3, measure=speeds)
    assert (asked, asked.bandwidth_bps) == (Tuning(3, 3), 3e9)
    assert set(speeds.asked) == {Tuning(3, 3)}
    # Pieces for eight threads to measure with would exceed the budget: nobody measures, and nobody chooses.
    unmeasured = tune(reader, infos, 30 * MB, 0, n_threads=8, measure=Speeds())
    assert (unmeasured, unmeasured.bandwidth_bps) == (Tuning(8, 8), None)


def test_what_is_chosen_comes_with_the_bandwidth_that_was_measured(reader: Reader) -> None:
    assert tuned(reader, 30 * MB, Speeds(t3x2=3e9, t4x4=2e9)).bandwidth_bps == 3e9
