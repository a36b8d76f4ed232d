"""Stores made by somebody who means harm, or broken in ways that no disk breaks them: refused, and nothing else."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import resource
import shutil
import struct
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numcodecs
import numpy as np
import pytest
import torch
import zarr
from checkpoints import write_gguf, write_lit, write_zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.core.buffer.cpu import Buffer as CpuBuffer

import litrt
from bench.hostile import (
    Safetensors,
    changed,
    changed_bytes,
    changed_document,
    read_store,
    safetensors_file,
    sealed,
    weights,
    write_foreign,
)
from litrt.arrays import METADATA, node_name
from litrt.checkpoint import open_source
from litrt.convert import convert
from litrt.reader import Reader
from litrt.source import renamed
from litrt.store import open_store
from litrt.verify import verify

MOST_BYTES = 64 << 20
"""No tensor of these stores is anywhere near as large."""


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp())
    convert(weights(), root / "plain.zarr", progress=False)
    convert(weights(), root / "packed.zarr", compress="zstd", progress=False)
    yield root
    shutil.rmtree(root)


def use(root: Path) -> None:
    """Opens a store and reads all of it; a refusal is an answer, any other error is not."""
    with contextlib.suppress(litrt.LitrtError, FileNotFoundError):
        read_store(root)


@pytest.fixture(autouse=True)
def _no_large_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def bounded(*size: Any, **options: Any) -> torch.Tensor:
        made = empty(*size, **{**options, "device": "meta"})
        assert made.nbytes < MOST_BYTES, f"{made.nbytes} bytes asked for"
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", bounded)


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "plain.zarr", tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def rewrite(file: Path, path: tuple[Any, ...], value: Any) -> None:
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, value, "put")))


# Anything.

RANDOM = st.randoms(use_true_random=False)


@contextlib.contextmanager
def rewritten(file: Path, content: bytes) -> Iterator[None]:
    whole = file.read_bytes()
    try:
        file.write_bytes(content)
        yield
    finally:
        file.write_bytes(whole)


@given(RANDOM)
@settings(max_examples=400)
def test_metadata_of_any_kind_is_read_or_refused(made: Path, random: Random) -> None:
    root = made / random.choice(["plain.zarr", "packed.zarr"])
    file = root / random.choice(["", "w", "tied", "scalar", "empty"]) / "zarr.json"
    document = changed_document(random, json.loads(file.read_bytes()))
    with rewritten(file, json.dumps(document).encode()):
        use(root)


@given(RANDOM)
@settings(max_examples=200)
def test_bytes_of_any_kind_are_read_or_refused(made: Path, random: Random) -> None:
    root = made / random.choice(["plain.zarr", "packed.zarr"])
    file = random.choice(sorted(file for file in root.rglob("*") if file.is_file()))
    with rewritten(file, changed_bytes(random, file.read_bytes())):
        use(root)


@given(RANDOM)
@settings(max_examples=300)
def test_a_safetensors_header_of_any_kind_is_read_or_refused(random: Random) -> None:
    text = json.dumps(changed_document(random, Safetensors.HEADER)).encode()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "model.safetensors")
        file.write_bytes(safetensors_file(text, bytes(248)))
        with contextlib.suppress(litrt.LitrtError), open_source(file) as source:
            assert sum(source.fetch(name).nbytes for name in source.names) <= 248


def fetch_or_refuse(path: Path, most_bytes: int) -> None:
    """Opens a checkpoint and reads all of it; a refusal is an answer, any other error is not."""
    try:
        with open_source(path) as source:
            for name in source.names:
                with contextlib.suppress(litrt.LitrtError):
                    tensor = source.fetch(source.aliases.get(name, name))
                    assert tensor.nbytes <= most_bytes
                    if source.sizes is not None:
                        assert source.sizes[source.aliases.get(name, name)] == (tensor.numel(), tensor.dtype)
    except litrt.LitrtError:
        pass


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of other programs."""
    root = tmp_path_factory.mktemp("others")
    made = {"w": torch.randn(20, 3), "n": torch.arange(4.0), "empty": torch.ones(0, 2), "one": torch.tensor(1.0)}
    write_lit(root / "lit", made, "float32")
    for version in (2, 3):
        write_zarr(root / f"v{version}.zarr", {"h/w": made["w"], "n": made["n"]}, version, compressors=None)
    return root


@given(RANDOM)
@settings(max_examples=200)
def test_metadata_of_pytorch_lit_of_any_kind_is_read_or_refused(others: Path, random: Random) -> None:
    file = others / "lit" / random.choice(["meta.json", "model-meta.json"])
    with rewritten(file, json.dumps(changed_document(random, json.loads(file.read_bytes()))).encode()):
        fetch_or_refuse(others / "lit" / "meta.json", 260)


@given(RANDOM)
@settings(max_examples=150)
@pytest.mark.filterwarnings("ignore")
def test_metadata_of_a_group_of_any_kind_is_read_or_refused(others: Path, random: Random) -> None:
    root = others / random.choice(["v2.zarr", "v3.zarr"])
    file = random.choice(sorted(file for file in root.rglob("*") if file.name in METADATA))
    with rewritten(file, json.dumps(changed_document(random, json.loads(file.read_bytes()))).encode()):
        fetch_or_refuse(root, MOST_BYTES)


@given(RANDOM)
@settings(max_examples=150)
def test_a_gguf_file_of_any_kind_is_read_or_refused(random: Random) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "m.gguf")
        write_gguf(file, {"w": torch.ones(20, 3), "half": torch.ones(4, dtype=torch.bfloat16), "one": torch.ones(1)})
        content = changed_bytes(random, file.read_bytes())
        file.write_bytes(content)
        fetch_or_refuse(file, len(content))


# What somebody would think of.


@pytest.mark.parametrize("name", ["..", "../../w", "/etc", "a/../../b", "w\0", "__w", "zarr.json", "C:\\w", "."])
def test_no_name_leads_out_of_a_store(name: str, tmp_path: Path) -> None:
    assert len(Path(node_name(name)).parts) == 1
    (tmp_path / "in").mkdir()
    store = convert({name: torch.ones(3)}, tmp_path / "in" / "s.zarr", progress=False)
    assert torch.equal(Reader(store).read_tensor(name), torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["s.zarr"]


@pytest.mark.parametrize(
    "aliases",
    [{"tie": "tie"}, {"tie": "tied", "tied": "tie"}, {"tie": "none"}, {"tie": ["tied"]}, {"tie": None}, ["tie"]],
)
def test_aliases_that_lead_nowhere_are_refused(aliases: Any, store: Path) -> None:
    rewrite(store / "zarr.json", ("attributes", "litrt", "aliases"), aliases)
    with pytest.raises(litrt.StoreError, match=r"is incomplete|is not a litrt store"):
        open_store(store)


@pytest.mark.parametrize("shape", [[1 << 40], [1 << 31, 1 << 31], [1 << 62, 1 << 62], [700 << 20, 50]])
@pytest.mark.parametrize("is_one_chunk", [True, False])
def test_a_tensor_that_cannot_be_there_is_refused_before_memory_is_taken(
    shape: list[int], is_one_chunk: bool, store: Path
) -> None:
    rewrite(store / "w" / "zarr.json", ("shape",), shape)
    chunks = shape if is_one_chunk else [1000, *shape[1:]]
    rewrite(store / "w" / "zarr.json", ("chunk_grid", "configuration", "chunk_shape"), chunks)
    with pytest.raises(litrt.StoreError, match=r"'w' has|zarr\.json is damaged|attributes of 'w' are damaged"):
        open_store(store)


def test_metadata_without_an_end_is_refused(store: Path) -> None:
    for file in (store / "zarr.json", store / "w" / "zarr.json"):
        whole = file.read_bytes()
        file.write_text("[" * 1_000_000)
        with pytest.raises(litrt.StoreError, match="cannot be read as JSON"):
            open_store(store)
        os.truncate(file, 1 << 40)
        with pytest.raises(litrt.StoreError, match="is not the metadata of a store"):
            open_store(store)
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(litrt.StoreError, match=r"is not the metadata of a store|is not a litrt store"):
            open_store(store)
        file.unlink()
        file.write_bytes(whole)
    use(store)


@pytest.mark.parametrize("kind", ["pipe", "zeros", "loop", "directory"])
def test_a_chunk_that_is_no_file_is_an_error_and_not_waited_for(kind: str, store: Path) -> None:
    chunk = store / "w" / "c" / "0" / "0"
    chunk.unlink()
    if kind == "pipe":
        os.mkfifo(chunk)
    elif kind == "directory":
        chunk.mkdir()
    else:
        chunk.symlink_to("/dev/zero" if kind == "zeros" else chunk)
    reader = Reader(open_store(store))
    with pytest.raises(litrt.CorruptWeightError, match=r"weight 'w': .*/w/c/0/0"):
        reader.read_tensor("w")


def test_a_bomb_of_compressed_zeros_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "packed.zarr", tmp_path / "s.zarr")
    file = tmp_path / "s.zarr" / "w" / "zarr.json"
    rewrite(file, ("shape",), [1 << 30, 50])
    rewrite(file, ("chunk_grid", "configuration", "chunk_shape"), [1 << 30, 50])
    with pytest.raises(litrt.StoreError, match=r"is incomplete: 'w' has 214748364800 bytes and its files \d+"):
        open_store(tmp_path / "s.zarr")


def test_a_store_is_never_code(tmp_path: Path) -> None:
    """What torch's files may have beside tensors is refused, and no function in it is called."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"w": torch.ones(2), "x": Evil()}, tmp_path / "model.pt")
    with pytest.raises(litrt.StoreError, match="cannot load"):
        convert(tmp_path / "model.pt", tmp_path / "s.zarr", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


# Stores that zarr-python reads.

VALUES = torch.arange(18.0).view(6, 3)
FRAME = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00"
"""A Zstandard frame that says it holds a TiB."""


@pytest.fixture(params=["directory", "zip"])
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """Returns a store that zarr-python reads, and what changes a file of it."""
    write_foreign(tmp_path / "f.zarr", {"zstd": VALUES, "gzip": VALUES, "blosc": VALUES, "shards": VALUES})
    path = tmp_path / ("f.zip" if request.param == "zip" else "f.zarr")

    def put(name: str, content: bytes) -> None:
        (tmp_path / "f.zarr" / name).write_bytes(content)
        if request.param == "zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                for file in sorted((tmp_path / "f.zarr").rglob("*")):
                    if file.is_file():
                        archive.write(file, file.relative_to(tmp_path / "f.zarr"))

    put("zarr.json", (tmp_path / "f.zarr" / "zarr.json").read_bytes())
    reader = Reader(open_store(path))
    assert all(torch.equal(reader.read_tensor(name), VALUES) for name in reader.store)
    reader.close()
    return path, put


def refusal(path: Path, name: str) -> str:
    reader = Reader(open_store(path))
    try:
        with pytest.raises(litrt.CorruptWeightError) as caught:
            reader.read_tensor(name)
    finally:
        reader.close()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("zstd", sealed(FRAME + bytes(4)), "says that it holds 1099511627776 bytes, for a chunk of 48"),
        ("gzip", sealed(gzip.compress(bytes(1 << 20)) + bytes(4)), "says that it holds 65585 bytes"),
        ("blosc", sealed(struct.pack("<4BIII", 2, 1, 1, 4, 1 << 31, 64, 20) + bytes(8)), "holds 2147483648 bytes"),
    ],
)
def test_a_chunk_that_asks_for_memory_is_damaged(
    name: str, content: bytes, message: str, foreign: tuple[Path, Any]
) -> None:
    path, put = foreign
    put(f"{name}/c/0/0", content)
    assert message in refusal(path, name)


@pytest.mark.parametrize("name", ["zstd", "shards"])
def test_a_chunk_that_is_too_large_is_not_read(name: str, foreign: tuple[Path, Any]) -> None:
    path, put = foreign
    put(f"{name}/c/0/0", bytes(1 << 20))
    assert "has 1048576 bytes, and may have 65" in refusal(path, name)


def asking(shard: bytes, nbytes: int) -> bytes:
    """Returns a shard whose index gives its first chunk so many bytes."""
    index = bytearray(shard[-(2 * 16 + 4) :])  # of two chunks
    index[8:16] = nbytes.to_bytes(8, "little")
    return shard[: -len(index)] + sealed(bytes(index))


@pytest.mark.parametrize("is_source", [False, True])
def test_a_shard_that_asks_for_memory_is_damaged(is_source: bool, foreign: tuple[Path, Any], tmp_path: Path) -> None:
    path, put = foreign
    shard = (tmp_path / "f.zarr" / "shards" / "c" / "0" / "0").read_bytes()
    if is_source:
        group = json.loads((tmp_path / "f.zarr" / "zarr.json").read_text())
        put("zarr.json", json.dumps({**group, "attributes": {}}).encode())
    for nbytes in (len(shard) + 1, 1 << 40, (1 << 64) - 2):
        put("shards/c/0/0", asking(shard, nbytes))
        if is_source:  # which is read shard by shard
            with (
                open_source(path) as source,
                pytest.raises(litrt.CorruptWeightError, match="'shards' cannot be decoded"),
            ):
                source.fetch("shards")
        else:  # which some versions of zarr-python do as well
            said = f"{nbytes} bytes of shards/c/0/0 are asked for, which has {len(shard)}"
            assert re.search(f"{said}|shards cannot be decoded", refusal(path, "shards"))


def test_metadata_that_is_too_large_is_not_read(foreign: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path, put = foreign
    monkeypatch.setattr("litrt.documents.MOST_BYTES", 10_000)
    put("zstd/zarr.json", b"{" + b" " * 20_000)
    with pytest.raises(litrt.StoreError, match=r"zstd/zarr.json (has 20001 bytes, and may have|is not the metadata)"):
        open_store(path)


@pytest.mark.parametrize("shape", [[1 << 40, 3], [1 << 20, 64], [1 << 23, 1]])
def test_a_foreign_tensor_that_cannot_be_there_is_refused(shape: list[int], foreign: tuple[Path, Any]) -> None:
    path, put = foreign
    file = path.with_suffix(".zarr") / "zstd" / "zarr.json"
    document = changed(json.loads(file.read_text()), ("shape",), shape, "put")
    put("zstd/zarr.json", json.dumps(document).encode())
    with pytest.raises(litrt.StoreError, match=r"is incomplete: 'zstd' has \d+ (bytes|chunks) and|has \d+ chunks"):
        open_store(path)


@pytest.mark.parametrize("codec", ["numcodecs.lzma", "numcodecs.pickle", "numcodecs.zfpy", "none"])
def test_a_codec_that_is_not_known_is_refused(codec: str, foreign: tuple[Path, Any]) -> None:
    path, put = foreign
    file = path.with_suffix(".zarr") / "zstd" / "zarr.json"
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": codec, "configuration": {}}]
    put("zstd/zarr.json", json.dumps(changed(json.loads(file.read_text()), ("codecs",), codecs, "put")).encode())
    with pytest.raises(litrt.StoreError, match=r"the metadata of 'zstd' is damaged|zarr\.json is damaged"):
        open_store(path)


def write_old(path: Path, compressor: Any) -> None:
    """Writes a store of Zarr v2."""
    root = zarr.open_group(path, mode="w", zarr_format=2)
    attributes = {"litrt": {"name": "w", "torch_dtype": "float32"}}
    array = root.create_array(
        "w", shape=(6, 3), dtype="float32", chunks=(6, 3), compressors=compressor, attributes=attributes
    )
    array[...] = VALUES.numpy()
    root.attrs["litrt"] = {"format": 1, "complete": True, "tensors": ["w"], "aliases": {}}


@pytest.mark.parametrize("codec", ["zstd", "blosc", "gzip", "zlib", "bz2", "lz4"])
def test_an_old_store_is_read_within_bounds(codec: str, tmp_path: Path) -> None:
    compressor = numcodecs.get_codec({"id": codec})
    write_old(tmp_path / "old.zarr", compressor)
    reader = Reader(open_store(tmp_path / "old.zarr"))
    assert torch.equal(reader.read_tensor("w"), VALUES)
    (tmp_path / "old.zarr" / "w" / "0.0").write_bytes(compressor.encode(bytes(1 << 17)))
    with pytest.raises(litrt.CorruptWeightError, match=r"says that it holds \d+ bytes, for a chunk of 72"):
        reader.read_tensor("w")
    reader.close()


@pytest.mark.parametrize("place", ["compressor", "filters"])
def test_an_old_store_is_never_code(place: str, tmp_path: Path) -> None:
    write_old(tmp_path / "old.zarr", None)
    file = tmp_path / "old.zarr" / "w" / ".zarray"
    for codec in ("pickle", "lzma"):
        found = {"id": codec}
        rewrite(file, (place,), found if place == "compressor" else [found])
        with pytest.raises(litrt.StoreError, match="the metadata of 'w' is damaged"):
            open_store(tmp_path / "old.zarr")


def test_a_zip_file_that_is_no_whole_one_is_refused(foreign: tuple[Path, Any]) -> None:
    path, put = foreign
    if path.suffix != ".zip":
        pytest.skip("a directory")
    whole = path.read_bytes()
    end = whole.rindex(b"PK\5\6")
    for content in (
        whole[: len(whole) // 2] + whole[end:],
        whole.replace(b"PK\3\4", b"PK\3\5"),
        whole[:end] + b"PK\6\7" + bytes([0, 0, 0, 0, *bytes(8), 9, 0, 0, 0]) + whole[end:],
        whole[:8] + b"\x63" + whole[9:],
    ):
        path.write_bytes(content)
        use(path)
    put("zarr.json", b"null")
    with pytest.raises(litrt.StoreError, match="is not a litrt store"):
        open_store(path)


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """Many entries for the same bytes make a small zip file a large one."""
    file = tmp_path / "bomb.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("zarr.json", bytes(4000))
        archive.filelist = archive.filelist * 50
    with pytest.raises(litrt.StoreError, match="its members have 200000 bytes, and the file 6"):
        open_store(file)


class _Counting(zarr.storage.WrapperStore[Any]):
    """Notes what it is asked for, also when zarr-python uses another of its kind in its place."""

    asked: ClassVar[list[str]] = []

    async def exists(self, key: str) -> bool:
        self.asked.append(key)
        return await super().exists(key)


def test_a_large_remote_tensor_is_asked_for_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = zarr.storage.MemoryStore()
    source = zarr.storage.LocalStore(made / "plain.zarr", read_only=True)
    copied = {str(file.relative_to(source.root)): file for file in source.root.rglob("*") if file.is_file()}
    memory._store_dict.update({key: CpuBuffer.from_bytes(file.read_bytes()) for key, file in copied.items()})
    remote = _Counting(memory)
    remote.asked.clear()
    monkeypatch.setattr("litrt.tensors.LARGE_BYTES", 100_000)
    open_store(remote).close()
    assert remote.asked == ["w/c/0/0"]
    del memory._store_dict["w/c/0/0"]
    with pytest.raises(litrt.StoreError, match="is incomplete: 'w' has 140000 bytes and no w/c/0/0"):
        open_store(remote)


# Links.


@pytest.mark.parametrize("place", ["w/c/0/0", "w/c/0", "w/c", "w", "w/zarr.json", "zarr.json"])
@pytest.mark.parametrize("is_plain", [True, False])
def test_a_link_that_leads_out_of_a_store_is_refused(place: str, is_plain: bool, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / ("plain.zarr" if is_plain else "packed.zarr"), tmp_path / "s.zarr")
    outside = tmp_path / "elsewhere"
    (tmp_path / "s.zarr" / place).rename(outside)
    (tmp_path / "s.zarr" / place).symlink_to(outside)
    with pytest.raises(litrt.LitrtError, match=rf"{place} is a link that leads out of the store"):
        Reader(open_store(tmp_path / "s.zarr")).read_tensor("w")
    if place.startswith("w/c"):
        (error,) = verify(tmp_path / "s.zarr", progress=False)
        assert error.name == "w"
        with pytest.raises(litrt.CorruptWeightError, match="leads out of the store"):
            litrt.export(tmp_path / "s.zarr", tmp_path / "w.safetensors", progress=False)


@pytest.mark.parametrize("place", ["zstd/c/0/0", "zstd/c"])
def test_a_link_out_of_a_foreign_store_is_refused(place: str, tmp_path: Path) -> None:
    write_foreign(tmp_path / "f.zarr", {"zstd": VALUES})
    (tmp_path / "f.zarr" / place).rename(tmp_path / "elsewhere")
    (tmp_path / "f.zarr" / place).symlink_to("../" * (place.count("/") + 1) + "elsewhere")
    with pytest.raises(litrt.StoreError, match=rf"{place} is a link that leads out of the store"):
        open_store(tmp_path / "f.zarr")


@pytest.mark.parametrize("cache", ["models--a--b", "other"])
def test_a_store_in_a_cache_of_the_hub_may_link_to_its_blobs(cache: str, store: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / cache / "snapshots" / "1f2e", tmp_path / cache / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in store.rglob("*") if file.is_file())):
        file.rename(blobs / str(number))
        link = snapshot / "s.zarr" / file.relative_to(store)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    (tmp_path / "link").symlink_to(snapshot / "s.zarr")  # the store itself may be one
    if cache == "other":
        with pytest.raises(litrt.StoreError, match=r"zarr\.json is a link that leads out"):
            open_store(tmp_path / "link")
        return
    assert verify(tmp_path / "link", progress=False) == []
    chunk = snapshot / "s.zarr" / "w" / "c" / "0" / "0"
    chunk.unlink()
    chunk.symlink_to("/etc/hostname")
    with pytest.raises(litrt.CorruptWeightError, match="leads out"):
        Reader(open_store(tmp_path / "link")).read_tensor("w")


def test_links_within_a_store_are_followed(store: Path) -> None:
    (store / "w" / "c").rename(store / "w" / "d")
    (store / "w" / "c").symlink_to("d")
    assert verify(store, progress=False) == []


@pytest.mark.parametrize("is_zip", [False, True])
def test_a_tensor_without_compression_has_its_bytes_also_where_zarr_python_reads_it(
    is_zip: bool, store: Path, tmp_path: Path
) -> None:
    file = store / "w" / "zarr.json"
    rewrite(file, ("codecs", 0), {"name": "bytes", "configuration": {"endian": "big"}})
    rewrite(file, ("attributes", "litrt", "chunks"), None)
    for shape, said in (([1 << 24, 50], r"'w' has 3355443200 bytes and its files \d+"), ([700, 50], "")):
        rewrite(file, ("shape",), shape)
        path = shutil.make_archive(str(tmp_path / "s"), "zip", store) if is_zip else store
        if said:
            with pytest.raises(litrt.StoreError, match=said):
                open_store(path)
        else:
            assert open_store(path)["w"].shape == (700, 50)


# Metadata of many values.


def test_chunks_without_number_are_refused(store: Path) -> None:
    rewrite(store / "half" / "zarr.json", ("attributes", "litrt", "chunks"), None)
    rewrite(store / "half" / "zarr.json", ("shape",), [9 << 20])
    with pytest.raises(litrt.StoreError, match=r"'half' has 18874368 bytes and its files 22"):
        open_store(store)
    with open(store / "half" / "c" / "more", "wb") as more:
        more.truncate(20 << 20)
    with pytest.raises(litrt.StoreError, match=r"'half' has 1048576 chunks and 2 files of 20971542 bytes"):
        open_store(store)


@pytest.mark.parametrize("text", ['["w"%s]' % (',"w"' * (1 << 21)), "[%s]" % ("{}," * (1 << 20) + "{}")])
def test_a_document_of_millions_of_values_is_not_parsed(
    text: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = store / "zarr.json"
    content = json.dumps(changed(json.loads(file.read_text()), ("attributes", "litrt", "tensors"), "@", "put"))
    file.write_text(content.replace('"@"', text))
    monkeypatch.setattr("json.loads", None)
    with pytest.raises(litrt.StoreError, match="it has more than 2097152 values"):
        open_store(store)
    file.write_bytes(safetensors_file(text.encode(), b""))
    with pytest.raises(litrt.StoreError, match="its header is not what the format says"), open_source_at(file):
        pass


@contextlib.contextmanager
def open_source_at(file: Path) -> Iterator[None]:
    renamed = file.rename(file.with_name("model.safetensors"))
    with open_source(renamed):
        yield


def test_names_that_are_there_twice_are_refused(store: Path) -> None:
    rewrite(store / "zarr.json", ("attributes", "litrt", "tensors"), ["w"] * 1000)
    with pytest.raises(litrt.StoreError, match="some of its names are no names of its own"):
        open_store(store)
    rewrite(store / "zarr.json", ("attributes", "litrt", "tensors"), ["w", "tied"])
    with pytest.raises(litrt.StoreError, match="some of its aliases are no names of its own"):
        open_store(store)


@pytest.mark.parametrize(("key", "value"), [("tensors", ["w", "\ud800"]), ("aliases", {"w": "\ud800"})])
def test_names_of_a_store_that_are_no_text_are_refused(key: str, value: Any, store: Path) -> None:
    rewrite(store / "zarr.json", ("attributes", "litrt", key), value)
    with pytest.raises(litrt.StoreError, match="is not a litrt store"):
        open_store(store)
    with pytest.raises(litrt.StoreError, match="is not a litrt store"):
        litrt.verify(store)


def test_weights_that_are_not_there_are_looked_for_in_vain_only_so_often(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"absent.{number}" for number in range(5000)]
    rewrite(store / "zarr.json", ("attributes", "litrt", "tensors"), [*names, "tie", "tied"])
    n_looked = 0

    def read(file: Path, check_link: Any) -> Any:
        nonlocal n_looked
        n_looked += 1
        return json.loads(file.read_text()) if file.is_file() else None

    monkeypatch.setattr("litrt.documents.read", read)
    with pytest.raises(litrt.StoreError, match="at least 1001 of 5002 weights are missing"):
        open_store(store)
    assert n_looked == 1001


def test_zeros_that_are_compressed_are_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ratio is so good that a store of litrt's own is refused."""
    monkeypatch.setattr("litrt.tensors.LARGE_BYTES", 1 << 20)
    store = convert(
        {"w": torch.zeros(12 << 20, dtype=torch.uint8)}, tmp_path / "s.zarr", compress="zstd", progress=False
    )
    assert not Reader(store).read_tensor("w").any()


# Checkpoints.


def fetch_all(path: Path) -> None:
    with open_source(path) as source:
        for name in source.names:
            source.fetch(name)


def refused(path: Path, match: str) -> None:
    with pytest.raises(litrt.LitrtError, match=match):
        fetch_all(path)


def test_a_torch_file_that_is_compressed_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as made,
    ):
        for name in whole.namelist():
            made.writestr(name, whole.read(name))
    refused(tmp_path / "model.pt", r"its members have \d{4} bytes, and the file \d+")


def test_a_legacy_torch_file_that_asks_for_memory_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(60)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "w.pt").read_bytes()
    size, text = whole.replace(b"K<Nt", b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"Nt"), b"X\x03\0\0\0cpu"
    assert size != whole
    assert text in whole
    (tmp_path / "w.pt").write_bytes(size)
    refused(tmp_path / "w.pt", f"its tensors have {4 << 40} bytes, and the file {len(size)}")
    (tmp_path / "w.pt").write_bytes(whole.replace(text, b"X\xff\xff\xff\x7fcpu"))
    # Half of what the string asks for.
    with at_most(1 << 30), pytest.raises(litrt.StoreError) as caught, open_source(tmp_path / "w.pt"):
        pass
    assert not isinstance(caught.value.__cause__, MemoryError)


def test_an_npz_file_with_a_header_that_does_not_end_is_refused(tmp_path: Path) -> None:
    member = b"\x93NUMPY\x02\x00" + (1 << 28).to_bytes(4, "little") + b" " * (1 << 22)
    with zipfile.ZipFile(tmp_path / "model.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("w.npy", member)
    refused(tmp_path / "model.npz", "an array has a header of 268435468 bytes")
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
        archive.writestr("w.npy", b"\x93NUMPY\x01\x00" + (20).to_bytes(2, "little") + b"{'descr': ((((((((((")
    refused(tmp_path / "model.npz", "is not a whole file of numpy.savez")


@pytest.mark.parametrize("file", ["../model.safetensors", "/model.safetensors", "a/../../model.safetensors"])
def test_the_shards_of_a_checkpoint_lie_beside_their_index(file: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Safetensors.make(tmp_path)
    file = str(tmp_path / "model.safetensors") if file.startswith("/") else file
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    refused(tmp_path / "in" / "model.safetensors.index.json", "which is not beside it")


@pytest.mark.parametrize("file", ["", "..", "\0", "x" * 5000])
def test_a_shard_that_is_no_file_is_refused(file: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"w": {"safetensors_file": file}}))
    refused(tmp_path / "index.json", "which is no file")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    refused(tmp_path / "model.safetensors.index.json", "are missing|is not beside it")


def test_a_safetensors_file_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "it is no file at all")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    "name",
    [
        *("model.bin", "model.npz", "model.gguf", "model.safetensors", "model.zip", "model.safetensors.index.json"),
        *("index.json", "meta.json"),
    ],
)
@pytest.mark.parametrize("is_folder", [False, True])
def test_what_is_no_file_is_not_waited_for(name: str, kind: str, is_folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "d" / name
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    refused(path.parent if is_folder else path, "it is no file at all|has no checkpoint")


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "name", ["model.bin", "model.npz", "model.safetensors.index.json", "index.json", "meta.json", "model.gguf"]
)
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_file_of_any_size_is_refused_without_memory_for_it(name: str, is_folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "d" / name
    path.parent.mkdir()
    with open(path, "wb") as file:
        file.truncate(30 << 30)
    with at_most(1 << 30) if not name.endswith("gguf") else contextlib.nullcontext():
        refused(path.parent if is_folder else path, r"has 32212254720 bytes|cannot load|is not a|has no checkpoint")


@contextlib.contextmanager
def at_most(n_bytes: int) -> Iterator[None]:
    """Lets the process take no more memory than this beyond what it has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("is_zip", [True, False])
def test_lists_that_are_in_themselves_many_times_are_no_trouble(is_zip: bool, tmp_path: Path) -> None:
    nested: Any = "x"
    for _ in range(60):
        nested = [nested, nested]
    torch.save({"w": torch.ones(3), "x": nested}, tmp_path / "w.pt", _use_new_zipfile_serialization=is_zip)
    with open_source(tmp_path / "w.pt") as source:
        assert torch.equal(source.fetch("w"), torch.ones(3))
        assert source.unfit == {"x": f"{tmp_path / 'w.pt'}: 'x' is a list, which is no tensor"}


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_tensor_that_is_expanded_to_any_size_is_refused(is_zip: bool, tmp_path: Path) -> None:
    weights = {"w": torch.ones(1, dtype=torch.uint8).expand(2, 1 << 31), "mask": torch.ones(1).expand(1 << 10)}
    torch.save(weights, tmp_path / "w.pt", _use_new_zipfile_serialization=is_zip)
    said = r"'w' of shape \(2, 2147483648\) is expanded to 4294967296 bytes from 1\. Of 2 tensors 1 cannot be stored"
    with pytest.raises(litrt.StoreError, match=said):
        convert(tmp_path / "w.pt", tmp_path / "s.zarr")
    store = convert(tmp_path / "w.pt", tmp_path / "s.zarr", key_map={"w": None}, progress=False)
    assert torch.equal(Reader(store).read_tensor("mask"), torch.ones(1 << 10))


def test_zip_files_of_too_many_members_are_refused_before_they_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litrt.zips.MOST_DIRECTORY_BYTES", 4000)
    torch.save({str(number): torch.ones(1) for number in range(100)}, tmp_path / "m.pt")
    for suffix in ("npz", "zip"):
        with zipfile.ZipFile(tmp_path / f"m.{suffix}", "w") as archive:
            for number in range(100):
                archive.writestr(f"{number}.npy", b"")
    monkeypatch.setattr("zipfile.ZipFile", None)
    for suffix in ("pt", "npz", "zip"):
        refused(tmp_path / f"m.{suffix}", r"the directory of its members has \d+ bytes, and may have 4000")
    with pytest.raises(litrt.StoreError, match=r"may have 4000"):
        open_store(tmp_path / "m.zip")


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_of_too_many_objects_is_refused_before_they_are_made(
    is_zip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {str(number): torch.ones(1) for number in range(100)}
    torch.save(weights, tmp_path / "m.pt", _use_new_zipfile_serialization=is_zip)
    with monkeypatch.context() as patched:
        patched.setattr("litrt.torch_file._MOST_CALLS", 150)
        patched.setattr("torch.load", None)
        refused(tmp_path / "m.pt", r"cannot load .*: it has \d+ objects, and may have 150")
    with monkeypatch.context() as patched:
        patched.setattr("litrt.torch_file._MOST_PICKLE_BYTES", 5000)
        patched.setattr("torch.load", None)
        refused(tmp_path / "m.pt", r"may have 5000|it has more than 5000 bytes beside the values of its tensors")
    fetch_all(tmp_path / "m.pt")


SHAPES = [[1 << 40, 1 << 40, 0], [0, 1 << 62], [1 << 62, 0], [0, 1 << 62, 1 << 62], [0, 1 << 25], [1] * 65]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["safetensors", "offloaded", "npz", "lit", "zarr", "mapping"])
def test_a_shape_that_no_store_has_is_refused_before_anything_is_written(
    kind: str, shape: list[int], tmp_path: Path
) -> None:
    n_bytes = 4 if len(shape) > 10 else 0
    source: Any = tmp_path / "model.safetensors"
    if kind == "safetensors":
        header = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, n_bytes]}}
        source.write_bytes(safetensors_file(json.dumps(header).encode(), bytes(n_bytes)))
    elif kind == "offloaded":
        source = tmp_path / "index.json"
        (tmp_path / "w.dat").write_bytes(bytes(n_bytes))
        source.write_text(json.dumps({"w": {"dtype": "float32", "shape": shape}}))
    elif kind == "npz":
        source = tmp_path / "model.npz"
        with zipfile.ZipFile(source, "w") as archive, archive.open("w.npy", "w") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(n_bytes))
    elif kind == "lit":
        source = tmp_path / "lit"
        write_lit(source, {"w": torch.ones(1)}, "float32")
        rewrite(source / "model-meta.json", ("w",), {"shape": shape, "bound": [0, n_bytes // 4]})
    elif kind == "zarr":
        source = tmp_path / "g.zarr"
        write_zarr(source, {"w": torch.ones(1)})
        rewrite(source / "w" / "zarr.json", ("shape",), shape)
        rewrite(source / "w" / "zarr.json", ("chunk_grid", "configuration", "chunk_shape"), [1] * len(shape))
    elif len(shape) > 10 or shape == [0, 1 << 25]:
        source = {"w": torch.empty(shape)}
    else:
        pytest.skip("no tensor")
    with pytest.raises(
        litrt.StoreError, match=r"'w' has shape \(.*, which no (memory holds|tensor has)|'w' is no tensor"
    ):
        convert(source, tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    half = "\ud800"
    said = r"is called '\\ud800', which is not text"
    with pytest.raises(litrt.StoreError, match=said):
        convert({half: torch.ones(1)}, tmp_path / "s.zarr")
    header = {half: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    (tmp_path / "m.safetensors").write_bytes(safetensors_file(json.dumps(header).encode(), bytes(1)))
    refused(tmp_path / "m.safetensors", said)
    (tmp_path / "index.json").write_text(json.dumps({half: {"dtype": "float32", "shape": [1]}}))
    refused(tmp_path / "index.json", "which no file beside it can have")
    (tmp_path / "m.bin.index.json").write_text(json.dumps({"weight_map": {"w": half}}))
    with pytest.raises(litrt.StoreError, match="1 are missing") as caught:
        fetch_all(tmp_path / "m.bin.index.json")
    assert str(caught.value).isascii()
    with pytest.raises(ValueError, match=r"key_map makes '\\ud800' of 'w', which is not text"):
        convert({"w": torch.ones(1)}, tmp_path / "s.zarr", key_map={"w": half})


def test_names_are_looked_up_at_once(tmp_path: Path) -> None:
    """Of twenty thousand, each in a tuple would take a minute."""
    names = [f"model.layers.{number}.weight" for number in range(20_000)]
    header = {name: {"dtype": "U8", "shape": [1], "data_offsets": [at, at + 1]} for at, name in enumerate(names)}
    file = tmp_path / "m.safetensors"
    file.write_bytes(safetensors_file(json.dumps(header).encode(), bytes(len(names))))
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, file.name)}))
    began_s = time.process_time()
    with open_source(index) as source:
        renamed(source, {name: f"x.{name}" for name in names})
    assert time.process_time() - began_s < 5
