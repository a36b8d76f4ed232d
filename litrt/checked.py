"""Zarr stores as litrt reads them: a chunk that is missing is an error, and a request that fails is made again."""

from __future__ import annotations

import asyncio
import random

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore, MemoryStore, WrapperStore, ZipStore

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


class CheckedStore(WrapperStore[ZarrStore]):
    """Raises where zarr-python would take a chunk that is missing for one that is all zeros.

    Args:
        store: What to read.
        owned: Whether to close it.
    """

    def __init__(self, store: ZarrStore, *, owned: bool = False) -> None:
        super().__init__(store)
        self._owned = owned
        self._is_remote = not isinstance(store, LocalStore | MemoryStore | ZipStore)
        self._requests: set[tuple[asyncio.AbstractEventLoop, asyncio.Task[Buffer | None]]] = set()

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Returns what the store has under `key`.

        Raises:
            MissingChunkError: If that is a chunk and it has none.
            OSError: If the store was closed meanwhile; or what its requests raise, in the end.
        """
        value = await (self._ask if self._is_remote else super().get)(key, prototype, byte_range)
        if value is None and key.rpartition("/")[2] not in METADATA:
            raise MissingChunkError(key)
        return value

    async def _ask(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        """Asks until there is an answer, or for some seconds, at least twice."""
        loop = asyncio.get_running_loop()
        began_s, pause_s, n_asked = loop.time(), _FIRST_PAUSE_S, 0
        while True:
            task = asyncio.ensure_future(self._store.get(key, prototype, byte_range))
            request = loop, task
            self._requests.add(request)
            try:
                return await task
            except asyncio.CancelledError:
                if task.cancelled() and request not in self._requests:
                    raise OSError(f"the store was closed before it had answered for {key}") from None
                raise
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

    def close(self) -> None:
        """Gives up what was asked for and not answered. A store that the caller opened stays open."""
        while self._requests:
            loop, task = self._requests.pop()
            loop.call_soon_threadsafe(task.cancel)
        if self._owned:
            super().close()
