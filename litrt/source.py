"""Where the tensors of a conversion come from: one at a time, and none is kept."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from litrt.arrays import are_counts, is_text
from litrt.errors import CorruptWeightError, StoreError
from litrt.tensors import LARGE_BYTES

MOST_AXES = 64
"""As many as numpy has."""


@dataclass(frozen=True)
class Source:
    """Named tensors, given one at a time.

    Attributes:
        names: All names, in order.
        aliases: Names of tensors that share the memory of an earlier one, and the name of that one.
        sizes: Elements and dtype of each tensor that fits, where they are known before it is fetched.
        fetch: Returns a tensor of a name that is not an alias. In order, each file is opened once.
        release: Called when the tensor that was fetched is no longer needed.
        files: Those that it is in, if it is in files.
        unfit: Names of what litrt cannot store, such as quantised blocks, and why in words. To fetch it is a
            StoreError, which `guarded` sees to.
        origins: What the tensors are called in the files, name by name, where they were renamed.
    """

    names: tuple[str, ...]
    fetch: Callable[[str], torch.Tensor]
    aliases: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, tuple[int, torch.dtype]] | None = None
    release: Callable[[torch.Tensor], None] = lambda tensor: None
    files: tuple[Path, ...] = ()
    unfit: dict[str, str] = field(default_factory=dict)
    origins: tuple[str, ...] = ()

    def refuse_unfit(self) -> None:
        """Raises a StoreError where something cannot be stored, before the rest is written for nothing."""
        if self.unfit:
            raise StoreError(
                f"{next(iter(self.unfit.values()))}. Of {len(self.names)} tensors {len(self.unfit)} cannot be stored: "
                "leave them out with key_map, in which their new name is None (null in the file of --key-map)."
            )


def guarded(source: Source) -> Source:
    """Returns `source` with a `fetch` that is never asked for what is unfit.

    Raises:
        StoreError: If a name is none that can be written.
    """
    for name in source.names:
        if not is_text(name):
            raise StoreError(f"a tensor is called {name!r}, which is not text: rename it, or download the file again.")
    if not source.unfit:
        return source

    def fetch(name: str) -> torch.Tensor:
        if name in source.unfit:
            raise StoreError(f"{source.unfit[name]}.")
        return source.fetch(name)

    return replace(source, fetch=fetch)


def check_shape(what: str, shape: Sequence[object], dtype: torch.dtype) -> None:
    """Raises a ValueError for a shape that somebody else has written and that no tensor can have, nor a store."""
    said = f"{what} has shape {str(tuple(shape))[:80]}"
    if len(shape) > MOST_AXES or not are_counts(shape):
        raise ValueError(f"{said}, which no tensor has")
    extents = [extent for extent in shape if isinstance(extent, int)]
    n_bytes = math.prod(extents) * dtype.itemsize
    # Of one without values, a chunk is as large as if it had a single one along the axes that have none.
    chunk_bytes = math.prod(max(extent, 1) for extent in extents) * dtype.itemsize
    if n_bytes >= 1 << 63 or chunk_bytes > max(n_bytes, LARGE_BYTES):
        raise ValueError(f"{said}, which no memory holds")


def read_into(path: Path, fd: int, name: str, tensor: torch.Tensor, position: int) -> None:
    """Fills the bytes of a tensor from a byte of a file on.

    Raises:
        CorruptWeightError: If the file ends before that.
    """
    view = tensor.numpy().data
    while len(view):
        n_read = os.preadv(fd, [view], position)
        if n_read == 0:
            raise CorruptWeightError(
                f"{path} is truncated at byte {position}, inside {name!r}. Download it again.",
                name=name,
                file=str(path),
            )
        position += n_read
        view = view[n_read:]


def swap_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Turns the bytes of each number of `dtype` around, as those that are big-endian need it."""
    width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    tensor.numpy().view(f"u{width}").byteswap(inplace=True)


def numpy_dtype(dtype: np.dtype[Any]) -> torch.dtype | None:
    """Returns the dtype in torch of an array of numpy, of any byte order; None where that is no tensor."""
    try:
        return torch.from_numpy(np.empty(0, dtype=dtype.newbyteorder("="))).dtype
    except (TypeError, ValueError):
        return None


def numpy_tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """Returns an array whose dtype torch has as a tensor, which shares its memory where it can."""
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.ascontiguousarray(native).reshape(array.shape))


KeyMap = Mapping[str, str | None] | Callable[[str], str | None]
"""Names of tensors to their new names, or to None for those to leave out; of a mapping, others keep theirs."""


def renamed(source: Source, key_map: KeyMap) -> Source:
    """Returns `source` with other names.

    Raises:
        TypeError: If a new name is neither a string nor None.
        ValueError: If a mapping has a name that the source has not, two tensors would have one name, or none is left.
    """
    if isinstance(key_map, Mapping):
        names = set(source.names)
        absent = [name for name in key_map if name not in names]
        if absent:
            raise ValueError(f"key_map renames {absent[0]!r}, which the checkpoint does not have.")
    old: dict[str, str] = {}
    for name in source.names:
        new = key_map.get(name, name) if isinstance(key_map, Mapping) else key_map(name)
        if new is None:
            continue
        if not isinstance(new, str):
            raise TypeError(f"key_map makes {new!r} of {name!r}: names of weights are strings.")
        if not is_text(new):
            raise ValueError(f"key_map makes {new!r} of {name!r}, which is not text.")
        if new in old:
            raise ValueError(f"key_map gives {old[new]!r} and {name!r} the same name, {new!r}.")
        old[new] = name
    if source.names and not old:
        raise ValueError("key_map leaves out all tensors.")
    # The first that is left of those that share their memory has it.
    targets = {new: source.aliases.get(name, name) for new, name in old.items()}
    first: dict[str, str] = {}
    for new, target in targets.items():
        first.setdefault(target, new)
    aliases = {new: first[target] for new, target in targets.items() if first[target] != new}
    known, unfit = source.sizes, source.unfit
    return replace(
        source,
        names=tuple(old),
        fetch=lambda new: source.fetch(targets[new]),
        aliases=aliases,
        sizes=known and {new: known[target] for new, target in targets.items() if target in known},
        unfit={new: unfit[target] for new, target in targets.items() if target in unfit},
        origins=tuple(old.values()),
    )


def merged(sources: Sequence[Source]) -> Source:
    """Returns the tensors of several sources as those of one.

    Raises:
        ValueError: If two have a tensor of the same name.
    """
    home: dict[str, Source] = {}
    for source in sources:
        for name in source.names:
            if name in home:
                raise ValueError(f"two of the checkpoints have a tensor {name!r}: rename or leave out one of them.")
            home[name] = source
    last: list[Source] = []

    def fetch(name: str) -> torch.Tensor:
        last[:] = [home[name]]
        return home[name].fetch(name)

    def release(tensor: torch.Tensor) -> None:
        for source in last:
            source.release(tensor)

    sizes: dict[str, tuple[int, torch.dtype]] | None = {}
    for source in sources:
        sizes = None if sizes is None or source.sizes is None else sizes | source.sizes
    # Values of a mapping have nothing by which a conversion that was interrupted could tell them from others.
    files = tuple(file for source in sources for file in source.files) if all(s.files for s in sources) else ()
    aliases = {alias: name for source in sources for alias, name in source.aliases.items()}
    unfit = {name: why for source in sources for name, why in source.unfit.items()}
    return Source(tuple(home), fetch, aliases, sizes, release, files, unfit)
