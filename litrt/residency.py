"""Which segments stay: the one choice that a plan makes.

First what is worth most per byte: segments used several times per pass, and those so small that a read costs more in
latency than in bytes. Then water-filling: every use streams what exceeds a common level less what can move while it
computes, in several variants, each rounded to whole segments with the error carried on to the next use. The best of
these by predicted seconds, then by bytes, is polished by local search.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from litrt.bound import Array
from litrt.schedule import Schedule, best_schedule, pass_s
from litrt.trace import Trace

_MAX_SUBSET_OF = 8
"""Segments of one use up to which every subset is tried when rounding."""

_SMALL_SHARE = 1 / 4
"""Share of the spare budget that small segments may take before anything else is chosen."""

_WORK = 60_000
"""Uses times evaluations that a search may cost: about a second."""


def choose_streamed(trace: Trace, budget_bytes: int, seed: int) -> tuple[frozenset[int], Schedule | None]:
    """Returns the segments that stream, and their schedule in the window that is left.

    The schedule is None where the budget is so small that only loading step by step works.
    """
    search = _Search(trace, budget_bytes)
    if search.spare_bytes < 0 or trace.used_bytes <= budget_bytes:
        streamed = frozenset() if trace.used_bytes <= budget_bytes else frozenset(trace.used)
        return streamed, best_schedule(trace, streamed, budget_bytes)
    n_evaluations = max(24, min(500, _WORK // max(len(trace.uses), 1)))
    kept = search.worth_most()
    search.offer(frozenset(trace.used))
    for preferred in {kept, frozenset[int]()}:
        for targets in _water_levels(search, preferred, n_evaluations // 4):
            search.offer(search.rounded(preferred, targets))
    search.polish(random.Random(seed), n_evaluations)
    return search.best, search.best_schedule


class _Search:
    """The best choice so far, by predicted seconds of a pass and then by bytes."""

    def __init__(self, trace: Trace, budget_bytes: int) -> None:
        self.trace = trace
        self.budget_bytes = budget_bytes
        self.sizes = [segment.size_bytes for segment in trace.segments]
        self.used = frozenset(trace.used)
        self.used_bytes = trace.used_bytes
        self.spare_bytes = budget_bytes - trace.largest_use_bytes
        self.parts: list[list[int]] = []
        seen: set[int] = set()
        for use in trace.uses:
            self.parts.append([index for index in dict.fromkeys(use.segments) if index not in seen])
            seen.update(use.segments)
        self.best = self.used
        self.best_schedule: Schedule | None = None
        self.best_cost = (float("inf"), 0)
        self._known: dict[frozenset[int], tuple[float, int]] = {}

    def offer(self, streamed: frozenset[int]) -> bool:
        """Takes `streamed` if it is better than the best; says whether it was."""
        if streamed in self._known:
            return False
        resident_bytes = self.used_bytes - sum(self.sizes[index] for index in streamed)
        schedule = best_schedule(self.trace, streamed, self.budget_bytes - resident_bytes)
        if schedule is None:
            self._known[streamed] = (float("inf"), 0)
            return False
        cost = (pass_s(self.trace, schedule), schedule.streamed_bytes)
        self._known[streamed] = cost
        if not _better(cost, self.best_cost):
            return False
        self.best, self.best_schedule, self.best_cost = streamed, schedule, cost
        return True

    def worth_most(self) -> frozenset[int]:
        """Returns what to keep before anything else: used several times per pass, or too small to be worth a read."""
        n_uses = Counter(index for use in self.trace.uses for index in dict.fromkeys(use.segments))
        latency_bytes = self.trace.latency_s * self.trace.bandwidth_bps

        def worth(index: int) -> float:
            return n_uses[index] * (1 + latency_bytes / max(self.sizes[index], 1))

        kept: set[int] = set()
        room_bytes = self.spare_bytes * _SMALL_SHARE
        for index in sorted(self.used, key=lambda index: (-worth(index), index)):
            if worth(index) < 2:
                break
            # One that is used often, and large, may take all the room that the largest use leaves.
            limit = self.spare_bytes if n_uses[index] > 1 else room_bytes
            if sum(self.sizes[other] for other in kept) + self.sizes[index] <= limit:
                kept.add(index)
        return frozenset(kept)

    def rounded(self, kept: frozenset[int], targets: Array) -> frozenset[int]:
        """Returns segments whose bytes follow `targets` per use, what one use misses carried to the next."""
        streamed: list[int] = []
        carry = 0.0
        for parts, target in zip(self.parts, targets, strict=True):
            free = [index for index in parts if index not in kept]
            wanted = float(target) + carry
            chosen = self._nearest(free, wanted)
            streamed.extend(chosen)
            carry = wanted - sum(self.sizes[index] for index in chosen)
        return frozenset(streamed)

    def _nearest(self, free: Sequence[int], wanted: float) -> tuple[int, ...]:
        if len(free) <= _MAX_SUBSET_OF:
            subsets = (subset for n in range(len(free) + 1) for subset in combinations(free, n))
            return min(subsets, key=lambda subset: abs(sum(self.sizes[index] for index in subset) - wanted))
        chosen = []
        for index in sorted(free, key=lambda index: -self.sizes[index]):
            if self.sizes[index] <= wanted:
                chosen.append(index)
                wanted -= self.sizes[index]
        return tuple(chosen)

    def polish(self, rng: random.Random, n_evaluations: int) -> None:
        """Toggles or swaps one or two segments as long as that makes a pass faster, or as fast with fewer bytes."""
        order = sorted(self.used)
        for _ in range(n_evaluations):
            streamed = sorted(self.best)
            kept = [index for index in order if index not in self.best]
            change = set(self.best)
            move = rng.random()
            if move < 0.4 and streamed:
                change.discard(rng.choice(streamed))
            elif move < 0.5 and kept:
                change.add(rng.choice(kept))
            elif streamed and kept:
                change.discard(rng.choice(streamed))
                change.add(rng.choice(kept))
            self.offer(frozenset(change))


def _better(cost: tuple[float, int], than: tuple[float, int]) -> bool:
    if cost[0] < than[0] * (1 - 1e-3):
        return True
    return cost[0] <= than[0] * (1 + 1e-4) and cost[1] < than[1]


def _water_levels(search: _Search, kept: frozenset[int], n_levels: int) -> Iterator[Array]:
    """Yields bytes to stream per use: clip(level - f, 0, size), f being what moves while the use computes."""
    trace = search.trace
    sizes = np.array(
        [float(sum(search.sizes[index] for index in parts if index not in kept)) for parts in search.parts]
    )
    budget_bytes = search.budget_bytes - sum(search.sizes[index] for index in kept)
    hidden_bytes = np.array([use.compute_s for use in trace.uses]) * trace.bandwidth_bps
    part_bytes = float(sizes[sizes > 0].mean()) if (sizes > 0).any() else 1.0
    caps = sorted({*np.quantile(hidden_bytes, [0.25, 0.5, 0.75, 1.0]), 0.25 * part_bytes, part_bytes, budget_bytes / 2})
    reserves = [0.0, 0.25 * part_bytes, 0.5 * part_bytes, part_bytes, 2 * part_bytes, 4 * part_bytes]
    reserves += [share * budget_bytes for share in (0.02, 0.05, 0.1, 0.2, 0.4)]
    n_yielded = 0
    for reserve in reserves:
        for cap in caps:
            if n_yielded >= n_levels:
                return
            levels = water_fill(sizes, np.minimum(hidden_bytes, cap), budget_bytes - reserve)
            if levels is not None:
                n_yielded += 1
                yield levels


def water_fill(sizes: Array, hidden_bytes: Array, budget_bytes: float) -> Array | None:
    """Returns y = clip(m - hidden_bytes, 0, sizes) for the smallest m with sum(y) - m = sum(sizes) - budget_bytes.

    m is the window that the streamed bytes go through; None where no m satisfies it.
    """
    excess = float(sizes.sum()) - budget_bytes

    def surplus(level: float) -> float:
        return float(np.clip(level - hidden_bytes, 0, sizes).sum()) - level - excess

    levels = np.linspace(0.0, float((sizes + hidden_bytes).max()), 129)
    crossing = next((i for i, level in enumerate(levels) if surplus(float(level)) >= 0), None)
    if crossing is None:
        return None
    low, high = float(levels[max(crossing - 1, 0)]), float(levels[crossing])
    for _ in range(40):
        middle = (low + high) / 2
        if surplus(middle) >= 0:
            high = middle
        else:
            low = middle
    filled: Array = np.clip(high - hidden_bytes, 0, sizes)
    return filled
