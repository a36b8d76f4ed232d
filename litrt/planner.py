"""From what passes do to the plans that the pipeline follows: one for every path that passes take.

Passes of one model differ: a decoder is called with its encoder and without, a branch is taken or not. Each such path
has a plan of its own for what streams. What stays is the same for all of them, chosen for the paths that were warmed
up, one after the other: to turn from one to another loads nothing that stays. Where passes keep to a path that was not,
one of them is recorded, and what stays is chosen anew.

Called between passes, by one thread at a time.
"""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import replace

from litrt.budget import Budget
from litrt.device import Device
from litrt.errors import BudgetError, LitrtError
from litrt.link import Link
from litrt.loader import Loader
from litrt.measured import N_PASSES, better_plan, measured_again, typical
from litrt.paths import Path, Paths
from litrt.pipeline import Pipeline
from litrt.plan import Plan, Policy, make_plan, replan
from litrt.residents import Residents
from litrt.tables import with_room
from litrt.trace import Trace, Use
from litrt.units import format_bytes

_PERSISTENT = 8
"""Passes on a path that was not recorded, less those on others, after which it is."""

_MOST_STRAYED = 16
"""Passes that strayed to remember, in case another one does the same."""

_RESERVE_BYTES = 512 << 20
"""Memory of a device that a budget of "auto" leaves free, beside the activations of the warm-up."""


class Planner:
    """Makes plans, has them followed, and makes others where passes turn out to be different.

    Args:
        settled: The budget.
        pipeline: Follows plans.
        residents: Makes plain what stays.
        loader: Is told of every plan.
        device: Where weights are used.
        policy: Of the plans.
        bandwidth_bps: Bytes per second of the store, where that was measured.

    Attributes:
        settled: The budget.
        trace: What was recorded last, or None.
    """

    def __init__(
        self,
        settled: Budget,
        pipeline: Pipeline,
        residents: Residents,
        loader: Loader,
        device: Device,
        policy: Policy,
        bandwidth_bps: float,
    ) -> None:
        self.settled = settled
        self.trace: Trace | None = None
        self._pipeline = pipeline
        self._arena = pipeline.cache.arena
        self._residents = residents
        self._loader = loader
        self._device = device
        self._policy: Policy = policy
        self._store_bps = bandwidth_bps
        self._bandwidth_bps = self._latency_s = 0.0
        self._activation_bytes = 0
        self._paths = Paths()
        self._path: Path | None = None  # whose plan is followed
        self._strayed: OrderedDict[tuple[tuple[int, ...], ...], None] = OrderedDict()  # what passes have used
        self._n_unrecorded = 0  # passes on paths that were not recorded, less those on others
        self._is_settled = False

    @property
    def plan(self) -> Plan | None:
        """What is followed, or None while weights are loaded on demand."""
        return self._path.plan if self._path is not None else None

    @property
    def is_all_plain(self) -> bool:
        """Whether every weight stays and is a plain tensor, so that there is nothing to do in a pass."""
        plan = self.plan
        return (
            plan is not None
            and all(segment.is_slot or index in plan.resident for index, segment in enumerate(self.settled.segments))
            and self._residents.all_plain
        )

    # What is recorded.

    def begin(self) -> None:
        """Prepares for a pass that is to be recorded: loads on demand, and nothing has to stay.

        Raises:
            StalledReadError: If a read has not ended in time. All is done then but waiting for it.
        """
        self._path = None
        try:
            self._pipeline.stop()
        finally:
            with contextlib.ExitStack() as stack:
                try:
                    if not self._device.is_host:
                        stack.enter_context(self._pipeline.alone())  # there is to be another host tier
                finally:
                    self._residents.evict_all()
                    self._pipeline.forget_residents()
                    self._loader.follow(None)

    def mend(self) -> None:
        """Puts right what an exception has broken off: then all is loaded on demand, and the next pass is recorded."""
        if self._pipeline.is_sound(self.plan):
            return
        self._path = None
        self._residents.evict_all(look=False)
        self._pipeline.reset()

    def record(self, uses: Sequence[Use], signature: Hashable) -> None:
        """Plans for a pass that was recorded, and anew for those on other paths that were recorded before it.

        Args:
            uses: All that it used, and when.
            signature: What its inputs looked like.
        """
        bandwidth_bps, self._latency_s = self._pipeline.measured()
        # Loads on demand take turns with computing, into memory that is touched for the first time: they are slower.
        self._bandwidth_bps = max(bandwidth_bps, self._store_bps)
        self._activation_bytes = max(self._device.peak_bytes() - self._arena.capacity_bytes, 0)
        if not self._device.is_host and self.settled.growable:
            self._pipeline.resize(self._grown_bytes(self.settled))
        self._paths.record(uses, signature)
        self._strayed.clear()
        self._n_unrecorded = 0
        self._is_settled = False
        self._follow_all(self._plans(self.settled, self._arena.limit_bytes))

    def _grown_bytes(self, settled: Budget) -> int:
        """Returns the size of a device's arena whose budget was to be found out."""
        if not settled.is_auto:
            return self._arena.limit_bytes
        room_bytes = self._device.free_bytes() + self._arena.capacity_bytes - _RESERVE_BYTES - self._activation_bytes
        return max(self._arena.limit_bytes, min(room_bytes, settled.footprint_bytes))

    def least_bytes(self, settled: Budget) -> int:
        """Returns the least arena that works for all that was recorded; 0 if nothing was."""
        _, room_bytes = self._pipeline.room_bytes(0)
        traces = [Trace(settled.segments, path.uses or (), 1.0) for path in self._paths.recorded]
        traces = [with_room(trace, room_bytes, room_bytes, sys.maxsize) for trace in traces]
        return max((trace.largest_use_bytes for trace in traces), default=0)

    def _trace(self, settled: Budget, uses: Sequence[Use], limit_bytes: int) -> Trace:
        """Returns the trace of passes in an arena of `limit_bytes`."""
        bandwidth_bps, latency_s = self._bandwidth_bps, self._latency_s
        if isinstance(self._loader, Link):
            used_bytes = Trace(settled.segments, tuple(uses), 1.0).used_bytes
            bandwidth_bps, latency_s = self._loader.effective_bps(used_bytes, limit_bytes), 0.0
        trace = Trace(settled.segments, tuple(uses), bandwidth_bps, latency_s)
        return with_room(trace, *self._pipeline.room_bytes(limit_bytes), limit_bytes)

    def _plans(self, settled: Budget, limit_bytes: int) -> list[tuple[Path, Trace, Plan]]:
        """Returns plans for all that was recorded, the last one last."""
        paths = self._paths.recorded
        if self._policy != "belady":
            paths = paths[-1:]
        # Each path once, one after the other: what stays is the best for that.
        trace = self._trace(settled, [use for path in paths for use in path.uses or ()], limit_bytes)
        if trace.largest_use_bytes > limit_bytes:
            needed_bytes = self.least_bytes(settled) + settled.scratch_bytes
            raise BudgetError(
                f"budget {format_bytes(settled.budget_bytes)} cannot hold what a recorded pass uses at once; the "
                f"smallest workable budget is {format_bytes(needed_bytes)} ({needed_bytes} bytes).",
                budget_bytes=settled.budget_bytes,
                needed_bytes=needed_bytes,
            )
        plan = make_plan(trace, limit_bytes, policy=self._policy)
        if len(paths) == 1:
            return [(paths[0], trace, plan)]
        whole = {use.table for use in trace.uses if use.table is not None} - {*plan.tables}
        uses = iter(trace.uses)
        found = []
        for path in paths:
            own = replace(trace, uses=tuple(next(uses) for _ in path.uses or ()))
            made = replan(plan, own.with_whole_tables(whole).uses)
            found.append((path, own, replace(made, tables=plan.tables)))
        return found

    # What is followed.

    def _follow_all(self, plans: Sequence[tuple[Path, Trace, Plan]]) -> None:
        """Knows all of `plans`, and follows the last one."""
        for path, trace, plan in plans:
            path.plan = plan
            path.measured.clear()
            self._path, self.trace = path, trace
        self._follow()

    def _follow(self) -> None:
        plan = self.plan
        assert plan is not None
        try:
            with self._pipeline.alone():  # others would evict what is not settled
                self._pipeline.keep(plan.resident)
                self._pipeline.start(plan)
                self._residents.settle(plan.resident)
        except LitrtError:  # anything else may have left what `begin` would wait for: it is for `mend`
            self.begin()
            raise

    def _turn_to(self, path: Path) -> None:
        """Follows the plan of another path: the same stays."""
        if path is not self._path and path.plan is not None:
            self._path = path
            self._pipeline.start(path.plan)

    def expect(self, signature: Hashable) -> None:
        """Turns to the path that a pass with such inputs will probably take, or prepares to record it."""
        if len(self._paths) > 1 and self._path is not None:
            path = self._paths.expected(signature)
            if path is None:
                return
            if self._n_unrecorded >= _PERSISTENT and path.uses is None and path.plan is not None and path.plan.steps:
                self.begin()
            else:
                self._turn_to(path)

    def ended(self, n_mismatches: int, signature: Hashable) -> None:
        """Learns from a pass that has ended, of which so many uses were not as planned."""
        if self._path is None:
            self.record(self._pipeline.uses(), signature)
        elif n_mismatches:
            self._learn(self._pipeline.uses(), signature)
        else:
            path = self._path
            self._measure(path)
            if len(self._paths) > 1:
                self._took(path, signature)

    def _learn(self, uses: Sequence[Use], signature: Hashable) -> None:
        """Finds the path that a pass has strayed to; it is a new one once two passes have strayed in the same way."""
        path = self._paths.find(uses)
        if path is None:
            if self._policy != "belady" or self.plan is None:
                return
            key = tuple(use.segments for use in uses)
            if key not in self._strayed:
                self._strayed[key] = None
                if len(self._strayed) > _MOST_STRAYED:
                    self._strayed.popitem(last=False)
                return
            del self._strayed[key]
            made = replan(self.plan, uses, self._arena.limit_bytes)
            # Of what was gathered, rows are to be had on this path as well.
            path = self._paths.stray(replace(made, tables=(*dict.fromkeys((*self.plan.tables, *made.tables)),)))
        self._took(path, signature)

    def _took(self, path: Path, signature: Hashable) -> None:
        """Notes which path a pass with such inputs took, and turns to the one that will probably come next."""
        self._n_unrecorded = max(self._n_unrecorded + (1 if path.uses is None else -1), 0)
        self._turn_to(self._paths.took(path, signature))

    def _measure(self, path: Path) -> None:
        """Lets a plan predict with what the first passes that follow it have measured; makes a better one, once."""
        plan = path.plan
        if plan is None or not plan.loads or len(path.measured) >= N_PASSES or not self._device.is_host:
            return
        path.measured.append((self._pipeline.uses(), *self._pipeline.delivered()))
        uses = typical([uses for uses, _, _ in path.measured])
        n_bytes = sum(n_bytes for _, n_bytes, _ in path.measured)
        busy_s = sum(busy_s for _, _, busy_s in path.measured)
        if not n_bytes or not busy_s:
            return
        if len(path.measured) == N_PASSES and len(self._paths) == 1 and not self._is_settled and self.trace is not None:
            self._is_settled = True
            better = better_plan(plan, self.trace, uses, n_bytes / busy_s)
            if better is not None:
                self._change_to(path, better)
                return
        path.plan = measured_again(plan, uses, n_bytes / busy_s)

    def _change_to(self, path: Path, plan: Plan) -> None:
        """Follows a plan with other residents, or still the one before where somebody has tensors over those."""
        self.begin()
        self._path = path
        if self._pipeline.let_go():
            path.plan = plan
        path.measured.clear()
        self._follow()

    # Budgets.

    def change(self, settled: Budget, n_threads: int) -> None:
        """Plans for another budget, and keeps what may stay.

        Args:
            settled: The budget.
            n_threads: Threads that read.

        Raises:
            BudgetError: If it is too small for what was recorded, or if somebody holds tensors over what would have
                to go. Nothing has changed then.
            CorruptWeightError: If something that is to stay cannot be read. Then all is loaded on demand.
        """
        limit_bytes = settled.arena_bytes
        if settled.growable and self._paths.recorded:
            limit_bytes = self._grown_bytes(settled) if settled.is_auto else self.least_bytes(settled)
        plans = self._plans(settled, limit_bytes) if self._paths.recorded else []
        self._paths.forget_strayed()
        self._strayed.clear()
        before = [(path, path.plan) for path in self._paths.recorded]
        was = self.settled, self._arena.limit_bytes, self._pipeline.n_threads
        was_following = self._path is not None
        try:
            self._fit(settled)
            self._resize(settled, limit_bytes, n_threads, plans[-1][2] if plans else None)
            if plans:
                self._follow_all(plans)
        except BudgetError:
            for path, plan in before:
                path.plan = plan
            self._fit(was[0])
            self._resize(*was, before[-1][1] if before else None)
            if was_following:
                self._path = before[-1][0]
                self._follow()
            raise

    def _fit(self, settled: Budget) -> None:
        """Goes back to loading on demand, and tells the loader what there will be room for."""
        if isinstance(self._loader, Link):
            self._loader.fit(settled.arena_bytes)
        self.begin()

    def _resize(self, settled: Budget, limit_bytes: int, n_threads: int, plan: Plan | None) -> None:
        """Gives the arena another size, with what it has of the residents of `plan`."""
        held = self._pipeline.change(settled, limit_bytes, n_threads, stays=plan.resident if plan is not None else {})
        if held is not None:
            raise BudgetError(
                f"cannot change the budget to {format_bytes(settled.budget_bytes)}: your code holds {held!r}, or a "
                "view of it, which would be in the way. Drop it, or take a copy of it, and try again.",
                budget_bytes=settled.budget_bytes,
            )
        self.settled = settled
