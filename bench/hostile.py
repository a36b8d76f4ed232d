"""What somebody who means harm may give litrt to read: whole inputs of every kind, and changes to them.

A `Target` is one kind of input. Its changes are drawn from a `random.Random`, and the same for the same numbers.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
import torch
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ZstdCodec

from litrt.arrays import array_dtype, dtype_name
from litrt.blockreads import read_run, runs
from litrt.checkpoint import open_source
from litrt.convert import convert
from litrt.crc import CRC_BYTES, extend_crc
from litrt.errors import LitrtError
from litrt.reader import Reader
from litrt.store import open_store
from litrt.verify import verify

JUNK: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 1.5, 2**31, 2**63, 2**64, 10**30, float("nan"), float("inf")),
    *("", "..", "../..", "/etc/passwd", "\0", "a" * 5000, "float32", "uint8", "NaN", "ü", "w", "tied"),
    *([], {}, [[]], [None], [-1], [0], [1] * 50, [2**62, 2**62], [10**12], ["w"], ["w", "w"], {"w": "w"}, {"a": []}),
    *({"name": "bytes"}, {"name": "zstd", "configuration": {}}, [{"name": "crc32c"}], [{"name": "sharding_indexed"}]),
]
"""Values that metadata should not have where it is put."""

_COUNTS = [0, 1, 2, 127, 128, 255, 256, *(2**n + more for n in (15, 16, 24, 31, 32, 40, 63, 64) for more in (-1, 0))]
"""Numbers at which counts and sizes wrap around, or ask for too much."""

_BOMB_BYTES = 192 << 20
"""What a member of a zip file may become when it is inflated; more than a worker may take."""

_JSON_SHARE = 0.8
"""Of the changes to documents, those that leave JSON."""

Place = tuple[Any, ...]
"""Where in a document something is: the keys and numbers that lead to it."""


def places(document: Any, path: Place = ()) -> Iterator[Place]:
    """Yields where in a document there is something."""
    yield path
    items: Any = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document)
    for key, value in items:
        yield from places(value, (*path, key))


def changed(document: Any, path: Place, junk: Any, how: str) -> Any:
    """Returns a document with `junk` at a place: in its stead ("put"), beside it ("add"), or it left out ("drop")."""
    if not path:
        return junk
    made = copy.copy(document)
    if len(path) > 1:
        made[path[0]] = changed(document[path[0]], path[1:], junk, how)
    elif how == "drop":
        del made[path[0]]
    elif how == "add" and isinstance(made, dict):
        made[str(junk)[:20]] = junk
    else:
        made[path[0]] = junk
    return made


def changed_document(random: Random, document: Any) -> Any:
    """Returns a document with one to three changes; a number may also become one that is near, or twice as large."""
    for _ in range(random.randint(1, 3)):
        path = random.choice(list(places(document)))
        found = document
        for key in path:
            found = found[key]
        junk = random.choice(JUNK)
        if type(found) is int and random.random() < 0.5:
            junk = random.choice([found - 1, found + 1, found * 2, found << 20, -found, random.choice(_COUNTS)])
        document = changed(document, path, junk, random.choice(["put", "drop", "add"]))
    return document


def changed_bytes(random: Random, content: bytes) -> bytes:
    """Returns bytes with one to four changes, half of them near the start or the end, where headers are."""
    made = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at = random.choice([random.randrange(64), -random.randrange(1, 64), random.randrange(1 << 30)])
        at %= len(made) or 1
        n_bytes = random.choice([1, 2, 4, 8])
        how = random.randrange(7)
        if how == 0:
            made[at : at + random.randint(0, 8)] = random.randbytes(random.randint(0, 8))
        elif how == 1 and made:
            made[at] ^= 1 << random.randrange(8)
        elif how == 2:
            count = random.choice(_COUNTS) % (1 << 8 * n_bytes)
            made[at : at + n_bytes] = count.to_bytes(n_bytes, random.choice(["little", "big"]))
        elif how == 3:
            del made[at : at + random.choice([1, 8, 512, len(made)])]
        elif how == 4:
            begin = random.randrange(len(made) or 1)
            made[at:at] = made[begin : begin + random.choice([1, 8, 64, 512])]
        elif how == 5:
            made += random.randbytes(random.choice([1, 4, 4096]))
        else:
            made[at : at + 64] = bytes(len(made[at : at + 64]))
    return bytes(made)


def changed_json(random: Random, content: bytes) -> bytes:
    """Returns a document that is changed as one, or as bytes."""
    if random.random() >= _JSON_SHARE:
        return changed_bytes(random, content)
    return json.dumps(changed_document(random, json.loads(content))).encode()


def changed_zip(random: Random, content: bytes) -> bytes:
    """Returns a zip file that is changed itself, or has a member that is, with the checksums and sizes of it."""
    if random.random() < 0.4:
        return changed_bytes(random, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = random.choice(list(members))
    how = random.random()
    if how < 0.9:
        change = changed_json if name.endswith(".json") else changed_bytes
        members[name] = _maybe_sealed(random, change(random, members[name]))
    elif how < 0.93:
        del members[name]
    elif how < 0.97:
        members[random.choice(["..", "../x", "/etc/x", "a/../../x", name + "/", name.upper()])] = members[name]
    is_bomb = random.random() < 0.002
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member, value in members.items():
            kind = zipfile.ZIP_DEFLATED if random.random() < 0.2 else zipfile.ZIP_STORED
            if member == name and is_bomb:
                kind, value = zipfile.ZIP_DEFLATED, value + bytes(_BOMB_BYTES)
            archive.writestr(zipfile.ZipInfo(member), value, kind, 1)
    return out.getvalue()


def _maybe_sealed(random: Random, content: bytes) -> bytes:
    """Returns a chunk, half of the time with the checksum that belongs to it, to try what comes after its check."""
    return sealed(content) if random.random() < 0.5 else content


def sealed(content: bytes) -> bytes:
    """Returns a chunk with the checksum that belongs to it in the place of its last four bytes."""
    values = np.frombuffer(content[:-CRC_BYTES], dtype=np.uint8)
    return values.tobytes() + extend_crc(0, values).to_bytes(CRC_BYTES, "little")


@dataclass(frozen=True)
class Input:
    """Something to read.

    Attributes:
        path: What is opened, in the folder of its target.
        files: Files in that folder that are not what they were, and what they are.
        is_sound: Whether all values that can be read have to be those that there were.
        is_verified: Whether the store is also verified, which takes longer.
    """

    path: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    is_sound: bool = False
    is_verified: bool = False


class Target:
    """One kind of input.

    Attributes:
        name: What it is called.
        folder: Where its whole inputs are, made by `make`.
        files: The contents of all files in it.
        paths: What of these is opened.
    """

    name: ClassVar[str]
    paths: ClassVar[Sequence[str]]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {
            str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
        }

    @classmethod
    def make(cls, folder: Path) -> None:
        """Writes whole inputs to an empty folder."""
        raise NotImplementedError

    def change(self, random: Random) -> Input:
        """Returns an input that differs from a whole one."""
        raise NotImplementedError

    def read(self, given: Input) -> dict[str, int | None]:
        """Reads all of an input that was put, and returns a checksum of each tensor, or None where it is damaged.

        Raises:
            LitrtError: If it is refused.
        """
        raise NotImplementedError

    def put(self, files: Mapping[str, bytes]) -> None:
        """Writes files to the folder; what has one of them mapped keeps what it has."""
        for name, content in files.items():
            file = self.folder / name
            file.unlink(missing_ok=True)
            file.write_bytes(content)

    def restore(self, given: Input) -> None:
        """Puts back what an input has changed."""
        self.put({name: self.files[name] for name in given.files})


def weights() -> dict[str, torch.Tensor]:
    """Returns what the stores and checkpoints hold: small tensors of several kinds, two of them the same one."""
    generator = torch.Generator().manual_seed(0)
    tied = torch.arange(60.0).view(20, 3)
    return {
        "w": torch.randn(700, 50, generator=generator),
        "tied": tied,
        "tie": tied,
        "scalar": torch.tensor(1),
        "empty": torch.empty(0, 3),
        "half": torch.ones(9, dtype=torch.bfloat16),
    }


def read_store(path: Path) -> dict[str, int | None]:
    """Opens a store and reads all of it, the first row of each table by itself as well."""
    store = open_store(path)
    repr(store)
    if store.total_bytes < 0:
        raise AssertionError(f"{store} has {store.total_bytes} bytes")
    reader = Reader(store)
    try:
        return {name: _read_tensor(reader, name) for name in store}
    finally:
        reader.close()


def _read_tensor(reader: Reader, name: str) -> int | None:
    try:
        values = reader.read_tensor(name).reshape(-1).view(torch.uint8).numpy()
        info = reader.store[name]
        if info.blocks is not None:
            starts, stops = info.blocks.covering(np.array([0]), np.array([1]))
            for run in runs(reader, name, zip(starts.tolist(), stops.tolist(), strict=True)):
                read_run(reader, run, np.empty(run.nbytes, dtype=np.uint8))
        return zlib.crc32(values.data)
    except LitrtError:
        return None


class _Stores(Target):
    paths: ClassVar[Sequence[str]] = (
        "small.zarr",
        "plain.zarr",
        "packed.zarr",
    )  # of few arrays each, as all are read for each input

    @classmethod
    def make(cls, folder: Path) -> None:
        large = {name: weights()[name] for name in ("w", "tied", "tie")}
        small = {name: weights()[name] for name in ("scalar", "empty", "half")}
        convert(small, folder / "small.zarr", progress=False)
        convert(large, folder / "plain.zarr", progress=False)
        convert({"w": large["w"]}, folder / "packed.zarr", compress="zstd", progress=False)

    def read(self, given: Input) -> dict[str, int | None]:
        return read_store(self.folder / given.path)


class Metadata(_Stores):
    """The zarr.json files of stores in a directory."""

    name = "metadata"

    def change(self, random: Random) -> Input:
        path = random.choice(self.paths)
        name = random.choice([name for name in self.files if name.startswith(path) and name.endswith("zarr.json")])
        return Input(path, {name: changed_json(random, self.files[name])})


class Chunks(_Stores):
    """The chunks of stores in a directory: where the checksum is not made to fit, no other value may be read."""

    name = "chunks"

    def change(self, random: Random) -> Input:
        path = random.choice(self.paths)
        name = random.choice([name for name in self.files if name.startswith(path) and not name.endswith("zarr.json")])
        content = changed_bytes(random, self.files[name])
        is_sound, is_verified = random.random() < 0.5, random.random() < 0.1
        return Input(path, {name: content if is_sound else sealed(content)}, is_sound, is_verified)

    def read(self, given: Input) -> dict[str, int | None]:
        found = super().read(given)
        if given.is_verified:
            damaged = {error.name for error in verify(self.folder / given.path, progress=False)}
            unread = {name for name, crc in found.items() if crc is None}
            # The checksums of blocks are in the metadata, and no chunk can be made to fit those.
            if damaged < unread or (given.is_sound and damaged != unread):
                raise AssertionError(f"verify says that {damaged} are damaged, and {unread} cannot be read")
        return found


class Foreign(_Stores):
    """Stores in a directory that are read through zarr-python: other codecs, shards, chunks along two axes."""

    name = "foreign"
    paths = ("some.zarr", "more.zarr")

    @classmethod
    def make(cls, folder: Path) -> None:
        values = torch.arange(18.0).view(6, 3)
        write_foreign(folder / "some.zarr", {"zstd": values, "shards": values})
        write_foreign(folder / "more.zarr", {"gzip": values, "blosc": values})
        for chunk in (folder / "more.zarr" / "gzip" / "c").rglob("*"):
            if chunk.is_file():
                content = chunk.read_bytes()
                chunk.write_bytes(sealed(content[:4] + bytes(4) + content[8:]))  # without the time

    def change(self, random: Random) -> Input:
        name = random.choice(list(self.files))
        path = name.partition("/")[0]
        if name.endswith("zarr.json"):
            return Input(path, {name: changed_json(random, self.files[name])})
        return Input(path, {name: _maybe_sealed(random, changed_bytes(random, self.files[name]))})


def write_foreign(path: Path | zarr.storage.ZipStore, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a store with zarr-python; the name of a tensor says how it is encoded."""
    compressors: dict[str, list[Any]] = {
        "zstd": [ZstdCodec()],
        "gzip": [GzipCodec()],
        "blosc": [BloscCodec(cname="lz4", typesize=4)],
        "plain": [],
    }
    options: dict[str, Any]
    root = zarr.open_group(path, mode="w", zarr_format=3)
    for name, values in tensors.items():
        if name == "shards":
            chunks, options = (3, 3), {"shards": (6, 3), "compressors": None}
        else:
            chunks, options = (6, 2), {"compressors": [*compressors[name], Crc32cCodec()]}
        array: Any = root.create_array(
            name,
            shape=tuple(values.shape),
            dtype=array_dtype(values.dtype),
            chunks=chunks,
            serializer=BytesCodec(endian="little"),
            attributes={"litrt": {"name": name, "torch_dtype": dtype_name(values.dtype)}},
            config={"write_empty_chunks": True},
            **options,
        )
        array[...] = values.numpy()
    root.attrs["litrt"] = {"format": 1, "complete": True, "tensors": list(tensors), "aliases": {}}


class Zips(_Stores):
    """Stores in a zip file, with members that are stored or deflated."""

    name = "zip"
    paths = ("store.zip",)

    @classmethod
    def make(cls, folder: Path) -> None:
        with contextlib.closing(zarr.storage.ZipStore(folder / "store.zip", mode="w")) as target:
            values = torch.arange(18.0).view(6, 3)
            with _no_duplicate_warning():
                write_foreign(target, {"plain": values, "zstd": values})
        with zipfile.ZipFile(folder / "store.zip") as archive:
            members = {name: archive.read(name) for name in sorted(archive.namelist())}
        with zipfile.ZipFile(folder / "store.zip", "w") as archive:
            for name, content in members.items():
                archive.writestr(zipfile.ZipInfo(name), content)

    def change(self, random: Random) -> Input:
        return Input(self.paths[0], {self.paths[0]: changed_zip(random, self.files[self.paths[0]])})


@contextlib.contextmanager
def _no_duplicate_warning() -> Iterator[None]:
    """Hides that zarr-python writes the metadata of a group once more when its attributes change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate name", UserWarning)
        yield


class _Checkpoint(Target):
    def read(self, given: Input) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        with open_source(self.folder / given.path) as source:
            for name in source.names:
                if name in source.aliases:
                    continue
                try:
                    tensor = source.fetch(name)
                except LitrtError:
                    found[name] = None
                else:
                    if source.sizes is not None and source.sizes[name] != (tensor.numel(), tensor.dtype):
                        raise AssertionError(f"{name!r} is {tensor.shape} and was said to be {source.sizes[name]}")
                    found[name] = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                    source.release(tensor)
        return found

    def change(self, random: Random) -> Input:
        path = random.choice(self.paths)
        return Input(path, {path: self._changed(random, self.files[path])})

    def _changed(self, random: Random, content: bytes) -> bytes:
        return changed_zip(random, content)


def _without_ties() -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights().items() if name not in ("tie", "w")}


def safetensors_file(header: bytes, values: bytes) -> bytes:
    """Returns the bytes of a safetensors file."""
    return len(header).to_bytes(8, "little") + header + values


class Safetensors(_Checkpoint):
    """Safetensors files."""

    name = "safetensors"
    paths = ("model.safetensors",)
    HEADER: ClassVar[dict[str, Any]] = {
        "w": {"dtype": "F32", "shape": [20, 3], "data_offsets": [0, 240]},
        "half": {"dtype": "BF16", "shape": [4], "data_offsets": [240, 248]},
        "empty": {"dtype": "I64", "shape": [0, 2], "data_offsets": [248, 248]},
    }

    @classmethod
    def make(cls, folder: Path) -> None:
        (folder / cls.paths[0]).write_bytes(safetensors_file(json.dumps(cls.HEADER).encode(), bytes(248)))

    def _changed(self, random: Random, content: bytes) -> bytes:
        if random.random() >= _JSON_SHARE:
            return changed_bytes(random, content)
        return safetensors_file(json.dumps(changed_document(random, self.HEADER)).encode(), bytes(248))


class Torch(_Checkpoint):
    """Files of torch.save, as they are and as they were before torch 1.6."""

    name = "torch"
    paths = ("model.pt", "legacy.pt")

    @classmethod
    def make(cls, folder: Path) -> None:
        torch.save(_without_ties(), folder / "model.pt")
        legacy = io.BytesIO()
        values = torch.arange(60.0)  # of one memory, whose address is its name in the file
        torch.save({"a": values, "b": values[6:]}, legacy, _use_new_zipfile_serialization=False)
        (folder / "legacy.pt").write_bytes(re.sub(rb"\d{10,}", lambda found: b"7" * len(found[0]), legacy.getvalue()))

    def _changed(self, random: Random, content: bytes) -> bytes:
        return (changed_zip if zipfile.is_zipfile(io.BytesIO(content)) else changed_bytes)(random, content)


class Npz(_Checkpoint):
    """Files of numpy.savez."""

    name = "npz"
    paths = ("model.npz", "packed.npz")

    @classmethod
    def make(cls, folder: Path) -> None:
        arrays: dict[str, Any] = {name: value.float().numpy() for name, value in _without_ties().items()}
        np.savez(folder / cls.paths[0], **arrays)
        np.savez_compressed(folder / cls.paths[1], **arrays)


class Offload(_Checkpoint):
    """Folders that Accelerate offloads to: the index, and the files beside it."""

    name = "offload"
    paths = ("index.json",)

    @classmethod
    def make(cls, folder: Path) -> None:
        index: dict[str, Any] = {"s": {"safetensors_file": "model.safetensors", "weight_name": "w", "dtype": "float32"}}
        for name, value in _without_ties().items():
            if value.numel():
                index[name] = {"dtype": dtype_name(value.dtype), "shape": list(value.shape)}
                (folder / f"{name}.dat").write_bytes(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        Safetensors.make(folder)
        (folder / "index.json").write_text(json.dumps(index))

    def change(self, random: Random) -> Input:
        name = "index.json" if random.random() < _JSON_SHARE else random.choice(list(self.files))
        change = changed_json if name == "index.json" else changed_bytes
        return Input("index.json", {name: change(random, self.files[name])})


class Shards(_Checkpoint):
    """Sharded checkpoints: the index."""

    name = "shards"
    paths = ("model.safetensors.index.json",)

    @classmethod
    def make(cls, folder: Path) -> None:
        Safetensors.make(folder)
        index = {"weight_map": dict.fromkeys(Safetensors.HEADER, Safetensors.paths[0])}
        (folder / cls.paths[0]).write_text(json.dumps(index))

    def _changed(self, random: Random, content: bytes) -> bytes:
        return changed_json(random, content)


TARGETS: dict[str, type[Target]] = {
    target.name: target for target in (Metadata, Chunks, Foreign, Zips, Safetensors, Torch, Npz, Offload, Shards)
}
"""All of them, by name."""
