"""What passes that followed a plan make of it: another prediction, or another plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import MakeStore
from torch import nn
from traces import chain

import litrt
import litrt.planner
from litrt.measured import better_plan, typical
from litrt.plan import Plan, make_plan
from litrt.trace import Trace, Use

N_LAYERS = 8


def as_followed(plan: Plan, truth: Trace) -> list[Use]:
    """Returns what a pass that follows `plan` measures where `truth` is what it takes."""
    streamed = {load.segment for load in plan.loads}
    uses: list[Use] = []
    lead_s = 0.0
    for use in truth.uses:
        if not streamed.isdisjoint(use.segments):
            uses.append(replace(use, held_s=use.compute_s))
        elif uses:
            uses[-1] = replace(uses[-1], compute_s=uses[-1].compute_s + use.compute_s)
        else:
            lead_s += use.compute_s
    return [*uses[:-1], replace(uses[-1], compute_s=uses[-1].compute_s + lead_s)]


def disturbed(trace: Trace) -> Trace:
    """Returns a trace of the same pass, of which a quarter of the uses took ten times as long as they do."""
    n_long = len(trace.uses) // 4
    return replace(
        trace,
        uses=tuple(
            replace(use, compute_s=use.compute_s * (10 if number < n_long else 1))
            for number, use in enumerate(trace.uses)
        ),
    )


def test_a_plan_for_a_warmup_that_was_disturbed_is_made_again() -> None:
    truth = chain([100] * 24, 1.0, bandwidth_bps=50.0)
    seen = disturbed(truth)
    plan = make_plan(seen, 1200)
    uses = as_followed(plan, truth)
    better = better_plan(plan, seen, uses, 50.0)
    assert better is not None
    assert better.pass_s == pytest.approx(make_plan(truth, 1200).pass_s, rel=0.02)
    assert better_plan(better, truth, as_followed(better, truth), 50.0) is None


@pytest.mark.parametrize("budget_bytes", [300, 1200, 2300])
def test_a_plan_whose_warmup_was_right_stays(budget_bytes: int) -> None:
    trace = chain([100] * 24, 1.0, bandwidth_bps=50.0)
    plan = make_plan(trace, budget_bytes)
    assert better_plan(plan, trace, as_followed(plan, trace), 50.0) is None


def test_a_plan_that_could_spare_only_milliseconds_stays() -> None:
    truth = chain([100] * 24, 1e-4, bandwidth_bps=5e5)
    seen = disturbed(truth)
    plan = make_plan(seen, 1200)
    assert better_plan(plan, seen, as_followed(plan, truth), 5e5) is None
    slower = replace(truth, uses=tuple(replace(use, compute_s=1.0) for use in truth.uses))
    assert better_plan(plan, seen, as_followed(plan, slower), 50.0) is not None


def test_passes_that_did_something_else_are_no_reason_for_another_plan() -> None:
    truth = chain([100] * 24, 1.0, bandwidth_bps=50.0)
    seen = disturbed(truth)
    plan = make_plan(seen, 1200)
    assert better_plan(plan, seen, as_followed(plan, truth)[1:], 50.0) is None


def test_the_plan_of_a_policy_without_a_schedule_stays() -> None:
    truth = chain([100] * 24, 1.0, bandwidth_bps=50.0)
    seen = disturbed(truth)
    plan = make_plan(seen, 1200, policy="lru")
    assert better_plan(plan, seen, list(truth.uses), 50.0) is None


def test_of_several_passes_the_median_counts_and_one_that_differs_does_not() -> None:
    passes = [[Use((0,), seconds, held_s=seconds / 2), Use((1,), 1.0)] for seconds in (1.0, 9.0, 2.0)]
    passes.insert(0, [Use((1,), 100.0), Use((0,), 100.0)])
    assert typical(passes) == [Use((0,), 2.0, held_s=1.0), Use((1,), 1.0)]
    assert typical(passes[:1]) == passes[0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(N_LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def other_plan(plan: Plan, trace: Trace, uses: list[Use], bandwidth_bps: float) -> Plan:
    """Returns a plan in which other weights stay: it hides everything behind one half of the pass, then the other."""
    for half in (range(N_LAYERS // 2), range(N_LAYERS // 2, N_LAYERS)):
        skewed = tuple(
            replace(use, compute_s=1.0 if number in half else 0.0, held_s=None) for number, use in enumerate(trace.uses)
        )
        made = make_plan(replace(trace, uses=skewed), plan.budget_bytes)
        if made.resident.keys() != plan.resident.keys():
            return made
    raise AssertionError("no plan differs")


@pytest.mark.parametrize("is_held", [False, True], ids=["nobody holds a resident", "an alias is in the way"])
def test_a_runtime_changes_to_a_better_plan_once(
    is_held: bool, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    calls: list[Plan] = []

    def better(plan: Plan, *args: object) -> Plan:
        calls.append(other_plan(plan, *args))  # type: ignore[arg-type]
        return calls[-1]

    monkeypatch.setattr(litrt.planner, "better_plan", better)
    plain = Net().eval().requires_grad_(False)
    x = torch.randn(2, 64)
    with litrt.Runtime(Net, make_store(plain), budget="60%") as rt:
        rt.warmup(x)
        first = rt.plan
        kept = []
        if is_held:
            stays = dict(rt.module.named_parameters())
            kept = [
                (name, stays[name].detach()[:]) for name in (first.segments[index].name for index in first.resident)
            ]
        for _ in range(8):
            assert torch.equal(rt(x), plain(x))
        for name, alias in kept:
            assert torch.equal(alias, plain.get_parameter(name))
        assert len(calls) == 1
        assert (rt.plan.resident == first.resident) == is_held
        assert (rt.plan.resident == calls[0].resident) == (not is_held)
        before = rt.stats()
        assert torch.equal(rt(x), plain(x))
        counted = rt.stats().since(before)
        assert (counted.n_faults, counted.read_bytes) == (0, rt.plan.streamed_bytes)
        assert rt.stats().peak_bytes <= rt.stats().budget_bytes
