"""The runtime: builds the model, records a pass, plans, and lets the pipeline execute the plan."""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, get_args

import torch
from torch import nn

from litrt.arena import Arena
from litrt.budget import settle
from litrt.device import open_device
from litrt.errors import ClosedError, LitrtError
from litrt.frames import wrap_fused
from litrt.pipeline import Pipeline
from litrt.plan import Plan, Policy, make_plan, replan
from litrt.reader import Reader
from litrt.residents import Residents
from litrt.skeleton import build, furnish, match, slots, tables
from litrt.stats import Stats
from litrt.store import Store, TensorInfo, open_store
from litrt.trace import Trace, Use
from litrt.units import parse_bytes

_QUICK_S = 1.0
"""Warm-up passes of less than this are run again."""


class Runtime:
    """Runs a model whose weights are in a store, inside a budget.

    The model is built by its own constructor, without its weights. Weights are read when an operator needs them; after
    one recorded pass they are read ahead of their use, and as many as fit stay. Outputs are bit-identical to those of
    the plain model with the store's weights. The model is in eval mode and makes no gradients.

    Args:
        model_ctor: Makes the model: a class or a function without arguments.
        store: A store that `litrt.convert` wrote, or its path.
        budget: The most bytes of weights to hold at any moment, those in flight and the scratch of reads included:
            `"6GB"` (10**9), `"6GiB"` (2**30), `"40%"` of the model, an int of bytes, `"min"` for the smallest that
            works, or `"auto"` for half of the memory that is available. Activations are not included.
        device: Where weights are used; `"cpu"` in this version.
        policy: `"belady"` keeps a fixed part and streams the rest ahead of its use; `"lru"` loads on demand and
            evicts what was used longest ago, for comparison.
        n_threads: Threads that read; by default what the store needs.
        strict: Raise TraceMismatchError where a pass strays from the recorded one, instead of loading on demand.

    Attributes:
        module: The model. Call it, its children, or any method of theirs: `rt.module.generate(...)`.

    Raises:
        BudgetError: If `budget` cannot be read, or cannot hold the largest weight.
        StoreError: If `store` is not a complete store.
        SkeletonError: If its names or shapes are not the model's.
    """

    module: nn.Module

    def __init__(
        self,
        model_ctor: Callable[[], nn.Module],
        store: str | os.PathLike[str] | Store,
        budget: int | str = "auto",
        device: str | torch.device = "cpu",
        *,
        policy: Policy = "belady",
        n_threads: int | None = None,
        strict: bool = False,
    ) -> None:
        if policy not in get_args(Policy):
            raise ValueError(f"policy {policy!r} is not known: use 'belady' or 'lru'.")
        if n_threads is not None and (not isinstance(n_threads, int) or n_threads < 1):
            raise ValueError(f"n_threads must be a positive int, not {n_threads!r}.")
        if budget not in ("min", "auto"):
            parse_bytes(budget, of_bytes=10**9)  # cannot be read? Say so before the model is built.
        served_on = open_device(device)
        opened = store if isinstance(store, Store) else open_store(store)

        self.module, deferral = build(model_ctor)
        found = slots(self.module)
        match(self.module, found, opened)
        infos = [opened[name] for name in dict.fromkeys(slot.stored for slot in found)]
        reader = Reader(opened)
        if n_threads is None:
            n_threads = 2 if all(info.direct for info in infos) else 4
        pieces = {name: reader.pieces(name) for name in tables(self.module, found)}
        slot_bytes = {name: max(piece.nbytes for piece in cut) for name, cut in pieces.items() if len(cut) > 1}
        settled = settle(budget, infos, n_threads * reader.scratch_bytes_per_task, slot_bytes)
        infos += [
            TensorInfo(slot.name, (slot.nbytes,), torch.uint8, slot.nbytes, "", 1, direct=False)
            for slot in settled.segments
            if slot.is_slot
        ]
        self._segments = settled.segments
        self._budget_bytes = settled.budget_bytes
        self._policy: Policy = policy
        self._plan: Plan | None = None
        self._n_passes = 0
        self._last_uses: list[Use] = []
        self._recording = False
        self._pass_lock = threading.RLock()
        self._in_pass = False
        self._unhook: Callable[[], None] | None = None
        self._arena = Arena(served_on, settled.capacity_bytes, settled.arena_bytes)
        self._pipeline = Pipeline(
            settled.segments,
            infos,
            reader,
            served_on,
            self._arena,
            n_threads=n_threads,
            scratch_bytes=settled.scratch_bytes,
            growable=settled.growable,
            strict=strict,
            tables=frozenset(index for index, info in enumerate(infos) if info.name in slot_bytes),
        )
        self._stop = weakref.finalize(self, Pipeline.close, self._pipeline)
        try:
            indices = {info.name: index for index, info in enumerate(infos)}
            placeholders = furnish(self.module, found, deferral, opened, self._pipeline, indices, served_on)
            self._residents = Residents(placeholders, self._pipeline)
            self._pipeline.cache.evict_resident = self._residents.evict
            self._hook()
        except BaseException:
            self._stop()
            raise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module: one pass. The first one is recorded, unless `warmup` was called."""
        if not self._stop.alive:
            raise ClosedError("this runtime is closed: make a new litrt.Runtime to use its model again.")
        if self._unhook is None:
            self._n_passes += 1
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Runs a pass, inside the budget, to record which operators use which weights; then plans and fills memory.

        A quick pass is run twice, the second time for its timings.

        Args:
            *args: A sample input, passed to the module; later inputs should take the same path through it.
            **kwargs: Likewise.
        """
        if not self._stop.alive:
            raise ClosedError("this runtime is closed: make a new litrt.Runtime to use its model again.")
        with self._pass_lock:
            if self._plan is not None:
                self._pipeline.stop()
                self._residents.evict_all()
                self._pipeline.forget_residents()
                self._plan = None
                if self._unhook is None:
                    self._hook()
            self._recording = True
            try:
                began_s = time.perf_counter()
                self.module(*args, **kwargs)
                if time.perf_counter() - began_s < _QUICK_S:
                    # The first pass of a process is slow in ways that the following ones are not.
                    self.module(*args, **kwargs)
            finally:
                self._recording = False
            self._make_plan(self._last_uses)
            self._last_uses = []

    @property
    def plan(self) -> Plan:
        """What every pass does, from the warm-up on. `print(rt.plan)` tells it."""
        if self._plan is None:
            raise LitrtError("there is no plan yet: call warmup(sample_input), or run one pass.")
        return self._plan

    def stats(self) -> Stats:
        """Returns what has happened so far."""
        counters = self._pipeline.counters
        return Stats(
            n_passes=self._n_passes,
            n_hits=counters.n_hits,
            n_late=counters.n_late,
            n_faults=counters.n_faults,
            read_bytes=counters.read_bytes,
            stall_s=counters.stall_s,
            peak_bytes=self._pipeline.cache.peak_bytes,
            budget_bytes=max(self._budget_bytes, self._pipeline.budget_bytes),
            resident_bytes=self._pipeline.resident_bytes,
        )

    def close(self) -> None:
        """Gives back all memory and ends the threads. The module's weights cannot be used any more."""
        with self._pass_lock:
            if self._stop.alive:
                self._residents.evict_all()
                if self._unhook is not None:
                    self._unhook()
                self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # The main loop: one pass of the root module after the other.

    def _hook(self) -> None:
        """Wraps the root's forward, to see passes begin and end, and torch's fused modules."""
        module = self.module
        unwrap_fused = wrap_fused(module)
        forward = module.forward  # the root may itself be such a module

        @functools.wraps(forward)
        def one_pass(*args: Any, **kwargs: Any) -> Any:
            with self._pass_lock:
                if self._in_pass:
                    return forward(*args, **kwargs)
                return self._run_pass(forward, args, kwargs)

        own = vars(module).get("forward")
        vars(module)["forward"] = one_pass

        def unhook() -> None:
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own
            unwrap_fused()
            self._unhook = None

        self._unhook = unhook

    def _run_pass(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._in_pass = True
        self._pipeline.begin_pass(counting=not self._recording)
        try:
            with torch.no_grad():
                result = forward(*args, **kwargs)
            uses, n_mismatches = self._pipeline.end_pass()
        finally:
            self._in_pass = False
        self._n_passes += not self._recording
        if self._recording:
            self._last_uses = uses
        elif self._plan is None:
            self._make_plan(uses)
        elif n_mismatches:
            self._reconsider(uses)
        else:
            self._last_uses = []
        return result

    def _make_plan(self, uses: list[Use]) -> None:
        bandwidth_bps, latency_s = self._pipeline.measured()
        trace = Trace(self._segments, tuple(uses), bandwidth_bps, latency_s)
        self._follow(make_plan(trace, self._arena.limit_bytes, policy=self._policy))

    def _follow(self, plan: Plan) -> None:
        self._plan = plan
        self._pipeline.start(plan)
        self._residents.settle(plan.resident)
        if (
            all(segment.is_slot or index in plan.resident for index, segment in enumerate(self._segments))
            and self._residents.all_plain
            and self._unhook is not None
        ):
            self._unhook()

    def _reconsider(self, uses: list[Use]) -> None:
        """Plans anew what streams, once two passes in a row have strayed from the plan in the same way."""
        again = [use.segments for use in uses] == [use.segments for use in self._last_uses]
        self._last_uses = uses
        if again and self._policy == "belady" and self._plan is not None:
            self._follow(replan(self._plan, uses))
            self._last_uses = []
