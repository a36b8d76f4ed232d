"""Conversion: every source, every dtype bit for bit, in bounded memory, complete or not at all."""

from __future__ import annotations

import base64
import gc
import io
import json
import mmap
import re
import shutil
import struct
import subprocess
import sys
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from litrt.checkpoint import open_source
from litrt.convert import convert
from litrt.crc import extend_crc
from litrt.errors import CorruptWeightError, StoreError
from litrt.reader import Reader
from litrt.store import Store, open_store

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *(
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "float4_e2m1fn_x2",
    ),
]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_holds(store: Store, weights: Mapping[str, torch.Tensor]) -> None:
    assert sorted(store) == sorted(weights)
    reader = Reader(store)
    for name, tensor in weights.items():
        found = reader.read_tensor(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert bits(found) == bits(tensor), name


def random_bits(dtype: str, rows: int) -> torch.Tensor:
    """Every pattern of bits: NaNs with payloads, both zeros, infinities and subnormals among them."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(rows)
    top = 2 if dtype == "bool" else 256
    return torch.randint(0, top, (rows, 16 * torch_dtype.itemsize), dtype=torch.uint8, generator=generator).view(
        torch_dtype
    )


def example() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.randn(6, 5), "a.bias": torch.randn(5).bfloat16(), "step": torch.tensor(7)}


class Lazy(Mapping[str, torch.Tensor]):
    """Makes tensors when they are asked for, and checks that they are asked for once, one at a time."""

    def __init__(self, n_tensors: int, n_values: int) -> None:
        self.names = [f"w{index}" for index in range(n_tensors)]
        self.n_values = n_values
        self.fetched: list[str] = []
        self.last: weakref.ref[torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        assert self.last is None or self.last() is None, "the tensor before was kept"
        self.fetched.append(name)
        tensor = torch.full((self.n_values,), float(self.names.index(name)))
        self.last = weakref.ref(tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


# Values.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compress", [None, "lz4", "zstd"])
def test_every_dtype_is_kept_bit_for_bit(dtype: str, compress: str | None, tmp_path: Path) -> None:
    matrix = random_bits(dtype, 40)
    weights = {
        "matrix": matrix,
        "scalar": matrix[3, 4].clone(),
        "empty": matrix[:0].clone(),
        "none": matrix[:, :0].clone(),
    }
    weights |= {"transposed": matrix.t(), "leading": matrix[None, None], "one": matrix[:1, :1].clone()}
    assert_holds(convert(weights, tmp_path / "s.zarr", compress=compress, progress=False), weights)


def test_plain_zarr_python_reads_the_same_values(tmp_path: Path) -> None:
    weights = {"a": torch.randn(9, 7), "b/c": random_bits("bfloat16", 3), "zeros": torch.zeros(4, 4)}
    convert(weights, tmp_path / "s.zarr", progress=False)
    group: Any = zarr.open_group(tmp_path / "s.zarr", mode="r")
    assert np.array_equal(group["a"][...], weights["a"].numpy())
    assert np.array_equal(group["b%2Fc"][...], weights["b/c"].view(torch.uint16).numpy())
    crc = extend_crc(0, weights["b/c"].view(torch.uint8).numpy())
    assert group["b%2Fc"].attrs["litrt"] == {
        "name": "b/c",
        "torch_dtype": "bfloat16",
        "chunks": {"chunk_rows": 3, "crc32c": base64.b64encode(crc.to_bytes(4, "little")).decode()},
    }
    assert (tmp_path / "s.zarr/zeros/c/0/0").stat().st_size == 4 * 4 * 4 + 4, "a chunk of zeros is stored"


def test_the_example_in_the_documentation_reads_a_store(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    weights = example() | {
        "__x/é": random_bits("bfloat16", 2),
        "empty": torch.ones(0, 3),
        "long" * 90: torch.ones(2),
    }
    weights["tied"] = weights["a.weight"]
    convert(weights, tmp_path / "s.zarr", progress=False)
    found = names["read"](tmp_path / "s.zarr")
    assert list(found) == list(weights)
    assert all(
        bits(found[name]) == bits(tensor) and found[name].dtype == tensor.dtype for name, tensor in weights.items()
    )


def test_views_conjugates_and_parameters_are_stored_by_value(tmp_path: Path) -> None:
    base = torch.randn(6, 8, dtype=torch.complex64)
    weights = {
        "strided": base[::2, ::3],
        "conjugate": base.conj(),
        "negative": base.conj().imag,
        "expanded": torch.randn(1, 4).expand(3, 4),
        "parameter": nn.Parameter(torch.randn(3)),
    }
    store = convert(weights, tmp_path / "s.zarr", progress=False)
    assert_holds(store, {name: tensor.resolve_conj().resolve_neg() for name, tensor in weights.items()})
    assert store.aliases == {}


def test_dtype_casts_floating_tensors_only(tmp_path: Path) -> None:
    weights = {name: torch.ones(3, dtype=getattr(torch, name)) / 3 for name in ("float32", "float64", "complex64")}
    weights |= {
        "int64": torch.arange(3),
        "bool": torch.ones(3, dtype=torch.bool),
        "float16": torch.ones(2).half(),
    }
    expected = {name: value.bfloat16() if value.is_floating_point() else value for name, value in weights.items()}
    for dtype in ("bfloat16", "torch.bfloat16", torch.bfloat16):
        assert_holds(convert(weights, tmp_path / "s.zarr", dtype=dtype, overwrite=True, progress=False), expected)


def test_a_tensor_of_several_chunks_is_cast_and_transposed_by_rows(tmp_path: Path) -> None:
    weight = torch.randn(2500, 9001).t()
    store = convert({"w": weight}, tmp_path / "s.zarr", dtype=torch.float64, progress=False)
    assert len(Reader(store).pieces("w")) > 4
    assert_holds(store, {"w": weight.double()})


# Sources.


def test_tied_tensors_of_a_dict_are_stored_once(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    weights = OrderedDict(
        wte=base,
        head=base.detach(),
        again=base,
        other=base.clone(),
        rows=base[:2],
        turned=base.t(),
        none=torch.ones(0),
    )
    weights["empty"] = torch.ones(0)
    store = convert(weights, tmp_path / "s.zarr", progress=False)
    assert list(store) == list(weights)
    assert store.aliases == {"head": "wte", "again": "wte"}
    assert store.total_bytes == base.nbytes * 3 + base.nbytes // 2
    assert_holds(store, weights)


def test_a_lazy_mapping_is_fetched_once_each_and_one_at_a_time(tmp_path: Path) -> None:
    lazy = Lazy(12, 1000)
    gc.disable()
    try:
        store = convert(lazy, tmp_path / "s.zarr", progress=False)
    finally:
        gc.enable()
    assert lazy.fetched == lazy.names
    assert store.aliases == {}, "memory that is used again is no tie"
    assert_holds(store, {name: torch.full((1000,), float(index)) for index, name in enumerate(lazy.names)})


class LazyDict(dict[str, torch.Tensor]):
    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.full((1000,), float(name))


def test_a_dict_that_makes_its_values_is_a_lazy_mapping(tmp_path: Path) -> None:
    store = convert(LazyDict.fromkeys(["1", "2", "3"]), tmp_path / "s.zarr", progress=False)
    assert store.aliases == {}
    assert_holds(store, {name: torch.full((1000,), float(name)) for name in "123"})


def write_safetensors(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Writes a file from the description of the format."""
    names = {
        "bool": "BOOL",
        "bfloat16": "BF16",
        "complex64": "C64",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e5m2": "F8_E5M2",
    }
    names |= {
        f"{kind}{size}": f"{kind[0].upper()}{size}" for kind in ("int", "uint", "float") for size in (8, 16, 32, 64)
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = io.BytesIO()
    for name, tensor in weights.items():
        start = body.tell()
        body.write(bits(tensor))
        dtype = names[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, body.tell()]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body.getvalue())


def test_a_safetensors_file_of_every_dtype(tmp_path: Path) -> None:
    skipped = {
        "complex32",
        "complex128",
        "float4_e2m1fn_x2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    }
    weights = {dtype: random_bits(dtype, 5) for dtype in DTYPES if dtype not in skipped}
    weights |= {"scalar": torch.tensor(2.5), "empty": torch.ones(0, 4)}
    write_safetensors(tmp_path / "m.safetensors", weights)
    assert_holds(convert(tmp_path / "m.safetensors", tmp_path / "s.zarr", progress=False), weights)


def test_a_file_that_the_safetensors_library_wrote(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    library.save_file(example(), tmp_path / "m.safetensors", metadata={"format": "pt"})
    library.save_file(example(), tmp_path / "again.safetensors")
    weights = library.load_file(tmp_path / "m.safetensors")
    assert_holds(convert(str(tmp_path / "m.safetensors"), tmp_path / "s.zarr", progress=False), weights)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_a_torch_file_is_mapped_and_its_ties_are_found(suffix: str, wrap: str | None, tmp_path: Path) -> None:
    weights = example()
    weights |= {"tied": weights["a.weight"], "view": weights["a.weight"][1:]}
    torch.save({wrap: weights, "epoch": 3} if wrap else weights, tmp_path / f"m.{suffix}")
    store = convert(tmp_path / f"m.{suffix}", tmp_path / "s.zarr", progress=False)
    assert store.aliases == {"tied": "a.weight"}
    assert_holds(store, weights)


def test_a_torch_file_of_before_zip_files(tmp_path: Path) -> None:
    torch.save(weights := example(), tmp_path / "m.bin", _use_new_zipfile_serialization=False)
    assert_holds(convert(tmp_path / "m.bin", tmp_path / "s.zarr", progress=False), weights)


@pytest.mark.filterwarnings("error")
def test_a_torch_file_of_before_zip_files_has_ties_and_views(tmp_path: Path) -> None:
    base, other = torch.randn(100, 100), torch.randn(60, 50)
    weights = {
        "a": base,
        "tied": base,
        "view": base[:50],
        "transposed": base.t(),
        "parameter": nn.Parameter(other),
        "tied.parameter": nn.Parameter(other),
        "expanded": torch.ones(1).expand(40, 50),
        "sparse": torch.eye(3).to_sparse(),
    }
    torch.save(weights, tmp_path / "m.bin", _use_new_zipfile_serialization=False)
    key_map = {"sparse": None}
    weights.pop("sparse")
    store = convert(tmp_path / "m.bin", tmp_path / "s.zarr", key_map=key_map, progress=False)
    assert store.aliases == {"tied": "a", "tied.parameter": "parameter"}
    assert_holds(store, weights)


def test_a_torch_file_of_before_zip_files_is_refused_where_it_ends_early(tmp_path: Path) -> None:
    base = torch.randn(100, 100)
    torch.save({"a": base, "tied": base}, tmp_path / "m.bin", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "m.bin").read_bytes()
    for n_bytes in (len(whole) - 100, 300, 20, 0):
        (tmp_path / "m.bin").write_bytes(whole[:n_bytes])
        with pytest.raises(StoreError, match=r"cannot load .*A truncated file has to be downloaded again"):
            convert(tmp_path / "m.bin", tmp_path / "s.zarr")


def test_the_values_of_a_legacy_torch_file_do_not_count_as_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litrt.torch_file._MOST_PICKLE_BYTES", 20_000)
    torch.save(weights := {"a": torch.randn(100_000)}, tmp_path / "m.bin", _use_new_zipfile_serialization=False)
    assert_holds(convert(tmp_path / "m.bin", tmp_path / "s.zarr", progress=False), weights)


def write_big_endian(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Writes a torch file as a big-endian machine does, of weights of float32."""
    torch.save(weights, path)
    with zipfile.ZipFile(path) as made:
        records = {name.split("/", 1)[1]: made.read(name) for name in made.namelist()}
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, content in records.items():
        if name == "byteorder":
            content = b"big"
        elif name.startswith("data/"):
            content = np.frombuffer(content, "<f4").astype(">f4").tobytes()
        if name not in ("version", ".data/serialization_id"):
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()


def test_a_torch_file_of_the_other_byte_order_keeps_its_values_while_it_is_read(tmp_path: Path) -> None:
    base = torch.arange(20_000.0)
    weights = {"a": base, "view": base[:9000], "b": torch.arange(300.0), "inner": base[100:2000]}
    write_big_endian(tmp_path / "m.pt", weights)
    assert_holds(convert(tmp_path / "m.pt", tmp_path / "s.zarr", progress=False), weights)


def test_only_pages_that_are_a_tensors_own_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"before": torch.ones(3000), "a": torch.ones(20_000)}, tmp_path / "m.pt")
    dropped: list[tuple[int, int]] = []

    def madvise(start: Any, n_bytes: Any, _: int) -> None:
        dropped.append((start.value, start.value + n_bytes.value))

    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(madvise=madvise))
    with open_source(tmp_path / "m.pt") as source:
        for name in source.names:
            tensor = source.fetch(name)
            source.release(tensor)
            start, end = dropped.pop()
            assert tensor.data_ptr() <= start < end <= tensor.data_ptr() + tensor.nbytes
            assert start % mmap.PAGESIZE == end % mmap.PAGESIZE == 0


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("by", ["directory", "index"])
def test_a_sharded_checkpoint(kind: str, by: str, tmp_path: Path) -> None:
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weights = {f"h.{index}.w": torch.randn(4, 5) for index in range(6)}
    weight_map = {}
    for shard in range(3):
        file = f"{stem}-{shard + 1:05}-of-00003.{kind}"
        part = {name: tensor for name, tensor in weights.items() if name[2].isdigit() and int(name[2]) % 3 == shard}
        if kind == "bin" and shard == 1:
            part["tied"] = weights["tied"] = part["h.1.w"]
        (write_safetensors if kind == "safetensors" else lambda path, part: torch.save(part, path))(
            tmp_path / file, part
        )
        weight_map |= dict.fromkeys(part, file)
    index = tmp_path / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    store = convert(tmp_path if by == "directory" else index, tmp_path / "out" / "s.zarr", progress=False)
    assert store.aliases == ({"tied": "h.1.w"} if kind == "bin" else {})
    assert_holds(store, weights)
    (tmp_path / f"{stem}-00002-of-00003.{kind}").unlink()
    with pytest.raises(StoreError, match=f"names 3 shards and 1 are missing, the first {stem}-00002-of-00003"):
        convert(tmp_path, tmp_path / "t.zarr", progress=False)


def test_a_directory_with_one_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"has no checkpoint: expected model\.safetensors, pytorch_model\.bin, an"):
        convert(tmp_path, tmp_path / "s.zarr")
    torch.save(example(), tmp_path / "training.bin")
    torch.save(example(), tmp_path / "other.bin")
    with pytest.raises(StoreError, match=r"has 2 checkpoints \(other\.bin, training\.bin\): pass one of them"):
        convert(tmp_path, tmp_path / "s.zarr")
    torch.save(weights := example(), tmp_path / "pytorch_model.bin")
    assert_holds(convert(tmp_path, tmp_path / "s.zarr", progress=False), weights)
    write_safetensors(tmp_path / "model.safetensors", weights := example())
    assert_holds(convert(tmp_path, tmp_path / "s.zarr", progress=False, overwrite=True), weights)


def cached(repository: Path, revisions: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """Makes a repository as the cache of huggingface_hub has it, with links from its snapshots to blobs."""
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    made = {}
    for revision in revisions:
        (repository / "snapshots" / revision).mkdir(parents=True)
        write_safetensors(repository / "blobs" / f"of-{revision}", weights := example())
        (repository / "snapshots" / revision / "model.safetensors").symlink_to(f"../../blobs/of-{revision}")
        made[revision] = weights
    return made


def test_a_model_in_the_cache_of_the_hub_is_that_of_main(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    made = cached(repository, ("1a", "2b"))
    with pytest.raises(StoreError, match="has 2 snapshots, and does not say which is main: download it again, or pass"):
        convert(repository, tmp_path / "s.zarr")
    (repository / "refs" / "main").write_text("2b\n")
    assert_holds(convert(repository, tmp_path / "s.zarr", progress=False), made["2b"])
    for main in ("3c", "..", "../snapshots/1a", ""):
        (repository / "refs" / "main").write_text(main)
        with pytest.raises(StoreError, match=f"has 2 snapshots, and main is none of them, '{re.escape(main)}'"):
            convert(repository, tmp_path / "t.zarr")


def test_a_model_in_the_cache_of_the_hub_may_have_been_downloaded_by_its_revision(tmp_path: Path) -> None:
    made = cached(tmp_path / "models--org--name", ("1a",))
    assert_holds(convert(tmp_path / "models--org--name", tmp_path / "s.zarr", progress=False), made["1a"])


# Sources that are refused.


def test_truncated_and_damaged_safetensors_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    write_safetensors(file, {"a": torch.ones(10), "b": torch.ones(10)})
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    expected = f"m.safetensors is truncated: it has {len(whole) - 1} of {len(whole)} bytes, and 'b' is cut off"
    with pytest.raises(CorruptWeightError, match=expected) as caught:
        convert(file, tmp_path / "s.zarr")
    assert (caught.value.name, caught.value.file) == ("b", str(file))
    for content, said in {
        b"": "is not a safetensors file, or its beginning is lost: it has 0 bytes",
        b"\xff" * 64: "is not a safetensors file, or its beginning is lost: it has 64 bytes",
        struct.pack("<Q", 4) + b"{]}!": "its header is not what the format says",
        whole.replace(b"[0, 40]", b"[0, 36]"): r"'a' of shape \(10,\) and dtype F32 takes 40 bytes.* gives it 36",
        whole.replace(b"[0, 40]", b"[4,44] "): "'a' begins at byte 4 and should at 0",
        whole.replace(b'"F32"', b'"F6X"'): "'a' has dtype F6X, which litrt cannot store",
    }.items():
        file.write_bytes(content)
        with pytest.raises(StoreError, match=said):
            convert(file, tmp_path / "s.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors"]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": torch.ones(1), "cfg": {"x": 1}}, "'cfg' is a dict, not a tensor"),
        ({"a": torch.ones(2, device="meta")}, "'a' is on the meta device and has no values"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is sparse coo, which cannot be stored"),
        ({1: torch.ones(1)}, "names of weights are strings; got 1"),
        (nn.Linear(2, 2), r"pass its weights, module\.state_dict\(\)"),
        ([torch.ones(1)], "cannot convert Tensor: pass a state_dict"),
    ],
)
def test_what_is_not_a_mapping_of_plain_tensors_is_named(weights: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=said):
        convert(weights, tmp_path / "s.zarr")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_tensor_is_named(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match="'a' is quantised, which cannot be stored"):
        convert({"a": quantised}, tmp_path / "s.zarr")


def test_files_that_are_not_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.bin does not exist: pass the path of a checkpoint"):
        convert(tmp_path / "none.bin", tmp_path / "s.zarr")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(StoreError, match=r"cannot tell what .*notes\.txt is: expected \.safetensors"):
        convert(tmp_path / "notes.txt", tmp_path / "s.zarr")
    (tmp_path / "broken.bin").write_bytes(b"no pickle")
    with pytest.raises(StoreError, match=r"cannot load .*broken\.bin: "):
        convert(tmp_path / "broken.bin", tmp_path / "s.zarr")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(StoreError, match=r"list\.pt holds a list, not a state_dict"):
        convert(tmp_path / "list.pt", tmp_path / "s.zarr")
    torch.save({"w": torch.ones(1), "a._extra_state": None}, tmp_path / "extra.pt")
    with pytest.raises(StoreError, match=r"'a\._extra_state' is a NoneType, which is no tensor. Of 2 tensors 1 cannot"):
        convert(tmp_path / "extra.pt", tmp_path / "s.zarr")
    key_map = {"a._extra_state": None}
    store = convert(tmp_path / "extra.pt", tmp_path / "extra.zarr", key_map=key_map, progress=False)
    assert_holds(store, {"w": torch.ones(1)})
    torch.save({"weights": {"w": torch.ones(1)}, "epoch": 3}, tmp_path / "nested.pt")
    with pytest.raises(
        StoreError, match=r"nested\.pt has no tensors, but 2 other entries, the first 'weights', a dict"
    ):
        convert(tmp_path / "nested.pt", tmp_path / "t.zarr")
    (tmp_path / "model.bin.index.json").write_text("{}")
    with pytest.raises(StoreError, match="is not the index of a checkpoint: it has no weight_map"):
        convert(tmp_path / "model.bin.index.json", tmp_path / "s.zarr")


@pytest.mark.parametrize(("option", "value"), [("compress", "gzip"), ("dtype", "int8"), ("dtype", "floaty")])
def test_options_that_do_not_exist_are_refused(option: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{value}'"):
        convert(example(), tmp_path / "s.zarr", **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["m.safetensors", "m.bin", "m.npz", "m.gguf"])
def test_a_pointer_of_git_lfs_is_said_to_be_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    with pytest.raises(StoreError, match=rf"{name} is a pointer of git-lfs in place of the file: run git lfs pull"):
        convert(tmp_path / name, tmp_path / "s.zarr")


@pytest.mark.parametrize("is_zip", [True, False])
def test_what_torch_advises_is_not_passed_on(is_zip: bool, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(StoreError) as caught:
        convert(tmp_path / "m.pt", tmp_path / "s.zarr")
    said = str(caught.value)
    assert "Unsupported global: GLOBAL torch.nn.modules.linear.Linear was not an allowed global by default. A" in said
    assert not any(advice in said for advice in ("weights_only", "add_safe_globals", "\x1b", "Re-running"))


def test_a_directory_of_files_that_are_not_called_like_checkpoints_says_what_to_pass(tmp_path: Path) -> None:
    for shard in ("00001", "00002"):
        write_safetensors(tmp_path / f"model-{shard}-of-00002.safetensors", {shard: torch.ones(1)})
    said = r"has 2 shards \(model-00001-of-00002.*\) and no \*\.index\.json: download that too, or pass all of them"
    with pytest.raises(StoreError, match=said):
        convert(tmp_path, tmp_path / "s.zarr")
    (tmp_path / "d").mkdir()
    torch.save({"w": torch.ones(1)}, tmp_path / "d" / "consolidated.00.pth")
    with pytest.raises(StoreError, match=r"but consolidated\.00\.pth: pass that file itself"):
        convert(tmp_path / "d", tmp_path / "s.zarr")


def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "m.pt")
    write_safetensors(tmp_path / "m.safetensors", {})
    (tmp_path / "m.bin.index.json").write_text(json.dumps({"weight_map": {}}))
    (tmp_path / "index.json").write_text("{}")
    np.savez(tmp_path / "m.npz")
    for name in ("m.pt", "m.safetensors", "m.bin.index.json", "index.json", "m.npz"):
        with pytest.raises(StoreError, match=rf"{name} has no tensors: pass the file that has the weights"):
            convert(tmp_path / name, tmp_path / "s.zarr")


def test_values_of_four_bits_are_pairs_in_torch(tmp_path: Path) -> None:
    packed = torch.arange(24, dtype=torch.uint8).reshape(4, 6)
    header = {"w": {"dtype": "F4", "shape": [4, 12], "data_offsets": [0, 24]}}
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + packed.numpy().tobytes())
    store = convert(tmp_path / "m.safetensors", tmp_path / "s.zarr", progress=False)
    assert_holds(store, {"w": packed.view(torch.float4_e2m1fn_x2)})
    for shape in ([8, 3], []):
        text = json.dumps({"w": {"dtype": "F4", "shape": shape, "data_offsets": [0, 24]}}).encode()
        (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
        with pytest.raises(StoreError, match="has half a byte"):
            convert(tmp_path / "m.safetensors", tmp_path / "t.zarr")


def test_a_dtype_that_torch_has_not_can_be_left_out(tmp_path: Path) -> None:
    header = {
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [8, 11]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(11))
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys("wx", "m.safetensors")}))
    for number, source in enumerate(("m.safetensors", "m.safetensors.index.json")):
        with pytest.raises(
            StoreError, match=r"'x' has dtype F6_E2M3, which litrt cannot store\. Of 2 tensors 1 cannot"
        ):
            convert(tmp_path / source, tmp_path / "s.zarr")
        store = convert(tmp_path / source, tmp_path / f"{number}.zarr", key_map={"x": None}, progress=False)
        assert_holds(store, {"w": torch.zeros(2)})
        with open_source(tmp_path / source) as opened, pytest.raises(StoreError, match="'x' has dtype F6_E2M3"):
            opened.fetch("x")


# Other names, and several at once.


def test_tensors_get_other_names(tmp_path: Path) -> None:
    tied = torch.ones(3)
    weights = {"model.a": torch.zeros(2), "model.b": tied, "head": tied, "optimizer": torch.ones(1)}

    def of_prefix(name: str) -> str | None:
        return None if name == "optimizer" else name.removeprefix("model.")

    for number, key_map in enumerate((of_prefix, {"model.a": "a", "model.b": "b", "optimizer": None})):
        store = convert(weights, tmp_path / f"{number}.zarr", key_map=key_map, progress=False)
        assert_holds(store, {"a": torch.zeros(2), "b": tied, "head": tied})
        assert store.aliases == {"head": "b"}
    store = convert(weights, tmp_path / "head.zarr", key_map={"model.b": None}, progress=False)
    assert_holds(store, {"model.a": torch.zeros(2), "head": tied, "optimizer": torch.ones(1)})
    assert not store.aliases


@pytest.mark.parametrize(
    ("key_map", "error", "said"),
    [
        ({"none": "x"}, ValueError, "renames 'none', which the checkpoint does not have"),
        ({"a": "b"}, ValueError, "gives 'a' and 'b' the same name, 'b'"),
        (lambda name: None, ValueError, "leaves out all tensors"),
        (lambda name: 3, TypeError, "makes 3 of 'a': names of weights are strings"),
    ],
)
def test_names_that_cannot_be_are_refused(key_map: Any, error: type[Exception], said: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=said):
        convert({"a": torch.ones(1), "b": torch.ones(2)}, tmp_path / "s.zarr", key_map=key_map)
    assert not list(tmp_path.iterdir())


def test_several_checkpoints_become_one(tmp_path: Path) -> None:
    tied = torch.ones(3)
    torch.save({"b": tied, "c": tied}, tmp_path / "one.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "two.pt")
    sources: list[Any] = [tmp_path / "one.pt", tmp_path / "two.pt"]
    store = convert(sources, tmp_path / "s.zarr", progress=False)
    assert_holds(store, {"a": torch.zeros(2), "b": tied, "c": tied})
    assert store.aliases == {"c": "b"}
    store = convert([*sources, {"d": torch.ones(1)}], tmp_path / "t.zarr", progress=False)
    assert len(store) == 4
    with pytest.raises(ValueError, match="two of the checkpoints have a tensor 'a'"):
        convert([*sources, {"a": torch.ones(1)}], tmp_path / "u.zarr")
    with pytest.raises(TypeError, match="cannot convert list"):
        convert([], tmp_path / "u.zarr")


# The target.


def test_a_store_that_exists_is_replaced_only_when_asked(tmp_path: Path) -> None:
    convert(first := example(), tmp_path / "s.zarr", progress=False)
    with pytest.raises(StoreError, match=r"s\.zarr exists: choose another path, or pass overwrite=True"):
        convert(example(), tmp_path / "s.zarr", progress=False)
    assert_holds(open_store(tmp_path / "s.zarr"), first)
    second = {"other": torch.ones(3)}
    assert_holds(convert(second, tmp_path / "s.zarr", overwrite=True, progress=False), second)
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


def test_what_is_not_a_store_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    zarr.open_group(tmp_path / "group", mode="w").create_array("w", shape=(3,), dtype="f4")
    zarr.open_group(tmp_path / "old", mode="w", zarr_format=2).create_array("w", shape=(3,), dtype="f4")
    before = sorted(tmp_path.rglob("*"))
    for name in ("home", "file", "group", "old"):
        with pytest.raises(StoreError, match=f"{name} exists and is not a store of litrt, so that it is not overwritt"):
            convert(example(), tmp_path / name, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(StoreError, match=r"cannot write to s3://bucket/s\.zarr: convert to a local directory"):
        convert(example(), "s3://bucket/s.zarr")


@pytest.mark.parametrize("content", [None, "", "{", '{"attributes": {"litrt": {"format": 7}}}'])
def test_a_damaged_store_may_be_overwritten(content: str | None, tmp_path: Path) -> None:
    convert({"a/b": torch.ones(3), "c": torch.ones(3)}, tmp_path / "s.zarr", progress=False)
    (tmp_path / "s.zarr" / "zarr.json").unlink()
    if content is not None:
        (tmp_path / "s.zarr" / "zarr.json").write_text(content)
    (tmp_path / "s.zarr" / "c" / "zarr.json").unlink()
    assert_holds(convert(made := example(), tmp_path / "s.zarr", overwrite=True, progress=False), made)


def test_a_store_of_other_things_too_that_does_not_say_what_it_is_is_not_overwritten(tmp_path: Path) -> None:
    convert(example(), tmp_path / "s.zarr", progress=False)
    (tmp_path / "s.zarr" / "zarr.json").unlink()
    (tmp_path / "s.zarr" / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="is not a store of litrt"):
        convert(example(), tmp_path / "s.zarr", overwrite=True, progress=False)
    assert (tmp_path / "s.zarr" / "thesis.tex").exists()


def test_a_path_through_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x")
    for path in ("t.txt/s.zarr", "t.txt/more/s.zarr"):
        with pytest.raises(StoreError, match=r"cannot write .*s\.zarr: .*t\.txt is no directory\. Choose another path"):
            convert(example(), tmp_path / path, progress=False)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("inside", ["s.zarr", "layers/s.zarr"])
def test_a_store_in_the_group_that_it_is_made_of_is_refused(zarr_format: Any, inside: str, tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "g", mode="w", zarr_format=zarr_format)
    group.create_array("layers/w", shape=(3,), dtype="f4")[...] = np.ones(3)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        StoreError, match=r"cannot write .*s\.zarr into .*g, which it is made of, and of which all is re"
    ):
        convert([tmp_path / "g", {"x": torch.ones(1)}], tmp_path / "g" / inside, progress=False)
    assert sorted(tmp_path.rglob("*")) == before
    assert_holds(convert(made := example(), tmp_path / "g" / inside, progress=False), made)


def test_a_store_in_the_folder_of_its_checkpoint_is_written(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", weights := example())
    assert_holds(convert(tmp_path, tmp_path / "s.zarr", progress=False), weights)


@pytest.mark.parametrize("name", ["int4", "bits16"])
def test_a_dtype_that_cannot_be_stored_is_named_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zarr, "create_group", None)
    weights = {"a": torch.ones(3), "b": torch.zeros(8, dtype=torch.uint8).view(getattr(torch, name))}
    with pytest.raises(TypeError, match=f"'b' has dtype torch.{name}, which litrt cannot store"):
        convert(weights, tmp_path / "s.zarr", progress=False)
    assert not list(tmp_path.iterdir())


class Interrupted(Lazy):
    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "w2":
            raise KeyboardInterrupt
        return super().__getitem__(name)


def test_an_interrupted_conversion_leaves_the_old_store_as_it_was(tmp_path: Path) -> None:
    convert(old := example(), tmp_path / "s.zarr", progress=False)
    with pytest.raises(KeyboardInterrupt):
        convert(Interrupted(5, 10), tmp_path / "s.zarr", overwrite=True, progress=False)
    assert_holds(open_store(tmp_path / "s.zarr"), old)
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


def test_a_killed_conversion_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    code = f"""
import os, torch, collections
from litrt.checkpoint import open_source
from litrt.convert import convert
class Lazy(collections.UserDict):
    def __getitem__(self, name):
        if name == "c":
            os._exit(9)
        return torch.ones(4)
convert(Lazy(a=0, b=0, c=0, d=0), {str(tmp_path / "s.zarr")!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr.partial"]
    with pytest.raises(
        StoreError, match=r"s\.zarr\.partial is incomplete: 2 of 4 weights are missing\. The conversion"
    ):
        open_store(tmp_path / "s.zarr.partial")
    convert(weights := example(), tmp_path / "s.zarr", progress=False)
    assert_holds(open_store(tmp_path / "s.zarr"), weights)
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"], "the next conversion clears what was left"


def test_a_failed_rename_brings_the_old_store_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(old := example(), tmp_path / "s.zarr", progress=False)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr("litrt.staging.exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        convert({"x": torch.ones(1)}, tmp_path / "s.zarr", overwrite=True, progress=False)
    assert_holds(open_store(tmp_path / "s.zarr"), old)


def test_a_link_to_a_store_stays_a_link(tmp_path: Path) -> None:
    convert(example(), tmp_path / "real.zarr", progress=False)
    (tmp_path / "link.zarr").symlink_to(tmp_path / "real.zarr")
    weights = {"other": torch.ones(3)}
    convert(weights, tmp_path / "link.zarr", overwrite=True, progress=False)
    assert (tmp_path / "link.zarr").is_symlink()
    assert_holds(open_store(tmp_path / "real.zarr"), weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.zarr", "real.zarr"]


def test_a_disk_that_is_too_small_is_found_out_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, free=3_000_000))
    weights = {"w": torch.ones(1_000_000)}
    with pytest.raises(StoreError, match=r"s\.zarr needs 4\.00 MB and the disk has 3\.00 MB free"):
        convert(weights, tmp_path / "s.zarr")
    assert not list(tmp_path.iterdir())
    convert(weights, tmp_path / "s.zarr", dtype="float16", progress=False)


# Memory and progress.

PEAK = """
import re, sys
from collections.abc import Mapping
import torch
from litrt.checkpoint import open_source
from litrt.convert import convert

class Lazy(Mapping):
    def __getitem__(self, name):
        return torch.full((4_000_000,), float(name))
    def __iter__(self):
        return map(str, range(25))
    def __len__(self):
        return 25

def peak_bytes():  # not ru_maxrss, which begins at the peak of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])

source, target = sys.argv[1:]
convert({"w": torch.ones(3)}, target, progress=False)
before = peak_bytes()
convert(Lazy() if source == "lazy" else source, target, overwrite=True, progress=False)
print(peak_bytes() - before)
"""


@pytest.mark.parametrize("kind", ["lazy", "safetensors", "bin"])
def test_memory_is_bounded_by_the_largest_tensor(kind: str, tmp_path: Path) -> None:
    weights = {str(index): torch.full((4_000_000,), float(index)) for index in range(25)}  # 0.4 GB
    source = "lazy"
    if kind != "lazy":
        source = str(tmp_path / f"m.{kind}")
        torch.save(weights, source) if kind == "bin" else write_safetensors(Path(source), weights)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, source, str(tmp_path / "s.zarr")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) < 2 * 16_000_000 + 150_000_000
    assert_holds(open_store(tmp_path / "s.zarr"), weights)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        convert({"w": torch.ones(1_000_000)}, tmp_path / "s.zarr", overwrite=True)
        assert bool(stream.getvalue()) == shown
        if shown:
            assert re.search(r"\rs\.zarr: 4\.00 MB of 4\.00 MB, [\d.]+ [GMk]B/s *\n$", stream.getvalue())
    monkeypatch.setattr(sys, "stderr", quiet := Terminal())
    convert({"w": torch.ones(10)}, tmp_path / "s.zarr", overwrite=True, progress=False)
    assert not quiet.getvalue()


def test_a_file_system_that_does_not_say_how_large_it_is_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    assert list(convert({"w": torch.ones(5)}, tmp_path / "s.zarr", progress=False)) == ["w"]
