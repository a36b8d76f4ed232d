"""Threads that load pieces of weights, the most urgent first, and how long they are waited for."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from litrt.device import Event, Memory
from litrt.loader import Loader
from litrt.patience import LOOK_S, Patience, stalled

T = TypeVar("T")

_SMALL_BYTES = 64 << 10
"""Pieces up to this size are all latency."""

_N_SMALL = 1024
"""Of how many of these the seconds are kept."""


@dataclass(eq=False, slots=True)
class _Load:
    """A piece that is being loaded, since when."""

    token: Any
    piece: Any
    began_s: float


class _Wait(threading.local):
    """How long a thread has waited while the same load was the oldest of those under way."""

    load: _Load | None = None
    waited_s = 0.0


class ReadThreads(Generic[T]):
    """A priority queue of pieces and the daemon threads that empty it.

    Loads run outside the lock. What a piece is loaded into must stay in place until `done` was called for it. A load
    that has stalled cannot be broken off: it keeps its thread and its place until the disk answers.

    Args:
        loader: Loads pieces; closed by `close`.
        lock: Guards the queue, and is held when `done` is called.
        n_threads: Threads that load, once there is something to load; `resize` changes it.
        done: Told of every piece that was loaded, with the error if it could not be.
        timeout_s: Seconds that `wait` and `close` wait for a load, more where loads are slow; None for any time.
    """

    def __init__(
        self,
        loader: Loader,
        lock: threading.RLock,
        n_threads: int,
        done: Callable[[T, BaseException | None], None],
        timeout_s: float | None = None,
    ) -> None:
        self._loader = loader
        self._lock = lock
        self._done = done
        self._patience = Patience(timeout_s) if timeout_s is not None else None
        self._under_way: dict[int, _Load] = {}  # by number of the thread, the oldest first
        self._waiting = _Wait()
        self._work = threading.Condition(lock)
        self._queue: list[tuple[int, int, T, Any, Memory, Sequence[Event]]] = []
        self._n_queued = 0
        self._loading_since_s = 0.0
        self._busy_s = 0.0
        self._small_s: deque[float] = deque(maxlen=_N_SMALL)
        self._closed = False
        self.n_threads = n_threads
        self._threads: dict[int, threading.Thread] = {}  # by number, from the first load on

    def resize(self, n_threads: int) -> None:
        """Makes it so many threads: those that are too many end as soon as they have nothing to load."""
        with self._lock:
            self.n_threads = n_threads
            self._work.notify_all()

    def _start(self) -> None:
        """Starts the threads that do not run yet."""
        for number in range(self.n_threads):
            if number not in self._threads:
                name = f"litrt-read-{number}"
                thread = threading.Thread(target=self._run, args=(number,), name=name, daemon=True)
                thread.start()
                self._threads[number] = thread

    def queue(
        self, priority: int, token: T, pieces: Sequence[Any], memory: Memory, waits: Sequence[Event] = ()
    ) -> None:
        """Queues pieces of a segment, to be loaded into the `memory` of all of it; lower priorities come first.

        The device writes to `memory` after `waits`.
        """
        for piece in pieces:
            self._n_queued += 1
            heapq.heappush(self._queue, (priority, self._n_queued, token, piece, memory, waits))
        self._start()
        self._work.notify(len(pieces))

    def _run(self, number: int) -> None:
        me = threading.current_thread()
        with self._lock:
            if self._threads.setdefault(number, me) is not me:
                return  # an interrupt came when it was started, and another one was in its place
        while True:
            with self._lock:
                while not self._queue and not self._closed and number < self.n_threads:
                    self._work.wait()
                if self._closed:
                    return
                if number >= self.n_threads:
                    del self._threads[number]  # it may be wanted again before it has ended
                    return
                _, _, token, piece, memory, waits = heapq.heappop(self._queue)
                began_s = time.perf_counter()
                if not self._under_way:
                    self._loading_since_s = began_s
                self._under_way[number] = _Load(token, piece, began_s)
            error: BaseException | None = None
            try:
                self._loader.load(piece, memory, waits)
            except BaseException as raised:
                # Without its frames, which would keep the memory alive.
                error = raised.with_traceback(None)
            del memory, waits
            with self._lock:
                ended_s = time.perf_counter()
                if piece.nbytes <= _SMALL_BYTES:
                    self._small_s.append(ended_s - began_s)
                elif self._patience is not None:
                    self._patience.ended(ended_s - began_s, self._bytes_under_way)
                del self._under_way[number]
                if not self._under_way:
                    self._busy_s += ended_s - self._loading_since_s
                if self._closed:
                    return  # and whoever waited for it was told
                self._done(token, error)
                del token, error

    def pending(self) -> Counter[T]:
        """Returns how many pieces are queued or under way, by what they were queued with."""
        with self._lock:
            found = Counter(token for _, _, token, *_ in self._queue)
            found.update(load.token for load in self._under_way.values())
            return found

    def drop_queue(self) -> None:
        """Forgets what is queued; what is under way goes on."""
        with self._lock:
            self._queue.clear()

    @property
    def busy_s(self) -> float:
        """Seconds in which something was being loaded, so far."""
        with self._lock:
            return self._busy_s + (time.perf_counter() - self._loading_since_s if self._under_way else 0.0)

    @property
    def latency_s(self) -> float:
        """Seconds that a small piece took lately, the median; 0 where there was none."""
        with self._lock:
            return sorted(self._small_s)[len(self._small_s) // 2] if self._small_s else 0.0

    @property
    def is_one_of_them(self) -> bool:
        """Whether the caller is one of these threads."""
        return threading.current_thread() in self._threads.values()

    @property
    def _bytes_under_way(self) -> int:
        return sum(load.piece.nbytes for load in self._under_way.values())

    def wait(self, changed: threading.Condition, timeout_s: float | None = None) -> bool:
        """Waits for `changed`, a condition of the lock, for so many seconds or a moment: loads are looked after.

        Returns:
            Whether it was notified.

        Raises:
            StalledReadError: If this thread has waited too long, in all, for the load that began first. It may begin
                to wait for it again.
        """
        load = next(iter(self._under_way.values()), None)
        if load is not None and load is not self._waiting.load and self._patience is not None:
            limit_s = self._patience.limit_s(self._bytes_under_way)
            if time.perf_counter() - load.began_s >= limit_s:  # somebody has waited for it in vain, before this
                self._loader.ask_again(limit_s)
        began_s = time.monotonic()
        is_notified = changed.wait(LOOK_S if timeout_s is None else min(timeout_s, LOOK_S))
        if self._queue and len(self._under_way) < self.n_threads:
            self._start()  # an interrupt may have come before it, in `queue`
            self._work.notify_all()
        waiting = self._waiting
        if self._patience is None or load is None or load not in self._under_way.values():
            waiting.load = None
            return is_notified
        # No more than was asked for: the process may have been stopped.
        waited_s = min(time.monotonic() - began_s, LOOK_S)
        waiting.waited_s = waited_s + (waiting.waited_s if waiting.load is load else 0.0)
        waiting.load = load
        if waiting.waited_s >= self._patience.limit_s(self._bytes_under_way):
            waiting.load = None
            raise stalled(load.piece, waiting.waited_s)
        return is_notified

    def close(self) -> None:
        """Drops what is queued, waits for the loads under way, and ends the threads; those that have stalled, later."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._work.notify_all()
            until_s = None
            if self._patience is not None:
                until_s = time.monotonic() + self._patience.limit_s(self._bytes_under_way)
        self._join(until_s)
        self._loader.close()
        if until_s is not None:
            self._join(time.monotonic() + LOOK_S)  # the loader may have given up what was under way

    def _join(self, until_s: float | None) -> None:
        for thread in list(self._threads.values()):
            if thread is not threading.current_thread():
                thread.join(None if until_s is None else max(until_s - time.monotonic(), 0.0))
