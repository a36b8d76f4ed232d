"""Measures seconds per pass against budget: litrt with several policies, its peers, the plain model and the bound.

    python -m bench sweep --model gptj --layers 2 --width 1024 --rounds 2 --out sweep.jsonl
    python -m bench sweep --model gptj --layers 8 --limit 4GB --budgets 3GB --policies belady \\
        --peers plain,safetensors-mmap,accelerate,pytorch-lit --data /disk/models --out peers.jsonl

Every cell is a process of its own, and cells take turns, round by round. Before each, the disk is measured with direct
reads. What a cell returns is compared, bit for bit, with what the plain model does. With --limit (which needs root), a
cell runs in a memory control group that counts the page cache; the plain model, and budgets that leave less than
0.75 GB of the limit, run without. Raw samples are appended to the file that --out names as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import psutil

from bench import cgroup, machine
from bench.cell import Job
from bench.data import Data, RandomWeights, bytes_under
from bench.models import LANGUAGE, NAMES, add_model_arguments, spec_of
from bench.peers import PEERS
from bench.traces import from_json, same_uses
from bench.workload import MODES
from litrt.errors import BudgetError
from litrt.trace import Trace
from litrt.units import format_bytes, parse_bytes

ROOT = Path(__file__).parent.parent
_OVERHEAD_BYTES = 750_000_000
"""Memory that Python, torch, transformers and activations need beside a budget."""

_SPARE_BYTES = 2_000_000_000
"""Memory that the plain model needs beside its weights."""


@dataclass(frozen=True)
class Entry:
    """A cell to measure, and whether inside the limit."""

    job: Job
    limited: bool

    @property
    def label(self) -> dict[str, str]:
        """What tells it from other cells."""
        if self.job.system != "litrt":
            return {"system": self.job.system}
        return {"system": "litrt", "policy": self.job.policy, "budget": self.job.budget}


class Sweep:
    """A sweep under way.

    Args:
        arguments: From the command line.
        data: The model on disk.
        file: Where raw samples go.
        tell: Prints a line.
    """

    def __init__(self, arguments: argparse.Namespace, data: Data, file: TextIO, tell: Callable[[str], None]) -> None:
        self._arguments = arguments
        self._data = data
        self._file = file
        self._tell = tell
        self._traces: list[Trace] = []
        self._want: str | None = None
        self.n_wrong = 0
        self._model_bytes = RandomWeights(data.spec).total_bytes
        self._limit_bytes: int | None = None
        self._notes: list[str] = []
        if arguments.limit is not None:
            self._limit_bytes = parse_bytes(arguments.limit)
            why = cgroup.why_not(self._limit_bytes)
            if why is not None:
                self._note(f"there is no limit of memory: {why}")
                self._limit_bytes = None
        self._drops = machine.drop_page_cache()
        if not self._drops:
            self._note("the page cache is not emptied, which needs root: what others read may come from memory")
        self._cold = bool(arguments.cold and self._drops)

    def _note(self, text: str) -> None:
        self._notes.append(text)
        self._tell(f"note: {text}")

    def run(self) -> None:
        """Measures everything."""
        self._write("sweep", self._header())
        missing = {
            system: why
            for system in self._arguments.peers
            if (why := PEERS[system].missing(self._data.spec.dtype)) is not None
        }
        for system, why in missing.items():
            self._finish({"system": system, "round": 0, "error": why})
        entries = list(self._entries(missing))
        if "plain" not in self._arguments.peers:
            self._measure(self._plain(), 0)
        for number in range(self._arguments.rounds):
            # What a cell leaves behind of the machine is not always left to the same one.
            for entry in reversed(entries) if number % 2 else entries:
                self._measure(entry, number)

    def _header(self) -> dict[str, Any]:
        arguments = {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(self._arguments).items()
        }
        spec = self._data.spec
        header: dict[str, Any] = {
            "machine": machine.described(),
            "model": {"name": NAMES[spec.kind], "bytes": self._model_bytes, **asdict(spec)},
            "arguments": arguments,
            "limit_bytes": self._limit_bytes,
            "page_cache_emptied": self._drops,
            "cold": self._cold,
            "notes": self._notes,
        }
        if self._arguments.compress != "none":
            store_bytes = bytes_under(self._data.store(self._arguments.compress))
            header |= {"store_bytes": store_bytes, "compression_ratio": self._model_bytes / store_bytes}
        return header

    def _entries(self, missing: dict[str, str]) -> Iterator[Entry]:
        if "plain" in self._arguments.peers:
            yield self._plain()
        for budget in self._arguments.budgets:
            for policy in self._arguments.policies:
                job = replace(self._job("litrt"), budget=budget, policy=policy, n_threads=self._arguments.threads)
                yield Entry(job, self._is_limited(budget))
        for system in self._arguments.peers:
            if system != "plain" and system not in missing:
                yield Entry(self._job(system), self._limit_bytes is not None)

    def _is_limited(self, budget: str) -> bool:
        if self._limit_bytes is None or budget == "auto":
            return False
        budget_bytes = 0 if budget == "min" else parse_bytes(budget, of_bytes=self._model_bytes)
        return budget_bytes + _OVERHEAD_BYTES <= self._limit_bytes

    def _plain(self) -> Entry:
        fits = psutil.virtual_memory().available >= self._model_bytes + _SPARE_BYTES
        job = self._job("plain")
        return Entry(job if fits else replace(job, mapped=True, n_passes=1), limited=False)

    def _job(self, system: str) -> Job:
        arguments = self._arguments
        return Job(
            system=system,
            model=asdict(self._data.spec),
            data=str(self._data.folder.parent.resolve()),
            mode=arguments.mode,
            batch=arguments.batch,
            n_tokens=arguments.tokens,
            n_new=arguments.new_tokens,
            n_passes=arguments.passes,
            cold=self._cold,
            compress=arguments.compress,
        )

    def _measure(self, entry: Entry, number: int) -> None:
        load = os.getloadavg()[0]
        if self._drops:
            machine.drop_page_cache()
        disk_bps = machine.read_bps(self._data.safetensors, self._arguments.threads or machine.N_THREADS)
        cell: dict[str, Any] = {**entry.label, "round": number, "limited": entry.limited, "load": load}
        cell["disk_bps"] = disk_bps
        self._finish(cell | self._started(entry))

    def _started(self, entry: Entry) -> dict[str, Any]:
        """Runs a cell in a process of its own, and returns what it measured, or how it failed."""
        command = [sys.executable, "-m", "bench", "cell", entry.job.as_json()]
        group = cgroup.memory_group(self._limit_bytes) if entry.limited and self._limit_bytes else nullcontext(None)
        with group as enter:
            try:
                process = subprocess.run(
                    command,
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    timeout=self._arguments.timeout_s,
                    preexec_fn=enter,
                )
            except subprocess.TimeoutExpired:
                return {"exit_status": None, "error": f"no result in {self._arguments.timeout_s} s"}
        if process.returncode:
            said = process.stderr.strip().splitlines()
            killed = f"killed by signal {-process.returncode}" if process.returncode < 0 else ""
            return {"exit_status": process.returncode, "error": killed or (said[-1] if said else "no message")}
        found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
        if entry.job.mapped:
            self._tell(
                "note: the plain model does not fit in memory: its values are compared with, its time is not kept"
            )
            found |= {"pass_s": [], "cpu_s": [], "mapped": True}
        return found

    def _finish(self, cell: dict[str, Any]) -> None:
        """Compares what a cell returned, and writes it down."""
        trace = cell.pop("trace", None)
        if trace is not None:
            self._add_trace(from_json(trace), trace)
        if "sha256" in cell:
            if self._want is None and cell["system"] == "plain":
                self._want = cell["sha256"]
            cell["same"] = cell["sha256"] == self._want if self._want is not None else None
        self._write("cell", cell)
        self._tell(self._line(cell))
        failed = cell["system"] in ("litrt", "plain") and "error" in cell and "BudgetError" not in cell["error"]
        self.n_wrong += failed or cell.get("same", True) is not True

    def _add_trace(self, trace: Trace, as_json: dict[str, Any]) -> None:
        if not any(same_uses(trace, other) for other in self._traces):
            self._traces.append(trace)
            self._write("trace", {"name": self._data.spec.title, **as_json})

    def _write(self, line: str, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps({"line": line, **entry}) + "\n")
        self._file.flush()

    def _line(self, cell: dict[str, Any]) -> str:
        name = f"{cell['round']}  {cell['system']:<17}{cell.get('budget', ''):>6} {cell.get('policy', ''):<7}"
        if "error" in cell:
            status = cell.get("exit_status")
            return f"{name}{'failed' if status is None else f'exit status {status}'}: {cell['error']}"
        if not cell["pass_s"]:
            return f"{name}values only"
        seconds = statistics.median(cell["pass_s"])
        parts = [f"{seconds:9.4f} s", f"{statistics.median(cell['cpu_s']):8.3f} CPU s"]
        if self._arguments.mode == "generate":
            parts.append(f"{self._arguments.new_tokens / seconds:.3f} tokens/s")
        parts.append(f"RSS {format_bytes(cell['max_rss_bytes'])}")
        if cell["system"] == "litrt":
            parts.append(f"predicted {cell['predicted_s']:.4f} s")
            parts.append(f"read {format_bytes(cell['read_bytes_per_pass'])}, stalled {cell['stall_s_per_pass']:.3f} s")
            parts.append(f"{cell['n_faults']} faults")
        if cell["disk_bps"]:
            parts.append(f"disk {cell['disk_bps'] / 1e9:.2f} GB/s")
        verdict = {True: "bit-identical", False: "DIFFERENT FROM THE PLAIN MODEL", None: "nothing to compare with"}
        return f"{name}{', '.join(parts)}  {verdict[cell['same']]}"


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--mode", choices=MODES, default="pass", help="what is timed: a forward, the decoding of one "
                        "token with a filled cache, or a generation (default: %(default)s)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="sequences, or images (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--budgets", type=_list, default=_list("10%,25%,50%,75%,100%"))
    parser.add_argument("--policies", type=_list, default=_list("belady,lru"))
    parser.add_argument("--peers", type=_list, default=["plain"], help=f"of {', '.join(PEERS)} (default: plain)")
    parser.add_argument("--cold", action="store_true", help="empty the page cache before each pass (needs root)")
    parser.add_argument("--limit", help="memory of a cell, the page cache counted, as in 4GB (needs root)")
    parser.add_argument("--compress", choices=("none", "lz4", "zstd", "auto"), default="none", help="litrt's store")
    parser.add_argument("--threads", type=int, help="that read, of litrt and to measure the disk")
    parser.add_argument("--rounds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--passes", type=int, default=3, help="timed in each cell (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=1800, help="of one cell (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder of made models, on the disk to measure, kept and used again; "
                        "by default a temporary one")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines to write")
    arguments = parser.parse_args(argv)
    for name, known in (("peers", tuple(PEERS)), ("policies", ("belady", "lru"))):
        for value in getattr(arguments, name):
            if value not in known:
                parser.error(f"--{name}: {value!r} is none of {', '.join(known)}")
    for budget in arguments.budgets:
        if budget not in ("min", "auto"):
            try:
                parse_bytes(budget, of_bytes=10**9)
            except BudgetError as error:
                parser.error(f"--budgets: {error}")
    if arguments.mode != "pass" and arguments.model not in LANGUAGE:
        parser.error(f"--mode {arguments.mode} needs one of {', '.join(LANGUAGE)}")
    return arguments


def main(argv: list[str]) -> int:
    """Runs a sweep; returns 1 if a result was wrong, or if litrt or the plain model failed."""
    arguments = parse(argv)

    def tell(line: str) -> None:
        print(line, flush=True)

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, arguments.out.open("w") as file:
        data = Data(arguments.data or Path(temporary), spec_of(arguments))
        systems = [name for name in arguments.peers if PEERS[name].missing(data.spec.dtype) is None]
        data.make(["litrt", *systems], arguments.compress, tell)
        sweep = Sweep(arguments, data, file, tell)
        sweep.run()
    if sweep.n_wrong:
        print(f"{sweep.n_wrong} cells FAILED or returned other values than the plain model", file=sys.stderr)
    return int(sweep.n_wrong > 0)
