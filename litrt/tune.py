"""How many threads read a store, and how many at once: chosen by a short measurement of the store itself.

What was read is checked, and decoded, by the thread that read it; meanwhile the disk is another one's. More threads
than reads keep both busy. More reads at once than the disk needs end together, and leave it idle together.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from litrt.device import Bytes, CpuDevice
from litrt.errors import CorruptWeightError, StalledReadError
from litrt.patience import READ_TIMEOUT_S, stalled
from litrt.reader import Piece, Reader
from litrt.tensors import TensorInfo

_LEAST_BYTES = 256 << 20
"""Stores that are smaller are read in less time than it takes to measure them well."""

_PIECE_BYTES = 1 << 20
"""Pieces from this size on say what a disk can do."""

_SCRATCH_SHARE = 1 / 20
"""Share of the budget that scratch may take for the sake of speed."""

_SLICE_S = 0.04
_ROUNDS = 2
_TOTAL_S = 0.4
_ENOUGH = 0.97
"""Fewer threads are better than more that gain less than this leaves."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a store is read.

    Attributes:
        n_threads: Threads that read, check and decode.
        n_in_flight: How many of them may wait for the disk at once.
        bandwidth_bps: Bytes per second that were read so, where that was measured.
    """

    n_threads: int
    n_in_flight: int
    bandwidth_bps: float | None = field(default=None, compare=False)


LOCAL = Tuning(2, 2)
"""For what litrt reads itself, where nothing is measured: few large requests reach the speed of most disks."""

THROUGH_ZARR = Tuning(4, 4)
"""zarr-python needs more time for a chunk than the disk."""

REMOTE = Tuning(8, 8)
"""Each request waits for an answer, whatever its size."""

Measure = Callable[[Reader, Sequence[Piece], Tuning], float]

_chosen: dict[tuple[str, int, tuple[Tuning, ...]], Tuning] = {}
"""What was chosen in this process, by the store and by what there was to choose from."""


def candidates(most_threads: int) -> list[Tuning]:
    """Returns what to measure, those with the fewest threads first."""
    found = []
    for n_threads in (2, 3, 4, 6, 8):
        if n_threads <= most_threads:
            found.append(Tuning(n_threads, min(n_threads, 2)))
            if n_threads in (4, 8):
                found.append(Tuning(n_threads, n_threads))
    return found


def choose(samples: Iterable[tuple[Tuning, float]]) -> Tuning:
    """Returns the tuning with the fewest threads that is nearly as fast as the fastest, by bytes per second."""
    measured = list(samples)
    best_bps = max(bps for _, bps in measured)
    enough = [tuning for tuning, bps in measured if bps >= _ENOUGH * best_bps]
    return min(enough, key=lambda tuning: (tuning.n_threads, tuning.n_in_flight))


def tune(
    reader: Reader,
    infos: Sequence[TensorInfo],
    budget_bytes: int | None,
    scratch_bytes: int,
    *,
    n_threads: int | None = None,
    measure: Measure | None = None,
) -> Tuning:
    """Returns how to read weights.

    Args:
        reader: Reads the store.
        infos: The weights that will be read, as they are stored.
        budget_bytes: What scratch, and the memory to measure with, are part of; None where it is as small as can be.
        scratch_bytes: What each thread needs beside the destination.
        n_threads: Threads that were asked for: nothing is left to choose, but their bandwidth is measured.
        measure: Returns bytes per second; by default it reads pieces of the store for a moment.
    """
    asked = Tuning(n_threads, n_threads) if n_threads is not None else None
    room_bytes = int((budget_bytes or 0) * _SCRATCH_SHARE)
    if not reader.store.is_local and not os.path.isfile(reader.store.path):
        return asked or (REMOTE if REMOTE.n_threads * scratch_bytes <= room_bytes else THROUGH_ZARR)
    if not all(info.direct or info.packed for info in infos):
        return asked or THROUGH_ZARR
    pieces = [piece for info in infos for piece in reader.pieces(info.name) if piece.nbytes >= _PIECE_BYTES]
    n_bytes = sum(info.nbytes for info in infos)
    if budget_bytes is None or budget_bytes >= n_bytes or sum(piece.nbytes for piece in pieces) < _LEAST_BYTES:
        return asked or LOCAL  # what is read once, or in no time, is read before it is known how to read it best
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = min(n_cpus + 2, 8, room_bytes // max(scratch_bytes, 1))
    # What is read to measure is held for a moment, and the budget holds for it as well.
    most_held = budget_bytes // (scratch_bytes + max(piece.nbytes for piece in pieces))
    tunings = [tuning for tuning in ([asked] if asked else candidates(most)) if tuning.n_threads <= most_held]
    if not tunings:
        return asked or LOCAL
    assert reader.store.root is not None
    key = (os.path.realpath(reader.store.root), os.stat(reader.store.root).st_ino, tuple(tunings))
    if key not in _chosen:
        _chosen[key] = _measured(reader, pieces, tunings, measure or read_bps)
    return _chosen[key]


def most_threads(n_threads: int, budget_bytes: int | None, scratch_bytes: int) -> int:
    """Returns how many of `n_threads` may read in a smaller budget, of which their scratch is a part."""
    room_bytes = int((budget_bytes or 0) * _SCRATCH_SHARE)
    return min(n_threads, max(room_bytes // max(scratch_bytes, 1), LOCAL.n_threads))


def _measured(reader: Reader, pieces: Sequence[Piece], tunings: list[Tuning], measure: Measure) -> Tuning:
    began_s = time.perf_counter()
    spread = _spread(pieces)
    best_bps: dict[Tuning, float] = {}
    for number, tuning in enumerate(tunings * _ROUNDS):
        # A slow disk takes long for a piece: it is not measured any longer than a fast one.
        spent_s = time.perf_counter() - began_s
        if number and spent_s + spent_s / number > _TOTAL_S:
            break
        start = number * len(spread) // 8 % len(spread)
        try:
            bps = measure(reader, [*spread[start:], *spread[:start]], tuning)
        except (CorruptWeightError, StalledReadError):
            return tunings[0]  # raised again where the weight is used
        # Whatever else the machine does makes a measurement slower, never faster.
        best_bps[tuning] = max(best_bps.get(tuning, 0.0), bps)
    chosen = choose(best_bps.items()) if len(best_bps) > 1 else tunings[0]
    return replace(chosen, bandwidth_bps=best_bps.get(chosen))


def _spread(pieces: Sequence[Piece]) -> list[Piece]:
    """Returns pieces in an order in which neighbours lie far apart."""
    step = max(len(pieces) // 8, 1)
    return [piece for start in range(step) for piece in pieces[start::step]]


def read_bps(reader: Reader, pieces: Sequence[Piece], tuning: Tuning) -> float:
    """Returns the bytes per second of reading `pieces`, in order and over again, for a moment; nothing else reads.

    Raises:
        CorruptWeightError: If one of them cannot be read.
        StalledReadError: If a read has not ended in time.
    """
    most_bytes = max(piece.nbytes for piece in pieces)
    taken = itertools.cycle(pieces)
    lock = threading.Lock()
    began_s = 0.0
    done: list[int] = []
    failed: list[BaseException] = []
    under_way: dict[int, Piece] = {}

    def begin() -> None:
        nonlocal began_s
        began_s = time.perf_counter()

    ready = threading.Barrier(tuning.n_threads, begin)

    def run(number: int, memory: Bytes) -> None:
        memory[:] = 0  # so that its pages are there before the clock starts
        n_bytes = 0
        try:
            ready.wait()
            while True:
                with lock:
                    piece = under_way[number] = next(taken)
                reader.read_part(piece, memory[: piece.nbytes])
                n_bytes += piece.nbytes
                if time.perf_counter() - began_s > _SLICE_S:
                    break
            done.append(n_bytes)
        except BaseException as error:
            failed.append(error.with_traceback(None))
        under_way.pop(number, None)

    before, reader.n_in_flight = reader.n_in_flight, tuning.n_in_flight
    try:
        memories = [CpuDevice().allocate(most_bytes) for _ in range(tuning.n_threads)]
        # Daemons: what has stalled does not keep the process from ending.
        threads = [
            threading.Thread(target=run, args=(number, memory), name=f"litrt-tune-{number}", daemon=True)
            for number, memory in enumerate(memories)
        ]
        for thread in threads:
            thread.start()
        until_s = time.monotonic() + _SLICE_S + READ_TIMEOUT_S
        for thread in threads:
            thread.join(max(until_s - time.monotonic(), 0.0))
        seconds = max(time.perf_counter() - began_s, 1e-9)
        if failed:
            raise failed[0]
        for piece in list(under_way.values()):
            raise stalled(piece, READ_TIMEOUT_S)
        return sum(done) / seconds
    finally:
        reader.n_in_flight = before
