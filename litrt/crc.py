"""The checksum of every chunk: CRC-32C (Castagnoli), RFC 3720."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import google_crc32c  # the crc32c of zarr-python's codec of that name, which requires it
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

CRC_BYTES = 4
"""A chunk file ends with its checksum, little-endian."""


_SMALL_BYTES = 64 << 10
"""Up to this size the checksum takes less time than to let go of the interpreter lock and to get it back."""


def _load_crc() -> Callable[[int, Bytes], int]:
    """Returns a function that extends a crc32c over more bytes.

    google_crc32c holds the interpreter lock while it runs, 2.5 ms for a chunk, which stops the thread that
    computes. The library that it ships is the same code without Python, and ctypes lets go of the lock.
    """
    extend_holding_lock: Callable[[int, Bytes], int] = google_crc32c.extend
    try:
        library = ctypes.CDLL(google_crc32c._crc32c.__file__)
        function = library.crc32c_extend
    except (AttributeError, OSError, TypeError):
        return extend_holding_lock
    function.argtypes = [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t]
    function.restype = ctypes.c_uint32

    def extend(crc: int, values: Bytes) -> int:
        if values.nbytes <= _SMALL_BYTES:
            return extend_holding_lock(crc, values)
        return int(function(crc, values.ctypes.data, values.nbytes))

    return extend


extend_crc = _load_crc()
"""Extends a crc32c (RFC 3720) over contiguous bytes; `extend_crc(0, values)` is that of `values` alone."""
