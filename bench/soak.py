"""A runtime for an hour, in a memory limit a little above its budget: what it holds must not grow.

    python -m bench soak --layers 8 --width 2048 --budget 600MB --beside 600MB --data DIR --out soak.json
    python -m bench soak --layers 8 --width 2048 --budget 600MB --beside 600MB --data DIR --seconds 0

The process is in a memory control group that counts the page cache, of the budget and `--beside` for all else: the
interpreter, torch, activations. Passes of two lengths take turns; some are broken off in their middle, now and then the
budget changes and the runtime is made anew. Every result is compared with that of the plain model. Resident memory,
descriptors and threads are those of the process, in the last quarter of the samples and in the second one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import cgroup
from bench.data import Data
from bench.machine import described, drop_page_cache, write_report
from bench.models import add_model_arguments, spec_of
from bench.soaked import Soak
from litrt.units import format_bytes, parse_bytes

ROOT = Path(__file__).parent.parent
MOST_GROWTH_BYTES = 16 << 20
"""Of resident memory, from one quarter to the other: what allocators keep is not the same at all times."""


def reference(job: Soak) -> list[list[str]]:
    """Returns the hashes of the plain model's results."""
    command = [sys.executable, "-m", "bench", "soaked", replace(job, budget_bytes=0).as_json()]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    hashes: list[list[str]] = json.loads(process.stdout.splitlines()[-1])["sha256"]
    return hashes


def run(job: Soak, limit_bytes: int | None) -> tuple[int, list[dict[str, Any]]]:
    """Runs the process; returns its exit status and its lines."""
    command = [sys.executable, "-m", "bench", "soaked", job.as_json()]
    lines: list[dict[str, Any]] = []
    with cgroup.memory_group(limit_bytes) if limit_bytes else nullcontext(None) as enter:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(json.loads(line))
            if "s" in lines[-1]:
                print(line_of(lines[-1]), flush=True)
        return process.wait(), lines


def line_of(sample: dict[str, Any]) -> str:
    """Returns a sample as text."""
    group = "" if sample["group_peak_bytes"] is None else f", group at most {format_bytes(sample['group_peak_bytes'])}"
    return (
        f"{sample['s']:8.1f} s  {sample['n_passes']:6} passes  {format_bytes(sample['rss_bytes'])} resident{group}  "
        f"{sample['n_descriptors']} descriptors  {sample['n_threads']} threads  {sample['pass_s']} s per pass"
    )


def growth(samples: list[dict[str, Any]], field: str) -> tuple[float, float]:
    """Returns what there was in the second quarter of the samples, and in the last one.

    That is the median of resident memory, and the least of what is counted: a read has a file open for a moment.
    """
    quarter = max(len(samples) // 4, 1)
    typical = statistics.median if field == "rss_bytes" else min
    early, late = samples[quarter : 2 * quarter] or samples[:1], samples[-quarter:]
    return typical([s[field] for s in early]), typical([s[field] for s in late])


def faults(status: int, lines: list[dict[str, Any]], want: list[list[str]]) -> list[str]:
    """Says all that is not as it should be."""
    if status:
        return [f"killed by signal {-status}" if status < 0 else f"exit status {status}"]
    samples = [line for line in lines if "s" in line]
    found = []
    if lines[-1]["sha256"] != want:
        found.append(f"results differ from the plain model's: {lines[-1]['sha256']}")
    if any(sample["held_peak_bytes"] > sample["budget_bytes"] for sample in samples):
        found.append("more was held than the budget")
    early, late = growth(samples, "rss_bytes")
    if late - early > MOST_GROWTH_BYTES:
        found.append(f"resident memory grew by {format_bytes(int(late - early))}")
    for field in ("n_descriptors", "n_threads"):
        early, late = growth(samples, field)
        if late > early:
            found.append(f"{field} grew from {early:.0f} to {late:.0f}")
    return found


def main(argv: list[str]) -> int:
    """Runs, prints and writes; returns 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(
        prog="python -m bench soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, help="folder of made models")
    parser.add_argument("--budget", default="600MB", help="of litrt, in bytes (default: %(default)s)")
    parser.add_argument("--beside", help="what the memory limit is larger than the budget; no limit without it")
    parser.add_argument("--seconds", type=float, default=3600, help="(default: %(default)s)")
    parser.add_argument("--passes", type=int, default=200, help="at least (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs=2, default=(16, 24), metavar="N", help="of the two inputs")
    parser.add_argument("--every", type=float, default=20, metavar="S", help="seconds between samples")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    data = Data(arguments.data, spec_of(arguments))
    data.make(["litrt"], "none", print)
    budget_bytes = parse_bytes(arguments.budget)
    limit_bytes = budget_bytes + parse_bytes(arguments.beside) if arguments.beside else None
    job = Soak(
        asdict(data.spec),
        str(arguments.data.resolve()),
        tuple(arguments.tokens),
        budget_bytes,
        arguments.seconds,
        arguments.passes,
        arguments.every,
    )
    want = reference(job)
    drop_page_cache()
    status, lines = run(job, limit_bytes)
    found = faults(status, lines, want)
    samples = [line for line in lines if "s" in line]
    summary = (
        {field: growth(samples, field) for field in ("rss_bytes", "n_descriptors", "n_threads")} if samples else {}
    )
    print("; ".join(found) or f"{lines[-1]['n_passes']} passes, all as the plain model's; nothing grew: {summary}")
    if arguments.out is not None:
        report = {
            "machine": described(),
            "soak": {name: value for name, value in asdict(job).items() if name != "data"},
            "limit_bytes": limit_bytes,
            "faults": found,
            "growth": summary,
            "result": lines[-1] if lines and not status else None,
            "samples": samples,
        }
        write_report(arguments.out, report)
    return 1 if found else 0
