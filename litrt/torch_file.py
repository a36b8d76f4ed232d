"""Files of `torch.save`: loaded as data, never as code, and without memory for what they do not have."""

from __future__ import annotations

import io
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch._weights_only_unpickler import Unpickler
from torch.serialization import LoadEndianness, get_default_load_endianness

from litrt.errors import StoreError
from litrt.zips import check_members, is_zip, open_zip

_MOST_PICKLE_BYTES = 32 << 20
"""What a file may take beside the values of its tensors, each of which has a hundred bytes of it and a few more."""

_MOST_CALLS = 1 << 18
"""Objects that a file may have made, of up to a kilobyte each: a tensor consists of two, a parameter of four."""

_MOST_LINE_BYTES = 64 << 10

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_ADVICE = re.compile(r"In PyTorch \d.*?trusted source\.|Weights only load failed\.|Please use `torch\..*", re.DOTALL)
"""What torch says of how to run the code that a file may have."""


def load_torch(path: Path) -> tuple[object, bool]:
    """Returns what a file holds, and whether its tensors are mapped from it as they are.

    Files of before torch 1.6 are not zip files and cannot be mapped: they are loaded whole. Those of the other byte
    order are mapped, and turned around in memory of this process's own.

    Raises:
        StoreError: If it is not such a file, or holds what is neither a tensor nor plain data.
    """
    try:
        if is_zip(path):
            is_native = _check_zip(path)
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True), is_native
        with _File(path) as file:
            _check_storages(file)
        with _File(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True), False
    except Exception as error:
        raise StoreError(
            f"cannot load {path}: {_reason(error)}. A truncated file has to be downloaded again; one that holds more "
            "than tensors has to be loaded with torch.load and passed as a state_dict."
        ) from error


def _reason(error: Exception) -> str:
    """Returns what an error says in one line, without advice and without what a terminal would not show."""
    text = _ESCAPES.sub("", str(error)).rpartition("WeightsUnpickler error:")[2]
    lines = [line.strip() for line in _ADVICE.sub("", text).splitlines() if line.strip()]
    said = (lines[0] if lines else type(error).__name__)[:300].rstrip(" .")
    return "".join(char if char.isprintable() else "?" for char in said)


def _check_zip(path: Path) -> bool:
    """Returns whether the values are in the machine's byte order.

    Raises:
        ValueError: If members are compressed, which torch.save does with none, and torch would take memory for all; or
            if there are too many objects.
    """
    with open_zip(path) as archive:
        check_members(archive)
        n_bytes, size = sum(member.file_size for member in archive.infolist()), path.stat().st_size
        if n_bytes > size:
            raise ValueError(f"its members have {n_bytes} bytes, and the file {size}")
        for content in _records(archive, "data.pkl", _MOST_PICKLE_BYTES):
            _check_calls(content.count(b"R"))
        orders = {content.decode("ascii", "replace") for content in _records(archive, "byteorder", 100)}
    if not orders:
        otherwise = get_default_load_endianness()
        native = {LoadEndianness.NATIVE, LoadEndianness[sys.byteorder.upper()]}
        return (otherwise or LoadEndianness.LITTLE) in native
    return orders == {sys.byteorder}


def _records(archive: zipfile.ZipFile, name: str, most_bytes: int) -> list[bytes]:
    """Returns the content of what torch may take for a record: it looks for names in whatever case."""
    found = [member for member in archive.infolist() if member.filename.lower().rpartition("/")[2] == name]
    for member in found:
        if member.file_size > most_bytes:
            raise ValueError(f"its {name} has {member.file_size} bytes, and may have {most_bytes}")
    return [archive.read(member) for member in found]


def _check_calls(n_calls: int) -> None:
    if n_calls > _MOST_CALLS:
        raise ValueError(f"it has {n_calls} objects, and may have {_MOST_CALLS}: save it as several files")


def _check_storages(file: _File) -> None:
    """Raises an error where tensors are larger than the file: torch takes memory for them before it reads them."""
    unpickler = _Storages(file, encoding="utf-8")
    try:
        for _ in range(4):  # a number, the version, what machine it was, and the tensors
            unpickler.load()  # type: ignore[no-untyped-call]
    finally:
        torch._utils._sparse_tensors_to_validate.clear()  # which have no values here
    if unpickler.n_bytes() > file.size:
        raise ValueError(f"its tensors have {unpickler.n_bytes()} bytes, and the file {file.size}")


class _Storages(Unpickler):
    """Makes the storages of a file without memory for them, each once."""

    def __init__(self, file: _File, *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self._made: dict[object, torch.storage.TypedStorage] = {}

    def persistent_load(self, pid: Any) -> torch.storage.TypedStorage:
        _, kind, key, _, n_elements, _ = pid
        if key not in self._made:
            n_bytes = n_elements * kind.dtype.itemsize
            untyped = torch.UntypedStorage(n_bytes, device="meta")  # type: ignore[no-untyped-call]
            self._made[key] = torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
                wrap_storage=untyped, dtype=kind.dtype, _internal=True
            )
        return self._made[key]

    def n_bytes(self) -> int:
        """Returns the bytes of all: a tensor that does not fit into its storage has made that larger, as in memory."""
        return sum(storage._untyped_storage.nbytes() for storage in self._made.values())


class _File(io.BufferedReader):
    """A file of which no more is asked for than it has: memory for a read is taken before it, whatever is asked for.

    torch reads the values of tensors by the descriptor, and only the rest by this.

    Attributes:
        size: Its bytes.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size
        self._n_asked = 0
        self._n_calls = 0

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self.size - self.tell(), 0)
        n_bytes = left if size is None or size < 0 else min(size, left)
        self._n_asked += n_bytes
        if self._n_asked > _MOST_PICKLE_BYTES:
            raise ValueError(f"it has more than {_MOST_PICKLE_BYTES} bytes beside the values of its tensors")
        content = super().read(n_bytes)
        if content == b"R":
            self._n_calls += 1
            _check_calls(self._n_calls)
        return content

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(_MOST_LINE_BYTES)
        self._n_asked += len(line)
        return line
