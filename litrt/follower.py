"""Follows a plan through passes: fetches what there is room for, releases what has had its last use."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from litrt.cache import Cache, Entry, State
from litrt.cursor import Cursor
from litrt.plan import Plan


class Follower:
    """The state of a plan that is being executed. Called under the pipeline's lock.

    Args:
        plan: What to follow.
        cache: What is there.
        queue: Queues the reads of an entry, with a priority: the number of its load, counted from the start.
    """

    def __init__(self, plan: Plan, cache: Cache, queue: Callable[[Entry, int], None]) -> None:
        self.cursor = Cursor([step.segments for step in plan.steps])
        self._plan = plan
        self._cache = cache
        self._queue = queue
        self._n_ended = 0  # steps that have ended, from the start of the plan
        self._open_steps: list[int] = []
        self._next_load = 0  # from the start of the plan
        self._expiring: list[tuple[int, int]] = []  # heap of (held_until, index)

    def match(self, streamed: tuple[int, ...]) -> int | None:
        """Returns the step that a use of `streamed` is, and moves on to it, or None where none is expected."""
        step = self.cursor.match(streamed)
        if step is not None and step > self._n_ended and not self._open_steps:
            self.advance(up_to=step)  # a jump: what was skipped is released before room is needed
        return step

    def begin(self, step: int) -> None:
        """Says that an operator is at work on a step."""
        self._open_steps.append(step)

    def end(self, step: int | None) -> None:
        """Says that an operator is done, with a step or with what is none."""
        if step is not None and step in self._open_steps:
            self._open_steps.remove(step)
        self.advance()

    def begin_pass(self) -> None:
        """Moves to the start of the next pass, whatever the last one has left out."""
        self.cursor.n_mismatches = 0
        self._open_steps.clear()
        self.cursor.begin_pass()
        self.advance()

    def advance(self, up_to: int | None = None) -> None:
        """Counts ended steps, releases what has had its last use, and fetches what there is room for."""
        if up_to is None:
            up_to = min(self._open_steps, default=self.cursor.position)
        self._n_ended = max(self._n_ended, up_to)
        self._cache.reap()
        while self._expiring and self._expiring[0][0] <= self._n_ended:
            held_until, index = heapq.heappop(self._expiring)
            entry = self._cache.entries[index]
            if entry.held_until != held_until:
                continue  # a later load took it over
            entry.held_until = 0
            if entry.is_loose:
                self._cache.let_go(entry)
        loads, n_steps = self._plan.loads, len(self._plan.steps)
        while loads:
            n_passes, number = divmod(self._next_load, len(loads))
            load, base = loads[number], n_passes * n_steps
            if base + load.after > self._n_ended:
                break
            self._next_load += 1
            if base + load.last >= self._n_ended:
                self._fetch(load.segment, load.offset, base + load.last + 1)

    def _fetch(self, index: int, offset: int | None, held_until: int) -> None:
        """Issues a planned load, or takes over what is there."""
        entry = self._cache.entries[index]
        if offset is not None and entry.is_loose and entry.block is not None and entry.block.offset != offset:
            self._cache.let_go(entry)  # left there by another path, and in the way of what this plan puts there
        if entry.state is State.HELD:
            self._cache.revive(entry)
        if entry.state is State.ABSENT:
            if entry.error is not None or not self._cache.place_planned(entry, offset):
                return  # it failed, or something unplanned is in the way: the operator that needs it will see
            self._queue(entry, self._next_load)
        entry.held_until = held_until
        self._cache.used(entry)
        heapq.heappush(self._expiring, (held_until, index))
