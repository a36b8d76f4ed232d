"""Fixtures that all tests share, and the check that none leaves a thread or a descriptor behind."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus.report import Row, lines
from hypothesis import Phase, settings
from torch import nn

import litrt
import litrt.residency
import litrt.serving
from litrt.arena import POISON, Arena
from litrt.device import Device

MakeStore = Callable[..., Path]

sys.path.append(str(Path(__file__).parent.parent))  # for `bench`, behind the litrt that is installed

# The same examples in every run, so that a failure is one of the change at hand; --hypothesis-profile=search looks for
# new ones, --hypothesis-profile=many for more of them.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
# What threads do does not repeat, so that there is nothing to shrink.
settings.register_profile("many", deadline=None, max_examples=500, phases=[Phase.explicit, Phase.generate])
settings.load_profile("same")


def pytest_collection_finish() -> None:
    """Keeps what was imported for the tests out of what the cycle collector looks through, test by test."""
    gc.collect()
    gc.freeze()


def read_threads() -> set[threading.Thread]:
    """Returns the threads that read weights, of all runtimes."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("litrt-read")}


def open_files() -> Counter[str]:
    """Returns the files and folders that this process has open, with how often; pipes and devices left out."""
    found: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue  # the descriptor of the listing itself
        if target.startswith("/") and not target.startswith(("/dev/", "/proc/")):
            found[target] += 1
    return found


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fails a test after which there are threads that read, or open files, that were not there before it."""
    threads, files = read_threads(), open_files()
    yield
    if read_threads() - threads or open_files() - files:
        gc.collect()  # what a test has merely dropped may wait for the cycle collector
    left = sorted(thread.name for thread in read_threads() - threads)
    assert not left, f"threads were left running: {left}"
    opened = open_files() - files
    assert not opened, f"descriptors were left open: {dict(opened)}"


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """Returns a function that converts a state dict, or that of a module, to a store in a folder of the test."""

    def make(weights: nn.Module | Mapping[str, torch.Tensor], name: str = "model.zarr", **options: Any) -> Path:
        state = weights.state_dict() if isinstance(weights, nn.Module) else dict(weights)
        litrt.convert(state, tmp_path / name, progress=False, **options)
        return tmp_path / name

    return make


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills the arena of every runtime with NaN bytes, at first and wherever a weight is released."""

    def arena(device: Device, *args: Any) -> Arena:
        made = Arena(device, *args, poison=True)
        device.fill(made._memory, POISON)
        return made

    monkeypatch.setattr(litrt.serving, "Arena", arena)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poisons the runtimes of a test."""
    poison(monkeypatch)


@pytest.fixture
def rough_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes plans in a moment, for tests in which how fast they are does not matter."""
    monkeypatch.setattr(litrt.residency, "_WORK", 4000)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the table of the corpus, if much of it was run."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    reports = [report for report in reports if isinstance(report, pytest.TestReport) and report.when == "call"]
    rows = [Row(**row) for report in reports for key, row in report.user_properties if key == "corpus"]
    if len(rows) > 50:
        terminalreporter.section("corpus")
        for line in lines(rows):
            terminalreporter.write_line(line)
