"""Threads that load pieces of weights, the most urgent first."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from litrt.device import Event, Memory
from litrt.loader import Loader

T = TypeVar("T")


class ReadThreads(Generic[T]):
    """A priority queue of pieces and the daemon threads that empty it.

    Loads run outside the lock. What a piece is loaded into must stay in place until `done` was called for it.

    Args:
        loader: Loads pieces; closed by `close`.
        lock: Guards the queue, and is held when `done` is called.
        n_threads: Threads that load.
        done: Told of every piece that was loaded, with the error if it could not be.
    """

    def __init__(
        self, loader: Loader, lock: threading.RLock, n_threads: int, done: Callable[[T, BaseException | None], None]
    ) -> None:
        self._loader = loader
        self._lock = lock
        self._done = done
        self._work = threading.Condition(lock)
        self._queue: list[tuple[int, int, T, Any, Memory, Sequence[Event]]] = []
        self._n_queued = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"litrt-read-{number}", daemon=True) for number in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def queue(
        self, priority: int, token: T, pieces: Sequence[Any], memory: Memory, waits: Sequence[Event] = ()
    ) -> None:
        """Queues pieces of a segment, to be loaded into the `memory` of all of it; lower priorities come first.

        The device writes to `memory` after `waits`.
        """
        for piece in pieces:
            self._n_queued += 1
            heapq.heappush(self._queue, (priority, self._n_queued, token, piece, memory, waits))
        self._work.notify(len(pieces))

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._closed:
                    self._work.wait()
                if self._closed:
                    return
                _, _, token, piece, memory, waits = heapq.heappop(self._queue)
            error: BaseException | None = None
            try:
                self._loader.load(piece, memory, waits)
            except BaseException as raised:
                # Without its frames, which would keep the memory alive.
                error = raised.with_traceback(None)
            del memory, waits
            with self._lock:
                self._done(token, error)
                del token, error

    def close(self) -> None:
        """Drops what is queued, waits for the reads under way, and ends the threads."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._work.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._loader.close()
