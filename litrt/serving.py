"""What a runtime serves, and from where: the weights of a model in a store, and the pipeline that gets them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from litrt.arena import Arena
from litrt.arrays import floating_dtype
from litrt.budget import Budget, largest_segment, part_bytes, requested_bytes, settle
from litrt.device import Device
from litrt.link import HostTier, Link
from litrt.loader import StoreLoader
from litrt.pipeline import Pipeline
from litrt.reader import Reader
from litrt.skeleton import Slot, tables
from litrt.store import Store
from litrt.tensors import TensorInfo
from litrt.tune import LOCAL, Tuning, tune

_WARMUP_SHARE = 0.5
"""Share of a device's free memory that a warm-up may take which is to find out how much is needed."""


class Weights:
    """The weights of a model, as they are served; one that has several names once.

    Args:
        module: The model.
        found: Where its weights belong, each with its name in the store.
        store: Where they are.
        device: Where they are used.
        dtype: What floating ones are served in, or None for what is stored.

    Attributes:
        infos: What they are when they are served; their place here is their number everywhere.
        stored: What they are in the store.
        indices: Names to numbers.
        tables: Numbers of those of which parts may be there without the rest.
        reader: Reads them.

    Raises:
        ValueError: If `dtype` is no floating dtype.
    """

    def __init__(
        self, module: nn.Module, found: list[Slot], store: Store, device: Device, dtype: torch.dtype | str | None
    ) -> None:
        self.device = device
        self.reader = Reader(store)
        self.stored = [store[name] for name in dict.fromkeys(slot.stored for slot in found)]
        self.infos = self.stored
        if dtype is not None:
            self.infos = [info.cast(floating_dtype(dtype, "serve weights in")) for info in self.stored]
        self.indices = {info.name: index for index, info in enumerate(self.infos)}
        parts = {info.name for info in self.stored if info.nbytes and info.readable.largest_bytes < info.nbytes}
        # What is one piece has to be read whole in any case; over a link, there is less to copy.
        named = [
            name
            for name in tables(module, found)
            if name in parts or not (device.is_host or len(store[name].shape) > 2)
        ]
        self._of_rows = frozenset(name for name in named if store[name].nbytes)
        self.slot_bytes = {
            name: part_bytes(store[name], self.infos[self.indices[name]]) for name in sorted(self._of_rows | parts)
        }
        self.tables = frozenset(self.indices[name] for name in self.slot_bytes)

    @property
    def total_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(info.nbytes for info in self.infos)

    @property
    def casts(self) -> dict[str, torch.dtype]:
        """Those that are served in another dtype than they are stored in."""
        pairs = zip(self.infos, self.stored, strict=True)
        return {info.name: info.dtype for info, stored in pairs if info.dtype != stored.dtype}

    @property
    def matrices(self) -> dict[int, int]:
        """Those of which rows are taken, to their bytes."""
        of_rows = (self.indices[name] for name in sorted(self._of_rows) if len(self.reader.store[name].shape) == 2)
        return {index: self.infos[index].nbytes for index in of_rows}

    def settle(self, budget: int | str, scratch_bytes: int) -> Budget:
        """Returns the bytes of a budget, and how weights lie in the arena with it.

        Raises:
            BudgetError: If it cannot be read, or cannot hold the largest weight.
        """
        return settle(
            budget,
            self.infos,
            scratch_bytes,
            self.slot_bytes,
            of_rows=self._of_rows,
            stored=self.stored,
            device=self.device,
        )

    def alone_bytes(self, settled: Budget) -> int:
        """Returns the arena bytes of the largest weight, or of the largest part of one that is never needed whole."""
        largest = largest_segment(settled.segments, self._of_rows)
        return largest.size_bytes if largest is not None else 0

    def tune(self, n_threads: int | None, budget_bytes: int | None, scratch_bytes: int) -> Tuning:
        """Returns with how many threads to read, and tells the reader how many of them at once."""
        tuning = tune(self.reader, self.stored, budget_bytes, scratch_bytes, n_threads=n_threads)
        self.reader.n_in_flight = tuning.n_in_flight
        return tuning

    def read(self, index: int) -> torch.Tensor:
        """Returns one in memory of its own."""
        info = self.infos[index]
        return self.reader.read_tensor(info.name).to(device=self.device.torch_device, dtype=info.dtype)


@dataclass(frozen=True, slots=True)
class Serving:
    """The pipeline of a model's weights, and what it was made with.

    Attributes:
        pipeline: Serves them.
        loader: Loads them into its arena.
        host: The tier between the store and a device; None where the device is the host.
        budget: As it was asked for, in bytes where that is known.
        settled: What it came to.
        n_threads: Threads that read into the arena.
        is_n_threads_fixed: Whether another budget cannot have others.
        scratch_bytes: What those need beside the arena.
        bandwidth_bps: Bytes per second of the store; 0 where that was not measured.
    """

    pipeline: Pipeline
    loader: StoreLoader | Link
    host: HostTier | None
    budget: int | str
    settled: Budget
    n_threads: int
    is_n_threads_fixed: bool
    scratch_bytes: int
    bandwidth_bps: float

    @property
    def scratch_bytes_per_thread(self) -> int:
        """What one thread needs beside the arena."""
        return self.scratch_bytes // self.n_threads


def serve(
    weights: Weights,
    budget_of: Callable[[int], int | str],
    *,
    n_threads: int | None,
    host_bytes: int,
    strict: bool,
    timeout_s: float | None,
) -> Serving:
    """Starts the pipeline that serves weights.

    Args:
        weights: The weights.
        budget_of: Returns the budget, told how many bytes reads need beside the arena.
        n_threads: Threads that read, or None for what is measured to be enough.
        host_bytes: Of the tier between the store and a device.
        strict: Refuse what a plan did not predict.
        timeout_s: Seconds after which a read is taken to have stalled, at least.

    Raises:
        BudgetError: If the budget cannot be read, or cannot hold the largest weight.
    """
    if weights.device.is_host:
        return _serve_from_store(weights, budget_of, n_threads, strict=strict, timeout_s=timeout_s)
    return _serve_over_link(weights, budget_of, n_threads, host_bytes, strict=strict, timeout_s=timeout_s)


def _serve_from_store(
    weights: Weights,
    budget_of: Callable[[int], int | str],
    n_threads: int | None,
    *,
    strict: bool,
    timeout_s: float | None,
) -> Serving:
    loader = StoreLoader(weights.reader, weights.casts)
    budget = budget_of((n_threads or LOCAL.n_threads) * loader.scratch_bytes_per_task)
    asked_bytes = requested_bytes(budget, weights.total_bytes)
    budget = budget if asked_bytes is None else asked_bytes
    tuning = weights.tune(n_threads, asked_bytes, loader.scratch_bytes_per_task)
    scratch_bytes = tuning.n_threads * loader.scratch_bytes_per_task
    settled = weights.settle(budget, scratch_bytes)
    # Of the largest that any budget can ask for, the host gives what is written to.
    arena = Arena(weights.device, settled.most_bytes, settled.arena_bytes)
    return Serving(
        pipeline=_pipeline(weights, settled, loader, arena, tuning.n_threads, strict=strict, timeout_s=timeout_s),
        loader=loader,
        host=None,
        budget=budget,
        settled=settled,
        n_threads=tuning.n_threads,
        is_n_threads_fixed=n_threads is not None,
        scratch_bytes=scratch_bytes,
        bandwidth_bps=tuning.bandwidth_bps or 0.0,
    )


def _serve_over_link(
    weights: Weights,
    budget_of: Callable[[int], int | str],
    n_threads: int | None,
    host_bytes: int,
    *,
    strict: bool,
    timeout_s: float | None,
) -> Serving:
    device, reader = weights.device, weights.reader
    n_threads = weights.tune(n_threads, host_bytes, reader.scratch_bytes_per_task).n_threads
    host = HostTier(
        device, reader, weights.stored, host_bytes, n_threads, weights.tables, weights.slot_bytes.values(), timeout_s
    )
    loader = Link(device, host, weights.stored, weights.infos)
    budget = budget_of(loader.scratch_bytes)
    settled = weights.settle(budget, loader.scratch_bytes)
    capacity_bytes = settled.arena_bytes
    if settled.growable:
        capacity_bytes = min(settled.most_bytes, int(device.free_bytes() * _WARMUP_SHARE))
    arena = Arena(device, capacity_bytes, settled.arena_bytes)
    host.open(weights.matrices, settled.arena_bytes)
    return Serving(
        pipeline=_pipeline(weights, settled, loader, arena, 1, strict=strict, timeout_s=None),
        loader=loader,
        host=host,
        budget=budget,
        settled=settled,
        n_threads=1,
        is_n_threads_fixed=True,
        scratch_bytes=loader.scratch_bytes,
        bandwidth_bps=0.0,
    )


def _pipeline(
    weights: Weights,
    settled: Budget,
    loader: StoreLoader | Link,
    arena: Arena,
    n_threads: int,
    *,
    strict: bool,
    timeout_s: float | None,
) -> Pipeline:
    slots = [TensorInfo.of_bytes(segment.name, segment.nbytes) for segment in settled.segments if segment.is_slot]
    return Pipeline(
        settled.segments,
        [*weights.infos, *slots],
        loader,
        weights.device,
        arena,
        n_threads=n_threads,
        scratch_bytes=settled.scratch_bytes,
        growable=settled.growable,
        strict=strict,
        tables=weights.tables,
        timeout_s=timeout_s,
    )
