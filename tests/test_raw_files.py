"""Files of numpy and offload folders of Accelerate as sources."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import litrt
from litrt.convert import convert
from litrt.lazy import lazy_state_dict
from litrt.reader import Reader


def holds(store: litrt.Store, expected: dict[str, torch.Tensor]) -> bool:
    reader = Reader(store)
    found = {name: reader.read_tensor(name) for name in store}
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected
    )


# numpy


def arrays() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    kinds = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?", "c8")
    made = {f"a.{kind}": (generator.standard_normal((5, 7)) * 50).astype(kind) for kind in kinds}
    made["big-endian"] = np.arange(4, dtype=">f8")
    made["fortran"] = np.asfortranarray(generator.standard_normal((4, 6)))
    return made | {"scalar": np.float32(2.5), "empty": np.empty((0, 3)), "a/b": np.arange(3)}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_numpy(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "model.npz", **arrays())
    expected = {
        name: torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
        for name, array in arrays().items()
    }
    assert holds(convert(tmp_path / "model.npz", tmp_path / "s.zarr", progress=False), expected)
    with lazy_state_dict(tmp_path / "model.npz") as lazy:
        assert all(torch.equal(lazy[name], expected[name]) for name in reversed(list(lazy)))


@pytest.mark.parametrize(
    ("array", "said"),
    [(np.array(["x"]), "<U1"), (np.zeros(2, dtype=[("a", "f4")]), r"\[\('a'")],
    ids=["text", "fields"],
)
def test_arrays_that_are_no_tensors_are_named_and_can_be_left_out(array: Any, said: str, tmp_path: Path) -> None:
    source = tmp_path / "model.npz"
    np.savez(source, w=np.ones(2), x=array)
    with pytest.raises(
        litrt.StoreError, match=f"'x' is an array of {said}.*, which is no tensor. Of 2 tensors 1 cannot"
    ):
        convert(source, tmp_path / "s.zarr")
    with lazy_state_dict(source) as lazy, pytest.raises(litrt.StoreError, match="'x' is an array of"):
        lazy["x"]
    store = convert(source, tmp_path / "s.zarr", key_map={"x": None}, progress=False)
    assert holds(store, {"w": torch.ones(2, dtype=torch.float64)})


def test_objects_of_python_are_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", x=np.array([os.getcwd], dtype=object))
    with pytest.raises(litrt.StoreError, match="'x' is an array of object, which is no tensor"):
        convert(tmp_path / "model.npz", tmp_path / "s.zarr")


def test_damaged_files_of_numpy_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", w=np.ones(1000))
    whole = (tmp_path / "model.npz").read_bytes()
    (tmp_path / "model.npz").write_bytes(whole[:-50])
    with pytest.raises(litrt.StoreError, match=r"model\.npz is not a whole file of numpy\.savez"):
        convert(tmp_path / "model.npz", tmp_path / "s.zarr")
    (tmp_path / "model.npz").write_bytes(whole[:4000] + b"xxxx" + whole[4004:])
    with pytest.raises(litrt.CorruptWeightError, match="'w' is damaged: Bad CRC-32") as caught:
        convert(tmp_path / "model.npz", tmp_path / "s.zarr")
    assert caught.value.name == "w"
    assert [path.name for path in tmp_path.iterdir()] == ["model.npz"]


def test_an_array_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive, archive.open("w.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    with pytest.raises(litrt.StoreError, match=r"'w' of shape \(1099511627776,\) is larger than what the file has"):
        convert(tmp_path / "model.npz", tmp_path / "s.zarr")


def test_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", w=np.ones(2))
    with zipfile.ZipFile(tmp_path / "model.npz", "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("w.npy", archive.read("w.npy"))
    with pytest.raises(litrt.StoreError, match=r"model\.npz has 2 arrays of 1 names"):
        convert(tmp_path / "model.npz", tmp_path / "s.zarr")


def test_arrays_of_numpy_may_be_shards(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", w=np.ones(2), x=np.array([{}], dtype=object))
    index = tmp_path / "model.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model.npz", "x": "model.npz"}}))
    with pytest.raises(litrt.StoreError, match="'x' is an array of object, which is no tensor"):
        convert(index, tmp_path / "s.zarr")
    store = convert(index, tmp_path / "s.zarr", key_map={"x": None}, progress=False)
    assert holds(store, {"w": torch.ones(2, dtype=torch.float64)})


# Accelerate


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        f"w.{dtype}": (torch.randn(6, 5, generator=generator) * 50).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)
    }
    return made | {"scalar": torch.tensor(7)}


@pytest.mark.parametrize("by", ["folder", "index"])
def test_a_folder_of_offloaded_weights(by: str, tmp_path: Path) -> None:
    offload = pytest.importorskip("accelerate.utils").offload_state_dict
    folder = tmp_path / "offload"
    folder.mkdir()
    offload(str(folder), weights())
    source = folder if by == "folder" else folder / "index.json"
    assert holds(convert(source, tmp_path / "s.zarr", progress=False), weights())


def test_offloaded_weights_may_be_in_their_checkpoint(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3), "y": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "w.dat").write_bytes(torch.arange(4.0).numpy().tobytes())
    index = {
        "w": {"dtype": "float32", "shape": [4]},
        "b": {"safetensors_file": str(tmp_path / "model.safetensors"), "weight_name": "x", "dtype": "float32"},
    }
    (tmp_path / "index.json").write_text(json.dumps(index))
    store = convert(tmp_path / "index.json", tmp_path / "s.zarr", progress=False)
    assert holds(store, {"w": torch.arange(4.0), "b": torch.ones(3)})


@pytest.mark.parametrize(
    ("told", "error", "said"),
    [
        ({"w": {"dtype": "float32", "shape": [5]}}, litrt.CorruptWeightError, "has 16 of 20 bytes"),
        ({"x": {"dtype": "float32", "shape": [5]}}, litrt.CorruptWeightError, "has 0 of 20 bytes"),
        ({"w": {"dtype": "float33", "shape": [4]}}, litrt.StoreError, "no dtype 'float33'"),
        ({"w": {"dtype": "float32", "shape": [-4]}}, litrt.StoreError, r"'w' has shape \(-4,\), which no tensor has"),
        ({"w": {"dtype": "float32", "shape": [1 << 60]}}, litrt.CorruptWeightError, "truncated or missing"),
        ({"../w": {"dtype": "float32", "shape": [4]}}, litrt.StoreError, "which no file beside it can have"),
        ({"w" * 300: {"dtype": "float32", "shape": [4]}}, litrt.CorruptWeightError, "truncated or missing"),
        ({"w": 3}, litrt.StoreError, "not the index of an offload folder"),
        ([], litrt.StoreError, "not the index of an offload folder"),
    ],
)
def test_an_index_that_is_wrong_is_refused(told: Any, error: type[Exception], said: str, tmp_path: Path) -> None:
    (tmp_path / "w.dat").write_bytes(bytes(16))
    (tmp_path / "index.json").write_text(json.dumps(told))
    with pytest.raises(error, match=said):
        convert(tmp_path / "index.json", tmp_path / "s.zarr")
