"""Writes a store as a safetensors file: a length, a JSON header and the values, one after the other."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
from zarr.abc.store import Store as ZarrStore
from zarr.storage import StorePath

from litrt.arrays import dtype_name
from litrt.errors import StoreError
from litrt.progress import Progress
from litrt.reader import Reader
from litrt.safetensors_file import SAFETENSORS_DTYPES
from litrt.staging import check_space, make_parent, naming, new_file
from litrt.store import Store, open_store

_HEADER_ALIGN_BYTES = 8
_FLOAT4 = "float4_e2m1fn_x2"


def export(
    store: str | os.PathLike[str] | ZarrStore | StorePath | Store,
    file: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Writes all weights of a store to a safetensors file, bit for bit, and returns its path.

    Every name has its values there, also those that share them in the store, as the format has no sharing. Holds one
    chunk at a time. The file is written beside it, as a hidden one, and renamed when it is on disk.

    Args:
        store: A store, or what `litrt.open_store` opens.
        file: The file to write, by custom `*.safetensors`.
        overwrite: Replaces a file that is there, once the new one is complete.
        progress: Shows a line of progress on stderr, if that is a terminal.

    Raises:
        StoreError: If there is no store, if it has a dtype that safetensors has not, or if `file` exists, is being
            written by another export or would not fit on the disk.
        CorruptWeightError: If a chunk is damaged.
    """
    opened = store if isinstance(store, Store) else open_store(store)
    target = Path(os.path.realpath(file))
    _check_target(target, os.fspath(file), overwrite)
    header, n_bytes = _header(opened)
    make_parent(target)
    check_space(target, len(header) + n_bytes)
    with (
        naming(target),
        contextlib.closing(Reader(opened)) as reader,
        new_file(target, replace=overwrite) as out,
        Progress(target.name, n_bytes, shown=progress) as bar,
    ):
        _check_target(target, os.fspath(file), overwrite)  # again: another export may have ended
        out.write(header)
        for name in opened:
            for piece in reader.pieces(name):
                values = np.empty(piece.nbytes, dtype=np.uint8)
                reader.read_part(piece, values)
                out.write(values.data)
                bar.add(piece.nbytes)
    return target


def _check_target(target: Path, label: str, overwrite: bool) -> None:
    if target.is_dir():
        raise StoreError(f"{label} exists, and is a folder: choose another path.")
    if os.path.lexists(target) and not overwrite:
        raise StoreError(f"{label} exists: choose another path, or pass overwrite=True to replace it.")


def _header(store: Store) -> tuple[bytes, int]:
    """Returns the length and the header of the file, and the bytes of the values behind it."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()} | {_FLOAT4: "F4"}
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in store:
        info = store[name]
        dtype = dtype_name(info.dtype)
        if dtype not in names:
            raise StoreError(
                f"safetensors has no dtype {dtype}, which {name!r} has: convert it to another dtype first."
            )
        if name in entries:
            raise StoreError(f"safetensors has no tensor of the name {name!r}: rename it.")
        end, shape = position + info.nbytes, list(info.shape)
        if dtype == _FLOAT4:
            if not shape:
                raise StoreError(
                    f"safetensors has no scalar of {dtype}, of which two are a byte, and {name!r} is one: reshape it."
                )
            shape[-1] *= 2  # safetensors counts numbers, and torch bytes of two
        entries[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGN_BYTES)
    return len(text).to_bytes(8, "little") + text, position
