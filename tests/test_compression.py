"""What is compressed, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from litrt import compression
from litrt.arrays import chunk_shape
from litrt.cli import main
from litrt.compression import CODECS, Measured, choose
from litrt.convert import convert
from litrt.reader import Reader
from litrt.store import Store, open_store


def measured(codec: str, read_bps: float, ratio: float = 1.3, decode_bps: float = 5e9) -> Measured:
    return Measured(codec, ratio, decode_bps, read_bps)


def test_the_codec_is_the_one_with_which_values_are_read_fastest() -> None:
    lz4, zstd = measured("lz4", 2e9), measured("zstd", 2.1e9)
    assert choose([lz4, zstd], 1.5e9) is zstd
    assert choose([lz4, zstd], 2e9) is zstd, "by 5 %"
    assert choose([lz4, zstd], 2.01e9) is None
    assert choose([lz4], 1.5e9) is lz4


@given(
    ratio=st.floats(1.05, 4),
    decode_bps=st.floats(1e8, 1e10),
    read_bps=st.floats(1e8, 1e10),
    disk_bps=st.floats(1e8, 1e10),
    n_threads=st.integers(1, 16),
)
def test_a_codec_that_was_faster_than_the_disk_breaks_even_on_a_faster_one(
    ratio: float, decode_bps: float, read_bps: float, disk_bps: float, n_threads: int
) -> None:
    found = Measured("lz4", ratio, decode_bps, read_bps).break_even_bps(disk_bps, n_threads)
    assert 0 < found <= n_threads * decode_bps
    if found < n_threads * decode_bps * (1 - 1e-9):
        assert (found > disk_bps * (1 - 1e-6)) == (read_bps > disk_bps * (1 - 1e-6))
        # What is read from a disk of that speed takes its bytes, and the time that decoding took.
        decode_s = 1 / read_bps - 1 / (ratio * disk_bps)
        assert 1 / (1 / (ratio * found) + decode_s) == pytest.approx(found, rel=1e-3)


def test_the_break_even_is_what_threads_decode_where_decoding_took_nothing_from_the_disk() -> None:
    assert measured("lz4", read_bps=1.3e9).break_even_bps(1e9, 2) == 10e9
    # 1 / 2.0 - 1 / (1.3 * 3.0) = 0.2436 s per GB of decoding, and 0.2308 s per GB and GB/s that are not read
    assert measured("lz4", read_bps=2e9).break_even_bps(3e9, 2) == pytest.approx(0.9474e9, rel=1e-3)


def test_a_tensor_is_judged_by_its_own_ratio() -> None:
    found = measured("lz4", read_bps=1.2e9, ratio=1.3)
    assert found.at(1.3, 1e9) == Measured("lz4", 1.3, 5e9, pytest.approx(1.2e9))
    # 1 / 1.2 - 1 / 1.3 = 0.0641 s per GB of decoding, and 1 / 1.1 s of the disk
    assert found.at(1.1, 1e9).read_bps == pytest.approx(1.0275e9, rel=1e-3)
    assert choose([found.at(1.1, 1e9)], 1e9) is None
    assert measured("lz4", read_bps=1.5e9, ratio=1.3).at(1.3, 1e9).read_bps == pytest.approx(1.3e9), "as the disk reads"


def trained(rows: int = 600, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values whose exponents are those of trained weights."""
    return (torch.randn(rows, 1000, generator=torch.Generator().manual_seed(rows)) * 0.02).to(dtype)


def noise(rows: int = 600) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(0, 256, (rows, 4000), dtype=torch.uint8, generator=generator).view(torch.int32)


def codecs(store: Store, name: str) -> list[str]:
    group: Any = zarr.open_group(store.path, mode="r")
    return [codec.to_dict()["name"] for codec in group[name].metadata.codecs]


@pytest.mark.parametrize("compress", CODECS)
def test_what_does_not_get_smaller_is_stored_as_it_is(compress: str, tmp_path: Path) -> None:
    weights = {"dense": trained(), "noise": noise(), "small": trained(3), "scalar": torch.tensor(1.0)}
    store = convert(weights, tmp_path / "s.zarr", compress=compress, progress=False)
    assert codecs(store, "dense") == ["bytes", "blosc", "crc32c"]
    for name in ("noise", "small", "scalar"):
        assert codecs(store, name) == ["bytes", "crc32c"]
        assert store[name].direct
    stored_bytes = sum(file.stat().st_size for file in (tmp_path / "s.zarr").glob("*/c/**/*") if file.is_file())
    stored_bytes += (tmp_path / "s.zarr/scalar/c").stat().st_size
    assert store.compression == {"asked": compress, "nbytes": store.total_bytes, "stored_bytes": stored_bytes}
    reader = Reader(store)
    assert all(torch.equal(reader.read_tensor(name), weights[name]) for name in weights)


def test_a_store_that_is_not_compressed_says_nothing_of_it(tmp_path: Path) -> None:
    store = convert({"dense": trained()}, tmp_path / "s.zarr", progress=False)
    assert store.compression is None
    assert "compression" not in zarr.open_group(store.path, mode="r").attrs["litrt"]  # type: ignore[operator]


def test_a_tensor_of_which_a_part_gains_is_judged_by_its_start_its_middle_and_its_end(tmp_path: Path) -> None:
    mixed = torch.cat([noise(700).view(torch.float32), trained(2100)])  # a quarter does not get smaller
    store = convert({"mixed": mixed}, tmp_path / "s.zarr", compress="lz4", progress=False)
    assert store["mixed"].packed
    found = Reader(store).read_tensor("mixed")
    assert torch.equal(found.view(torch.int32), mixed.view(torch.int32))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(4096, 2048), (3 * 4096, 2048), (50_257, 1733), (50_400, 2016), (50_000, 2000), (30_522, 2035)],
)
def test_compressed_chunks_have_no_padding_where_rows_divide(rows: int, expected: int) -> None:
    chunks = chunk_shape((rows, 1024), 4, compression.CHUNK_BYTES, align_bytes=1, max_padding=0.0)
    assert chunks == (expected, 1024)
    assert (rows % expected == 0) == (rows != 30_522), "which has no divisor near 15"


def test_compressed_tensors_are_cut_into_chunks_of_about_8_mib(tmp_path: Path) -> None:
    store = convert({"w": torch.zeros(4096, 1024)}, tmp_path / "s.zarr", compress="lz4", progress=False)
    assert (store["w"].chunk_rows, store["w"].chunk_bytes, store["w"].is_padded) == (2048, 8 << 20, False)
    assert Reader(store).read_tensor("w").count_nonzero() == 0


def deterministic(monkeypatch: pytest.MonkeyPatch, disk_bps: float, **read_bps: float) -> list[int]:
    """Gives the machine a speed; returns the bytes of the values of which something was then measured."""
    sizes: list[int] = []

    def fake(samples: Any, itemsize: int, directory: Path) -> tuple[float, list[Measured]]:
        sizes.append(itemsize)
        return disk_bps, [Measured(codec, 1.4, 5e9, bps) for codec, bps in read_bps.items()]

    monkeypatch.setattr(compression, "probe", fake)
    monkeypatch.setattr(compression, "n_processors", lambda: 2)
    return sizes


def test_auto_chooses_for_each_dtype_by_the_first_large_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = deterministic(monkeypatch, 1e9, lz4=1.4e9, zstd=1.2e9)
    weights = {"early": trained(100), "a": trained(601), "b": trained(602), "c": noise(), "d": trained(603).bfloat16()}
    store = convert(weights, tmp_path / "s.zarr", compress="auto", progress=False)
    assert sizes == [4, 4, 2], "once for each dtype"
    assert [name for name in store if store[name].packed] == ["a", "b", "d"]
    found = store.compression
    assert found is not None
    assert (found["asked"], found["refusal"], list(found["dtypes"])) == ("auto", None, ["float32", "int32", "bfloat16"])
    assert found["dtypes"]["bfloat16"] == {
        "codec": "lz4",
        "disk_bps": 1e9,
        "measured": [
            {"codec": "lz4", "ratio": 1.4, "decode_bps": 5e9, "read_bps": 1.4e9, "break_even_bps": 10e9},
            {
                "codec": "zstd",
                "ratio": 1.4,
                "decode_bps": 5e9,
                "read_bps": 1.2e9,
                "break_even_bps": pytest.approx((1 - 1 / 1.4) / (1 / 1.2 - 1 / 1.4) * 1e9),
            },
        ],
    }
    reader = Reader(store)
    assert all(torch.equal(reader.read_tensor(name), weights[name]) for name in weights)


def test_auto_compresses_nothing_for_a_disk_that_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deterministic(monkeypatch, 4e9, lz4=3.5e9, zstd=2.5e9)
    store = convert({"w": trained()}, tmp_path / "s.zarr", compress="auto", progress=False)
    assert store["w"].direct
    assert store.compression is not None
    assert store.compression["dtypes"]["float32"]["codec"] is None


def test_auto_stores_as_it_is_and_says_so_where_the_disk_cannot_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    n_refused = 0

    def refuse(file: Path) -> None:
        nonlocal n_refused
        n_refused += 1
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(compression, "_check_direct", refuse)
    torch.save({"w": trained(), "v": trained(601)}, tmp_path / "m.pt")
    assert main(["convert", str(tmp_path / "m.pt"), str(tmp_path / "s.zarr"), "--compress", "auto", "--quiet"]) == 0
    said = "stored as it is: the disk cannot be measured ([Errno 22] Invalid argument)"
    assert said in capsys.readouterr().out
    assert n_refused == 1, "asked once"
    store = open_store(tmp_path / "s.zarr")
    assert all(info.direct for info in store.values())
    assert {path.name for path in (tmp_path / "s.zarr").iterdir()} == {"w", "v", "zarr.json"}
    assert main(["inspect", str(tmp_path / "s.zarr")]) == 0
    assert said in capsys.readouterr().out


def test_what_was_decided_and_why_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deterministic(monkeypatch, 1.5e9, lz4=2.1e9, zstd=1.6e9)
    torch.save({"w": trained()}, tmp_path / "m.pt")
    main(["convert", str(tmp_path / "m.pt"), str(tmp_path / "s.zarr"), "--compress", "auto", "--quiet"])
    printed = capsys.readouterr().out
    main(["inspect", str(tmp_path / "s.zarr")])
    inspected = capsys.readouterr().out
    assert "0 of 1 weights are read in place, 1 decoded into place" in inspected
    for line in (
        "compress=auto: 2.40 MB in ",
        "float32 as it is, not chosen: read with 1.50 GB/s",
        "float32 lz4, chosen: ratio 1.40, read with 2.10 GB/s, decoded with 5.00 GB/s per thread; "
        "wins on disks below about 10.00 GB/s",
        "float32 zstd, not chosen: ratio 1.40, read with 1.60 GB/s",
    ):
        assert line in printed
        assert line in inspected


def test_the_disk_is_measured_with_what_the_codecs_make_of_the_values(tmp_path: Path) -> None:
    values = trained().numpy().reshape(-1).view(np.uint8)
    try:
        disk_bps, found = compression.probe([values[: 1 << 20]], 4, tmp_path)
    except OSError:
        pytest.skip("this file system has no direct reads")
    assert disk_bps > 0
    assert [one.codec for one in found] == list(CODECS)
    for one in found:
        assert one.read_bps > 0
        assert one.decode_bps > 0
        stored = len(compression.encode(values[: 1 << 20], one.codec, 4))
        assert one.ratio == pytest.approx((1 << 20) / stored, rel=0.02)
    assert list(tmp_path.iterdir()) == [], "nothing of it is left"


@pytest.mark.parametrize("name", ["probe", "(probe)"])
def test_measuring_the_disk_leaves_a_weight_of_that_name_alone(name: str, tmp_path: Path) -> None:
    weights = {name: torch.arange(3), "w": trained()}
    store = convert(weights, tmp_path / "s.zarr", compress="auto", progress=False)
    reader = Reader(store)
    assert all(torch.equal(reader.read_tensor(name), weights[name]) for name in weights)
