"""Seconds per pass against budget without a machine: from a trace, a bandwidth and the seconds of compute.

    python -m bench simulate --shape llama8b --machines disk,pcie4 --ratios 0.1,1 --out llama8b.png
    python -m bench simulate --trace sweep.jsonl --machines nvme        # a sweep, or what `bench record` wrote

litrt's plan stands beside other schedules for the same trace, and beside the bound. A ratio is that of the compute of a
pass to the transfer of all its weights; without one, a recorded trace keeps its own seconds, and a shape takes 0.3.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.rivals import RIVALS
from bench.shapes import MACHINES, SHAPES, Machine, on
from bench.traces import from_json
from litrt.plan import make_plan
from litrt.trace import Trace
from litrt.units import format_bytes, parse_bytes

PLANNED = "litrt"
BOUND = "bound"
_RATIO = 0.3


@dataclass(frozen=True)
class Simulated:
    """One panel: seconds of every schedule at every budget, infinite where it cannot run.

    Attributes:
        title: What it is of.
        budgets: Shares of the weights.
        seconds: Of each schedule, the bound included, those at each budget.
        compute_s: Seconds of a pass that never waits.
    """

    title: str
    budgets: tuple[float, ...]
    seconds: dict[str, list[float]]
    compute_s: float


def simulate(trace: Trace, budgets: tuple[float, ...], title: str = "") -> Simulated:
    """Returns what every schedule takes for `trace` at shares `budgets` of the bytes that it uses."""
    seconds: dict[str, list[float]] = {name: [] for name in (BOUND, PLANNED, *RIVALS)}
    for share in budgets:
        budget_bytes = round(share * trace.used_bytes)
        if budget_bytes >= trace.largest_use_bytes:
            plan = make_plan(trace, budget_bytes)
            seconds[BOUND].append(plan.bound_s)
            seconds[PLANNED].append(plan.pass_s)
        else:
            seconds[BOUND].append(math.inf)
            seconds[PLANNED].append(math.inf)
        for name, rival in RIVALS.items():
            seconds[name].append(rival(trace, budget_bytes))
    return Simulated(title, budgets, seconds, trace.compute_s)


def table(panel: Simulated) -> str:
    """Returns seconds of the bound, and of the others what multiple of it they take."""
    width = max(map(len, panel.seconds))
    lines = [panel.title, f"{'budget':<{width}}" + "".join(f"{share:>9.0%}" for share in panel.budgets)]
    bound_s = panel.seconds[BOUND]
    lines.append(f"{'bound, seconds':<{width}}" + "".join(f"{s:>9.3g}" for s in bound_s))
    for name, seconds in panel.seconds.items():
        if name != BOUND:
            shown = (
                "-" if math.isinf(s) else f"{s / least:.2f}" if least else ("1.00" if s == 0 else "-")
                for s, least in zip(seconds, bound_s, strict=True)
            )
            lines.append(f"{name:<{width}}" + "".join(f"{text:>9}" for text in shown))
    return "\n".join(lines)


def read_trace(path: Path) -> tuple[str, Trace]:
    """Returns the name and the trace in a file: of `bench record`, or the first of a sweep.

    Raises:
        ValueError: If there is none.
    """
    for line in path.read_text().splitlines():
        found = json.loads(line)
        if "uses" in found:
            return found.get("name", path.stem), from_json(found)
    raise ValueError(f"{path} has no trace: write one with `python -m bench record` or `python -m bench sweep`.")


def panels(
    name: str, trace: Trace, machines: list[Machine], ratios: list[float], budgets: tuple[float, ...], own_s: float
) -> Iterator[Simulated]:
    """Yields a panel for every machine and ratio; without ratios, one per machine with `own_s` of compute."""
    for machine in machines:
        transfer_s = trace.used_bytes / machine.bandwidth_bps
        for compute_s in [ratio * transfer_s for ratio in ratios] or [own_s]:
            title = f"{name}, {format_bytes(trace.used_bytes)}: {machine.title}, {compute_s:.3g} s of compute"
            yield simulate(on(trace, machine, compute_s), budgets, title)


def main(argv: list[str]) -> int:
    """Prints tables, and draws the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m bench simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shape", choices=tuple(SHAPES), default="llama8b", help="(default: %(default)s)")
    source.add_argument("--trace", type=Path, help="file of `bench record` or of `bench sweep`")
    parser.add_argument("--machines", default="disk", help=f"of {', '.join(MACHINES)} (default: %(default)s)")
    parser.add_argument("--bandwidth", metavar="BYTES", help="per second, as in 2GB, in place of --machines")
    parser.add_argument("--latency-s", type=float, default=0.0, help="of a read, with --bandwidth")
    parser.add_argument("--ratios", help="compute over transfer of all weights, as in 0.1,1")
    parser.add_argument("--budgets", default="10%,20%,30%,40%,50%,60%,70%,80%,90%,100%")
    parser.add_argument("--out", type=Path, help="picture to write")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.machines.split(",") if name not in MACHINES]
    if unknown:
        parser.error(f"--machines: {unknown[0]!r} is none of {', '.join(MACHINES)}")
    machines = [MACHINES[name] for name in arguments.machines.split(",")]
    if arguments.bandwidth is not None:
        bps = parse_bytes(arguments.bandwidth)
        machines = [Machine(f"{bps / 1e9:g} GB/s", bps, arguments.latency_s)]
    ratios = [float(ratio) for ratio in arguments.ratios.split(",")] if arguments.ratios else []
    if arguments.trace is not None:
        name, trace = read_trace(arguments.trace)
    else:
        name, trace = arguments.shape, SHAPES[arguments.shape]()
        ratios = ratios or [_RATIO]
    budgets = tuple(
        parse_bytes(budget, of_bytes=trace.used_bytes) / trace.used_bytes for budget in arguments.budgets.split(",")
    )
    found = []
    for panel in panels(name, trace, machines, ratios, budgets, trace.compute_s):
        print(table(panel) + "\n", flush=True)
        found.append(panel)
    if arguments.out is not None:
        from bench.plot import draw, of_simulated

        draw([of_simulated(panel) for panel in found], arguments.out)
        print(arguments.out)
    return 0
