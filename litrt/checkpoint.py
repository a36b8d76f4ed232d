"""Checkpoints as sources of tensors: mappings, torch files, directories of shards, and which module reads the others.

A source gives one tensor at a time and keeps none, so that a checkpoint of any size can be converted.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from litrt import documents
from litrt.directio import forget
from litrt.errors import StoreError
from litrt.gguf_file import open_gguf
from litrt.lit_folder import is_lit_folder, open_lit_folder
from litrt.raw_files import open_npz, open_offloaded
from litrt.safetensors_file import open_safetensors
from litrt.source import Source, merged
from litrt.torch_file import load_torch
from litrt.wrappers import is_wrapper, parts
from litrt.zarr_source import is_zarr_folder, open_litrt, open_zarr

SourceLike = Mapping[str, torch.Tensor] | str | os.PathLike[str]

_TORCH_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})


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
        yield _open_mapping(source)
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
            yield _open_path(_checkpoint_file(Path(source)), stack)


def _open_path(path: Path, stack: contextlib.ExitStack) -> Source:
    if path.is_dir() or path.suffix == ".zip":
        return open_zarr(path, stack)
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
        if found:
            names = ", ".join([file.name for file in found[:4]] + ["..."] * (len(found) > 4))
            raise StoreError(f"{path} has {len(found)} checkpoints ({names}): pass one of them.")
    if (path / "index.json").is_file():
        return path / "index.json"
    raise StoreError(
        f"{path} has no checkpoint: expected model.safetensors, pytorch_model.bin, an index of shards (*.index.json), "
        "the index.json of weights that were offloaded, the meta.json of PyTorch-LIT, one *.gguf or a Zarr group."
    )


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
    try:
        weight_map = documents.parse(index.read_bytes())["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{index} is not the index of a checkpoint: it has no weight_map.") from error
    outside = [file for file in files.values() if os.path.isabs(file) or ".." in Path(file).parts]
    if outside:
        raise StoreError(f"{index} names the shard {outside[0]!r}, which is not beside it.")
    missing = sorted({file for file in files.values() if not os.path.isfile(index.parent / file)})
    if missing:
        raise StoreError(
            f"{index} names {len(set(files.values()))} shards and {len(missing)} are missing, the first "
            f"{missing[0]}: download them again."
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
        for file in dict.fromkeys(self._files.values()):
            shard = self._shard(file)
            wanted = [name for name, home in self._files.items() if home == file]
            absent = [name for name in wanted if name not in shard.names]
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
            if sizes is not None and shard.sizes is not None:
                sizes |= {name: shard.sizes[shard.aliases.get(name, name)] for name in wanted}
        shards = (self._index.parent / file for file in dict.fromkeys(self._files.values()))
        return Source(
            tuple(self._files),
            self._fetch,
            aliases,
            sizes,
            lambda tensor: self._release(tensor),
            (self._index, *shards),
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
    tensors = _unwrap(path, loaded)
    values = _checked_tensors(tensors)

    mapped = _mapped_ranges(path)

    def release(tensor: torch.Tensor) -> None:
        _forget_pages(tensor, mapped)
        with open(path, "rb") as file:
            forget(file.fileno())

    return Source(
        tuple(values),
        values.__getitem__,
        _find_ties(values),
        _sizes(values),
        release if is_mapped else lambda tensor: None,
        (path,),
    )


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
    others = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise TypeError(
            f"{path} holds {len(others)} entries that are not tensors, the first {others[0]!r}: "
            "load it with torch.load and pass the mapping of its tensors."
        )
    _checked_names(loaded)
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
    """Takes the pages that hold `tensor` out of memory; to use them again reads them from the file again.

    Only pages of a mapped file may be dropped: any others would be zeros afterwards.
    """
    storage = tensor.untyped_storage()
    start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    start, end = start - start % mmap.PAGESIZE, end - end % mmap.PAGESIZE
    if start < end and any(low <= start and end <= high for low, high in mapped):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
