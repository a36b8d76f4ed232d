"""What is written beside its destination until it is complete and on disk: the directory of a store, or a file.

One process at a time writes to it. A journal in the directory says which arrays are finished, so that a conversion that
was killed goes on where it stopped. The journal gets a line for an array once its files are on disk, so that what it
says holds also after a loss of power; where such a line was lost, the array is written again.

The directory has a name that somebody else may have used. The journal, or what marks a store, says that it is one of
litrt's; the journal is the first thing that is written there, and the last that is removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from litrt.arrays import bytes_of_chunks, node_name
from litrt.directio import forget
from litrt.errors import StoreError
from litrt.store import is_store
from litrt.units import format_bytes

_JOURNAL = "(journal)"  # no array of a store has parentheses in its name
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_OF_WRITING = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS})


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
        StoreError: If somebody else is writing there, or what is there is not of litrt.
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
                with contextlib.suppress(OSError):
                    _discard(self.path)
        finally:
            self._unlock()

    def _unlock(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

    def _lock(self) -> int:
        """Returns a descriptor of the directory that holds its lock, and makes it where it is not there."""
        while True:
            try:
                self.path.mkdir(exist_ok=True)
            except FileExistsError:
                if os.path.lexists(self.path):
                    raise self._in_the_way("no folder") from None
                continue  # the other one has removed it after it was found there
            try:
                fd = _lock_directory(self.path)
            except FileNotFoundError:
                continue
            if fd is None:
                raise StoreError(
                    f"{self._target} is being written by another conversion: wait for it, or choose another path."
                )
            try:
                if _is_of(fd, self.path):
                    if not _is_ours(self.path):
                        raise self._in_the_way("not what a conversion has left")
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # the other one was done with it after we had opened it

    def _in_the_way(self, what: str) -> StoreError:
        return StoreError(
            f"{self.path} is in the way and {what}, so that it is not removed: move it, or choose another path than "
            f"{self._target}."
        )

    def begin(self) -> None:
        """Prepares for writing: leaves what is finished, and nothing else."""
        self._is_writing = True
        (self.path / _JOURNAL).touch()
        kept = {_JOURNAL, *map(node_name, self.finished)}
        for child in self.path.iterdir():
            if child.name not in kept:
                remove(child)
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

    def publish(self, *, replace: bool = False) -> None:
        """Gives the complete store its name.

        Args:
            replace: In the place of the store that has it.

        Raises:
            StoreError: If there is something of that name, which is not to be replaced.
        """
        (self.path / _JOURNAL).unlink(missing_ok=True)
        old = self._take_name(replace)
        self._is_published = True
        sync(self._target.parent)
        if old is not None:
            _discard(old)

    def _take_name(self, replace: bool) -> Path | None:
        """Gives the store its name, and returns where the one is that had it."""
        if not replace or not self._target.exists():
            rename_new(self.path, self._target)
            return None
        # What is at our path then is the old store: taken as well until it is gone.
        fd = _lock_directory(self._target)
        if fd is not None:
            self._locks.append(fd)
        if exchange(self.path, self._target):
            return self.path
        replaced = self._target.with_name(f"{self._target.name}.replaced")
        if os.path.lexists(replaced):
            if replaced.is_dir() and _is_ours(replaced):
                _discard(replaced)
            else:
                replaced = Path(tempfile.mkdtemp(prefix=f"{replaced.name}-", dir=replaced.parent))
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


@contextlib.contextmanager
def new_file(target: Path, *, replace: bool = False) -> Iterator[BinaryIO]:
    """Gives a file to write, which gets the name `target` at the end, when it is on disk. After an error there is none.

    Until then it is `.<name>.litrt-partial` beside it, which nobody else calls a file. One process at a time writes to
    it; what a killed one has left is removed.

    Args:
        target: What the file will be. The directory that it is in exists.
        replace: In the place of the file that has the name.

    Raises:
        StoreError: If somebody else is writing it, or there is something of that name, which is not to be replaced.
    """
    path = target.with_name(f".{target.name}.litrt-partial")
    with _lock_file(path, target) as file:
        try:
            yield file
            file.flush()
            sync(path)
            if replace:
                path.replace(target)
            else:
                rename_new(path, target)
        except BaseException:
            if _is_of(file.fileno(), path):
                path.unlink()
            raise
    sync(target.parent)


def _lock_file(path: Path, target: Path) -> BinaryIO:
    """Returns an empty file that holds its lock."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666), "wb")
        try:
            if not _take_lock(file.fileno()):
                raise StoreError(f"{target} is being written by another export: wait for it, or choose another path.")
            if _is_of(file.fileno(), path):
                status = os.fstat(file.fileno())
                if status.st_size == 0 and status.st_nlink == 1:
                    return file
                # Of one that was killed, and has given it its name perhaps: not to be emptied.
                path.unlink()
        except BaseException:
            file.close()
            raise
        file.close()


def make_parent(target: Path) -> None:
    """Makes the directory that a path is in.

    Raises:
        StoreError: If something on the way there is no directory.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        above = next(parent for parent in target.parents if os.path.lexists(parent))
        raise StoreError(f"cannot write {target}: {above} is no directory. Choose another path.") from None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives the errors of a disk that takes no more the name of what is written, which writes do not know."""
    try:
        yield
    except OSError as error:
        if error.errno in _OF_WRITING and error.filename is None:
            error.filename = str(path)
        raise


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
    return _rename(one, other, _RENAME_EXCHANGE)


def rename_new(one: Path, other: Path) -> None:
    """Gives a path a name that nothing has: in one step, but for folders where the system cannot do that.

    Raises:
        StoreError: If something has that name.
    """
    try:
        if _rename(one, other, _RENAME_NOREPLACE):
            return
        if one.is_file():
            try:
                os.link(one, other)
            except FileExistsError:
                raise
            except OSError:
                pass  # of a file system that has no links
            else:
                one.unlink()
                return
        if not os.path.lexists(other):
            one.rename(other)
            return
    except FileExistsError:
        pass
    raise StoreError(
        f"{other} exists, which it did not before: choose another path, or pass overwrite=True to replace it."
    )


def _rename(one: Path, other: Path, flags: int) -> bool:
    """Renames as only Linux can; says whether the system and the file system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if not rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flags):
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _lock_directory(path: Path) -> int | None:
    """Returns a descriptor that holds the lock of a directory, or None where another one does."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        if _take_lock(fd):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _take_lock(fd: int) -> bool:
    """Says whether a descriptor has the lock now, and no other one. On file systems that have no locks, all have it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _is_of(fd: int, path: Path) -> bool:
    """Says whether a descriptor is of what has that name now."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _is_ours(folder: Path) -> bool:
    """Says whether there is nothing in a folder that a conversion has not written."""
    if folder.is_symlink():
        return False
    return (folder / _JOURNAL).is_file() or is_store(folder) or not any(folder.iterdir())


def _discard(folder: Path) -> None:
    """Removes a folder of a conversion. What says that it is one goes last: where this is killed, the next goes on."""
    with contextlib.suppress(OSError):
        (folder / _JOURNAL).touch()
    for child in folder.iterdir():
        if child.name != _JOURNAL:
            remove(child)
    (folder / _JOURNAL).unlink(missing_ok=True)
    folder.rmdir()


def remove(path: Path) -> None:
    """Removes a file, a link or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
