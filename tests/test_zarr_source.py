"""Zarr groups as sources: those of others, and stores of litrt."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from checkpoints import bits, holds, same, write_zarr
from numcodecs import Blosc, Delta
from zarr.codecs import GzipCodec, TransposeCodec, ZstdCodec
from zarr.storage import ZipStore

import litrt
from litrt.convert import convert
from litrt.lazy import lazy_state_dict
from litrt.store import open_store

DTYPES = ["bool", *(f"{kind}{size}" for kind in ("int", "uint") for size in (8, 16, 32, 64))]
DTYPES += ["float16", "float32", "float64", "complex64", "complex128"]


def weights() -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(0)
    made = {f"h/{n}/{kind}": generator.integers(0, 2, 88).astype(kind) for n, kind in enumerate(DTYPES)}
    tensors = {name: torch.from_numpy(array.reshape(8, 11)) for name, array in made.items()}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.ones(0, 3), "a.b": torch.arange(7)}


def named(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("/", "."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("kind", ["directory", "zip"])
def test_a_group_of_any_version(kind: str, zarr_format: int, tmp_path: Path) -> None:
    source = tmp_path / ("g.zip" if kind == "zip" else "g.zarr")
    store: Any = ZipStore(source, mode="w") if kind == "zip" else source
    write_zarr(store, weights(), zarr_format)
    if kind == "zip":
        store.close()
    assert holds(convert(source, tmp_path / "s.zarr", progress=False), named(weights()))
    with lazy_state_dict(source) as lazy:
        assert list(lazy) == sorted(lazy)
        assert all(same(lazy[name], tensor) for name, tensor in named(weights()).items())


@pytest.mark.parametrize(
    ("zarr_format", "options"),
    [
        (2, {"compressors": Blosc("lz4"), "chunks": (3, 11)}),
        (2, {"filters": [Delta(dtype="<f4")], "chunks": (8, 2), "order": "F"}),
        (3, {"compressors": [GzipCodec()], "chunks": (3, 4)}),
        (3, {"filters": [TransposeCodec(order=(1, 0))], "compressors": [ZstdCodec()]}),
        (3, {"chunks": (2, 11), "shards": (4, 11)}),
    ],
)
def test_a_group_of_any_codecs_and_chunks(zarr_format: int, options: dict[str, Any], tmp_path: Path) -> None:
    made = {"a/w": torch.arange(88.0).view(8, 11) / 8}
    write_zarr(tmp_path / "g.zarr", made, zarr_format, **options)
    assert holds(convert(tmp_path / "g.zarr", tmp_path / "s.zarr", progress=False), named(made))


def test_values_of_the_other_byte_order_are_turned_around(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "g.zarr", zarr_format=2)
    for kind in (">f4", ">c16", ">i2"):
        group.create_array(kind[1:], shape=(5,), dtype=kind)[...] = np.arange(5)
    expected = {"f4": torch.arange(5.0), "i2": torch.arange(5, dtype=torch.int16)}
    expected["c16"] = torch.arange(5).to(torch.complex128)
    assert holds(convert(tmp_path / "g.zarr", tmp_path / "s.zarr", progress=False), expected)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_chunk_that_nobody_wrote_has_the_fill_value(zarr_format: Any, tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "g.zarr", zarr_format=zarr_format)
    group.create_array("w", shape=(6, 2), chunks=(2, 2), dtype="f4", fill_value=7)[2:4] = 1
    expected = torch.tensor([7.0, 7, 1, 1, 7, 7]).repeat_interleave(2).view(6, 2)
    assert holds(convert(tmp_path / "g.zarr", tmp_path / "s.zarr", progress=False), {"w": expected})


def test_what_is_no_tensor_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "g.zarr", zarr_format=2)
    group.create_array("a/w", shape=(3,), dtype="f4")[...] = 1
    group.create_array("a/time", shape=(3,), dtype="M8[s]")
    group.create_array("text", shape=(3,), dtype="U5")
    said = r"'a\.time' is no tensor: it is an array of datetime64\[s\], .* Of 3 tensors 2 cannot be stored: leave them"
    with pytest.raises(litrt.StoreError, match=said):
        convert(tmp_path / "g.zarr", tmp_path / "s.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["g.zarr"]
    key_map = {"a.time": None, "text": None, "a.w": "w"}
    store = convert(tmp_path / "g.zarr", tmp_path / "s.zarr", key_map=key_map, progress=False)
    assert holds(store, {"w": torch.ones(3)})
    with lazy_state_dict(tmp_path / "g.zarr") as lazy:
        assert torch.equal(lazy["a.w"], torch.ones(3))
        with pytest.raises(litrt.StoreError, match="'text' is no tensor: it is an array of <U5"):
            lazy["text"]


def test_arrays_of_the_same_name_are_refused(tmp_path: Path) -> None:
    write_zarr(tmp_path / "g.zarr", {"a/b": torch.ones(2), "a.b": torch.ones(2)})
    with pytest.raises(litrt.StoreError, match=r"has the arrays 'a\.b' and 'a/b', both of which would be 'a\.b'"):
        convert(tmp_path / "g.zarr", tmp_path / "s.zarr")


def test_what_is_no_group_with_arrays_is_refused(tmp_path: Path) -> None:
    for zarr_format in (2, 3):
        zarr.create_array(tmp_path / f"a{zarr_format}", shape=(3,), dtype="f4", zarr_format=zarr_format)
        with pytest.raises(litrt.StoreError, match=f"a{zarr_format} is an array of Zarr, which has no name"):
            convert(tmp_path / f"a{zarr_format}", tmp_path / "s.zarr")
    with ZipStore(tmp_path / "empty.zip", mode="w") as store:
        zarr.create_group(store)
    with pytest.raises(litrt.StoreError, match=r"empty\.zip is a Zarr group in which there is no array"):
        convert(tmp_path / "empty.zip", tmp_path / "s.zarr")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x", "x")
    with pytest.raises(litrt.StoreError, match=r"x\.zip is not a Zarr group: it has no zarr\.json and no \.zgroup"):
        convert(tmp_path / "x.zip", tmp_path / "s.zarr")
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(litrt.StoreError, match=r"x\.zip is not a whole zip file"):
        convert(tmp_path / "x.zip", tmp_path / "s.zarr")


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    write_zarr(tmp_path / "g.zarr", {"a/w": torch.randn(9, 9), "b": torch.ones(2)})
    chunk = tmp_path / "g.zarr" / "a" / "w" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    with pytest.raises(litrt.CorruptWeightError, match=r"'a\.w' cannot be decoded \(") as caught:
        convert(tmp_path / "g.zarr", tmp_path / "s.zarr")
    assert caught.value.name == "a.w"
    assert [path.name for path in tmp_path.iterdir()] == ["g.zarr"]


@pytest.mark.parametrize("kind", ["pipe", "loop", "gone", "folder"])
def test_a_chunk_that_is_no_file_is_refused_and_not_taken_for_fill_value(kind: str, tmp_path: Path) -> None:
    write_zarr(tmp_path / "g.zarr", {"w": torch.randn(9)})
    chunk = tmp_path / "g.zarr" / "w" / "c" / "0"
    chunk.unlink()
    if kind == "pipe":
        os.mkfifo(chunk)
    else:
        chunk.symlink_to({"loop": chunk, "gone": tmp_path / "none", "folder": tmp_path}[kind])
    with pytest.raises(litrt.StoreError, match=r"/w/c/0 (cannot be read|is neither a file nor a folder)"):
        convert(tmp_path / "g.zarr", tmp_path / "s.zarr")


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_group_is_never_code(zarr_format: Any, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    write_zarr(tmp_path / "g.zarr", {"w": torch.randn(9)}, zarr_format, compressors=None)
    file = tmp_path / "g.zarr" / "w" / (".zarray" if zarr_format == 2 else "zarr.json")
    told = json.loads(file.read_text())
    if zarr_format == 2:
        told["compressor"] = {"id": "pickle"}
    else:
        told["codecs"].append({"name": "numcodecs.pickle", "configuration": {}})
    file.write_text(json.dumps(told))
    (chunk,) = (path for path in (tmp_path / "g.zarr" / "w").rglob("0") if path.is_file())
    chunk.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(litrt.LitrtError, match=r"'w' (is no tensor: |cannot be decoded)"):
        convert(tmp_path / "g.zarr", tmp_path / "s.zarr")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("chunks", [(1000,), (1 << 40,)])
def test_a_tensor_that_is_nearly_all_fill_value_takes_no_memory(chunks: tuple[int], tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "g.zarr")
    group.create_array("w", shape=(1 << 40,), chunks=chunks, dtype="f4", fill_value=1)
    group.create_array("small", shape=(1 << 24,), chunks=(1 << 20,), dtype="f4", fill_value=1)
    with pytest.raises(litrt.StoreError, match=r"'w' is no tensor: it has 4398046511104 bytes and its files \d+, so"):
        convert(tmp_path / "g.zarr", tmp_path / "s.zarr")
    store = convert(tmp_path / "g.zarr", tmp_path / "s.zarr", key_map={"w": None}, progress=False)
    assert holds(store, {"small": torch.ones(1 << 24)})


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("compressor", [None, "auto"])
@pytest.mark.parametrize("name", ["w/c/0", "w/0", "w/junk"])
def test_what_a_zip_file_unpacks_to_does_not_count_twice(
    name: str, compressor: Any, zarr_format: Any, tmp_path: Path
) -> None:
    group = zarr.create_group(tmp_path / "g.zarr", zarr_format=zarr_format)
    array = {"shape": (3 << 30,), "chunks": (1 << 26,), "dtype": "u1", "fill_value": 1}
    group.create_array("w", **array, compressors=compressor)
    path = tmp_path / "g.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in (tmp_path / "g.zarr").rglob(".z*" if zarr_format == 2 else "*.json"):
            archive.write(file, file.relative_to(tmp_path / "g.zarr"))
        archive.writestr(name, bytes(200_000))
    with pytest.raises(litrt.StoreError, match=r"'w' is no tensor: it has 3221225472 bytes and its files \d+, so"):
        convert(path, tmp_path / "s.zarr")


def test_an_array_without_a_compressor_has_to_have_its_bytes(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "g.zarr")
    for name, compressors in (("plain", None), ("packed", "auto")):
        array = group.create_array(name, shape=(100 << 20,), chunks=(1 << 20,), dtype="u1", compressors=compressors)
        array[: 1 << 20] = np.random.default_rng(0).integers(0, 9, 1 << 20)
    with litrt.lazy_state_dict(tmp_path / "g.zarr") as lazy:
        assert lazy["packed"].count_nonzero() > 900_000
        with pytest.raises(litrt.StoreError, match=r"'plain' is no tensor: it has 104857600 bytes and its"):
            lazy["plain"]


def test_a_chunk_that_no_memory_holds_is_refused(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "g.zarr").create_array("w", shape=(4,), chunks=(1 << 40,), dtype="f4")
    with pytest.raises(litrt.StoreError, match=r"'w' .* chunks of shape \(1099511627776,\), which no memory holds"):
        convert(tmp_path / "g.zarr", tmp_path / "s.zarr")


# Stores of litrt.


def own(tmp_path: Path, **options: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    tied = torch.randn(8, 4).bfloat16()
    made = {"a/b": torch.randn(3, 3), "tied": tied, "half": torch.randn(5).to(torch.float8_e4m3fn), "tie": tied}
    convert(made, tmp_path / "own.zarr", progress=False, **options)
    return tmp_path / "own.zarr", made


@pytest.mark.parametrize("kind", ["directory", "zip", "v2", "url"])
def test_a_store_of_litrt_keeps_names_dtypes_and_ties(kind: str, tmp_path: Path) -> None:
    made_at, made = own(tmp_path)
    source: str | Path = made_at
    if kind == "url":
        source = f"file://{made_at}"
    elif kind == "zip":
        source = Path(shutil.make_archive(str(tmp_path / "own"), "zip", made_at))
    elif kind == "v2":
        old: Any = zarr.open_group(source, mode="r")
        new = zarr.create_group(source := tmp_path / "v2.zarr", zarr_format=2, attributes=old.attrs.asdict())
        for name, array in old.arrays():
            copy = new.create_array(name, shape=array.shape, dtype=array.dtype, attributes=array.attrs.asdict())
            copy[...] = array[...]
    store = convert(source, tmp_path / "s.zarr", progress=False)
    assert holds(store, made)
    assert store.aliases == {"tie": "tied"}
    with lazy_state_dict(source) as lazy:
        assert lazy.aliases == {"tie": "tied"}
        assert bits(lazy["tie"]) == bits(made["tied"])


def test_a_store_of_litrt_can_be_cast_and_replace_itself(tmp_path: Path) -> None:
    source, made = own(tmp_path, compress="zstd")
    store = convert(source, source, dtype="float32", overwrite=True, progress=False)
    assert holds(store, {name: tensor.float() for name, tensor in made.items()})


def test_the_checksums_of_a_store_of_litrt_are_checked(tmp_path: Path) -> None:
    source, _ = own(tmp_path)
    chunk = source / "tied" / "c" / "0" / "0"
    damaged = bytearray(chunk.read_bytes())
    damaged[5] ^= 1
    chunk.write_bytes(damaged)
    with pytest.raises(litrt.CorruptWeightError, match=r"'tied': .*/tied/c/0/0 is damaged: its checksum is"):
        convert(source, tmp_path / "s.zarr")
    chunk.unlink()
    with pytest.raises(litrt.CorruptWeightError, match=r"'tied': .*/tied/c/0/0 is missing"):
        convert(source, tmp_path / "s.zarr")


def test_an_incomplete_store_of_litrt_is_no_source(tmp_path: Path) -> None:
    source, _ = own(tmp_path)
    told = json.loads((source / "zarr.json").read_text())
    told["attributes"]["litrt"]["complete"] = False
    (source / "zarr.json").write_text(json.dumps(told))
    with pytest.raises(litrt.StoreError, match=r"own\.zarr is incomplete"):
        convert(source, tmp_path / "s.zarr")
    with pytest.raises(litrt.StoreError, match="is incomplete"):
        open_store(source)
