"""Files of `torch.save`: loaded as data, never as code, and without memory for what they do not have."""

from __future__ import annotations

import io
import os
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from litrt.errors import StoreError
from litrt.zips import is_zip, member_sizes


def load_torch(path: Path) -> tuple[object, bool]:
    """Returns what a file holds, and whether its tensors are mapped from it.

    Files of before torch 1.6 are not zip files and cannot be mapped: they are loaded whole.

    Raises:
        StoreError: If it is not such a file, or holds what is neither a tensor nor plain data.
    """
    try:
        is_mapped = is_zip(path)
        if is_mapped:
            _check_members(path)
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True), True
        with _File(path) as file:
            _check_storages(file)
            return torch.load(file, map_location="cpu", weights_only=True), False
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StoreError(
            f"cannot load {path}: {reason}. A truncated file has to be downloaded again; one that holds more "
            "than tensors has to be loaded with torch.load and passed as a state_dict."
        ) from error


def _check_members(path: Path) -> None:
    """Raises an error where members are compressed: torch.save compresses none, and torch would take memory for all."""
    n_bytes, size = sum(member_sizes(path).values()), path.stat().st_size
    if n_bytes > size:
        raise ValueError(f"its members have {n_bytes} bytes, and the file {size}")


def _check_storages(file: _File) -> None:
    """Raises an error where tensors are larger than the file: torch takes memory for them before it reads them."""
    with FakeTensorMode():
        tensors = [leaf for leaf in tree_leaves(torch.load(file, weights_only=True)) if isinstance(leaf, torch.Tensor)]
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    if sum(storages.values()) > file.size:
        raise ValueError(f"its tensors have {sum(storages.values())} bytes, and the file {file.size}")
    file.seek(0)


class _File(io.BufferedReader):
    """A file of which no more is asked for than it has: memory for a read is taken before it, whatever is asked for.

    Attributes:
        size: Its bytes.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self.size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))
