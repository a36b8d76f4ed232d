"""Zarr stores as litrt reads them: a chunk that is missing is an error, and a request that fails is made again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, RangeByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore, MemoryStore, WrapperStore, ZipStore

from litrt import documents
from litrt.arrays import METADATA

_FIRST_PAUSE_S = 0.1
_RETRY_S = 4.0
"""Requests are made again until this long after the first one began; each pause is twice the one before."""

_FINAL = (
    FileNotFoundError,
    IsADirectoryError,
    PermissionError,
    LookupError,
    TypeError,
    ValueError,
    NotImplementedError,
)
"""What another request would not change."""


class MissingChunkError(Exception):
    """A chunk that the store does not have. zarr-python would return the fill value in its place."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} is missing")
        self.key = key


@dataclass(eq=False, slots=True)
class _Request:
    """One that was made, when, and whether it was waited for too long."""

    loop: asyncio.AbstractEventLoop
    task: asyncio.Task[Buffer | None]
    began_s: float
    is_lost: bool = False

    def cancel(self) -> None:
        """Gives it up, from any thread."""
        self.loop.call_soon_threadsafe(self.task.cancel)


class CheckedStore(WrapperStore[ZarrStore]):
    """Raises where zarr-python would take a chunk that is missing for one that is all zeros, or read any size.

    Args:
        store: What to read.
        owned: Whether to close it.
        limits: The most bytes that a chunk may have that is stored, by the path of its array.
        sizes: Those of everything in it, where they are known.
        is_sparse: Whether it is none of litrt's, so that a chunk that is missing has the fill value.
    """

    def __init__(
        self,
        store: ZarrStore,
        *,
        owned: bool = False,
        limits: Mapping[str, int] | None = None,
        sizes: Mapping[str, int] | None = None,
        is_sparse: bool = False,
    ) -> None:
        super().__init__(store)
        self._owned = owned
        self._limits = {} if limits is None else limits
        self._sizes = sizes
        self._is_sparse = is_sparse
        self._is_remote = not isinstance(store, LocalStore | MemoryStore | ZipStore)
        self._requests: set[_Request] = set()

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Returns what the store has under `key`.

        Raises:
            MissingChunkError: If that is a chunk and it has none.
            ValueError: If it is larger than it may be.
            OSError: If the store was closed meanwhile; or what its requests raise, in the end.
        """
        is_metadata = key.rpartition("/")[2] in METADATA
        most = documents.MOST_BYTES if is_metadata else self._most_bytes(key)
        size = await self._size(key)
        if most is not None and size > most:
            raise ValueError(f"{key} has {size} bytes, and may have {most}")
        # The index of a shard may ask for any range, for which there would be memory first.
        asked = byte_range.end - byte_range.start if isinstance(byte_range, RangeByteRequest) else 0
        if asked > (size or most or asked):
            raise ValueError(f"{asked} bytes of {key} are asked for, which has {size or 'fewer'}")
        value = await (self._ask if self._is_remote else super().get)(key, prototype, byte_range)
        if not is_metadata:
            if value is None and not self._is_sparse:
                raise MissingChunkError(key)
        elif value is not None and len(value) > documents.MOST_VALUES:
            documents.check_values(value.to_bytes())
        return value

    def _with_store(self, store: ZarrStore) -> CheckedStore:
        """Returns what zarr-python uses in its place where the store can be written to, and is opened for reading."""
        return CheckedStore(store, owned=self._owned, limits=self._limits, sizes=self._sizes, is_sparse=self._is_sparse)

    def _most_bytes(self, key: str) -> int | None:
        while key:
            if key in self._limits:
                return self._limits[key]
            key = key.rpartition("/")[0]
        return None

    async def _size(self, key: str) -> int:
        """Returns how large something is where that is known without a request, and 0 elsewhere."""
        if self._sizes is not None:
            return self._sizes.get(key, 0)
        if isinstance(self._store, LocalStore):
            with contextlib.suppress(FileNotFoundError):
                return await self._store.getsize(key)
        return 0

    async def _ask(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        """Asks until there is an answer, or for some seconds, at least twice."""
        loop = asyncio.get_running_loop()
        began_s, pause_s, n_asked = loop.time(), _FIRST_PAUSE_S, 0
        while True:
            task = asyncio.ensure_future(self._store.get(key, prototype, byte_range))
            request = _Request(loop, task, time.monotonic())
            self._requests.add(request)
            try:
                return await task
            except asyncio.CancelledError:
                if not task.cancelled():
                    raise
                if request not in self._requests:
                    raise OSError(f"the store was closed before it had answered for {key}") from None
                if not request.is_lost:
                    raise
                continue
            except _FINAL:
                raise
            except Exception:
                n_asked += 1
                if n_asked > 1 and loop.time() + pause_s - began_s > _RETRY_S:
                    raise
            finally:
                self._requests.discard(request)
            # Not all at the same moment.
            await asyncio.sleep(pause_s * random.uniform(0.7, 1.0))
            pause_s *= 2

    def ask_again(self, after_s: float) -> None:
        """Gives up requests that have had no answer for so many seconds, and makes them again."""
        now_s = time.monotonic()
        for request in list(self._requests):
            if now_s - request.began_s >= after_s:
                request.is_lost = True
                request.cancel()

    def close(self) -> None:
        """Gives up what was asked for and not answered. A store that the caller opened stays open.

        One that could not be opened cannot be closed.
        """
        while self._requests:
            self._requests.pop().cancel()
        if self._owned and self._store._is_open:
            super().close()
