"""One system, measured in a process of its own: what `python -m bench sweep` starts for every cell."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import litrt
from bench.data import Data
from bench.machine import drop_page_cache
from bench.models import ModelSpec, model_ctor
from bench.peers import PEERS, load_mapped
from bench.traces import as_json
from bench.workload import Mode, Workload, digest
from litrt.measured import N_PASSES


@dataclass(frozen=True)
class Job:
    """What a process is to measure.

    Attributes:
        system: "litrt", or one of `bench.peers.PEERS`.
        model: The model, as the fields of a `ModelSpec`.
        data: Folder of made models.
        mode: What a pass is.
        batch: Sequences, or images.
        n_tokens: Tokens per sequence.
        n_new: Tokens to generate.
        n_passes: Passes to time, after one that is not.
        cold: Empty the page cache before each.
        budget: Of litrt.
        policy: Of litrt.
        compress: Of litrt's store.
        n_threads: Threads that read, of litrt; None for what it chooses.
        mapped: Map the weights of the plain model, which memory cannot hold.
    """

    system: str
    model: dict[str, Any]
    data: str
    mode: Mode
    batch: int
    n_tokens: int
    n_new: int
    n_passes: int
    cold: bool = False
    budget: str = ""
    policy: str = ""
    compress: str = "none"
    n_threads: int | None = None
    mapped: bool = False

    def as_json(self) -> str:
        """Returns the job as text, for the command line."""
        return json.dumps(asdict(self))


Timed = tuple[list[float], list[float], str]


def timed(job: Job, workload: Workload, model: Any) -> Timed:
    """Returns wall seconds and CPU seconds of every pass, and the hash of what the last one returned."""
    wall_s, cpu_s = [], []
    output = torch.empty(0)
    for _ in range(job.n_passes):
        run = workload.ready(model)
        del output
        if job.cold:
            drop_page_cache()
        cpu_began_s, began_s = time.process_time(), time.perf_counter()
        output = run()
        wall_s.append(time.perf_counter() - began_s)
        cpu_s.append(time.process_time() - cpu_began_s)
    return wall_s, cpu_s, digest(output)


def measure_peer(job: Job, data: Data, workload: Workload) -> dict[str, Any]:
    """Returns the measurements of a system other than litrt."""
    began_s = time.perf_counter()
    model = load_mapped(data) if job.mapped else PEERS[job.system].load(data)
    workload.fill(model)
    workload.ready(model)()
    ready_s = time.perf_counter() - began_s
    return {"ready_s": ready_s, **_measured(timed(job, workload, model))}


def measure_litrt(job: Job, data: Data, workload: Workload) -> dict[str, Any]:
    """Returns the measurements of litrt.

    Raises:
        AssertionError: If it held more than its budget, or read other bytes than it had planned.
    """
    began_s = time.perf_counter()
    with litrt.Runtime(
        model_ctor(data.spec),
        data.store(job.compress),
        budget=job.budget,
        policy=job.policy,  # type: ignore[arg-type]
        n_threads=job.n_threads,
    ) as rt:
        if job.mode == "decode":
            workload.fill(rt)
        rt.warmup(**workload.arguments())
        model = rt.module if job.mode == "generate" else rt
        for _ in range(1 if job.mode == "generate" else N_PASSES):
            workload.ready(model)()
        ready_s = time.perf_counter() - began_s
        plan, before = rt.plan, rt.stats()
        measured = timed(job, workload, model)
        stats = rt.stats()
        counted = stats.since(before)
        is_same_plan = rt.plan.loads is plan.loads  # only what it predicts may be new
        print(rt.plan, file=sys.stderr)
        trace = as_json(rt.trace)
    n_forwards = job.n_passes * workload.n_forwards
    is_checked = job.mode != "generate" and is_same_plan and not counted.n_faults and job.policy == "belady"
    assert stats.peak_bytes <= stats.budget_bytes, f"held {stats.peak_bytes} bytes of {stats.budget_bytes}"
    if is_checked:
        planned_bytes = n_forwards * plan.streamed_bytes
        assert counted.read_bytes == planned_bytes, f"read {counted.read_bytes} bytes, planned {planned_bytes}"
    return {
        "ready_s": ready_s,
        **_measured(measured),
        "budget_bytes": stats.budget_bytes,
        "peak_bytes": stats.peak_bytes,
        "resident_bytes": stats.resident_bytes,
        "read_bytes_per_pass": counted.read_bytes / job.n_passes,
        "planned_bytes_per_pass": plan.streamed_bytes * workload.n_forwards,
        "bytes_checked": is_checked,
        "gathered_bytes_per_pass": plan.gathered_bytes * workload.n_forwards,
        "bound_bytes_per_pass": plan.bound_bytes * workload.n_forwards,
        "predicted_s": plan.pass_s * workload.n_forwards,
        "bandwidth_bps": plan.bandwidth_bps,
        "latency_s": plan.latency_s,
        "stall_s_per_pass": counted.stall_s / job.n_passes,
        "n_hits": counted.n_hits,
        "n_late": counted.n_late,
        "n_faults": counted.n_faults,
        "trace": trace,
    }


def _measured(found: Timed) -> dict[str, Any]:
    wall_s, cpu_s, sha256 = found
    return {
        "pass_s": wall_s,
        "cpu_s": cpu_s,
        "sha256": sha256,
        "max_rss_bytes": _status_bytes("VmHWM"),
        "rss_anon_bytes": _status_bytes("RssAnon"),
    }


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def main(argv: list[str]) -> int:
    """Does the job that is given as JSON, and prints what it found as JSON, on the last line."""
    job = Job(**json.loads(argv[0]))
    data = Data(Path(job.data), ModelSpec(**job.model))
    workload = Workload(data.spec, job.mode, job.batch, job.n_tokens, job.n_new)
    measure = measure_litrt if job.system == "litrt" else measure_peer
    with torch.no_grad():
        print(json.dumps(measure(job, data, workload)))
    return 0
