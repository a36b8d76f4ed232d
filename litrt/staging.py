"""The directory that a store is written to, beside its destination, until it is complete and on disk.

One process at a time writes to it. A journal in it says which arrays are finished, so that a conversion that was killed
goes on where it stopped. The journal gets a line for an array once its files are on disk, so that what it says holds
also after a loss of power; where such a line was lost, the array is written again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litrt.arrays import bytes_of_chunks, node_name
from litrt.directio import forget
from litrt.errors import StoreError
from litrt.units import format_bytes

_JOURNAL = "(journal)"  # no array of a store has parentheses in its name
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Staging:
    """The directory `<target>.partial`, taken by one writer, and what of the store is in it already.

    A context manager. At its end, what was not published is removed; but what can be gone on with is kept where the
    writer was interrupted, or has not begun to write.

    Args:
        target: Where the store will be. The directory that it is in exists.
        key: Says what is written, of which the same key gives the same bytes; None if nothing can say that, and the
            store is begun anew.

    Attributes:
        path: The directory to write to.
        finished: Names of the arrays in it that are finished, to what was said of them.

    Raises:
        StoreError: If somebody else is writing there.
    """

    def __init__(self, target: Path, key: str | None) -> None:
        self.path = target.with_name(f"{target.name}.partial")
        self.finished: dict[str, dict[str, Any]] = {}
        self._target = target
        self._key = key
        self._is_writing = self._is_published = False
        self._locks: list[int] = []

    def __enter__(self) -> Staging:
        try:
            self._locks.append(self._lock())
            if self._key is not None:
                self.finished = self._read_journal(self._key)
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_failure = kind is not None and issubclass(kind, Exception) and self._is_writing
        try:
            if not self._is_published and (is_failure or not self.finished or self._key is None):
                shutil.rmtree(self.path, ignore_errors=True)
        finally:
            self._unlock()

    def _unlock(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

    def _lock(self) -> int:
        """Returns a descriptor of the directory that holds its lock, and makes it where it is not there."""
        while True:
            self.path.mkdir(exist_ok=True)
            try:
                fd = _lock_directory(self.path)
            except FileNotFoundError:
                continue
            if fd is None:
                raise StoreError(
                    f"{self._target} is being written by another conversion: wait for it, or choose another path."
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(self.path)):
                    return fd
            os.close(fd)  # the other one was done with it after we had opened it

    def begin(self) -> None:
        """Prepares for writing: leaves what is finished, and nothing else."""
        self._is_writing = True
        kept = {_JOURNAL, *map(node_name, self.finished)} if self.finished else set()
        for child in self.path.iterdir():
            if child.name not in kept:
                _remove(child)
        if self._key is not None:
            lines = [{"key": self._key}, *({"name": name} | told for name, told in self.finished.items())]
            (self.path / _JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def finish(self, name: str, told: Mapping[str, Any]) -> None:
        """Says that an array is finished and on disk. Called by one thread at a time.

        Args:
            name: Its tensor.
            told: What to know of it when it is not written again; "stored_bytes" are the bytes of its chunks.
        """
        self.finished[name] = dict(told)
        if self._key is None:
            return
        with (self.path / _JOURNAL).open("a") as journal:
            journal.write(json.dumps({"name": name} | dict(told)) + "\n")

    def publish(self) -> None:
        """Gives the complete store its name, in the place of one that has it."""
        (self.path / _JOURNAL).unlink(missing_ok=True)
        old = self._take_name()
        self._is_published = True
        sync(self._target.parent)
        if old is not None:
            shutil.rmtree(old)

    def _take_name(self) -> Path | None:
        """Gives the store its name, and returns where the one is that had it."""
        if not self._target.exists():
            self.path.rename(self._target)
            return None
        # What is at our path then is the old store: taken as well until it is gone.
        fd = _lock_directory(self._target)
        if fd is not None:
            self._locks.append(fd)
        if exchange(self.path, self._target):
            return self.path
        replaced = self._target.with_name(f"{self._target.name}.replaced")
        if replaced.exists():
            shutil.rmtree(replaced)
        self._target.rename(replaced)
        try:
            self.path.rename(self._target)
        except BaseException:
            replaced.rename(self._target)
            raise
        return replaced

    def _read_journal(self, key: str) -> dict[str, dict[str, Any]]:
        """Returns the arrays that are finished, if what is there was written with this key."""
        try:
            first, *lines = (self.path / _JOURNAL).read_text().split("\n")
            if json.loads(first) != {"key": key}:
                return {}
        except (OSError, ValueError):
            return {}
        finished = {}
        for line in lines:
            try:
                told = json.loads(line)
            except ValueError:
                break  # cut off
            name = told.pop("name")
            array = self.path / node_name(name)
            if (array / "zarr.json").is_file() and bytes_of_chunks(array) == told["stored_bytes"]:
                finished[name] = told
        return finished


def check_space(target: Path, n_bytes: int) -> None:
    """Raises a StoreError where the disk has no room for so many bytes beside a path, and says so."""
    disk = shutil.disk_usage(target.parent)
    if disk.total and disk.free < n_bytes:  # some file systems do not say how large they are
        raise StoreError(
            f"{target} needs {format_bytes(n_bytes)} and the disk has {format_bytes(disk.free)} free: "
            "free some, or choose a path on another disk."
        )


def sync(path: Path) -> None:
    """Puts a file, or the entries of a directory, on disk, and out of the page cache."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        forget(fd)
    finally:
        os.close(fd)


def exchange(one: Path, other: Path) -> bool:
    """Lets two paths change names in one step; says whether the system can do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if not rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _lock_directory(path: Path) -> int | None:
    """Returns a descriptor that holds the lock of a directory, or None where another one does.

    On file systems that have no locks there are none.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        pass
    except BaseException:
        os.close(fd)
        raise
    return fd


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
