"""The store on disk: what is in it, and where. What it says of one tensor is `litrt.tensors`, how that is an array
`litrt.arrays`, reading the bytes `litrt.reader`; `docs/format.md` specifies all of it.

A store is a Zarr v3 group with one array per distinct tensor. A local directory is opened by reading its
zarr.json files as JSON, which takes milliseconds; everything else is opened through zarr-python.
"""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore, StorePath, ZipStore

from litrt import documents
from litrt.arrays import METADATA, is_text, litrt_attributes, node_name, size_of_chunks
from litrt.checked import CheckedStore
from litrt.errors import CorruptWeightError, StoreError, WeightNotFoundError
from litrt.links import link_out
from litrt.tensors import TensorInfo, check_array, check_is_there, info_of_array, info_of_files, refusing
from litrt.zips import is_zip, member_sizes

FORMAT = 1
"""The version of the format that is written, and the newest that can be read."""

_MOST_CHUNKS = 1 << 17
"""Chunks that a tensor may have: of 8 MiB, as litrt makes the smaller ones, it has a TiB."""

_MOST_MISSING = 1000
"""Weights that are looked for in vain before the others are not looked for."""

_CLOSE_S = 1.0


_MOST_UNCHECKED = 1 << 10
"""Chunks of which each may be missing where damaged weights are set aside: of more, an error for each takes memory."""

_MOST_UNCHECKED_BYTES = 1 << 28
"""Bytes of such a chunk, decoded: readers have addresses for the largest."""


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

    def ask_again(self, after_s: float) -> None:
        """Makes requests of a remote store again that it has not answered for so many seconds."""
        group = self._group
        if group is not None and isinstance(group.store, CheckedStore):
            group.store.ask_again(after_s)

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
    return _open(path, None)


def open_damaged(
    path: str | os.PathLike[str] | ZarrStore | StorePath,
) -> tuple[Store, dict[str, CorruptWeightError]]:
    """Opens a store as `open_store` does, but for weights that are damaged, which it sets aside.

    Chunks that litrt reads itself may be missing, all of a weight included.

    Returns:
        The store without the weights of which the metadata is damaged or lost, and those, each with what is wrong.

    Raises:
        StoreError: If there is no store, or what is damaged is what says which weights there are.
    """
    lost: dict[str, CorruptWeightError] = {}
    return _open(path, lost), lost


def is_store(folder: Path) -> bool:
    """Says whether a folder is a store of litrt, complete or not, whole or damaged.

    The attributes of the group say so. Where its metadata cannot be read, the arrays do, if there is nothing else.
    """
    documents_of_group = [_read_or_none(folder / key) for key in ("zarr.json", ".zgroup")]
    if any(document is not None for document in documents_of_group):
        attributes = (documents_of_group[0] or {}).get("attributes") or _read_or_none(folder / ".zattrs")
        return "format" in litrt_attributes(attributes)
    children = [child for child in folder.iterdir() if child.name not in METADATA]
    if not all(child.is_dir() and not child.is_symlink() for child in children):
        return False
    arrays = {child.name: document for child in children if (document := _read_or_none(child / "zarr.json"))}
    names = {node: litrt_attributes(document.get("attributes")).get("name") for node, document in arrays.items()}
    return bool(names) and all(
        isinstance(name, str) and is_text(name) and node_name(name) == node for node, name in names.items()
    )


def _read_or_none(file: Path) -> dict[str, Any] | None:
    try:
        return documents.read(file)
    except (StoreError, OSError):
        return None


def _open(path: str | os.PathLike[str] | ZarrStore | StorePath, lost: dict[str, CorruptWeightError] | None) -> Store:
    """Opens a store; gives `lost`, where there is one, the weights that cannot be, which are errors otherwise."""
    label = str(path) if isinstance(path, ZarrStore | StorePath) else os.fspath(path)
    local = None if isinstance(path, ZarrStore | StorePath) or "://" in label else Path(label)
    if local is not None and not local.exists():
        raise StoreError(f"{label} does not exist: make a store with litrt convert CHECKPOINT {label}.")
    if local is not None and local.is_dir() and (local / "zarr.json").is_file():
        return _open_local(label, local.absolute(), lost)
    if local is not None and not is_zip(local) and not (local / ".zgroup").is_file():
        raise _not_a_store(label)
    if local is not None and local.suffix in {".bin", ".pt", ".pth", ".ckpt"}:
        raise _not_a_store(label)  # torch's checkpoints are zip files too
    return _open_zarr(label, path, lost)


def _not_a_store(label: str) -> StoreError:
    return StoreError(f"{label} is not a litrt store: make one with litrt convert {label} NEW.zarr.")


def _open_local(label: str, root: Path, lost: dict[str, CorruptWeightError] | None) -> Store:
    looked_at: set[str] = set()

    def check_inside(file: str) -> None:
        link = link_out(str(root), file, looked_at)
        if link is not None:
            raise StoreError(f"{link} is a link that leads out of the store: copy what it leads to in its place.")

    document = documents.read(root / "zarr.json", check_inside)
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
        array = documents.read(root / node / "zarr.json", check_inside)
        if array is None:
            return None
        found = info_of_files(name, node, array)
        through_zarr: Any = None
        if found is None:
            with refusing(f"{root / node / 'zarr.json'}"):
                for parent, folders, files in os.walk(root / node):
                    for inner in (*folders, *files):
                        check_inside(os.path.join(parent, inner))
                if not group:
                    group.append(open_group())
                through_zarr = group[0][node]
                found = info_of_array(label, name, through_zarr, limits)
        is_small = found.n_chunks <= _MOST_UNCHECKED and found.chunk_bytes <= _MOST_UNCHECKED_BYTES
        if found.is_large and (lost is None or through_zarr is not None or not is_small):
            check_is_there(label, found, *size_of_chunks(root / found.path), through_zarr)
        return found

    find = info if lost is None else _setting_aside(info, lost, str(root), (StoreError, OSError))
    return _make_store(label, document.get("attributes", {}), find, open_group, root=str(root), lost=lost)


def _setting_aside(
    find: Callable[[str], TensorInfo | None],
    lost: dict[str, CorruptWeightError],
    root: str,
    errors: tuple[type[Exception], ...],
) -> Callable[[str], TensorInfo | None]:
    """Returns `find`, with errors that go to `lost` in place of being raised."""

    def find_or_lose(name: str) -> TensorInfo | None:
        file = os.path.join(root, node_name(name), "zarr.json")
        try:
            info = find(name)
            if info is None:
                what = f"{file} is missing, or is no metadata. Run litrt convert again."
            elif info.n_chunks > _MOST_CHUNKS:
                what = f"{file} says that it has {info.n_chunks} chunks, and it may have {_MOST_CHUNKS}."
            else:
                return info
        except errors as error:
            what = str(error)
        lost[name] = CorruptWeightError(f"weight {name!r}: {what}", name=name, file=file)
        return None

    return find_or_lose


def _open_zarr(
    label: str,
    path: str | os.PathLike[str] | ZarrStore | StorePath,
    lost: dict[str, CorruptWeightError] | None,
) -> Store:
    limits: dict[str, int] = {}
    is_path = not isinstance(path, ZarrStore | StorePath) and "://" not in label
    with refusing(label):
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
            with refusing(f"the metadata of {name!r}", is_file=is_path):
                array = group.get(node_name(name))
                if array is None:
                    missing.append(name)
                    return None
                info = info_of_array(label, name, array, limits)
                if info.is_large:
                    check_array(label, info, group[info.path], sizes)
                return info

        # One request per array, and one more for a large one: together, because a remote store takes long to answer.
        attributes = group.attrs.asdict()
        header = litrt_attributes(attributes)
        told, aliases = header.get("tensors"), header.get("aliases")
        others = aliases if isinstance(aliases, dict) else {}
        names = told if isinstance(told, list) and _are_strings(told) else []
        listed = [name for name in dict.fromkeys(names) if name not in others]
        find = fetch if lost is None else _setting_aside(fetch, lost, "", (StoreError,))
        with ThreadPoolExecutor(16) as pool:
            infos = dict(zip(listed, pool.map(find, listed), strict=True))
        if lost is not None:
            errors = dict(lost)  # in the order in which threads have found them
            lost.clear()
            lost.update((name, errors[name]) for name in listed if name in errors)
        return _make_store(label, attributes, infos.get, open_group, root=None, lost=lost)
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
    lost: dict[str, CorruptWeightError] | None,
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
    if lost is not None and n_missing < _MOST_MISSING:
        n_missing = 0
    n_missing += sum(target not in infos for target in aliases.values() if lost is None or target not in lost)
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
        [name for name in names if aliases.get(name, name) in infos],
        infos,
        {alias: target for alias, target in aliases.items() if target in infos},
        root=root,
        open_group=open_group,
        compression=compression if isinstance(compression, dict) else None,
    )


def _are_strings(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) and is_text(value) for value in values)
