"""What `open_store` says of stores, whole, broken and foreign."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import zarr
from zarr.storage import LocalStore, StorePath

from litrt.convert import convert
from litrt.errors import StoreError, WeightNotFoundError
from litrt.reader import Reader
from litrt.store import open_store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    shared = torch.arange(12.0).reshape(3, 4)
    weights = {"wte.weight": shared, "h.0.bias": torch.ones(5, dtype=torch.bfloat16), "head.weight": shared}
    convert(weights | {"scale": torch.tensor(2.0)}, tmp_path / "gptj.zarr", progress=False)
    return tmp_path / "gptj.zarr"


def edit(path: Path, **changes: object) -> None:
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"]["litrt"] |= changes
    (path / "zarr.json").write_text(json.dumps(document))


def test_a_store_lists_all_names_in_the_order_they_were_written_in(path: Path) -> None:
    store = open_store(path)
    assert list(store) == ["wte.weight", "h.0.bias", "head.weight", "scale"]
    assert store.aliases == {"head.weight": "wte.weight"}
    assert store["head.weight"] == store["wte.weight"]
    assert store.resolve("head.weight") == "wte.weight"
    assert store.total_bytes == 48 + 10 + 4
    assert (store.path, store.is_local) == (str(path), True)


def test_an_entry_says_what_the_tensor_is(path: Path) -> None:
    info = open_store(str(path))["h.0.bias"]
    assert (info.name, info.shape, info.dtype, info.nbytes) == ("h.0.bias", (5,), torch.bfloat16, 10)
    assert (info.path, info.chunk_rows, info.chunk_bytes, info.direct) == ("h.0.bias", 5, 10, True)


def test_a_local_store_is_opened_without_zarr_python(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr, "open_group", None)
    assert len(open_store(path)) == 4


def test_a_relative_path_means_the_same_after_a_change_of_directory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    store = open_store(path.name)
    assert (store.path, store.root) == (path.name, str(path))
    monkeypatch.chdir("/")
    assert torch.equal(Reader(store).read_tensor("scale"), torch.tensor(2.0))


def test_a_name_that_is_missing_is_an_error_with_close_names(path: Path) -> None:
    store = open_store(path)
    assert "wte.wieght" not in store
    assert store.get("wte.wieght") is None
    with pytest.raises(WeightNotFoundError, match=r"no weight 'wte.wieght': did you mean 'wte.weight'") as caught:
        store["wte.wieght"]
    assert caught.value.name == "wte.wieght"
    with pytest.raises(WeightNotFoundError, match="it has 4 other names"):
        store.resolve("zzz")


@pytest.mark.parametrize("how", ["zip", "url", "zarr store", "store path"])
def test_a_store_is_opened_from_wherever_zarr_python_can_read(path: Path, how: str, tmp_path: Path) -> None:
    places = {
        "url": path.as_uri(),
        "zarr store": LocalStore(path),
        "store path": StorePath(LocalStore(tmp_path), path.name),
    }
    place = places.get(how) or shutil.make_archive(str(tmp_path / "packed"), "zip", path)
    store, local = open_store(place), open_store(path)
    assert list(store) == list(local)
    assert (store.aliases, store.total_bytes, store.is_local) == (local.aliases, local.total_bytes, False)
    assert store["h.0.bias"].dtype == torch.bfloat16
    reader = Reader(store)
    assert torch.equal(reader.read_tensor("head.weight"), torch.arange(12.0).reshape(3, 4))
    reader.close()
    assert torch.equal(reader.read_tensor("scale"), torch.tensor(2.0)), "a closed store opens again when it is used"
    reader.close()


def test_a_store_of_zarr_version_2_is_read_through_zarr_python(tmp_path: Path) -> None:
    group = zarr.create_group(LocalStore(tmp_path / "v2.zarr"), zarr_format=2)
    group.create_array("w", shape=(4, 3), chunks=(2, 2), dtype="float32")[...] = (
        torch.arange(12.0).reshape(4, 3).numpy()
    )
    group.attrs["litrt"] = {"format": 1, "complete": True, "tensors": ["w"], "aliases": {}}
    store = open_store(tmp_path / "v2.zarr")
    assert not store["w"].direct
    assert torch.equal(Reader(store).read_tensor("w"), torch.arange(12.0).reshape(4, 3))


def test_a_path_without_a_store_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"none\.zarr does not exist: make a store with litrt convert"):
        open_store(tmp_path / "none.zarr")
    (tmp_path / "empty").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "model.bin")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 16)
    shutil.make_archive(str(tmp_path / "other"), "zip", tmp_path / "empty")
    zarr.create_group(LocalStore(tmp_path / "other.zarr"))
    for name in ("empty", "model.bin", "model.safetensors", "other.zip", "other.zarr"):
        with pytest.raises(StoreError, match=f"{re.escape(name)} is not a litrt store: make one with litrt convert"):
            open_store(tmp_path / name)
    with pytest.raises(StoreError, match="is not a litrt store"):
        open_store((tmp_path / "empty").as_uri())


def test_a_store_of_a_newer_format_is_refused(path: Path) -> None:
    edit(path, format=2)
    with pytest.raises(StoreError, match="has format 2 and this version of litrt reads up to 1: upgrade litrt"):
        open_store(path)


def test_an_interrupted_conversion_is_counted_in_weights(path: Path) -> None:
    edit(path, complete=False)
    with pytest.raises(StoreError, match=r"gptj\.zarr is incomplete: it was not finished"):
        open_store(path)
    shutil.rmtree(path / "wte.weight")
    expected = (
        "gptj.zarr is incomplete: 2 of 4 weights are missing. The conversion was interrupted: run litrt convert again."
    )
    with pytest.raises(StoreError, match=re.escape(expected)):
        open_store(path)


def test_arrays_lost_from_a_complete_store_are_counted(path: Path) -> None:
    shutil.rmtree(path / "scale")
    with pytest.raises(StoreError, match=r"is incomplete: 1 of 4 weights are missing\. Files were deleted"):
        open_store(path)
    with pytest.raises(StoreError, match=r"is incomplete: 1 of 4 weights are missing\. Files were deleted"):
        open_store(path.as_uri())


def test_metadata_that_is_not_json_is_named(path: Path) -> None:
    (path / "scale" / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"scale/zarr.json cannot be read as JSON"):
        open_store(path)


def test_an_array_that_torch_has_no_dtype_for_is_named(path: Path) -> None:
    file = path / "scale" / "zarr.json"
    file.write_text(file.read_text().replace('"torch_dtype": "float32"', '"torch_dtype": "float128"'))
    with pytest.raises(StoreError, match="'scale' is stored as float32, which is no form of a torch dtype"):
        open_store(path)
