"""The store on disk: what is in it, and where. Reading the bytes is `litrt.reader`; `docs/format.md`
specifies both.

A store is a Zarr v3 group with one array per distinct tensor. A local directory is opened by reading its
zarr.json files as JSON, which takes milliseconds; everything else is opened through zarr-python.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import zarr
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore, StorePath, WrapperStore, ZipStore

from litrt.blocks import Blocks, blocks_of
from litrt.errors import StoreError, WeightNotFoundError

FORMAT = 1
"""The version of the format that is written, and the newest that can be read."""

TARGET_CHUNK_BYTES = 32 << 20
"""Requests of 16 to 64 MiB reach the speed of the disk from one thread."""

ALIGN_BYTES = 4096
"""What direct reads want chunks, and so the offsets that they are read to, to be multiples of."""

MAX_BLOCK_BYTES = 1 << 20
"""The largest block that Blosc chooses itself."""

_MAX_PADDING = 1 / 50
"""Share of a tensor up to which the last chunk is padded for the sake of alignment."""

_MAX_NODE_BYTES = 200
_METADATA = frozenset({"zarr.json", ".zgroup", ".zarray", ".zattrs", ".zmetadata"})

_NATIVE = frozenset(
    {"bool", "float16", "float32", "float64", "complex64", "complex128"}
    | {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
)
_VIEWED = frozenset(
    {"bfloat16", "complex32", "float8_e8m0fnu", "float4_e2m1fn_x2"}
    | {f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")}
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a store.

    The rows of a tensor run along its lead axis: the first axis whose extent is not 1.

    Attributes:
        name: Its name in the model.
        shape: Its shape.
        dtype: Its dtype in torch, which may differ from that of the array: see `array_dtype`.
        nbytes: Bytes of its values.
        path: Path of its array in the group.
        chunk_rows: Rows along the lead axis that one chunk holds.
        direct: Whether a chunk is a file whose bytes are the values of those rows, followed by their crc32c.
        chunk_bytes: Decoded bytes of one chunk, padding included.
        blocks: Parts of its chunks that can be read and checked alone, where the store has checksums of them.
        packed: Whether a chunk is a file that is one Blosc buffer, followed by its crc32c.
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


def lead_axis(shape: tuple[int, ...]) -> int:
    """Returns the first axis whose extent is not 1; a range of rows along it is contiguous."""
    return next((axis for axis, extent in enumerate(shape) if extent != 1), 0)


def chunk_shape(
    shape: tuple[int, ...],
    itemsize: int,
    target_bytes: int | None = None,
    *,
    align_bytes: int = ALIGN_BYTES,
    max_padding: float = _MAX_PADDING,
) -> tuple[int, ...]:
    """Returns the shape of the chunks of a new array: about `target_bytes` each, along the lead axis only.

    Zarr stores the last chunk at full size, so rows are shared out evenly, and rounded up to a multiple of
    `align_bytes` only where that pads the last chunk by `max_padding` of the tensor at most.
    """
    target_bytes = TARGET_CHUNK_BYTES if target_bytes is None else target_bytes
    if not shape:
        return ()
    axis = lead_axis(shape)
    rows, inner = shape[axis], tuple(max(extent, 1) for extent in shape[axis + 1 :])
    row_bytes = itemsize * math.prod(inner)
    n_chunks = -(-rows * row_bytes // target_bytes)
    chunk_rows = max(rows, 1)
    if n_chunks > 1:
        chunk_rows = -(-rows // n_chunks)
        align_rows = align_bytes // math.gcd(align_bytes, row_bytes)
        # A few more and smaller chunks often leave no padding where the first choice would.
        for wanted in range(n_chunks, n_chunks + n_chunks // 4 + 2):
            aligned = -(-rows // wanted // align_rows) * align_rows
            fits = aligned <= rows and aligned * row_bytes <= 2 * target_bytes
            if fits and -rows % aligned <= rows * max_padding:
                chunk_rows = aligned
                break
    return (1,) * axis + (chunk_rows,) + inner


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of `dtype` without its module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def floating_dtype(dtype: torch.dtype | str, what: str) -> torch.dtype:
    """Returns the floating dtype that `dtype` names.

    Raises:
        ValueError: If it names none that a store can have; the message says that litrt cannot do `what` with it.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or array_dtype(found) is None:
        raise ValueError(f"cannot {what} {dtype!r}: use a floating dtype such as 'bfloat16' or 'float16'.")
    return found


def array_dtype(dtype: torch.dtype) -> str | None:
    """Returns the Zarr data type that stores `dtype`, or None where there is none.

    A dtype that Zarr lacks is stored as the unsigned integers of the same size that have its bits.
    """
    name = dtype_name(dtype)
    if name in _NATIVE:
        return name
    return f"uint{8 * dtype.itemsize}" if name in _VIEWED else None


def node_name(name: str) -> str:
    """Returns the name of the array that holds tensor `name`: percent-escaped where Zarr needs that."""
    escaped = "".join(
        char if re.fullmatch(r"[A-Za-z0-9._-]", char) else "".join(f"%{byte:02X}" for byte in char.encode())
        for char in name
    )
    if not escaped.strip(".") or escaped.startswith("__") or escaped in _METADATA:
        escaped = f"%{ord(escaped[0]):02X}{escaped[1:]}" if escaped else "%"
    if len(escaped) > _MAX_NODE_BYTES:
        escaped = f"{escaped[: _MAX_NODE_BYTES - 33]}%{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    return escaped


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
        with self._lock:
            group, self._group = self._group, None
            if group is not None:
                group.store.close()

    def _known(self, name: str) -> str:
        if name in self._by_name:
            return name
        close = difflib.get_close_matches(str(name), self._by_name, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it has {len(self)} other names."
        raise WeightNotFoundError(f"{self.path} has no weight {name!r}: {hint}", name=name)


class MissingChunkError(Exception):
    """A chunk that the store does not have. zarr-python would return the fill value in its place."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} is missing")
        self.key = key


class _Checked(WrapperStore[ZarrStore]):
    """Raises where zarr-python would take a chunk that is missing for one that is all zeros."""

    def __init__(self, store: ZarrStore, *, owned: bool = False) -> None:
        super().__init__(store)
        self._owned = owned

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        value = await super().get(key, prototype, byte_range)
        if value is None and key.rpartition("/")[2] not in _METADATA:
            raise MissingChunkError(key)
        return value

    def close(self) -> None:
        # A store that the caller opened stays open.
        if self._owned:
            super().close()


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
    if local is not None and not zipfile.is_zipfile(local) and not (local / ".zgroup").is_file():
        raise _not_a_store(label)
    if local is not None and local.suffix in {".bin", ".pt", ".pth", ".ckpt"}:
        raise _not_a_store(label)  # torch's checkpoints are zip files too
    return _open_zarr(label, path)


def _not_a_store(label: str) -> StoreError:
    return StoreError(f"{label} is not a litrt store: make one with litrt convert {label} NEW.zarr.")


def _open_local(label: str, root: Path) -> Store:
    document = _read_json(root / "zarr.json")
    if document is None:
        raise _not_a_store(label)

    def open_group() -> zarr.Group:
        return _open_group(LocalStore(root, read_only=True))

    group: list[zarr.Group] = []  # opened for the first array that litrt does not read itself

    def info(name: str) -> TensorInfo | None:
        node = node_name(name)
        array = _read_json(root / node / "zarr.json")
        if array is None:
            return None
        found = _direct_info(name, node, array)
        if found is None:
            if not group:
                group.append(open_group())
            found = _array_info(label, name, group[0][node])
        return found

    return _make_store(label, document.get("attributes", {}), info, open_group, root=str(root))


def _open_zarr(label: str, path: str | os.PathLike[str] | ZarrStore | StorePath) -> Store:
    def open_group() -> zarr.Group:
        if isinstance(path, ZarrStore):
            return _open_group(path, owned=False)
        if isinstance(path, StorePath):
            return _open_group(path.store, path.path, owned=False)
        if "://" in label:
            plain = zarr.open_group(label, mode="r")
            return _open_group(plain.store, plain.path)
        if os.path.isdir(label):
            return _open_group(LocalStore(label, read_only=True))
        return _open_group(ZipStore(label, mode="r"))

    try:
        group = open_group()
    except (FileNotFoundError, KeyError, ValueError, zarr.errors.BaseZarrError) as error:
        raise _not_a_store(label) from error
    try:

        def fetch(name: str) -> TensorInfo | None:
            try:
                return _array_info(label, name, group[node_name(name)])
            except KeyError:
                return None

        # One request per array: together, because a remote store takes long to answer each.
        listed = _litrt_attributes(group.attrs.asdict()).get("tensors", [])
        with ThreadPoolExecutor(16) as pool:
            infos = dict(zip(listed, pool.map(fetch, listed), strict=True))
        return _make_store(label, group.attrs.asdict(), infos.get, open_group, root=None)
    finally:
        group.store.close()


def _open_group(store: ZarrStore, path: str = "", *, owned: bool = True) -> zarr.Group:
    checked = _Checked(store, owned=owned)
    try:
        return zarr.open_group(checked, path=path, mode="r")
    except BaseException:
        checked.close()
        raise


def _make_store(
    label: str,
    attributes: dict[str, Any],
    find: Callable[[str], TensorInfo | None],
    open_group: Callable[[], zarr.Group],
    *,
    root: str | None,
) -> Store:
    header = _litrt_attributes(attributes)
    version, names, aliases = header.get("format"), header.get("tensors"), header.get("aliases", {})
    if isinstance(version, int) and version > FORMAT:
        raise StoreError(f"{label} has format {version} and this version of litrt reads up to {FORMAT}: upgrade litrt.")
    if version != FORMAT or not isinstance(names, list) or not isinstance(aliases, dict):
        raise _not_a_store(label)
    distinct = [name for name in names if name not in aliases]
    infos = {name: info for name in distinct if (info := find(name)) is not None}
    n_missing = len(distinct) - len(infos)
    n_missing += sum(target not in infos for target in aliases.values())
    if n_missing or header.get("complete") is not True:
        shortfall = f"{n_missing} of {len(names)} weights are missing" if n_missing else "it was not finished"
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


def _litrt_attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    header = attributes.get("litrt")
    return header if isinstance(header, dict) else {}


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise StoreError(f"{file} is damaged: it is not JSON ({error}). Run litrt convert again.") from error
    return document if isinstance(document, dict) else None


def _direct_info(name: str, node: str, array: dict[str, Any]) -> TensorInfo | None:
    """Returns the entry of an array whose chunk files litrt reads itself, or None for any other."""
    shape, codecs = tuple(array.get("shape", ())), array.get("codecs")
    dtype = _torch_dtype(array.get("attributes", {}), str(array.get("data_type")))
    if dtype is None or array_dtype(dtype) != array.get("data_type"):
        return None
    if array.get("zarr_format") != 3 or array.get("storage_transformers") or not isinstance(codecs, list):
        return None
    grid, grid_options = _extension(array.get("chunk_grid"))
    keys, key_options = _extension(array.get("chunk_key_encoding"))
    chunks = tuple(grid_options.get("chunk_shape", ()))
    chain = [_extension(codec) for codec in codecs]
    is_packed = [name for name, _ in chain] == ["bytes", "blosc", "crc32c"]
    is_plain = (
        (grid, keys, key_options.get("separator", "/")) == ("regular", "default", "/")
        and (is_packed or [name for name, _ in chain] == ["bytes", "crc32c"])
        and (dtype.itemsize == 1 or chain[0][1].get("endian") == "little")
        and not (is_packed and chain[1][1].get("blocksize", 0) > MAX_BLOCK_BYTES)
    )
    axis = lead_axis(shape)
    expected = tuple(max(extent, 1) for extent in shape)
    if not is_plain or (*chunks[:axis], *chunks[axis + 1 :]) != (*expected[:axis], *expected[axis + 1 :]):
        return None
    nbytes = math.prod(shape) * dtype.itemsize
    chunk_rows = chunks[axis] if chunks else 1
    told = _litrt_attributes(array.get("attributes", {}))
    n_rows = shape[axis] if shape else 1
    try:
        blocks = blocks_of(told, n_rows, nbytes // n_rows, chunk_rows) if nbytes else None
    except ValueError as error:
        raise StoreError(f"the attributes of {name!r} are damaged: {error}. Run litrt convert again.") from error
    chunk_bytes = math.prod(chunks) * dtype.itemsize
    return TensorInfo(
        name, shape, dtype, nbytes, node, chunk_rows, not is_packed, chunk_bytes, packed=is_packed, blocks=blocks
    )


def _extension(value: object) -> tuple[object, dict[str, Any]]:
    """Returns the name and the configuration of a codec or grid, which may be written as a name alone."""
    if not isinstance(value, dict):
        return value, {}
    options = value.get("configuration")
    return value.get("name"), options if isinstance(options, dict) else {}


def _array_info(label: str, name: str, array: object) -> TensorInfo:
    """Returns the entry of an array that has to be read through zarr-python."""
    if not isinstance(array, zarr.Array):
        raise StoreError(f"{label}: {name!r} is a group, not an array: run litrt convert again.")
    dtype = _torch_dtype(array.attrs.asdict(), array.dtype.name)
    if dtype is None or array_dtype(dtype) != array.dtype.name:
        raise StoreError(
            f"{label}: {name!r} is stored as {array.dtype.name}, which is no form of a torch dtype that "
            "litrt knows: upgrade litrt, or run litrt convert again."
        )
    chunk_rows = array.chunks[lead_axis(array.shape)] if array.shape else 1
    chunk_bytes = math.prod(array.chunks) * dtype.itemsize
    nbytes = math.prod(array.shape) * dtype.itemsize
    return TensorInfo(name, array.shape, dtype, nbytes, node_name(name), chunk_rows, False, chunk_bytes)


def _torch_dtype(attributes: dict[str, Any], stored: str) -> torch.dtype | None:
    name = _litrt_attributes(attributes).get("torch_dtype", stored)
    dtype = getattr(torch, name, None) if name in _NATIVE | _VIEWED else None
    return dtype if isinstance(dtype, torch.dtype) else None
