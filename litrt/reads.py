"""Threads that load pieces of weights, the most urgent first."""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from litrt.device import Event, Memory
from litrt.loader import Loader

T = TypeVar("T")

_SMALL_BYTES = 64 << 10
"""Pieces up to this size are all latency."""

_N_SMALL = 1024
"""Of how many of these the seconds are kept."""


class ReadThreads(Generic[T]):
    """A priority queue of pieces and the daemon threads that empty it.

    Loads run outside the lock. What a piece is loaded into must stay in place until `done` was called for it.

    Args:
        loader: Loads pieces; closed by `close`.
        lock: Guards the queue, and is held when `done` is called.
        n_threads: Threads that load; `resize` changes it.
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
        self._n_loading = 0
        self._loading_since_s = 0.0
        self._busy_s = 0.0
        self._small_s: deque[float] = deque(maxlen=_N_SMALL)
        self._closed = False
        self.n_threads = 0
        self._threads: list[threading.Thread] = []
        self.resize(n_threads)

    def resize(self, n_threads: int) -> None:
        """Makes it so many threads: those that are too many end as soon as they have nothing to load."""
        with self._lock:
            self.n_threads = n_threads
            running = {thread.name for thread in self._threads}
            for number in range(n_threads):
                name = f"litrt-read-{number}"
                if name not in running:
                    self._threads.append(threading.Thread(target=self._run, args=(number,), name=name, daemon=True))
                    self._threads[-1].start()
            self._work.notify_all()

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

    def _run(self, number: int) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._closed and number < self.n_threads:
                    self._work.wait()
                if self._closed:
                    return
                if number >= self.n_threads:
                    self._threads.remove(threading.current_thread())  # it may be wanted again before it has ended
                    return
                _, _, token, piece, memory, waits = heapq.heappop(self._queue)
                began_s = time.perf_counter()
                if not self._n_loading:
                    self._loading_since_s = began_s
                self._n_loading += 1
            error: BaseException | None = None
            try:
                self._loader.load(piece, memory, waits)
            except BaseException as raised:
                # Without its frames, which would keep the memory alive.
                error = raised.with_traceback(None)
            del memory, waits
            with self._lock:
                ended_s = time.perf_counter()
                self._n_loading -= 1
                if not self._n_loading:
                    self._busy_s += ended_s - self._loading_since_s
                if piece.nbytes <= _SMALL_BYTES:
                    self._small_s.append(ended_s - began_s)
                self._done(token, error)
                del token, error

    @property
    def busy_s(self) -> float:
        """Seconds in which something was being loaded, so far."""
        with self._lock:
            return self._busy_s + (time.perf_counter() - self._loading_since_s if self._n_loading else 0.0)

    @property
    def latency_s(self) -> float:
        """Seconds that a small piece took lately, the median; 0 where there was none."""
        with self._lock:
            return sorted(self._small_s)[len(self._small_s) // 2] if self._small_s else 0.0

    @property
    def is_one_of_them(self) -> bool:
        """Whether the caller is one of these threads."""
        return threading.current_thread() in self._threads

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
