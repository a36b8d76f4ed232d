"""The benchmarks run, small and without what only they need."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from litrt.compression import CODECS, SETTINGS, encode

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


def test_the_reader_benchmark_reads_every_store_at_every_number_of_threads(tmp_path: Path) -> None:
    out = tmp_path / "reader.json"
    command = [sys.executable, str(ROOT / "bench" / "reader.py"), "--folder", str(tmp_path), "--out", str(out)]
    command += ["--gb", "0.07", "--repeats", "1", "--threads", "1,3"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads(out.read_text())
    assert [row["n_threads"] for row in report["results"]] == [1, 3]
    assert list(report["results"][1]["samples"]) == [
        "raw",
        *(f"{codec}, {most} at once" for codec in ("none", "lz4") for most in (2, 3)),
    ]
    assert report["n_bytes"] == 4096 * 4096 * 4
    assert report["lz4"]["stored_bytes"] < report["n_bytes"]
    assert "3 threads: raw " in printed
    assert [path.name for path in tmp_path.iterdir()] == ["reader.json"]


def test_the_compression_benchmark_measures_what_stores_are_written_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    compression: Any = importlib.import_module("compression")
    values = torch.randn(300, 1000) * 0.02
    rows = compression.measure("bfloat16", [values], 2, 1)
    assert [row["codec"] for row in rows if row["used"]] == list(CODECS)
    for row, codec in zip(rows, CODECS, strict=False):
        chunk = values.bfloat16().flatten().view(torch.uint8).numpy()
        assert row["ratio"] == len(chunk) / len(encode(chunk, codec, 2))
        assert f"ratio {row['ratio']:.3f}" in compression.line(row)


def test_the_recorded_ratios_are_of_the_settings_that_stores_have() -> None:
    report = json.loads((ROOT / "bench" / "results" / "compression-minilm.json").read_text())
    for codec, chosen in SETTINGS.items():
        found = [row for row in report["results"] if row["codec"] == codec and row["used"]]
        assert [row["dtype"] for row in found] == ["float32", "bfloat16", "float16", "float8_e4m3fn"]
        for row in found:
            assert (row["level"], row["shuffle"], row["block_bytes"]) == (
                chosen.level,
                chosen.shuffle,
                chosen.block_bytes,
            )
