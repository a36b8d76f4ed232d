"""Folders of PyTorch-LIT as sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import holds, write_lit

import litrt
from litrt.convert import convert
from litrt.lazy import lazy_state_dict


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {f"h.{n}.w": torch.randn(5, 4 + n, generator=generator) for n in range(3)}
    return made | {"scalar": torch.tensor(2.5), "empty": torch.ones(0, 3), "ints": torch.arange(7)}


@pytest.mark.parametrize("by", ["folder", "meta.json"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int64", ">f4"])
def test_a_folder_of_pytorch_lit(dtype: str, by: str, tmp_path: Path) -> None:
    write_lit(tmp_path / "lit", weights(), dtype)
    source = tmp_path / "lit" if by == "folder" else tmp_path / "lit" / "meta.json"
    of_torch = getattr(torch, {">f4": "float32"}.get(dtype, dtype))
    expected = {name: tensor.to(of_torch) for name, tensor in weights().items()}
    assert holds(convert(source, tmp_path / "s.zarr", progress=False), expected)
    with lazy_state_dict(source) as lazy:
        assert list(lazy) == list(expected)
        assert all(torch.equal(lazy[name], expected[name]) for name in reversed(list(lazy)))


def test_a_folder_that_the_package_wrote_and_what_it_reads(tmp_path: Path) -> None:
    package = pytest.importorskip("pytorch_lit")
    from pytorch_lit.weights import WeightLoader

    package.prepare_params(weights(), str(tmp_path / "lit"), dtype="float16", progress=False)
    told = json.loads((tmp_path / "lit" / "meta.json").read_text())
    loader = WeightLoader({**told, "__base_path": str(tmp_path / "lit")})
    expected = {name: loader.load(name) for name in weights()}
    assert holds(convert(tmp_path / "lit", tmp_path / "s.zarr", progress=False), expected)
    write_lit(tmp_path / "mine", weights(), "float16")
    for file in ("meta.json", "model-meta.json", "model.bin"):
        assert (tmp_path / "mine" / file).read_bytes() == (tmp_path / "lit" / file).read_bytes()


def test_a_meta_json_of_something_else_is_none_of_it(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"name": "a model", "lang": "en"}))
    torch.save({"w": torch.ones(3)}, tmp_path / "model.bin")
    assert holds(convert(tmp_path, tmp_path / "s.zarr", progress=False), {"w": torch.ones(3)})


def test_a_folder_that_is_truncated_says_at_what(tmp_path: Path) -> None:
    write_lit(tmp_path / "lit", weights(), "float32")
    file = tmp_path / "lit" / "model.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(
        litrt.CorruptWeightError, match=rf"has 100 of {len(whole)} bytes, and 'h\.1\.w' is cut off"
    ) as caught:
        convert(tmp_path / "lit", tmp_path / "s.zarr")
    assert (caught.value.name, caught.value.file) == ("h.1.w", str(file))
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("meta.json", {"method": "pickle"}, r"has method 'pickle', and litrt reads 'np-memmap'"),
        ("meta.json", {"model": "../secret"}, r"there is no file '\.\./secret' beside it"),
        ("meta.json", {"meta": "none.json"}, r"there is no file 'none\.json' beside it"),
        ("model-meta.json", {"_info": {"size": 9, "type": "O"}}, "says that weights are object, which is no dtype"),
        ("model-meta.json", {"_info": {"size": 9, "type": None}}, "is not that of a folder of PyTorch-LIT"),
        ("model-meta.json", {"_info": {"size": -9, "type": "f4"}}, "there are -9 elements"),
        ("model-meta.json", {"w": {"bound": [0, 9], "shape": [2, 4]}}, r"shape \(2, 4\) is said to be elements 0 to 9"),
        ("model-meta.json", {"w": {"bound": [8, 10], "shape": [2]}}, "elements 8 to 10 of 9"),
        ("model-meta.json", {"w": {"bound": [-2, 0], "shape": [2]}}, "elements -2 to 0 of 9"),
    ],
)
def test_metadata_that_is_wrong_is_refused(file: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_lit(tmp_path / "lit", {"w": torch.arange(9.0)}, "float32")
    (tmp_path / "secret").write_bytes(bytes(36))
    told = json.loads((tmp_path / "lit" / file).read_text())
    (tmp_path / "lit" / file).write_text(json.dumps(told | change))
    with pytest.raises(litrt.StoreError, match=said):
        convert(tmp_path / "lit", tmp_path / "s.zarr")
