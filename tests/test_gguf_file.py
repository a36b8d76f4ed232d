"""GGUF files as sources."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import holds, same, write_gguf

import litrt
from litrt.convert import convert
from litrt.lazy import lazy_state_dict

DTYPES = ["float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64"]


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"blk.{n}.{dtype}": torch.randint(-99, 99, (3, 5, 2 + 2 * n)[: 1 + n % 3], generator=generator).to(
            getattr(torch, dtype)
        )
        for n, dtype in enumerate(DTYPES)
    }


def quantised(n_rows: int) -> tuple[Any, Any]:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.quants.quantize(np.ones((n_rows, 64), dtype=np.float32), kind), kind


@pytest.mark.parametrize("order", ["LITTLE", "BIG"])
def test_a_file_of_every_dtype_that_is_not_quantised(order: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    made = weights()
    if order == "BIG":
        del made["blk.1.bfloat16"]  # whose bytes the writer does not turn around
    write_gguf(tmp_path / "m.gguf", made, endianess=gguf.GGUFEndian[order])
    assert holds(convert(tmp_path / "m.gguf", tmp_path / "s.zarr", progress=False), made)
    with lazy_state_dict(tmp_path / "m.gguf") as lazy:
        assert list(lazy) == list(made)
        assert all(same(lazy[name], made[name]) for name in reversed(list(lazy)))


def test_a_directory_with_one_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", weights())
    assert holds(convert(tmp_path, tmp_path / "s.zarr", progress=False), weights())


def test_quantised_tensors_are_refused_before_anything_is_written_and_can_be_left_out(tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    write_gguf(source, {"a": torch.ones(3), "q": quantised(3), "b": torch.ones(2), "r": quantised(2)})
    said = (
        r"'q' is quantised \(Q8_0\), .* F32, F16 or BF16\. Of 4 tensors 2 cannot be stored: leave them out with key_map"
    )
    with pytest.raises(litrt.StoreError, match=said):
        convert(source, tmp_path / "s.zarr")
    with pytest.raises(litrt.StoreError, match=r"'r' is quantised .* Of 3 tensors 1 cannot be stored"):
        convert(source, tmp_path / "s.zarr", key_map={"q": None, "r": "other"})
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    key_map = {"q": None, "r": None, "a": "c"}
    store = convert([source, {"more": torch.ones(1)}], tmp_path / "s.zarr", key_map=key_map, progress=False)
    assert holds(store, {"c": torch.ones(3), "b": torch.ones(2), "more": torch.ones(1)})
    with lazy_state_dict(source) as lazy:
        assert len(lazy) == 4
        with pytest.raises(litrt.StoreError, match=r"'q' is quantised \(Q8_0\), which litrt does not decode"):
            lazy["q"]


def test_a_split_file_is_opened_by_its_first_part(tmp_path: Path) -> None:
    parts = [dict(list(weights().items())[n::3]) for n in range(3)]
    gguf = pytest.importorskip("gguf")
    files = [tmp_path / f"m-{n + 1:05}-of-00003.gguf" for n in range(3)]
    for n, (file, part) in enumerate(zip(files, parts, strict=True)):
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_uint16("split.no", n)
        writer.add_uint16("split.count", 3)
        for name, tensor in part.items():
            kind = gguf.GGMLQuantizationType.BF16 if tensor.dtype == torch.bfloat16 else None
            writer.add_tensor(name, (tensor.view(torch.uint8) if kind else tensor).numpy(), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert holds(convert(files[0], tmp_path / "s.zarr", progress=False), weights())
    with pytest.raises(litrt.StoreError, match=r"is part 2 of 3: pass the first, .*: m-00001-of-00003\.gguf"):
        convert(files[1], tmp_path / "t.zarr")
    files[2].unlink()
    with pytest.raises(litrt.StoreError, match=r"split into 3 parts and 1 are missing, the first m-00003-of-00003"):
        convert(files[0], tmp_path / "t.zarr")


def test_a_truncated_file_is_said_to_be_one(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, {"w": torch.ones(1000)})
    whole = file.read_bytes()
    for n_bytes in (len(whole) - 200, 100, 3, 0):
        file.write_bytes(whole[:n_bytes])
        said = rf"m\.gguf is truncated: it has {n_bytes} bytes, and \d+ are needed"
        with pytest.raises((litrt.CorruptWeightError, litrt.StoreError), match=said if n_bytes else "m.gguf is"):
            convert(file, tmp_path / "s.zarr")
    file.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(litrt.StoreError, match=r"m\.gguf is not a GGUF file that can be read: GGUF magic invalid"):
        convert(file, tmp_path / "s.zarr")


def header(n_tensors: int, *pairs: tuple[str, int, bytes]) -> bytes:
    """Returns the start of a file: version 3, and pairs of a key, the number of a type, and a value."""
    text = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(pairs))
    for key, kind, value in pairs:
        text += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value
    return text


def tensor(name: str, shape: list[int], kind: int, begin: int) -> bytes:
    return (
        struct.pack("<Q", len(name))
        + name.encode()
        + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, begin)
    )


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore:overflow")  # is a warning of numpy's, and the sum is wrong then
@pytest.mark.parametrize(
    "content",
    [
        header(0, ("a", 9, struct.pack("<IQ", 0, 1 << 60))),  # an array of 2**60 bytes
        header(0, ("a", 9, struct.pack("<IQ", 9, 1 << 60) * 2000)),  # arrays of arrays of arrays
        header(0, ("a", 8, struct.pack("<Q", 1 << 63))),  # a string of 2**63
        header(1 << 62),
        header(1) + tensor("w", [1 << 32, 1 << 32], 0, 0),
        header(1) + tensor("w", [1 << 62], 0, 0),
        header(1) + tensor("w", [4], 0, (1 << 64) - 32),
        header(1) + tensor("w", [4], 99, 0),
        header(1) + tensor("w", [1] * 70, 0, 0) + bytes(64),
        header(2) + tensor("w", [1], 0, 0) * 2 + bytes(64),
    ],
)
def test_a_file_that_means_harm_is_refused_at_once(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises((litrt.StoreError, litrt.CorruptWeightError), match=r"m\.gguf is (truncated|not a GGUF file)"):
        convert(tmp_path / "m.gguf", tmp_path / "s.zarr")


def test_metadata_without_an_end_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr("litrt.gguf_file._MOST_VALUES", 1000)
    (tmp_path / "m.gguf").write_bytes(header(0, ("a", 9, struct.pack("<IQ", 0, 5000) + bytes(5000))))
    with pytest.raises(litrt.StoreError, match="it has more than 1000 values of metadata"):
        convert(tmp_path / "m.gguf", tmp_path / "s.zarr")


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(litrt.StoreError, match=r"install the package gguf: pip install 'litrt\[gguf\]'"):
        convert(tmp_path / "m.gguf", tmp_path / "s.zarr")
