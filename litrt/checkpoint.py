"""Checkpoints as sources of tensors: mappings, torch files, directories of shards, and which module reads the others.

A source gives one tensor at a time and keeps none, so that a checkpoint of any size can be converted.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from litrt import documents
from litrt.arrays import array_dtype, dtype_name
from litrt.directio import forget
from litrt.errors import StoreError
from litrt.gguf_file import open_gguf
from litrt.lit_folder import is_lit_folder, open_lit_folder
from litrt.raw_files import open_npz, open_offloaded
from litrt.safetensors_file import open_safetensors
from litrt.source import Source, check_shape, guarded, merged
from litrt.tensors import LARGE_BYTES
from litrt.torch_file import load_torch
from litrt.wrappers import is_wrapper, parts
from litrt.zarr_source import is_zarr_folder, open_litrt, open_zarr

SourceLike = Mapping[str, torch.Tensor] | str | os.PathLike[str]

_TORCH_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
"""What the names of the files of a sharded checkpoint end with."""

_POINTER = b"version https://git-lfs"
"""What stands in a file's place where git has not fetched it."""


@contextlib.contextmanager
def open_source(source: SourceLike | Sequence[SourceLike]) -> Iterator[Source]:
    """Opens a checkpoint, or several as one, and closes its files at the end.

    Raises:
        FileNotFoundError: If there is no such file.
        StoreError: If it is not a checkpoint that litrt can read.
        CorruptWeightError: If a file is truncated.
        TypeError: If `source` is neither a mapping nor a path, or a value is not a tensor.
        ValueError: If two of several checkpoints have a tensor of the same name.
    """
    if isinstance(source, list | tuple) and source:
        with contextlib.ExitStack() as several:
            yield merged([several.enter_context(open_source(one)) for one in source])
        return
    if isinstance(source, nn.Module):
        raise TypeError("cannot convert a module: pass its weights, module.state_dict().")
    if isinstance(source, Mapping):
        yield guarded(_open_mapping(source))
        return
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"cannot convert {type(source).__name__}: pass a state_dict, another mapping of names to "
            "tensors, or the path of a checkpoint."
        )
    with contextlib.ExitStack() as stack:
        if "://" in os.fspath(source):
            yield open_litrt(source, stack)
        else:
            yield guarded(_open_path(_checkpoint_file(Path(source)), stack))


def _open_path(path: Path, stack: contextlib.ExitStack) -> Source:
    if path.is_dir():
        return open_zarr(path, stack)
    if not path.is_file():
        raise StoreError(f"{path} is not a checkpoint: it is no file at all, but a pipe or a device.")
    if path.suffix == ".zip":
        return open_zarr(path, stack)
    source = _open_checkpoint(path, stack)
    if not source.names:
        raise StoreError(f"{path} has no tensors: pass the file that has the weights.")
    return source


def _open_checkpoint(path: Path, stack: contextlib.ExitStack) -> Source:
    if path.name == "meta.json":
        return open_lit_folder(path, stack)
    if path.name == "index.json":
        return open_offloaded(path, stack)
    if path.name.endswith(".index.json"):
        return _open_shards(path, stack)
    return _open_file(path, stack)


def _checkpoint_file(path: Path) -> Path:
    """Returns the file to read for `path`, which may be a directory; of a Zarr group, the directory itself."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: pass the path of a checkpoint.")
    if not path.is_dir() or is_zarr_folder(path):
        return path
    if is_lit_folder(path):
        return path / "meta.json"
    if (path / "snapshots").is_dir() and ((path / "refs").is_dir() or (path / "blobs").is_dir()):
        return _checkpoint_file(_snapshot(path))
    # Where a directory has a checkpoint in both formats, they are the same weights.
    for suffix in ("safetensors.index.json", "bin.index.json", "safetensors", "bin", "gguf"):
        found = sorted(path.glob(f"*.{suffix}"))
        preferred = [file for file in found if file.name in {f"model.{suffix}", f"pytorch_model.{suffix}"}]
        if len(preferred or found) == 1:
            return (preferred or found)[0]
        if found and all(_SHARD.search(file.stem) for file in found):
            raise StoreError(
                f"{path} has {len(found)} shards ({_listed([file.name for file in found])}) and no *.index.json: "
                "download that too, or pass all of them."
            )
        if found:
            names = _listed([file.name for file in found])
            raise StoreError(f"{path} has {len(found)} checkpoints ({names}): pass one of them.")
    if (path / "index.json").is_file():
        return path / "index.json"
    others = sorted(file.name for file in path.iterdir() if file.suffix in _TORCH_SUFFIXES | {".npz"})
    if others:
        raise StoreError(
            f"{path} has no checkpoint that is called like one, but {_listed(others)}: pass that file itself."
        )
    raise StoreError(
        f"{path} has no checkpoint: expected model.safetensors, pytorch_model.bin, an index of shards (*.index.json), "
        "the index.json of weights that were offloaded, the meta.json of PyTorch-LIT, one *.gguf or a Zarr group."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4] + ["..."] * (len(names) > 4))


def _snapshot(repository: Path) -> Path:
    """Returns the files of the revision "main" of a repository in the cache of huggingface_hub, or of the only one."""
    revisions = sorted(path.name for path in (repository / "snapshots").iterdir() if path.is_dir())
    main = repository / "refs" / "main"
    revision = main.read_text(errors="replace").strip() if main.is_file() else None
    if revision is None and len(revisions) == 1:
        revision = revisions[0]
    if revision not in revisions:
        said = "does not say which is main" if revision is None else f"main is none of them, {revision[:50]!r}"
        raise StoreError(
            f"{repository} has {len(revisions)} snapshots, and {said}: download it again, or pass one of its snapshots."
        )
    return repository / "snapshots" / revision


def _open_file(path: Path, stack: contextlib.ExitStack) -> Source:
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise StoreError(f"{path} is a pointer of git-lfs in place of the file: run git lfs pull, or download it.")
    if path.suffix == ".safetensors":
        return open_safetensors(path, stack)
    if path.suffix in _TORCH_SUFFIXES:
        return _open_torch(path)
    if path.suffix == ".npz":
        return open_npz(path, stack)
    if path.suffix == ".gguf":
        return open_gguf(path, stack)
    raise StoreError(
        f"cannot tell what {path} is: expected .safetensors, .index.json, {', '.join(sorted(_TORCH_SUFFIXES))}, .npz, "
        ".gguf, a Zarr group (its directory, or .zip), or a directory with one of the first ones."
    )


def _open_shards(index: Path, stack: contextlib.ExitStack) -> Source:
    told = documents.read(index, what="the index of a checkpoint", remedy="Download it again.")
    weight_map = (told or {}).get("weight_map")
    if not isinstance(weight_map, dict):
        raise StoreError(f"{index} is not the index of a checkpoint: it has no weight_map.")
    files = {name: str(file) for name, file in weight_map.items()}
    outside = [file for file in files.values() if os.path.isabs(file) or ".." in Path(file).parts]
    if outside:
        raise StoreError(f"{index} names the shard {outside[0]!r}, which is not beside it.")
    missing = sorted({file for file in files.values() if not os.path.isfile(index.parent / file)})
    if missing:
        raise StoreError(
            f"{index} names {len(set(files.values()))} shards and {len(missing)} are missing, the first "
            f"{missing[0][:200] if missing[0].isprintable() else ascii(missing[0][:200])}: download them again."
        )
    return _Shards(index, files, stack).source()


class _Shards:
    """The files of a sharded checkpoint, with one of them open at a time."""

    def __init__(self, index: Path, files: dict[str, str], stack: contextlib.ExitStack) -> None:
        self._index = index
        # File by file, so that each is opened once.
        self._files = dict(sorted(files.items(), key=lambda item: item[1]))
        self._open: tuple[str, Source] | None = None
        self._stack = stack.enter_context(contextlib.ExitStack())

    def source(self) -> Source:
        """Opens every shard once, to learn what is in it."""
        aliases: dict[str, str] = {}
        sizes: dict[str, tuple[int, torch.dtype]] | None = {}
        unfit: dict[str, str] = {}
        wanted_of: dict[str, list[str]] = {}
        for name, file in self._files.items():
            wanted_of.setdefault(file, []).append(name)
        for file, wanted in wanted_of.items():
            shard = self._shard(file)
            there = set(shard.names)
            absent = [name for name in wanted if name not in there]
            if absent:
                raise StoreError(
                    f"{self._index} places {absent[0]!r} in {file}, which has no such tensor: download it again."
                )
            first: dict[str, str] = {}
            for name in wanted:
                # A name that the index leaves out cannot be an alias's target.
                target = first.setdefault(shard.aliases.get(name, name), name)
                if target != name:
                    aliases[name] = target
            unfit |= {name: shard.unfit[name] for name in wanted if name in shard.unfit}
            if sizes is not None and shard.sizes is not None:
                fitting = (name for name in wanted if name not in shard.unfit)
                sizes |= {name: shard.sizes[shard.aliases.get(name, name)] for name in fitting}
        shards = (self._index.parent / file for file in wanted_of)
        return Source(
            tuple(self._files),
            self._fetch,
            aliases,
            sizes,
            lambda tensor: self._release(tensor),
            (self._index, *shards),
            unfit,
        )

    def _shard(self, file: str) -> Source:
        if self._open is None or self._open[0] != file:
            self._open = None
            self._stack.close()
            self._open = file, _open_file(self._index.parent / file, self._stack)
        return self._open[1]

    def _fetch(self, name: str) -> torch.Tensor:
        shard = self._shard(self._files[name])
        return shard.fetch(shard.aliases.get(name, name))

    def _release(self, tensor: torch.Tensor) -> None:
        if self._open is not None:
            self._open[1].release(tensor)


def _open_mapping(source: Mapping[str, torch.Tensor]) -> Source:
    names = _checked_names(source)

    def fetch(name: str) -> torch.Tensor:
        return check_tensor(name, source[name])

    # A dict holds its tensors. Any other mapping may make them on demand, and then memory that two of them
    # have had one after the other means nothing.
    if not isinstance(source, dict) or type(source).__getitem__ is not dict.__getitem__:
        return Source(names, fetch)
    tensors = _checked_tensors(source)
    return Source(tuple(tensors), tensors.__getitem__, _find_ties(tensors), _sizes(tensors))


def _checked_tensors(source: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns all tensors of `source`, of wrappers what they consist of."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in source.items():
        for part, tensor in _parts(name, value):
            if part in tensors or (part != name and part in source):
                raise TypeError(f"there are two tensors {part!r}, one of them a part of {name!r}: rename the other.")
            tensors[part] = check_tensor(part, tensor)
    return tensors


def _parts(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor) and is_wrapper(value) and value.layout == torch.strided:
        if hasattr(value, "full_tensor"):
            raise TypeError(f"{name!r} is a {type(value).__name__}, shared out over processes: pass its full_tensor().")
        yield from parts(name, value)
    else:
        yield name, value  # type: ignore[misc]


def _checked_names(source: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    for name in source:
        if not isinstance(name, str):
            raise TypeError(f"names of weights are strings; got {name!r}.")
    return tuple(source)


def check_tensor(name: str, value: object) -> torch.Tensor:
    """Returns `value` without its history, if it is a tensor with plain values."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name!r} is a {type(value).__name__}, not a tensor: pass a mapping that has tensors only.")
    if value.device.type == "meta":
        raise TypeError(f"{name!r} is on the meta device and has no values: load the checkpoint first.")
    if value.layout != torch.strided or value.is_quantized:
        kind = "quantised" if value.is_quantized else dtype_layout(value)
        raise TypeError(f"{name!r} is {kind}, which cannot be stored: convert it to a dense tensor first.")
    if is_wrapper(value):
        raise TypeError(
            f"{name!r} is a {type(value).__name__}, which consists of other tensors: pass a dict, such as "
            "module.state_dict(), whose tensors are looked into before the first is stored."
        )
    try:
        check_shape(repr(name), value.shape, value.dtype)
    except ValueError as error:
        raise StoreError(f"{error}: it cannot be stored.") from error
    return value.detach()


def dtype_layout(value: torch.Tensor) -> str:
    """Returns the layout of a sparse tensor in words."""
    return str(value.layout).removeprefix("torch.").replace("_", " ")


def _find_ties(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Returns the names of tensors that are the same values of the same memory as an earlier one."""
    first: dict[Hashable, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        key = _memory_key(tensor)
        target = name if key is None else first.setdefault(key, name)
        if target != name:
            aliases[name] = target
    return aliases


def _memory_key(tensor: torch.Tensor) -> Hashable | None:
    try:
        start = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # wrapper subclasses have no storage of their own
        return None
    if not start or not tensor.nbytes:
        return None
    geometry = (tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
    return (start, tensor.device, geometry, tensor.is_conj(), tensor.is_neg())


def _sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, torch.dtype]]:
    return {name: (tensor.numel(), tensor.dtype) for name, tensor in tensors.items()}


def _open_torch(path: Path) -> Source:
    loaded, is_mapped = load_torch(path)
    entries = _unwrap(path, loaded)
    unfit = {name: why for name, value in entries.items() if (why := _unfitness(path, name, value))}
    values = _checked_tensors({name: value for name, value in entries.items() if name not in unfit})
    mapped = _mapped_ranges(path)

    def release(tensor: torch.Tensor) -> None:
        _forget_pages(tensor, mapped)
        with open(path, "rb") as file:
            forget(file.fileno())

    return Source(
        (*values, *unfit),
        values.__getitem__,
        _find_ties(values),
        _sizes(values),
        release if is_mapped else lambda tensor: None,
        (path,),
        unfit,
    )


def _unfitness(path: Path, name: str, value: object) -> str | None:
    """Returns why an entry of a torch file cannot be stored, or None where it can."""
    if not isinstance(value, torch.Tensor):
        return f"{path}: {name!r} is a {type(value).__name__}, which is no tensor"
    if is_wrapper(value):
        return None  # which consists of others
    try:
        check_tensor(name, value)
    except (TypeError, StoreError) as error:
        return f"{path}: {str(error).removesuffix('.')}"
    if array_dtype(value.dtype) is None:
        return f"{path}: {name!r} has dtype {dtype_name(value.dtype)}, which litrt cannot store"
    stored = value.untyped_storage().nbytes()
    if value.nbytes > max(stored, LARGE_BYTES):
        return f"{path}: {name!r} of shape {tuple(value.shape)} is expanded to {value.nbytes} bytes from {stored}"
    return None


def _unwrap(path: Path, loaded: object) -> Mapping[str, torch.Tensor]:
    """Returns the weights of what a torch file holds: itself, or its entry "state_dict" or "model"."""
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping):
        raise StoreError(
            f"{path} holds a {type(loaded).__name__}, not a state_dict: pass a file of module.state_dict()."
        )
    _checked_names(loaded)
    if loaded and not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        name, value = next(iter(loaded.items()))
        raise StoreError(
            f"{path} has no tensors, but {len(loaded)} other entries, the first {name!r}, a {type(value).__name__}: "
            "load it with torch.load and pass the mapping of its tensors."
        )
    return loaded


def _mapped_ranges(path: Path) -> list[tuple[int, int]]:
    """Returns the addresses at which this process has `path` mapped; none where the system does not say."""
    ranges = []
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        for line in maps:
            addresses, *_, file = line.rstrip("\n").split(maxsplit=5)
            if file == os.path.realpath(path):
                start, _, end = addresses.partition("-")
                ranges.append((int(start, 16), int(end, 16)))
    return ranges


def _forget_pages(tensor: torch.Tensor, mapped: list[tuple[int, int]]) -> None:
    """Takes the pages that hold `tensor` alone out of memory; to use them again reads them from the file again.

    Only pages of a mapped file may be dropped, and unchanged ones: any others would be other values afterwards.
    """
    storage = tensor.untyped_storage()
    start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    start, end = start + -start % mmap.PAGESIZE, end - end % mmap.PAGESIZE
    if start < end and any(low <= start and end <= high for low, high in mapped):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
