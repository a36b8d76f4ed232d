"""Threads that read pieces of weights, the most urgent first."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from litrt.device import Bytes
from litrt.reader import Piece, Reader

T = TypeVar("T")


class ReadThreads(Generic[T]):
    """A priority queue of pieces and the daemon threads that empty it.

    Reads run outside the lock. What a piece is read into must stay in place until `done` was called for it.

    Args:
        reader: Reads the store; closed by `close`.
        lock: Guards the queue, and is held when `done` is called.
        n_threads: Threads that read.
        done: Told of every piece that was read, with the error if it could not be.
    """

    def __init__(
        self, reader: Reader, lock: threading.RLock, n_threads: int, done: Callable[[T, BaseException | None], None]
    ) -> None:
        self._reader = reader
        self._lock = lock
        self._done = done
        self._work = threading.Condition(lock)
        self._queue: list[tuple[int, int, T, Piece, Bytes]] = []
        self._n_queued = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"litrt-read-{number}", daemon=True) for number in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def pieces(self, name: str) -> Sequence[Piece]:
        """Returns the pieces of a tensor."""
        return self._reader.pieces(name)

    def queue(self, priority: int, token: T, pieces: Sequence[Piece], memory: Bytes) -> None:
        """Queues pieces of a tensor, to be read into the `memory` of all of it; lower priorities are read first."""
        for piece in pieces:
            self._n_queued += 1
            heapq.heappush(self._queue, (priority, self._n_queued, token, piece, memory))
        self._work.notify(len(pieces))

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._closed:
                    self._work.wait()
                if self._closed:
                    return
                _, _, token, piece, memory = heapq.heappop(self._queue)
            error: BaseException | None = None
            try:
                self._reader.read(piece, memory)
            except BaseException as raised:
                # Without its frames, which would keep the memory alive.
                error = raised.with_traceback(None)
            del memory
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
        self._reader.close()
