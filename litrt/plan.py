"""The plan: who stays for good, what streams in every pass, when, and to which address.

Passes repeat, and on a cycle no replacement policy beats a fixed resident set and one window through which the rest
streams (Belady's rule, which evicts what is needed last, evicts exactly what was just used). So the plan is static.
Choosing among indivisible sizes is NP-hard: a plan reports its distance from the bound and claims no optimum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Literal

from litrt.bound import groups, min_pass_s, min_streamed_bytes
from litrt.layout import align_up, best_layout
from litrt.policy import lru_loads
from litrt.residency import choose_streamed
from litrt.schedule import READ_SHARE, Load, Schedule, Step, best_schedule, pass_s, step_by_step, streamed_steps
from litrt.tables import best_plan
from litrt.trace import Segment, Trace, Use
from litrt.units import format_bytes

Policy = Literal["belady", "lru"]


@dataclass(frozen=True)
class Plan:
    """What a runtime does in every pass. `print(plan)` tells it.

    Attributes:
        policy: "belady" for a fixed resident set and planned prefetch, "lru" for loads on demand.
        budget_bytes: Arena bytes that the plan may fill.
        segments: Every segment of the store.
        resident: Segment that stays, to its offset in the arena.
        window_offset: Where the window begins, through which the rest streams.
        steps: The uses that need something streamed, in order.
        loads: The fetches of one pass, in order of need.
        streamed_bytes: Bytes of weights that a steady pass reads, those of `tables` included.
        tables: Segments of which rows are gathered, and not the whole is held.
        gathered_bytes: What that read in the warm-up; other rows can take more, and those that are there still nothing.
        uses: What it was made for.
        compute_s: Seconds of a pass that never waits.
        pass_s: Predicted seconds of a steady pass.
        bound_s: Seconds that no schedule can beat.
        bound_bytes: Bytes per pass that no schedule can beat.
        bandwidth_bps: Bytes per second of the store: measured in warm-up, and again in passes that follow the plan.
        latency_s: Seconds that a read costs beside its bytes.
    """

    policy: Policy
    budget_bytes: int
    segments: tuple[Segment, ...] = field(repr=False)
    resident: dict[int, int] = field(repr=False)
    window_offset: int
    steps: tuple[Step, ...] = field(repr=False)
    loads: tuple[Load, ...] = field(repr=False)
    streamed_bytes: int
    compute_s: float
    pass_s: float
    bound_s: float
    bound_bytes: int
    bandwidth_bps: float
    latency_s: float = 0.0
    tables: tuple[int, ...] = field(default=(), repr=False)
    gathered_bytes: int = 0
    uses: tuple[Use, ...] = field(default=(), repr=False)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights that stay."""
        return sum(self.segments[index].fetch_bytes for index in self.resident)

    @property
    def window_bytes(self) -> int:
        """Arena bytes through which the rest streams."""
        return self.budget_bytes - self.window_offset

    @property
    def transfer_s(self) -> float:
        """Seconds in which the store delivers what a pass streams; what it gathers is part of `compute_s`."""
        return (self.streamed_bytes - self.gathered_bytes) / self.bandwidth_bps

    @property
    def cost_s(self) -> float:
        """What plans are compared by: seconds of a pass, and those that reading takes from what computes meanwhile."""
        return self.pass_s + READ_SHARE * self.transfer_s

    @property
    def bottleneck(self) -> str:
        """What a steady pass waits for: "compute" or "transfer"."""
        return "transfer" if self.transfer_s > self.compute_s else "compute"

    def __str__(self) -> str:
        total_bytes = sum(segment.fetch_bytes for segment in self.segments)
        streamed = [i for i in dict.fromkeys(load.segment for load in self.loads) if not self.segments[i].is_slot]
        kept = [index for index in self.resident if not self.segments[index].is_slot]
        if self.policy == "lru" and self.streamed_bytes:
            how = "loaded on demand, the least recently used evicted"
        else:
            names = _names(self.segments, streamed)
            how = f"{names}, through a window of {format_bytes(self.window_bytes)}" if streamed else names
        gathered = []
        if self.tables:
            gathered.append(
                f"  gathered {format_bytes(self.gathered_bytes):>10} per pass   rows of "
                f"{_names(self.segments, self.tables)}"
            )
        return "\n".join(
            [
                f"plan ({self.policy}): {format_bytes(total_bytes)} of weights, "
                f"{format_bytes(self.budget_bytes)} of memory for them",
                f"  resident {format_bytes(self.resident_bytes):>10}            {_names(self.segments, kept)}",
                f"  streamed {format_bytes(self.streamed_bytes - self.gathered_bytes):>10} per pass   {how}",
                *gathered,
                f"  pass     {self.pass_s:>8.3f} s   predicted; bound by {self.bottleneck}: {self.compute_s:.3f} s "
                f"of compute, {self.transfer_s:.3f} s of transfer at {self.bandwidth_bps / 1e9:.2f} GB/s",
                f"  bound    {self.bound_s:>8.3f} s   and {format_bytes(self.bound_bytes)} per pass: "
                "no schedule is faster or moves less",
            ]
        )


def make_plan(trace: Trace, budget_bytes: int, *, policy: Policy = "belady", seed: int = 0) -> Plan:
    """Returns the plan for `trace` in `budget_bytes` of arena.

    Args:
        trace: What a pass does.
        budget_bytes: Arena bytes; at least `trace.largest_use_bytes`.
        policy: "belady" plans residents and prefetch; "lru" loads on demand.
        seed: Of the local search, so that equal traces give equal plans.

    Raises:
        ValueError: If `budget_bytes` cannot hold the largest use.
    """
    if trace.gathered_bytes:
        # Rows were gathered from tables. Having some of them whole may be better, where they fit.
        plan = best_plan(trace, budget_bytes, lambda made: _make_plan(made, budget_bytes, policy, seed))
        if plan is not None:
            return plan
    return _make_plan(trace, budget_bytes, policy, seed)


def _make_plan(trace: Trace, budget_bytes: int, policy: Policy, seed: int) -> Plan:
    if budget_bytes < trace.largest_use_bytes:
        raise ValueError(f"budget_bytes {budget_bytes} is below largest_use_bytes {trace.largest_use_bytes}")
    plan = Plan(
        policy=policy,
        budget_bytes=budget_bytes,
        segments=trace.segments,
        resident={},
        window_offset=0,
        steps=(),
        loads=(),
        streamed_bytes=0,
        compute_s=0.0,
        pass_s=trace.compute_s,
        bound_s=0.0,
        bound_bytes=0,
        bandwidth_bps=trace.bandwidth_bps,
        latency_s=trace.latency_s,
    )
    plan = bounded(plan, trace)
    if policy == "lru" and trace.used_bytes > budget_bytes:
        loaded = [trace.segments[index] for index in lru_loads(trace, budget_bytes)]
        loaded = [segment for segment in loaded if not segment.is_slot]
        n_bytes = sum(segment.fetch_bytes for segment in loaded)
        streamed_bytes = n_bytes + trace.gathered_bytes  # the seconds of what is gathered are in `compute_s`
        steps, _ = streamed_steps(trace, frozenset(trace.used))
        # Nothing is fetched ahead, so transfer and compute add up.
        seconds = trace.compute_s + n_bytes / trace.bandwidth_bps + len(loaded) * trace.latency_s
        return replace(plan, steps=tuple(steps), streamed_bytes=streamed_bytes, pass_s=seconds)

    # The window begins where what streams may begin, which can leave a gap behind the residents.
    gap_bytes = max((segment.align_bytes for segment in trace.segments), default=0)
    if budget_bytes >= trace.used_bytes or all(segment.align_bytes == gap_bytes for segment in trace.segments):
        gap_bytes = 0
    streamed, schedule = choose_streamed(trace, budget_bytes - gap_bytes, seed)
    return _with_loads(_with_residents(plan, trace, streamed), trace, schedule)


def replan(plan: Plan, uses: Sequence[Use], budget_bytes: int | None = None) -> Plan:
    """Returns `plan` for other uses of what streams, for passes that do not do what the warm-up did.

    What stays keeps its place; what streams is scheduled anew, in an arena that may have grown to `budget_bytes`. The
    bound counts what a pass needs of what stays only where `uses` say it.
    """
    trace = Trace(plan.segments, tuple(uses), plan.bandwidth_bps, plan.latency_s)
    plan = bounded(replace(plan, budget_bytes=budget_bytes or plan.budget_bytes), trace)
    streamed = frozenset(trace.used) - plan.resident.keys()
    schedule = best_schedule(trace, streamed, plan.window_bytes)
    placed = best_layout(trace, schedule, plan.window_bytes) if schedule is not None else None
    return _with_loads(plan, trace, placed if placed is not None else step_by_step(trace, streamed))


def bounded(plan: Plan, trace: Trace) -> Plan:
    """Returns `plan` with what `trace` says of a pass: its compute, its bounds and its tables."""
    sizes, seconds = groups(trace)
    # Where what is held is not what is moved, the bound takes the segment that moves the fewest bytes for its size.
    moved = [trace.segments[index] for index in trace.used if trace.segments[index].nbytes]
    moved_share = min((part.fetch_bytes / part.nbytes for part in moved if not part.is_slot), default=1.0)
    bound_bps = trace.bandwidth_bps / moved_share
    return replace(
        plan,
        uses=trace.uses,
        compute_s=trace.compute_s,
        bound_s=float(min_pass_s(sizes, seconds, plan.budget_bytes, bound_bps)) if len(sizes) else 0.0,
        bound_bytes=int(min_streamed_bytes(sizes, plan.budget_bytes) * moved_share) if len(sizes) else 0,
        tables=tuple(dict.fromkeys(use.table for use in trace.uses if use.table is not None)),
        gathered_bytes=trace.gathered_bytes,
    )


def _with_residents(plan: Plan, trace: Trace, streamed: Set[int]) -> Plan:
    # Unused segments stay as well where all fits: a later pass may use them.
    everything = [index for index, segment in enumerate(trace.segments) if not segment.is_slot]
    everything += [index for index in trace.used if trace.segments[index].is_slot]
    fits = sum(trace.segments[index].size_bytes for index in everything) <= plan.budget_bytes
    kept = [index for index in (everything if fits else trace.used) if index not in streamed]
    resident, end = _pack(trace.segments, kept)
    align_bytes = max((trace.segments[index].align_bytes for index in streamed), default=1)
    return replace(plan, resident=resident, window_offset=min(align_up(end, align_bytes), plan.budget_bytes))


def _with_loads(plan: Plan, trace: Trace, schedule: Schedule) -> Plan:
    """Completes `plan` with a schedule, whose offsets count from the start of the window."""
    loads = tuple(
        load if load.offset is None else replace(load, offset=plan.window_offset + load.offset)
        for load in schedule.loads
    )
    n_bytes = plan.gathered_bytes + sum(trace.segments[load.segment].fetch_bytes for load in loads)
    return replace(plan, steps=schedule.steps, loads=loads, streamed_bytes=n_bytes, pass_s=pass_s(trace, schedule))


def _pack(segments: Sequence[Segment], indices: Iterable[int]) -> tuple[dict[int, int], int]:
    """Returns an offset for each of `indices`, side by side from 0, and where they end."""
    offsets = {}
    end = 0
    for index in sorted(indices, key=lambda index: (-segments[index].align_bytes, index)):
        end = align_up(end, segments[index].align_bytes)
        offsets[index] = end
        end += segments[index].size_bytes
    return offsets, end


def _names(segments: Sequence[Segment], indices: Iterable[int]) -> str:
    by_size = sorted(indices, key=lambda index: -segments[index].nbytes)
    names = [segments[index].name for index in by_size[:3]]
    if not names:
        return "nothing"
    rest = f" and {len(by_size) - 3} more" if len(by_size) > 3 else ""
    noun = "weight" if len(by_size) == 1 else "weights"
    return f"{len(by_size)} {noun}: {', '.join(names)}{rest}"
