"""When each streamed segment is fetched and released, for a given choice of what streams.

Everything else stays. What streams is fetched in order of need, each load as early as the window has room for it,
which is the best that can be done for a fixed choice. The result is static and repeats with every pass: a load may be
issued once a certain step has ended, whatever the clock says.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Set
from dataclasses import dataclass, replace
from itertools import accumulate

from litrt.trace import Trace

_N_PASSES = 4
"""Passes that `pass_s` simulates; the second half is averaged."""

READ_SHARE = 0.1
"""Share of its seconds that a load costs where it is hidden: reading and checking slow down what computes meanwhile.

By this, choices are compared; predictions are without. On two processors, both at work, it was measured as a fifth."""

_KEPT = (1 / 4, 1 / 2, 1)
"""Shares of the window up to which a segment is kept from one use to the next, tried in turn."""


@dataclass(frozen=True, slots=True)
class Step:
    """A use of which at least one segment streams.

    Attributes:
        segments: The streamed segments of the use.
        compute_s: Seconds of compute from this step to the next one.
        held_s: Seconds of these until its segments are released.
    """

    segments: tuple[int, ...]
    compute_s: float
    held_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """One fetch of one segment per pass.

    Steps are counted from the start of the pass; a negative one lies in the pass before.

    Attributes:
        segment: What is fetched.
        first: The step that needs it.
        last: The step after which it is released.
        after: It may be issued once this many steps have ended.
        offset: Its place in the window, or None to find one when it is issued.
    """

    segment: int
    first: int
    last: int
    after: int
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps and loads of a steady pass, loads in order of need."""

    steps: tuple[Step, ...]
    loads: tuple[Load, ...]
    streamed_bytes: int


def streamed_steps(trace: Trace, streamed: Set[int]) -> tuple[list[Step], list[int]]:
    """Returns the steps of a pass, and for each the last step that begins before it ends."""
    segments: list[tuple[int, ...]] = []
    seconds: list[float] = []
    held: list[float | None] = []
    numbers: list[int] = []
    ends: list[int] = []
    lead_s = 0.0
    for number, use in enumerate(trace.uses):
        kept = tuple(index for index in use.segments if index in streamed)
        if kept:
            segments.append(kept)
            seconds.append(use.compute_s)
            held.append(use.held_s if use.n_spanned == 1 else None)
            numbers.append(number)
            ends.append(number + use.n_spanned)
        elif segments:
            seconds[-1] += use.compute_s
        else:
            lead_s += use.compute_s
    if segments:
        seconds[-1] += lead_s
    spans = [bisect_left(numbers, end) - 1 for end in ends]
    parts = zip(segments, seconds, held, strict=True)
    return [Step(kept, s, s if held_s is None else min(held_s, s)) for kept, s, held_s in parts], spans


def make_schedule(trace: Trace, streamed: Set[int], window_bytes: int, *, merge_bytes: int = 0) -> Schedule | None:
    """Returns the schedule that streams `streamed` through `window_bytes`, or None where that is too small.

    Args:
        trace: What a pass uses.
        streamed: Segments that come and go; the others of the trace are resident.
        window_bytes: Arena bytes for what streams.
        merge_bytes: Keep a segment between two of its uses where it, and what streams between them, take no more.
    """
    if window_bytes < 0:
        return None  # the residents alone do not fit
    steps, spans = streamed_steps(trace, streamed)
    n_steps = len(steps)
    if n_steps == 0:
        return Schedule((), (), 0)
    size = [segment.size_bytes for segment in trace.segments]

    step_bytes = [sum([size[index] for index in set(step.segments)]) for step in steps]
    if max(step_bytes) > window_bytes:
        return None

    # One interval per load: the steps from its first use to its last.
    before = [0, *accumulate(step_bytes)]
    intervals: list[list[int]] = []
    open_interval: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        for index in step.segments:
            last = open_interval.get(index)
            if last is not None:
                between = before[number] - before[last[2] + 1]
                if number <= last[2] + 1 or between + size[index] <= merge_bytes:
                    last[2] = max(last[2], spans[number])
                    continue
            interval = [index, number, spans[number]]
            intervals.append(interval)
            open_interval[index] = interval
    intervals.sort(key=lambda interval: interval[1])

    released = [0] * (n_steps + 1)
    for index, _, last_step in intervals:
        released[last_step + 1] += size[index]
    for number in range(n_steps):
        released[number + 1] += released[number]
    total = released[-1]

    previous_end: dict[int, int] = {}
    for index, _, last_step in intervals:
        previous_end[index] = last_step + 1 - n_steps
    loads = []
    issued = 0
    after = -n_steps
    for index, first, last_step in intervals:
        issued += size[index]
        # The fewest ended steps f such that what was issued, less what those steps released, fits in the window.
        # Releases repeat with every pass: released(k * n + g) = k * total + released[g].
        room = -n_steps
        if total:  # what streams may be empty tensors only
            n_passes, rest = divmod(issued - window_bytes, total)
            if rest == 0:
                n_passes, rest = n_passes - 1, total
            room = n_passes * n_steps + bisect_left(released, rest)
        after = max(after, room, previous_end[index], last_step + 1 - n_steps)
        if after > first:
            return None
        previous_end[index] = last_step + 1
        loads.append(Load(index, first, last_step, after))
    return Schedule(tuple(steps), tuple(loads), total)


def best_schedule(trace: Trace, streamed: Set[int], window_bytes: int) -> Schedule | None:
    """Returns the fastest of a few schedules: they differ in how long a segment with several uses is kept."""
    apart = make_schedule(trace, streamed, window_bytes)
    # Kept for one use only, they take the least: where that is too much, so is all else. Loaded once, they can be no
    # better.
    if apart is None or len(apart.loads) <= len(streamed):
        return apart
    kept = [make_schedule(trace, streamed, window_bytes, merge_bytes=int(window_bytes * share)) for share in _KEPT]
    possible = [schedule for schedule in (apart, *kept) if schedule is not None]
    return min(possible, key=lambda schedule: (pass_s(trace, schedule), schedule.streamed_bytes))


def step_by_step(trace: Trace, streamed: Set[int]) -> Schedule:
    """Returns the schedule for a window that holds one step at a time: nothing ahead, places found when loading."""
    steps, spans = streamed_steps(trace, streamed)
    loads: list[Load] = []
    latest: dict[int, int] = {}  # of a segment, its load that was last
    for number, step in enumerate(steps):
        # Those on a page first: the others then lie behind them without a gap.
        for index in sorted(step.segments, key=lambda index: -trace.segments[index].align_bytes):
            held = loads[latest[index]] if index in latest else None
            if held is not None and held.last >= number:
                loads[latest[index]] = replace(held, last=max(held.last, spans[number]))
                continue
            latest[index] = len(loads)
            loads.append(Load(index, number, spans[number], number))
    n_bytes = sum(trace.segments[load.segment].size_bytes for load in loads)
    return Schedule(tuple(steps), tuple(loads), n_bytes)


def _transfer_s(trace: Trace, index: int) -> float:
    segment = trace.segments[index]
    return 0.0 if segment.is_slot else segment.fetch_bytes / trace.bandwidth_bps + trace.latency_s


def pass_s(trace: Trace, schedule: Schedule) -> float:
    """Returns the predicted seconds of a steady pass: a max-plus recurrence over loads and steps."""
    steps, loads = schedule.steps, schedule.loads
    if not steps:
        return trace.compute_s
    n_steps = len(steps)
    needs: list[list[tuple[int, float]]] = [[] for _ in steps]
    for load in loads:
        needs[load.first].append((load.after, _transfer_s(trace, load.segment)))
    timed = [(step.compute_s, step.held_s, need) for step, need in zip(steps, needs, strict=True)]
    link = clock = 0.0
    ended = [0.0]
    marks = [0.0]
    for number in range(_N_PASSES):
        base = number * n_steps
        for compute_s, held_s, need in timed:
            for after, transfer_s in need:
                after += base
                if after > 0 and ended[after] > link:
                    link = ended[after]
                link += transfer_s
            if need and link > clock:
                clock = link
            ended.append(clock + held_s)
            clock += compute_s
        marks.append(clock)
    half = _N_PASSES // 2
    return (marks[-1] - marks[half]) / (_N_PASSES - half)
