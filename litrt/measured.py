"""What passes that followed a plan have measured: new predictions, and a better plan where there is one.

A warm-up takes turns: it reads, then it computes. Once it follows a plan a pass does both at the same time, and neither
is as fast as it was. Also, a warm-up is one pass, and what disturbed it disturbs the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from litrt.plan import Plan, bounded, make_plan
from litrt.schedule import Schedule, Step, pass_s, streamed_steps
from litrt.trace import Trace, Use

N_PASSES = 3
"""Passes that follow a plan and are measured; after them it stays as it is."""

_NEAR = 1.03
"""A plan whose pass takes no more than this times its bound is not made again."""

_WORTH = 0.95
_WORTH_S = 0.02
"""A new plan costs no more than this share of the old one, and spares this much: to change, what stays is loaded."""


def typical(passes: Sequence[Sequence[Use]]) -> list[Use]:
    """Returns the uses of the last of some passes, with the medians of the seconds of those that used the same."""
    last = [use.segments for use in passes[-1]]
    alike = [uses for uses in passes if [use.segments for use in uses] == last]
    found = []
    for number, use in enumerate(passes[-1]):
        held_s = [uses[number].held_s for uses in alike]
        known_s = [seconds for seconds in held_s if seconds is not None]
        found.append(
            replace(
                use,
                compute_s=median(uses[number].compute_s for uses in alike),
                held_s=median(known_s) if len(known_s) == len(held_s) else None,
            )
        )
    return found


def measured_again(plan: Plan, uses: Sequence[Use], bandwidth_bps: float) -> Plan:
    """Returns `plan` with the seconds of a pass that followed it: what it does is the same, what it predicts is new.

    Reading takes processors and memory from computing, and the other way round: neither is as fast as it was in the
    warm-up, where they took turns.

    Args:
        plan: What was followed.
        uses: What the pass used of what streams.
        bandwidth_bps: Bytes per second while something was being read.
    """
    trace = Trace(plan.segments, tuple(uses), bandwidth_bps)
    steps = _measured_steps(plan, trace)
    if steps is None:
        return plan
    schedule = Schedule(tuple(steps), plan.loads, plan.streamed_bytes)
    return replace(
        plan,
        bound_s=bounded(plan, replace(trace, uses=_slowed(plan, steps))).bound_s,
        steps=schedule.steps,
        compute_s=trace.compute_s,
        pass_s=pass_s(trace, schedule),
        bandwidth_bps=bandwidth_bps,
        latency_s=0.0,
    )


def _measured_steps(plan: Plan, trace: Trace) -> list[Step] | None:
    """Returns the steps of `plan` with the seconds of a pass that followed it; None where that did something else."""
    steps, _ = streamed_steps(trace, frozenset(load.segment for load in plan.loads))
    return steps if [step.segments for step in steps] == [step.segments for step in plan.steps] else None


def _slowed(plan: Plan, steps: Sequence[Step]) -> tuple[Use, ...]:
    """Returns the uses of `plan` with the seconds of measured `steps`.

    Of what stays nothing was measured: with the step before it, it has slowed down alike.
    """
    streamed = {load.segment for load in plan.loads}
    uses = list(plan.uses)
    starts = [number for number, use in enumerate(uses) if not streamed.isdisjoint(use.segments)]
    for start, end, step in zip(starts, [*starts[1:], starts[0] + len(uses)], steps, strict=True):
        members = [number % len(uses) for number in range(start, end)]
        before_s = sum(plan.uses[number].compute_s for number in members)
        for number in members:
            share = plan.uses[number].compute_s / before_s if before_s else 1 / len(members)
            uses[number] = replace(uses[number], compute_s=step.compute_s * share)
        uses[start] = replace(uses[start], held_s=step.held_s)
    return tuple(uses)


def better_plan(plan: Plan, trace: Trace, uses: Sequence[Use], bandwidth_bps: float) -> Plan | None:
    """Returns a plan for what passes that followed `plan` have measured, or None where it would not be worth a change.

    Args:
        plan: What was followed.
        trace: What it was made for.
        uses: What the passes used of what streams.
        bandwidth_bps: Bytes per second while something was being read.
    """
    steps = _measured_steps(plan, replace(trace, uses=tuple(uses)))
    if plan.policy != "belady" or steps is None:
        return None
    if len(trace.uses) != len(plan.uses) or any(
        use.table is None and use.segments != planned.segments
        for use, planned in zip(trace.uses, plan.uses, strict=True)
    ):
        return None  # it was made for other passes since
    slowed = _slowed(plan, steps)
    # Those of `plan` may use tables whole of which `trace` gathers: seconds of gathering are what they were.
    measured = tuple(
        use
        if use.table is not None or not planned.compute_s
        else replace(
            use,
            compute_s=use.compute_s * now.compute_s / planned.compute_s,
            held_s=None if use.held_s is None else use.held_s * now.compute_s / planned.compute_s,
        )
        for use, planned, now in zip(trace.uses, plan.uses, slowed, strict=True)
    )
    retraced = replace(trace, uses=measured, bandwidth_bps=bandwidth_bps)
    followed = replace(retraced, uses=slowed)
    now_s = pass_s(followed, Schedule(tuple(steps), plan.loads, plan.streamed_bytes))
    if now_s < _WORTH_S or now_s <= _NEAR * bounded(plan, followed).bound_s:
        return None
    cost_s = replace(plan, pass_s=now_s, bandwidth_bps=bandwidth_bps).cost_s
    made = make_plan(retraced, plan.budget_bytes)
    return made if made.cost_s <= min(_WORTH * cost_s, cost_s - _WORTH_S) else None
