"""Traces for tests of the planner, and an executor of schedules that shares no code with it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from litrt.plan import Plan
from litrt.schedule import Load, Schedule
from litrt.trace import Segment, Trace, Use


def chain(sizes: Sequence[int], compute_s: float | Sequence[float] = 0.0, bandwidth_bps: float = 1.0) -> Trace:
    """Returns a trace that uses segments of `sizes` one after the other, each once."""
    seconds = [compute_s] * len(sizes) if isinstance(compute_s, int | float) else compute_s
    return Trace(
        tuple(Segment(f"w{number}", size, size, 1) for number, size in enumerate(sizes)),
        tuple(Use((number,), s) for number, s in enumerate(seconds)),
        bandwidth_bps,
    )


@st.composite
def traces(
    draw: st.DrawFn, *, max_segments: int = 7, max_uses: int = 12, nested: bool = True, several_uses: bool = True
) -> Trace:
    """Draws a trace: segments of a few alignments, with padding, in uses that may nest and repeat segments."""
    segments = []
    for number in range(draw(st.integers(1, max_segments))):
        align_bytes = draw(st.sampled_from([1, 1, 4, 16]))
        nbytes = draw(st.integers(0, 100))
        segments.append(Segment(f"w{number}", nbytes, -(-nbytes // align_bytes) * align_bytes, align_bytes))
    order = draw(st.permutations(range(len(segments))))
    uses: list[tuple[int, ...]] = []
    while order and len(uses) < max_uses:
        n_together = draw(st.integers(1, 3))
        uses.append(tuple(order[:n_together]))
        order = order[n_together:]
    if several_uses:
        some = st.lists(st.integers(0, len(segments) - 1), min_size=1, max_size=3, unique=True).map(tuple)
        for again in draw(st.lists(some, max_size=max_uses - len(uses))):
            uses.insert(draw(st.integers(0, len(uses))), again)
    seconds = st.integers(0, 40).map(lambda n: n / 8)
    return Trace(
        tuple(segments),
        tuple(
            Use(
                indices,
                draw(seconds),
                draw(st.integers(1, len(uses) - number)) if nested and draw(st.integers(0, 3)) == 0 else 1,
            )
            for number, indices in enumerate(uses)
        ),
        bandwidth_bps=draw(st.sampled_from([8.0, 32.0, 128.0])),
        latency_s=draw(st.sampled_from([0.0, 0.0, 0.5])),
    )


class BrokenScheduleError(AssertionError):
    """A schedule that cannot be executed as it is."""


@dataclass(frozen=True)
class Held:
    """What the executor holds of one segment; where it lies, if the schedule says so."""

    offset: int | None
    size_bytes: int
    free_at: int

    def overlaps(self, other: Held) -> bool:
        if self.offset is None or other.offset is None:
            return False
        return self.offset < other.offset + other.size_bytes and other.offset < self.offset + self.size_bytes


def execute(
    trace: Trace, resident: Collection[int], loads: Sequence[Load], n_steps: int, window_bytes: int, n_passes: int = 4
) -> list[list[int]]:
    """Executes loads use by use, and returns the segments loaded in each pass.

    Loads are issued in order, each as soon as as many steps have ended as it says, and freed after its last step.

    Raises:
        BrokenScheduleError: If more is held than the window has, if what is loaded is there already or overlaps what
            is there, or if a use that has not ended lacks a segment.
    """
    held: dict[int, Held] = {}
    loaded: list[list[int]] = [[] for _ in range(n_passes)]
    n_issued = step = 0
    for number in range(n_passes):
        for now, use in enumerate(trace.uses):
            if any(index not in resident for index in use.segments):
                held = {index: there for index, there in held.items() if there.free_at > step}
                while loads:
                    passes, position = divmod(n_issued, len(loads))
                    load = loads[position]
                    if passes * n_steps + load.after > step:
                        break
                    if load.segment in held:
                        raise BrokenScheduleError(f"{load} while the segment is there")
                    size_bytes = trace.segments[load.segment].size_bytes
                    there = Held(load.offset, size_bytes, passes * n_steps + load.last + 1)
                    for other in held.values():
                        if there.overlaps(other):
                            raise BrokenScheduleError(f"{load} overlaps {other}")
                    held[load.segment] = there
                    if sum(there.size_bytes for there in held.values()) > window_bytes:
                        raise BrokenScheduleError(f"{load} where there is no room")
                    loaded[number].append(load.segment)
                    n_issued += 1
                step += 1
            for other_use in (trace.uses[then] for then in range(now + 1) if then + trace.uses[then].n_spanned > now):
                for index in other_use.segments:
                    if index not in resident and index not in held:
                        raise BrokenScheduleError(f"use {now} lacks {index}")
    assert step == n_passes * n_steps
    return loaded


def steady_pass_s(trace: Trace, resident: Collection[int], schedule: Schedule | Plan, n_passes: int = 40) -> float:
    """Returns the seconds of a pass in the long run, by playing every use and transfer of many passes."""
    n_steps = len(schedule.steps)
    began_s: list[float] = []  # of each step, before it waits
    link_s = clock_s = 0.0
    queue = [(number, load) for number in range(n_passes) for load in schedule.loads]
    marks = []
    for _ in range(n_passes):
        for use in trace.uses:
            if any(index not in resident for index in use.segments):
                began_s.append(clock_s)
                while queue and queue[0][0] * n_steps + queue[0][1].first < len(began_s):
                    at, load = queue.pop(0)
                    after = at * n_steps + load.after
                    segment = trace.segments[load.segment]
                    link_s = max(link_s, began_s[after] if after > 0 else 0.0)
                    link_s += 0.0 if segment.is_slot else segment.nbytes / trace.bandwidth_bps + trace.latency_s
                    clock_s = max(clock_s, link_s)
            clock_s += use.compute_s
        marks.append(clock_s)
    return (marks[-1] - marks[n_passes // 2 - 1]) / (n_passes - n_passes // 2)
