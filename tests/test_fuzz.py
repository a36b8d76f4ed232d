"""The fuzzer finds what it looks for, says which input it was, and goes on behind it."""

from __future__ import annotations

import ctypes
import json
import os
import re
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from bench import fuzz
from bench.hostile import TARGETS, Input, Target
from litrt.errors import StoreError


def deny() -> int:
    raise StoreError("no")


def misuse() -> int:
    raise KeyError("a bug")


def take(n_bytes: int) -> int:
    return int(np.ones(n_bytes, dtype=np.uint8)[0]) - 1


DEEDS: list[Any] = [
    lambda: 0,
    misuse,
    lambda: ctypes.string_at(0),
    deny,
    lambda: time.sleep(60),
    lambda: 8,
    lambda: take(fuzz.RESIDENT_BYTES + (32 << 20)),
    lambda: torch.empty(fuzz.ADDRESS_BYTES + (32 << 20), dtype=torch.uint8).numel() * 0,
    lambda: np.empty(1 << 40, dtype=np.uint8),
    lambda: os._exit(3),
    lambda: None,
    misuse,
]
"""What reading the inputs does, one after the other."""


SEED = 5


class Planted(Target):
    """Inputs of which some make their reader do what it must not."""

    name = "planted"
    paths = ("number",)

    @classmethod
    def make(cls, folder: Path) -> None:
        (folder / "number").write_text("0")

    def change(self, random: Random) -> Input:
        drawn = random.random()
        number = next(n for n in range(len(DEEDS)) if Random(f"{SEED}/planted/{n}").random() == drawn)
        return Input("number", {"number": str(number).encode()}, is_sound=True)

    def read(self, given: Input) -> dict[str, int | None]:
        return {"x": DEEDS[int((self.folder / given.path).read_text())]()}


def test_what_must_not_happen_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TARGETS, "planted", Planted)
    arguments = ["--targets", "planted", "--seconds", "60", "--timeout", "2", "--inputs", str(len(DEEDS))]
    arguments += ["--seed", str(SEED)]
    arguments += ["--json", str(tmp_path / "found.json"), "--failures", str(tmp_path / "kept")]
    assert fuzz.main(arguments) == 1
    printed = capfd.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())["targets"]["planted"]
    failures = [
        # How much memory it is, beside what was asked for, is the machine's.
        (failure["kind"], re.sub(r"up to \d+ MiB", "so much", failure["what"]), failure["numbers"])
        for failure in found["failures"]
    ]
    assert failures == [
        ("error", "outside of litrt: KeyError", [1, 11]),
        ("crash", "SIGSEGV", [2]),
        ("hang", "more than 2.0 s", [4]),
        ("wrong", "values that were not stored were read", [5]),
        ("memory", "so much of address space, so much of pages", [6]),
        ("memory", "so much of address space, so much of pages", [7]),
        ("memory", "outside of litrt: MemoryError", [8]),
        ("crash", "exit 3", [9]),
    ]
    assert (found["n_inputs"], found["n_refused"], found["n_damaged"]) == (len(DEEDS), 1, 1)
    assert f"planted{len(DEEDS):>14} inputs" in printed
    assert "planted:4 hang: more than 2.0 s" in printed
    assert (tmp_path / "kept" / f"planted-{SEED}-4" / "number").read_text() == "4"


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_an_input_is_the_same_by_its_number(name: str, tmp_path: Path) -> None:
    inputs = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        TARGETS[name].make(folder)
        target = TARGETS[name](folder)
        for path in target.paths:
            values = target.read(Input(path))
            assert values
            assert None not in values.values()
        inputs.append([fuzz.made(target, 1, number) for number in range(10)])
    assert inputs[0] == inputs[1]
    changed = [given for given in inputs[0] if given.files != {file: target.files[file] for file in given.files}]
    assert len(changed) >= 5


def test_a_whole_target_has_no_failures(tmp_path: Path) -> None:
    arguments = [
        "--targets",
        "safetensors",
        "--seconds",
        "60",
        "--inputs",
        "50",
        "--json",
        str(tmp_path / "found.json"),
    ]
    assert fuzz.main(arguments) == 0
    found = json.loads((tmp_path / "found.json").read_text())["targets"]["safetensors"]
    assert (found["n_inputs"], found["failures"]) == (50, [])


def test_a_target_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fuzz.main(["--targets", "metadata,none"])
    assert "there is no target 'none'" in capsys.readouterr().err
