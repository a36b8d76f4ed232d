"""Reads files past the page cache where their file system allows that, and otherwise leaves nothing of them in it."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

from litrt.arrays import ALIGN_BYTES
from litrt.crc import Bytes

P = ParamSpec("P")
T = TypeVar("T")

O_DIRECT: int = getattr(os, "O_DIRECT", 0)

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""Not to wait for who writes to a pipe, which a store that somebody else has made may have; files do not care."""


class StoppedError(Exception):
    """A direct read ended where it should not: what the file holds is for a buffered read to say."""


class Files:
    """The files of one store, on one file system.

    Threads: any number may call `read` at the same time. All that they share is whether the file system has
    refused direct reads, which becomes true once; those under way then find out for themselves.
    """

    def __init__(self) -> None:
        self._refused = not O_DIRECT

    def read(
        self, file: str, direct: bool, fill: Callable[Concatenate[int, bool, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Opens `file`, calls `fill` with its descriptor, and returns what that returns.

        Args:
            file: Its path.
            direct: Whether what `fill` reads is large enough and on pages, so that it can go past the page cache.
            fill: Reads; also called with whether it reads directly, and with the remaining arguments. A direct
                read that is refused, or ends with `StoppedError`, is followed by a buffered one.

        Raises:
            OSError: If the file cannot be opened or read.
        """
        if direct and not self._refused:
            try:
                fd = os.open(file, _FLAGS | O_DIRECT)
                try:
                    return fill(fd, True, *args, **kwargs)
                finally:
                    os.close(fd)
            except StoppedError:
                pass
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._refused = True  # some file systems accept the flag and refuse the read
        fd = os.open(file, _FLAGS)
        try:
            return fill(fd, False, *args, **kwargs)
        finally:
            forget(fd)
            os.close(fd)


def forget(fd: int) -> None:
    """Drops a file from the page cache, which would hold every weight once more."""
    try:  # noqa: SIM105 (contextlib.suppress takes longer than the call)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except (AttributeError, OSError):
        pass


def fill(fd: int, buffers: Sequence[memoryview], start: int, end: int, direct: bool) -> int:
    """Fills `buffers` from byte `start` of a file on, until `end` or more is reached, and returns where it stopped.

    That is before `end` where the buffers are full, or the file ends there; a direct read also stops off the page.
    """
    n_read = os.preadv(fd, buffers, start)
    position = start + n_read
    # A request is cut at 2 GiB by the kernel, or by a signal.
    while position < end and n_read and not (direct and n_read % ALIGN_BYTES):
        buffers = _after(buffers, n_read)
        if not buffers:
            break
        n_read = os.preadv(fd, buffers, position)
        position += n_read
    return position


def _after(buffers: Sequence[memoryview], n_bytes: int) -> list[memoryview]:
    """Returns what of `buffers` is left when the first bytes of them are full."""
    left = []
    for buffer in buffers:
        if n_bytes < len(buffer):
            left.append(buffer[n_bytes:])
        n_bytes = max(n_bytes - len(buffer), 0)
    return left


def is_on_page(values: Bytes) -> bool:
    """Says whether values in writable memory begin at a multiple of 4096 bytes."""
    return not len(values) or ctypes.addressof(ctypes.c_char.from_buffer(values.data)) % ALIGN_BYTES == 0


def size_of(fd: int) -> int:
    """Returns the size of an open file, for a third of what `os.fstat` costs."""
    return os.lseek(fd, 0, os.SEEK_END)
