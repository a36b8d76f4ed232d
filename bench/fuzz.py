"""Reads inputs that are changed at random, and looks for what litrt promises never to do with any of them.

    python -m bench fuzz --seconds 600 --seed 1 --json fuzz.json --failures failures

An input is a whole one that is changed as random numbers say, those of the seed, its target and its number. So it is
the same wherever these are. Workers read the inputs, one worker at a time, and are watched. A failure is one of

  error    an exception that is not one litrt raises on purpose
  wrong    a value that is not what was stored, although no checksum was made to fit it
  memory   more memory than twice the bytes of the input and a fixed allowance: of address space, which is asked for,
           or of pages, which are used; or an allocation that fails
  hang     an input that takes longer than --timeout
  crash    a signal that ends the interpreter

A worker that hangs, crashes or takes too much is followed by another, which goes on behind that input. The first three
inputs of each failure are kept in --failures. `--replay TARGET:NUMBER` reads one input here, and raises its error.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from bench.hostile import TARGETS, Input, Target
from bench.machine import described, write_report
from litrt.errors import LitrtError

ADDRESS_BYTES = 256 << 20
"""Address space that an input may take beside twice its size. litrt believes in a tensor of up to 64 MiB before it has
looked for it, and gives scratch as large to its chunk as it is stored, and to its padding."""

RESIDENT_BYTES = 80 << 20
"""Pages that an input may take beside twice its size: a tensor that was believed in, and scratch that is used."""

_LIMIT_BYTES = 1 << 30
"""Address space at which an allocation fails."""

_STACK_BYTES = 1 << 20
_M_ARENA_MAX = -8
_N_KEPT = 3
_POLL_S = 0.1


@dataclass
class Failure:
    """One kind of failure of a target.

    Attributes:
        kind: "error", "wrong", "memory", "hang" or "crash".
        what: What was raised, and where in litrt, or how much memory was taken.
        n_inputs: How many inputs failed so.
        numbers: The first of them.
    """

    kind: str
    what: str
    n_inputs: int = 0
    numbers: list[int] = field(default_factory=list)


@dataclass
class Count:
    """What became of the inputs of a target.

    Attributes:
        n_inputs: How many were read.
        n_refused: Those that were refused when they were opened.
        n_damaged: Those of which not all could be read.
        cpu_s: Processor seconds of the workers.
        peak_address_bytes: The most address space that one took.
        peak_resident_bytes: The most pages that one took.
        failures: What should not have happened.
    """

    n_inputs: int = 0
    n_refused: int = 0
    n_damaged: int = 0
    cpu_s: float = 0.0
    peak_address_bytes: int = 0
    peak_resident_bytes: int = 0
    failures: list[Failure] = field(default_factory=list)

    def take(self, progress: _Progress) -> None:
        """Adds what a worker has done that has ended."""
        self.n_inputs += int(progress["n_inputs"])
        self.n_refused += int(progress["n_refused"])
        self.n_damaged += int(progress["n_damaged"])
        self.cpu_s += progress["cpu_s"]
        self.peak_address_bytes = max(self.peak_address_bytes, int(progress["address"]))
        self.peak_resident_bytes = max(self.peak_resident_bytes, int(progress["resident"]))

    def add(self, kind: str, what: str, number: int) -> bool:
        """Counts a failure; returns whether it is one of the first of its kind, whose inputs are kept."""
        found = next((failure for failure in self.failures if (failure.kind, failure.what) == (kind, what)), None)
        if found is None:
            found = Failure(kind, what)
            self.failures.append(found)
        found.n_inputs += 1
        if len(found.numbers) < _N_KEPT:
            found.numbers.append(number)
            return True
        return False


def made(target: Target, seed: int, number: int) -> Input:
    """Returns an input of a target by its number."""
    return target.change(Random(f"{seed}/{target.name}/{number}"))


# In a worker.


class Memory:
    """The memory of this process: what one input takes of it at most. It needs Linux."""

    def __init__(self) -> None:
        self._status = open("/proc/self/status", "rb", buffering=0)  # noqa: SIM115 (read for each input)

    def read(self) -> dict[str, int]:
        """Returns the bytes of address space and of pages, now and at most: VmSize, VmPeak, VmRSS, VmHWM."""
        self._status.seek(0)
        lines = (line.split() for line in self._status.read(4096).splitlines() if line.startswith(b"Vm"))
        return {key[:-1].decode(): int(n_kib) << 10 for key, n_kib, _ in lines}

    @staticmethod
    def taken(before: dict[str, int], after: dict[str, int]) -> tuple[int, int]:
        """Returns the address space and the pages taken between two readings; 0 where earlier ones took more."""
        address = after["VmPeak"] - before["VmSize"] if after["VmPeak"] > before["VmPeak"] else 0
        resident = after["VmHWM"] - before["VmRSS"] if after["VmHWM"] > before["VmHWM"] else 0
        return address, resident


class _Progress:
    """Numbers that a worker shares with its watcher, who reads them even when the worker has crashed."""

    FIELDS = ("number", "began_s", "n_inputs", "n_refused", "n_damaged", "cpu_s", "address", "resident")

    def __init__(self, context: Any) -> None:
        self._values = context.RawArray("d", len(self.FIELDS))

    def __getitem__(self, key: str) -> float:
        return float(self._values[self.FIELDS.index(key)])

    def __setitem__(self, key: str, value: float) -> None:
        self._values[self.FIELDS.index(key)] = value


@dataclass(frozen=True)
class Task:
    """What a worker reads.

    Attributes:
        target: The kind of its inputs.
        folder: Where they are.
        seed: What they are made of.
        first: The number of the first.
        end: The number after the last.
        until_s: When to stop, by the monotonic clock.
    """

    target: type[Target]
    folder: Path
    seed: int
    first: int
    end: int
    until_s: float


def work(task: Task, progress: _Progress, told: Connection) -> None:
    """Reads inputs one after the other, and tells of failures."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)  # or each thread reserves an arena of its own
    threading.stack_size(_STACK_BYTES)
    target = task.target(task.folder)
    whole = {path: target.read(Input(path)) for _ in range(3) for path in target.paths}
    for path, values in whole.items():
        if not values or None in values.values():
            raise AssertionError(f"{path} is not read whole before it is changed: {values}")
    memory = Memory()
    before = memory.read()
    most = before["VmSize"] + _LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    total = sum(map(len, target.files.values()))
    for number in range(task.first, task.end):
        if time.monotonic() >= task.until_s:
            return
        given = made(target, task.seed, number)
        target.put(given.files)
        before = memory.read()
        progress["number"], progress["began_s"] = number, time.monotonic()
        answer = _answer(target, given, whole[given.path])
        progress["began_s"] = 0.0
        address, resident = memory.taken(before, memory.read())
        target.restore(given)
        size = total + sum(len(content) - len(target.files[file]) for file, content in given.files.items())
        progress["n_inputs"] += 1
        progress["address"] = max(progress["address"], address)
        progress["resident"] = max(progress["resident"], resident)
        progress["cpu_s"] = time.process_time()
        if answer in ("refused", "damaged"):
            progress[f"n_{answer}"] += 1
        elif answer != "read":
            told.send((*answer.split(": ", 1), number))
        if address > 2 * size + ADDRESS_BYTES or resident > 2 * size + RESIDENT_BYTES:
            told.send(("memory", _memory_taken(address, resident), number))
            return  # what one has taken hides what the next ones take


def _memory_taken(address: int, resident: int) -> str:
    def rounded(n_bytes: int) -> str:
        return f"up to {1 << (n_bytes >> 20).bit_length()} MiB"

    return f"{rounded(address)} of address space, {rounded(resident)} of pages"


def _answer(target: Target, given: Input, whole: dict[str, int | None]) -> str:
    """Returns what becomes of an input: "read", "damaged", "refused", or the kind of a failure and what it is."""
    try:
        values = target.read(given)
    except BaseException as error:
        return _judged(error)
    if given.is_sound and any(crc is not None and crc != whole.get(name) for name, crc in values.items()):
        return "wrong: values that were not stored were read"
    return "damaged" if None in values.values() else "read"


def _judged(error: BaseException) -> str:
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, MemoryError) or "can't allocate memory" in str(chain):
            return f"memory: {_place(error)}: {type(chain).__name__}"
        chain = chain.__cause__ or chain.__context__
    if isinstance(error, LitrtError | FileNotFoundError):
        return "refused"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, TypeError) and Path(frames[-1].filename).name == "checkpoint.py":
        return "refused"  # a checkpoint that has something else than tensors
    return f"error: {_place(error)}: {type(error).__name__}"


def _place(error: BaseException) -> str:
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if f"{os.sep}litrt{os.sep}" in frame.filename
    ]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside of litrt"


# The watcher.


def watch(target: type[Target], folder: Path, options: argparse.Namespace, until_s: float) -> Count:
    """Has workers read inputs of a target until a time, and returns what became of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.fuzz"])
    count = Count()
    pristine, used = folder / "pristine", folder / "used"
    pristine.mkdir()
    target.make(pristine)
    keep = _Keep(target(pristine), options)
    first, end = options.first, options.first + options.inputs
    while first < end and time.monotonic() < until_s:
        shutil.rmtree(used, ignore_errors=True)
        shutil.copytree(pristine, used)
        progress = _Progress(context)
        progress["number"] = first - 1
        hears, tells = context.Pipe(duplex=False)
        task = Task(target, used, options.seed, first, end, until_s)
        process = context.Process(target=work, args=(task, progress, tells))
        process.start()
        tells.close()
        has_hung = False
        with hears:
            while not _has_ended(hears, lambda *failure: keep.failure(count, *failure)):
                began_s = progress["began_s"]
                if not has_hung and began_s and time.monotonic() - began_s > options.timeout:
                    has_hung = True
                    process.kill()
        process.join()
        count.take(progress)
        last = int(progress["number"])
        count.n_inputs += has_hung or process.exitcode != 0
        if has_hung:
            keep.failure(count, "hang", f"more than {options.timeout} s", last)
        elif process.exitcode != 0:
            if not progress["began_s"]:
                raise SystemExit(f"a worker for {target.name} ended with {process.exitcode}, and had no input.")
            keep.failure(count, "crash", _ended(process.exitcode or 0), last)
        first = last + 1
    return count


def _ended(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit {status}"


def _has_ended(hears: Connection, hear: Callable[..., None]) -> bool:
    """Passes on what a worker tells for a moment; returns whether it has ended."""
    try:
        while hears.poll(_POLL_S):
            hear(*hears.recv())
    except EOFError:
        return True
    return False


@dataclass
class _Keep:
    """Keeps the inputs that fail."""

    target: Target
    options: argparse.Namespace

    def failure(self, count: Count, kind: str, what: str, number: int) -> None:
        if not count.add(kind, what, number):
            return
        print(f"  {self.target.name}:{number} {kind}: {what}", flush=True)
        if self.options.failures is None:
            return
        given = made(self.target, self.options.seed, number)
        folder = self.options.failures / f"{self.target.name}-{self.options.seed}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.target.folder, folder)
        type(self.target)(folder).put(given.files)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Yields a folder in memory, where there is one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def replay(name: str, number: int, seed: int) -> None:
    """Reads one input in this process, and prints what is in it."""
    with _folder() as folder:
        TARGETS[name].make(folder)
        target = TARGETS[name](folder)
        given = made(target, seed, number)
        target.put(given.files)
        for file, content in given.files.items():
            print(f"{file}, {len(content)} bytes: {content[:2000]!r}")
        print(target.read(given))


def main(argv: list[str]) -> int:
    """Looks for failures, prints them, and returns 1 if there are any."""
    parser = argparse.ArgumentParser(
        prog="python -m bench fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", default=",".join(TARGETS), help="separated by commas; all: %(default)s")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--inputs", type=int, default=1 << 60, help="of each target, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds that an input may take")
    parser.add_argument("--json", type=Path, help="the file to write what was found to")
    parser.add_argument("--failures", type=Path, help="the folder to keep inputs in that fail")
    parser.add_argument("--replay", metavar="TARGET:NUMBER")
    options = parser.parse_args(argv)
    if options.replay:
        name, _, number = options.replay.rpartition(":")
        replay(name, int(number), options.seed)
        return 0
    names = options.targets.split(",")
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        parser.error(f"there is no target {unknown[0]!r}: choose from {', '.join(TARGETS)}.")
    counts = {}
    for name in names:
        with _folder() as folder:
            began_s = time.monotonic()
            counts[name] = watch(TARGETS[name], folder, options, began_s + options.seconds / len(names))
        print(line(name, counts[name]), flush=True)
    n_inputs, cpu_s = sum(c.n_inputs for c in counts.values()), sum(c.cpu_s for c in counts.values())
    n_failures = sum(failure.n_inputs for count in counts.values() for failure in count.failures)
    print(f"{n_inputs} inputs in {cpu_s / 3600:.2f} processor hours, {n_failures} failures")
    if options.json is not None:
        targets = {name: asdict(count) for name, count in counts.items()}
        report = {"machine": described(), "seed": options.seed, "first": options.first, "seconds": options.seconds}
        limits = {"address_bytes": ADDRESS_BYTES, "resident_bytes": RESIDENT_BYTES, "timeout_s": options.timeout}
        write_report(options.json, report | {"beside_twice_the_input": limits, "targets": targets})
    return 1 if n_failures else 0


def line(name: str, count: Count) -> str:
    """Returns what became of the inputs of a target in a line."""
    n_failures = sum(failure.n_inputs for failure in count.failures)
    return (
        f"{name:<12}{count.n_inputs:>9} inputs, {count.n_inputs / max(count.cpu_s, 1e-9):6.0f} per processor second: "
        f"{count.n_refused} refused, {count.n_damaged} damaged, {n_failures} failed; at most "
        f"{count.peak_address_bytes >> 20} MiB of address space, {count.peak_resident_bytes >> 20} MiB of pages"
    )
