"""The runtime: builds the model, records a pass, plans, and lets the pipeline execute the plan."""

from __future__ import annotations

import contextlib
import functools
import os
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, get_args

import torch
from torch import nn

from litrt.budget import requested_bytes, settle_host
from litrt.device import Device
from litrt.devices import open_device
from litrt.errors import ClosedError, LitrtError, WeightWriteError
from litrt.guards import check_eval, guard, norms
from litrt.link import Link
from litrt.onlookers import Onlookers
from litrt.passes import FORWARD, Passes
from litrt.paths import signature
from litrt.patience import READ_TIMEOUT_S
from litrt.pipeline import Pipeline
from litrt.placeholder import Placeholder
from litrt.plan import Plan, Policy
from litrt.planner import Planner
from litrt.residents import Residents
from litrt.serving import Weights, serve
from litrt.shared import Need, SharedBudget
from litrt.skeleton import build, check_kinds, furnish, match, slots
from litrt.stats import Stats
from litrt.store import Store, open_store
from litrt.trace import Trace, Use
from litrt.tune import most_threads
from litrt.units import parse_bytes

_QUICK_S = 1.0
"""Warm-up passes of less than this are run again."""

_alive: weakref.WeakSet[Runtime] = weakref.WeakSet()


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
            works, or `"auto"`: on the CPU half of the memory that is available, on CUDA what the device has free
            less the activations of the warm-up and a reserve; or a `litrt.SharedBudget`, of which it has a share.
            Activations are not included. `set_budget` changes it.
        device: Where weights are used: `"cpu"`, `"cuda"`, `"cuda:1"`; or a `litrt.testing.FakeDevice`.
        policy: `"belady"` keeps a fixed part and streams the rest ahead of its use; `"lru"` loads on demand and
            evicts what was used longest ago, for comparison.
        n_threads: Threads that read; by default what a short measurement of a large store finds to be enough.
        strict: Raise TraceMismatchError where a pass strays from the recorded one, instead of loading on demand.
        host_budget: On CUDA, the most bytes of page-locked host memory for what streams to the device: `"auto"` for
            half of what is available, `0` for no more than copies need. What is resident on the device has no copy
            in it. Of no use on the CPU.
        dtype: Serve floating weights in this dtype, whatever the store has: stored bytes are moved, and cast where
            they are used. Buffers that the constructor makes stay as they are.
        read_timeout_s: Seconds to wait for a read before it is taken to have stalled, which is a StalledReadError; more
            where reads take longer than a fourth of that. None waits for ever.

    Attributes:
        module: The model. Call it, its children, or any method of theirs: `rt.module.generate(...)`.

    Raises:
        BudgetError: If `budget` cannot be read, or cannot hold the largest weight.
        StoreError: If `store` is not a complete store.
        SkeletonError: If its names or shapes are not the model's.
        DeviceError: If there is no such device.
        ValueError: If another argument cannot be read.
    """

    module: nn.Module

    def __init__(
        self,
        model_ctor: Callable[[], nn.Module],
        store: str | os.PathLike[str] | Store,
        budget: int | str | SharedBudget = "auto",
        device: str | torch.device | Device = "cpu",
        *,
        policy: Policy = "belady",
        n_threads: int | None = None,
        strict: bool = False,
        host_budget: int | str = "auto",
        dtype: torch.dtype | str | None = None,
        read_timeout_s: float | None = READ_TIMEOUT_S,
    ) -> None:
        if policy not in get_args(Policy):
            raise ValueError(f"policy {policy!r} is not known: use 'belady' or 'lru'.")
        if n_threads is not None and (not isinstance(n_threads, int) or n_threads < 1):
            raise ValueError(f"n_threads must be a positive int, not {n_threads!r}.")
        if read_timeout_s is not None and not read_timeout_s > 0:
            raise ValueError(f"read_timeout_s must be a positive number of seconds or None, not {read_timeout_s!r}.")
        if not isinstance(budget, SharedBudget) and budget not in ("min", "auto"):
            parse_bytes(budget, of_bytes=10**9)  # cannot be read? Say so before the model is built.
        self._device = open_device(device) if isinstance(device, str | torch.device) else device
        opened = store if isinstance(store, Store) else open_store(store)
        host_bytes = settle_host(host_budget, self._device)

        self.module, deferral = build(model_ctor)
        found = slots(self.module)
        check_kinds(self.module, found, self._device, dtype)
        match(self.module, found, opened)
        self._weights = weights = Weights(self.module, found, opened, self._device, dtype)
        self._shared = budget if isinstance(budget, SharedBudget) else None
        self._n_passes = 0
        self._recording = False
        self._is_suspect = False  # something has begun and not come to a good end
        self._recorded: tuple[list[Use], Hashable] = [], None  # by a warm-up
        self._looks: Hashable = None  # of the inputs of the pass
        self._passes = Passes(self.module, self._pass_begins, self._pass_ends)
        try:
            budget_of = functools.partial(self._join, budget)
            serving = serve(
                weights,
                budget_of,
                n_threads=n_threads,
                host_bytes=host_bytes,
                strict=strict,
                timeout_s=read_timeout_s,
            )
            self._stop = weakref.finalize(self, Pipeline.close, serving.pipeline)
            self._serving = serving
            self._pipeline = serving.pipeline
            self._host = serving.host
            self._budget = serving.budget
            by_name = {info.name: info for info in weights.infos}
            placeholders = furnish(self.module, found, deferral, by_name, self._pipeline, weights.indices, self._device)
            self._residents = Residents(placeholders, self._pipeline, weights.read, is_host=self._device.is_host)
            self._pipeline.cache.evict_resident = self._residents.evict
            self._unguard = guard(self.module, self._residents.find)
            self._norms = norms(self.module)
            self._pipeline.mend = _weakly(self._mend_outside)
            self._pipeline.are_others_computing = Onlookers(self.module).are_computing
            self._planner = Planner(
                serving.settled,
                self._pipeline,
                self._residents,
                serving.loader,
                self._device,
                policy,
                serving.bandwidth_bps,
            )
            self._passes.see()
        except BaseException:
            if hasattr(self, "_stop"):
                self._stop()
            if self._shared is not None:
                self._shared.leave(self)
            raise
        _alive.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module: one pass. The first one is recorded, unless `warmup` was called."""
        self._check_open()
        if self._passes.are_seen:
            with torch.no_grad():
                return self.module(*args, **kwargs)
        check_eval(self._norms, self._residents.find)
        self._n_passes += 1
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def warmup(self, *args: Any, method: str = FORWARD, **kwargs: Any) -> None:
        """Runs a pass, inside the budget, to record which operators use which weights; then plans and fills memory.

        A quick pass is run twice, the second time for its timings. A second warm-up, with other inputs or of another
        method, adds a plan to those before.

        Args:
            *args: A sample input; later inputs should take the same path through the module.
            method: What to call with it: a method of the module, or of a part of it (`"decode"`, `"vae.decode"`), or a
                part (`"encoder"`). Its calls are passes from now on, like those of the module itself.
            **kwargs: Likewise.

        Raises:
            ValueError: If there is no such method.
            LitrtError: If called in a pass, or if the method uses no weights.
        """
        self._check_open()
        with self._passes.lock:
            if self._passes.is_in_one:
                raise LitrtError("a pass cannot be warmed up inside of another one: call warmup before or after it.")
            self._mend()
            self._check_unwritten()
            self._passes.add(method)
            if self._planner.plan is not None:
                self._planner.begin()
                self._rehook()
            self._recording = True
            self._device.peak_bytes()
            try:
                run = self._passes.function(method)
                with torch.no_grad():
                    began_s = time.perf_counter()
                    run(*args, **kwargs)
                    if time.perf_counter() - began_s < _QUICK_S:
                        # The first pass of a process is slow in ways that the following ones are not.
                        run(*args, **kwargs)
                if method != FORWARD and not any(use.segments or use.table is not None for use in self._recorded[0]):
                    raise LitrtError(
                        f"{method!r} used no weights, so that there is nothing to plan: warm up what uses them. (A "
                        "generator uses them later, when it is asked for values.)"
                    )
                self._planner.record(*self._recorded)
            finally:
                self._recording = False
                self._recorded = [], None
            self._rehook()
            self._is_suspect = False

    def set_budget(self, budget: int | str) -> None:
        """Changes the budget between passes. Weights that stay in the old one and in the new one are not read again.

        Args:
            budget: As in `litrt.Runtime`. More than the model needs is as much as it needs.

        Raises:
            BudgetError: If it cannot be read, is too small, or somebody holds a weight, or a view of one, where there
                would be no memory. The budget is then what it was.
            LitrtError: If called in a pass, or if the budget is a share of a `litrt.SharedBudget`.
        """
        self._check_open()
        if self._shared is not None:
            raise LitrtError("this runtime has a share of a litrt.SharedBudget, which is divided anew by itself.")
        with self._passes.lock:
            self._set_budget(budget)

    def _set_budget(self, budget: int | str) -> None:
        if self._passes.is_in_one:
            raise LitrtError("the budget cannot be changed in a pass: call set_budget before or after it.")
        self._mend()
        self._residents.check()
        n_threads, scratch_bytes = self._serving.n_threads, self._serving.scratch_bytes
        if self._device.is_host:
            held_bytes = self._pipeline.cache.arena.held_bytes
            asked_bytes = requested_bytes(budget, self.total_bytes, held_bytes)
            if budget != "min" and asked_bytes is not None:
                budget = asked_bytes
            per_thread_bytes = self._serving.scratch_bytes_per_thread
            if not self._serving.is_n_threads_fixed:
                n_threads = most_threads(n_threads, asked_bytes, per_thread_bytes)
            scratch_bytes = n_threads * per_thread_bytes
        self._planner.change(self._weights.settle(budget, scratch_bytes), n_threads)
        self._budget = budget
        self._rehook()
        self._is_suspect = False

    # What a shared budget asks.

    def _join(self, budget: int | str | SharedBudget, scratch_bytes: int) -> int | str:
        """Returns a budget of its own: the share of a shared one, told what reads need beside the arena."""
        if not isinstance(budget, SharedBudget):
            return budget
        least = self._weights.settle("min", scratch_bytes)
        alone_bytes = self._weights.alone_bytes(least)
        return budget.join(self, Need(alone_bytes + scratch_bytes, least.footprint_bytes + scratch_bytes))

    def _need(self) -> Need:
        footprint_bytes = self._weights.settle("min", 0).footprint_bytes
        return Need(self.min_budget_bytes, footprint_bytes + self._serving.scratch_bytes)

    def _take_share(self, n_bytes: int, *, wait: bool) -> bool:
        if not self._passes.lock.acquire(blocking=wait):
            return False
        try:
            if self._passes.is_in_one or not self._stop.alive:
                return False
            self._set_budget(n_bytes)
        finally:
            self._passes.lock.release()
        return True

    @property
    def _has_bytes(self) -> int:
        return max(self._planner.settled.budget_bytes, self._pipeline.budget_bytes)

    @property
    def _is_in_pass_here(self) -> bool:
        if not self._passes.lock.acquire(blocking=False):
            return False  # another thread's
        try:
            return self._passes.is_in_one
        finally:
            self._passes.lock.release()

    @contextmanager
    def at_budget(self, budget: int | str) -> Iterator[Self]:
        """Has another budget for a while: `with rt.at_budget("2GB"): ...`. See `set_budget`."""
        before = self._budget
        self.set_budget(budget)
        try:
            yield self
        finally:
            if self._stop.alive:
                self.set_budget(before)

    @property
    def plan(self) -> Plan:
        """What every pass does, from the warm-up on. `print(rt.plan)` tells it."""
        if self._planner.plan is None:
            raise LitrtError("there is no plan yet: call warmup(sample_input), or run one pass.")
        return self._planner.plan

    @property
    def trace(self) -> Trace:
        """What the warm-up recorded, for which the plan was made."""
        if self._planner.trace is None:
            raise LitrtError("there is no trace yet: call warmup(sample_input), or run one pass.")
        return self._planner.trace

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights, of which a budget can be a percentage."""
        return self._weights.total_bytes

    @property
    def min_budget_bytes(self) -> int:
        """The smallest budget that works: for passes like the recorded ones; before that, for each weight alone."""
        least = self._weights.settle("min", self._serving.scratch_bytes)
        return max(self._weights.alone_bytes(least), self._planner.least_bytes(least)) + self._serving.scratch_bytes

    def state_dict(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the names and the true tensors of the module's state dict, one at a time, in memory of their own.

        `rt.module.state_dict()` has what stands for them, and loads nothing. What is read here is not in the budget.
        """
        self._check_open()
        self._residents.check()
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if isinstance(tensor, Placeholder):
                yield name, self._weights.read(tensor._litrt_index)
            else:
                yield name, tensor.detach().clone()

    def detach(self) -> nn.Module:
        """Loads all weights into memory of their own, closes the runtime, and returns the module: a plain one.

        Raises:
            LitrtError: If something holds a weight in a way that litrt cannot follow.
        """
        self._check_open()
        with self._passes.lock:
            self._mend()
            with self._pipeline.alone():
                self._residents.check()
                self._residents.detach()
        self.close()
        return self.module

    def _check_open(self) -> None:
        if not self._stop.alive:
            raise ClosedError("this runtime is closed: make a new litrt.Runtime to use its model again.")

    def stats(self) -> Stats:
        """Returns what has happened so far."""
        counters = self._pipeline.count()
        host = self._host.count() if self._host is not None else None
        loader = self._serving.loader
        return Stats(
            n_passes=self._n_passes,
            n_hits=counters.n_hits,
            n_late=counters.n_late,
            n_faults=counters.n_faults,
            read_bytes=counters.read_bytes if host is None else host.read_bytes,
            stall_s=counters.stall_s + counters.link_stall_s,
            peak_bytes=self._pipeline.cache.peak_bytes,
            budget_bytes=self._has_bytes,
            resident_bytes=self._pipeline.resident_bytes,
            gathered_bytes=counters.gathered_bytes if host is None else host.gathered_bytes,
            link_bytes=0 if host is None else counters.read_bytes,
            link_stall_s=counters.link_stall_s,
            disk_stall_s=0.0 if host is None else host.stall_s,
            host_peak_bytes=0 if self._host is None else self._host.peak_bytes,
            link_bps=loader.link_bps if isinstance(loader, Link) else 0.0,
        )

    @property
    def host_plan(self) -> Plan | None:
        """What every pass reads into host memory, where the device is not the CPU and anything streams to it."""
        return self._host.plan if self._host is not None else None

    def close(self) -> None:
        """Gives back all memory and ends the threads. The module's weights cannot be used any more.

        Raises:
            WeightWriteError: If weights that stayed were written to; all the same, the runtime is closed.
        """
        with self._passes.lock:
            if not self._stop.alive:
                return
            try:
                self._residents.check_at_end()
            finally:
                self._residents.evict_all(look=False)
                self._unguard()
                self._passes.unsee()
                self._stop()
                if self._shared is not None:
                    self._shared.leave(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(*([] if exc is None else [WeightWriteError])):  # the first error says more
            self.close()

    # The main loop: one pass after the other.

    def _pass_begins(self, method: str, args: Any, kwargs: Any) -> None:
        self._mend()
        self._check_unwritten()
        self._looks = method, signature(args, kwargs)
        if not self._recording:
            self._planner.expect(self._looks)
        self._pipeline.begin_pass(counting=not self._recording)

    def _mend(self) -> None:
        """Puts right what the last pass, or change of plans, has left half done where it came to no good end."""
        if self._is_suspect or self._pipeline.may_be_unsound:
            self._planner.mend()
        self._is_suspect = True

    def _mend_outside(self) -> None:
        """Mends before a use of weights outside of a pass, unless another thread is about to begin one, or ends it."""
        if self._passes.lock.acquire(blocking=False):
            try:
                if not self._passes.is_in_one:
                    self._planner.mend()
            finally:
                self._passes.lock.release()

    def _pass_ends(self, is_whole: bool) -> None:
        try:
            if is_whole:
                self._residents.check(addresses=False)
                n_mismatches = self._pipeline.end_pass()
        finally:
            self._pipeline.leave_pass()
        if not is_whole:
            with contextlib.suppress(LitrtError):  # then it is tried again before the next one
                self._planner.mend()
            return
        if self._recording:
            self._recorded = self._pipeline.uses(), self._looks
        else:
            self._n_passes += 1
            self._planner.ended(n_mismatches, self._looks)
            self._rehook()
            self._is_suspect = False

    def _rehook(self) -> None:
        """Sees passes where there is anything to do in them."""
        if self._planner.is_all_plain:
            self._passes.unsee()
        else:
            self._passes.see()

    def _check_unwritten(self) -> None:
        """Raises WeightWriteError where weights that stay were written to, or would be in a pass."""
        self._residents.check()
        check_eval(self._norms, self._residents.find)


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Returns a function that calls a method, of an object that may be gone, and does not keep that alive."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        found = reference()
        if found is not None:
            found()

    return call


def _forked() -> None:
    for runtime in list(_alive):
        runtime._passes.forked()
        runtime._pipeline.forked()


os.register_at_fork(after_in_child=_forked)
