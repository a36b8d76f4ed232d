"""Threads that need room in the arena: one at a time makes it, and it waits for what others have in use.

Called under the pipeline's lock, which waiting lets go of.

Note on waiting. Whoever has pinned something that is there either computes with it, or waits for reads that are queued:
it will let go. Those that wait here give up meanwhile what they have pinned for the operator that they wait for. Who
has pinned something before that (a fused module does) is `_stuck`: another thread that has not lets it go first, and
one that has does not wait for it.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import contextmanager
from types import FrameType

from litrt.cache import Entry
from litrt.errors import LitrtError

_MOMENT_S = 0.05
"""How long to make way for those that want to be alone."""

_AT_WORK = frozenset(
    f"litrt.{name}" for name in ("borrow", "frames", "pipeline", "planner", "reads", "residents", "rowops", "rows")
)
"""Modules that pin weights and run operators with them, or copy them, or take the turn."""


def _is_at_work(frame: FrameType | None) -> bool:
    """Says whether a thread is in the middle of what litrt does for an operator."""
    while frame is not None:
        if frame.f_globals.get("__name__") in _AT_WORK:
            return True
        frame = frame.f_back
    return False


def current_frames() -> dict[int, FrameType]:
    """Returns what every thread is at.

    Python holds a lock while it makes a list of them: if the garbage collector ran then, as it does in Python 3.11.7,
    and let another thread go on that begins or ends a thread, neither would ever end.
    """
    was_enabled = gc.isenabled()
    try:
        gc.disable()
        return sys._current_frames()
    finally:
        if was_enabled:
            gc.enable()


def idle(threads: Collection[int]) -> set[int]:
    """Returns those of some threads that are at no operator: the caller is at none."""
    if not threads:
        return set()
    frames = current_frames()
    return {thread for thread in threads if thread == threading.get_ident() or not _is_at_work(frames.get(thread))}


class Unfinished:
    """A context that knows which threads have entered it and not come to its end, be it because of an exception.

    An interrupt may come at any moment: the only one at which it is not seen is before anything was begun.

    Attributes:
        is_broken_off: Whether an exception that is not litrt's has ended it for a thread: nothing was cleaned up then.
    """

    def __init__(self) -> None:
        self.is_broken_off = False
        self._depths: dict[int, int] = {}  # by thread

    def __enter__(self) -> None:
        thread = threading.get_ident()
        self._depths[thread] = self._depths.get(thread, 0) + 1

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is not None:
            self.is_broken_off = self.is_broken_off or not issubclass(exc_type, LitrtError)
            return
        thread = threading.get_ident()
        depth = self._depths.get(thread, 0) - 1
        if depth > 0:
            self._depths[thread] = depth
        else:
            self._depths.pop(thread, None)

    def __bool__(self) -> bool:
        return bool(self._depths)

    @property
    def is_suspect(self) -> bool:
        """Whether something will not come to its end, asked by a thread that is not inside."""
        return self.is_broken_off or threading.get_ident() in self._depths

    def forget(self) -> None:
        """Forgets what threads have left that are at no operator."""
        self.is_broken_off = False
        for thread in idle(list(self._depths)):
            self._depths.pop(thread, None)


class Turns:
    """Who has pinned how much, and whose turn it is.

    Args:
        wait: Waits until something has changed, or for some seconds.
        wake: Says that something has.
    """

    def __init__(self, wait: Callable[[float | None], object], wake: Callable[[], None]) -> None:
        self._wait = wait
        self._wake = wake
        self._pinned: dict[int, list[Entry]] = {}  # by thread
        self._stuck: set[int] = set()
        self._owner: int | None = None
        self._n_wanted = 0  # pins of the owner, for what it makes room for
        self._n_waiting = 0
        self._n_let_go = 0  # operators that are done
        self._alone: set[int] = set()  # threads that are alone, or wait for that
        self._elsewhere: set[int] = set()  # threads that are at an operator for which nothing is pinned
        self._waited_for: dict[int, int] = {}  # by thread: how many of them there were when it last waited

    def pin(self, entries: Sequence[Entry]) -> None:
        """Keeps `entries` where they are, until `unpin`."""
        if entries:
            for entry in entries:
                entry.n_pins += 1
            self._pinned.setdefault(threading.get_ident(), []).extend(entries)

    def unpin(self, entries: Sequence[Entry]) -> None:
        """Says that they are needed no more, by the thread that has pinned them or for it."""
        self._n_let_go += 1
        self._unpin(entries)

    def _unpin(self, entries: Sequence[Entry]) -> None:
        me = threading.get_ident()
        for entry in entries:
            thread = next((thread for thread in (me, *self._pinned) if entry in self._pinned.get(thread, ())), None)
            if thread is None:
                continue  # an interrupt has come before it, and it is forgotten
            entry.n_pins -= 1
            self._pinned[thread].remove(entry)
            if not self._pinned[thread]:
                del self._pinned[thread]  # threads end
        if entries and self._n_waiting:
            self._wake()

    @property
    def are_others_at_work(self) -> bool:
        """Whether other threads have pinned what they will let go of, if need be when it is their turn."""
        thread = threading.get_ident()
        others = [other for other in self._pinned if other != thread]
        if len(self._pinned.get(thread, ())) > self._n_wanted:
            others = [other for other in others if other not in self._stuck]  # they may wait for this one
        return bool(others)

    @property
    def stuck(self) -> Set[int]:
        """Threads that wait for their turn."""
        return self._stuck

    def may_others_let_go(self) -> bool:
        """Says whether others wait for their turn, and may have plain weights meanwhile that they let go of after it.

        Two such threads may be in each other's way for good: it is said once for all that was let go of.
        """
        thread = threading.get_ident()
        if not self._stuck - {thread} or self._waited_for.get(thread) == self._n_let_go:
            return False
        self._waited_for[thread] = self._n_let_go
        return True

    @property
    def is_anybody_at_work(self) -> bool:
        """Whether any thread has pinned something."""
        return bool(self._pinned)

    @property
    def am_i_at_work(self) -> bool:
        """Whether the caller's thread has."""
        return threading.get_ident() in self._pinned

    @property
    def is_taken(self) -> bool:
        """Whether it is anybody's turn."""
        return self._owner is not None

    def _left(self) -> set[int]:
        """Returns the threads that have left something here, and are at no operator: the caller is at none."""
        owner = () if self._owner is None else (self._owner,)
        return idle({*self._pinned, *self._stuck, *self._alone, *self._elsewhere, *owner})

    def is_sound(self, n_pins: int) -> bool:
        """Says whether threads that are at an operator have pinned all of `n_pins`, and others nothing."""
        return (
            not self._left() and sum(map(len, self._pinned.values())) == n_pins and len(self._stuck) == self._n_waiting
        )

    def forget(self) -> None:
        """Forgets what threads have left that are at no operator."""
        for thread in self._left():
            self._unpin_all(thread)
            self._stuck.discard(thread)
            self._alone.discard(thread)
            self._elsewhere.discard(thread)
            if self._owner == thread:
                self._owner, self._n_wanted = None, 0
        self._n_waiting = len(self._stuck)
        self._wake()

    def let_go_of_left(self) -> None:
        """Unpins what other threads have pinned that are at no operator: an interrupt has come before they did so."""
        for thread in idle([other for other in self._pinned if other != threading.get_ident()]):
            self._unpin_all(thread)

    def _unpin_all(self, thread: int) -> None:
        for entry in self._pinned.pop(thread, ()):
            entry.n_pins -= 1

    @contextmanager
    def mine(self, entries: Sequence[Entry] = ()) -> Iterator[None]:
        """Makes it the caller's turn; pinned `entries` may be gone by then."""
        thread = threading.get_ident()
        if self._owner not in (None, thread):
            self._wait_for_turn(entries)
        outer = self._owner, self._n_wanted
        self._owner, self._n_wanted = thread, len(entries)
        try:
            yield
        finally:
            if self._owner == thread:
                self._owner, self._n_wanted = outer
            if self._n_waiting:
                self._wake()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Makes it the caller's turn when no other thread is at work."""
        thread = threading.get_ident()
        is_outer = thread not in self._alone
        self._alone.add(thread)
        try:
            with self.mine():
                while self.are_others_at_work or self._elsewhere - {thread}:
                    self.wait_for_others()
                yield
        finally:
            if is_outer:
                self._alone.discard(thread)
                self._wake()

    def enter_elsewhere(self) -> None:
        """Says that the caller is at an operator for which nothing is pinned: who wants to be alone waits for it."""
        self._elsewhere.add(threading.get_ident())

    def leave_elsewhere(self) -> None:
        """Says that it is done with that."""
        self._elsewhere.discard(threading.get_ident())
        self._wake()

    def make_way(self) -> None:
        """Waits for those that want to be alone, if the caller has pinned nothing: it may be at work again and again.

        They may wait for what only the caller will do, so that it is for a moment.
        """
        until_s = None
        thread = threading.get_ident()
        while self._alone and not self._alone <= {thread} and thread not in self._pinned:
            if until_s is None:
                until_s = time.monotonic() + _MOMENT_S
            elif time.monotonic() > until_s:
                return
            self._wait(_MOMENT_S)

    def wait_for_others(self, entries: Sequence[Entry] = (), *, timeout_s: float | None = None) -> None:
        """Lets others have the turn until one has let go of something; pinned `entries` may be gone by then."""
        mine = self._owner, self._n_wanted
        self._owner, self._n_wanted = None, 0
        self._wait_for_turn(entries, first=lambda: self._wait(timeout_s))
        self._owner, self._n_wanted = mine

    def _wait_for_turn(self, entries: Sequence[Entry], first: Callable[[], object] = lambda: None) -> None:
        thread = threading.get_ident()
        self._unpin(entries)
        for entry in entries:
            entry.n_waiting += 1
        self._n_waiting += 1
        self._stuck.add(thread)
        self._wake()
        try:
            first()
            while self._owner is not None:
                self._wait(None)
        finally:
            self._n_waiting -= 1
            self._stuck.discard(thread)
            for entry in entries:
                entry.n_waiting -= 1
            self.pin(entries)
