"""The folders that PyTorch-LIT keeps weights in: two JSON files, and one file of all values."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litrt import documents
from litrt.arrays import are_counts
from litrt.directio import forget
from litrt.errors import CorruptWeightError, StoreError
from litrt.source import Source, check_shape, numpy_dtype, read_into, swap_bytes

_METHOD = "np-memmap"
_NOT_A_WEIGHT = "_info"


def is_lit_folder(path: Path) -> bool:
    """Says whether a directory has the `meta.json` of such a folder, and not that of something else."""
    if not (path / "meta.json").is_file():
        return False
    try:
        told = documents.read(path / "meta.json")
    except StoreError:
        return False
    return told is not None and {"method", "model", "meta"} <= told.keys()


def open_lit_folder(index: Path, stack: contextlib.ExitStack) -> Source:
    """Opens such a folder by its `meta.json`; its files are closed with `stack`.

    `meta.json` names the file of values ("model") and that of the metadata ("meta"). The metadata has for each weight
    its "shape" and, counted in elements of the file of values, where it begins and ends ("bound"). Its member "_info"
    is no weight: it has the dtype of all, as numpy spells it ("type"), and how many elements there are ("size").

    Raises:
        StoreError: If it is not such a folder.
        CorruptWeightError: If the file of values is truncated.
    """
    try:
        told = _object(index)
        if told["method"] != _METHOD:
            raise StoreError(f"{index} has method {told['method']!r}, and litrt reads {_METHOD!r}.")
        meta = _beside(index, told["meta"])
        path = _beside(index, told["model"])
        entries = _object(meta)
        info = entries.pop(_NOT_A_WEIGHT)
        stored, size = np.dtype(str(info["type"])), info["size"]
        if not are_counts([size]):
            raise ValueError(f"there are {size!r} elements")
        placed = {name: _place(name, entry, size) for name, entry in entries.items()}
        dtype = numpy_dtype(stored)
        for name, (shape, _, _) in placed.items():
            check_shape(repr(name), shape, dtype or torch.uint8)
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise StoreError(f"{index} is not that of a folder of PyTorch-LIT: {str(error)[:200]}.") from error
    if dtype is None:
        raise StoreError(f"{meta} says that weights are {stored}, which is no dtype of torch.")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    found, n_bytes = os.fstat(fd).st_size, size * dtype.itemsize
    if found < n_bytes:
        first = next((name for name, (_, _, end) in placed.items() if end * dtype.itemsize > found), "")
        raise CorruptWeightError(
            f"{path} is truncated: it has {found} of {n_bytes} bytes, and {first!r} is cut off. Make it again.",
            name=first,
            file=str(path),
        )

    def fetch(name: str) -> torch.Tensor:
        shape, begin, end = placed[name]
        tensor = torch.empty((end - begin) * dtype.itemsize, dtype=torch.uint8)
        read_into(path, fd, name, tensor, begin * dtype.itemsize)
        if not stored.isnative:
            swap_bytes(tensor, dtype)
        return tensor.view(dtype).reshape(shape)

    def release(tensor: torch.Tensor) -> None:
        forget(fd)

    sizes = {name: (end - begin, dtype) for name, (_, begin, end) in placed.items()}
    return Source(tuple(placed), fetch, {}, sizes, release, (index, meta, path))


def _object(file: Path) -> dict[str, Any]:
    found = documents.read(file, what="metadata of PyTorch-LIT", remedy="Make the folder again.")
    if found is None:
        raise ValueError(f"{file.name} is no object")
    return found


def _beside(index: Path, name: str) -> Path:
    """Returns a file that lies beside the index, whatever the index calls it."""
    file = index.parent / name
    if file.name != name or not file.is_file():
        raise ValueError(f"there is no file {name!r} beside it")
    return file


def _place(name: str, entry: dict[str, Any], size: int) -> tuple[tuple[int, ...], int, int]:
    """Returns the shape of a weight, and the elements of the file where it begins and ends."""
    (begin, end), shape = entry["bound"], tuple(entry["shape"])
    if not are_counts((begin, end, size, *shape)) or end - begin != math.prod(shape) or end > size:
        raise ValueError(f"{name!r} of shape {shape} is said to be elements {begin} to {end} of {size}")
    return shape, begin, end
