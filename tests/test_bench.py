"""The benchmarks run, small and without what only they need."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def test_the_gpu_benchmark_runs_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    gpu: Any = importlib.import_module("gpu")
    out = tmp_path / "gpu.json"
    # In a process of its own: what draws the picture, where it is installed, keeps fonts open.
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--dry-run", "--out", str(out)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads(out.read_text())
    assert gpu.table(report) in printed
    assert all(cell["same"] for cell in report["results"])
    mine = [cell for cell in report["results"] if cell["system"] == "litrt"]
    assert {(cell["budget"], cell["n_tokens"]) for cell in mine} == {
        (budget, n_tokens) for budget in ("30%", "100%") for n_tokens in (1, 16)
    }
    for cell in mine:
        assert cell["link_bytes"] == cell["planned_bytes"] >= cell["bound_bytes"]
        assert (cell["link_bytes"] == 0) == (cell["budget"] == "100%")
        assert cell["held_bytes"] <= cell["budget_bytes"]
    assert "over the bound" in printed
