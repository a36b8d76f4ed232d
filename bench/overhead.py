"""What litrt costs per call of a module, beside reading: a chain of many small layers.

    python -m bench overhead --layers 400 --width 256
    python -m bench overhead --layers 400 --width 256 --profile        # where it goes, function by function

The plain model and the runtime take turns. What a pass takes longer, less the seconds in which an operator waited for
its weights, is divided by the calls of modules whose weights stream. Threads that read and check are at work meanwhile,
on processors that they share: what they take is part of it. With a budget of 100 % nothing streams: no hook is left.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import litrt
from bench.machine import described, write_report


class Chain(nn.Module):
    """Square linear layers, one after the other."""

    def __init__(self, n_layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(n_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def timed(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """Returns the seconds of a call."""
    began_s = time.perf_counter()
    call(x)
    return time.perf_counter() - began_s


def measure(n_layers: int, width: int, budget: str, n_passes: int, folder: Path, *, profile: bool) -> dict[str, Any]:
    """Returns the medians of one budget."""
    torch.manual_seed(0)
    plain = Chain(n_layers, width).eval().requires_grad_(False)
    store = litrt.convert(plain.state_dict(), folder / f"{budget.removesuffix('%')}.zarr", progress=False)
    x = torch.randn(1, width)
    with torch.no_grad(), litrt.Runtime(lambda: Chain(n_layers, width), store, budget=budget) as rt:
        rt.warmup(x)
        pairs, stalls_s = [], []
        for _ in range(n_passes):
            plain_s, before = timed(plain, x), rt.stats()
            pairs.append((plain_s, timed(rt, x)))
            stalls_s.append(rt.stats().since(before).stall_s)
        if profile:
            profiler = cProfile.Profile()
            profiler.enable()
            for _ in range(n_passes):
                rt(x)
            profiler.disable()
            pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
        n_steps = len(rt.plan.steps)
    extra_s = [pass_s - plain_s - stall_s for (plain_s, pass_s), stall_s in zip(pairs, stalls_s, strict=True)]
    return {
        "budget": budget,
        "n_streamed_calls": n_steps,
        "plain_s": [plain_s for plain_s, _ in pairs],
        "pass_s": [pass_s for _, pass_s in pairs],
        "stall_s": stalls_s,
        "s_per_streamed_call": statistics.median(extra_s) / n_steps if n_steps else 0.0,
    }


def line(found: dict[str, Any]) -> str:
    """Returns the medians as text."""
    plain_s, pass_s = statistics.median(found["plain_s"]), statistics.median(found["pass_s"])
    return (
        f"budget {found['budget']:>5}: {found['n_streamed_calls']} streamed calls, {pass_s * 1e3:.2f} ms per pass, "
        f"{plain_s * 1e3:.2f} ms without litrt, {statistics.median(found['stall_s']) * 1e3:.2f} ms stalled: "
        f"{found['s_per_streamed_call'] * 1e6:.1f} microseconds per streamed call"
    )


def main(argv: list[str]) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        prog="python -m bench overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=400)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--budgets", default="50%,90%,100%")
    parser.add_argument("--passes", type=int, default=31)
    parser.add_argument("--profile", action="store_true", help="print where the time of each budget goes")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for budget in arguments.budgets.split(","):
            size = (arguments.layers, arguments.width)
            results.append(measure(*size, budget, arguments.passes, Path(folder), profile=arguments.profile))
            print(line(results[-1]), flush=True)
    if arguments.out is not None:
        report = {"machine": described(), "layers": arguments.layers, "width": arguments.width, "results": results}
        write_report(arguments.out, report)
    return 0
