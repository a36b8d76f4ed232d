"""A runtime that serves passes for a long time, in a process of its own: what `python -m bench soak` starts."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

import litrt
from bench.cgroup import peak_bytes
from bench.data import Data
from bench.models import ModelSpec, model_ctor
from bench.peers import PEERS
from bench.workload import Workload, digest

BREAK_EVERY, CHANGE_EVERY, MAKE_EVERY = 25, 40, 200
"""In passes: how often one is broken off, the budget changes, and the runtime is made anew."""

SMALLER = 0.8
"""The share of the budget that a change leaves."""


@dataclass(frozen=True)
class Soak:
    """What a process is to do.

    Attributes:
        model: The model, as the fields of a `ModelSpec`.
        data: Folder of made models.
        n_tokens: Tokens of the two inputs, in turn.
        budget_bytes: Of litrt; 0 for the plain model, whose results are compared with.
        seconds: How long, at least.
        n_passes: How many, at least.
        every_s: Seconds between two samples.
    """

    model: dict[str, Any]
    data: str
    n_tokens: tuple[int, int]
    budget_bytes: int
    seconds: float
    n_passes: int
    every_s: float

    def as_json(self) -> str:
        """Returns it as text, for the command line."""
        return json.dumps(asdict(self))


class BrokenOff(Exception):
    """Ends a pass in its middle."""


def sample(n_passes: int, began_s: float, pass_s: list[float], rt: litrt.Runtime) -> dict[str, Any]:
    """Returns what the process has of everything now."""
    process = psutil.Process()
    stats = rt.stats()
    return {
        "s": round(time.perf_counter() - began_s, 1),
        "n_passes": n_passes,
        "rss_bytes": process.memory_info().rss,
        "n_descriptors": process.num_fds(),
        "n_threads": process.num_threads(),
        "group_peak_bytes": peak_bytes(),
        "held_peak_bytes": stats.peak_bytes,
        "budget_bytes": stats.budget_bytes,
        "pass_s": round(statistics.median(pass_s), 4) if pass_s else None,
    }


def soak(job: Soak, workloads: list[Workload], make: Callable[[], litrt.Runtime], tell: Callable[[str], None]) -> Any:
    """Serves passes; tells of every sample, and returns the hashes of each input's results."""
    found: list[set[str]] = [set(), set()]
    n_passes, n_broken, told_s = 0, 0, 0.0
    pass_s: list[float] = []
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < job.seconds or n_passes < job.n_passes:
        with make() as rt:
            for workload in workloads:
                rt.warmup(**workload.arguments())
            for number in range(MAKE_EVERY):
                if number % CHANGE_EVERY == CHANGE_EVERY - 1:
                    is_smaller = number // CHANGE_EVERY % 2 == 0
                    rt.set_budget(int(job.budget_bytes * SMALLER) if is_smaller else job.budget_bytes)
                if number % BREAK_EVERY == BREAK_EVERY - 1:
                    n_broken += break_off(rt, workloads[0])
                which = number % 2
                pass_began_s = time.perf_counter()
                found[which].add(digest(workloads[which].ready(rt)()))
                pass_s.append(time.perf_counter() - pass_began_s)
                n_passes += 1
                now_s = time.perf_counter() - began_s
                if now_s - told_s >= job.every_s:
                    told_s = now_s
                    tell(json.dumps(sample(n_passes, began_s, pass_s, rt)))
                    pass_s.clear()
                if now_s >= job.seconds and n_passes >= job.n_passes:
                    tell(json.dumps(sample(n_passes, began_s, pass_s, rt)))
                    break
    return {"n_passes": n_passes, "n_broken": n_broken, "sha256": [sorted(hashes) for hashes in found]}


def break_off(rt: litrt.Runtime, workload: Workload) -> bool:
    """Runs a pass that ends in its middle."""
    parts = [part for part in rt.module.modules() if not [*part.children()]]

    def stop(*_: object) -> None:
        raise BrokenOff

    handle = parts[len(parts) // 2].register_forward_hook(stop)
    try:
        workload.ready(rt)()
    except BrokenOff:
        return True
    finally:
        handle.remove()
    return False


def main(argv: list[str]) -> int:
    """Does what is given as JSON; prints samples and at last the result, each as a line of JSON."""
    given = json.loads(argv[0])
    job = Soak(**{**given, "n_tokens": tuple(given["n_tokens"])})
    data = Data(Path(job.data), ModelSpec(**job.model))
    workloads = [Workload(data.spec, "pass", 1, n_tokens, 0) for n_tokens in job.n_tokens]

    def tell(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    with torch.no_grad():
        if not job.budget_bytes:
            model = PEERS["plain"].load(data)
            tell(json.dumps({"sha256": [[digest(workload.ready(model)())] for workload in workloads]}))
            return 0
        tell(json.dumps({"pid": os.getpid(), "rss_bytes": psutil.Process().memory_info().rss}))
        store = litrt.open_store(data.store("none"))
        result = soak(job, workloads, lambda: litrt.Runtime(model_ctor(data.spec), store, job.budget_bytes), tell)
    tell(json.dumps(result))
    return 0
