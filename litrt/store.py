"""The store on disk: what is in it, and where. How a tensor is an array is `litrt.arrays`, reading the bytes
`litrt.reader`; `docs/format.md` specifies all of it.

A store is a Zarr v3 group with one array per distinct tensor. A local directory is opened by reading its
zarr.json files as JSON, which takes milliseconds; everything else is opened through zarr-python.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import math
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import zarr
from zarr.abc.store import Store as ZarrStore
from zarr.core.sync import sync
from zarr.storage import LocalStore, StorePath, ZipStore

from litrt import documents
from litrt.arrays import (
    METADATA,
    array_dtype,
    chunk_files,
    lead_axis,
    litrt_attributes,
    node_name,
    size_of_chunks,
    torch_dtype,
)
from litrt.blocks import Blocks, Sums, blocks_of, sums_of_chunks
from litrt.bounded import bounded
from litrt.checked import CheckedStore
from litrt.errors import StoreError, WeightNotFoundError
from litrt.links import link_out
from litrt.zips import is_zip, member_sizes

FORMAT = 1
"""The version of the format that is written, and the newest that can be read."""

LARGE_BYTES = 64 << 20
"""From this size on, a tensor is looked for before it is believed in."""

_MANY_CHUNKS = 1 << 10
"""Of more chunks than these as well, as each of them takes memory to know of."""

_MOST_CHUNKS = 1 << 17
"""Chunks that a tensor may have: of 8 MiB, as litrt makes the smaller ones, it has a TiB."""

_MOST_MISSING = 1000
"""Weights that are looked for in vain before the others are not looked for."""

MOST_RATIO = 1 << 15
"""Bytes that no codec makes of one: Zstandard has blocks of 128 KiB, which take 4 bytes at least."""

_INDEX_BYTES = 64
"""What an inner chunk may take of a shard beside twice its values: its place in the index, and what its codecs add."""

_SLACK_BYTES = 64 << 10
"""What a chunk may take beside twice its values when it is stored."""

_CLOSE_S = 1.0


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a store.

    The rows of a tensor run along its lead axis: the first axis whose extent is not 1.

    Attributes:
        name: Its name in the model.
        shape: Its shape.
        dtype: Its dtype in torch, which may differ from that of the array: see `litrt.arrays`.
        nbytes: Bytes of its values.
        path: Path of its array in the group.
        chunk_rows: Rows along the lead axis that one chunk holds.
        direct: Whether a chunk is a file whose bytes are the values of those rows, followed by their crc32c.
        chunk_bytes: Decoded bytes of one chunk, padding included.
        blocks: Parts of its chunks that can be read and checked alone, where the store has checksums of them.
        packed: Whether a chunk is a file that is one Blosc buffer, followed by its crc32c.
        sums: CRC-32C of the values of its chunks, without padding, where the store has them apart from the chunks.
        n_chunks: How many chunks it has.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    path: str
    chunk_rows: int
    direct: bool
    chunk_bytes: int = 0
    packed: bool = False
    blocks: Blocks | None = field(default=None, repr=False, compare=False)
    sums: Sums | None = field(default=None, repr=False, compare=False)
    n_chunks: int = field(default=0, repr=False, compare=False)

    @property
    def is_padded(self) -> bool:
        """Whether the last chunk holds more rows than the tensor has left for it."""
        return self.chunk_bytes > 0 and self.nbytes % self.chunk_bytes > 0

    @classmethod
    def of_bytes(cls, name: str, nbytes: int) -> TensorInfo:
        """Returns the entry of bytes that no store has."""
        return cls(name, (nbytes,), torch.uint8, nbytes, "", 1, direct=False)

    def served(self, offset: int, nbytes: int, dtype: torch.dtype) -> slice:
        """Returns where bytes of the stored values lie when the tensor is served in `dtype`."""
        start = offset // self.dtype.itemsize * dtype.itemsize
        return slice(start, start + nbytes // self.dtype.itemsize * dtype.itemsize)

    @property
    def n_elements(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def readable(self) -> Blocks:
        """What of the stored bytes can be read and checked alone: blocks, or else chunks. It has elements."""
        if self.blocks is not None:
            return self.blocks
        n_rows = self.shape[lead_axis(self.shape)] if self.shape else 1
        return Blocks(n_rows, self.nbytes // n_rows, self.chunk_rows, self.chunk_rows)

    def cast(self, dtype: torch.dtype) -> TensorInfo:
        """Returns what the tensor is when served in `dtype`: the same, unless it is floating."""
        if not self.dtype.is_floating_point or dtype == self.dtype:
            return self
        nbytes = math.prod(self.shape) * dtype.itemsize
        return replace(self, dtype=dtype, nbytes=nbytes)


class Store(Mapping[str, TensorInfo]):
    """The tensors of a complete store, by name. Made by `open_store`; any thread may use it.

    Iterates over all names, aliases included, in the order they were written in. `store[alias]` is the entry
    of the tensor that the alias stands for.

    Attributes:
        path: Where it is, as it was given.
        aliases: Names that share the values of another name, and that other name.
        total_bytes: Bytes of the distinct tensors.
        root: Absolute path of the directory, or None if it is not a directory that litrt reads itself.
        is_local: Whether there is such a directory.
        compression: What `convert` measured and decided where it was told to compress, as `docs/format.md` has it.
    """

    def __init__(
        self,
        path: str,
        names: Iterable[str],
        infos: dict[str, TensorInfo],
        aliases: dict[str, str],
        *,
        root: str | None,
        open_group: Callable[[], zarr.Group],
        compression: dict[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.compression = compression
        self.aliases = aliases
        self.total_bytes = sum(info.nbytes for info in infos.values())
        self.root = root
        self.is_local = root is not None
        self._by_name = {name: infos[aliases.get(name, name)] for name in names}
        self._open_group = open_group
        self._group: zarr.Group | None = None
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> TensorInfo:
        found = self._by_name.get(name)
        return found if found is not None else self._by_name[self._known(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __repr__(self) -> str:
        return f"Store({self.path!r}, {len(self)} tensors, {self.total_bytes} bytes)"

    def resolve(self, name: str) -> str:
        """Returns the name that the values of `name` are stored under.

        Raises:
            WeightNotFoundError: If the store has no such name.
        """
        return self._by_name[self._known(name)].name

    @property
    def group(self) -> zarr.Group:
        """The Zarr group, opened when first asked for. Reads of missing chunks raise `MissingChunkError`."""
        with self._lock:
            if self._group is None:
                self._group = self._open_group()
            return self._group

    def close(self) -> None:
        """Closes the Zarr group, if it was opened; the store can still be used, which opens it again."""
        if not self._lock.acquire(timeout=_CLOSE_S):
            return  # a thread waits for the answer of a remote store, which is not open yet
        try:
            group, self._group = self._group, None
            if group is not None:
                group.store.close()
        finally:
            self._lock.release()

    def _known(self, name: str) -> str:
        if name in self._by_name:
            return name
        close = difflib.get_close_matches(str(name), self._by_name, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it has {len(self)} other names."
        raise WeightNotFoundError(f"{self.path} has no weight {name!r}: {hint}", name=name)


def open_store(path: str | os.PathLike[str] | ZarrStore | StorePath) -> Store:
    """Opens a store that `litrt.convert` wrote, or a copy of one.

    Args:
        path: A directory, a zip file of one, a URL that zarr-python can open, or an open Zarr store.

    Raises:
        StoreError: If there is no store, if it is incomplete, or if its format is newer than this version
            reads.
    """
    label = str(path) if isinstance(path, ZarrStore | StorePath) else os.fspath(path)
    local = None if isinstance(path, ZarrStore | StorePath) or "://" in label else Path(label)
    if local is not None and not local.exists():
        raise StoreError(f"{label} does not exist: make a store with litrt convert CHECKPOINT {label}.")
    if local is not None and local.is_dir() and (local / "zarr.json").is_file():
        return _open_local(label, local.absolute())
    if local is not None and not is_zip(local) and not (local / ".zgroup").is_file():
        raise _not_a_store(label)
    if local is not None and local.suffix in {".bin", ".pt", ".pth", ".ckpt"}:
        raise _not_a_store(label)  # torch's checkpoints are zip files too
    return _open_zarr(label, path)


def _not_a_store(label: str) -> StoreError:
    return StoreError(f"{label} is not a litrt store: make one with litrt convert {label} NEW.zarr.")


def _open_local(label: str, root: Path) -> Store:
    looked_at: set[str] = set()

    def check_inside(file: str) -> None:
        link = link_out(str(root), file, looked_at)
        if link is not None:
            raise StoreError(f"{link} is a link that leads out of the store: copy what it leads to in its place.")

    document = read_json(root / "zarr.json", check_inside)
    with os.scandir(root) as entries:
        links = {entry.name for entry in entries if entry.is_symlink()}
    if document is None:
        raise _not_a_store(label)

    limits: dict[str, int] = {}

    def open_group() -> zarr.Group:
        return _open_group(CheckedStore(LocalStore(root, read_only=True), owned=True, limits=limits))

    group: list[zarr.Group] = []  # opened for the first array that litrt does not read itself

    def info(name: str) -> TensorInfo | None:
        node = node_name(name)
        if node in links:
            check_inside(os.path.join(root, node))
        array = read_json(root / node / "zarr.json", check_inside)
        if array is None:
            return None
        found = _direct_info(name, node, array)
        if found is None:
            with _refusing(f"{root / node / 'zarr.json'}"):
                for parent, folders, files in os.walk(root / node):
                    for inner in (*folders, *files):
                        check_inside(os.path.join(parent, inner))
                if not group:
                    group.append(open_group())
                found = _array_info(label, name, group[0][node], limits)
        if found.nbytes > LARGE_BYTES or found.n_chunks > _MANY_CHUNKS:
            _check_is_there(label, found, *size_of_chunks(root / found.path), found.direct)
        return found

    return _make_store(label, document.get("attributes", {}), info, open_group, root=str(root))


def _open_zarr(label: str, path: str | os.PathLike[str] | ZarrStore | StorePath) -> Store:
    limits: dict[str, int] = {}
    is_path = not isinstance(path, ZarrStore | StorePath) and "://" not in label
    with _refusing(label):
        sizes = member_sizes(label) if is_path and not os.path.isdir(label) else None

    def open_group() -> zarr.Group:
        if isinstance(path, ZarrStore):
            return _open_group(CheckedStore(path, limits=limits))
        if isinstance(path, StorePath):
            return _open_group(CheckedStore(path.store, limits=limits), path.path)
        if "://" in label:
            plain = zarr.open_group(label, mode="r")
            return _open_group(CheckedStore(plain.store, owned=True, limits=limits), plain.path)
        if sizes is None:
            return _open_group(CheckedStore(LocalStore(label, read_only=True), owned=True, limits=limits))
        return _open_group(CheckedStore(ZipStore(label, mode="r"), owned=True, limits=limits, sizes=sizes))

    try:
        group = open_group()
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and not is_path:
            raise  # of the network
        raise _not_a_store(label) from error
    try:
        missing: list[str] = []

        def fetch(name: str) -> TensorInfo | None:
            if len(missing) >= _MOST_MISSING:
                return None
            with _refusing(f"the metadata of {name!r}", is_file=is_path):
                array = group.get(node_name(name))
                if array is None:
                    missing.append(name)
                    return None
                info = _array_info(label, name, array, limits)
                if info.nbytes > LARGE_BYTES or info.n_chunks > _MANY_CHUNKS:
                    _check_array(label, info, group[info.path], sizes)
                return info

        # One request per array, and one more for a large one: together, because a remote store takes long to answer.
        told = litrt_attributes(group.attrs.asdict()).get("tensors")
        aliases = litrt_attributes(group.attrs.asdict()).get("aliases")
        others = aliases if isinstance(aliases, dict) else {}
        names = told if isinstance(told, list) and _are_strings(told) else []
        listed = [name for name in dict.fromkeys(names) if name not in others]
        with ThreadPoolExecutor(16) as pool:
            infos = dict(zip(listed, pool.map(fetch, listed), strict=True))
        return _make_store(label, group.attrs.asdict(), infos.get, open_group, root=None)
    finally:
        group.store.close()


def _open_group(store: CheckedStore, path: str = "") -> zarr.Group:
    try:
        return zarr.open_group(store, path=path, mode="r")
    except BaseException:
        store.close()
        raise


def _make_store(
    label: str,
    attributes: object,
    find: Callable[[str], TensorInfo | None],
    open_group: Callable[[], zarr.Group],
    *,
    root: str | None,
) -> Store:
    header = litrt_attributes(attributes)
    version, aliases = header.get("format"), header.get("aliases", {})
    names: Any = header.get("tensors")
    if isinstance(version, int) and version > FORMAT:
        raise StoreError(f"{label} has format {version} and this version of litrt reads up to {FORMAT}: upgrade litrt.")
    if type(version) is not int or version != FORMAT or not _are_strings(names):
        raise _not_a_store(label)
    if not isinstance(aliases, dict) or not _are_strings([*aliases.values()]):
        raise _not_a_store(label)
    known = set(names)
    if len(known) < len(names) or not aliases.keys() <= known:
        what = "names" if len(known) < len(names) else "aliases"
        raise StoreError(f"{label} is damaged: some of its {what} are no names of its own. Run litrt convert again.")
    infos: dict[str, TensorInfo] = {}
    n_missing = 0
    for name in names:
        if name not in aliases and n_missing < _MOST_MISSING:
            info = find(name)
            if info is None:
                n_missing += 1
            else:
                infos[name] = info
    for info in infos.values():
        if info.n_chunks > _MOST_CHUNKS:
            raise StoreError(f"{label}: {info.name!r} has {info.n_chunks} chunks, and may have {_MOST_CHUNKS}.")
    n_missing += sum(target not in infos for target in aliases.values())
    if n_missing or header.get("complete") is not True:
        more = "at least " * (n_missing >= _MOST_MISSING)
        shortfall = f"{more}{n_missing} of {len(names)} weights are missing" if n_missing else "it was not finished"
        raise StoreError(
            f"{label} is incomplete: {shortfall}. The conversion was interrupted: run litrt convert again."
            if header.get("complete") is not True
            else f"{label} is incomplete: {shortfall}. Files were deleted or a copy was interrupted: "
            "copy the store again, or run litrt convert again."
        )
    compression = header.get("compression")
    return Store(
        label,
        names,
        infos,
        dict(aliases),
        root=root,
        open_group=open_group,
        compression=compression if isinstance(compression, dict) else None,
    )


def _are_strings(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


@contextlib.contextmanager
def _refusing(what: str, *, is_file: bool = True) -> Iterator[None]:
    """Makes a StoreError of whatever zarr-python raises for metadata that it cannot make sense of."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not is_file:
            raise  # of the network
        reason = str(error) or type(error).__name__
        raise StoreError(f"{what} is damaged: {reason[:200]}. Run litrt convert again.") from error


_JSON_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # which does not wait for who writes a pipe


def read_json(file: Path, check_link: Callable[[str], None] = lambda file: None) -> dict[str, Any] | None:
    """Returns the object that a file of metadata has, or None where there is no file, or no object in it.

    Raises:
        StoreError: If it is no JSON, or larger than metadata is; or what `check_link` raises for a link.
    """
    try:
        fd = os.open(file, _JSON_FLAGS | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        check_link(str(file))
        try:
            fd = os.open(file, _JSON_FLAGS)
        except OSError:
            return None
    with open(fd, "rb") as opened:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > documents.MOST_BYTES:
            raise StoreError(f"{file} is not the metadata of a store: it has {status.st_size} bytes.")
        content = opened.read()
    try:
        document = documents.parse(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file} cannot be read as JSON: {error}. Run litrt convert again.") from error
    return document if isinstance(document, dict) else None


def _check_is_there(label: str, info: TensorInfo, n_files: int, n_bytes: int, is_plain: bool) -> None:
    """Raises an error where a large tensor cannot be there: memory for it may be taken before its chunks are read."""
    if n_bytes < info.nbytes // (2 if is_plain else MOST_RATIO):
        shortfall = f"has {info.nbytes} bytes and its files {n_bytes}"
    elif (n_files if is_plain or info.packed else n_bytes) < info.n_chunks // 2:
        shortfall = f"has {info.n_chunks} chunks and {n_files} files of {n_bytes} bytes"
    else:
        return
    raise StoreError(
        f"{label} is incomplete: {info.name!r} {shortfall}. Files were deleted or a copy was interrupted: copy the "
        "store again, or run litrt convert again."
    )


def _check_array(label: str, info: TensorInfo, array: Any, sizes: Mapping[str, int] | None) -> None:
    """Raises an error where a large tensor cannot be there: by the sizes, or else because its last chunk is not."""
    if sizes is not None:
        of_array = (item for item in sizes.items() if item[0].startswith(f"{info.path}/"))
        found = [size for key, size in of_array if key.rpartition("/")[2] not in METADATA]
        files = chunk_files(array.metadata.to_dict())
        _check_is_there(label, info, len(found), sum(found), files is not None and not files.packed)
        return
    last = tuple((extent - 1) // step for extent, step in zip(array.shape, array.shards or array.chunks, strict=True))
    key = f"{array.path}/{array.metadata.encode_chunk_key(last)}"
    if not sync(array.store.exists(key)):
        raise StoreError(
            f"{label} is incomplete: {info.name!r} has {info.nbytes} bytes and no {key}. Files were deleted or a copy "
            "was interrupted: copy the store again, or run litrt convert again."
        )


def _direct_info(name: str, node: str, metadata: dict[str, Any]) -> TensorInfo | None:
    """Returns the entry of an array whose chunk files litrt reads itself, or None for any other."""
    found = chunk_files(metadata)
    if found is None:
        return None
    axis = lead_axis(found.shape)
    nbytes = math.prod(found.shape) * found.dtype.itemsize
    if math.prod(found.chunks) * found.dtype.itemsize > max(2 * nbytes, LARGE_BYTES):
        return None  # scratch is as large as a chunk
    chunk_rows = found.chunks[axis] if found.chunks else 1
    told = litrt_attributes(metadata.get("attributes", {}))
    n_rows = found.shape[axis] if found.shape else 1
    with _refusing(f"what the metadata of {name!r} says of its checksums"):
        blocks = blocks_of(told, n_rows, nbytes // n_rows, chunk_rows) if nbytes else None
        sums = sums_of_chunks(told, n_rows, chunk_rows) if nbytes else None
    return TensorInfo(
        name,
        found.shape,
        found.dtype,
        nbytes,
        node,
        chunk_rows,
        direct=not found.packed,
        chunk_bytes=math.prod(found.chunks) * found.dtype.itemsize,
        packed=found.packed,
        blocks=blocks,
        sums=sums,
        n_chunks=-(-n_rows // chunk_rows),
    )


def _array_info(label: str, name: str, array: object, limits: dict[str, int]) -> TensorInfo:
    """Returns the entry of an array that has to be read through zarr-python, and notes how large its chunks may be."""
    if not isinstance(array, zarr.Array):
        raise StoreError(f"{label}: {name!r} is a group, not an array: run litrt convert again.")
    bounded(array)  # or its codecs are refused
    dtype = torch_dtype(array.attrs.asdict(), array.dtype.name)
    if dtype is None or array_dtype(dtype) != array.dtype.name:
        raise StoreError(
            f"{label}: {name!r} is stored as {array.dtype.name}, which is no form of a torch dtype that "
            "litrt knows: upgrade litrt, or run litrt convert again."
        )
    chunk_rows = max(array.chunks[lead_axis(array.shape)], 1) if array.shape else 1
    chunk_bytes = math.prod(array.chunks) * dtype.itemsize
    nbytes = math.prod(array.shape) * dtype.itemsize
    if max(array.shape, default=0) >= 1 << 63 or chunk_bytes > max(2 * nbytes, LARGE_BYTES):
        raise StoreError(
            f"{label}: {name!r} has shape {array.shape} and chunks of shape {array.chunks}, which no memory holds: "
            "run litrt convert again."
        )
    outer = array.shards or array.chunks
    outer_bytes = math.prod(outer) * dtype.itemsize
    if outer_bytes > max(2 * nbytes, LARGE_BYTES):
        raise StoreError(
            f"{label}: {name!r} of shape {array.shape} has shards of shape {outer}, which no memory holds."
        )
    n_inner = math.prod(outer) // max(math.prod(array.chunks), 1)
    limits[array.path] = 2 * outer_bytes + n_inner * _INDEX_BYTES + _SLACK_BYTES
    n_chunks = math.prod(-(-extent // max(step, 1)) for extent, step in zip(array.shape, array.chunks, strict=True))
    told = litrt_attributes(array.attrs.asdict())
    n_rows = array.shape[lead_axis(array.shape)] if array.shape else 1
    return TensorInfo(
        name,
        array.shape,
        dtype,
        nbytes,
        node_name(name),
        chunk_rows,
        direct=False,
        chunk_bytes=chunk_bytes,
        sums=sums_of_chunks(told, n_rows, chunk_rows) if nbytes else None,
        n_chunks=n_chunks,
    )
