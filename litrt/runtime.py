"""The runtime: builds the model, records a pass, plans, and lets the pipeline execute the plan."""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self, get_args

import torch
from torch import nn

from litrt.arena import Arena
from litrt.arrays import floating_dtype
from litrt.budget import as_segments, part_bytes, requested_bytes, settle, settle_host, smallest_bytes
from litrt.device import Device
from litrt.devices import open_device
from litrt.errors import ClosedError, LitrtError
from litrt.frames import refuse_copy, wrap_fused
from litrt.link import HostTier, Link
from litrt.loader import StoreLoader
from litrt.measured import N_PASSES, better_plan, measured_again, typical
from litrt.pipeline import Pipeline
from litrt.placeholder import Placeholder
from litrt.plan import Plan, Policy, make_plan, replan
from litrt.reader import Reader
from litrt.residents import Residents
from litrt.skeleton import build, check_kinds, furnish, match, slots, tables
from litrt.stats import Stats
from litrt.store import Store, TensorInfo, open_store
from litrt.tables import with_room
from litrt.trace import Trace, Use
from litrt.tune import Tuning, tune
from litrt.units import parse_bytes

_WARMUP_SHARE = 0.5
"""Share of a device's free memory that a warm-up may take which is to find out how much is needed."""

_RESERVE_BYTES = 512 << 20
"""Memory of a device that a budget of "auto" leaves free, beside the activations of the warm-up."""

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
            less the activations of the warm-up and a reserve. Activations are not included.
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
        budget: int | str = "auto",
        device: str | torch.device | Device = "cpu",
        *,
        policy: Policy = "belady",
        n_threads: int | None = None,
        strict: bool = False,
        host_budget: int | str = "auto",
        dtype: torch.dtype | str | None = None,
    ) -> None:
        if policy not in get_args(Policy):
            raise ValueError(f"policy {policy!r} is not known: use 'belady' or 'lru'.")
        if n_threads is not None and (not isinstance(n_threads, int) or n_threads < 1):
            raise ValueError(f"n_threads must be a positive int, not {n_threads!r}.")
        if budget not in ("min", "auto"):
            parse_bytes(budget, of_bytes=10**9)  # cannot be read? Say so before the model is built.
        self._device = open_device(device) if isinstance(device, str | torch.device) else device
        opened = store if isinstance(store, Store) else open_store(store)
        host_bytes = settle_host(host_budget, self._device)

        self.module, deferral = build(model_ctor)
        found = slots(self.module)
        check_kinds(self.module, found, self._device, dtype)
        match(self.module, found, opened)
        stored = [opened[name] for name in dict.fromkeys(slot.stored for slot in found)]
        infos = stored if dtype is None else [info.cast(floating_dtype(dtype, "serve weights in")) for info in stored]
        indices = {info.name: index for index, info in enumerate(infos)}
        reader = Reader(opened)
        parts = {info.name for info in stored if info.nbytes and info.readable.largest_bytes < info.nbytes}
        # What is one piece has to be read whole in any case; over a link, there is less to copy.
        named = [
            name
            for name in tables(self.module, found)
            if name in parts or not (self._device.is_host or len(opened[name].shape) > 2)
        ]
        slot_bytes = {name: part_bytes(opened[name], infos[indices[name]]) for name in named if opened[name].nbytes}
        table_indices = frozenset(indices[name] for name in {*slot_bytes, *parts})
        self._host: HostTier | None = None
        self._bandwidth_bps = 0.0  # of the store, where it was measured
        loader: StoreLoader | Link
        if self._device.is_host:
            casts = {
                info.name: info.dtype for info, other in zip(infos, stored, strict=True) if info.dtype != other.dtype
            }
            loader = StoreLoader(reader, casts)
            asked_bytes = requested_bytes(budget, sum(info.nbytes for info in infos))
            tuning = self._tuned(n_threads, reader, stored, asked_bytes, loader.scratch_bytes_per_task)
            n_threads, self._bandwidth_bps = tuning.n_threads, tuning.bandwidth_bps or 0.0
            scratch_bytes = n_threads * loader.scratch_bytes_per_task
        else:
            n_threads = self._tuned(n_threads, reader, stored, host_bytes, reader.scratch_bytes_per_task).n_threads
            self._host = HostTier(
                self._device, reader, stored, host_bytes, n_threads, table_indices, slot_bytes.values()
            )
            loader = Link(self._device, self._host, stored, infos)
            n_threads, scratch_bytes = 1, loader.scratch_bytes
        self._loader = loader
        self._reader = reader
        self._infos = infos
        self._stored = stored
        self._scratch_bytes = scratch_bytes
        self._tables = frozenset(slot_bytes)
        settled = settle(budget, infos, scratch_bytes, slot_bytes, stored=stored, device=self._device)
        self._settled = settled
        self._policy: Policy = policy
        self._plan: Plan | None = None
        self._trace: Trace | None = None
        self._n_passes = 0
        self._last_uses: list[Use] = []
        self._measured: list[tuple[list[Use], int, float]] = []  # of passes: uses, bytes read, seconds of reading
        self._is_settled = False
        self._recording = False
        self._pass_lock = threading.RLock()
        self._in_pass = False
        self._unhook: Callable[[], None] | None = None
        capacity_bytes = settled.capacity_bytes
        if settled.growable and not self._device.is_host:
            capacity_bytes = min(capacity_bytes, int(self._device.free_bytes() * _WARMUP_SHARE))
        self._arena = Arena(self._device, capacity_bytes, settled.arena_bytes)
        if self._host is not None:
            gathered = {indices[name] for name in slot_bytes if len(opened[name].shape) == 2}  # stacks are multiplied
            self._host.open({index for index in gathered if infos[index].nbytes > settled.arena_bytes // 2})
        in_arena = [
            TensorInfo.of_bytes(segment.name, segment.nbytes) for segment in settled.segments if segment.is_slot
        ]
        self._pipeline = Pipeline(
            settled.segments,
            [*infos, *in_arena],
            loader,
            self._device,
            self._arena,
            n_threads=n_threads,
            scratch_bytes=settled.scratch_bytes,
            growable=settled.growable,
            strict=strict,
            tables=table_indices,
        )
        self._stop = weakref.finalize(self, Pipeline.close, self._pipeline)
        try:
            by_name = {info.name: info for info in infos}
            placeholders = furnish(self.module, found, deferral, by_name, self._pipeline, indices, self._device)
            self._residents = Residents(placeholders, self._pipeline, is_host=self._device.is_host)
            self._pipeline.cache.evict_resident = self._residents.evict
            self._hook()
        except BaseException:
            self._stop()
            raise
        _alive.add(self)

    @staticmethod
    def _tuned(
        n_threads: int | None, reader: Reader, stored: list[TensorInfo], budget_bytes: int | None, scratch_bytes: int
    ) -> Tuning:
        """Returns with how many threads to read, and tells the reader how many of them at once."""
        tuning = tune(reader, stored, budget_bytes, scratch_bytes, n_threads=n_threads)
        reader.n_in_flight = tuning.n_in_flight
        return tuning

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module: one pass. The first one is recorded, unless `warmup` was called."""
        self._check_open()
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
        self._check_open()
        with self._pass_lock:
            if self._plan is not None:
                self._unfollow()
            self._is_settled = False
            self._recording = True
            self._device.peak_bytes()
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

    @property
    def trace(self) -> Trace:
        """What the warm-up recorded, for which the plan was made."""
        if self._trace is None:
            raise LitrtError("there is no trace yet: call warmup(sample_input), or run one pass.")
        return self._trace

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights, of which a budget can be a percentage."""
        return sum(info.nbytes for info in self._infos)

    @property
    def min_budget_bytes(self) -> int:
        """The smallest budget that works: for a pass like the recorded one; before that, for each weight alone."""
        align_bytes = None if self._device.is_host else self._device.align_bytes
        segments = as_segments(self._infos, self._stored, align_bytes)
        return smallest_bytes(self._trace, segments, self._scratch_bytes, self._tables)

    def state_dict(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the names and the true tensors of the module's state dict, one at a time, in memory of their own.

        `rt.module.state_dict()` has what stands for them, and loads nothing. What is read here is not in the budget.
        """
        self._check_open()
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if isinstance(tensor, Placeholder):
                yield name, self._read_whole(tensor._litrt_index)
            else:
                yield name, tensor.detach().clone()

    def detach(self) -> nn.Module:
        """Loads all weights into memory of their own, closes the runtime, and returns the module: a plain one.

        Raises:
            LitrtError: If something holds a weight in a way that litrt cannot follow.
        """
        self._check_open()
        with self._pass_lock, self._pipeline.alone():
            self._residents.detach(self._read_whole)
        self.close()
        return self.module

    def _read_whole(self, index: int) -> torch.Tensor:
        """Returns a weight in memory of its own."""
        info = self._infos[index]
        return self._reader.read_tensor(info.name).to(device=self._device.torch_device, dtype=info.dtype)

    def _check_open(self) -> None:
        if not self._stop.alive:
            raise ClosedError("this runtime is closed: make a new litrt.Runtime to use its model again.")

    def stats(self) -> Stats:
        """Returns what has happened so far."""
        counters = self._pipeline.count()
        host = self._host.count() if self._host is not None else None
        return Stats(
            n_passes=self._n_passes,
            n_hits=counters.n_hits,
            n_late=counters.n_late,
            n_faults=counters.n_faults,
            read_bytes=counters.read_bytes if host is None else host.read_bytes,
            stall_s=counters.stall_s + counters.link_stall_s,
            peak_bytes=self._pipeline.cache.peak_bytes,
            budget_bytes=max(self._settled.budget_bytes, self._pipeline.budget_bytes),
            resident_bytes=self._pipeline.resident_bytes,
            gathered_bytes=counters.gathered_bytes if host is None else host.gathered_bytes,
            link_bytes=0 if host is None else counters.read_bytes,
            link_stall_s=counters.link_stall_s,
            disk_stall_s=0.0 if host is None else host.stall_s,
            host_peak_bytes=0 if self._host is None else self._host.peak_bytes,
            link_bps=self._loader.link_bps if isinstance(self._loader, Link) else 0.0,
        )

    @property
    def host_plan(self) -> Plan | None:
        """What every pass reads into host memory, where the device is not the CPU and anything streams to it."""
        return self._host.plan if self._host is not None else None

    def close(self) -> None:
        """Gives back all memory and ends the threads. The module's weights cannot be used any more."""
        with self._pass_lock:
            if self._stop.alive:
                self._residents.evict_all(keep_written=False)
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
        vars(module)["__deepcopy__"] = refuse_copy

        def unhook() -> None:
            vars(module).pop("forward", None)
            vars(module).pop("__deepcopy__", None)
            if own is not None:
                vars(module)["forward"] = own
            unwrap_fused()
            self._unhook = None

        self._unhook = unhook

    def _run_pass(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            self._in_pass = True
            self._pipeline.begin_pass(counting=not self._recording)
            with torch.no_grad():
                result = forward(*args, **kwargs)
            n_mismatches = self._pipeline.end_pass()
        finally:
            self._in_pass = False
            self._pipeline.leave_pass()
        self._n_passes += not self._recording
        if self._recording:
            self._last_uses = self._pipeline.uses()
        elif self._plan is None:
            self._make_plan(self._pipeline.uses())
        elif n_mismatches:
            self._reconsider(self._pipeline.uses())
        else:
            self._last_uses = []
            self._measure_again()
        return result

    def _make_plan(self, uses: list[Use]) -> None:
        bandwidth_bps, latency_s = self._pipeline.measured()
        # Loads on demand take turns with computing, into memory that is touched for the first time: they are slower.
        bandwidth_bps = max(bandwidth_bps, self._bandwidth_bps)
        self._fit_arena()
        if isinstance(self._loader, Link):
            used_bytes = Trace(self._settled.segments, tuple(uses), 1.0).used_bytes
            bandwidth_bps, latency_s = self._loader.effective_bps(used_bytes, self._arena.limit_bytes), 0.0
        trace = Trace(self._settled.segments, tuple(uses), bandwidth_bps, latency_s)
        self._trace = with_room(trace, *self._pipeline.room_bytes, self._arena.limit_bytes)
        self._follow(make_plan(self._trace, self._arena.limit_bytes, policy=self._policy))

    def _fit_arena(self) -> None:
        """Gives an arena that has grown on a device the size that it is to have, if nobody is in the way."""
        if self._device.is_host or not self._settled.growable:
            return
        limit_bytes = self._arena.limit_bytes
        if self._settled.is_auto:
            room_bytes = self._device.free_bytes() + self._arena.capacity_bytes - _RESERVE_BYTES
            activation_bytes = max(self._device.peak_bytes() - self._arena.capacity_bytes, 0)
            footprint_bytes = sum(segment.size_bytes for segment in self._settled.segments)
            limit_bytes = max(limit_bytes, min(room_bytes - activation_bytes, footprint_bytes))
        self._pipeline.resize(limit_bytes)

    def _follow(self, plan: Plan) -> None:
        self._plan = plan
        self._measured.clear()
        with self._pipeline.alone():  # others would evict what is not settled
            self._pipeline.start(plan)
            self._residents.settle(plan.resident)
        if (
            all(segment.is_slot or index in plan.resident for index, segment in enumerate(self._settled.segments))
            and self._residents.all_plain
            and self._unhook is not None
        ):
            self._unhook()

    def _measure_again(self) -> None:
        """Lets the plan predict with what the first passes that follow it have measured; makes a better one, once."""
        plan = self._plan
        if plan is None or not plan.loads or len(self._measured) >= N_PASSES or not self._device.is_host:
            return
        self._measured.append((self._pipeline.uses(), *self._pipeline.delivered()))
        uses = typical([uses for uses, _, _ in self._measured])
        n_bytes = sum(n_bytes for _, n_bytes, _ in self._measured)
        busy_s = sum(busy_s for _, _, busy_s in self._measured)
        if not n_bytes or not busy_s:
            return
        if len(self._measured) == N_PASSES and not self._is_settled and self._trace is not None:
            self._is_settled = True
            better = better_plan(plan, self._trace, uses, n_bytes / busy_s)
            if better is not None:
                self._change_to(better, plan)
                return
        self._plan = measured_again(plan, uses, n_bytes / busy_s)

    def _change_to(self, plan: Plan, before: Plan) -> None:
        """Follows a plan with other residents, or still the one before where somebody has tensors over those."""
        self._unfollow()
        self._follow(plan if self._pipeline.let_go() else before)

    def _unfollow(self) -> None:
        """Loads on demand; nothing has to stay."""
        self._pipeline.stop()
        self._residents.evict_all()
        self._pipeline.forget_residents()
        self._loader.follow(None)
        self._plan = None
        if self._unhook is None:
            self._hook()

    def _reconsider(self, uses: list[Use]) -> None:
        """Plans anew what streams, once two passes in a row have strayed from the plan in the same way."""
        again = [use.segments for use in uses] == [use.segments for use in self._last_uses]
        self._last_uses = uses
        if again and self._policy == "belady" and self._plan is not None:
            self._follow(replan(self._plan, uses, self._arena.limit_bytes))
            self._last_uses = []


def _forked() -> None:
    for runtime in list(_alive):
        runtime._pass_lock = threading.RLock()  # another thread may have held it, which is not here
        runtime._pipeline.forked()


os.register_at_fork(after_in_child=_forked)
