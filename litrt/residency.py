"""Which segments stay: the one choice that a plan makes.

First what is worth most per byte: segments used several times per pass, and those so small that reading them is mostly
latency. Then water-filling: every use streams what exceeds a common level less what can move while it computes, in
several variants, each rounded to whole segments with the error carried on to the next use. Some keep all that is large,
because small segments fill a window better. All are ranked by their seconds in a window without gaps; the fastest are
given addresses, and the best of these is polished by local search. What reads less is preferred to what reads more.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import combinations, product

import numpy as np

from litrt.bound import Array
from litrt.layout import best_layout
from litrt.schedule import READ_SHARE, Schedule, best_schedule, pass_s, step_by_step
from litrt.trace import Trace

_MAX_SUBSET_OF = 8
"""Segments of one use up to which every subset is tried when rounding."""

_SMALL_SHARE = 1 / 4
"""Share of the spare budget that small segments may take before anything else is chosen."""

_N_FAMILIES = 8
"""Sizes at which to divide the segments into those that may stream and those that stay."""

_WORK = 200_000
"""Uses and loads that a search may schedule: under a second. Laying a load out costs `_LAYOUT_WORK`."""

_LAYOUT_WORK = 8
_PROPOSAL_WORK = 10

_PATIENCE = 30
"""Changes per segment that may be tried in vain before the search ends."""

_SMALLEST_PREFIX_WINDOW = 0.02
"""Share of the budget: the smallest window that is tried behind a prefix of what is used."""

_MIN_ROUNDS = 4
"""Choices that are laid out even where each has so many loads that `_WORK` is spent."""

_GAIN = 1e-4
"""Share of its cost by which a choice has to be better than the best."""

_UNPLACED = 1.01
"""What loads without addresses are taken to cost more: a place may be in pieces when it is needed."""

_MAX_EXHAUSTIVE = 9
"""Segments up to which every choice is ranked."""


def choose_streamed(trace: Trace, budget_bytes: int, seed: int) -> tuple[frozenset[int], Schedule]:
    """Returns the segments that stream, and their schedule with offsets in the window that is left.

    Loads have no offset where the budget is so small that only loading step by step works.
    """
    if trace.used_bytes <= budget_bytes:
        return frozenset(), Schedule((), (), 0)
    search = _Search(trace, budget_bytes)
    search.rank(search.used)
    if len(search.used) <= _MAX_EXHAUSTIVE:
        for n_kept in range(1, len(search.used) + 1):
            for subset in combinations(sorted(search.used), n_kept):
                search.rank(search.used - set(subset))
        search.lay_out_ranked(_WORK)
        return search.best, search.best_schedule
    if search.spare_bytes > 0:
        for kept in search.prefixes():
            search.rank(search.used - kept)
        families = list(dict.fromkeys([search.worth_most(), frozenset[int](), *search.largest(_N_FAMILIES)]))
        n_levels = _WORK // 4 // search.n_loads // len(families) + 2
        for kept in families:
            for targets in _water_levels(search, kept, n_levels):
                search.rank(search.rounded(kept, targets))
    search.lay_out_ranked(_WORK // 2)
    search.polish(random.Random(seed), _WORK)
    return search.best, search.best_schedule


class _Search:
    """The best choice so far, by what it costs."""

    def __init__(self, trace: Trace, budget_bytes: int) -> None:
        self.trace = trace
        self.budget_bytes = budget_bytes
        self.sizes = [segment.size_bytes for segment in trace.segments]
        self.used = frozenset(trace.used)
        self.used_bytes = trace.used_bytes
        self.spare_bytes = budget_bytes - trace.largest_use_bytes
        self.n_loads = sum(len(use.segments) for use in trace.uses)
        self.parts: list[list[int]] = []
        seen: set[int] = set()
        for use in trace.uses:
            self.parts.append([index for index in dict.fromkeys(use.segments) if index not in seen])
            seen.update(use.segments)
        self.best = self.used
        self.best_schedule = step_by_step(trace, self.used)
        self.best_cost_s = float("inf")
        self._work = 0
        self._ranked: dict[frozenset[int], tuple[float, Schedule]] = {}
        self._seen: set[frozenset[int]] = set()
        self._subsets: dict[tuple[int, ...], list[tuple[float, tuple[int, ...]]]] = {}

    def rank(self, streamed: frozenset[int]) -> float | None:
        """Schedules a choice without addresses, and returns what it would cost; None for one that cannot run."""
        if streamed in self._seen or self.window_bytes(streamed) < 0:
            return None
        self._seen.add(streamed)
        schedule = best_schedule(self.trace, streamed, self.window_bytes(streamed))
        self._work += len(self.trace.uses)
        if schedule is None:
            return None
        self._work += len(schedule.loads)
        cost_s = self.cost_s(schedule)
        self._ranked[streamed] = (cost_s, schedule)
        return cost_s

    def lay_out(self, streamed: frozenset[int]) -> bool:
        """Gives addresses to a ranked choice, and takes it if it is better than the best; says whether it was."""
        schedule = self._ranked.pop(streamed)[1]
        self._work += _LAYOUT_WORK * len(schedule.loads)
        placed = best_layout(self.trace, schedule, self.window_bytes(streamed))
        if placed is not None:
            cost_s = self.cost_s(placed)
        else:
            placed = step_by_step(self.trace, streamed)
            cost_s = self.cost_s(placed) * _UNPLACED
        if not _better(cost_s, self.best_cost_s):
            return False
        self.best, self.best_schedule, self.best_cost_s = streamed, placed, cost_s
        return True

    def cost_s(self, schedule: Schedule) -> float:
        """Returns the seconds of a pass, and those that reading takes from what computes meanwhile."""
        return pass_s(self.trace, schedule) + READ_SHARE * schedule.streamed_bytes / self.trace.bandwidth_bps

    def lay_out_ranked(self, work: int) -> None:
        """Gives addresses to what was ranked, best first, until none of the rest can be better."""
        ranked = sorted(self._ranked.items(), key=lambda item: item[1][0])
        for number, (streamed, (cost_s, _)) in enumerate(ranked):
            if not _better(cost_s, self.best_cost_s) or (self._work > work and number >= _MIN_ROUNDS):
                break
            self.lay_out(streamed)

    def window_bytes(self, streamed: frozenset[int]) -> int:
        """Returns what is left of the budget beside what stays."""
        return self.budget_bytes - self.used_bytes + sum(self.sizes[index] for index in streamed)

    def prefixes(self) -> Iterator[frozenset[int]]:
        """Yields sets of the segments that are used first, that leave windows of several sizes."""
        share = 1.0
        while share > _SMALLEST_PREFIX_WINDOW:
            kept: set[int] = set()
            room_bytes = self.budget_bytes * (1 - share)
            for index in self.trace.used:
                room_bytes -= self.sizes[index]
                if room_bytes < 0:
                    break
                kept.add(index)
            yield frozenset(kept)
            share *= 0.7

    def largest(self, n_sets: int) -> Iterator[frozenset[int]]:
        """Yields sets of the segments above some size, such that the smaller ones suffice to stream."""
        excess_bytes = self.used_bytes - self.budget_bytes
        sizes = sorted({self.sizes[index] for index in self.used})
        for number in range(1, n_sets + 1):
            limit = sizes[(len(sizes) - 1) * number // n_sets]
            small_bytes = sum(self.sizes[index] for index in self.used if self.sizes[index] <= limit)
            if small_bytes >= excess_bytes + limit:
                yield frozenset(index for index in self.used if self.sizes[index] > limit)

    def worth_most(self) -> frozenset[int]:
        """Returns what to keep before anything else: used several times per pass, or too small to be worth a read."""
        n_uses = Counter(index for use in self.trace.uses for index in dict.fromkeys(use.segments))
        latency_bytes = self.trace.latency_s * self.trace.bandwidth_bps

        def worth(index: int) -> float:
            return n_uses[index] * (1 + latency_bytes / max(self.sizes[index], 1))

        kept: set[int] = set()
        kept_bytes = 0
        room_bytes = self.spare_bytes * _SMALL_SHARE
        for index in sorted(self.used, key=lambda index: (-worth(index), index)):
            if worth(index) < 2:
                break
            # One that is used often, and large, may take all the room that the largest use leaves.
            limit = self.spare_bytes if n_uses[index] > 1 else room_bytes
            if kept_bytes + self.sizes[index] <= limit:
                kept.add(index)
                kept_bytes += self.sizes[index]
        return frozenset(kept)

    def rounded(self, kept: frozenset[int], targets: Array) -> frozenset[int]:
        """Returns segments whose bytes follow `targets` per use, what one use misses carried to the next."""
        streamed: list[int] = []
        carry = 0.0
        for parts, target in zip(self.parts, targets, strict=True):
            free = tuple(index for index in parts if index not in kept)
            wanted = float(target) + carry
            chosen = self._nearest(free, wanted)
            streamed.extend(chosen)
            carry = wanted - sum(self.sizes[index] for index in chosen)
        return frozenset(streamed)

    def _nearest(self, free: tuple[int, ...], wanted: float) -> tuple[int, ...]:
        """Returns those of `free` whose bytes are nearest to `wanted`."""
        if len(free) <= _MAX_SUBSET_OF:
            known = self._subsets.get(free)
            if known is None:
                subsets = [subset for n in range(len(free) + 1) for subset in combinations(free, n)]
                summed = {sum(self.sizes[index] for index in subset): subset for subset in reversed(subsets)}
                known = self._subsets[free] = sorted(summed.items())
            at = bisect_left(known, (wanted, ()))
            return min(known[max(at - 1, 0) : at + 1], key=lambda item: abs(item[0] - wanted))[1]
        chosen = []
        for index in sorted(free, key=lambda index: -self.sizes[index]):
            if self.sizes[index] <= wanted:
                chosen.append(index)
                wanted -= self.sizes[index]
        return tuple(chosen)

    def polish(self, rng: random.Random, work: int) -> None:
        """Toggles or swaps one or two segments as long as that costs less."""
        order = sorted(self.used)
        by_size: dict[int, list[int]] = {}
        for index in order:
            by_size.setdefault(self.sizes[index], []).append(index)
        n_tried = n_fruitless = 0
        while (self._work < work or n_tried < _MIN_ROUNDS) and n_fruitless < _PATIENCE * len(order):
            n_tried += 1
            n_fruitless += 1
            streamed = sorted(self.best)
            kept = [index for index in order if index not in self.best]
            change = set(self.best)
            move = rng.random()
            if move < 0.15 and streamed:
                change.discard(rng.choice(streamed))
            elif move < 0.3 and kept:
                change.add(rng.choice(kept))
            elif streamed and kept:
                out = rng.choice(streamed)
                alike = by_size[self.sizes[out]] if move < 0.7 else kept
                change.discard(out)
                change.add(rng.choice(alike))
            self._work += _PROPOSAL_WORK
            cost_s = self.rank(frozenset(change))
            if cost_s is not None and _better(cost_s, self.best_cost_s) and self.lay_out(frozenset(change)):
                n_fruitless = 0


def _better(cost_s: float, than_s: float) -> bool:
    return cost_s < than_s * (1 - _GAIN)


def _water_levels(search: _Search, kept: frozenset[int], n_levels: int) -> Iterator[Array]:
    """Yields bytes to stream per use: clip(level - f, 0, size), f being what moves while the use computes."""
    trace = search.trace
    sizes = np.array(
        [float(sum(search.sizes[index] for index in parts if index not in kept)) for parts in search.parts]
    )
    budget_bytes = search.budget_bytes - sum(search.sizes[index] for index in kept)
    hidden_bytes = np.array([use.compute_s for use in trace.uses]) * trace.bandwidth_bps
    part_bytes = float(sizes[sizes > 0].mean()) if (sizes > 0).any() else 1.0
    largest_bytes = float(max((search.sizes[index] for index in search.used - kept), default=0))
    caps = [*np.quantile(hidden_bytes, [1.0, 0.5, 0.25, 0.75]), part_bytes, budget_bytes / 2, part_bytes / 4]
    reserves = [largest_bytes, 2 * largest_bytes, *(part_bytes * n for n in (0, 1, 2, 0.5, 4, 0.25))]
    reserves += [share * budget_bytes for share in (0.05, 0.1, 0.2, 0.02, 0.4)]
    # The first of each are the likeliest: those with few before them in both lists come first.
    pairs = sorted(product(range(len(reserves)), range(len(caps))), key=lambda pair: (sum(pair), pair))
    n_yielded = 0
    for reserve, cap in pairs:
        if n_yielded >= n_levels:
            return
        levels = water_fill(sizes, np.minimum(hidden_bytes, caps[cap]), budget_bytes - reserves[reserve])
        if levels is not None:
            n_yielded += 1
            yield levels


def water_fill(sizes: Array, hidden_bytes: Array, budget_bytes: float) -> Array | None:
    """Returns y = clip(m - hidden_bytes, 0, sizes) for the smallest m with sum(y) - m = sum(sizes) - budget_bytes.

    m is the window that the streamed bytes go through; None where no m satisfies it.
    """
    # sum(y) - m is piecewise linear in m: a use begins to stream at its `hidden_bytes`, and streams all `sizes` later.
    bends = np.concatenate([hidden_bytes, hidden_bytes + sizes])
    order = np.argsort(bends, kind="stable")
    bends = np.concatenate([[0.0], bends[order]])
    slopes = np.cumsum(np.concatenate([[-1.0], np.repeat([1.0, -1.0], len(sizes))[order]]))
    surplus = np.cumsum(np.concatenate([[budget_bytes - float(sizes.sum())], np.diff(bends) * slopes[:-1]]))
    enough = np.flatnonzero(surplus >= 0)
    if not len(enough):
        return None
    at = int(enough[0])
    level = bends[at] if at == 0 else bends[at - 1] - surplus[at - 1] / slopes[at - 1]
    filled: Array = np.clip(level - hidden_bytes, 0, sizes)
    return filled
