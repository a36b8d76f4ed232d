"""Lower bounds on a steady pass: what no schedule, of any policy and at any granularity, can beat.

The bounds are dual solutions of the fluid relaxation, in which bytes are infinitely divisible: a budget of B bytes,
passes over groups of s_j bytes and c_j seconds, one channel of `bandwidth` bytes per second. While group j
computes, memory holds all of it and what is kept of the others, hence D >= W - B + max_j y_j for the D = sum y_j
bytes that are streamed per pass. A weight that is used several times counts at its first use only, which can only
lower the bound.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from litrt.trace import Trace

_MAX_INTERVALS = 2_000
"""Groups up to which every interval of the cycle is tried: the work is quadratic."""

Array = npt.NDArray[np.float64]


def groups(trace: Trace) -> tuple[Array, Array]:
    """Returns bytes and seconds per use of `trace`, each segment counted at its first use.

    Bytes are those of the values, without padding, so that the bound holds for any layout. What is computed after a use
    is done with its segments is a group of its own, without bytes: others may be loaded in their place by then.
    """
    seen: set[int] = set()
    sizes = []
    seconds = []
    for use in trace.uses:
        fresh = [index for index in use.segments if index not in seen]
        seen.update(fresh)
        sizes.append(float(sum(trace.segments[index].nbytes for index in fresh if not trace.segments[index].is_slot)))
        # What a gather takes is reading, which a table in memory would spare: it bounds nothing.
        compute_s = use.own_s
        held_s = (
            compute_s
            if use.held_s is None or use.n_spanned > 1 or use.table is not None
            else min(use.held_s, compute_s)
        )
        seconds.append(held_s)
        if held_s < compute_s:
            sizes.append(0.0)
            seconds.append(compute_s - held_s)
    return np.array(sizes), np.array(seconds)


def min_streamed_bytes(sizes: Array, budget_bytes: float) -> float:
    """Returns the fewest bytes per pass that any schedule moves; infinite where a group exceeds the budget.

    It is W - B + m for the smallest m such that sum_j min(s_j, m) - m >= W - B: m is the streamed part of the
    group that is computing.
    """
    total = float(sizes.sum())
    if budget_bytes >= total:
        return 0.0
    ordered = np.sort(sizes)
    if budget_bytes < ordered[-1]:
        return float("inf")
    excess = total - budget_bytes
    below = np.concatenate([[0.0], np.cumsum(ordered)])
    floor = 0.0
    for index, size in enumerate(ordered):
        n_above = len(ordered) - index - 1
        if below[index] + n_above * size >= excess:
            level = (excess - below[index]) / n_above if n_above else float(size)
            return excess + max(level, floor)
        floor = float(size)
    return excess + floor


def min_pass_s(sizes: Array, compute_s: Array, budget_bytes: float, bandwidth_bps: float) -> float:
    """Returns a lower bound on the seconds of a steady pass: the largest of five closed forms."""
    compute = float(compute_s.sum())
    total = float(sizes.sum())
    if budget_bytes >= total:
        return compute
    streamed = min_streamed_bytes(sizes, budget_bytes)
    if not np.isfinite(streamed):
        return float("inf")
    hidden = np.minimum(bandwidth_bps * compute_s, budget_bytes - sizes).sum()
    best = max(compute, streamed / bandwidth_bps, compute + (streamed - float(hidden)) / bandwidth_bps)

    # Any k groups: what their slices and the transfers under them need of the budget.
    tops = np.cumsum(np.sort(sizes + bandwidth_bps * compute_s)[::-1])
    k = np.arange(2, len(sizes) + 1)
    if len(k):
        best = max(best, float((((k - 1) * total - k * budget_bytes + tops[1:]) / ((k - 1) * bandwidth_bps)).max()))

    # Any interval of the cycle: from the start of its first group to the start of its last one, all its bytes
    # but one budget's worth must arrive.
    n_groups = len(sizes)
    if n_groups <= _MAX_INTERVALS:
        bytes_before = np.concatenate([[0.0], np.cumsum(np.tile(sizes, 2))])
        seconds_before = np.concatenate([[0.0], np.cumsum(np.tile(compute_s, 2))])
        for first in range(n_groups):
            last = np.arange(first, first + n_groups)
            within_s = seconds_before[last] - seconds_before[first]
            within_bytes = bytes_before[last + 1] - bytes_before[first]
            waited_s = np.maximum(within_s, (within_bytes - budget_bytes) / bandwidth_bps)
            best = max(best, float((compute - within_s + waited_s).max()))
    return best
