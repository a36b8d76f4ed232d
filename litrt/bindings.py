"""What the pipeline gives to operators, and what it counts and times meanwhile."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields

import torch

from litrt.cache import Entry


@dataclass(slots=True)
class Counters:
    """What the pipeline counts; see `litrt.Stats`."""

    n_hits: int = 0
    n_late: int = 0
    n_faults: int = 0
    read_bytes: int = 0
    gathered_bytes: int = 0
    stall_s: float = 0.0
    link_stall_s: float = 0.0  # of a device, which the host does not wait for

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(slots=True)
class Binding:
    """Segments that an operator uses, from `acquire` to `release`."""

    indices: tuple[int, ...]
    tensors: list[torch.Tensor]
    step: int | None
    access: int | None
    entries: list[Entry]

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Of rows: which elements of the table they are."""
        part = self.entries[0].part
        return () if part is None else part.ranges


class Timings:
    """How long loads took that somebody waited for."""

    def __init__(self) -> None:
        self._timings: deque[tuple[int, float]] = deque(maxlen=4096)  # (bytes, seconds)

    def add(self, n_bytes: int, seconds: float) -> None:
        """Notes a load."""
        self._timings.append((n_bytes, seconds))

    def bandwidth_bps(self, latency_s: float) -> float:
        """Returns the bytes per second of loads, of which each takes `latency_s` beside its bytes."""
        timed = list(self._timings)
        total_bytes = sum(n_bytes for n_bytes, _ in timed)
        # At least half of the time counts as transfer, however few bytes there were to measure with.
        total_s = sum(max(seconds - latency_s, seconds / 2) for _, seconds in timed)
        return max(total_bytes / max(total_s, 1e-9), 1.0)
